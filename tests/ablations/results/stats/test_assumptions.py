"""What verdicts rest on, against statsmodels and on simulated studies. Shapes: Q contrasts, C cells, S seeds."""

from itertools import product

import numpy as np
import pandas as pd
import pytest
from statsmodels.formula.api import ols
from statsmodels.stats.anova import anova_lm

from expertgrid.ablations.results.stats.assumptions import effects_by_seed, may_be_best, seeds_that_decide
from expertgrid.ablations.results.stats.contrasts import judge
from expertgrid.ablations.results.stats.factors import against

BOTH = np.array([[-1, -1, -1, -1, 1, 1, 1, 1], [-1, -1, 1, 1, -1, -1, 1, 1]]) / 4  # two of three factors of a 2 x 2 x 2


@pytest.mark.parametrize("missing", [0, 4])
def test_effects_that_vary_by_seed_are_an_anova(missing):
    rng = np.random.default_rng(missing)
    scores_CS = rng.normal(90, 0.3, size=(8, 5)) + np.outer(BOTH[0] * 4, rng.normal(0, 0.3, size=5))
    scores_CS.flat[rng.choice(40, missing, replace=False)] = np.nan
    points = list(product((0, 1), repeat=3))
    rows = [
        {"y": scores_CS[cell, seed], "cell": cell, "seed": seed, "a": points[cell][0], "b": points[cell][1]}
        for cell in range(8)
        for seed in range(5)
    ]
    frame = pd.DataFrame(rows).dropna()
    plain = ols("y ~ C(cell) + C(seed)", frame).fit()
    varying = ols("y ~ C(cell) + C(seed) + C(a):C(seed) + C(b):C(seed)", frame).fit()
    oracle = anova_lm(plain, varying).iloc[1]
    test = effects_by_seed(BOTH, scores_CS)
    assert test[:2] == (pytest.approx(oracle["F"]), pytest.approx(oracle["Pr(>F)"]))
    assert test.share == pytest.approx(1 - varying.mse_resid / plain.mse_resid)


def test_nothing_is_left_for_the_noise():
    assert effects_by_seed(against(0, 3), np.random.default_rng(0).normal(size=(3, 4))) is None


def test_adjusted_p_is_below_5_percent_where_0_is_outside_the_interval():
    scores_CS = np.random.default_rng(1).normal(size=(8, 5)) + np.linspace(0, 3, 8)[:, None]
    judgements = judge(against(0, 8), scores_CS, margin=0.5)
    assert {judgement.p < 0.05 for judgement in judgements} == {True, False}
    assert [judgement.p < 0.05 for judgement in judgements] == [
        judgement.low > 0 or judgement.high < 0 for judgement in judgements
    ]


def test_a_seed_that_decides():
    scores_CS = np.array([[90, 91, 92, 93, 94.0], [90.2, 91.3, 92.2, 93.3, 95.4]])
    pair = np.array([[-1, 1]])
    assert judge(pair, scores_CS, margin=0.1)[0].verdict == "open"
    assert seeds_that_decide(pair, scores_CS, margin=0.1) == [[]]
    steady_CS = np.array([[90, 91, 92, 93, 94.0], [90.8, 91.9, 92.2, 93.9, 94.8]])
    assert judge(pair, steady_CS, margin=0.1)[0].verdict == "better"
    changed = [
        seed for seed in range(5) if judge(pair, np.delete(steady_CS, seed, axis=1), margin=0.1)[0].verdict != "better"
    ]
    assert seeds_that_decide(pair, steady_CS, margin=0.1) == [changed]


def test_the_best_cell_may_be_the_best():
    rng, missed, sizes = np.random.default_rng(2), 0, []
    truth_C = np.array([0.0, 0.1, 0.2, 0.3, -2])
    for _ in range(300):
        best_C = may_be_best(truth_C[:, None] + rng.normal(0, 0.3, size=(5, 5)))
        missed += not best_C[3]
        sizes.append(best_C.sum())
        assert not best_C[4]
    assert missed / 300 <= 0.05
    assert np.mean(sizes) < 4
