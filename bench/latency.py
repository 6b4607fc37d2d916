"""Inference latency of ONNX files in ONNX Runtime, next to PyTorch eager on the same inputs.

All engines, and all files, take turns in short rounds, so that a change of the machine's speed hits all. Times are
wall-clock milliseconds of one call with inputs and outputs in the host's memory; each is kept.
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx
import onnxruntime
import torch
from pydantic import BaseModel
from torch import Tensor, nn

from export.graph import read_onnx
from export.metadata import Metadata, is_expertgrid_file, read_metadata
from export.session import ORT_ERRORS, check_provider, open_session
from export.to_onnx import PixelNet
from model.errors import InputError
from model.files import now
from model.machine import device_name
from model.registry import build

Key = TypeVar("Key")

WARM_UP_S = 0.3
ROUND_S = 0.05
LEAST_CALLS = 30
DTYPES = {"tensor(uint8)": np.uint8, "tensor(float)": np.float32}


class Latency(BaseModel):
    """One engine at one batch size."""

    engine: str
    batch: int
    calls: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    images_per_s: float
    calls_ms: list[float]

    @classmethod
    def of(cls, engine: str, batch: int, calls_ms: list[float]) -> "Latency":
        p50, p90, p99 = np.percentile(calls_ms, (50, 90, 99))
        rate = 1000 * batch * len(calls_ms) / sum(calls_ms)
        return cls(
            engine=engine, batch=batch, calls=len(calls_ms), p50_ms=p50, p90_ms=p90, p99_ms=p99, images_per_s=rate,
            calls_ms=[round(ms, 5) for ms in calls_ms],
        )  # fmt: skip


class LatencyRecord(BaseModel):
    """The latencies of one ONNX file on one provider, and where they were measured."""

    file: str
    sha256: str
    trial: str  # "" for a file that expertgrid did not export
    model: str
    precision: str  # "" likewise
    pruned: bool
    provider: str
    device: str
    threads: int
    versions: dict[str, str]
    finished: str
    latencies: list[Latency]


def engines(model: bytes, name: str, provider: str) -> tuple[dict[str, Callable[[np.ndarray], Any]], Metadata | None]:
    """What can run the model: ONNX Runtime on `provider`; PyTorch eager on the same device too for an expertgrid file.

    Returns functions from a batch of inputs to logits, by name, and the metadata of an expertgrid file. PyTorch's
    network is built from the config in the metadata, with fresh weights: its speed does not depend on them. Raises
    InputError where the file does not load or the provider is not there.
    """
    session = open_session(model, provider, name)
    given, made = session.get_inputs(), session.get_outputs()
    if len(given) != 1 or given[0].type not in DTYPES or any(not isinstance(size, int) for size in given[0].shape[1:]):
        found = ", ".join(f"{value.name}: {value.type} {value.shape}" for value in given)
        raise InputError(
            f"{name}: needs one input of images, uint8 or float, with only the batch left open; found {found}"
        )
    if not made:
        raise InputError(f"{name}: has no output")
    entries = session.get_modelmeta().custom_metadata_map
    metadata = read_metadata(entries, name) if is_expertgrid_file(entries) else None
    runs: dict[str, Callable[[np.ndarray], Any]] = {
        f"onnxruntime {provider}": lambda images: session.run([made[0].name], {given[0].name: images})[0]
    }
    if metadata is not None:
        device = torch.device("cpu" if provider == "cpu" else "cuda")
        runs[f"pytorch eager {device.type}"] = _eager(metadata, device)
    return runs, metadata


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


def _eager(metadata: Metadata, device: torch.device) -> Callable[[np.ndarray], np.ndarray]:
    net = untrained(metadata).to(device)

    @torch.inference_mode()
    def run(images: np.ndarray) -> np.ndarray:
        return net(torch.from_numpy(images).to(device)).cpu().numpy()

    return run


def random_images(model: bytes, batch: int) -> np.ndarray:
    """A batch of random images of the shape and type that the model's input has."""
    graph = onnx.load_from_string(model).graph
    weights = {weight.name for weight in graph.initializer}
    first = next(given for given in graph.input if given.name not in weights).type.tensor_type
    shape = (batch, *(dim.dim_value for dim in first.shape.dim[1:]))
    rng = np.random.default_rng(batch)
    if first.elem_type == onnx.TensorProto.UINT8:
        return rng.integers(256, size=shape, dtype=np.uint8)
    return rng.standard_normal(shape, dtype=np.float32)


def take_turns(runs: dict[Key, Callable[[], object]], measure_s: float) -> dict[Key, list[float]]:
    """Milliseconds of each call of each engine, `measure_s` seconds and at least 30 calls for each, after a warm-up.

    A round is some calls of one engine in a row; its first call is not counted, as the other's threads may still spin.
    """
    calls = {name: _warm_up(run) for name, run in runs.items()}
    calls_ms: dict[Key, list[float]] = {name: [] for name in runs}
    while any(len(times) < LEAST_CALLS or sum(times) < 1000 * measure_s for times in calls_ms.values()):
        for name, run in runs.items():
            run()
            for _ in range(calls[name]):
                started = time.perf_counter()
                run()
                calls_ms[name].append(1000 * (time.perf_counter() - started))
    return calls_ms


def _warm_up(run: Callable[[], object]) -> int:
    """Runs for a while; returns how many calls make a round."""
    run()
    started, done = time.perf_counter(), 0
    while time.perf_counter() - started < WARM_UP_S:
        run()
        done += 1
    return max(2, round(ROUND_S * done / (time.perf_counter() - started)))


def measure(
    paths: Sequence[Path], provider: str = "cpu", batches: Sequence[int] = (1, 8, 64), measure_s: float = 1.0
) -> list[LatencyRecord]:
    """Latencies of ONNX files at each batch size, all of them in turns. Raises InputError as `engines` and `read_onnx`.

    A record for each file, in their order.
    """
    check_provider(provider)
    models = [read_onnx(path) for path in paths]
    opened = [engines(model, str(path), provider) for path, model in zip(paths, models)]
    latencies: list[list[Latency]] = [[] for _ in paths]
    for batch in batches:
        runs: dict[tuple[int, str], Callable[[], object]] = {}
        for i, (path, model, (engine_runs, _)) in enumerate(zip(paths, models, opened)):
            images = random_images(model, batch)
            for engine, run in engine_runs.items():
                runs[i, engine] = partial(run, images)
                try:
                    run(images)
                except (*ORT_ERRORS, MemoryError) as error:
                    reason = str(error).splitlines()[0]
                    raise InputError(f"{path}: does not run at batch {batch}: {reason}") from None
        for (i, engine), times in take_turns(runs, measure_s).items():
            latencies[i].append(Latency.of(engine, batch, times))
    finished = now()
    return [
        LatencyRecord(
            file=path.name,
            sha256=hashlib.sha256(model).hexdigest(),
            trial=metadata.trained.trial if metadata else "",
            model=metadata.trained.model if metadata else "",
            precision=metadata.precision if metadata else "",
            pruned=metadata is not None and metadata.pruned is not None,
            provider=provider,
            device=device_name(torch.device("cpu" if provider == "cpu" else "cuda")),
            threads=torch.get_num_threads(),
            versions={"torch": torch.__version__, "onnxruntime": onnxruntime.__version__},
            finished=finished,
            latencies=found,
        )
        for path, model, (_, metadata), found in zip(paths, models, opened, latencies)
    ]


def rows(records: Sequence[LatencyRecord]) -> list[dict[str, object]]:
    """The records as the rows of a table.

    Each engine's speed is given relative to PyTorch eager on the same file and batch size and, where there are several
    files, to ONNX Runtime on the first of them.
    """
    first = {found.batch: found.p50_ms for found in records[0].latencies if found.engine.startswith("onnxruntime")}
    shown: list[dict[str, object]] = []
    for record in records:
        eager = {found.batch: found.p50_ms for found in record.latencies if found.engine.startswith("pytorch")}
        for found in record.latencies:
            row: dict[str, object] = {
                "file": record.file,
                "batch": found.batch,
                "engine": found.engine,
                "calls": found.calls,
                "p50 ms": round(found.p50_ms, 3),
                "p90 ms": round(found.p90_ms, 3),
                "p99 ms": round(found.p99_ms, 3),
                "images/s": round(found.images_per_s, 1),
                "x eager": round(eager[found.batch] / found.p50_ms, 2) if found.batch in eager else None,
            }
            shown.append(row | ({"x first": round(first[found.batch] / found.p50_ms, 2)} if len(records) > 1 else {}))
    return shown
