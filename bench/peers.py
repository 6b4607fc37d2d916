"""Networks of timm beside which a file is timed, so that a user sees what its experts cost.

They are built for the same images and classes, and exported as the file was. They are not trained, so that nothing is
known of their accuracy.
"""

import math
from pathlib import Path

import onnx
import torch
from timm.utils.model import reparameterize_model
from torch import nn

from expertgrid.bench.engines import engines
from expertgrid.export.certify import DEFAULT_REWRITES
from expertgrid.export.describe import read_onnx
from expertgrid.export.metadata import Metadata
from expertgrid.export.to_onnx import to_onnx
from expertgrid.model.checkpoint import Checkpoint
from expertgrid.model.config import TimmModel
from expertgrid.model.cost import cost
from expertgrid.model.registry import build
from expertgrid.model.system.errors import InputError

FAMILIES = (  # the member of each whose parameters are nearest to the file's is taken
    ("resnet10t", "resnet14t", "resnet18", "resnet26", "resnet34", "resnet50"),
    ("mobilenetv3_small_050", "mobilenetv3_small_075", "mobilenetv3_small_100"),
    ("efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2", "efficientnet_lite3", "efficientnet_lite4"),
    ("repvgg_a0", "repvgg_a1", "repvgg_a2", "repvgg_b1"),
)


class Deployed(Checkpoint):
    """A network in the form in which it is served: RepVGG's branches are one convolution."""

    def network(self) -> nn.Module:
        return reparameterize_model(super().network()).eval()


def peers_of(file: Path) -> tuple[dict[str, bytes], dict[str, str]]:
    """The ONNX model of a network of each family, by name, and those that cannot be exported, with the reason.

    Raises InputError for a file that does not say which network it is.
    """
    _, metadata = engines(read_onnx(file), str(file), "cpu", ["onnxruntime"])
    if metadata is None:
        raise InputError(f"--peers: {file}: does not say for which images and classes it is; `expertgrid export` does")
    models: dict[str, bytes] = {}
    failed: dict[str, str] = {}
    for family in FAMILIES:
        name = _nearest(family, metadata)
        try:
            models[name] = _exported(name, metadata)
        except InputError as error:
            failed[name] = str(error)
    return models, failed


def _nearest(family: tuple[str, ...], metadata: Metadata) -> str:
    size = metadata.trained.image_size
    parameters = cost(metadata.config, *size)[0]
    return min(family, key=lambda name: abs(math.log(cost(_config(name, metadata), *size)[0] / parameters)))


def _config(name: str, metadata: Metadata) -> TimmModel:
    return TimmModel(timm=name, in_chans=metadata.config.in_chans, num_classes=metadata.config.num_classes)


def _exported(name: str, metadata: Metadata) -> bytes:
    """Without metadata: PyTorch would be timed with RepVGG's branches. Raises InputError as `to_onnx`."""
    config = _config(name, metadata)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        checkpoint = Deployed(config, metadata.trained, build(config).state_dict())
    proto = onnx.load_from_string(to_onnx(checkpoint, metadata.input, DEFAULT_REWRITES))
    del proto.metadata_props[:]
    return proto.SerializeToString()
