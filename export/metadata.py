"""The metadata of an exported ONNX file: what another program needs to use the file, and where the network comes from.

This is the one place that writes and reads it. Entries are text. What another program needs has plain names: `classes`,
`mean`, `std` and `image_size` are JSON, `resize` says how an image of another size is brought to `image_size`, `data`
and `preset` are names. Entries that only expertgrid reads begin with "expertgrid.".
"""

import json
import sys
from collections.abc import Mapping
from typing import Literal, get_args

import onnx
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from expertgrid.model.config import Network, parse_config
from expertgrid.model.pixels import Trained
from expertgrid.model.system.errors import InputError, invalid
from expertgrid.model.system.machine import usable_cores

Input = Literal["uint8", "float"]
Precision = Literal["fp32", "fp16", "int8", "bf16"]  # bf16: weights in fp32, computed in bf16 by the provider

INPUT, LOGITS = "images", "logits"  # the input of the network, and its first output
KIND, CONFIG, PROVIDER = "expertgrid.input", "expertgrid.config", "expertgrid.provider"
OPTIONS = "expertgrid.options"
PRECISION, PRUNED, CERTIFICATE = "expertgrid.precision", "expertgrid.pruned", "expertgrid.certificate"
NAMES = {"model": "preset"}  # fields of Trained whose entries have another name


class Options(BaseModel):
    """How an engine runs a file, where that is not the engine's own way."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    threads: int | None = Field(None, ge=1)  # at most as many as there are; None: as many
    spinning: bool = True  # ONNX Runtime's threads wait for work without sleeping
    # Of B x C x H x W inside the network. None: ONNX Runtime blocks the channels on a CPU, and takes NCHW on CUDA.
    layout: Literal["NCHW", "NHWC"] | None = None

    def threads_here(self) -> int:
        """How many it takes of PyTorch's threads; where that is not imported, of one for each core."""
        available = torch.get_num_threads() if (torch := sys.modules.get("torch")) else usable_cores()
        return min(self.threads or available, available)

    def __str__(self) -> str:
        """Such as "1 thread, no spinning, NCHW"; "" for the engine's own way."""
        threads = "" if self.threads is None else f"{self.threads} thread{'s' * (self.threads > 1)}"
        return ", ".join(filter(None, [threads, "" if self.spinning else "no spinning", self.layout]))


AS_IT_IS = Options()


class Metadata(BaseModel):
    """What expertgrid says of a file that it exported."""

    model_config = ConfigDict(frozen=True)

    input: Input  # raw pixels (B, H, W, C), or normalised floats (B, C, H, W)
    config: Network
    trained: Trained
    precision: Precision = "fp32"
    provider: str = "cpu"  # that runs the file where no other is asked for
    options: Options = AS_IT_IS  # with which that provider runs it
    pruned: float | None = None  # the least gate weight of experts that were kept; None where none were dropped

    def options_on(self, provider: str) -> Options:
        """With which a provider runs the file: those that were chosen are of one provider."""
        return self.options if provider == self.provider else AS_IT_IS

    def entries(self) -> dict[str, str]:
        """The entries of the file, without the certificate's."""
        fields = self.trained.model_dump(mode="json")
        trained = {NAMES.get(name, name): _text(value) for name, value in fields.items()}
        about = {KIND: self.input, CONFIG: self.config.model_dump_json(), PRECISION: self.precision}
        pruned = {} if self.pruned is None else {PRUNED: f"{self.pruned:g}"}
        provider = {} if self.provider == "cpu" else {PROVIDER: self.provider}
        options = {} if self.options == AS_IT_IS else {OPTIONS: self.options.model_dump_json(exclude_defaults=True)}
        return trained | about | provider | options | pruned


def is_expertgrid_file(entries: Mapping[str, str]) -> bool:
    """Whether expertgrid exported the file that has these entries."""
    return KIND in entries and CONFIG in entries


def read_metadata(entries: Mapping[str, str], name: str) -> Metadata:
    """What the entries of a file say; `name` is what errors call the file.

    Raises InputError, naming the entry, where one is missing or damaged: a file of another origin has none.
    """
    needed = [KIND, CONFIG, *(NAMES.get(field, field) for field in Trained.model_fields)]
    for key in needed:
        if key not in entries:
            raise InputError(f"{name}: its metadata has no {key!r}; a file that `expertgrid export` wrote is needed")
    if entries[KIND] not in get_args(Input):
        raise InputError(f"{name}: metadata {KIND}: found {entries[KIND]!r}; accepted: {', '.join(get_args(Input))}")
    fields: dict[str, object] = {}
    for field, about in Trained.model_fields.items():
        key = NAMES.get(field, field)
        try:
            fields[field] = entries[key] if about.annotation is str else json.loads(entries[key])
        except (ValueError, RecursionError) as error:  # ValueError: a number of thousands of digits, too
            raise InputError(f"{name}: metadata {key}: not JSON ({error})") from None
    config = parse_config(entries[CONFIG], f"{name}: metadata {CONFIG}")
    own: dict[str, object] = {"input": entries[KIND], "config": config, "provider": entries.get(PROVIDER, "cpu")}
    own |= {"precision": entries.get(PRECISION, "fp32"), "pruned": entries.get(PRUNED)}
    try:
        own["options"] = Options.model_validate_json(entries.get(OPTIONS, "{}"))
        return Metadata.model_validate(own | {"trained": Trained.model_validate(fields)})
    except ValidationError as error:
        raise invalid(f"{name}: metadata", error) from None


def entries_of(proto: onnx.ModelProto) -> dict[str, str]:
    """All entries of a model, of whatever origin."""
    return {entry.key: entry.value for entry in proto.metadata_props}


def with_entries(model: bytes, entries: Mapping[str, str]) -> bytes:
    """The model with these entries too, in place of those of the same name."""
    proto = onnx.load_from_string(model)
    onnx.helper.set_model_props(proto, entries_of(proto) | dict(entries))
    return proto.SerializeToString()


def without_certificate(model: bytes) -> tuple[bytes, str]:
    """The model as it was before its certificate's SHA-256 was entered, and that SHA-256; "" for a model without it."""
    proto = onnx.load_from_string(model)
    entries = entries_of(proto)
    digest = entries.pop(CERTIFICATE, "")
    del proto.metadata_props[:]
    onnx.helper.set_model_props(proto, entries)
    return proto.SerializeToString(), digest


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
