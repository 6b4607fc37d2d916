"""Checkpoints: safetensors files of the weights, with the network's config in the metadata. Nothing is unpickled."""

import json
import struct
from dataclasses import dataclass
from pathlib import Path

import timm
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from expertgrid.model.config import Network, TimmModel, parse_config
from expertgrid.model.pixels import Trained
from expertgrid.model.probe import NETWORK, Probe, probe_of
from expertgrid.model.registry import build, for_shapes
from expertgrid.model.system.errors import InputError, invalid
from expertgrid.model.system.files import MissingFile, opened_file

FORMAT = "expertgrid-2"


@dataclass(frozen=True)
class Checkpoint:
    """A trained network: its config, its weights by name, and what it was trained on."""

    config: Network
    trained: Trained
    weights: dict[str, Tensor]

    def network(self) -> nn.Module:
        """The network with its weights, on the CPU, in evaluation mode."""
        net = build(self.config)
        net.load_state_dict(self.weights)
        return net.eval()

    def to_bytes(self) -> bytes:
        """The content of the file. Equal networks give equal bytes."""
        about = {"format": FORMAT, "config": self.config.model_dump_json(), "trained": self.trained.model_dump_json()}
        return _sorted(save({name: tensor.cpu().contiguous() for name, tensor in self.weights.items()}, about))


def _sorted(file: bytes) -> bytes:
    """A safetensors file with its header's keys in order: safetensors itself writes metadata in a random order.

    A file is the length of its header (8 bytes, little-endian), the header (JSON), and the tensors, which begin at a
    multiple of 8 bytes.
    """
    (length,) = struct.unpack_from("<Q", file)
    header = json.dumps(json.loads(file[8 : 8 + length]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + file[8 + length :]


def load(path: Path) -> Checkpoint:
    """Reads a checkpoint.

    Raises InputError for a file that is missing, damaged or no checkpoint, for weights that do not fit the config, and
    for a user's network whose code has changed since.
    """
    try:
        with opened_file(path), safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (the file itself does not iterate)
    except MissingFile:
        raise InputError(f"{path}: there is no such checkpoint") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a safetensors file, or a damaged one ({error})") from None
    if about.get("format") != FORMAT:
        raise InputError(f"{path}: format is {about.get('format')!r}; expertgrid checkpoints have {FORMAT!r}")
    config = parse_config(about.get("config", ""), str(path))
    if isinstance(config, TimmModel) and not timm.is_model(config.timm):
        raise InputError(f"{path}: model {config.timm!r}: unknown to timm; --import MODULE registers networks")
    try:
        trained = Trained.model_validate_json(about.get("trained", ""))
    except ValidationError as error:
        raise invalid(f"{path}: trained", error, Trained.model_fields) from None
    with for_shapes(config):
        expected = build(config).state_dict()
    wrong = [
        name for name in sorted(expected.keys() | weights.keys()) if _shape(expected, name) != _shape(weights, name)
    ]
    if wrong:
        shape, needed = _shape(weights, wrong[0]), _shape(expected, wrong[0])
        raise InputError(f"{path}: weights of another config: {wrong[0]} is {shape}, its config needs {needed}")
    if (file := path.with_name(NETWORK)).exists():
        _check_code(file, config, trained)
    return Checkpoint(config, trained, weights)


def _check_code(file: Path, config: Network, trained: Trained) -> None:
    """Raises InputError where a user's network does not compute any more what it did when it was trained."""
    try:
        kept, now = Probe.model_validate_json(file.read_bytes()), probe_of(config, trained.image_size)
    except ValidationError as error:
        raise invalid(str(file), error, Probe.model_fields) from None
    if now and (what := kept.difference(now)):
        raise InputError(f"{file.parent}: was trained by other code than {trained.model} has now: {what} differ")


def _shape(weights: dict[str, Tensor], name: str) -> str:
    return "x".join(map(str, weights[name].shape)) or "a number" if name in weights else "absent"
