"""Single cells and the choice among them: by hand, against scipy, and on simulated studies whose truth is known."""

import numpy as np
import pytest
import scipy.stats
from scipy.special import expit, logit

from expertgrid.ablations.results.stats.selection import accuracy_interval, mean_interval, peek, winner


def test_mean_interval_is_students():
    values_S = np.random.default_rng(0).normal(90, 1, size=5)
    oracle = scipy.stats.ttest_1samp(values_S, 0).confidence_interval(0.9)
    assert mean_interval(values_S, 0.9) == pytest.approx((values_S.mean(), oracle.low, oracle.high))
    for values in ([3.0], [0.7, 0.7, np.float32(0.7)]):
        assert mean_interval(values) == (pytest.approx(np.mean(values)), None, None)


def test_an_accuracy_never_passes_100():
    interval = accuracy_interval([99.8, 99.9, 100.0])
    # mean 99.9, sd 0.1, t(0.975, 2) = 4.30265: half is 0.248416 points, 2.4866 on the scale of the log odds
    assert interval.low == pytest.approx(100 * expit(logit(0.999) - 0.00248416 / (0.999 * 0.001)), abs=1e-4)
    assert interval.high == pytest.approx(100 * expit(logit(0.999) + 0.00248416 / (0.999 * 0.001)), abs=1e-4)
    assert interval.low < 99.9 < interval.high < 100
    middling = [70.0, 70.5, 71.0]
    assert accuracy_interval(middling) == pytest.approx(mean_interval(middling), abs=0.03)
    assert accuracy_interval([100.0, 100.0]) == (100, None, None)
    with pytest.raises(ValueError, match="within 0 and 100"):
        accuracy_interval([99, 101])


def test_accuracy_intervals_cover_the_truth():
    # 360 test digits at 98%: the plain interval often passes 100
    scores_XS = 100 * np.random.default_rng(1).binomial(360, 0.98, size=(4000, 5)) / 360
    intervals = [accuracy_interval(scores_S) for scores_S in scores_XS if scores_S.std() > 0]
    assert np.mean([interval.low <= 98 <= interval.high for interval in intervals]) == pytest.approx(0.95, abs=0.015)


def test_what_is_missing_is_never_dropped():
    for call in (
        lambda: mean_interval([1, np.inf]),
        lambda: accuracy_interval([]),
        lambda: winner([[1, 2], [2, 3]], [[1, 2], [np.nan, 3]]),
        lambda: peek([[1, np.nan]]),
    ):
        with pytest.raises(ValueError, match="finite|at least one"):
            call()


def test_winner_by_hand():
    # without seed 0 the second cell wins (2.5 to 4.5), without seed 1 the first (6 to 5), without seed 2 the first
    validation, test = [[9, 2, 3], [1, 0, 9]], [[80, 70, 60], [71, 72, 73]]
    best = winner(validation, test)
    assert (best.cell, best.reported.mean, best.agreement) == (0, 70, pytest.approx(2 / 3))
    assert best.corrected.mean == pytest.approx((71 + 70 + 60) / 3)
    shared = winner([[1, 1], [1, 1]], [[10, 20], [30, 40]])
    assert (shared.cell, shared.corrected.mean, shared.agreement) == (0, 25, 1)
    alone = winner([[1], [2]], [[5], [6]])
    assert (alone.cell, alone.reported, alone.corrected) == (1, (6, None, None), None)
    with pytest.raises(ValueError, match="not of the same"):
        winner([[1, 2]], [[1, 2, 3]])


def test_the_correction_takes_the_luck_of_the_seeds_away():
    generator, reported, corrected = np.random.default_rng(18), [], []
    for _ in range(1500):  # ten equal cells: any winner is worth 80
        luck_CS = generator.normal(size=(10, 5))
        best = winner(*(80 + luck_CS + generator.normal(0, 0.3, size=(10, 5)) for _ in range(2)))
        reported.append(best.reported.mean)
        corrected.append(best.corrected.mean)
    assert np.mean(reported) > 80.5
    assert np.mean(corrected) == pytest.approx(80, abs=0.05)


def test_peek_by_hand():
    peeked = peek([[80, 91, 90], [70, 85, 88]])
    assert (peeked.last, peeked.best_epoch, peeked.best, peeked.gain) == (89, 89.5, 91, 2)
