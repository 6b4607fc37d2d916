"""Inference with inputs and outputs on the device: ONNX Runtime with IO binding, and CUDA graphs of both engines.

`bench.latency` times a call as a program has it whose images are in the host's memory. Here they are on the device
before the clock starts and the logits stay there, at fixed addresses, which is what a CUDA graph needs: each call is
then one launch. On a CPU there are no graphs, and binding only saves copies.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from pydantic import BaseModel
from torch import Tensor

from bench.engines import untrained
from bench.latency import Latency, random_images
from bench.peaks import synchronise
from bench.timing import take_turns
from export.graph import read_onnx
from export.metadata import entries_of, read_metadata
from export.session import ORT_ERRORS, open_session
from model.errors import InputError

Call = Callable[[], object]

# Options of the CUDA provider. In the layout of the matrix units convolutions need no transposes around them, but the
# mix of the experts does.
GRAPHS = {
    "onnxruntime cuda graph": {"enable_cuda_graph": "1"},
    "onnxruntime cuda graph, channels last": {"enable_cuda_graph": "1", "prefer_nhwc": "1", "fuse_conv_bias": "1"},
}


class NotMeasured(BaseModel):
    """An engine that does not run here, and why."""

    engine: str
    batch: int
    reason: str


def bound(model: bytes, name: str, provider: str, images: np.ndarray, chosen: Mapping[str, str]) -> Call:
    """A call of ONNX Runtime whose input and output are on the provider's device, with `chosen` of its options.

    Raises InputError.
    """
    session = open_session(model, provider, name, chosen)
    device = "cpu" if provider == "cpu" else "cuda"
    given, made = session.get_inputs()[0], session.get_outputs()[0]
    binding = session.io_binding()
    binding.bind_ortvalue_input(given.name, onnxruntime.OrtValue.ortvalue_from_numpy(images, device, 0))
    shape = [len(images), *made.shape[1:]]
    logits_BN = onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, np.float32, device, 0)
    binding.bind_ortvalue_output(made.name, logits_BN)

    def call() -> None:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    call()
    return call


@torch.inference_mode()
def pytorch_resident(model: bytes, name: str, images: np.ndarray, device: torch.device) -> Call:
    """A call of PyTorch on the network that the file describes, in the file's precision; a CUDA graph on CUDA."""
    metadata = read_metadata(entries_of(onnx.load_from_string(model)), name)
    if metadata.input != "uint8":
        raise InputError(f"{name}: takes normalised floats; a file with uint8 input is needed")
    dtype = torch.float16 if metadata.precision == "fp16" else torch.float32
    net = untrained(metadata, dtype).to(device).to(memory_format=torch.channels_last)
    pixels_BHWC = torch.from_numpy(images).to(device)
    if device.type != "cuda":
        return torch.inference_mode()(lambda: net(pixels_BHWC))
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            net(pixels_BHWC)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits_BN = net(pixels_BHWC)

    def call(replayed_from: object = (net, pixels_BHWC)) -> Tensor:  # kept: the graph has their addresses alone
        graph.replay()
        synchronise(device)
        return logits_BN

    return call


def measure_resident(
    path: Path, device: torch.device, batches: list[int], measure_s: float
) -> tuple[list[Latency], list[NotMeasured]]:
    """Latencies of each engine at each batch size, and the engines that do not run here. Raises InputError."""
    model, kind = read_onnx(path), device.type
    makers: dict[str, Callable[[np.ndarray], Call]] = {
        f"onnxruntime {kind} bound": lambda images: bound(model, path.name, kind, images, {}),
        f"pytorch {kind} {'graph' if kind == 'cuda' else 'resident'}": lambda images: pytorch_resident(
            model, str(path), images, device
        ),
    }
    if kind == "cuda":
        for engine, chosen in GRAPHS.items():
            makers[engine] = lambda images, chosen=chosen: bound(model, path.name, kind, images, chosen)
    latencies, missing = [], []
    for batch in batches:
        images, runs = random_images(model, batch), {}
        for engine, make in makers.items():
            try:
                runs[engine] = make(images)
            except (InputError, *ORT_ERRORS, MemoryError) as error:
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                missing.append(NotMeasured(engine=engine, batch=batch, reason=reason))
        opened = {engine: lambda call=call: call for engine, call in runs.items()}  # a recorded graph is kept
        calls = take_turns(opened, measure_s) if runs else {}
        latencies += [Latency.of(engine, batch, times) for engine, times in calls.items()]
    return latencies, missing
