"""Verdicts on scores that were made elsewhere: a table with the columns of factors, `seed` and `score`.

The families, the rules and the claim are those of a study that was trained here.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path

import numpy as np

from expertgrid.ablations.results.stats import factors
from expertgrid.ablations.results.stats.assumptions import may_be_best
from expertgrid.ablations.results.stats.contrasts import Judgement, judge
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
    if len({len(column) for column in columns.values()}) > 1:
        raise InputError("the columns have different lengths")
    if not margin > 0:
        raise InputError(f"the margin must be above 0, found {margin}")
    points, seeds = list(zip(*(map(str, columns[name]) for name in names))), list(map(str, columns[SEED]))
    order, score_of = list(dict.fromkeys(points)), {}
    if len(order) < 2:
        raise InputError("the table has fewer than two cells; the columns beside seed and score are factors")
    for row, (point, seed, score) in enumerate(zip(points, seeds, columns[SCORE]), start=1):
        if (point, seed) in score_of:
            cell = ", ".join(f"{name} {level}" for name, level in zip(names, point))
            raise InputError(f"row {row}: a second score of {cell} at seed {seed}")
        score_of[point, seed] = np.nan if score is None or score == "" else _number(score, row)
    scores_CS = np.array([[score_of.get((point, seed), np.nan) for seed in dict.fromkeys(seeds)] for point in order])
    levels = {name: list(dict.fromkeys(point[i] for point in order)) for i, name in enumerate(names)}
    asked = factors.main_effects(levels, [dict(zip(names, point)) for point in order], range(len(order)), len(order))
    weights_QC = np.array([effect.weights_C for effect in asked]).reshape(-1, len(order))
    family = judge(weights_QC, scores_CS, margin)
    base = judge(factors.against(0, len(order)), scores_CS, margin)

    def turned(judgement: Judgement) -> Judgement:
        return judgement.turned if lower_is_better else judgement

    needed = seeds_to_decide(weights_QC, family, margin)
    best_C = may_be_best(-scores_CS if lower_is_better else scores_CS).tolist()
    n_C = (~np.isnan(scores_CS)).sum(1).tolist()
    against = [None, *map(turned, base)]
    return JudgedScores(
        margin,
        [
            JudgedEffect(*change, turned(judgement), count)
            for (change,), judgement, count in zip((effect.changes for effect in asked), family, needed)
        ],
        [
            JudgedCell(dict(zip(names, point)), n, total / n if n else np.nan, judgement, best)
            for point, n, total, judgement, best in zip(order, n_C, np.nansum(scores_CS, 1).tolist(), against, best_C)
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
    if isinstance(score, Real) and not isinstance(score, bool) and not math.isinf(float(score)):
        return float(score)
    raise InputError(f"row {row}: the score is {score!r}; a finite number is needed, or nothing where it is missing")
