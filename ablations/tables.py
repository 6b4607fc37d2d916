"""Tables of a study: one row a cell, from the records alone; and their rendering."""

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from tabulate import tabulate

from ablations.records import Benched, LatencySummary, Plan, PlannedCell, Record, StudyDirectory
from ablations.stats import Interval, mean_interval
from ablations.study import BASE, Study, level_name
from model.errors import InputError, unknown

Format = Literal["text", "github", "latex", "csv", "json"]
FORMATS = get_args(Format)

EACH_LEVEL = "-"  # of a factor that changes nothing: the network is the same at each level


@dataclass(frozen=True)
class Row:
    """A cell, or several that are the same network, with what its finished trials gave."""

    study: str
    model: str
    levels: dict[str, str]
    seeds: int  # planned
    records: list[Record]
    failures: list[str]
    latency: LatencySummary | None  # of one of its trials
    reported: str

    def interval(self, value: Callable[[Record], float]) -> Interval | None:
        """Mean and 95% interval over the finished seeds, None where none is."""
        return mean_interval([value(record) for record in self.records]) if self.records else None


def study_rows(directory: StudyDirectory) -> list[Row]:
    """The rows of a study, in the order of its design. Raises InputError for a directory that is none or is damaged."""
    study, plan, latencies = directory.study, directory.plan, directory.latencies()
    same: dict[tuple[str, ...], list[PlannedCell]] = {}
    for cell in plan.cells:
        same.setdefault((*cell.trials, "" if cell.levels else "baseline"), []).append(cell)
    rows = []
    for cells in same.values():
        trials = cells[0].trials
        found = [directory.record(trial) for trial in trials]
        failed = [directory.failure(trial) for trial in trials]
        rows.append(
            Row(
                study=study_name(directory),
                model=cells[0].model_name,
                levels={name: _shared_level(name, cells, study) for name in cells[0].levels},
                seeds=len(trials),
                records=[record for record in found if record is not None],
                failures=[
                    f"{trial}: {reason}"
                    for trial, reason, record in zip(trials, failed, found)
                    if reason and not record
                ],
                latency=next((latencies[trial] for trial in trials if trial in latencies), None),
                reported=next(
                    (study.reported[str(level)] for level in cells[0].levels.values() if str(level) in study.reported),
                    "",
                ),
            )
        )
    return rows


def study_name(directory: StudyDirectory) -> str:
    return directory.path.resolve().name


def _shared_level(factor: str, cells: list[PlannedCell], study: Study) -> str:
    """The level of cells that are one network: "-" where they have every level of the factor, else all they have."""
    names = list(dict.fromkeys(level_name(cell.levels[factor]) for cell in cells))
    every = len(names) > 1 and study.design == "factorial" and len(names) == len(study.factors[factor])
    return EACH_LEVEL if every else " / ".join(names)


def row_name(row: Row) -> str:
    """A row in a few words: its levels, those of factors that change nothing left out; a baseline's network."""
    levels = [f"{name} {level}" for name, level in row.levels.items() if level != EACH_LEVEL]
    return ", ".join(levels) or row.model


def best_row(rows: Sequence[Row]) -> Row | None:
    """The row with the best mean validation accuracy, the lower validation loss between equals.

    Rows with all their seeds go before those with some; None where no trial is finished.
    """
    most = max((len(row.records) for row in rows), default=0)
    done = [row for row in rows if row.records and len(row.records) == most]

    def merit(row: Row) -> tuple[float, float]:
        return row.interval(lambda r: r.validation_accuracy).mean, -row.interval(lambda r: r.validation_loss).mean

    return max(done, key=merit, default=None)


def best_record(row: Row) -> Record:
    """The trial of a row that is best on the validation split."""
    return max(row.records, key=lambda record: (record.validation_accuracy, -record.validation_loss))


def marginal_rows(directory: StudyDirectory, factor: str) -> list[dict[str, object]]:
    """A row for each level of a factor: the mean over its cells for each seed, then over seeds, with 95% intervals.

    Only cells in which all seeds are done count, as each seed's mean is over the same cells. Baselines have no levels;
    one at a time, a level has the cell in which only this factor is changed. Raises InputError for a factor that the
    study does not have.
    """
    study, plan = directory.study, directory.plan
    if factor not in study.factors:
        raise unknown(f"factor of {directory.path}:", factor, study.factors)
    rows = []
    cells_of: dict[str, list[PlannedCell]] = {}
    for cell in plan.cells:
        others = [level for name, level in cell.levels.items() if name != factor]
        if cell.levels and (study.design == "factorial" or all(level is BASE for level in others)):
            cells_of.setdefault(level_name(cell.levels[factor]), []).append(cell)
    for level, cells in cells_of.items():
        found = [[directory.record(trial) for trial in cell.trials] for cell in cells]
        whole = [records for records in found if all(records)]
        row: dict[str, object] = {factor: level, "cells": len(whole), "n": len(whole[0]) if whole else 0}
        for title, value in _ACCURACIES.items():
            by_seed = [sum(map(value, seed)) / len(seed) for seed in zip(*whole)]
            row[title] = mean_interval(by_seed) if by_seed else None
        rows.append(row)
    return rows


_ACCURACIES: dict[str, Callable[[Record], float]] = {
    "val acc %": lambda record: 100 * record.validation_accuracy,
    "test acc %": lambda record: 100 * record.test_accuracy,
}


def columns(rows: Sequence[Row]) -> list[dict[str, object]]:
    """The rows as titled values; intervals are still numbers. Columns that would be empty or alike are left out."""
    factors = list(dict.fromkeys(name for row in rows for name in row.levels))
    names = {row.model for row in rows}
    named = "model" in factors or (len(names) > 1 and any(row.model not in row.levels.values() for row in rows))
    table = []
    for row in rows:
        first = row.records[0] if row.records else None
        values: dict[str, object] = {"study": row.study} if len({row.study for row in rows}) > 1 else {}
        values |= {"model": row.model} if named else {}
        values |= {name: row.levels.get(name, "") for name in factors if name != "model" or row.levels}
        values["n"] = len(row.records) if len(row.records) == row.seeds else f"{len(row.records)}/{row.seeds}"
        values |= {title: row.interval(value) for title, value in _ACCURACIES.items()}
        if any(row.reported for row in rows):
            values["reported %"] = row.reported
        values["params"] = first.parameters if first else None
        values["MACs"] = first.macs if first else None
        rate = row.interval(lambda record: record.images_per_s)
        values["train images/s"] = rate.mean if rate else None
        if any(row.latency for row in rows):
            values["latency ms"] = _smallest(row.latency).p50_ms if row.latency else None
        table.append(values)
    return table


def _smallest(latency: LatencySummary) -> Benched:
    """ONNX Runtime at the smallest batch size that was measured."""
    return min(latency.latencies, key=lambda one: (not one.engine.startswith("onnxruntime"), one.batch))


def notes(directory: StudyDirectory, plan: Plan, rows: Sequence[Row]) -> list[str]:
    """What a reader needs to know under the table, a line each."""
    lines = [f"Data: {plan.data}."]
    intervals = "± is half of the 95% interval of the mean over seeds (Student's t)"
    if any(len(row.records) == 1 for row in rows):
        intervals += "; one seed has no interval"
    lines.append(f"n: seeds; {intervals}.")
    if any("base" in row.levels.values() for row in rows):
        base = directory.study.base
        lines.append(f"base: as in {base.model} with the recipe {base.recipe} and the study's settings.")
    if any(EACH_LEVEL in row.levels.values() for row in rows):
        lines.append(f"{EACH_LEVEL}: the network is the same at each level of this factor, and was trained once.")
    if best := best_row(rows):
        lines.append(f"Best on validation: {row_name(best)}, trial {best_record(best).trial}.")
    environments = dict.fromkeys(_where(record) for row in rows for record in row.records)
    lines += [f"Trained on {where}." for where in environments]
    readers = Counter(read.reader for read in directory.test_reads())
    lines.append(
        f"The test split was read {readers.total()} times: {readers['training']} times at the end of a training, "
        f"{readers['export']} times to certify an export."
    )
    for latency in {row.latency.file: row.latency for row in rows if row.latency}.values():
        batch = _smallest(latency).batch
        lines.append(
            f"Latency: median of ONNX Runtime at batch {batch}, {latency.provider}, {latency.threads} threads."
        )
    lines += [f"Failed: {failure}" for row in rows for failure in row.failures]
    return lines


def _where(record: Record) -> str:
    here = record.environment
    number = "bf16" if record.bfloat16 else "fp32"
    return (
        f"{here.device}, {here.threads} threads, {number}, torch {here.versions.get('torch', 'of an unknown version')}"
    )


def check_format(format: str) -> None:
    """Raises InputError for a format that tables do not have."""
    if format not in FORMATS:
        raise unknown("format", format, FORMATS)


def render(table: Sequence[dict[str, object]], format: Format, notes: Sequence[str] = ()) -> str:
    """A table as text; notes go under it in the formats that people read. Raises InputError for an empty table.

    In `csv` and `json` numbers are unrounded, and an interval is two of them: its mean and half its width.
    """
    if not table:
        raise InputError("there is nothing to show: the study has no cells")
    if format == "json":
        return json.dumps([{title: _plain(value) for title, value in row.items()} for row in table], indent=1)
    if format == "csv":
        file = io.StringIO()
        flat = [dict(pair for title, value in row.items() for pair in _flat(title, value)) for row in table]
        writer = csv.DictWriter(file, list(dict.fromkeys(title for row in flat for title in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(flat)
        return file.getvalue().rstrip("\n")
    plus_minus = "+-" if format == "latex" else "±"
    cells = [[shown(value, plus_minus) for value in row.values()] for row in table]
    styles = {"text": "simple", "github": "github", "latex": "latex_booktabs"}
    numeric = [all(isinstance(row[title], int | float | Interval | None) for row in table) for title in table[0]]
    align = ["right" if is_number else "left" for is_number in numeric]
    text = tabulate(cells, headers=list(table[0]), tablefmt=styles[format], colalign=align, disable_numparse=True)
    if format == "latex":
        text = text.replace(" +- ", r" $\pm$ ")
        return "\n".join([text, *(f"% {note}" for note in notes)])
    return "\n".join(
        [text, *([""] if notes else []), *((f"- {note}" if format == "github" else note) for note in notes)]
    )


def _plain(value: object) -> object:
    return value._asdict() if isinstance(value, Interval) else value


def _flat(title: str, value: object) -> list[tuple[str, object]]:
    if isinstance(value, Interval):
        return [(title, value.mean), (f"{title} ±", value.half_width)]
    return [(title, value)]


def shown(value: object, plus_minus: str = "±") -> str:
    """A value as a table shows it."""
    match value:
        case None:
            return ""
        case Interval(mean, None):
            return f"{mean:.2f}"
        case Interval(mean, half_width):
            return f"{mean:.2f} {plus_minus} {half_width:.2f}"
        case int():
            return f"{value:,}"
        case float():
            return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 10 else f"{value:.1f}"
    return str(value)
