"""McNemar's test of two networks on the same images. It is here because the export and the results both use it."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class McNemar(NamedTuple):
    """How many images only one of two networks has right, and the exact two-sided p-value of equal chances."""

    only_first: int
    only_second: int
    exact_p: float


def mcnemar(first_B: ArrayLike, second_B: ArrayLike) -> McNemar:
    """The exact binomial test of two networks that are right (True) or wrong on the same B images.

    It speaks of these two networks and of images, not of two cells: another seed is another network. Raises ValueError
    for shapes that differ.
    """
    from scipy.stats import binomtest  # slow to import

    first_B, second_B = np.asarray(first_B, dtype=bool), np.asarray(second_B, dtype=bool)
    if first_B.shape != second_B.shape or first_B.ndim != 1:
        raise ValueError(f"both need one value for each image, found {first_B.shape} and {second_B.shape}")
    only_first, only_second = int((first_B & ~second_B).sum()), int((second_B & ~first_B).sum())
    differ = only_first + only_second
    return McNemar(only_first, only_second, float(binomtest(only_first, differ).pvalue) if differ else 1.0)
