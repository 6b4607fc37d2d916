"""Verdicts in cases that the rules were not made for: how often a family misses the truth.

`-m nightly -s` prints the rates at 3, 5, 7 and 10 seeds. What is above 5% (6% at 3 seeds) is in "The limits" of
ablations/results/README.md; bounds allow for three standard errors.

Shapes: X studies, C cells, S seeds.
"""

from itertools import product

import numpy as np
import pytest
from test_simulations import SPREAD, decided, effects, misses, most

from expertgrid.ablations.results.stats.contrasts import estimate, judge
from expertgrid.ablations.results.stats.factors import against, main_effects

STUDIES = 3000


def factorial(*sizes):
    factors = {str(place): range(size) for place, size in enumerate(sizes)}
    points = [dict(zip(factors, levels)) for levels in product(*factors.values())]
    return np.array([effect.weights_C for effect in main_effects(factors, points, range(len(points)), len(points))])


DESIGNS = {
    "two cells": against(0, 2),
    "6": factorial(6), "6 x 2": factorial(6, 2), "2 x 2 x 2 x 2": factorial(2, 2, 2, 2), "20 cells": effects(20),
    "3 cells, one at a time": against(0, 3), "12 cells, one at a time": against(0, 12),
}  # fmt: skip


def normal(rng, shape):
    return rng.normal(size=shape)


def with_spreads(spread_of):
    return lambda rng, shape: rng.normal(size=shape) * spread_of(np.arange(shape[1]), shape[1])[:, None]


def exponential(rng, shape):
    return 1 - rng.exponential(size=shape)


def heavy(rng, shape):
    return rng.standard_t(3, size=shape)


def noisy_seeds(rng, shape):
    return rng.normal(size=shape) * np.exp(rng.normal(0, 0.7, size=(shape[0], 1, shape[2])))


def answers_to_the_seed(size):
    """Each cell answers to what a seed has in its own measure, from -1 to 1 times `size` spreads."""

    def scores(rng, shape):
        return rng.normal(size=shape) + np.linspace(-1, 1, shape[1])[:, None] * rng.normal(
            0, size, (shape[0], 1, shape[2])
        )

    return scores


def correlated(rng, shape, rho=0.2):
    scores = rng.normal(size=shape)
    for seed in range(1, shape[2]):
        scores[..., seed] = rho * scores[..., seed - 1] + (1 - rho**2) ** 0.5 * scores[..., seed]
    return scores


def skewed_base(rng, shape):
    scores = rng.normal(0, 0.3, size=shape)
    scores[:, 0] = 1 - rng.exponential(size=(shape[0], shape[2]))
    return scores


def worst_lost(rng, shape):
    """The five lowest scores of each study are lost, at the same places in all studies."""
    studies, cells, seeds = shape
    places = rng.permutation(cells * seeds)[min(5, cells - 1) :]
    scores = np.full((studies, cells * seeds), np.nan)
    scores[:, places] = rng.permuted(np.sort(rng.normal(size=(studies, cells * seeds)))[:, -len(places) :], axis=1)
    return scores.reshape(shape)


def noisy_base_lost(count):
    def scores(rng, shape):
        scores = with_spreads(lambda cell, _: np.where(cell == 0, 3, 1))(rng, shape)
        scores[:, 0, :count] = np.nan
        return scores

    return scores


CASES = {
    "equal": normal,
    "the base 5 times as noisy": with_spreads(lambda cell, _: np.where(cell == 0, 5, 1)),
    "the last cell 5 times as noisy": with_spreads(lambda cell, cells: np.where(cell == cells - 1, 5, 1)),
    "every other cell 10 times as noisy": with_spreads(lambda cell, _: np.where(cell % 2, 10, 1)),
    "spreads from 1 to 10": with_spreads(lambda cell, cells: np.geomspace(1, 10, cells)),
    "a quiet base, the others 10 times as noisy": with_spreads(lambda cell, _: np.where(cell, 10, 1)),
    "exponential noise": exponential,
    "noise of Student's t, 3 degrees of freedom": heavy,
    "some seeds noisier": noisy_seeds,
    "cells answer to the seed, up to half the noise": answers_to_the_seed(0.5),
    "the five worst scores lost": worst_lost,
    "a base 3 times as noisy lost 1": noisy_base_lost(1),
}
LIMITS = {  # percent at 3, 5, 7, 10 seeds, at most, in the worst of the designs
    "the base 10 times as noisy": (with_spreads(lambda cell, _: np.where(cell == 0, 10, 1)), (8, 6, 5, 5)),
    "cells answer to the seed, up to the noise": (answers_to_the_seed(1), (7, 7, 6, 5)),
    "cells answer to the seed, up to 3 times the noise": (answers_to_the_seed(3), (10, 9, 6, 5)),
    "a base 3 times as noisy, and skewed": (skewed_base, (15, 15, 13, 11)),
    "seeds that resemble the one before by 0.2": (correlated, (9, 13, 14, 15)),
    "a base 3 times as noisy lost 2": (noisy_base_lost(2), (100, 8, 6, 5)),
}


def missed(noise, weights_QC, seeds, studies):
    """The larger share of missing families (main effects, cells against the first) in percent."""
    rng, cells = np.random.default_rng(seeds), weights_QC.shape[1]
    parts = [SPREAD * noise(rng, (studies // 5, cells, seeds)) for _ in range(5)]
    return max(100 * np.mean([misses(estimate(of, part)) for part in parts]) for of in (weights_QC, against(0, cells)))


@pytest.mark.nightly
@pytest.mark.parametrize("case", [*CASES, *LIMITS])
def test_families_err_in_five_studies_of_a_hundred_at_most(case):
    noise, bounds = LIMITS.get(case) or (CASES[case], (6, 5, 5, 5))
    for seeds, bound in zip((3, 5, 7, 10), bounds):
        shares = {name: missed(noise, of, seeds, STUDIES) for name, of in DESIGNS.items()}
        print(f"{case}, {seeds} seeds: " + ", ".join(f"{name} {share:.1f}" for name, share in shares.items()))
        assert max(shares.values()) <= 100 * most(bound, STUDIES)


def test_a_noisy_cell_that_lost_half_of_its_scores_counts_as_it_should():
    """Its share of a contrast's variance is that of the scores that it still has."""
    weights_QC, rng = factorial(3, 2), np.random.default_rng(0)
    scores_XCS = rng.normal(0, SPREAD, size=(2000, 6, 10))
    scores_XCS[:, 0] *= 5
    scores_XCS[:, 0, :5] = np.nan
    assert misses(estimate(weights_QC, scores_XCS)) <= most(5.3, 2000)


def test_one_lost_or_diverged_training_of_a_hundred_leaves_verdicts():
    """Four of five main effects and more, of a study whose five effects are all decided."""
    weights_QC, rng, kept = effects(20), np.random.default_rng(0), []
    truth_C = np.linalg.pinv(weights_QC) @ np.full(len(weights_QC), 0.8)
    for _ in range(20):
        scores_CS = truth_C[:, None] + rng.normal(0, SPREAD, size=(20, 5))
        scores_CS[rng.integers(20), rng.integers(5)] = np.nan
        kept.append(sum(judgement.verdict == "better" for judgement in judge(weights_QC, scores_CS, 0.5)))
    assert np.mean(kept) >= 4
    assert decided(estimate(weights_QC, rng.normal(0, SPREAD, (2000, 20, 5))), difference=0.4).min() >= 0.9
