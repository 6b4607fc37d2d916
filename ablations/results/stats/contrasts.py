"""The one linear model: from contrasts of cells and their scores by seed to estimates, intervals and verdicts.

The accuracy of cell c at seed s is m_c + f_s + e_cs. All cells of a seed share its hold-out, so f_s is a block, and a
contrast (weights that sum to 0) is free of it. The errors e_cs are independent and normal, and each cell may have a
variance of its own. Every answer about cells is a contrast of the m_c; nothing else tests.

Shapes: Q contrasts, C cells, S seeds, X any further axes in front (simulated studies, say).

Scores are better when they are higher (callers turn verdicts on others), in the unit of the margin. A score that is NaN
is a trial that was not trained yet. A trial that failed must not be given as NaN: its cell has no verdict (`judge`,
`no_verdict`).

How an error is estimated. The variance of a contrast, in units of sum(weights**2) / seeds, is the largest of

- *pooled*: the residual variance after cell and seed, over all cells;
- *its cells*: pooled, plus what the contrast's own cells spread by more than that. Few seeds know this excess badly, so
  that it counts (t / z)**2 times, Student's t of n - 1 degrees of freedom over the normal z, both at 99%: 9.0 times for
  3 seeds, 2.6 for 5, 1.5 for 10;
- *over seeds*: the variance of the contrast itself from seed to seed. It also holds where cells of one level rise and
  fall together from hold-out to hold-out, which residuals of single cells do not show.

The critical value is that of the pooled residuals. Where all spreads are equal this is a little cautious (about 3%
errors instead of 5%); where one cell is three times as noisy the family's error is 5%. A contrast of few cells at few
seeds is too poorly known even so. With the degrees of freedom of its own cells (n - 1 for each, by Satterthwaite's
formula)

- below 8 (two cells at 3 or 4 seeds): the excess is counted cell by cell, and a quiet cell does not make up for a noisy
  one;
- below 4 (two cells at 2 seeds): Student's t over seeds alone, with Bonferroni's correction.

`Judgement.basis` says which of them an interval rests on. The simulations among the tests have the numbers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
from scipy.special import ndtri, stdtrit

from expertgrid.ablations.results.stats.critical import LEVEL, JointT, joint_t

Verdict = Literal["better", "worse", "same", "open", "none"]
VERDICTS = get_args(Verdict)
BETTER, WORSE, SAME, OPEN, NONE = VERDICTS
TURNED: dict[Verdict, Verdict] = {
    BETTER: WORSE,
    WORSE: BETTER,
}  # where lower is better, or two cells change places

Basis = Literal["pooled", "its cells", "over seeds", "t over seeds"]
BASES = get_args(Basis)

FEW = 8  # degrees of freedom of a contrast's own cells, below which their excess is counted cell by cell
TOO_FEW = 4  # below which Student's t over seeds decides alone


class Estimates(NamedTuple):
    """Contrasts of one study, or of many studies that have the same trials. NaN where a contrast has no interval."""

    mean_XQ: np.ndarray
    error_XQ: np.ndarray  # standard error of the mean
    basis_XQ: np.ndarray  # index into BASES
    seeds_Q: np.ndarray  # that all cells of the contrast have
    by_seeds_Q: np.ndarray  # whether the error has the contrast's own seeds - 1 degrees of freedom, not `df`
    spread_X: np.ndarray  # pooled residual standard deviation; NaN without degrees of freedom
    df: float  # of it
    constant_Q: np.ndarray = np.array(np.nan)  # critical value: half of an interval's width over its error

    @property
    def low_XQ(self) -> np.ndarray:
        return self.mean_XQ - self.constant_Q * self.error_XQ

    @property
    def high_XQ(self) -> np.ndarray:
        return self.mean_XQ + self.constant_Q * self.error_XQ


@dataclass(frozen=True)
class Judgement:
    """What may be said of one contrast of a family. `error`, `low` and `high` are None where `reason` says why."""

    verdict: Verdict  # "none": the contrast has no verdict
    seeds: int
    mean: float | None = None
    error: float | None = None
    low: float | None = None
    high: float | None = None
    constant: float | None = None  # critical value: half of the interval's width over its error
    basis: Basis | None = None
    reason: str = ""


@dataclass(frozen=True)
class Family:
    """The judgements of contrasts that were asked together: no interval misses, but for 1 study in 20."""

    judgements: list[Judgement]
    spread: float | None  # pooled residual standard deviation of a score; None without degrees of freedom
    df: float  # of the spread


def judge(
    weights_QC: np.ndarray,
    scores_CS: np.ndarray,
    margin: float,
    no_verdict: Mapping[int, str] | None = None,
    level: float = LEVEL,
) -> Family:
    """A verdict on each contrast of a family, all of them right together with probability `level`.

    The interval decides, and it is the one to print. Same: it lies within the margin, either side of 0. Better or
    worse: it lies on one side of 0. A difference within the margin is `same`, and `reason` says that there is one.
    Otherwise open. So a wrong verdict needs an interval that misses the truth.

    The seeds must have been fixed beforehand (for others see `race`). A contrast uses the seeds that all of its cells
    have. `no_verdict` names cells that may not be judged, and why ("diverged in 2 of 5 seeds"): every contrast with
    such a cell has the verdict "none" and this reason. These cells count in the size of the family, but not in the
    spread. Raises ValueError for weights that do not sum to 0 or do not fit the scores, infinite scores, a margin that
    is not above 0.
    """
    weights_QC, scores_CS = checked(weights_QC, scores_CS, margin)
    no_verdict = no_verdict or {}
    if not len(weights_QC):
        return Family([], None, 0.0)
    judged_CS = scores_CS.copy()
    judged_CS[list(no_verdict)] = np.nan
    estimates = estimate(weights_QC, judged_CS, level)
    judgements = [
        without_verdict(weights_C, no_verdict) or judged(estimates, place, margin)
        for place, weights_C in enumerate(weights_QC)
    ]
    return Family(judgements, float(estimates.spread_X) if estimates.df > 0 else None, estimates.df)


def without_verdict(weights_C: np.ndarray, no_verdict: Mapping[int, str]) -> Judgement | None:
    """The judgement on a contrast with cells that may not be judged; None for others."""
    reasons = [reason for cell, reason in no_verdict.items() if weights_C[cell] != 0]
    return Judgement(NONE, 0, reason="; ".join(dict.fromkeys(reasons))) if reasons else None


def judged(estimates: Estimates, place: int, margin: float) -> Judgement:
    """The judgement on the contrast at this place of one study."""
    seeds = int(estimates.seeds_Q[place])
    mean, error = float(estimates.mean_XQ[place]), float(estimates.error_XQ[place])
    constant = float(estimates.constant_Q[place])
    if np.isnan(error):
        return Judgement(OPEN, seeds, mean if seeds else None, reason=_no_interval(seeds))
    low, high = mean - constant * error, mean + constant * error
    verdict: Verdict = verdicts(np.array(low), np.array(high), margin).item()
    inside = verdict == SAME and (low > 0 or high < 0)
    reason = "there is a difference, within the margin" if inside else ""
    return Judgement(verdict, seeds, mean, error, low, high, constant, BASES[estimates.basis_XQ[place]], reason)


def _no_interval(seeds: int) -> str:
    if seeds == 0:
        return "the cells have no seed in common"
    if seeds == 1:
        return "one seed has no spread"
    return "the scores differ by the same amount at every seed, and their spread is unknown"


def verdicts(low_XQ: np.ndarray, high_XQ: np.ndarray, margin: float) -> np.ndarray:
    """The verdict on each interval, an array of strings; NaN is open."""
    same_XQ = (low_XQ > -margin) & (high_XQ < margin)
    return np.select([same_XQ, low_XQ > 0, high_XQ < 0], [SAME, BETTER, WORSE], OPEN)


def estimate(weights_QC: np.ndarray, scores_XCS: np.ndarray, level: float = LEVEL) -> Estimates:
    """Estimates and simultaneous intervals of contrasts, by the rules at the head of this file.

    In the unbalanced case (NaN at some cells and seeds, the same ones for all X) a contrast is the mean over the seeds
    that all of its cells have, and the variances are from all scores: unbiased ones, of residuals after a fit of cells
    and seeds. A contrast without an interval has NaN for its error: fewer than two seeds, no spread at all.
    """
    weights_QC, scores_XCS = checked(weights_QC, scores_XCS)
    known = errors(weights_QC, scores_XCS)
    joint = _joint(weights_QC, np.isnan(scores_XCS.reshape(-1, *scores_XCS.shape[-2:])[0]))
    constant_Q = np.full(len(weights_QC), joint.constant(known.df, level) if known.df > 0 else np.nan)
    for seeds in np.unique(known.seeds_Q[known.by_seeds_Q & (known.seeds_Q > 1)]):
        constant_Q[known.by_seeds_Q & (known.seeds_Q == seeds)] = by_seeds_constant(seeds, len(weights_QC), level)
    return known._replace(constant_Q=constant_Q)


def errors(weights_QC: np.ndarray, scores_XCS: np.ndarray) -> Estimates:
    """What `estimate` knows before it asks for critical values (NaN); weights and scores are not checked."""
    mask_CS = ~np.isnan(scores_XCS.reshape(-1, *scores_XCS.shape[-2:])[0])
    if (np.isnan(scores_XCS) == mask_CS).any():
        raise ValueError("scores of several studies must be missing at the same cells and seeds")
    scores_XCS = np.where(mask_CS, scores_XCS, 0.0)
    squares_QC = weights_QC**2
    total_Q = squares_QC.sum(1)
    mask_QS = ~((weights_QC != 0) @ ~mask_CS)
    seeds_Q = mask_QS.sum(1)
    own_df_Q = (seeds_Q - 1) * total_Q**2 / (squares_QC**2).sum(1)
    too_few_Q = own_df_Q < TOO_FEW
    with np.errstate(divide="ignore", invalid="ignore"):
        by_seed_XQS = np.where(mask_QS, weights_QC @ scores_XCS, 0.0)
        mean_XQ = by_seed_XQS.sum(-1) / seeds_Q
        away_XQS = np.where(mask_QS, by_seed_XQS - mean_XQ[..., None], 0.0)
        seeds_variance_XQ = (away_XQS**2).sum(-1) / (seeds_Q - 1) / total_Q

        spread = residual_variances(scores_XCS, mask_CS)
        pooled_X1 = spread.pooled_X[..., None]
        excess_XC = np.nan_to_num(spread.own_XC / pooled_X1 - 1)  # 0 for a cell without scores
        share_CQ = (squares_QC / total_Q[:, None]).T
        together_XQ = np.maximum(0, excess_XC @ share_CQ)
        apart_XQ = np.maximum(0, excess_XC) @ share_CQ
        excess_XQ = surcharge(seeds_Q) * np.where(own_df_Q < FEW, apart_XQ, together_XQ)
        cells_variance_XQ = np.where(too_few_Q, 0.0, pooled_X1 * (1 + excess_XQ))
        variance_XQ = np.maximum(cells_variance_XQ, seeds_variance_XQ)
        scale_X1 = np.abs(scores_XCS).max((-2, -1))[..., None]
        known_XQ = (seeds_Q > 1) & (variance_XQ > (1e-6 * scale_X1) ** 2)  # else only rounding in single precision
        error_XQ = np.where(known_XQ, np.sqrt(variance_XQ * total_Q / seeds_Q), np.nan)
    basis_XQ = np.where(seeds_variance_XQ > cells_variance_XQ, 2, np.where(excess_XQ > 0, 1, 0))
    basis_XQ = np.where(too_few_Q, 3, basis_XQ)
    return Estimates(mean_XQ, error_XQ, basis_XQ, seeds_Q, too_few_Q, np.sqrt(spread.pooled_X), spread.df)


def by_seeds_constant(seeds: int, contrasts: int, level: float = LEVEL) -> float:
    """Student's t over seeds, by Bonferroni's inequality: each contrast has a spread of its own, not a common one."""
    return float(-stdtrit(seeds - 1, (1 - level) / 2 / contrasts))


def surcharge(seeds: np.ndarray | int) -> np.ndarray:
    """How many times an excess that `seeds` seeds show counts: (t / z)**2; inf below 2 seeds."""
    seeds = np.asarray(seeds, dtype=float)
    t = stdtrit(np.maximum(seeds - 1, 1), 0.99)
    return np.where(seeds > 1, (t / ndtri(0.99)) ** 2, np.inf)


def _joint(weights_QC: np.ndarray, missing_CS: np.ndarray) -> JointT:
    """The joint t of contrasts over the seeds that all their cells have. A contrast without any counts as with all."""
    mask_QS = ~((weights_QC != 0) @ missing_CS)
    mask_QS = np.where(mask_QS.any(1)[:, None], mask_QS, True).astype(float)
    seeds_Q = mask_QS.sum(1)
    covariance_QQ = (weights_QC @ weights_QC.T) * (mask_QS @ mask_QS.T) / np.outer(seeds_Q, seeds_Q)
    scale_Q = np.sqrt(np.diag(covariance_QQ))
    return joint_t(covariance_QQ / np.outer(scale_Q, scale_Q))


def checked(
    weights_QC: np.ndarray, scores_XCS: np.ndarray, margin: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Weights and scores as arrays. Raises ValueError for what `judge` does not take."""
    weights_QC, scores_XCS = np.asarray(weights_QC, dtype=float), np.asarray(scores_XCS, dtype=float)
    if weights_QC.ndim != 2 or scores_XCS.ndim < 2 or weights_QC.shape[1] != scores_XCS.shape[-2]:
        raise ValueError(f"contrasts {weights_QC.shape} do not fit scores {scores_XCS.shape}")
    if scores_XCS.shape[-1] == 0:
        raise ValueError("scores need at least one seed")
    if np.isinf(scores_XCS).any():
        raise ValueError("scores must be finite, or NaN where a trial was not trained yet")
    largest_Q = np.abs(weights_QC).max(1) if weights_QC.size else np.ones(0)
    if (largest_Q == 0).any() or (np.abs(weights_QC.sum(1)) > 1e-9 * largest_Q).any():
        raise ValueError("the weights of a contrast must sum to 0, and not all be 0")
    if margin is not None and not margin > 0:
        raise ValueError(f"the margin must be above 0, found {margin}")
    return weights_QC, scores_XCS


class Residuals(NamedTuple):
    """Variances of scores after cell and seed."""

    pooled_X: np.ndarray  # NaN without degrees of freedom
    own_XC: np.ndarray  # of each cell, unbiased; may be below 0
    df: float


def residual_variances(scores_XCS: np.ndarray, mask_CS: np.ndarray) -> Residuals:
    """The residual variances of the fit m_c + f_s by least squares; scores where the mask is False do not count.

    Pooled is the mean square of the residuals. A cell's own is unbiased whatever the variances of the others: expected
    sums of squares of each cell's residuals are linear in the variances of all cells (K), and are solved for (MINQUE:
    Rao 1970). For C cells with the same S seeds and the sum of squares q_c it is C / (C - 2) * (q_c / (S - 1) -
    pooled / C). Two cells have the same residuals, and cannot be told apart: each has the mean.
    """
    counts_C = mask_CS.sum(1)
    cells, mask_CS, scores_XCS = counts_C > 0, mask_CS[counts_C > 0].astype(float), scores_XCS[..., counts_C > 0, :]
    n_C = counts_C[cells]
    # each cell centred; what is left is a regression on the seeds, centred alike
    centred_XCS = mask_CS * (scores_XCS - ((scores_XCS * mask_CS).sum(-1) / n_C)[..., None])
    normal_CSS = mask_CS[:, :, None] * (np.eye(mask_CS.shape[1]) - mask_CS[:, None, :] / n_C[:, None, None])
    inverse_SS = np.linalg.pinv(normal_CSS.sum(0), hermitian=True)
    seeds_XS = centred_XCS.sum(-2) @ inverse_SS
    fitted_XCS = mask_CS * (seeds_XS[..., None, :] - (seeds_XS @ mask_CS.T / n_C)[..., None])
    squares_XC = ((centred_XCS - fitted_XCS) ** 2).sum(-1)
    explained_CSS = inverse_SS @ normal_CSS
    left_CSS = normal_CSS - explained_CSS
    K_CC = np.einsum("cij,dji->cd", explained_CSS, explained_CSS)
    np.fill_diagonal(K_CC, np.einsum("cij,cji->c", left_CSS, left_CSS))
    df = float(n_C.sum() - len(n_C) - np.linalg.matrix_rank(normal_CSS.sum(0), hermitian=True))
    own_XC = np.full((*squares_XC.shape[:-1], len(cells)), np.nan)
    own_XC[..., cells] = squares_XC @ np.linalg.pinv(K_CC, hermitian=True)
    pooled_X = squares_XC.sum(-1) / df if df > 0 else np.full(squares_XC.shape[:-1], np.nan)
    return Residuals(pooled_X, own_XC, df)
