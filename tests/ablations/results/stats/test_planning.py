"""Plans against simulated studies, statsmodels and by hand. Shapes: X simulated studies, C cells, S seeds."""

import numpy as np
import pytest
from statsmodels.stats.power import TTestPower

from expertgrid.ablations.results.stats.contrasts import estimate, judge, verdicts
from expertgrid.ablations.results.stats.factors import against
from expertgrid.ablations.results.stats.planning import PowerAnalysis, seeds_to_decide

EIGHT = np.array([[-1, -1, -1, -1, 1, 1, 1, 1], [-1, -1, 1, 1] * 2, [-1, 1] * 4]) / 4  # main effects of a 2 x 2 x 2


@pytest.mark.parametrize("seeds", [4, 7, 15])
def test_two_cells_are_statsmodels_paired_t_test(seeds):
    # 2 ** 0.5 is the spread of a difference; statsmodels' power is two-sided, and so is right for the sign as well
    power = PowerAnalysis([[-1, 1]], spread=1).power(0, 1.5, seeds)
    assert power == pytest.approx(TTestPower().power(1.5 / 2**0.5, seeds, 0.05), abs=0.03)


@pytest.mark.parametrize(("weights_QC", "seeds"), [(EIGHT, 3), (EIGHT, 5), (against(0, 10), 4), (against(0, 20), 5)])
def test_what_a_plan_sees_simulated_studies_see(weights_QC, seeds):
    plan = PowerAnalysis(weights_QC, spread=0.3)
    estimates = estimate(weights_QC, np.random.default_rng(0).normal(0, 0.3, size=(4000, weights_QC.shape[1], seeds)))
    difference_Q = [plan.detectable(contrast, seeds) for contrast in range(len(weights_QC))]
    assert (estimates.low_XQ + difference_Q > 0).mean() == pytest.approx(0.8, abs=0.04)
    verdict_XQ = verdicts(estimates.low_XQ + 0.2, estimates.high_XQ + 0.2, margin=0.6)
    power = np.mean([plan.power(contrast, 0.2, seeds, margin=0.6) for contrast in range(len(weights_QC))])
    assert (verdict_XQ != "open").mean() == pytest.approx(power, abs=0.05)


def test_seeds_for_a_difference_are_the_fewest():
    plan = PowerAnalysis(EIGHT, spread=0.6)
    for difference in (0.3, 0.5, 1.0):
        seeds = plan.seeds_for(0, difference)
        assert plan.power(0, difference, seeds) >= 0.8 > plan.power(0, difference, seeds - 1)
        assert plan.detectable(0, seeds) <= difference
    assert plan.seeds_for(0, 0.3) > plan.seeds_for(0, 0.5) > plan.seeds_for(0, 1.0)
    assert plan.seeds_for(0, 0.001) == np.inf
    fewest = plan.seeds_for(0, 0.5)
    assert (plan.seeds_for(0, 0.5, most=fewest), plan.seeds_for(0, 0.5, most=fewest - 1)) == (fewest, np.inf)
    # same within 0.5 needs fewer than a difference of 0.1
    assert plan.seeds_for(0, 0.1, margin=0.5) < plan.seeds_for(0, 0.1)


def test_one_seed_sees_nothing():
    plan = PowerAnalysis(EIGHT, spread=0.3)
    assert plan.power(0, 5, 1) == 0
    assert np.isinf(plan.detectable(0, 1))
    with pytest.raises(ValueError, match="spread must be above 0"):
        PowerAnalysis(EIGHT, spread=0)


def test_seeds_that_would_decide_an_open_effect():
    rng = np.random.default_rng(3)
    scores_CS = rng.normal(0, 0.3, size=(8, 4)) + np.array([0, 0, 0, 0, 0.1, 0.1, 0.1, 0.1])[:, None]
    scores_CS += 5 * EIGHT[1][:, None]
    family = judge(EIGHT, scores_CS, margin=0.2)
    assert [judgement.verdict for judgement in family] == ["open", "better", "open"]
    needed = seeds_to_decide(EIGHT, family, margin=0.2)
    assert needed[1] is None and all(seeds > 4 for seeds in (needed[0], needed[2]))
    first = family[0]
    spread = first.error * (4 / 0.5) ** 0.5
    assert needed[0] == PowerAnalysis(EIGHT, spread).seeds_for(0, first.mean, margin=0.2)
    assert seeds_to_decide([[-1, 1]], judge([[-1, 1]], [[1.0], [2.0]], margin=1), margin=1) == [None]
    assert seeds_to_decide(EIGHT, family, margin=0.2, most=5) == [np.inf, None, np.inf]
