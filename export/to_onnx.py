"""From a checkpoint to an ONNX model: one file, dynamic batch, what the network needs to know in its metadata."""

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Collection
from typing import Literal

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from export.fuse import fuse
from model.checkpoint import Checkpoint
from model.errors import InputError
from model.net import Gate

Input = Literal["uint8", "float"]

INPUT, LOGITS, PROBABILITIES, GATES = "images", "logits", "probabilities", "gates"
OUTPUTS = (LOGITS, PROBABILITIES, GATES)
NAME_SCOPES = "pkg.torch.onnx.name_scopes"  # in a node's metadata: the modules that it comes from


class PixelNet(nn.Module):
    """A network with the way from raw pixels to its input in front: (B, H, W, C) uint8 to logits (B, N)."""

    def __init__(self, net: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.net = net
        self.register_buffer("mean_C11", torch.tensor(mean)[:, None, None])
        self.register_buffer("std_C11", torch.tensor(std)[:, None, None])

    def forward(self, pixels_BHWC: Tensor) -> Tensor:
        x_BCHW = pixels_BHWC.permute(0, 3, 1, 2).float() / 255
        return self.net((x_BCHW - self.mean_C11) / self.std_C11)


class WithOutputs(nn.Module):
    """A network that gives more than its logits: probabilities (B, N), and the expert weights (B, K) of each block."""

    def __init__(self, net: nn.Module, outputs: Collection[str]):
        super().__init__()
        self.net = net
        self.outputs = outputs
        self.gates: list[Tensor] = []
        for module in net.modules():
            if isinstance(module, Gate):
                module.register_forward_hook(lambda _, __, gate_BK: self.gates.append(gate_BK))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        self.gates.clear()
        logits_BN = self.net(images)
        probabilities = (logits_BN.softmax(1),) if PROBABILITIES in self.outputs else ()
        return logits_BN, *probabilities, *(self.gates if GATES in self.outputs else ())


def served(checkpoint: Checkpoint, kind: Input, rewrites: Collection[str] = ()) -> nn.Module:
    """The module that is exported: raw uint8 pixels (B, H, W, C) or normalised floats (B, C, H, W) to logits (B, N).

    `rewrites` are those of `export.fuse`. Raises InputError for a network whose logits depend on the whole batch.
    """
    net = checkpoint.network()
    if any(isinstance(module, Gate) and module.shuffled for module in net.modules()):
        raise InputError(
            f"{checkpoint.trained.model}: its gates are shuffled, so that an image's logits depend on others"
        )
    net = fuse(net, rewrites)
    return net if kind == "float" else PixelNet(net, checkpoint.trained.mean, checkpoint.trained.std).eval()


def as_input(pixels_BHWC: np.ndarray, checkpoint: Checkpoint, kind: Input) -> np.ndarray:
    """uint8 images in the form that `served` takes."""
    if kind == "uint8":
        return pixels_BHWC
    mean, std = (np.array(values, dtype=np.float32) for values in (checkpoint.trained.mean, checkpoint.trained.std))
    return np.ascontiguousarray(((pixels_BHWC.astype(np.float32) / 255 - mean) / std).transpose(0, 3, 1, 2))


def example(checkpoint: Checkpoint, kind: Input, batch: int) -> Tensor:
    """A batch of random images in the form that `served` takes."""
    height, width = checkpoint.trained.image_size
    channels = checkpoint.config.in_chans
    if kind == "float":
        return torch.randn(batch, channels, height, width)
    return torch.randint(256, (batch, height, width, channels), dtype=torch.uint8)


def to_onnx(
    checkpoint: Checkpoint, kind: Input, rewrites: Collection[str] = (), outputs: Collection[str] = (LOGITS,)
) -> bytes:
    """The ONNX model of a checkpoint, as the content of one file.

    The input `images` is (batch, H, W, C) uint8 or (batch, C, H, W) float32, the output `logits` (batch, N) float32.
    `rewrites` are those of `export.fuse`, for speed. Of `outputs`, `probabilities` is (batch, N), and `gates`
    stands for an output `gates.BLOCK` (batch, K) for each block that still has a gate. Raises InputError where the
    exporter of PyTorch cannot translate the network.
    """
    module = served(checkpoint, kind, rewrites)
    blocks = [name.removeprefix("net.") for name, part in module.named_modules() if isinstance(part, Gate)]
    gates = [f"{GATES}.{name.removesuffix('.gate')}" for name in blocks]
    names = [LOGITS, *([PROBABILITIES] if PROBABILITIES in outputs else []), *(gates if GATES in outputs else [])]
    if len(names) > 1:
        module = WithOutputs(module, outputs).eval()
    notices = io.StringIO()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(notices), contextlib.redirect_stderr(notices), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter's own parts to each other
            program = torch.onnx.export(
                module,
                (example(checkpoint, kind, batch=2),),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                input_names=[INPUT],
                output_names=names,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{checkpoint.trained.model}: PyTorch cannot export it: {reason}") from error
    model = program.model_proto
    onnx.helper.set_model_props(model, _metadata(checkpoint, kind))
    for node in model.graph.node:  # the exporter notes stack traces too, with the paths of this machine
        scopes = [prop for prop in node.metadata_props if prop.key == NAME_SCOPES]
        del node.metadata_props[:]
        node.metadata_props.extend(scopes)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def _metadata(checkpoint: Checkpoint, kind: Input) -> dict[str, str]:
    trained = checkpoint.trained
    return {
        "expertgrid.input": kind,
        "expertgrid.config": checkpoint.config.model_dump_json(),
        "expertgrid.trained": trained.model_dump_json(),
        "preset": trained.model,
        "trial": trained.trial,
        "data": trained.data,
        "classes": json.dumps(trained.classes),
        "mean": json.dumps(trained.mean),
        "std": json.dumps(trained.std),
        "image_size": json.dumps(trained.image_size),
    }
