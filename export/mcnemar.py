"""McNemar's test of two networks on the same images. It is here because the export and the results both use it."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True)
class McNemar:
    """Two networks on the same images: how many only one of them has right, and two-sided p-values of equal chances."""

    only_first: int
    only_second: int
    exact_p: float  # never below its level, and so rather too large
    mid_p: float  # near its level


def mcnemar(first_B: ArrayLike, second_B: ArrayLike) -> McNemar:
    """McNemar's test of two networks that are right (True) or wrong on the same B images.

    It speaks of these two networks and of images, not of two cells: another seed is another network. Exact binomial,
    and mid-p, which counts half of the outcome itself (Fagerland, Lydersen & Laake, 2013). Raises ValueError for shapes
    that differ.
    """
    from scipy.stats import binom, binomtest  # slow to import

    a_B, b_B = np.asarray(first_B, dtype=bool), np.asarray(second_B, dtype=bool)
    if a_B.shape != b_B.shape or a_B.ndim != 1:
        raise ValueError(f"both need one value for each image, found {a_B.shape} and {b_B.shape}")
    only_first, only_second = int((a_B & ~b_B).sum()), int((b_B & ~a_B).sum())
    n = only_first + only_second
    if n == 0:
        return McNemar(0, 0, 1.0, 1.0)
    exact = float(binomtest(only_first, n).pvalue)
    return McNemar(only_first, only_second, exact, min(1.0, exact - float(binom.pmf(only_first, n, 0.5))))
