"""Which contrasts a study asks: what each factor does, cells against the base, interactions.

A study's design points are settings of its factors. Several of them can be one network (with one expert there is no
gate to choose): `cells` says which network each point is, and each network is trained and counted once.

A change of a factor from one level to another is compared over matched cells only: pairs of different networks that
differ in this factor alone. A pair that two settings share counts once. So a factor's effect is the mean change over
the networks in which it can be changed: that of the gate is over networks with two or more experts.

Shapes: Q contrasts, C cells.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import NamedTuple

import numpy as np

Level = str
Levels = Mapping[str, Level]  # of one design point, by factor


class Change(NamedTuple):
    """A change of one factor from a level to another."""

    factor: str
    before: Level
    after: Level


@dataclass(frozen=True, eq=False)
class EffectContrast:
    """A main effect (one change) or an interaction (two), and its contrast.

    `pairs` are the matched cells (before, after) of a main effect, for costs to be compared over the same cells; an
    interaction has none. Its contrast is what the second change gives after the first change, less what it gives
    before: (after, after) - (after, before) - (before, after) + (before, before).
    """

    changes: tuple[Change, ...]
    weights_C: np.ndarray
    pairs: tuple[tuple[int, int], ...] = ()


def main_effects(
    factors: Mapping[str, Sequence[Level]], points: Sequence[Levels], cells: Sequence[int], count: int
) -> list[EffectContrast]:
    """What each level of each factor does, against the factor's first level.

    `points` are the design's settings, full factorial, one at a time or anything between, and `cells` the cell of each,
    0 to `count` - 1; cells that are no point (baselines, say) have no weight. Where no network matches at the first
    level, the reference is the next level that has one. A level without any matched pair has no effect, and is left
    out.
    """
    effects = []
    for factor, levels in factors.items():
        by_setting = _by_setting(points, cells, (factor,))
        for place, after in enumerate(levels):
            for before in levels[:place]:
                pairs = {
                    (setting[before,], setting[after,]): None
                    for setting in by_setting
                    if (before,) in setting and (after,) in setting and setting[before,] != setting[after,]
                }
                if pairs:
                    weights_C = np.zeros(count)
                    for first, second in pairs:
                        weights_C[[first, second]] += -1 / len(pairs), 1 / len(pairs)
                    effects.append(EffectContrast((Change(factor, before, after),), weights_C, tuple(pairs)))
                    break
    return effects


def interactions(
    factors: Mapping[str, Sequence[Level]], points: Sequence[Levels], cells: Sequence[int], count: int
) -> list[EffectContrast]:
    """What each pair of changes of two factors gives beyond the changes alone, over matched fours of networks.

    Levels are compared with the first level for which four different networks match: with one expert there is no gate,
    so that experts and gate interact from two experts on. Pairs of levels without any four are left out.
    """
    effects = []
    for first, second in combinations(factors, 2):
        by_setting = _by_setting(points, cells, (first, second))
        levels, others = factors[first], factors[second]
        for (place, after), (other_place, other_after) in product(enumerate(levels), enumerate(others)):
            for before, other_before in product(levels[:place], others[:other_place]):
                corners = list(product((after, before), (other_after, other_before)))
                fours = {
                    tuple(setting[corner] for corner in corners): None
                    for setting in by_setting
                    if len({setting.get(corner) for corner in corners} - {None}) == 4
                }
                if fours:
                    weights_C = np.zeros(count)
                    for four in fours:
                        weights_C[list(four)] += np.array([1, -1, -1, 1]) / len(fours)
                    changes = (Change(first, before, after), Change(second, other_before, other_after))
                    effects.append(EffectContrast(changes, weights_C))
                    break
    return effects


def against(base: int, count: int) -> np.ndarray:
    """Each of `count` cells less the base, in their order, the base left out: Dunnett's family (count - 1, count)."""
    return np.delete(np.eye(count) - np.eye(count)[base], base, axis=0)


def difference(first: int, second: int, count: int) -> np.ndarray:
    """The first cell less the second: weights (count,)."""
    return np.eye(count)[first] - np.eye(count)[second]


def _by_setting(
    points: Sequence[Levels], cells: Sequence[int], varied: tuple[str, ...]
) -> list[dict[tuple[Level, ...], int]]:
    """For each setting of the other factors the cells by the levels of those that are varied."""
    by_rest: dict[tuple, dict[tuple[Level, ...], int]] = {}
    for levels, cell in zip(points, cells, strict=True):
        rest = tuple((name, level) for name, level in sorted(levels.items()) if name not in varied)
        by_rest.setdefault(rest, {})[tuple(levels[name] for name in varied)] = cell
    return list(by_rest.values())
