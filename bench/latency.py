"""Inference latency of ONNX files, next to PyTorch on the same inputs, and which of them is faster.

Times are wall-clock milliseconds of one call with inputs and outputs in the host's memory; each is kept. How they are
taken, and what they say, is in `bench.timing`.
"""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch

from expertgrid.bench.engines import PYTORCH, USUAL, Engine, Run, engines
from expertgrid.bench.host import Meter, watched
from expertgrid.bench.isolated import Begin, isolated_engine
from expertgrid.bench.record import Latency, LatencyRecord, Memory
from expertgrid.bench.timing import Ratio, Timer, compare, compare_runs, take_turns
from expertgrid.export.describe import read_onnx
from expertgrid.export.session import ORT_ERRORS, check_provider
from expertgrid.model.system.errors import InputError
from expertgrid.model.system.files import now
from expertgrid.model.system.machine import cpu_name, device_name, usable_cores
from expertgrid.model.system.text import Measured


def input_type(model: bytes) -> Any:
    """The type and shape of the model's first input, as ONNX describes it."""
    graph = onnx.load_from_string(model).graph
    weights = {weight.name for weight in graph.initializer}
    return next(value for value in graph.input if value.name not in weights).type.tensor_type


def random_images(model: bytes, batch: int) -> np.ndarray:
    """A batch of random images of the shape and type that the model's input has."""
    of_input = input_type(model)
    shape = (batch, *(dim.dim_value for dim in of_input.shape.dim[1:]))
    rng = np.random.default_rng(batch)
    if of_input.elem_type == onnx.TensorProto.UINT8:
        return rng.integers(256, size=shape, dtype=np.uint8)
    return rng.standard_normal(shape, dtype=np.float32)


def measure(
    paths: Sequence[Path],
    provider: str = "cpu",
    batches: Sequence[int] = (1, 8, 64),
    measure_s: float = 1.0,
    kinds: Sequence[str] = USUAL,
    openings: int | None = None,
    isolated: Begin | None = None,
) -> list[LatencyRecord]:
    """Latencies of ONNX files at each batch size, all of them in turns. Raises InputError as `engines` and `read_onnx`.

    A record for each file, in their order. With `isolated` each engine has a process of its own at each batch size,
    which calls that first.
    """
    check_provider(provider)
    models = [read_onnx(path) for path in paths]
    opened = [engines(model, str(path), provider, kinds) for path, model in zip(paths, models)]
    latencies: list[list[Latency]] = [[] for _ in paths]
    cuda = provider != "cpu"
    with watched(cuda) as host:
        for batch in batches:
            candidates: dict[tuple[int, str], Callable[[], Timer]] = {}
            memory: dict[tuple[int, str], Memory] = {}
            with ExitStack() as processes:
                for i, (model, (by_title, _)) in enumerate(zip(models, opened)):
                    images = random_images(model, batch)
                    for title, engine in by_title.items():
                        key, memory[i, title] = (i, title), Memory()
                        candidates[key] = partial(open_engine, engine, images)
                        if isolated:
                            process = isolated_engine(engine, images, open_engine, isolated, memory[key])
                            candidates[key] = processes.enter_context(process)
                turns = take_turns(candidates, measure_s, openings, Meter(cuda))
            for (i, title), times in turns.items():
                kind = opened[i][0][title].kind
                latencies[i].append(Latency.of(title, kind, batch, times, memory[i, title]))
    finished, device = now(), torch.device("cuda" if cuda else "cpu")
    return [
        LatencyRecord(
            file=path.name,
            sha256=hashlib.sha256(model).hexdigest(),
            trial=metadata.trained.trial if metadata else "",
            model=metadata.trained.model if metadata else "",
            precision=metadata.precision if metadata else "",
            pruned=metadata is not None and metadata.pruned is not None,
            provider=provider,
            device=device_name(device),
            threads=torch.get_num_threads(),
            machine=machine(),
            versions={"torch": torch.__version__, "onnxruntime": onnxruntime.__version__},
            host=host,
            finished=finished,
            latencies=of_file,
        )
        for path, model, (_, metadata), of_file in zip(paths, models, opened, latencies)
    ]


def open_engine(engine: Engine, images: np.ndarray) -> Timer:
    """Times calls on the images. Raises InputError where the network does not run at this batch size."""
    return Timer(partial(open_run(engine, images), images))


def open_run(engine: Engine, images: np.ndarray) -> Run:
    """The engine after a first call on the images. Raises InputError where the network does not run at this size."""
    run = engine()
    try:
        run(images)
    except (*ORT_ERRORS, MemoryError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{engine.name}: does not run at batch {len(images)}: {reason}") from None
    return run


def machine() -> dict[str, str | int]:
    """What another machine differs in. Processors of several generations have one name, so their instructions count."""
    instructions = torch.backends.cpu.get_cpu_capability()
    return {"cpu": cpu_name(), "instructions": instructions, "cores": usable_cores()}


def check_comparable(baseline: LatencyRecord, record: LatencyRecord, file: Path) -> None:
    """Raises InputError where the baseline, read from `file`, is of another machine or other versions."""
    for what, old, new in (
        ("provider", baseline.provider, record.provider),
        ("device", baseline.device, record.device),
        ("threads", baseline.threads, record.threads),
        *((name, baseline.machine.get(name), value) for name, value in record.machine.items()),
        *((name, baseline.versions.get(name), value) for name, value in record.versions.items()),
    ):
        if old != new:
            raise InputError(
                f"{file}: was measured with {what} {old}, here it is {new}; --across-machines compares all the same"
            )


@dataclass(frozen=True)
class Comparison:
    """How fast a file is against another, in one engine at one batch size."""

    file: str
    other: str
    engine: str
    batch: int
    ratio: Ratio  # how many times as fast

    @classmethod
    def of(cls, file: str, other: str, latency: Latency, reference: Latency, ratio: Ratio) -> "Comparison":
        """`reference` is the other file's latency, which may be in another engine."""
        if reference.engine != latency.engine:
            other = f"{other} in {reference.engine}"
        return cls(file, other, latency.engine, latency.batch, ratio)

    def slower_percent(self) -> float:
        """By how much it is slower; 0 where that is not sure."""
        return 100 * (1 / self.ratio.value - 1) if self.ratio.word == "slower" else 0.0

    def __str__(self) -> str:
        value, low, high = self.ratio
        numbers = f"{value:.3g} times as fast ({low:.3g} to {high:.3g})"
        return f"{self.file} against {self.other}, batch {self.batch}, {self.engine}: {self.ratio.word}, {numbers}"


def with_first(records: Sequence[LatencyRecord]) -> list[Comparison]:
    """Each file against the first, of one run of `measure`: in the same engine, or each in its own."""
    own = {latency.batch: latency for latency in reversed(records[0].latencies)}  # the first engine of each batch size
    return [
        Comparison.of(record.file, records[0].file, latency, first, compare(first.times, latency.times))
        for record in records[1:]
        for latency, same in zip(record.latencies, _alike(record, records[0]))
        if latency.kind not in PYTORCH
        if (first := same or own.get(latency.batch))
    ]


def with_baseline(record: LatencyRecord, baseline: LatencyRecord, name: str) -> list[Comparison]:
    """A file against a record of an earlier run, in each engine and batch size of both. Raises InputError for none."""
    comparisons = [
        Comparison.of(record.file, name, latency, old, compare_runs(old.times, latency.times))
        for latency, old in zip(record.latencies, _alike(record, baseline))
        if old
    ]
    if not comparisons:
        raise InputError(f"{name}: has none of the engines and batch sizes that were measured now")
    return comparisons


def _alike(record: LatencyRecord, other: LatencyRecord) -> list[Latency | None]:
    """The other record's latencies of the same engines and batch sizes."""
    others = {(latency.engine, latency.batch): latency for latency in other.latencies}
    return [others.get((latency.engine, latency.batch)) for latency in record.latencies]


def rows(records: Sequence[LatencyRecord], comparisons: Sequence[Comparison]) -> list[dict[str, object]]:
    """The records as the rows of a table, with the comparisons of `with_first`.

    Each engine's speed is given relative to PyTorch eager on the same file and batch size and, where there are several
    files, to the same engine on the first of them.
    """
    with_first = {(comparison.file, comparison.engine, comparison.batch): comparison for comparison in comparisons}
    table: list[dict[str, object]] = []
    for record in records:
        eager = {latency.batch: latency for latency in record.latencies if latency.kind == "eager"}
        has_joules = any(latency.joules_per_image is not None for latency in record.latencies)
        has_memory = any(latency.peak_bytes is not None for latency in record.latencies)
        for latency in record.latencies:
            row: dict[str, object] = {"file": record.file, "batch": latency.batch, "engine": latency.engine}
            for name in ("p50", "p90", "p99"):
                ends = latency.intervals_ms.get(name)
                row[f"{name} ms"] = Measured(getattr(latency, f"{name}_ms"), *ends) if ends else None
            row["images/s"] = round(latency.images_per_s, 1)
            if has_joules:
                row["mJ/image"] = latency.joules_per_image and 1000 * latency.joules_per_image
            if has_memory:
                row["peak MiB"] = latency.peak_bytes and latency.peak_bytes / 2**20
                row["added MiB"] = latency.added_bytes and latency.added_bytes / 2**20
            plain = eager.get(latency.batch)
            row["x eager"] = compare(plain.times, latency.times) if plain and plain is not latency else None
            if len(records) > 1:
                against = with_first.get((record.file, latency.engine, latency.batch))
                row["x first"] = against.ratio if against else None
                row["verdict"] = against.ratio.word if against else None
            table.append(row)
    return table


def notes(records: Sequence[LatencyRecord]) -> list[str]:
    """What the table rests on."""
    record = records[0]
    latencies = [latency for record in records for latency in record.latencies]
    lines = [
        f"{record.device}, {record.threads} threads. x: times as fast; ±: half of the interval, 95% and for x 98%."
    ]
    if len(records) > 1:
        lines.append(f"x first: against {record.file} in the same engine, or each in its own, at the same batch size.")
    if any(latency.peak_bytes is not None for latency in latencies):
        lines.append(
            "peak MiB: the most memory of the engine's process; added MiB: the part of it that Python and its "
            "libraries alone do not take."
        )
    lines += record.host.notes()
    if any(latency.p99_ms is None for latency in latencies):
        lines.append("No p90 below 36 calls and no p99 below 368: --seconds gives more.")
    if unsteady := sorted(
        {f"{latency.engine} at batch {latency.batch}" for latency in latencies if not latency.steady}
    ):
        lines.append(f"Still changing its speed after the warm-up: {', '.join(unsteady)}.")
    return lines
