"""What the verdicts rest on: whether effects vary from seed to seed, whether one seed decides, which cells may be best.

Shapes: Q contrasts, C cells, S seeds, R dimensions of a family.
"""

from typing import NamedTuple

import numpy as np
from scipy.special import fdtrc

from expertgrid.ablations.results.stats.contrasts import BETTER, WORSE, Fit, contrast_basis, errors, estimate, judge
from expertgrid.ablations.results.stats.factors import against, difference

RIVALS = 30  # cells that each cell is compared with


class FTest(NamedTuple):
    """An F test: the ratio of two mean squares, and the probability of a larger one where nothing is there."""

    f: float
    p: float
    share: float  # of the residual variance that is more than noise


def effects_by_seed(weights_QC: np.ndarray, scores_CS: np.ndarray) -> FTest | None:
    """Whether the contrasts of a family vary from seed to seed by more than the noise of single cells (an F test).

    The fit of cells and seeds is compared with one that has a value of each dimension of the family at each seed. NaN
    is a trial that is missing. None where no degrees of freedom are left for the noise.
    """
    mask_CS, basis_RC = ~np.isnan(scores_CS), contrast_basis(weights_QC)
    if not mask_CS.any() or len(basis_RC) >= mask_CS.any(1).sum() - 1:
        return None
    cells, seeds = np.nonzero(mask_CS)
    by_cell, by_seed = np.eye(mask_CS.shape[0])[cells], np.eye(mask_CS.shape[1])[seeds]
    varying = (basis_RC.T[cells][:, :, None] * by_seed[:, None, :]).reshape(len(cells), -1)
    scores = scores_CS[mask_CS] - scores_CS[mask_CS].mean()

    def residuals(*columns: np.ndarray) -> tuple[float, int]:
        design = np.hstack(columns)
        fitted, _, rank, _ = np.linalg.lstsq(design, scores, rcond=None)
        return float(((scores - design @ fitted) ** 2).sum()), len(scores) - int(rank)

    (without, df_without), (left, df) = residuals(by_cell, by_seed), residuals(by_cell, by_seed, varying)
    if not 0 < df < df_without or left <= 1e-12 * (scores**2).sum():
        return None
    f = (without - left) / (df_without - df) / (left / df)
    return FTest(f, float(fdtrc(df_without - df, df, f)), max(0.0, 1 - left / df / (without / df_without)))


def seeds_that_decide(weights_QC: np.ndarray, scores_CS: np.ndarray, margin: float) -> list[list[int]]:
    """For each contrast the seeds (places) without any one of which its verdict better or worse would be another."""
    decided = (BETTER, WORSE)
    verdicts_Q = [judgement.verdict for judgement in judge(weights_QC, scores_CS, margin)]
    places: list[list[int]] = [[] for _ in verdicts_Q]
    for seed in range(scores_CS.shape[1] if scores_CS.shape[1] > 1 else 0):
        without = judge(weights_QC, np.delete(scores_CS, seed, axis=1), margin)
        for place, (verdict, judgement) in enumerate(zip(verdicts_Q, without)):
            if verdict in decided and judgement.verdict != verdict:
                places[place].append(seed)
    return places


def may_be_best(scores_CS: np.ndarray) -> np.ndarray:
    """Which cells (C,) may have the highest true mean: those that no other cell surely exceeds.

    Each cell is compared with all others as one family, by two-sided intervals of `estimate`, so that the best cell is
    among them with a probability of 95% or more (multiple comparisons with the best: Hsu 1984). Only the `RIVALS`
    highest cells are asked whether they exceed it. A cell without scores may be the best.
    """
    count = len(scores_CS)
    best_C = np.ones(count, dtype=bool)
    if count < 2 or np.isnan(scores_CS).all():
        return best_C
    mask_CS = ~np.isnan(scores_CS)
    n_C, fit, constants = mask_CS.sum(1), Fit(mask_CS), {}  # cells with as many scores have almost the same constant
    highest = np.argsort(np.where(n_C > 0, -np.nansum(scores_CS, axis=1) / np.maximum(n_C, 1), np.inf))[:RIVALS]
    for cell, n in enumerate(n_C):
        if n not in constants:
            constants[n] = estimate(against(cell, count), scores_CS, fit=fit).constant_Q[0]
        rivals = [difference(rival, cell, count) for rival in highest if rival != cell]
        known = errors(np.array(rivals), scores_CS, fit)
        best_C[cell] = not (known.mean_XQ > constants[n] * known.error_XQ).any()
    return best_C
