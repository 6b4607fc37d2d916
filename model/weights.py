"""Weights to start from: of timm, of the Hugging Face Hub, of a file, or of a trial that was trained before.

timm fits them to a network's channels and classes, as in `timm.create_model(pretrained=True)`. What it would load is
taken before it is loaded, and becomes a file of tensors by the network's names. No code in a file is run.
"""

import copy
import hashlib
import re
import socket
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants
from safetensors import safe_open
from safetensors.torch import save
from timm.models import load_model_config_from_hf, load_pretrained, load_state_dict
from torch import Tensor, nn

from expertgrid.model.checkpoint import FORMAT, Trained
from expertgrid.model.config import Network, TimmModel
from expertgrid.model.registry import classifiers, create
from expertgrid.model.system.errors import InputError, reason_of
from expertgrid.model.training.trial import Weights

HUB = "hf-hub:"
FILES = (".safetensors", ".pth", ".pt", ".bin")
OF_A_TRIAL = re.compile(r"(.+)@([0-9a-f]{12})")
NEEDED = "a safetensors file, or torch.save(net.state_dict(), FILE), is needed"
UNCOUNTED = "num_batches_tracked"  # of batch norms, which PyTorch loads without it


class Initial(NamedTuple):
    """Weights that were read for a network."""

    weights: Weights
    file: bytes  # safetensors, by the network's names
    normalisation: tuple[tuple[float, ...], tuple[float, ...]] | None  # mean and std of its images, as the source says


def read_weights(source: str, config: Network, classes: Sequence[str]) -> Initial:
    """The weights of `source` for a network whose outputs are `classes`.

    Raises InputError for weights that cannot be read, that are not tensors alone, and for those of another network.
    """
    try:
        with _reachable_hub():
            about, tensors = _source(source)
            net = _made(config)
            fit = _fit(net, about, tensors, classes)
            hub = {"pretrained_cfg": about} if source.startswith(HUB) else {}
            if tensors is None or hasattr(net, "pretrained_cfg"):
                state = _taken(lambda: _made(config, pretrained=True, pretrained_cfg_overlay=fit, **hub))
            else:  # a user's network, whose function does not look at `pretrained`
                state = _taken(lambda: load_pretrained(net, fit, config.num_classes, config.in_chans))
        about = getattr(net, "pretrained_cfg", {}) | about if tensors is None else about
    except InputError:
        raise
    except Exception as error:  # of the Hub's HTTP library, which is another one in other versions, too
        reason = f"{reason_of(error)}; weights in a file need no network"
        raise InputError(f"weights {source}: cannot be loaded: {reason}") from error
    if state is None:
        raise InputError(f"weights {source}: the network's function loads none of timm; a file can be loaded")
    weights, file = _file(source, net, state)
    return Initial(weights, file, (tuple(about["mean"]), tuple(about["std"])) if about.get("mean") else None)


@contextmanager
def _reachable_hub() -> Generator[None]:
    """Takes the Hub's files from the cache alone where its name has no address: each would be tried for 25 s."""
    before = constants.HF_HUB_OFFLINE
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        constants.HF_HUB_OFFLINE = before or not getproxies()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _made(config: Network, **options: Any) -> nn.Module:
    """The network as timm makes it, one of ours too."""
    if isinstance(config, TimmModel):
        return create(config, {**copy.deepcopy(config.arguments), **options})
    ours = TimmModel(timm="expertnet", in_chans=config.in_chans, num_classes=config.num_classes)
    return create(ours, {"config": config.model_dump(mode="json"), **options})


def _source(source: str) -> tuple[dict[str, Any], dict[str, Tensor] | None]:
    """What a source says of itself, as timm's `pretrained_cfg`; and its tensors, None where timm reads them."""
    if source == "timm":
        return {}, None
    if source.startswith(HUB):
        return load_model_config_from_hf(source.removeprefix(HUB))[0], None
    file = Path(source).expanduser()
    if trial := OF_A_TRIAL.fullmatch(source):
        file = Path(trial[1]).expanduser() / "trials" / trial[2] / "model.safetensors"
    elif file.suffix not in FILES:
        accepted = f"none, timm, {HUB}OWNER/NAME, DIR@TRIAL, or a file ({', '.join(FILES)})"
        raise InputError(f"weights {source!r}: accepted: {accepted}")
    if not file.is_file():
        raise InputError(f"weights {source}: there is no file {file}")
    about = {}
    try:
        tensors = load_state_dict(str(file), weights_only=True)
        named = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
        if file.suffix == FILES[0]:
            with safe_open(file, framework="pt") as opened:
                metadata = opened.metadata() or {}
            if metadata.get("format") == FORMAT:  # a checkpoint of ours
                trained = Trained.model_validate_json(metadata["trained"])
                about = {"label_names": trained.classes, "mean": trained.mean, "std": trained.std}
    except Exception as error:  # of PyTorch for a file that is no pickle, of any type
        pickled = isinstance(error.__cause__, UnpicklingError)
        why = "code in it is never run" if pickled else reason_of(error)
        raise InputError(f"weights {source}: are not tensors alone ({why}); {NEEDED}") from error
    return about, named


def _fit(
    net: nn.Module, about: dict[str, Any], tensors: dict[str, Tensor] | None, classes: Sequence[str]
) -> dict[str, Any]:
    """What timm must know to fit weights to a network. A classifier of as many classes stays, unless names differ."""
    own, head = getattr(net, "pretrained_cfg", {}) | about, classifiers(net)
    fit: dict[str, Any] = {} if list(own.get("label_names") or classes) == list(classes) else {"num_classes": 0}
    if tensors is None:
        return fit
    convs = (name for name, part in net.named_modules() if isinstance(part, nn.Conv2d))
    first = own.get("first_conv") or next(convs, None)
    stem = tensors.get(f"{first if isinstance(first, str) or not first else first[0]}.weight")
    channels = 3 if stem is None or stem.ndim != 4 else stem.shape[1]
    rows = [len(tensors[f"{name}.weight"]) for name in head if f"{name}.weight" in tensors]
    image = (channels, *own.get("input_size", (channels, 224, 224))[1:])
    ends = {"first_conv": first, "classifier": head, "input_size": image, "num_classes": (rows or [len(classes)])[0]}
    return {"state_dict": tensors, **ends, **fit}


def _taken(load: Callable[[], object]) -> dict[str, Tensor] | None:
    """The tensors that `load` has a network load, none of which is loaded; None where there are none.

    timm fits them in ways that only the network's own function knows, and then gives them to this method.
    """
    taken: list[dict[str, Tensor]] = []
    original = nn.Module.load_state_dict

    def take(net: nn.Module, state: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        taken.append(state)
        return original(net, {}, strict=False)

    nn.Module.load_state_dict = take  # ty: ignore[invalid-assignment]
    try:
        load()
    finally:
        nn.Module.load_state_dict = original
    return taken[-1] if taken else None


def _file(source: str, net: nn.Module, state: dict[str, Tensor]) -> tuple[Weights, bytes]:
    """Raises InputError where tensors differ from the network's, other than a classifier that is missing."""
    expected = net.state_dict()
    needed, given = ({name: tensor.shape for name, tensor in tensors.items()} for tensors in (expected, state))
    names = sorted(name for name in needed.keys() | given.keys() if not name.endswith(UNCOUNTED))
    heads = tuple(f"{name}." for name in classifiers(net))
    new = [name for name in names if name not in given and name.startswith(heads)]
    if wrong := [name for name in names if name not in new and needed.get(name) != given.get(name)]:
        first = ", ".join(wrong[:3]) + (", ..." if wrong[3:] else "")
        raise InputError(f"weights {source}: of another network: {len(wrong)} of {len(names)} keys differ: {first}")
    loaded = {name: state[name].to(own.dtype).clone() for name, own in expected.items() if name in state}
    file = save({name: tensor.contiguous() for name, tensor in loaded.items()})
    fingerprint = hashlib.sha256(file).hexdigest()
    return Weights(source=source, fingerprint=fingerprint, tensors=len(names) - len(new), new=tuple(new)), file
