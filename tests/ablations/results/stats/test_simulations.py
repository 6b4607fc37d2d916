"""The simulations of the note with fewer studies, seeded; the bounds allow for three standard errors of so few."""

import numpy as np
import pytest
import simulations
from simulations import KINDS, LIKENESS, families

from expertgrid.ablations.results.stats.contrasts import estimate


def most(percent, studies):
    """A share that studies whose true share is this stay below."""
    share = percent / 100
    return share + 3 * (share * (1 - share) / studies) ** 0.5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cells", [10, 20])
@pytest.mark.parametrize(("seeds", "percent"), [(2, 5), (3, 6), (4, 5), (5, 5), (7, 5), (10, 5)])
def test_families_err_in_five_studies_of_a_hundred_at_most(kind, cells, seeds, percent):
    rng = np.random.default_rng(seeds)
    for weights_QC in families(cells).values():
        found = estimate(weights_QC, simulations.normal_scores(rng, (3000, cells, seeds), kind))
        assert simulations.misses(found) <= most(percent, 3000)


def test_intervals_of_equal_cells_are_not_much_too_wide():
    found = estimate(families(20)["main effects"], simulations.normal_scores(np.random.default_rng(0), (3000, 20, 5)))
    assert 0.02 <= simulations.misses(found) <= most(5, 3000)


@pytest.mark.parametrize("likeness", LIKENESS)
@pytest.mark.parametrize("cells", [10, 20])
def test_verdicts_speak_of_images_that_no_seed_held_out(likeness, cells):
    rng, studies = np.random.default_rng(1), 150
    chances_CP, shift = simulations.population(cells, likeness), LIKENESS[likeness][2]
    scores_XCS = simulations.image_scores(rng, chances_CP, shift, studies, seeds=5, rotate=True)
    for weights_QC in families(cells).values():
        truth_Q = weights_QC @ (100 * chances_CP.mean(1, dtype=float))
        found = estimate(weights_QC, scores_XCS)
        assert simulations.misses(found, truth_Q) <= most(5, studies)
        assert simulations.false_same(found, truth_Q) <= most(5, studies)


def test_a_fixed_split_speaks_of_its_images():
    chances_CP = simulations.population(20, "very unlike")
    weights_QC = families(20)["main effects"]
    scores_XCS = simulations.image_scores(np.random.default_rng(2), chances_CP, 0.1, 60, seeds=5, rotate=False)
    truth_Q = weights_QC @ (100 * chances_CP.mean(1, dtype=float))
    assert simulations.misses(estimate(weights_QC, scores_XCS), truth_Q) > 0.5


def test_new_images_without_end_are_images():
    chances_CP, rng = simulations.population(10, "unlike"), np.random.default_rng(3)
    drawn = simulations.image_scores(rng, chances_CP, 0.1, 400, seeds=1, rotate=True)[..., 0]
    normal = simulations.new_image_scores(rng, chances_CP, 0.1, 20_000, seeds=1)[..., 0]
    assert normal.std(0) == pytest.approx(drawn.std(0), rel=0.15)
    difference = np.subtract
    assert difference(normal[:, 0], normal[:, 9]).std() == pytest.approx(
        difference(drawn[:, 0], drawn[:, 9]).std(), rel=0.12
    )


def test_main_effects_of_20_cells_are_decided_at_5_seeds():
    scores_XCS = simulations.normal_scores(np.random.default_rng(4), (2000, 20, 5))
    found = estimate(families(20)["main effects"], scores_XCS)
    assert simulations.decided(found, difference=0.4).min() >= 0.90
    assert simulations.decided(found).min() >= 0.80  # same within 0.5


@pytest.mark.parametrize("family", families(20))
def test_races_err_in_five_studies_of_a_hundred_at_most(family):
    weights_QC, rng = families(20)[family], np.random.default_rng(5)
    for truth_C in (np.zeros(20), simulations.at_margin(weights_QC)):
        assert np.abs(weights_QC @ truth_C) == pytest.approx(abs((weights_QC @ truth_C)[0]))
        *_, wrong_X = simulations.raced(rng, weights_QC, truth_C, 0.3, last=8, studies=80)
        assert wrong_X.mean() <= most(5, 80)


def test_a_race_takes_seven_tenths_of_the_trainings():
    weights_QC, truth_C = families(20)["cells against base"], simulations.race_truth(15)
    rng, last = np.random.default_rng(6), 16
    decided_XQ, cost_X, _ = simulations.raced(rng, weights_QC, truth_C, 0.3, last, studies=60)
    cheaper = int(cost_X.mean() / 0.7)  # seeds of a fixed design that takes so many more trainings
    scores_XCS = truth_C[:, None] + rng.normal(0, 0.3, size=(2000, 20, cheaper))
    found = estimate(weights_QC, scores_XCS)
    fixed_XQ = simulations.verdicts(found.low_XQ, found.high_XQ, simulations.MARGIN) != "open"
    assert decided_XQ.mean() >= fixed_XQ.mean()
