"""The linear model by hand, against statsmodels, and on simulated studies whose truth is known.

Shapes: X simulated studies, Q contrasts, C cells, S seeds.
"""

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from statsmodels.formula.api import ols

from expertgrid.ablations.results.stats.contrasts import (
    Fit,
    Judgement,
    estimate,
    judge,
    residual_variances,
    surcharge,
    verdicts,
)  # fmt: skip
from expertgrid.ablations.results.stats.factors import against, difference

BOTH = np.array([[-0.5, -0.5, 0.5, 0.5], [-0.5, 0.5, -0.5, 0.5]])  # the main effects of a 2 x 2
SCORES = np.array([[90, 91, 92], [91, 92, 94], [90, 92, 92], [93, 93, 96.0]])


def fitted(scores_CS):
    """Statsmodels' fit of cells and seeds, where a NaN is a trial that is not there."""
    cell, seed = np.indices(scores_CS.shape)
    rows = pd.DataFrame({"y": scores_CS.ravel(), "cell": cell.ravel(), "seed": seed.ravel()}).dropna()
    return ols("y ~ C(cell) + C(seed)", rows).fit(), rows


# --- One study, by hand ---


def test_main_effects_of_a_2x2_by_hand():
    # cells 91, 92 1/3, 91 1/3, 94; seeds 91, 92, 93.5; squares of residuals 8 / 3, 6 degrees of freedom: 0.4444
    # the first effect is 1 at every seed, the second 2, 1, 3: variances over seeds of 0 and 1. Their mean counts for
    # the first, and both count as variances of 2 x 2 degrees of freedom beside 6
    first, second = judge(BOTH, SCORES, margin=0.5)
    estimates = estimate(BOTH, SCORES)
    wider = (scipy.stats.t.ppf(0.995, 4) / scipy.stats.t.ppf(0.995, 6)) ** 2
    assert (first.mean, second.mean, first.seeds, estimates.df) == (pytest.approx(1), pytest.approx(2), 3, 6)
    assert estimates.spread_X**2 == pytest.approx(4 / 9)
    assert (first.error**2, second.error**2) == (pytest.approx(wider / 2 / 3), pytest.approx(wider / 3))
    assert (first.basis, second.basis, first.verdict, second.verdict) == ("over seeds", "over seeds", "open", "open")
    assert 2.4469 < first.constant < 2.9687  # Student's t of 6 degrees of freedom for one contrast, Bonferroni's for 2
    half = second.constant * second.error
    assert (second.low, second.high) == pytest.approx((2 - half, 2 + half))


def test_a_family_of_all_differences_has_the_pooled_variance():
    half = np.array([-0.5, -0.5, 0.5, 0.5])
    scores_CS = np.random.default_rng(0).normal(size=(4, 7)) + 8 * np.outer(half, np.arange(7) % 3)
    judgement = judge([half, [-1, 1, 0, 0], [0, 0, -1, 1]], scores_CS, margin=0.5)[0]
    assert judgement.basis == "over seeds"
    assert judgement.error**2 == pytest.approx((half @ scores_CS).var(ddof=1) / 7)
    alone = judge([half], scores_CS, margin=0.5)[0]
    assert alone.error > judgement.error  # of one dimension, which 6 degrees of freedom know


def test_two_cells_are_the_paired_t_test():
    scores_CS = np.random.default_rng(0).normal(90, 1, size=(2, 6))
    (judgement,) = judge([[-1, 1]], scores_CS, margin=0.5)
    oracle = scipy.stats.ttest_rel(scores_CS[1], scores_CS[0]).confidence_interval(0.95)
    assert (judgement.low, judgement.high) == pytest.approx((oracle.low, oracle.high), rel=1e-6)


def test_a_noisy_cell_by_hand():
    # additive scores but for cell 3, which is off by a, -a, 0, ...: own variances (0, 0, 0, v) are told apart exactly
    away_S = np.array([1.0, -1, 0, 0, 2, -2, 0])
    scores_CS = np.add.outer(np.arange(6.0), np.arange(7.0))
    scores_CS[3] += away_S
    variance = (away_S**2).sum() / 6
    spread = residual_variances(scores_CS, Fit(np.ones((6, 7), bool)))
    assert spread.pooled_X == pytest.approx(variance / 6)
    assert spread.own_XC == pytest.approx(np.array([0, 0, 0, variance, 0, 0]), abs=1e-12)
    # a pair with it: over pooled, its cells spread by (6 + 0) / 2 = 3 times; the excess of 2 counts 1.8248 times
    estimates = estimate(np.array([difference(3, 0, 6), difference(1, 0, 6)]), scores_CS)
    assert surcharge(7) == pytest.approx((scipy.stats.t.ppf(0.99, 6) / scipy.stats.norm.ppf(0.99)) ** 2)
    assert estimates.error_XQ[0] == pytest.approx((variance / 6 * (1 + 2 * 1.8248) * 2 / 7) ** 0.5, rel=1e-4)
    assert estimates.error_XQ[1] == pytest.approx((variance / 6 * 2 / 7) ** 0.5)
    assert list(estimates.basis_XQ) == [1, 0]


def test_few_seeds_count_a_noisy_cell_apart():
    # 3 seeds of a pair: 4 degrees of freedom; the quiet cell (own 0) does not make up for the noisy one (own 6 pooled)
    scores_CS = np.zeros((6, 3))
    scores_CS[3] = 1, -1, 0
    estimates = estimate(np.array([difference(3, 0, 6)]), scores_CS)
    assert estimates.error_XQ[0] ** 2 == pytest.approx(1 / 6 * (1 + surcharge(3) * (5 + 0) / 2) * 2 / 3)


def test_surcharge():
    assert surcharge(np.array([3, 5, 10])) == pytest.approx([8.96, 2.59, 1.47], abs=0.01)
    assert surcharge(10_000) == pytest.approx(1, abs=1e-3)


def test_verdicts_of_intervals():
    low = np.array([0.1, -0.9, -0.4, -0.4, 0.1, -0.4, np.nan, 0.0])
    high = np.array([0.9, -0.1, 0.4, 0.6, 0.4, -0.1, np.nan, 0.9])
    expected = ["better", "worse", "same", "open", "same", "same", "open", "open"]
    assert list(verdicts(low, high, 0.5)) == expected
    small = judge(BOTH, SCORES + [[0], [5], [0], [5]], margin=20)[1]
    assert (small.verdict, small.reason) == ("same", "there is a difference, within the margin")


# --- What has no interval, or no verdict ---


@pytest.mark.parametrize(
    ("scores_CS", "mean", "reason"),
    [
        ([[90.0], [91.0]], 1, "1 seed: no verdict"),
        ([[90.0, np.nan], [91.0, 92.0]], 1, "1 seed: no verdict"),
        ([[90.0, 91.0], [91.0, 93.0]], 1.5, "2 seeds: no verdict"),
        ([[90.0, np.nan], [np.nan, 92.0]], None, "cannot be compared"),
        ([[0.9, 0.7, 0.5], [0.8, 0.6, 0.4]], -0.1, "same amount at every seed"),  # but for rounding
        ([[90.0] * 3] * 2, 0, "same amount at every seed"),
    ],
)
def test_no_interval_has_a_reason(scores_CS, mean, reason):
    (judgement,) = judge([[-1, 1]], scores_CS, margin=0.5)
    assert judgement.verdict == "open"
    assert {judgement.error, judgement.low, judgement.high, judgement.basis} == {None}
    assert judgement.mean == (None if mean is None else pytest.approx(mean))
    assert reason in judgement.reason


def test_equal_differences_still_have_the_spread_of_the_others():
    scores_CS = np.array([[90, 91, 92], [90, 91, 92], [90, 92, 91.0]])
    judgement = judge([[-1, 1, 0], [-1, 0, 1]], scores_CS, margin=0.5)[0]
    assert judgement.low < 0 < judgement.high


def test_a_diverged_cell_has_no_verdict_and_the_others_keep_theirs():
    weights_QC = against(0, 5)
    scores_CS = np.random.default_rng(0).normal(size=(5, 4))
    scores_CS[2, [1, 3]] = -80
    family = judge(weights_QC, scores_CS, margin=0.5, no_verdict={2: "diverged in 2 of 4 seeds"})
    assert family[1] == Judgement("none", 0, reason="diverged in 2 of 4 seeds")
    # the others as without that cell, but with the constant of four contrasts
    alone = judge(np.delete(against(0, 4), [], axis=0), np.delete(scores_CS, 2, axis=0), margin=0.5)
    for ours, expected in zip([family[place] for place in (0, 2, 3)], alone):
        assert (ours.mean, ours.error, ours.basis) == (expected.mean, pytest.approx(expected.error), expected.basis)
        assert ours.constant > expected.constant
    base = judge(weights_QC, scores_CS, margin=0.5, no_verdict={0: "diverged in 1 of 4 seeds", 2: "diverged in 2 of 4"})
    assert {judgement.verdict for judgement in base} == {"none"}
    assert base[1].reason == "diverged in 1 of 4 seeds; diverged in 2 of 4"


def test_what_does_not_fit():
    for weights_QC, scores_CS, message in (
        ([[1, 0]], [[1, 2], [2, 3]], "sum to 0"),
        ([[0, 0]], [[1, 2], [2, 3]], "not all be 0"),
        ([[1, -1, 0]], [[1, 2], [2, 3]], "do not fit"),
        ([[1, -1]], [[1, np.inf], [2, 3]], "finite"),
        ([[1, -1]], [[], []], "at least one seed"),
    ):
        with pytest.raises(ValueError, match=message):
            judge(weights_QC, scores_CS, margin=0.5)
    with pytest.raises(ValueError, match="margin must be above 0"):
        judge([[1, -1]], [[1, 2], [2, 3]], margin=0)
    with pytest.raises(ValueError, match="same cells and seeds"):
        estimate([[1, -1]], [[[1, 2], [2, 3]], [[1, 2], [2, np.nan]]])
    assert judge(np.zeros((0, 2)), [[1, 2], [2, 3]], margin=0.5) == []


# --- Against statsmodels ---


def test_estimates_and_pooled_variance_are_statsmodels():
    scores_CS = np.random.default_rng(1).normal(90, 1, size=(6, 5)) + np.arange(5)
    fit, _ = fitted(scores_CS)
    estimates = estimate(against(0, 6), scores_CS)
    assert estimates.mean_XQ == pytest.approx(fit.params.filter(like="cell").to_numpy())
    assert (estimates.spread_X**2, estimates.df) == (pytest.approx(fit.mse_resid), fit.df_resid)
    assert estimates.error_XQ.min() >= fit.bse.filter(like="cell").min() * (1 - 1e-9)


def test_missing_trials():
    rng = np.random.default_rng(2)
    scores_CS = rng.normal(90, 1, size=(6, 7)) + 3 * np.arange(7)
    scores_CS[2, 5:] = scores_CS[4, 0] = scores_CS[5, 3] = np.nan
    fit, rows = fitted(scores_CS)
    spread = residual_variances(np.nan_to_num(scores_CS), Fit(~np.isnan(scores_CS)))
    assert (spread.pooled_X, spread.df) == (pytest.approx(fit.mse_resid), fit.df_resid)
    squares_C = (fit.resid**2).groupby(rows.cell).sum().to_numpy()
    assert squares_C.sum() / fit.df_resid == pytest.approx(spread.pooled_X)
    estimates = estimate(np.array([difference(2, 0, 6), difference(4, 5, 6), difference(1, 0, 6)]), scores_CS)
    by_cell = fit.params.filter(like="cell").to_numpy()  # against cell 0
    assert estimates.mean_XQ == pytest.approx([by_cell[1], by_cell[3] - by_cell[4], by_cell[0]])
    tests = [fit.t_test(contrast) for contrast in ("C(cell)[T.2]", "C(cell)[T.4] - C(cell)[T.5]", "C(cell)[T.1]")]
    errors = [test.sd.item() for test in tests]  # by the pooled residuals alone
    assert estimates.seeds_Q == pytest.approx([2 * fit.mse_resid / error**2 for error in errors])
    assert 5 < estimates.seeds_Q[0] < 7 == estimates.seeds_Q[2]
    covariance = fit.cov_params().loc[["C(cell)[T.2]", "C(cell)[T.1]"], ["C(cell)[T.2]", "C(cell)[T.1]"]].to_numpy()
    assert estimates.correlation_QQ[0, 2] == pytest.approx(
        covariance[0, 1] / (covariance[0, 0] * covariance[1, 1]) ** 0.5
    )


def test_trials_that_no_other_cell_shares_decide_nothing():
    scores_CS = np.array([[90, 91, 92, np.nan, np.nan], [91, 92, 94, np.nan, np.nan], [np.nan] * 3 + [90, 91]])
    first, second = judge(against(0, 3), scores_CS, margin=0.5)
    assert (first.seeds, second.seeds, second.verdict) == (3, 0, "open")
    assert (first.mean, second.mean) == (pytest.approx(4 / 3), None)


def test_own_variances_are_unbiased_where_trials_are_missing():
    rng = np.random.default_rng(3)
    mask_CS = np.array([[1, 0, 1, 1, 1], [0, 1, 1, 1, 0], [1, 1, 1, 1, 1], [1, 1, 1, 0, 1], [1, 1, 0, 1, 0]], bool)
    sd_C = np.array([1, 2, 3, 1, 0.5])
    scores_XCS = rng.normal(size=(100_000, 5, 5)) * sd_C[:, None] + 10 * rng.normal(size=5) + rng.normal(size=(5, 1))
    spread = residual_variances(np.where(mask_CS, scores_XCS, 0), Fit(mask_CS))
    assert spread.own_XC.mean(0) == pytest.approx(sd_C**2, abs=0.1)


def test_many_studies_are_one_at_a_time():
    scores_XCS = np.random.default_rng(4).normal(size=(3, 4, 5))
    scores_XCS[:, 2, 4] = np.nan
    together = estimate(BOTH, scores_XCS)
    for place, scores_CS in enumerate(scores_XCS):
        alone = estimate(BOTH, scores_CS)
        assert together.low_XQ[place] == pytest.approx(alone.low_XQ)
        assert together.spread_X[place] == pytest.approx(alone.spread_X)
