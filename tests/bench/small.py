"""Small things that several tests of `bench` share, and that a process of its own imports quickly."""

from functools import cache
from pathlib import Path

import onnx
import torch
from onnx import TensorProto, helper

from expertgrid.model.checkpoint import Checkpoint, Trained
from expertgrid.model.presets import PRESETS
from expertgrid.model.registry import build
from expertgrid.model.variants import vary

CONFIG = vary(PRESETS["two_block"], "width", 0.125)
TRAINED = Trained(
    trial="abc", model="two_block", data="digits", fingerprint="0123abcd", classes=tuple("0123456789"),
    image_size=(8, 8), mean=(0.5,) * 3, std=(0.25,) * 3,
)  # fmt: skip


@cache
def two_block(size: int = 8) -> bytes:
    """The ONNX model of a narrow network, for images of `size` x `size` pixels."""
    from expertgrid.export.to_onnx import to_onnx  # slow to import

    torch.manual_seed(0)
    trained = TRAINED.model_copy(update={"image_size": (size, size)})
    return to_onnx(Checkpoint(CONFIG, trained, build(CONFIG).state_dict()), "uint8")


def identity(path: Path, shape: list[int | str], dtype: int = TensorProto.FLOAT) -> Path:
    """Writes an ONNX file of other origin: its output is its input."""
    ends = [helper.make_tensor_value_info(name, dtype, shape) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", ends[:1], ends[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def adam(net: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(net.parameters(), fused=True)
