"""A race: seeds are added to the contrasts that are open, one at a time, until all are decided or the last seed came.

The contrasts are the main effects of the study, and the cells that are in none of them against the base. Where a race
stands follows from the records alone, so that an interrupted race goes on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from expertgrid.ablations.records.plan import RaceRules
from expertgrid.ablations.results.evidence import Evidence, images_again, most_seeds
from expertgrid.ablations.results.questions import study_questions
from expertgrid.ablations.results.stats.contrasts import NONE, OPEN
from expertgrid.ablations.results.stats.critical import LEVEL
from expertgrid.ablations.results.stats.race import FIRST
from expertgrid.ablations.study.cells import Cell, groups
from expertgrid.ablations.study.study import Study
from expertgrid.model.system.errors import InputError
from expertgrid.model.training.holdout import HoldOut

MOST_SEEDS = 100
Counts = Mapping[str, int]  # seeds of a network, by the id of its first trial


def check_options(until: str | None, max_seeds: int | None, study: Study) -> None:
    """Raises InputError for options of a race that do not fit together or the study."""
    if until is None:
        if max_seeds is not None:
            raise InputError(f"--max-seeds {max_seeds}: goes with --until decided, --seeds gives a fixed number")
        return
    if max_seeds is None:
        raise InputError("--until decided: --max-seeds N is needed, the number of seeds at which to stop at last")
    if study.seeds < FIRST:
        raise InputError(
            f"--until decided: the first look needs {FIRST} seeds or more, found {study.seeds}; give --seeds {FIRST}"
        )
    if not study.seeds < max_seeds <= MOST_SEEDS:
        raise InputError(
            f"--max-seeds {max_seeds}: from {study.seeds + 1} (the first look is at {study.seeds}) to {MOST_SEEDS} are "
            "accepted"
        )


def new_race(cells: Sequence[Cell], study: Study, last: int, seen: int) -> RaceRules:
    """The race of a study: all that must be fixed before its first look. `seen` trials have results already.

    Raises InputError for a study with one network.
    """
    contrasts = len(study_questions(study, groups([cell.planned for cell in cells], study.combined_levels)).race_QU)
    if not contrasts:
        raise InputError("--until decided: the study has one network, and nothing to compare it with")
    return RaceRules(alpha=1 - LEVEL, margin=study.margin, first=study.seeds, last=last, contrasts=contrasts, seen=seen)


def check_images(race: RaceRules, study: Study, hold_out: HoldOut) -> None:
    """Raises InputError where a new race may take more seeds than have images of their own."""
    if race.last > most_seeds(hold_out, study.seeds):
        raise InputError(f"--max-seeds {race.last}: {images_again(study.base.data, hold_out)}")


def check_same(begun: RaceRules, now: RaceRules) -> None:
    """Raises InputError where a race would be another one than was begun."""
    for field in ("margin", "first", "last", "contrasts", "alpha"):
        before, after = getattr(begun, field), getattr(now, field)
        if before != after:
            name = {"last": "--max-seeds", "first": "--seeds", "contrasts": "the number of contrasts"}.get(field, field)
            raise InputError(
                f"{name} was {before:g} when this race was begun, and cannot be {after:g} now; --out another"
            )


def cells_with(cells: Sequence[Cell], counts: Counts) -> list[Cell]:
    """The cells with so many seeds each."""
    return [replace(cell, trials=cell.trials[: counts[cell.trials[0].id]]) for cell in cells]


def next_counts(evidence: Evidence, counts: Counts) -> Counts:
    """The seeds that the next look needs; the same where there is none. A trial that failed ends its contrasts."""
    if evidence.race is None or not evidence.race.go_on:
        return counts
    networks = [row.cells[0].network for row in evidence.results.rows]
    wanted = dict(zip(networks, map(int, evidence.race.wanted_C)))
    return {network: max(seeds, wanted[network]) for network, seeds in counts.items()}


def look_in_words(evidence: Evidence, wanted: Counts, counts: Counts) -> str:
    """A look in a few lines: what is decided, and what goes on."""
    by_state: dict[str, list[str]] = {}
    for name, judgement in zip(evidence.race_names, evidence.race.judgements if evidence.race else []):
        if judgement.verdict == OPEN:
            state = "goes on" if wanted != counts else "open"
        elif judgement.verdict == NONE:
            state = f"no verdict, {judgement.reason}"
        else:
            state = f"{judgement.verdict}, at {judgement.seeds:g} seeds"
        by_state.setdefault(state, []).append(name)
    lines = [f"  {state}: {'; '.join(names)}" for state, names in by_state.items()]
    return "\n".join([f"look at {max(counts.values())} seeds:", *lines])
