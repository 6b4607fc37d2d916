"""Networks with random weights: how fast one is does not depend on them."""

import torch
from torch import Tensor

from expertgrid.model.checkpoint import Checkpoint, Trained
from expertgrid.model.config import Network
from expertgrid.model.registry import build

SIZE = 32  # height and width of the images, in pixels


def fresh_weights(config: Network) -> dict[str, Tensor]:
    """A network's weights before training, the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build(config).state_dict()


def untrained_checkpoint(name: str, config: Network) -> Checkpoint:
    """The checkpoint of a network before training, for images of `SIZE` x `SIZE` pixels. `name` is the preset's."""
    half, classes = (0.5,) * config.in_chans, tuple(map(str, range(config.num_classes)))
    trained = Trained(
        trial="untrained", model=name, data="none", fingerprint="0123abcd", classes=classes, image_size=(SIZE, SIZE),
        mean=half, std=half,
    )  # fmt: skip
    return Checkpoint(config, trained, fresh_weights(config))
