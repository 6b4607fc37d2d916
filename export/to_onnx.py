"""From a checkpoint to an ONNX model: one file, dynamic batch, what the network needs to know in its metadata."""

import contextlib
import io
import json
import logging
import warnings
from typing import Literal

import onnx
import torch
from torch import Tensor, nn

from model.checkpoint import Checkpoint
from model.errors import InputError

Input = Literal["uint8", "float"]

INPUT, OUTPUT = "images", "logits"


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


def served(checkpoint: Checkpoint, kind: Input) -> nn.Module:
    """The module that is exported: raw uint8 pixels (B, H, W, C) or normalised floats (B, C, H, W) to logits (B, N)."""
    net = checkpoint.network()
    return net if kind == "float" else PixelNet(net, checkpoint.trained.mean, checkpoint.trained.std).eval()


def example(checkpoint: Checkpoint, kind: Input, batch: int) -> Tensor:
    """A batch of random images in the form that `served` takes."""
    height, width = checkpoint.trained.image_size
    channels = checkpoint.config.in_chans
    if kind == "float":
        return torch.randn(batch, channels, height, width)
    return torch.randint(256, (batch, height, width, channels), dtype=torch.uint8)


def to_onnx(checkpoint: Checkpoint, kind: Input) -> bytes:
    """The ONNX model of a checkpoint, as the content of one file.

    The input `images` is (batch, H, W, C) uint8 or (batch, C, H, W) float32, the output `logits` (batch, N) float32.
    Raises InputError where PyTorch's exporter cannot translate the network.
    """
    notices = io.StringIO()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(notices), contextlib.redirect_stderr(notices), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter's own parts to each other
            program = torch.onnx.export(
                served(checkpoint, kind),
                (example(checkpoint, kind, batch=2),),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                input_names=[INPUT],
                output_names=[OUTPUT],
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise InputError(
            f"{checkpoint.trained.model}: PyTorch cannot export it: {str(error).splitlines()[0]}"
        ) from error
    model = program.model_proto
    onnx.helper.set_model_props(model, _metadata(checkpoint, kind))
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
