"""From a checkpoint to an ONNX model: one file, dynamic batch, what the network needs to know in its metadata."""

import contextlib
import io
import logging
import warnings
from collections.abc import Collection

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from expertgrid.export.metadata import INPUT, LOGITS, Input, Metadata
from expertgrid.export.rewrites import rewrite
from expertgrid.model.checkpoint import Checkpoint
from expertgrid.model.gates import gates, recorded
from expertgrid.model.pixels import normalise, normalised
from expertgrid.model.system.errors import InputError

PROBABILITIES, GATES = "probabilities", "gates"
OUTPUTS = (LOGITS, PROBABILITIES, GATES)
NAME_SCOPES = "pkg.torch.onnx.name_scopes"  # in a node's metadata: the modules that it comes from


class PixelNet(nn.Module):
    """A network behind its normalisation of raw pixels: (B, H, W, C) uint8 to logits (B, N)."""

    mean_C: Tensor
    std_C: Tensor

    def __init__(self, net: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.net = net
        self.register_buffer("mean_C", torch.tensor(mean))
        self.register_buffer("std_C", torch.tensor(std))

    def forward(self, pixels_BHWC: Tensor) -> Tensor:
        return self.net(normalise(pixels_BHWC.permute(0, 3, 1, 2), self.mean_C, self.std_C))


class WithOutputs(nn.Module):
    """A network that gives more than its logits: probabilities (B, N), and the expert weights (B, K) of each block."""

    def __init__(self, net: nn.Module, outputs: Collection[str]):
        super().__init__()
        self.net = net
        self.outputs = outputs

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        with recorded(gates(self.net)) as weights:
            logits_BN = self.net(images)
        probabilities = (logits_BN.softmax(1),) if PROBABILITIES in self.outputs else ()
        weights_BK = [gate_BK for (gate_BK,) in weights.values()] if GATES in self.outputs else []
        return logits_BN, *probabilities, *weights_BK


def served(checkpoint: Checkpoint, kind: Input, rewrites: Collection[str] = ()) -> nn.Module:
    """The module that is exported: raw uint8 pixels (B, H, W, C) or normalised floats (B, C, H, W) to logits (B, N).

    `rewrites` are those of `export.rewrites`. Raises InputError for a network whose logits depend on the whole batch.
    """
    net = checkpoint.network()
    if any(gate.shuffled for gate in gates(net).values()):
        raise InputError(
            f"{checkpoint.trained.model}: its gates are shuffled, so that an image's logits depend on others"
        )
    net = rewrite(net, rewrites)
    return net if kind == "float" else PixelNet(net, checkpoint.trained.mean, checkpoint.trained.std).eval()


def as_input(pixels_BHWC: np.ndarray, checkpoint: Checkpoint, kind: Input) -> np.ndarray:
    """uint8 images in the form that `served` takes."""
    return pixels_BHWC if kind == "uint8" else normalised(pixels_BHWC, checkpoint.trained)


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
    `rewrites` are those of `export.rewrites`, for speed. Of `outputs`, `probabilities` is (batch, N), and `gates`
    stands for an output `gates.BLOCK` (batch, K) for each block that still has a gate. Raises InputError where the
    exporter of PyTorch cannot translate the network.
    """
    module = served(checkpoint, kind, rewrites)
    weights = [f"{GATES}.{block.removeprefix('net.')}" for block in gates(module)] if GATES in outputs else []
    names = [LOGITS, *([PROBABILITIES] if PROBABILITIES in outputs else []), *weights]
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
    assert program is not None  # it is None only for the old exporter, without dynamo
    model = program.model_proto
    metadata = Metadata(input=kind, config=checkpoint.config, trained=checkpoint.trained)
    onnx.helper.set_model_props(model, metadata.entries())
    return checked(model)


def checked(model: onnx.ModelProto) -> bytes:
    """The content of the file of a valid model. Of what is noted in its nodes, the modules that they come from stay.

    The exporter notes stack traces too, with the paths of this machine.
    """
    for node in model.graph.node:
        scopes = [prop for prop in node.metadata_props if prop.key == NAME_SCOPES]
        del node.metadata_props[:]
        node.metadata_props.extend(scopes)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()
