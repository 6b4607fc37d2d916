"""Racing: seeds are added to the contrasts that are undecided, one at a time, until all are decided or the last came.

Where a race stands follows from the records alone, so that an interrupted one goes on.
"""

from collections.abc import Sequence
from dataclasses import replace

from ablations.records import Race
from ablations.results.evidence import ALPHA, Row, judge_race, race_of, row_name
from ablations.study import Cell, Study
from model.errors import InputError

Counts = dict[str, int]  # seeds of a cell, by the id of its first trial


def check_options(until: str | None, max_seeds: int | None, study: Study) -> None:
    """Raises InputError for options of a race that do not fit together or the study."""
    if until is None:
        if max_seeds is not None:
            raise InputError(f"--max-seeds {max_seeds}: goes with --until decided, --seeds gives a fixed number")
        return
    if until != "decided":
        raise InputError(f"--until {until!r}: unknown. Accepted: decided")
    if max_seeds is None:
        raise InputError("--until decided: --max-seeds N is needed, the number of seeds at which to stop at last")
    if study.seeds < 2:
        raise InputError("--until decided: --seeds 2 or more are needed for the first look; 1 seed has no spread")
    if not study.seeds < max_seeds <= 100:
        raise InputError(
            f"--max-seeds {max_seeds}: from {study.seeds + 1} (the first look is at {study.seeds}) to 100 are accepted"
        )


def begun(cells: Sequence[Cell], study: Study, last: int, seen: int) -> Race:
    """The race of a study: all that must be fixed before its first look. Raises InputError for a single cell."""
    rows = {(tuple(trial.id for trial in cell.trials), bool(cell.levels)) for cell in cells}
    if len(rows) < 2:
        raise InputError("--until decided: the study has one network, and nothing to compare it with")
    return Race(alpha=ALPHA, margin=study.margin, first=study.seeds, last=last, contrasts=len(rows) - 1, seen=seen)


def check_same(race: Race, asked: Race) -> None:
    """Raises InputError where a race would be another one than was begun."""
    for field in ("margin", "first", "last", "contrasts", "alpha"):
        ours, theirs = getattr(race, field), getattr(asked, field)
        if ours != theirs:
            name = {"last": "--max-seeds", "first": "--seeds", "contrasts": "the number of contrasts"}.get(field, field)
            raise InputError(
                f"{name} was {ours:g} when this race was begun, and cannot be {theirs:g} now; --out another"
            )


def at(cells: Sequence[Cell], counts: Counts) -> list[Cell]:
    """The cells with the seeds of a look."""
    return [replace(cell, trials=cell.trials[: counts[cell.trials[0].id]]) for cell in cells]


def next_look(rows: Sequence[Row], race: Race, counts: Counts) -> Counts:
    """The seeds that the next look needs; the same where there is none. A trial that failed ends its contrasts."""
    reference, wanted = rows[0], dict(counts)
    for row in rows[1:]:
        stands = race_of(row, reference, race)
        failed = row.failures or reference.failures
        if row.trials[0] == reference.trials[0] or stands is None or not stands.go_on or failed:
            continue
        for one in (row, reference):
            wanted[one.trials[0]] = max(wanted[one.trials[0]], stands.seeds + 1)
    return wanted


def said(rows: Sequence[Row], race: Race, wanted: Counts, before: Counts) -> str:
    """A look in a few lines: what is decided, and what goes on."""
    judged = [(row, judge_race(row, rows[0], race)) for row in rows[1:]]
    by_verdict: dict[str, list[str]] = {}
    for row, one in judged:
        going_on = one.verdict == "undecided" and wanted[row.trials[0]] > before[row.trials[0]]
        what = "go on" if going_on else f"{one.verdict}, at {one.seeds} seeds"
        by_verdict.setdefault(what, []).append(row_name(row))
    lines = [f"  {what}: {'; '.join(names)}" for what, names in by_verdict.items()]
    return "\n".join([f"look at {max(before.values())} seeds, against {row_name(rows[0])}:", *lines])
