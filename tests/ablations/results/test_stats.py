"""Statistics by hand, against scipy, statsmodels and scikit-learn, and on simulated studies whose truth is known.

Shapes: R simulated studies, C cells or contrasts, S seeds, K looks at a race.
"""

import math

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from scipy.special import stdtr
from sklearn.metrics import confusion_matrix as sklearns_confusion_matrix
from statsmodels.formula.api import ols
from statsmodels.stats import weightstats
from statsmodels.stats.anova import AnovaRM
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestIndPower, TTestPower
from statsmodels.stats.proportion import proportion_confint

from ablations.results.stats import (
    VERDICTS,
    Contrast,
    bootstrap_interval,
    calibration_error,
    class_accuracies,
    confusion_matrix,
    contrast,
    decide,
    equivalence_p,
    factorial_effects,
    further_seeds,
    holm,
    paired_contrast,
    peek,
    probability_best,
    race,
    race_levels,
    race_verdicts,
    wilson,
    winner,
)

UNDECIDED, BETTER, WORSE, EQUIVALENT = range(4)


def by_seed(scores):
    return dict(enumerate(scores))


def covers(one, truth):
    return one.low <= truth <= one.high


# --- Contrasts ---


def test_paired_contrast_by_hand():
    # differences 1, 2, 3: mean 2, s = 1, error 1 / sqrt(3), t = 3.4641, and t(0.975, 2) = 4.30265
    one = contrast(by_seed([91, 93, 95]), by_seed([90, 91, 92]))
    assert (one.mean, one.sd, one.df, one.n, one.paired) == (2, 1, 2, 3, True)
    assert (one.low, one.high) == pytest.approx((2 - 4.30265 / 3**0.5, 2 + 4.30265 / 3**0.5), rel=1e-5)
    assert one.p == pytest.approx(0.0741799, rel=1e-5)


@pytest.mark.parametrize("level", [0.9, 0.95])
def test_contrasts_are_scipys(level):
    first, second = np.random.default_rng(0).normal(90, 1, size=(2, 6))
    paired = contrast(by_seed(first), by_seed(second), level)
    oracle = scipy.stats.ttest_rel(first, second)
    assert (paired.low, paired.high, paired.p) == pytest.approx((*oracle.confidence_interval(level), oracle.pvalue))
    unpaired = contrast(by_seed(first), dict(enumerate(second[:4], start=10)), level)
    oracle = scipy.stats.ttest_ind(first, second[:4], equal_var=False)
    assert (unpaired.low, unpaired.high, unpaired.p) == pytest.approx((*oracle.confidence_interval(level), oracle[1]))
    assert (unpaired.paired, unpaired.df, unpaired.n) == (False, pytest.approx(oracle.df), 4)


def test_seeds_that_one_cell_lacks_are_named():
    one = contrast({0: 1.0, 1: 3.0, 2: 9.0, 5: 1.0}, {1: 1.0, 0: 0.0, 7: 4.0})
    assert (one.mean, one.n, one.paired, one.left_out) == (1.5, 2, True, (2, 5, 7))


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        ({0: 0.9}, {0: 0.8}, "one seed"),
        ({0: 0.9}, {1: 0.8, 2: 0.8}, "one seed"),
        ({0: 0.9, 1: 0.7, 2: 0.5}, {0: 0.8, 1: 0.6, 2: 0.4}, "the same for all 3 seeds"),  # but for rounding
        ({0: 0.9, 1: 0.9}, {2: 0.8, 3: 0.8}, "all equal"),
    ],
)
def test_no_interval_has_a_reason(first, second, reason):
    one = contrast(first, second)
    assert one.mean == pytest.approx(0.1)
    assert (one.sd, one.low, one.high, one.p) == (None,) * 4
    assert reason in one.reason
    assert decide([one], margin=1)[0].verdict == "undecided"
    assert further_seeds(one, 0.05, 1) is None


def test_what_is_missing_is_never_dropped():
    nan = math.nan
    for call in (
        lambda: contrast({0: 1.0, 1: nan}, {0: 1.0, 1: 2.0}),
        lambda: contrast({}, {0: 1.0}),
        lambda: paired_contrast([1.0, math.inf]),
        lambda: bootstrap_interval([1, 2, 3, nan]),
        lambda: holm([0.1, nan]),
        lambda: race([1, 2, nan], last=5),
        lambda: factorial_effects(np.array([[1, 2], [nan, 3]]), {"gate": ["linear", "mlp"]}),
        lambda: probability_best([[1, 2], [nan, 3]]),
        lambda: winner([[1, 2], [2, 3]], [[1, 2], [nan, 3]]),
        lambda: peek([[1, nan]]),
        lambda: calibration_error([[nan, 1]], [1]),
    ):
        with pytest.raises(ValueError, match="finite|at least one"):
            call()


def test_paired_and_welch_intervals_cover_the_truth():
    generator, paired, unpaired = np.random.default_rng(1), [], []
    for _ in range(3000):
        seed_S, noise_CS = generator.normal(0, 2, size=4), generator.normal(0, [[0.5], [1]], size=(2, 4))
        first, second = 3 + seed_S + noise_CS[0], seed_S + noise_CS[1]
        paired.append(covers(contrast(by_seed(first), by_seed(second)), 3))
        other = dict(enumerate(generator.normal(0, 2, size=6), start=4))
        unpaired.append(covers(contrast(by_seed(3 + noise_CS[0]), other), 3))
    assert 0.94 <= np.mean(paired) <= 0.96
    assert 0.94 <= np.mean(unpaired) <= 0.96


def test_bootstrap_interval_of_four_values_is_that_of_all_resamples():
    values = np.array([1.0, 2.0, 4.0, 7.0])
    drawn_XS = values[np.stack(np.unravel_index(np.arange(4**4), (4,) * 4), axis=1)]
    with np.errstate(divide="ignore", invalid="ignore"):
        t_X = np.sort((drawn_XS.mean(1) - 3.5) / (drawn_XS.std(1, ddof=1) / 2))
    error = values.std(ddof=1) / 2
    low, high = (3.5 - t_X[math.ceil(256 * share) - 1] * error for share in (0.975, 0.025))
    assert bootstrap_interval(values, resamples=100_000) == pytest.approx((low, high), rel=1e-6)


def test_rounding_in_single_precision_is_no_spread():
    scores_CS = 100 * (np.array([[112, 11, 71], [116, 15, 75]]) / 144).astype(np.float32).astype(float)
    differences_S = scores_CS[1] - scores_CS[0]
    assert differences_S.std() > 0
    contrast = paired_contrast(differences_S, scale=scores_CS.max())
    assert (contrast.low, contrast.p) == (None, None)
    assert "the same for all 3 seeds" in contrast.reason


def test_bootstrap_interval_is_none_where_it_knows_nothing():
    assert bootstrap_interval([1, 2, 3]) is None
    assert bootstrap_interval([0.3] * 9) is None


@pytest.mark.parametrize(("seeds", "skewed"), [(5, False), (10, False), (20, True)])
def test_bootstrap_intervals_cover_the_truth(seeds, skewed):
    generator = np.random.default_rng(2)
    draw = generator.exponential if skewed else generator.normal
    intervals = [bootstrap_interval(draw(size=seeds), resamples=999, seed=i) for i in range(1000)]
    assert 0.93 <= np.mean([low <= skewed <= high for low, high in intervals]) <= 0.97


# --- Verdicts ---


def test_holm_by_hand_and_against_statsmodels():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    p_C = np.random.default_rng(3).uniform(size=12) ** 4
    assert holm(p_C) == pytest.approx(multipletests(p_C, method="holm")[1])


def made(mean, error, df=4):
    """A contrast with what `decide` needs."""
    p = 2 * scipy.stats.t.sf(abs(mean) / error, df)
    return Contrast(mean, df + 1, error * (df + 1) ** 0.5, error, df, p=p)


def test_equivalence_is_statsmodels():
    differences = np.random.default_rng(4).normal(0.2, 0.5, size=7)
    p, *_ = weightstats.DescrStatsW(differences).ttost_mean(-1, 1)
    assert equivalence_p(paired_contrast(differences), 1) == pytest.approx(p)


def test_without_a_margin_verdicts_are_holms():
    contrasts = [made(mean, 1) for mean in (9, -6, 3.5, -3, 0.1)]
    decisions = decide(contrasts)
    assert [one.p_difference for one in decisions] == pytest.approx(holm([one.p for one in contrasts]))
    assert [one.verdict for one in decisions] == ["better", "worse", *["undecided"] * 3]
    assert {one.p_equivalence for one in decisions} == {None}


def test_verdicts_with_a_margin_by_hand():
    # one-sided p of t = 8 with 4 degrees of freedom is 0.000662; all three contrasts keep a hypothesis: times 3
    far, near, unknown = made(18, 1), made(0, 1.25), paired_contrast([1.0])
    decisions = decide([far, near, unknown], margin=10)
    assert [one.verdict for one in decisions] == ["better", "equivalent", "undecided"]
    assert decisions[1].p_equivalence == pytest.approx(3 * 0.000662, rel=1e-3)
    assert (decisions[0].p_equivalence, decisions[1].p_difference) == (1, 1)
    # a difference within the margin: both hypotheses fall, and the other contrast has alpha for itself
    small, other = made(2, 0.1), made(4, 1)
    decisions = decide([small, other], margin=10)
    assert [one.verdict for one in decisions] == ["equivalent"] * 2
    assert decisions[0].reason == "there is a difference, within the margin"
    assert decisions[1].p_equivalence == pytest.approx(equivalence_p(other, 10))
    assert decide([], margin=1) == []
    with pytest.raises(ValueError, match="margin must be above 0"):
        decide([small], margin=0)


def studies(truth_C, seeds, count, seed):
    """Differences (R, C, S) of C cells to one base, so that they depend on each other, with a spread of 1 on a seed."""
    scores_RCS = np.random.default_rng(seed).normal(0, 0.5**0.5, size=(count, len(truth_C) + 1, seeds))
    return np.array(truth_C, dtype=float)[:, None] + scores_RCS[:, 1:] - scores_RCS[:, :1]


def is_false(verdicts_RC, truth_C, margin):
    truth_C, margin = np.array(truth_C), math.inf if margin is None else margin
    return (
        ((verdicts_RC == BETTER) & (truth_C <= 0))
        | ((verdicts_RC == WORSE) & (truth_C >= 0))
        | ((verdicts_RC == EQUIVALENT) & (np.abs(truth_C) >= margin))
    )


def is_right(verdicts_RC, truth_C, margin):
    return (verdicts_RC != UNDECIDED) & ~is_false(verdicts_RC, truth_C, margin)


def decided(differences_RCS, margin):
    verdicts = [[one.verdict for one in decide([paired_contrast(d) for d in d_CS], margin)] for d_CS in differences_RCS]
    return np.vectorize(VERDICTS.index)(verdicts)


FAMILIES = [
    ([0] * 6, None),  # nothing to find
    ([0, 0, 0, 4, 5, -6], None),  # what Holm gives to the rest
    ([1e-3, -1e-3] * 3, None),  # signs
    ([0] * 6, 2),
    ([2, -2] * 3, 2),  # as near to equivalent as a difference may be
    ([2, 2, 2, 0, 0, 0], 2),
    ([2, 0], 2),  # where dropping contrasts once they have a verdict errs most
    ([1.9, 1.9, 0, 2, -2, 0], 2),
]


@pytest.mark.parametrize(("truth_C", "margin"), FAMILIES)
def test_families_of_verdicts_are_wrong_in_five_percent_at_most(truth_C, margin):
    verdicts_RC = decided(studies(truth_C, 5, 1500, seed=5), margin)
    assert is_false(verdicts_RC, truth_C, margin).any(1).mean() <= 0.055


def test_dropping_contrasts_with_a_verdict_would_be_wrong_too_often():
    truth_C, margin = [0.63, 0], 0.63  # four standard errors
    differences_RCS = studies(truth_C, 40, 3000, seed=6)
    assert is_false(decided(differences_RCS, margin), truth_C, margin).any(1).mean() <= 0.055
    error_RC = differences_RCS.std(-1, ddof=1) / 40**0.5
    t_RC = differences_RCS.mean(-1) / error_RC
    difference_RC, equivalence_RC = 2 * stdtr(39, -np.abs(t_RC)), stdtr(39, np.abs(t_RC) - margin / error_RC)
    found_RC = np.array([holm(p_C) <= 0.05 for p_C in np.minimum(difference_RC, equivalence_RC)])
    verdicts_RC = np.where(difference_RC < equivalence_RC, np.where(t_RC > 0, BETTER, WORSE), EQUIVALENT) * found_RC
    assert 0.055 < is_false(verdicts_RC, truth_C, margin).any(1).mean() < 0.08


def test_further_seeds_against_statsmodels_and_simulation():
    one = paired_contrast([0.1, 1.0, 1.9, -0.4])
    needed = TTestPower().solve_power(one.mean / one.sd, alpha=0.01, power=0.8)
    assert further_seeds(one, 0.01) == math.ceil(needed) - 4
    equal = paired_contrast([-0.9, 1.1, 0.3, -0.5])
    assert further_seeds(equal, 0.05) == math.inf
    seeds = further_seeds(equal, 0.05, margin=0.8)
    samples_RS = np.random.default_rng(7).normal(equal.mean, equal.sd, size=(8000, 4 + seeds))
    for count, low, high in ((4 + seeds, 0.79, 1), (3 + seeds, 0, 0.81)):
        drawn_RS = samples_RS[:, :count]
        error_R = drawn_RS.std(1, ddof=1) / count**0.5
        power = np.mean(stdtr(count - 1, (np.abs(drawn_RS.mean(1)) - 0.8) / error_R) <= 0.05)
        assert low < power < high
    assert further_seeds(equal, 0.05, margin=0.001) == math.inf
    assert further_seeds(made(50, 1), 0.05) == 1  # as it is decided already


def test_further_seeds_of_unpaired_cells_against_statsmodels():
    one = contrast({0: 1.0, 1: 2.0, 2: 1.5, 3: 2.5}, {4: 0.7, 5: 1.7, 6: 1.2, 7: 2.2})
    assert not one.paired
    size = one.mean / (one.sd / math.sqrt(2))  # in standard deviations of either, which are equal
    needed = TTestIndPower().solve_power(size, alpha=0.01, power=0.8)
    assert further_seeds(one, 0.01) == math.ceil(needed) - 4


# --- Racing ---


def test_race_levels_of_one_look_are_alpha():
    assert race_levels(5, 5, 0.02) == pytest.approx([0.02])


@pytest.mark.parametrize(("first", "last", "alpha"), [(2, 6, 0.025), (3, 12, 0.01), (3, 30, 0.025)])
def test_race_levels_spend_alpha(first, last, alpha):
    values_RS = np.random.default_rng(8).normal(size=(60_000, last))
    n_K = np.arange(first, last + 1)
    mean_RK, square_RK = (np.cumsum(values_RS**power, axis=1)[:, first - 1 :] / n_K for power in (1, 2))
    t_RK = mean_RK / np.sqrt((square_RK - mean_RK**2) / (n_K - 1))
    crossed = (t_RK >= scipy.stats.t.isf(race_levels(first, last, alpha), n_K - 1)).any(1).mean()
    assert crossed == pytest.approx(alpha, abs=0.02 * alpha + 3 * (alpha / 60_000) ** 0.5)


def test_a_race_by_hand():
    differences = [2.0, 2.2, 1.9, 2.1, 2.05]
    start = race(differences[:2], last=10)
    assert (start.verdict, start.seeds, start.go_on, start.low) == ("undecided", 2, True, None)
    third = race(differences[:3], last=10)
    one = paired_contrast(differences[:3])
    level = 0.025 * 0.3**1.5  # of the first look, one-sided
    assert (third.verdict, third.go_on) == ("better", False) if one.p / 2 <= level else ("undecided", True)
    half_width = scipy.stats.t.isf(level, 2) * one.error
    assert (third.low, third.high) == pytest.approx((one.mean - half_width, one.mean + half_width))
    # the first look that decides is the verdict, whatever seeds come after it
    assert race([*differences[:3], -50.0, -60.0], last=10) == third
    assert race([-d for d in differences], last=10).verdict == "worse"
    assert race([0.01, -0.02, 0.01, 0.0], last=10, margin=1).verdict == "equivalent"


def test_a_race_that_ends_or_knows_no_spread():
    assert not race([1.0, -1.0, 2.0, -2.0], last=4).go_on
    same = race([0.3] * 4, last=6, margin=1)
    assert (same.verdict, same.go_on, same.low) == ("undecided", True, None)
    with pytest.raises(ValueError, match="ends after 3"):
        race([1, 2, 3, 4], last=3)
    with pytest.raises(ValueError, match="margin"):
        race([1, 2, 3, 4], last=5, margin=-1)
    with pytest.raises(ValueError, match="looks go from 2"):
        race([1, 2, 3, 4], last=5, first=1)


def raced(differences_RCS, last, margin):
    """The verdicts of races (R, C) and the seeds that they took."""
    looks_RCK = race_verdicts(differences_RCS[..., :last], last, margin, 0.05 / differences_RCS.shape[1])
    place_RC = np.where(looks_RCK.any(-1), (looks_RCK > 0).argmax(-1), looks_RCK.shape[-1] - 1)
    return np.take_along_axis(looks_RCK, place_RC[..., None], -1)[..., 0], place_RC + 3


def test_races_alone_are_races_together():
    differences_RCS = studies([0, 3], 12, 20, seed=9) + 1000
    verdicts_RC, seeds_RC = raced(differences_RCS - 1000, 12, 1.5)
    for r, c in np.ndindex(verdicts_RC.shape):
        one = race(differences_RCS[r, c] - 1000, last=12, margin=1.5, contrasts=2)
        assert (one.verdict, one.seeds) == (VERDICTS[verdicts_RC[r, c]], seeds_RC[r, c])


@pytest.mark.parametrize(("truth_C", "margin"), FAMILIES)
def test_families_of_races_are_wrong_in_five_percent_at_most(truth_C, margin):
    verdicts_RC, _ = raced(studies(truth_C, 20, 3000, seed=10), 20, margin)
    assert is_false(verdicts_RC, truth_C, margin).any(1).mean() <= 0.055


def test_repeated_intervals_of_a_race_cover_the_truth():
    differences_RCS = studies([0.5], 12, 1500, seed=11)
    covered = [covers(race(d_CS[0], last=12, margin=2), 0.5) for d_CS in differences_RCS]
    assert np.mean(covered) >= 0.95


def test_races_spend_half_of_the_seeds_of_a_fixed_design_of_equal_power():
    truth_C, margin, last = [0, 0, 2, -2, 2.5, -3, 3, 4], 1.0, 40
    differences_RCS = studies(truth_C, last, 3000, seed=12)
    verdicts_RC, seeds_RC = raced(differences_RCS, last, margin)
    power = is_right(verdicts_RC, truth_C, margin).mean()
    spent = (seeds_RC.sum(1) + seeds_RC.max(1)).mean()  # the base runs as long as the last race
    fixed = math.floor(2 * spent / (len(truth_C) + 1))  # seeds of all nine cells
    assert power > 0.95
    fixed_RC = decided(differences_RCS[:400, :, :fixed], margin)
    assert is_right(fixed_RC, truth_C, margin).mean() <= power


# --- Factorial designs ---


def test_effects_of_a_2x2_by_hand():
    # seed 0: residual adds 4 with one expert and 2 with two; seed 1: 2 and 4
    scores = np.array([[[10, 20], [14, 22]], [[20, 24], [22, 28]]], dtype=float)
    experts, residual, both = factorial_effects(scores, {"experts": ["1", "2"], "residual": ["false", "true"]})
    assert [one.contrast.mean for one in (experts, residual, both)] == [7, 3, 0]  # of 9 and 5, 3 and 3, -2 and 2
    assert experts.contrast.sd == pytest.approx(8**0.5)
    assert "the same for all 2 seeds" in residual.contrast.reason
    assert experts.changes == (("experts", "1", "2"),)
    assert both.changes == (("experts", "1", "2"), ("residual", "false", "true"))


@pytest.fixture
def factorial():
    """Scores (2, 3, 2, 5) of a 2 x 3 x 2 factorial over 5 seeds, and the same as a table of one row a trial."""
    factors = {"a": ["0", "1"], "b": ["0", "1", "2"], "c": ["0", "1"]}
    scores_LS = np.random.default_rng(13).normal(90, 1, size=(2, 3, 2, 5))
    places = [dict(zip("abcs", map(str, place))) for place in np.ndindex(scores_LS.shape)]
    return factors, scores_LS, pd.DataFrame(places).assign(y=scores_LS.ravel())


def test_effects_are_those_of_statsmodels(factorial):
    factors, scores_LS, table = factorial
    effects = {one.changes: one.contrast for one in factorial_effects(scores_LS, factors)}
    assert len(effects) == (1 + 2 + 1) + (2 + 1 + 2)
    main = ols("y ~ C(a) + C(b) + C(c)", table).fit().params
    pairs = ols("y ~ (C(a) + C(b) + C(c))**2", table).fit().params
    for changes, one in effects.items():
        name = ":".join(f"C({factor})[T.{to}]" for factor, _, to in changes)
        assert one.mean == pytest.approx((main if len(changes) == 1 else pairs)[name]), name
    within = AnovaRM(table, "y", "s", within=["a", "b", "c"]).fit().anova_table
    for name in "ac":  # with two levels, F is the square of t
        one = effects[((name, "0", "1"),)]
        assert within.loc[name, ["F Value", "Pr > F"]].tolist() == pytest.approx([(one.mean / one.error) ** 2, one.p])
    one = effects[(("a", "0", "1"), ("c", "0", "1"))]
    assert within.loc["a:c", "Pr > F"] == pytest.approx(one.p)


def test_effects_where_cells_are_one_network():
    generator = np.random.default_rng(14)
    one_S, (linear_S, mlp_S) = generator.normal(90, 1, size=4), generator.normal(91, 1, size=(2, 4))
    scores = np.array([[one_S, one_S], [linear_S, mlp_S]])
    _, gate, both = factorial_effects(scores, {"experts": ["1", "2"], "gate": ["linear", "mlp"]})
    assert gate.contrast.mean == pytest.approx((mlp_S - linear_S).mean() / 2)
    assert both.contrast.mean == pytest.approx((mlp_S - linear_S).mean())
    assert gate.contrast.p == pytest.approx(both.contrast.p)


def test_effects_of_scores_that_do_not_fit():
    with pytest.raises(ValueError, match="do not fit the levels"):
        factorial_effects(np.zeros((3, 2)), {"gate": ["linear", "mlp"]})


def test_intervals_of_effects_cover_the_truth():
    generator, factors = np.random.default_rng(15), {"a": ["0", "1"], "b": ["0", "1", "2"]}
    truth_LS = np.array([[0, 1, 2], [1, 2, 5]])[..., None]
    truths, covered = [5 / 3, 1, 3, 0, 2], []  # a; b 1, b 2; a x b 1, a x b 2
    for _ in range(1500):
        scores_LS = truth_LS + generator.normal(size=4) + generator.normal(size=(2, 3, 4)) * [[[0.2], [1], [2]]]
        covered.append(
            [covers(one.contrast, truth) for one, truth in zip(factorial_effects(scores_LS, factors), truths)]
        )
    assert (np.abs(np.mean(covered, axis=0) - 0.95) <= 0.02).all()
    assert 0.94 <= np.mean(covered) <= 0.96


# --- The best cell ---


@pytest.mark.parametrize("seed", range(14, 18))
def test_probability_of_the_best_of_two_is_the_one_sided_p_value(seed):
    scores_CS = np.random.default_rng(seed).normal(90, 1, size=(2, 3))
    p = scipy.stats.ttest_rel(*scores_CS, alternative="greater").pvalue
    assert probability_best(scores_CS) == pytest.approx([1 - p, p], abs=0.01)


def test_equal_cells_share_the_first_place():
    scores_S = [0.1, 0.2, 0.4]
    assert probability_best([scores_S, scores_S, np.subtract(scores_S, 5)]) == pytest.approx([0.5, 0.5, 0], abs=0.01)
    assert probability_best([[1, 1], [2, 2], [2, 2]]).tolist() == [0, 0.5, 0.5]
    with pytest.raises(ValueError, match="two seeds"):
        probability_best([[1], [2]])


def test_probabilities_to_be_best_are_frequencies():
    generator, given, came = np.random.default_rng(17), [], []
    for i in range(600):
        truth_C = generator.normal(0, 3, size=4)
        scores_CS = truth_C[:, None] + generator.normal(size=4) + generator.normal(size=(4, 4))
        given.append(probability_best(scores_CS, draws=1000, seed=i))
        came.append(np.arange(4) == truth_C.argmax())
    given, came = np.ravel(given), np.ravel(came)
    for low, high in ((0, 0.1), (0.1, 0.4), (0.4, 0.6), (0.6, 0.9), (0.9, 1.01)):
        chosen = (given >= low) & (given < high)
        assert came[chosen].mean() == pytest.approx(given[chosen].mean(), abs=0.08)


def test_winner_by_hand():
    # without seed 0 the second cell wins (2.5 to 4.5), without seed 1 the first (6 to 5), without seed 2 the first
    validation, test = [[9, 2, 3], [1, 0, 9]], [[80, 70, 60], [71, 72, 73]]
    best = winner(validation, test)
    assert (best.cell, best.reported.mean, best.agreement) == (0, 70, pytest.approx(2 / 3))
    assert best.corrected.mean == pytest.approx((71 + 70 + 60) / 3)
    assert best.optimism == pytest.approx(3)
    shared = winner([[1, 1], [1, 1]], [[10, 20], [30, 40]])
    assert (shared.cell, shared.corrected.mean, shared.agreement) == (0, 25, 1)
    alone = winner([[1], [2]], [[5], [6]])
    assert (alone.cell, alone.reported, alone.corrected, alone.optimism) == (1, (6, None), None, None)
    with pytest.raises(ValueError, match="not of the same"):
        winner([[1, 2]], [[1, 2, 3]])


def test_the_correction_takes_the_luck_of_the_seeds_away():
    generator, reported, corrected = np.random.default_rng(18), [], []
    for _ in range(1500):  # ten equal cells: any winner is worth 90
        luck_CS = generator.normal(size=(10, 5))
        best = winner(*(90 + luck_CS + generator.normal(0, 0.3, size=(10, 5)) for _ in range(2)))
        reported.append(best.reported.mean)
        corrected.append(best.corrected.mean)
    assert np.mean(reported) > 90.5
    assert np.mean(corrected) == pytest.approx(90, abs=0.05)


def test_peek_by_hand():
    found = peek([[80, 91, 90], [70, 85, 88]])
    assert (found.last, found.best_epoch, found.best, found.gain) == (89, 89.5, 91, 2)


# --- One network on its images ---


def test_calibration_error_by_hand():
    confidence, right = np.array([0.55, 0.65, 0.75, 0.95]), np.array([1, 0, 1, 1])
    probabilities = np.column_stack([confidence, 1 - confidence])
    labels = 1 - right
    # (0.5, 0.75] has 1.95 of confidence and 2 right; (0.75, 1] 0.95 and 1: the bound is in the lower bin
    assert calibration_error(probabilities, labels, bins=4) == pytest.approx((0.05 + 0.05) / 4)
    # the lower two have 1.2 and 1 right, the upper two 1.7 and 2
    assert calibration_error(probabilities, labels, bins=2, equal="mass") == pytest.approx((0.2 + 0.3) / 4)
    with pytest.raises(ValueError, match="sum to 1"):
        calibration_error([[3.0, -1.0]], [0])
    with pytest.raises(ValueError, match="labels"):
        calibration_error([[0.5, 0.5]], [0, 1])


def test_confusion_and_class_accuracies():
    labels, predicted = np.random.default_rng(19).integers(4, size=(2, 50))
    found = confusion_matrix(labels, predicted, 5)  # the last class has no images
    assert found.tolist() == sklearns_confusion_matrix(labels, predicted, labels=range(5)).tolist()
    shares = class_accuracies(found)
    assert [one.images for one in shares] == [*np.bincount(labels), 0]
    assert shares[0].right == ((labels == 0) & (predicted == 0)).sum()
    assert (shares[4].share, shares[4].low, shares[4].high) == (None, 0, 1)
    with pytest.raises(ValueError, match="classes go from 0 to 2"):
        confusion_matrix(labels, predicted, 3)


@pytest.mark.parametrize(("right", "images"), [(0, 10), (3, 10), (10, 10), (991, 1000)])
def test_wilson_is_statsmodels(right, images):
    one = wilson(right, images)
    assert (one.low, one.high) == pytest.approx(proportion_confint(right, images, method="wilson"), abs=1e-12)
    assert one.share == right / images


def test_wilson_of_no_share():
    with pytest.raises(ValueError, match="no share"):
        wilson(3, 2)
