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
from expertgrid.export.session import open_session
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

    kind: str  # of ENGINES, but for "own"
    model: bytes
    name: str  # what errors call the model
    provider: str
    input: str  # names in the file
    output: str
    metadata: Metadata | None  # of an expertgrid file
    options: Options = AS_IT_IS

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.provider == "cpu" else "cuda")

    @property
    def title(self) -> str:
        """Its name in tables."""
        if self.kind in PYTORCH:
            return f"pytorch {self.kind.replace('-', ' ')} {self.device.type}"
        options = f" ({self.options})" if self.options != AS_IT_IS else ""
        return f"{self.kind} {self.provider}{options}"

    def check(self) -> None:
        """Raises InputError where OpenVINO or a compiler is missing, or where OpenVINO is to run on a GPU."""
        if self.kind in OPENVINO:
            if self.provider != "cpu":
                raise InputError(
                    f"engine {self.kind!r}: OpenVINO runs on the CPU here, not on provider {self.provider!r}"
                )
            check_openvino()
        if self.kind in PYTORCH and PYTORCH[self.kind][1] and (reason := why_unavailable(self.device)):
            raise InputError(f"engine 'compiled': {reason}")

    def __call__(self) -> Run:
        if self.kind in PYTORCH:
            assert self.metadata is not None  # PyTorch runs files that describe their network
            return _pytorch(self.metadata, self.device, *PYTORCH[self.kind])
        if self.kind in OPENVINO:
            session = OpenVinoSession(self.model, self.name, OPENVINO[self.kind], self.options)
        else:
            session = open_session(self.model, self.provider, self.name, options=self.options)
        return lambda images: session.run([self.output], {self.input: images})[0]


def engines(
    model: bytes, name: str, provider: str, kinds: Sequence[str] = USUAL
) -> tuple[dict[str, Engine], Metadata | None]:
    """The engines of these kinds that can run the model, by their titles, and the metadata of an expertgrid file.

    ONNX Runtime runs on `provider`, PyTorch on the same device. PyTorch's network is built from the config in the
    metadata, with fresh weights, as its speed does not depend on them; a file of other origin has none. A compiled
    network is compiled once for each batch size and kept. Raises InputError where the file does not load, or an engine
    is not available.
    """
    for kind in kinds:
        if kind not in ENGINES:
            raise unknown("engine", kind, ENGINES)
    session = open_session(model, provider, name)
    inputs, outputs = session.get_inputs(), session.get_outputs()
    if (
        len(inputs) != 1
        or inputs[0].type not in DTYPES
        or any(not isinstance(size, int) for size in inputs[0].shape[1:])
    ):
        described = ", ".join(f"{value.name}: {value.type} {value.shape}" for value in inputs)
        raise InputError(
            f"{name}: needs one input of images, uint8 or float, with only the batch left open; found {described}"
        )
    if not outputs:
        raise InputError(f"{name}: has no output")
    entries = session.get_modelmeta().custom_metadata_map
    metadata = read_metadata(entries, name) if is_expertgrid_file(entries) else None
    chosen = dict.fromkeys(_own(metadata, provider) if kind == OWN else (kind, AS_IT_IS) for kind in kinds)
    by_title: dict[str, Engine] = {}
    for kind, options in chosen:
        if kind not in PYTORCH or metadata is not None:
            engine = Engine(kind, model, name, provider, inputs[0].name, outputs[0].name, metadata, options)
            engine.check()
            by_title[engine.title] = engine
    if not by_title:
        raise InputError(f"{name}: does not say which network it is; engine {', '.join(kinds)} needs that")
    return by_title, metadata


def _own(metadata: Metadata | None, provider: str) -> tuple[str, Options]:
    """The kind of engine that a file was tuned for, and its options; those of another provider are not taken."""
    if metadata is None:
        return "onnxruntime", AS_IT_IS
    if metadata.provider != "openvino":
        return "onnxruntime", metadata.options_on(provider)
    return "openvino-bf16" if metadata.precision == "bf16" else "openvino", metadata.options


class Cast(nn.Module):
    """Images in another type."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW.to(self.dtype)


def _untrained(metadata: Metadata, dtype: torch.dtype) -> nn.Module:
    """The network of an expertgrid file with fresh weights, from the file's input to logits, in evaluation mode."""
    net = build(metadata.config)
    if dtype != torch.float32:
        net = nn.Sequential(Cast(dtype), net.to(dtype))
    if metadata.input == "uint8":
        net = PixelNet(net, metadata.trained.mean, metadata.trained.std)
    return net.eval()


@cache
def _compiled_net(metadata_json: str, device: torch.device, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    compile_without_limit()
    net = _untrained(Metadata.model_validate_json(metadata_json), dtype)
    return torch.compile(net.to(device).to(memory_format=torch.channels_last), dynamic=False)


def _pytorch(metadata: Metadata, device: torch.device, dtype: torch.dtype, is_compiled: bool) -> Run:
    if is_compiled:
        net = _compiled_net(metadata.model_dump_json(), device, dtype)
    else:
        net = _untrained(metadata, dtype).to(device)

    @torch.inference_mode()
    def run(images: np.ndarray) -> np.ndarray:
        return net(torch.from_numpy(images).to(device)).float().cpu().numpy()

    return run
