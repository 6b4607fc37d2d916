"""The latency record: what `bench` measured of one file. Imports no torch: tables read it."""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, Field, ValidationError, model_validator

from expertgrid.bench.host import Host
from expertgrid.bench.timing import Block, Times, percentiles
from expertgrid.model.system.errors import InputError, invalid
from expertgrid.model.system.files import read_whole

PERCENTILES = (50, 90, 99)
Count = Annotated[int, Field(ge=1)]
Milliseconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass
class Memory:
    """Bytes that an engine's process has had at once at most."""

    peak: int | None = None  # None on a system that does not say
    before: int | None = None  # likewise, before the engine was opened: Python with its libraries

    @property
    def added(self) -> int | None:
        return None if self.peak is None or self.before is None else self.peak - self.before


class Latency(BaseModel):
    """One engine at one batch size. Intervals are bootstrap intervals at 95%."""

    engine: str  # its title in tables
    kind: str  # the word that --engine has for it
    batch: Count
    calls: Count
    p50_ms: Milliseconds
    p90_ms: float | None  # None where there were too few calls
    p99_ms: float | None
    intervals_ms: dict[str, tuple[Milliseconds, Milliseconds]] = {}  # of "p50" and so on
    images_per_s: float
    joules_per_image: float | None = None
    peak_bytes: int | None = None  # of the engine's process, where it had one of its own
    added_bytes: int | None = None  # to what the process had with Python and its libraries alone
    steady: bool = True  # after its warm-up
    blocks: list[tuple[int, Count]] = []  # of calls in a row: in which opening, and how many calls
    calls_ms: Annotated[list[Milliseconds], Field(min_length=1)]

    @model_validator(mode="before")
    @classmethod
    def _kind_of_version_0_2(cls, fields: Any) -> Any:
        """Records of version 0.2 have the kind only as words of the title."""
        if isinstance(fields, dict) and isinstance(title := fields.get("engine"), str) and "kind" not in fields:
            first, *words = title.split(" ")
            return fields | {"kind": "-".join(words[:-1]) if first == "pytorch" else first}
        return fields

    @classmethod
    def of(cls, engine: str, kind: str, batch: int, times: Times, memory: Memory | None = None) -> "Latency":
        calls_ms = times.calls_ms
        estimates = dict(zip(("p50", "p90", "p99"), percentiles(times, PERCENTILES)))
        joules = [block.joules for block in times.blocks if block.joules is not None]
        return cls(
            engine=engine,
            kind=kind,
            batch=batch,
            calls=len(calls_ms),
            p50_ms=float(np.median(calls_ms)),
            p90_ms=estimates["p90"] and estimates["p90"].value,
            p99_ms=estimates["p99"] and estimates["p99"].value,
            intervals_ms={name: (value.low, value.high) for name, value in estimates.items() if value},
            images_per_s=1000 * batch * len(calls_ms) / sum(calls_ms),
            joules_per_image=sum(joules) / (batch * len(calls_ms)) if len(joules) == len(times.blocks) else None,
            peak_bytes=memory.peak if memory else None,
            added_bytes=memory.added if memory else None,
            steady=times.steady,
            blocks=[(block.opening, len(block.calls_ms)) for block in times.blocks],
            calls_ms=[round(ms, 5) for ms in calls_ms],
        )

    @property
    def times(self) -> Times:
        """The calls in their blocks."""
        calls_ms = iter(self.calls_ms)
        return Times([Block(opening, list(itertools.islice(calls_ms, count))) for opening, count in self.blocks])


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
    machine: dict[str, str | int] = {}
    versions: dict[str, str]
    host: Host = Host()
    finished: str
    cells: int = 0  # of a study that took turns in the run; 0 for files by themselves
    latencies: Annotated[list[Latency], Field(min_length=1)]

    def rank(self) -> tuple[bool, str]:
        """The higher, the better fit for a table of cells."""
        return self.cells > 0, self.finished


def read_latency(file: Path) -> LatencyRecord:
    """A record that --json wrote. Raises InputError for a file that is not one, or that has no blocks."""
    try:
        record = LatencyRecord.model_validate_json(read_whole(file))
    except ValidationError as error:
        raise invalid(str(file), error) from None
    for latency in record.latencies:
        if not latency.blocks or sum(count for _, count in latency.blocks) != len(latency.calls_ms):
            raise InputError(f"{file}: does not say in which blocks its calls were; measure it again")
    return record
