"""Inference latency of ONNX files, next to PyTorch on the same inputs, and which of them is faster.

Times are wall-clock milliseconds of one call with inputs and outputs in the host's memory; each is kept. How they are
taken, and what they say, is in `bench.timing`.
"""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from pydantic import BaseModel

from expertgrid.bench.apart import Begin, apart
from expertgrid.bench.engines import USUAL, Engine, Run, engines
from expertgrid.bench.host import Meter, watched
from expertgrid.bench.record import Latency, LatencyRecord, Memory
from expertgrid.bench.timing import Call, Ratio, Timer, compare, compare_runs, take_turns
from expertgrid.export.describe import read_onnx
from expertgrid.export.session import ORT_ERRORS, check_provider, open_session, run
from expertgrid.export.to_onnx import INPUT, LOGITS
from expertgrid.model.system.errors import InputError
from expertgrid.model.system.files import now
from expertgrid.model.system.machine import cpu_name, device_name, usable_cores
from expertgrid.model.system.text import Measured

EAGER = ("pytorch eager cpu", "pytorch eager cuda")


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


def measure(
    paths: Sequence[Path],
    provider: str = "cpu",
    batches: Sequence[int] = (1, 8, 64),
    measure_s: float = 1.0,
    wanted: Sequence[str] = USUAL,
    openings: int | None = None,
    isolated: Begin | None = None,
) -> list[LatencyRecord]:
    """Latencies of ONNX files at each batch size, all of them in turns. Raises InputError as `engines` and `read_onnx`.

    A record for each file, in their order. With `isolated` each engine has a process of its own at each batch size,
    which calls that first.
    """
    check_provider(provider)
    models = [read_onnx(path) for path in paths]
    opened = [engines(model, str(path), provider, wanted) for path, model in zip(paths, models)]
    latencies: list[list[Latency]] = [[] for _ in paths]
    cuda = provider != "cpu"
    with watched(cuda) as host:
        for batch in batches:
            candidates: dict[tuple[int, str], Callable[[], Call | Timer]] = {}
            memory: dict[tuple[int, str], Memory] = {}
            with ExitStack() as processes:
                for i, (model, (found, _)) in enumerate(zip(models, opened)):
                    images = random_images(model, batch)
                    for name, engine in found.items():
                        key, memory[i, name] = (i, name), Memory()
                        candidates[key] = partial(open_engine, engine, images)
                        if isolated:
                            own = apart(engine, images, open_engine, isolated, memory[key])
                            candidates[key] = processes.enter_context(own)
                turns = take_turns(candidates, measure_s, openings, Meter(cuda))
            for (i, name), times in turns.items():
                latencies[i].append(Latency.of(name, batch, times, memory[i, name]))
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
            latencies=found,
        )
        for path, model, (_, metadata), found in zip(paths, models, opened, latencies)
    ]


def open_engine(engine: Engine, images: np.ndarray) -> Call:
    """A call on the images. Raises InputError where the network does not run at this batch size."""
    return partial(open_run(engine, images), images)


def open_file(model: bytes, images: np.ndarray) -> Call:
    """A call of ONNX Runtime on the CPU, of a model that `export.to_onnx` made."""
    return partial(run, open_session(model, "cpu", "model"), [LOGITS], {INPUT: images})


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


def check_comparable(baseline: LatencyRecord, here: LatencyRecord, file: Path) -> None:
    """Raises InputError where a record was made on another machine, or with other versions."""
    for what, old, new in (
        ("provider", baseline.provider, here.provider),
        ("device", baseline.device, here.device),
        ("threads", baseline.threads, here.threads),
        *((name, baseline.machine.get(name), value) for name, value in here.machine.items()),
        *((name, baseline.versions.get(name), value) for name, value in here.versions.items()),
    ):
        if old != new:
            raise InputError(
                f"{file}: was measured with {what} {old}, here it is {new}; --across-machines compares all the same"
            )


class Comparison(BaseModel):
    """How fast a file is against another, in one engine at one batch size."""

    file: str
    other: str
    engine: str
    batch: int
    ratio: tuple[float, float, float]  # how many times as fast, and its 98% interval
    verdict: str

    @classmethod
    def of(cls, file: str, other: str, found: Latency, ratio: Ratio, engine: str) -> "Comparison":
        """`engine` is that of the other."""
        other = other if engine == found.engine else f"{other} in {engine}"
        return cls(
            file=file, other=other, engine=found.engine, batch=found.batch, ratio=tuple(ratio), verdict=ratio.word
        )

    def slower_percent(self) -> float:
        """By how much it is slower; 0 where that is not sure."""
        return 100 * (1 / self.ratio[0] - 1) if self.verdict == "slower" else 0.0

    def __str__(self) -> str:
        value, low, high = self.ratio
        numbers = f"{value:.3g} times as fast ({low:.3g} to {high:.3g})"
        return f"{self.file} against {self.other}, batch {self.batch}, {self.engine}: {self.verdict}, {numbers}"


def with_first(records: Sequence[LatencyRecord]) -> list[Comparison]:
    """Each file against the first, of one run of `measure`: in the same engine, or each in its own."""
    return [
        Comparison.of(record.file, records[0].file, found, compare(first.times, found.times), first.engine)
        for record in records[1:]
        for found, same in zip(record.latencies, _alike(record, records[0]))
        if not found.engine.startswith("pytorch")
        if (first := same or _first_of(records[0], found.batch))
    ]


def _first_of(record: LatencyRecord, batch: int) -> Latency | None:
    """The first engine at a batch size: where nothing else was asked for, the file's own."""
    return next((found for found in record.latencies if found.batch == batch), None)


def with_baseline(record: LatencyRecord, baseline: LatencyRecord, name: str) -> list[Comparison]:
    """A file against a record of an earlier run, in each engine and batch size of both. Raises InputError for none."""
    found = [
        Comparison.of(record.file, name, found, compare_runs(old.times, found.times), old.engine)
        for found, old in zip(record.latencies, _alike(record, baseline))
        if old
    ]
    if not found:
        raise InputError(f"{name}: has none of the engines and batch sizes that were measured now")
    return found


def _alike(record: LatencyRecord, other: LatencyRecord) -> list[Latency | None]:
    """The other record's latencies of the same engines and batch sizes."""
    there = {(found.engine, found.batch): found for found in other.latencies}
    return [there.get((found.engine, found.batch)) for found in record.latencies]


def rows(records: Sequence[LatencyRecord], compared: Sequence[Comparison]) -> list[dict[str, object]]:
    """The records as the rows of a table, with what `with_first` found of them.

    Each engine's speed is given relative to PyTorch eager on the same file and batch size and, where there are several
    files, to the same engine on the first of them.
    """
    first = {(one.file, one.engine, one.batch): one for one in compared}
    shown: list[dict[str, object]] = []
    for record in records:
        eager = {found.batch: found for found in record.latencies if found.engine in EAGER}
        for found in record.latencies:
            row: dict[str, object] = {"file": record.file, "batch": found.batch, "engine": found.engine}
            for name in ("p50", "p90", "p99"):
                ends = found.intervals_ms.get(name)
                row[f"{name} ms"] = Measured(getattr(found, f"{name}_ms"), *ends) if ends else None
            row["images/s"] = round(found.images_per_s, 1)
            if any(one.joules_per_image is not None for one in record.latencies):
                row["mJ/image"] = found.joules_per_image and 1000 * found.joules_per_image
            if any(one.peak_bytes is not None for one in record.latencies):
                row["peak MiB"] = found.peak_bytes and found.peak_bytes / 2**20
                row["added MiB"] = found.added_bytes and found.added_bytes / 2**20
            plain = eager.get(found.batch)
            row["x eager"] = Measured(*compare(plain.times, found.times)) if plain and plain is not found else None
            if len(records) > 1:
                against = first.get((record.file, found.engine, found.batch))
                row["x first"] = Measured(*against.ratio) if against else None
                row["verdict"] = against.verdict if against else None
            shown.append(row)
    return shown


def notes(records: Sequence[LatencyRecord]) -> list[str]:
    """What the table rests on."""
    record = records[0]
    every = [found for one in records for found in one.latencies]
    lines = [
        f"{record.device}, {record.threads} threads. x: times as fast; ±: half of the interval, 95% and for x 98%."
    ]
    if len(records) > 1:
        lines.append(f"x first: against {record.file} in the same engine, or each in its own, at the same batch size.")
    if any(found.peak_bytes is not None for found in every):
        lines.append(
            "peak MiB: the most memory of the engine's process; added MiB: of it, what Python and its libraries alone "
            "do not take."
        )
    lines += record.host.notes()
    if any(found.p99_ms is None for found in every):
        lines.append("No p90 below 36 calls and no p99 below 368: --seconds gives more.")
    if unsteady := sorted({f"{found.engine} at batch {found.batch}" for found in every if not found.steady}):
        lines.append(f"Still changing its speed after the warm-up: {', '.join(unsteady)}.")
    return lines
