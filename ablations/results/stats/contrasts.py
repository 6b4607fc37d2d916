"""The one linear model: from contrasts of cells and their scores by seed to estimates, intervals and verdicts.

The accuracy of cell c at seed s is m_c + f_s + e_cs. All cells of a seed share its hold-out, so f_s is a block, and a
contrast (weights that sum to 0) is free of it. The errors e_cs are independent and normal, and each cell may have a
variance of its own. Every answer about cells is a contrast of the m_c; nothing else tests.

Shapes: Q contrasts, C cells, S seeds, X any further axes in front (simulated studies, say).

Scores are better when they are higher (callers turn verdicts on others), in the unit of the margin. A score that is NaN
is a trial that was not trained, or was lost for a reason that has nothing to do with its score. A trial that failed by
itself must not be given as NaN: its cell has no verdict (`judge`, `no_verdict`). Cells and seeds are fitted together by
least squares, so that a missing score costs little more than itself; where none is missing, a contrast is the mean over
the seeds.

How an error is estimated. The variance of a contrast, in units of sum(weights**2) / seeds, is the largest of

- *pooled*: the residual variance after cell and seed, over all cells;
- *its cells*: pooled, plus what the contrast's own cells spread by more than that. Few seeds know this excess badly, so
  that it counts (t / z)**2 times, Student's t of n - 1 degrees of freedom over the normal z, both at 99%: 9.0 times for
  3 seeds, 2.6 for 5, 1.5 for 10;
- *over seeds*: the variance of the contrast itself from seed to seed. It also holds where cells of one level rise and
  fall together from hold-out to hold-out, which residuals of single cells do not show. n - 1 degrees of freedom know it
  badly, so that for a contrast of more than two cells the mean of this variance over the R dimensions of its family
  counts where that is larger, and either counts (t' / t)**2 times: Student's t at 99.5% of R (n - 1) degrees of freedom
  over that of the pooled residuals. (A family that spans all differences of the cells has the pooled variance as this
  mean, and nothing changes.)

The critical value is that of the pooled residuals. Where all spreads are equal this is a little cautious (2 to 3%
errors instead of 5%); where one cell is three times as noisy, or half of the noise is shared by the cells of a level,
the family's error is at most 5%. A contrast of few cells at few seeds is too poorly known even so. With the degrees of
freedom of its own cells (n - 1 for each, by Satterthwaite's formula)

- below 8 (two cells at 3 or 4 seeds): the excess is counted cell by cell, and a quiet cell does not make up for a noisy
  one;
- below 4 (two cells at 2 seeds): there is no interval.

`Judgement.basis` says which of them an interval rests on. The simulations among the tests have the numbers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple, get_args

import numpy as np
from scipy.special import ndtri, stdtrit

from expertgrid.ablations.results.stats.critical import correlation, joint_t

Verdict = Literal["better", "worse", "same", "open", "none"]
VERDICTS = get_args(Verdict)
BETTER, WORSE, SAME, OPEN, NONE = VERDICTS
TURNED: dict[Verdict, Verdict] = {BETTER: WORSE, WORSE: BETTER}

Basis = Literal["pooled", "its cells", "over seeds"]
BASES = get_args(Basis)

FEW = 8  # degrees of freedom of a contrast's own cells, below which their excess is counted cell by cell
TOO_FEW = 4  # below which a contrast has no interval
ROUNDING = 1e-9  # of a value that is 0, relative to the largest
KNOWN = 0.995  # level at which a variance of few degrees of freedom counts as one of many


class Estimates(NamedTuple):
    """Contrasts of one study, or of many studies that have the same trials. NaN where a contrast has no interval."""

    mean_XQ: np.ndarray
    error_XQ: np.ndarray  # standard error of the mean
    basis_XQ: np.ndarray  # index into BASES
    seeds_Q: np.ndarray  # that the estimate is worth: all of them where no score is missing
    spread_X: np.ndarray  # pooled residual standard deviation; NaN without degrees of freedom
    df: float  # of it
    correlation_QQ: np.ndarray  # of the estimates
    few_Q: np.ndarray  # whether the contrast's own cells have too few degrees of freedom for an interval
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
    seeds: float  # that the estimate is worth, as `Fit.coefficients` counts them
    mean: float | None = None
    error: float | None = None
    low: float | None = None
    high: float | None = None
    constant: float | None = None  # critical value: half of the interval's width over its error
    basis: Basis | None = None
    reason: str = ""
    p: float | None = None  # of no difference, adjusted for the family; None in a race

    @property
    def turned(self) -> "Judgement":
        """With the verdict where lower is better, or where two cells change places."""
        return replace(self, verdict=TURNED.get(self.verdict, self.verdict))


def judge(
    weights_QC: np.ndarray,
    scores_CS: np.ndarray,
    margin: float,
    no_verdict: Mapping[int, str] | None = None,
) -> list[Judgement]:
    """A verdict on each contrast of a family, all of them right together with probability `critical.LEVEL`.

    The interval decides, and it is the one to print. Same: it lies within the margin, either side of 0. Better or
    worse: it lies on one side of 0. A difference within the margin is `same`, and `reason` says that there is one.
    Otherwise open. So a wrong verdict needs an interval that misses the truth.

    The seeds must have been fixed beforehand (for others see `race`). `no_verdict` names cells that may not be judged,
    and why ("diverged in 2 of 5 seeds"): every contrast with such a cell has the verdict "none" and this reason. These
    cells count in the size of the family, but not in the spread. Raises ValueError for weights that do not sum to 0 or
    do not fit the scores, infinite scores, a margin that is not above 0.
    """
    weights_QC, scores_CS = checked(weights_QC, scores_CS, margin)
    no_verdict = no_verdict or {}
    if not len(weights_QC):
        return []
    judged_CS = scores_CS.copy()
    judged_CS[list(no_verdict)] = np.nan
    estimates = estimate(weights_QC, judged_CS)
    joint = joint_t(estimates.correlation_QQ)

    def with_p(judgement: Judgement) -> Judgement:
        if judgement.mean is None or judgement.error is None:
            return judgement
        return replace(judgement, p=joint.tail(abs(judgement.mean) / judgement.error, estimates.df))

    return [
        without_verdict(weights_C, no_verdict) or with_p(judged(estimates, place, margin))
        for place, weights_C in enumerate(weights_QC)
    ]


def without_verdict(weights_C: np.ndarray, no_verdict: Mapping[int, str]) -> Judgement | None:
    """The judgement on a contrast with cells that may not be judged; None for others."""
    reasons = [reason for cell, reason in no_verdict.items() if weights_C[cell] != 0]
    return Judgement(NONE, 0, reason="; ".join(dict.fromkeys(reasons))) if reasons else None


def judged(estimates: Estimates, place: int, margin: float) -> Judgement:
    """The judgement on the contrast at this place of one study."""
    seeds = float(estimates.seeds_Q[place])
    mean, error = float(estimates.mean_XQ[place]), float(estimates.error_XQ[place])
    constant = float(estimates.constant_Q[place])
    if np.isnan(error):
        return Judgement(OPEN, seeds, mean if seeds else None, reason=_no_interval(seeds, bool(estimates.few_Q[place])))
    low, high = float(estimates.low_XQ[place]), float(estimates.high_XQ[place])
    verdict: Verdict = verdicts(np.array(low), np.array(high), margin).item()
    inside = verdict == SAME and (low > 0 or high < 0)
    reason = "there is a difference, within the margin" if inside else ""
    return Judgement(verdict, seeds, mean, error, low, high, constant, BASES[estimates.basis_XQ[place]], reason)


def _no_interval(seeds: float, few: bool) -> str:
    if seeds == 0:
        return "its cells cannot be compared by the trials that are finished"
    if few:
        return f"{seeds:.2g} seed{'' if seeds == 1 else 's'}: no verdict"
    return "the scores differ by the same amount at every seed, and their spread is unknown"


def verdicts(low_XQ: np.ndarray, high_XQ: np.ndarray, margin: float) -> np.ndarray:
    """The verdict on each interval, an array of strings; NaN is open."""
    same_XQ = (low_XQ > -margin) & (high_XQ < margin)
    return np.select([same_XQ, low_XQ > 0, high_XQ < 0], [SAME, BETTER, WORSE], OPEN)


def estimate(weights_QC: np.ndarray, scores_XCS: np.ndarray, fit: "Fit | None" = None) -> Estimates:
    """Estimates and simultaneous intervals of contrasts, by the rules at the head of this file.

    Scores may be missing (NaN at some cells and seeds, the same ones for all X). A contrast without an interval has
    NaN for its error: one that the scores do not determine, one seed, too few degrees of freedom, no spread at all.
    `fit` is that of these scores, where it was made before.
    """
    weights_QC, scores_XCS = checked(weights_QC, scores_XCS)
    known = errors(weights_QC, scores_XCS, fit)
    constant = joint_t(known.correlation_QQ).constant(known.df) if known.df > 0 else np.nan
    return known._replace(constant_Q=np.full(len(weights_QC), constant))


def errors(weights_QC: np.ndarray, scores_XCS: np.ndarray, fit: "Fit | None" = None) -> Estimates:
    """What `estimate` knows before it asks for critical values (NaN); weights and scores are not checked."""
    mask_CS = ~np.isnan(scores_XCS.reshape(-1, *scores_XCS.shape[-2:])[0])
    if (np.isnan(scores_XCS) == mask_CS).any():
        raise ValueError("scores of several studies must be missing at the same cells and seeds")
    scores_XCS, fit = np.where(mask_CS, scores_XCS, 0.0), fit or Fit(mask_CS)
    squares_QC = weights_QC**2
    total_Q = squares_QC.sum(1)
    by_score_QCS, seeds_Q = fit.coefficients(weights_QC)
    spread = residual_variances(scores_XCS, fit)
    residual_XCS = fit.residuals(scores_XCS)

    def over_seeds(by_score_QCS: np.ndarray, seeds_Q: np.ndarray) -> np.ndarray:
        """The variance (X, Q) of estimates from seed to seed, in units of sum(weights**2) / seeds."""
        by_seed_XQS = np.einsum("qcs,...cs->...qs", by_score_QCS, residual_XCS)
        return (by_seed_XQS**2).sum(-1) * seeds_Q / (seeds_Q - 1) / (by_score_QCS**2).sum((1, 2))

    with np.errstate(divide="ignore", invalid="ignore"):
        own_df_Q = (seeds_Q - 1) * total_Q**2 / (squares_QC**2).sum(1)
        seeds_variance_XQ = over_seeds(by_score_QCS, seeds_Q)
        many_Q = ((weights_QC != 0).sum(1) > 2) & (seeds_Q > 1)
        if many_Q.any():
            basis_RC = contrast_basis(weights_QC[seeds_Q > 1])
            by_score_RCS, seeds_R = fit.coefficients(basis_RC)
            family_X1 = over_seeds(by_score_RCS, seeds_R).mean(-1)[..., None]
            wider = stdtrit((seeds_R - 1).sum(), KNOWN) / stdtrit(spread.df, KNOWN)
            shared_XQ = np.maximum(seeds_variance_XQ, family_X1) * max(wider, 1.0) ** 2
            seeds_variance_XQ = np.where(many_Q, shared_XQ, seeds_variance_XQ)
        pooled_X1 = spread.pooled_X[..., None]
        excess_XC = np.nan_to_num(spread.own_XC / pooled_X1 - 1)  # 0 for a cell without scores
        squares_QCS = by_score_QCS**2
        share_CQ = (squares_QCS.sum(2) / squares_QCS.sum((1, 2))[:, None]).T  # a cell that lost scores has more
        together_XQ = np.maximum(0, excess_XC @ share_CQ)
        apart_XQ = np.maximum(0, excess_XC) @ share_CQ
        excess_XQ = surcharge(seeds_Q) * np.where(own_df_Q < FEW, apart_XQ, together_XQ)
        cells_variance_XQ = pooled_X1 * (1 + excess_XQ)
        variance_XQ = np.maximum(cells_variance_XQ, seeds_variance_XQ)
        scale_X1 = np.abs(scores_XCS).max((-2, -1))[..., None]
        few_Q = own_df_Q < TOO_FEW - 1e-6
        known_XQ = ~few_Q & (variance_XQ > (1e-6 * scale_X1) ** 2)  # else rounding in single precision
        error_XQ = np.where(known_XQ, np.sqrt(variance_XQ * squares_QCS.sum((1, 2))), np.nan)
        mean_XQ = np.where(seeds_Q > 0, np.einsum("qcs,...cs->...q", by_score_QCS, scores_XCS), np.nan)
    basis_XQ = np.where(seeds_variance_XQ > cells_variance_XQ, 2, np.where(excess_XQ > 0, 1, 0))
    correlated_QCS = np.where((seeds_Q > 0)[:, None, None], by_score_QCS, weights_QC[:, :, None])  # as with all scores
    correlation_QQ = correlation(correlated_QCS.reshape(len(weights_QC), -1))
    return Estimates(mean_XQ, error_XQ, basis_XQ, seeds_Q, np.sqrt(spread.pooled_X), spread.df, correlation_QQ, few_Q)


def contrast_basis(weights_QC: np.ndarray) -> np.ndarray:
    """An orthonormal basis (R, C) of the contrasts that a family spans."""
    _, singular, rows_RC = np.linalg.svd(weights_QC, full_matrices=False)
    return rows_RC[singular > 1e-9 * singular.max()]


def surcharge(seeds: np.ndarray | float) -> np.ndarray:
    """How many times an excess that `seeds` seeds show counts: (t / z)**2; inf below 2 seeds."""
    seeds = np.asarray(seeds, dtype=float)
    t = stdtrit(np.maximum(seeds - 1, 1), 0.99)
    return np.where(seeds > 1, (t / ndtri(0.99)) ** 2, np.inf)


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
    if (largest_Q == 0).any() or (np.abs(weights_QC.sum(1)) > ROUNDING * largest_Q).any():
        raise ValueError("the weights of a contrast must sum to 0, and not all be 0")
    if margin is not None and not margin > 0:
        raise ValueError(f"the margin must be above 0, found {margin}")
    return weights_QC, scores_XCS


class Fit:
    """The fit m_c + f_s by least squares to scores that are there where the mask (C, S) is True."""

    def __init__(self, mask_CS: np.ndarray) -> None:
        self.mask_CS, self.n_C = mask_CS.astype(float), np.maximum(mask_CS.sum(1), 1)
        # each cell centred; what is left is a regression on the seeds, centred alike
        eye_SS = np.eye(mask_CS.shape[1])
        self.normal_CSS = self.mask_CS[:, :, None] * (eye_SS - self.mask_CS[:, None, :] / self.n_C[:, None, None])
        self.inverse_SS = np.linalg.pinv(self.normal_CSS.sum(0), rcond=ROUNDING, hermitian=True)
        rank = np.linalg.matrix_rank(self.normal_CSS.sum(0), hermitian=True)
        self.df = float(mask_CS.sum() - mask_CS.any(1).sum() - rank)

    @cached_property
    def unmixed_CC(self) -> np.ndarray:
        """The inverse of what each cell's variance is expected to add to each cell's sum of squared residuals."""
        normal_CSS = self.normal_CSS[self.mask_CS.any(1)]
        explained_CSS = self.inverse_SS @ normal_CSS
        left_CSS = normal_CSS - explained_CSS
        K_CC = np.einsum("cij,dji->cd", explained_CSS, explained_CSS)
        np.fill_diagonal(K_CC, np.einsum("cij,cji->c", left_CSS, left_CSS))
        return np.linalg.pinv(K_CC, rcond=ROUNDING, hermitian=True)

    def residuals(self, scores_XCS: np.ndarray) -> np.ndarray:
        """What scores (X, C, S), 0 where they are missing, are away from the fit; 0 where they are missing."""
        mask_CS, n_C = self.mask_CS, self.n_C
        centred_XCS = mask_CS * (scores_XCS - (scores_XCS.sum(-1) / n_C)[..., None])
        seeds_XS = centred_XCS.sum(-2) @ self.inverse_SS
        return centred_XCS - mask_CS * (seeds_XS[..., None, :] - (seeds_XS @ mask_CS.T / n_C)[..., None])

    def coefficients(self, weights_QC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The weight of each score (Q, C, S) in the estimates of contrasts, and how many seeds these are worth (Q,).

        With all scores each has the contrast's weight / seeds. Otherwise the estimate is as well known as one from so
        many seeds: sum(weights**2) over the sum of squares of its scores' weights. 0 for a contrast that the scores do
        not determine.
        """
        mask_CS, n_C = self.mask_CS, self.n_C
        seeds_QS = (weights_QC / n_C) @ mask_CS
        by_seed_QS = seeds_QS @ self.inverse_SS
        by_cell_QC = (weights_QC + by_seed_QS @ mask_CS.T) / n_C
        by_score_QCS = mask_CS * (by_cell_QC[:, :, None] - by_seed_QS[:, None, :])
        largest_Q = np.abs(weights_QC).max(1)
        determined_Q = np.abs(by_score_QCS.sum(2) - weights_QC).max(1) < ROUNDING * largest_Q
        determined_Q &= np.abs(by_score_QCS.sum(1)).max(1) < ROUNDING * largest_Q
        by_score_QCS[~determined_Q] = 0
        squares_Q = (by_score_QCS**2).sum((1, 2))
        worth_Q = (weights_QC**2).sum(1) / np.where(determined_Q, squares_Q, np.inf)
        return by_score_QCS, np.round(worth_Q, 9)


class Residuals(NamedTuple):
    """Variances of scores after cell and seed."""

    pooled_X: np.ndarray  # NaN without degrees of freedom
    own_XC: np.ndarray  # of each cell, unbiased; may be below 0
    df: float
    squares_XC: np.ndarray  # the sum of each cell's squared residuals


def residual_variances(scores_XCS: np.ndarray, fit: Fit) -> Residuals:
    """The residual variances of the fit of cells and seeds; scores that are missing are 0.

    Pooled is the mean square of the residuals. A cell's own is unbiased whatever the variances of the others: expected
    sums of squares of each cell's residuals are linear in the variances of all cells (K), and are solved for (MINQUE:
    Rao 1970). For C cells with the same S seeds and the sum of squares q_c it is C / (C - 2) * (q_c / (S - 1) -
    pooled / C). Two cells have the same residuals, and cannot be told apart: each has the mean.
    """
    cells, squares_XC = fit.mask_CS.any(1), (fit.residuals(scores_XCS) ** 2).sum(-1)
    own_XC = np.full(squares_XC.shape, np.nan)
    own_XC[..., cells] = squares_XC[..., cells] @ fit.unmixed_CC
    pooled_X = squares_XC.sum(-1) / fit.df if fit.df > 0 else np.full(squares_XC.shape[:-1], np.nan)
    return Residuals(pooled_X, own_XC, fit.df, squares_XC)
