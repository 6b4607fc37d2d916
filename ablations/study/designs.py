"""Designs of experiments: which levels of the factors are trained together."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Literal

from expertgrid.ablations.study.levels import BASE, Level

Design = Literal["factorial", "one_at_a_time"]
Factors = Mapping[str, Sequence[Level]]  # the levels of each factor


def settings(design: Design, factors: Factors) -> list[dict[str, Level]]:
    """The level of each factor in each cell of a design.

    `factorial` combines all levels of all factors. `one_at_a_time` has the base, and a cell for each level of each
    factor, in which the other factors are as in the base.
    """
    if design == "factorial":
        return [dict(zip(factors, levels)) for levels in itertools.product(*factors.values())]
    base = dict.fromkeys(factors, BASE)
    return [base, *({**base, name: level} for name, levels in factors.items() for level in levels)]


def count_cells(design: Design, factors: Factors) -> int:
    """The length of `settings`, without making them: a few lines can ask for more than a memory holds."""
    counts = [len(levels) for levels in factors.values()]
    return math.prod(counts) if design == "factorial" else 1 + sum(counts)
