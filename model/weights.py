"""Weights to start from: those of timm, of the Hugging Face Hub, of a file, or of a trial that was trained before.

timm fits them to a network's channels and classes, as `timm.create_model(pretrained=True)` does. What it would load is
taken before it is loaded, and becomes a file: tensors by the names that the network has for them. A training starts
from that file, and what is not in it starts from the trial's seed. Nothing is unpickled but tensors.
"""

import copy
import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from timm.models import load_model_config_from_hf, load_pretrained, load_state_dict
from torch import Tensor, nn

from expertgrid.model.checkpoint import FORMAT, Trained
from expertgrid.model.config import Network, TimmModel
from expertgrid.model.registry import create
from expertgrid.model.system.errors import InputError, reason_of
from expertgrid.model.training.trial import Weights

HUB = "hf-hub:"
FILES = (".safetensors", ".pth", ".pt", ".bin")
OF_A_TRIAL = re.compile(r"(.+)@([0-9a-f]{12})")
ACCEPTED = f"none, timm, {HUB}OWNER/NAME, DIR@TRIAL, or a file ({', '.join(FILES)})"
UNCOUNTED = "num_batches_tracked"  # of batch norms: PyTorch loads weights without it
NAMED = 3  # keys that an error names

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]  # mean and std, for each channel, of pixels from 0 to 1


@dataclass(frozen=True)
class Initial:
    """Weights that were read for a network."""

    weights: Weights
    file: bytes  # safetensors, by the network's names
    normalisation: Normalisation | None  # that the source says its images had


def read_weights(source: str, config: Network, classes: Sequence[str]) -> Initial:
    """The weights of `source` for a network whose outputs are `classes`.

    Raises InputError for weights that are not to be had, that are not tensors alone, or are of another network.
    """
    try:
        of_source, tensors = _source(source)
        net = _made(config)
        overlay = _overlay(net, of_source, tensors, classes)
        options = {"pretrained_cfg": of_source} if of_source and tensors is None else {}
        state = _taken(lambda: _made(config, pretrained=True, pretrained_cfg_overlay=overlay, **options))
        own = getattr(net, "pretrained_cfg", {}) | of_source | overlay
        if state is None and tensors is not None:  # the network's function does not look at `pretrained`
            state = _taken(lambda: load_pretrained(net, own, config.num_classes, config.in_chans))
    except InputError:
        raise
    except Exception as error:  # of the Hub's HTTP library, which is another one in other versions, too
        reason = f"{reason_of(error)}; weights in a file need no network"
        raise InputError(f"weights {source}: cannot be loaded: {reason}") from error
    if state is None:
        raise InputError(f"weights {source}: the network does not load them as timm's networks do; take a file")
    says_mean = tensors is None or "mean" in of_source
    return _initial(source, net, state, own, (tuple(own["mean"]), tuple(own["std"])) if says_mean else None)


def _made(config: Network, **options: Any) -> nn.Module:
    """The network as timm makes it, of ours too."""
    if isinstance(config, TimmModel):
        return create(config, {**copy.deepcopy(config.arguments), **options})
    ends = {"in_chans": config.in_chans, "num_classes": config.num_classes}
    return create(TimmModel(timm="expertnet", **ends), {"config": config.model_dump(mode="json"), **options})


def _source(source: str) -> tuple[dict[str, Any], dict[str, Tensor] | None]:
    """What a source says of itself, as a `pretrained_cfg` of timm; and its tensors, None where timm reads them."""
    if source == "timm":
        return {}, None
    if source.startswith(HUB):
        cfg, _, _ = load_model_config_from_hf(source.removeprefix(HUB))
        return cfg, None
    if trial := OF_A_TRIAL.fullmatch(source):
        file = Path(trial[1]).expanduser() / "trials" / trial[2] / "model.safetensors"
    elif source.endswith(FILES):
        file = Path(source).expanduser()
    else:
        raise InputError(f"weights {source!r}: accepted: {ACCEPTED}")
    if not file.is_file():
        raise InputError(f"weights {source}: there is no file {file}")
    try:
        tensors = load_state_dict(str(file), weights_only=True)
        about = _about_checkpoint(file) if file.suffix == ".safetensors" else {}
    except (RuntimeError, ValueError, OSError, EOFError, SafetensorError, UnpicklingError) as error:
        needed = "a safetensors file, or torch.save(net.state_dict(), FILE), is needed; code in a file is never run"
        reason = reason_of(error.__cause__ if isinstance(error.__cause__, UnpicklingError) else error)
        raise InputError(f"weights {source}: are not weights alone: {reason.split('.')[0]}; {needed}") from error
    tensors = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
    return about, tensors


def _about_checkpoint(file: Path) -> dict[str, Any]:
    """What a checkpoint of ours says; nothing of another file."""
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata() or {}
    if metadata.get("format") != FORMAT:
        return {}
    trained = Trained.model_validate_json(metadata["trained"])
    return {"label_names": trained.classes, "mean": trained.mean, "std": trained.std}


def _overlay(
    net: nn.Module, of_source: dict[str, Any], tensors: dict[str, Tensor] | None, classes: Sequence[str]
) -> dict[str, Any]:
    """What timm must know beside a network's `pretrained_cfg` to fit weights to it.

    A classifier is taken over where it has as many classes, and none of another name.
    """
    own, overlay = getattr(net, "pretrained_cfg", {}) | of_source, {}
    if not own.get("classifier"):  # a user's network, of which timm knows nothing
        own |= (overlay := {"num_classes": len(classes), "input_size": (3, 0, 0)} | _ends(net))
    if tensors is not None:
        overlay["state_dict"] = tensors
        if (head := tensors.get(f"{_first(own['classifier'])}.weight")) is not None:
            overlay["num_classes"] = len(head)
        if (stem := tensors.get(f"{_first(own['first_conv'])}.weight")) is not None and stem.ndim == 4:
            overlay["input_size"] = (stem.shape[1], *own["input_size"][1:])
    if own.get("label_names") and list(own["label_names"]) != list(classes):
        overlay["num_classes"] = 0
    return overlay


def _first(names: str | Sequence[str] | None) -> str | None:
    return names if isinstance(names, str) or not names else names[0]


def _ends(net: nn.Module) -> dict[str, str | None]:
    """The first convolution and the last linear layer of a network, as a `pretrained_cfg` names them."""
    kinds = {"first_conv": nn.Conv2d, "classifier": nn.Linear}
    names = {end: [name for name, part in net.named_modules() if isinstance(part, kind)] for end, kind in kinds.items()}
    return {
        "first_conv": next(iter(names["first_conv"]), None),
        "classifier": next(reversed(names["classifier"]), None),
    }


class _Taken(Exception):
    """What a network was about to load."""

    def __init__(self, state: dict[str, Tensor]):
        super().__init__("not loaded")
        self.state = state


def _taken(load: Callable[[], object]) -> dict[str, Tensor] | None:
    """The tensors that `load` would have a network load; None where it loads none.

    timm fits them to the network, in ways that only the network's own function knows, and gives them to this method.
    """

    def take(net: nn.Module, state_dict: dict[str, Tensor], *args: Any, **kwargs: Any) -> None:
        raise _Taken(state_dict)

    original = nn.Module.load_state_dict
    nn.Module.load_state_dict = take
    try:
        load()
    except _Taken as taken:
        return taken.state
    finally:
        nn.Module.load_state_dict = original
    return None


def _initial(
    source: str, net: nn.Module, state: dict[str, Tensor], own: dict[str, Any], normalisation: Normalisation | None
) -> Initial:
    """Raises InputError where tensors differ from the network's, other than a classifier that is missing."""
    expected = net.state_dict()
    heads = [own["classifier"]] if isinstance(own["classifier"], str) else own["classifier"] or ()
    names = sorted(name for name in expected.keys() | state.keys() if not name.endswith(UNCOUNTED))
    new = [name for name in names if name not in state and name.startswith(tuple(f"{head}." for head in heads))]
    shapes = ({name: tensor.shape for name, tensor in tensors.items()} for tensors in (expected, state))
    needed, given = shapes
    if wrong := [name for name in names if name not in new and needed.get(name) != given.get(name)]:
        more = ", ..." if len(wrong) > NAMED else ""
        raise InputError(
            f"weights {source}: of another network: {len(wrong)} of {len(names)} keys differ: "
            f"{', '.join(wrong[:NAMED])}{more}"
        )
    file = save({name: state[name].to(expected[name].dtype).clone().contiguous() for name in expected if name in state})
    fingerprint = hashlib.sha256(file).hexdigest()
    weights = Weights(source=source, fingerprint=fingerprint, tensors=len(names) - len(new), new=tuple(new))
    return Initial(weights, file, normalisation)
