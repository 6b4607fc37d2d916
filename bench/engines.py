"""What runs a network: ONNX Runtime and OpenVINO run the file, PyTorch the network that an expertgrid file describes.

Shapes: B images, H rows, W columns, C channels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from expertgrid.export.metadata import AS_IT_IS, Metadata, Options, is_expertgrid_file, read_metadata
from expertgrid.export.openvino import OpenVinoSession, check_openvino
from expertgrid.export.session import Session, open_session
from expertgrid.export.to_onnx import PixelNet
from expertgrid.model.fast.compiled import compile_without_limit, why_unavailable
from expertgrid.model.registry import build
from expertgrid.model.system.errors import InputError, unknown

Run = Callable[[np.ndarray], Any]  # from a batch of inputs to logits

DTYPES = {"tensor(uint8)": np.uint8, "tensor(float)": np.float32}
PYTORCH = {  # dtype, and whether it is compiled
    "eager": (torch.float32, False),
    "eager-bf16": (torch.bfloat16, False),
    "compiled": (torch.float32, True),
    "compiled-bf16": (torch.bfloat16, True),
}
OPENVINO = {"openvino": "fp32", "openvino-bf16": "bf16"}
OWN = "own"  # what an expertgrid file was tuned for, else ONNX Runtime
ENGINES = (OWN, "onnxruntime", *PYTORCH, *OPENVINO)
USUAL = (OWN, "eager")


@dataclass(frozen=True)
class Engine:
    """A way to run a model. It can be sent to another process; each call of it opens the engine anew."""

    word: str  # of ENGINES, but for "own"
    model: bytes
    name: str  # what errors call the model
    provider: str
    given: str  # the name of the input
    made: str  # and of the output
    metadata: Metadata | None  # of an expertgrid file
    options: Options = AS_IT_IS

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.provider == "cpu" else "cuda")

    @property
    def title(self) -> str:
        """Its name in tables."""
        options = f" ({self.options})" if self.options != AS_IT_IS else ""
        if self.word == "onnxruntime":
            return f"onnxruntime {self.provider}{options}"
        if self.word in OPENVINO:
            return f"{self.word} cpu{options}"
        return f"pytorch {self.word.replace('-', ' ')} {self.device.type}"

    def check(self) -> None:
        """Raises InputError where OpenVINO or a compiler is not there, or a GPU was asked of OpenVINO."""
        if self.word in OPENVINO and self.provider != "cpu":
            raise InputError(f"engine {self.word!r}: OpenVINO runs on the CPU here, not on provider {self.provider!r}")
        if self.word in OPENVINO:
            check_openvino()
        if self.word in PYTORCH:
            check_compiler(self.device, PYTORCH[self.word][1])

    def __call__(self) -> Run:
        if self.word == "onnxruntime":
            return self._of_session(open_session(self.model, self.provider, self.name, options=self.options))
        if self.word in OPENVINO:
            return self._of_session(OpenVinoSession(self.model, self.name, OPENVINO[self.word], self.options))
        assert self.metadata is not None  # PyTorch runs files that describe their network
        dtype, is_compiled = PYTORCH[self.word]
        return (_compiled if is_compiled else _eager)(self.metadata, self.device, dtype)

    def _of_session(self, session: Session) -> Run:
        outputs, given = [self.made], self.given
        return lambda images: session.run(outputs, {given: images})[0]


def engines(
    model: bytes, name: str, provider: str, wanted: Sequence[str] = USUAL
) -> tuple[dict[str, "Engine"], Metadata | None]:
    """The `wanted` engines that can run the model, by their names in tables, and the metadata of an expertgrid file.

    ONNX Runtime runs on `provider`, PyTorch on the same device. PyTorch's network is built from the config in the
    metadata, with fresh weights, as its speed does not depend on them; a file of other origin has none. A compiled
    network is compiled once for each batch size and kept. Raises InputError where the file does not load, or an engine
    is not there.
    """
    for engine in wanted:
        if engine not in ENGINES:
            raise unknown("engine", engine, ENGINES)
    session = open_session(model, provider, name)
    given = session.get_inputs()
    if len(given) != 1 or given[0].type not in DTYPES or any(not isinstance(size, int) for size in given[0].shape[1:]):
        found = ", ".join(f"{value.name}: {value.type} {value.shape}" for value in given)
        raise InputError(
            f"{name}: needs one input of images, uint8 or float, with only the batch left open; found {found}"
        )
    if not session.get_outputs():
        raise InputError(f"{name}: has no output")
    entries = session.get_modelmeta().custom_metadata_map
    metadata = read_metadata(entries, name) if is_expertgrid_file(entries) else None
    chosen = dict.fromkeys(_own(metadata, provider) if engine == OWN else (engine, AS_IT_IS) for engine in wanted)
    found = [
        Engine(engine, model, name, provider, given[0].name, session.get_outputs()[0].name, metadata, options)
        for engine, options in chosen
        if engine not in PYTORCH or metadata is not None
    ]
    for engine in found:
        engine.check()
    return {engine.title: engine for engine in found}, metadata


def _own(metadata: Metadata | None, provider: str) -> tuple[str, Options]:
    """The word of the engine that a file was tuned for, and its options; those of another provider are not taken."""
    if metadata is None:
        return "onnxruntime", AS_IT_IS
    if metadata.provider != "openvino":
        return "onnxruntime", metadata.options_on(provider)
    return "openvino-bf16" if metadata.precision == "bf16" else "openvino", metadata.options


def check_compiler(device: torch.device, is_compiled: bool) -> None:
    """Raises InputError where torch.compile cannot work."""
    if is_compiled and (reason := why_unavailable(device)):
        raise InputError(f"engine 'compiled': {reason}")


def untrained(metadata: Metadata, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The network of an expertgrid file with fresh weights, from the file's input to logits, in evaluation mode.

    It computes in `dtype`. Its speed does not depend on its weights.
    """
    net = build(metadata.config)
    if dtype != torch.float32:
        net = nn.Sequential(Cast(dtype), net.to(dtype))
    if metadata.input == "uint8":
        net = PixelNet(net, metadata.trained.mean, metadata.trained.std)
    return net.eval()


class Cast(nn.Module):
    """Images in another type."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW.to(self.dtype)


def _eager(metadata: Metadata, device: torch.device, dtype: torch.dtype) -> Run:
    return _pytorch(untrained(metadata, dtype).to(device), device)


@cache
def _compiled_net(metadata_json: str, device: torch.device, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    compile_without_limit()
    net = untrained(Metadata.model_validate_json(metadata_json), dtype)
    return torch.compile(net.to(device).to(memory_format=torch.channels_last), dynamic=False)


def _compiled(metadata: Metadata, device: torch.device, dtype: torch.dtype) -> Run:
    return _pytorch(_compiled_net(metadata.model_dump_json(), device, dtype), device)


def _pytorch(net: Callable[[Tensor], Tensor], device: torch.device) -> Run:
    @torch.inference_mode()
    def run(images: np.ndarray) -> np.ndarray:
        return net(torch.from_numpy(images).to(device)).float().cpu().numpy()

    return run
