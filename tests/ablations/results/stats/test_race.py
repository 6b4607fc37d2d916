"""Races by hand and on simulated studies whose truth is known. Shapes: Q contrasts, C cells, S seeds, K looks."""

import numpy as np
import pytest
import scipy.stats

from expertgrid.ablations.results.stats.contrasts import estimate, judge
from expertgrid.ablations.results.stats.critical import JointT, correlation
from expertgrid.ablations.results.stats.factors import against
from expertgrid.ablations.results.stats.race import look_levels, race

BASE = against(0, 4)


def scores(means_C, seeds, spread, seed):
    return np.random.default_rng(seed).normal(0, spread, size=(len(means_C), seeds)) + np.array(means_C)[:, None]


def test_one_look_is_the_fixed_design():
    levels_K = look_levels(JointT(correlation(BASE)), 4, 6, 6, 0.05)
    assert levels_K == pytest.approx([0.05], rel=0.04)
    scores_CS = scores([0, 1, 2, 3], 6, 0.5, seed=0)
    raced = race(BASE, scores_CS, margin=0.5, last=6, first=6)
    for ours, fixed in zip(raced.judgements, judge(BASE, scores_CS, margin=0.5)):
        assert (ours.mean, ours.error, ours.basis) == (fixed.mean, fixed.error, fixed.basis)
        assert (ours.low, ours.high) == pytest.approx((fixed.low, fixed.high), abs=0.02)


def test_looks_together_err_by_alpha():
    # an independent simulation, of scores of a pair: Student's t of pooled residuals is that of the differences
    levels_K = look_levels(JointT([[1.0]]), 2, 4, 10, 0.05)
    differences_XS = np.random.default_rng(1).normal(size=(40_000, 10))
    crossed_X = np.zeros(40_000, bool)
    for n, alpha in zip(range(4, 11), levels_K):
        crossed_X |= scipy.stats.ttest_1samp(differences_XS[:, :n], 0, axis=1).pvalue < alpha
    assert crossed_X.mean() == pytest.approx(0.05, abs=0.004)
    assert levels_K == pytest.approx(levels_K[-1] * (np.arange(4, 11) / 10) ** 1.5)


def test_families_of_looks_err_by_alpha():
    # pooled errors alone, as the levels are made for them: `estimate` is more cautious
    weights_QC, cells = against(0, 6), 6
    joint = JointT(correlation(weights_QC))
    scores_XCS = np.random.default_rng(2).normal(size=(10_000, cells, 8))
    crossed_X = np.zeros(10_000, bool)
    for n, alpha in zip(range(4, 9), look_levels(joint, cells, 4, 8, 0.05)):
        estimates = estimate(weights_QC, scores_XCS[..., :n])
        t_XQ = estimates.mean_XQ / (estimates.spread_X[:, None] * (2 / n) ** 0.5)
        crossed_X |= (np.abs(t_XQ) > joint.constant(estimates.df, 1 - alpha)).any(1)
    assert crossed_X.mean() == pytest.approx(0.05, abs=0.007)


def test_a_race_goes_on_where_it_is_open():
    scores_CS = scores([0, 3, 0.4, -3], 4, 0.3, seed=3)  # the second contrast is open at 4 seeds
    start = race(BASE, np.full((4, 1), np.nan), margin=0.5, last=8)
    assert (start.go_on, list(start.wanted_C)) == (True, [4, 4, 4, 4])
    assert {judgement.reason for judgement in start.judgements} == {"fewer than 4 seeds"}
    first = race(BASE, scores_CS, margin=0.5, last=8)
    assert [judgement.verdict for judgement in first.judgements] == ["better", "open", "worse"]
    assert (first.go_on, list(first.wanted_C)) == (True, [5, 4, 5, 4])
    # one cell has its fifth seed, the other not yet: nothing changes; what was trained beyond a look does not count
    more_CS = np.pad(scores_CS, ((0, 0), (0, 2)), constant_values=np.nan)
    more_CS[1, 4:], more_CS[2, 4] = -50, 0.4
    assert race(BASE, more_CS, margin=0.5, last=8).judgements == first.judgements
    more_CS[0, 4] = 0
    second = race(BASE, more_CS, margin=0.5, last=8)
    assert second.judgements[0] == first.judgements[0]
    assert second.judgements[0].seeds == 4 and second.judgements[1].seeds == 5
    assert second.judgements[1].mean == pytest.approx((more_CS[2, :5] - more_CS[0, :5]).mean())


def test_a_race_ends():
    scores_CS = scores([0, 3, -3, 0.45], 6, 0.3, seed=3)
    ended = race(BASE, scores_CS, margin=0.5, last=6)
    assert (ended.go_on, list(ended.wanted_C)) == (False, [6, 4, 4, 6])
    assert (ended.judgements[2].verdict, ended.judgements[2].seeds) == ("open", 6)
    decided = race(BASE, scores([0, 3, -3, 5], 4, 0.1, seed=3), margin=0.5, last=6)
    assert (decided.go_on, list(decided.wanted_C)) == (False, [4, 4, 4, 4])


def test_a_diverged_cell_ends_its_contrasts_only():
    scores_CS = scores([0, 0.4, 0, -3], 4, 0.3, seed=3)
    scores_CS[1, 3:] = np.nan
    state = race(BASE, scores_CS, margin=0.5, last=8, no_verdict={1: "diverged in 1 of 4 seeds"})
    assert (state.judgements[0].verdict, state.judgements[0].reason) == ("none", "diverged in 1 of 4 seeds")
    assert state.judgements[2].verdict == "worse"
    assert list(state.wanted_C) == [5, 0, 5, 4]
    dead = race(BASE, scores_CS, margin=0.5, last=8, no_verdict={0: "diverged in 1 of 4 seeds"})
    assert (dead.go_on, list(dead.wanted_C)) == (False, [0, 0, 0, 0])


def test_what_is_no_race():
    scores_CS = scores([0, 1, 2, 3], 6, 0.3, seed=0)
    for arguments, message in (
        ({"last": 5}, "ends after 5 seeds, found 6"),
        ({"last": 8, "first": 3}, "4 seeds or more"),
        ({"last": 8, "first": 9}, "found 9 and 8"),
    ):
        with pytest.raises(ValueError, match=message):
            race(BASE, scores_CS, margin=0.5, **arguments)
    with pytest.raises(ValueError, match="margin must be above 0"):
        race(BASE, scores_CS, margin=0, last=8)
