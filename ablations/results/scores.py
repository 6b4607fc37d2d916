"""Verdicts on scores that were made elsewhere: a table with the columns of factors, `seed` and `score`.

The families, the rules and the claim are those of a study that was trained here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from expertgrid.ablations.results.stats import factors
from expertgrid.ablations.results.stats.assumptions import may_be_best
from expertgrid.ablations.results.stats.contrasts import TURNED, Judgement, judge
from expertgrid.ablations.results.stats.planning import seeds_to_decide
from expertgrid.model.system.errors import InputError, reason_of

SEED, SCORE = "seed", "score"


@dataclass(frozen=True)
class JudgedEffect:
    """What the change of a factor does, over the cells that differ in it alone."""

    factor: str
    before: str
    after: str
    judgement: Judgement
    seeds_to_decide: float | None  # about how many in all; None for what is decided, inf for more than 1,000


@dataclass(frozen=True)
class JudgedCell:
    """A combination of levels."""

    levels: dict[str, str]  # by factor
    seeds: int  # that have a score
    mean: float  # of the scores, as they are
    against_first: Judgement | None  # None for the first cell itself
    may_be_best: bool  # no other cell is surely better


@dataclass(frozen=True)
class JudgedScores:
    """The verdicts on a table of scores."""

    margin: float
    effects: list[JudgedEffect]
    cells: list[JudgedCell]
    missing: int  # scores of cells and seeds that the table does not have


def judge_scores(columns: Mapping[str, Sequence[object]], margin: float, lower_is_better: bool = False) -> JudgedScores:
    """The verdicts on scores from a table: columns by name, `seed` and `score` among them, the others are factors.

    Scores of one seed share what a seed decides (the split, say), so that cells are compared within seeds. A score
    that is missing (no row, None or NaN) was lost for a reason that has nothing to do with its value. `margin` is the
    difference that matters, in the unit of the scores. Levels are in the order in which the table names them, and the
    first cell is what the others are compared with. Raises InputError for a table without these columns, a score that
    is no finite number, two scores of one cell and seed, a single cell, and a margin that is not above 0.
    """
    names = [name for name in columns if name not in (SEED, SCORE)]
    if lacking := [name for name in (SEED, SCORE) if name not in columns]:
        raise InputError(f"the table has no column {lacking[0]!r}; its columns are {', '.join(columns)}")
    if not margin > 0:
        raise InputError(f"the margin must be above 0, found {margin}")
    points = list(zip(*([str(value) for value in columns[name]] for name in names))) if names else []
    order = list(dict.fromkeys(points))
    if len(order) < 2:
        raise InputError("the table has fewer than two cells; the columns beside seed and score are factors")
    seeds = {seed: place for place, seed in enumerate(dict.fromkeys(map(str, columns[SEED])))}
    scores_CS, taken = np.full((len(order), len(seeds)), np.nan), set()
    for row, (point, seed, score) in enumerate(zip(points, map(str, columns[SEED]), columns[SCORE]), start=1):
        cell, place = order.index(point), seeds[seed]
        if (cell, place) in taken:
            raise InputError(f"row {row}: a second score of {_named(names, point)} at seed {seed}")
        taken.add((cell, place))
        if score is not None and score != "":
            scores_CS[cell, place] = _number(score, row)
    levels = {name: list(dict.fromkeys(point[i] for point in order)) for i, name in enumerate(names)}
    asked = factors.main_effects(levels, [dict(zip(names, point)) for point in order], range(len(order)), len(order))
    weights_QC = np.array([effect.weights_C for effect in asked]).reshape(-1, len(order))
    family = judge(weights_QC, scores_CS, margin)
    base = judge(factors.against(0, len(order)), scores_CS, margin)

    def turned(judgement: Judgement) -> Judgement:
        verdict = TURNED.get(judgement.verdict, judgement.verdict) if lower_is_better else judgement.verdict
        return replace(judgement, verdict=verdict)

    needed = seeds_to_decide(weights_QC, family, margin)
    best_C = may_be_best(-scores_CS if lower_is_better else scores_CS)
    against = [None, *map(turned, base.judgements)]
    return JudgedScores(
        margin,
        [
            JudgedEffect(change.factor, str(change.before), str(change.after), turned(judgement), count)
            for (change,), judgement, count in zip((effect.changes for effect in asked), family.judgements, needed)
        ],
        [
            JudgedCell(
                dict(zip(names, point)),
                int((~np.isnan(score_S)).sum()),
                float(np.nanmean(score_S)) if not np.isnan(score_S).all() else float("nan"),
                judgement,
                bool(best),
            )
            for point, score_S, judgement, best in zip(order, scores_CS, against, best_C)
        ],
        int(np.isnan(scores_CS).sum()),
    )


def read_scores(file: Path) -> dict[str, list[object]]:
    """The columns of a CSV file with a header. Raises InputError for what is none."""
    import pyarrow
    from pyarrow import csv

    try:
        return csv.read_csv(file).to_pydict()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{file}: cannot be read as CSV: {reason_of(error)}") from None


def _number(score: object, row: int) -> float:
    if isinstance(score, int | float) and not isinstance(score, bool) and not np.isinf(score):
        return float(score)
    raise InputError(f"row {row}: the score is {score!r}; a finite number is needed, or nothing where it is missing")


def _named(names: Sequence[str], point: Sequence[str]) -> str:
    return ", ".join(f"{name} {level}" for name, level in zip(names, point))
