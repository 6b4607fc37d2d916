"""Contrasts of designs, by hand."""

from itertools import product

import numpy as np
import pytest

from expertgrid.ablations.results.stats.factors import Change, against, difference, interactions, main_effects

CARD = {"experts": (1, 2, 4), "gate": ("linear", "mlp"), "cutout": (0, 8)}


def factorial(factors):
    """Points, and the cell of each: with one expert there is no gate, and both settings are one network."""
    points = [dict(zip(factors, levels)) for levels in product(*factors.values())]
    networks = [(p["experts"], p["gate"] if p["experts"] > 1 else "-", p["cutout"]) for p in points]
    distinct = list(dict.fromkeys(networks))
    return points, [distinct.index(network) for network in networks], distinct


def test_main_effects_are_over_matched_networks():
    points, cells, networks = factorial(CARD)
    assert len(points) == 12 and len(networks) == 10
    effects = {effect.changes[0]: effect for effect in main_effects(CARD, points, cells, 11)}  # one cell is a baseline
    changes = [("experts", 1, 2), ("experts", 1, 4), ("gate", "linear", "mlp"), ("cutout", 0, 8)]
    assert list(effects) == [Change(*change) for change in changes]

    def mean(condition):
        mask = np.array([condition(*network) for network in networks] + [False])
        return mask / mask.sum()

    expected = [
        mean(lambda e, g, c: e == 2) - mean(lambda e, g, c: e == 1),  # each network with one expert once
        mean(lambda e, g, c: e == 4) - mean(lambda e, g, c: e == 1),
        mean(lambda e, g, c: g == "mlp") - mean(lambda e, g, c: g == "linear"),  # none with one expert
        mean(lambda e, g, c: c == 8) - mean(lambda e, g, c: c == 0),
    ]
    for effect, weights_C in zip(effects.values(), expected):
        assert effect.weights_C == pytest.approx(weights_C)
    pairs = effects[Change("cutout", 0, 8)].pairs
    assert len(pairs) == 5  # the pair with one expert counts once, not once for each gate
    assert all(networks[after] == (*networks[before][:2], 8) for before, after in pairs)


def test_interactions_are_over_matched_fours():
    points, cells, networks = factorial(CARD)
    effects = {effect.changes: effect for effect in interactions(CARD, points, cells, 10)}
    # experts and gate from two experts on; experts and cutout; gate and cutout
    gates = effects.pop((Change("experts", 2, 4), Change("gate", "linear", "mlp")))
    expected = {(4, "mlp"): 0.5, (4, "linear"): -0.5, (2, "mlp"): -0.5, (2, "linear"): 0.5}
    assert gates.weights_C == pytest.approx([expected.get(network[:2], 0) for network in networks])
    assert set(effects) == {
        (Change("experts", 1, 2), Change("cutout", 0, 8)),
        (Change("experts", 1, 4), Change("cutout", 0, 8)),
        (Change("gate", "linear", "mlp"), Change("cutout", 0, 8)),
    }
    # experts 1 -> 2 by cutout: (2, 8) - (2, 0) over two gates, less (1, 8) - (1, 0)
    with_cutout = effects[Change("experts", 1, 2), Change("cutout", 0, 8)].weights_C
    signs = {(2, 8): 0.5, (2, 0): -0.5, (1, 8): -1, (1, 0): 1}
    assert with_cutout == pytest.approx([signs.get((e, c), 0) for e, _, c in networks])
    assert all(effect.weights_C.sum() == pytest.approx(0) and effect.pairs == () for effect in effects.values())


def test_one_at_a_time():
    factors = {"depth": ("base", 2, 3), "width": ("base", 0.5)}
    levels = [("base", "base"), (2, "base"), (3, "base"), ("base", 0.5)]
    points = [dict(zip(factors, point)) for point in levels]
    effects = main_effects(factors, points, [0, 1, 2, 3], 4)
    assert np.array([effect.weights_C for effect in effects]) == pytest.approx(against(0, 4))
    assert [effect.pairs for effect in effects] == [((0, 1),), ((0, 2),), ((0, 3),)]
    assert interactions(factors, points, [0, 1, 2, 3], 4) == []


def test_levels_that_match_nothing():
    # gate is no choice anywhere, and experts 4 was only trained with cutout, which experts 1 was not
    points = [
        {"experts": 1, "cutout": 0, "gate": "linear"},
        {"experts": 1, "cutout": 0, "gate": "mlp"},
        {"experts": 2, "cutout": 0, "gate": "linear"},
        {"cutout": 8, "experts": 2, "gate": "linear"},  # in any order
        {"experts": 4, "cutout": 8, "gate": "linear"},
    ]
    effects = main_effects(CARD, points, [0, 0, 1, 2, 3], 4)
    assert [effect.changes for effect in effects] == [
        (Change("experts", 1, 2),),
        (Change("experts", 2, 4),),  # the first level that has a match
        (Change("cutout", 0, 8),),
    ]
    assert effects[0].weights_C.tolist() == [-1, 1, 0, 0]
    assert effects[1].weights_C.tolist() == [0, 0, -1, 1]


def test_cells_against_the_base_and_two_cells():
    assert against(1, 3).tolist() == [[1, -1, 0], [0, -1, 1]]
    assert difference(2, 0, 3).tolist() == [-1, 0, 1]
