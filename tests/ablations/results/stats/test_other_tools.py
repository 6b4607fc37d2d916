"""Other tools on the same simulated studies: how often they claim a difference that is not there, and find a true one.

20 cells at 5 seeds, a spread of 0.3 points. Each tool compares 19 cells with the base, as its users do. False: the
share of studies without any difference in which it claims one. Found: the share of cells that are 0.4 points better for
which it claims a difference. `-m nightly -s` prints the rates of the table in ablations/results/README.md.

Shapes: C cells, S seeds, Q comparisons.
"""

import numpy as np
import pytest
import scipy.stats
from test_simulations import SPREAD, effects, networks

from expertgrid.ablations.results.stats.contrasts import estimate
from expertgrid.ablations.results.stats.factors import against

CELLS, SEEDS, DIFFERENCE = 20, 5, 0.4
AGAINST_QC = against(0, CELLS)
BETTER_C = np.array([residual for _, _, residual, _ in networks(CELLS)])  # not the base
RESIDUAL_Q = np.isclose(effects(CELLS) @ BETTER_C, 1)  # its main effect; the others are 0


def ours(scores_XCS, weights_QC=AGAINST_QC):
    estimates = estimate(weights_QC, scores_XCS)
    return (estimates.low_XQ > 0) | (estimates.high_XQ < 0)


def paired_t_with_holm(scores_XCS, weights_QC=AGAINST_QC):
    difference_XQS = weights_QC @ scores_XCS
    t_XQ = np.abs(difference_XQS.mean(-1)) / scipy.stats.sem(difference_XQS, axis=-1)
    p_XQ = 2 * scipy.stats.t.sf(t_XQ, SEEDS - 1)
    order_XQ = p_XQ.argsort(1)
    left = len(weights_QC) - np.arange(len(weights_QC))
    adjusted_XQ = np.maximum.accumulate(np.take_along_axis(p_XQ, order_XQ, 1) * left, axis=1)
    return np.take_along_axis(adjusted_XQ, order_XQ.argsort(1), 1) < 0.05


def bootstrapped(scores_XCS):
    """Percentile intervals of means over seeds: low and high."""
    interval = scipy.stats.bootstrap(
        (scores_XCS,), np.mean, axis=-1, n_resamples=999, method="percentile", batch=100, rng=np.random.default_rng(0)
    ).confidence_interval
    return interval.low, interval.high


def bootstrap_of_paired_differences(scores_XCS):
    low_XQ, high_XQ = bootstrapped(scores_XCS[:, 1:] - scores_XCS[:, :1])
    return (low_XQ > 0) | (high_XQ < 0)


def rliable(scores_XCS):
    """Bootstrap intervals of each cell's mean over runs that do not overlap (rliable 1.2, of one task)."""
    low_XC, high_XC = bootstrapped(scores_XCS)
    return (low_XC[:, 1:] > high_XC[:, :1]) | (high_XC[:, 1:] < low_XC[:, :1])


def friedman_with_nemenyi(scores_XCS):
    rank_XC = scipy.stats.rankdata(scores_XCS, axis=1).mean(-1)
    critical = scipy.stats.studentized_range.ppf(0.95, CELLS, np.inf) * (CELLS * (CELLS + 1) / 12 / SEEDS) ** 0.5
    friedman_X = 12 * SEEDS / CELLS / (CELLS + 1) * ((rank_XC - (CELLS + 1) / 2) ** 2).sum(1)
    differ_XQ = np.abs(rank_XC[:, 1:] - rank_XC[:, :1]) > critical
    return differ_XQ & (friedman_X > scipy.stats.chi2.ppf(0.95, CELLS - 1))[:, None]


def baycomp(scores_XCS):
    """A posterior above 95% on one side, by the correlated t test of one run of folds (baycomp 1.0)."""
    difference_XQS = scores_XCS[:, 1:] - scores_XCS[:, :1]
    scale_XQ = difference_XQS.std(-1, ddof=1) * (1 / SEEDS + 1 / (SEEDS - 1)) ** 0.5  # correlation 1 / SEEDS
    return scipy.stats.t.cdf(np.abs(difference_XQS.mean(-1)) / scale_XQ, SEEDS - 1) > 0.95


def rates(tool, studies, better=BETTER_C[1:], **arguments):
    """False claims and true ones in percent."""
    rng, claims = np.random.default_rng(0), []
    for difference in (0.0, DIFFERENCE):
        scores_XCS = rng.normal(90, SPREAD, size=(studies, CELLS, SEEDS)) + difference * BETTER_C[:, None]
        claims.append(tool(scores_XCS, **arguments))
    return 100 * claims[0].any(1).mean(), 100 * claims[1][:, better].mean()


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("tool", "studies", "false", "found"),
    [
        (ours, 2000, 2.3, 12.7),
        (paired_t_with_holm, 2000, 4.9, 3.7),
        (bootstrap_of_paired_differences, 300, 87.7, 64.9),
        (friedman_with_nemenyi, 2000, 0.0, 0.8),
        (rliable, 300, 40.0, 42.6),
        (baycomp, 2000, 36.7, 28.3),
    ],
)
def test_cells_against_the_base(tool, studies, false, found):
    measured = rates(tool, studies)
    print(f"{tool.__name__}: {measured[0]:.1f}% of studies claim a false difference, {measured[1]:.1f}% are found")
    for share, known in zip(measured, (false, found)):
        assert share == pytest.approx(known, abs=3 * (2 * max(known, 1) * (100 - known) / studies) ** 0.5)
    if tool is ours:
        assert measured[0] <= 5


@pytest.mark.nightly
@pytest.mark.parametrize(("tool", "false", "found"), [(ours, 1.8, 99.7), (paired_t_with_holm, 4.8, 89.5)])
def test_main_effects(tool, false, found):
    measured = rates(tool, 2000, RESIDUAL_Q, weights_QC=effects(CELLS))
    print(f"{tool.__name__}, main effects: {measured[0]:.1f}% false, {measured[1]:.1f}% found")
    for share, known in zip(measured, (false, found)):
        assert share == pytest.approx(known, abs=3 * (2 * max(known, 1) * max(100 - known, 1) / 2000) ** 0.5)
    if tool is ours:
        assert measured[0] <= 5
