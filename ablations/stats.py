"""Statistics on plain numbers. Shapes: S seeds."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import t as student


class Interval(NamedTuple):
    """A mean and half the width of its confidence interval; None where one value alone gives no interval."""

    mean: float
    half_width: float | None


def mean_interval(values_S: Sequence[float], level: float = 0.95) -> Interval:
    """The mean of S values with Student's t interval, from the sample standard deviation (ddof=1).

    Raises ValueError where there is no value.
    """
    if len(values_S) == 0:
        raise ValueError("a mean needs at least one value")
    mean = float(np.mean(values_S))
    if len(values_S) == 1:
        return Interval(mean, None)
    error = np.std(values_S, ddof=1) / np.sqrt(len(values_S))
    return Interval(mean, float(student.ppf((1 + level) / 2, len(values_S) - 1) * error))
