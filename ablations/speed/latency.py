"""The latency of each cell of a study: its network is exported, and all of them take turns in one run.

The files are not certified and not kept, so that the test split is not read: latency does not depend on the weights.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from expertgrid.ablations.records.directory import StudyDirectory
from expertgrid.ablations.results.rows import Row, best_record, latency_front, read_results, smallest
from expertgrid.bench.isolated import Begin
from expertgrid.bench.latency import measure
from expertgrid.bench.record import LatencyRecord
from expertgrid.export.certify import DEFAULT_REWRITES
from expertgrid.export.to_onnx import to_onnx
from expertgrid.model.checkpoint import load
from expertgrid.model.system.errors import InputError

BRIEF_S, BRIEF_OPENINGS = 0.05, 2  # for each cell, to find those that may be on the front
CLEARLY = 1.1  # times as fast, where times are brief


@dataclass(frozen=True)
class TimedCells:
    """The latencies of a study's cells, in their order."""

    rows: list[Row]
    records: list[LatencyRecord]
    without_weights: list[str]  # the names of cells
    not_exported: dict[str, str]  # likewise, with the reason
    off_front: list[str]


def measure_latencies(
    directory: StudyDirectory,
    provider: str,
    batches: Sequence[int],
    measure_s: float,
    engines: Sequence[str],
    front_only: bool = False,
    isolated: Begin | None = None,
) -> TimedCells:
    """Exports and times a finished trial of each cell; writes nothing into the directory.

    With `front_only` all cells are timed briefly first, and those stay that no other cell beats in validation accuracy
    and clearly in speed. `isolated` is as in `bench.latency.measure`. Raises InputError where no cell can be timed.
    """
    finished = [row for row in read_results(directory).rows if row.by_seed]
    trials = {row.name: trial for row in finished if (trial := _with_weights(directory, row))}
    if not trials:
        reason = "none of its trials has weights, only records" if finished else "no trial of this study is finished"
        raise InputError(f"{directory.path}: {reason}")
    not_exported: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as place:
        files: dict[str, Path] = {}
        for name, trial in trials.items():
            try:
                model = to_onnx(load(directory.checkpoint(trial)), "uint8", DEFAULT_REWRITES)
            except InputError as error:
                not_exported[name] = str(error)
                continue
            files[name] = Path(place, f"{trial}.onnx")
            files[name].write_bytes(model)
        if not files:
            raise InputError(f"{directory.path}: no cell can be exported: {next(iter(not_exported.values()))}")
        rows = [row for row in finished if row.name in files]
        off_front: list[str] = []
        if front_only:
            brief = measure(
                [files[row.name] for row in rows], provider, [min(batches)], BRIEF_S, engines[:1], BRIEF_OPENINGS
            )
            candidates = _may_be_on_front(rows, [record.latencies[0].p50_ms for record in brief])
            off_front = [row.name for row in rows if row not in candidates]
            rows = candidates
        records = measure([files[row.name] for row in rows], provider, batches, measure_s, engines, isolated=isolated)
    records = [record.model_copy(update={"cells": len(records)}) for record in records]
    return TimedCells(rows, records, [row.name for row in finished if row.name not in trials], not_exported, off_front)


def _with_weights(directory: StudyDirectory, row: Row) -> str | None:
    """The best trial of a row, or another one that has its weights; None where none has."""
    best = best_record(row)
    trials = [best.trial, *(record.trial for record in row.records)]
    return next((trial for trial in trials if directory.checkpoint(trial).exists()), None)


def _may_be_on_front(rows: Sequence[Row], p50_ms: Sequence[float]) -> list[Row]:
    """The rows that no other row is as good as on validation and clearly faster. Not the control."""
    timed = [(row, row.merit, ms) for row, ms in zip(rows, p50_ms) if not row.control]
    return [
        row for row, merit, ms in timed if not any(better >= merit and CLEARLY * less < ms for _, better, less in timed)
    ]


def by_cell(
    latency_rows: Sequence[dict[str, object]], timed: TimedCells, results: Sequence[Row]
) -> list[dict[str, object]]:
    """Rows of `bench.latency.rows` with each cell's name and accuracy in place of the file's name.

    `results` are the study's rows with these latencies: they say what is on the front.
    """
    names = {record.file: row.name for row, record in zip(timed.rows, timed.records)}
    by_name = {row.name: row for row in results}
    front = {row.name for row in latency_front(results)}
    table = []
    for values in latency_rows:
        row = by_name[names[str(values["file"])]]
        about: dict[str, object] = {"cell": row.name, f"val {row.scale.column}": row.interval("validation")}
        about["MACs"] = row.records[0].macs
        about |= {title: value for title, value in values.items() if title != "file"}
        at = smallest(row.latency) if row.latency else None
        counts = row.name in front and at is not None and (at.engine, at.batch) == (values["engine"], values["batch"])
        table.append(about | {"front": "yes" if counts else ""})
    return table
