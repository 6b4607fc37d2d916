"""Single cells, and what choosing among them is worth: intervals, the winner corrected for selection, peeking.

These are secondary: what differs is judged by `contrasts`.

Shapes: C cells, S seeds, E epochs, X any.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from expertgrid.model.system.text import Interval


def mean_interval(values_S: Sequence[float], level: float = 0.95) -> Interval:
    """The mean of S values with Student's t interval, from the sample standard deviation (ddof=1).

    Values that are all equal have no interval: that a few seeds agree does not say that all would. Raises ValueError
    where there is no value, and for values that are not finite.
    """
    finite_S = _finite(values_S, "values", 1)
    mean, n = float(finite_S.mean()), len(finite_S)
    sd = float(finite_S.std(ddof=1)) if n > 1 else 0.0
    if sd <= 1e-6 * np.abs(finite_S).max():  # rounding of what once was single precision
        return Interval(mean)
    half = float(stdtrit(n - 1, (1 + level) / 2)) * sd / math.sqrt(n)
    return Interval(mean, mean - half, mean + half)


def accuracy_interval(percent_S: Sequence[float]) -> Interval:
    """The mean of S accuracies in percent, with an interval that stays between 0 and 100.

    Student's t interval is taken on the scale of the log odds, to which the delta method carries the error of the mean:
    error / (p (1 - p)). Far from 0 and 100 it is the plain one. Raises ValueError as `mean_interval` does, and for
    values that are not within 0 and 100.
    """
    mean, _, high = mean_interval(percent_S)
    if min(percent_S) < 0 or max(percent_S) > 100:
        raise ValueError(f"accuracies are within 0 and 100 percent, found {min(percent_S)} to {max(percent_S)}")
    if high is None:
        return Interval(mean)
    share = mean / 100
    log_odds, half = math.log(share / (1 - share)), (high - mean) / 100 / (share * (1 - share))
    return Interval(mean, *(100 * (1 + math.tanh((log_odds + sign * half) / 2)) / 2 for sign in (-1, 1)))


def _finite(values: object, what: str, dimensions: int) -> np.ndarray:
    """The values as an array of floats. Raises ValueError for another number of dimensions, and for what is missing."""
    array = np.asarray(values, dtype=float)
    if array.ndim != dimensions or array.size == 0:
        raise ValueError(f"{what} need {dimensions} dimensions and at least one value each, found {array.shape}")
    if not np.isfinite(array).all():
        places = ", ".join(map(str, np.argwhere(~np.isfinite(array)).tolist()[:5]))
        raise ValueError(f"{what} must be finite, found {(~np.isfinite(array)).sum()} that are not, at {places}")
    return array


def _highest(values_XC: np.ndarray) -> np.ndarray:
    """Where the values are the highest of their row, but for rounding."""
    return values_XC >= values_XC.max(-1, keepdims=True) - 1e-12 * np.abs(values_XC).max()


@dataclass(frozen=True)
class Winner:
    """The cell that is best on validation, and what its test score is worth."""

    cell: int
    reported: Interval  # its test accuracy over all seeds
    corrected: Interval | None  # the test accuracy of winners on seeds that did not choose them; None for one seed
    agreement: float | None  # the share of seeds without which the same cell wins


def winner(validation_CS: np.ndarray, test_CS: np.ndarray, interval: Callable = accuracy_interval) -> Winner:
    """The cell with the highest mean on validation (the first of equals), and its test accuracy, corrected for choice.

    Both are in percent where no `interval` is given. To choose on validation does not bias the test accuracy by way of
    the images: the splits share none. It does by way of the seeds: a cell that was lucky with its seeds is lucky on
    both splits, and the best of C cells is likely to have been. So each seed is left out in turn, the winner is chosen
    by validation on the others, and its test accuracy (the mean of equals) is read on the seed left out; the mean of
    these has no such bias, and is what the rule "take the best on validation" gives with S - 1 seeds (cross-validation
    over seeds: Stone, 1974). With S - 1 seeds the choice is a little worse, so the correction is rather too large than
    too small, and with few seeds it is noisy and may be upwards. The interval of `corrected` is approximate, as the
    choices share seeds. Raises ValueError for shapes that differ.
    """
    validation_CS, test_CS = _finite(validation_CS, "scores", 2), _finite(test_CS, "scores", 2)
    if validation_CS.shape != test_CS.shape:
        raise ValueError(
            f"validation {validation_CS.shape} and test {test_CS.shape} are not of the same cells and seeds"
        )
    n = validation_CS.shape[1]
    cell = int(_highest(validation_CS.mean(1)).argmax())
    reported = interval(test_CS[cell])
    if n == 1:
        return Winner(cell, reported, None, None)
    without_SC = np.array([np.delete(validation_CS, seed, axis=1).mean(1) for seed in range(n)])
    chosen_SC = _highest(without_SC)  # equal ones share: the winner owes its place to the seed left out
    corrected_S = (chosen_SC * test_CS.T).sum(1) / chosen_SC.sum(1)
    return Winner(cell, reported, interval(corrected_S), float(chosen_SC[:, cell].mean()))


@dataclass(frozen=True)
class Peek:
    """A cell's validation score as it is, and as it looks to one who picks epochs and seeds by it."""

    last: float  # mean over seeds, after the last epoch
    best_epoch: float  # mean over seeds, each at its best epoch
    best: float  # of the best seed at its best epoch

    @property
    def gain(self) -> float:
        """What the habit would have claimed too much."""
        return self.best - self.last


def peek(validation_SE: np.ndarray) -> Peek:
    """What picking the best epoch and the best seed would have claimed for one cell, from its curves by epoch.

    The curves are of the validation split, as the test split is read once: they show what the habit of reading the test
    split after each epoch is worth, without doing it.
    """
    validation_SE = _finite(validation_SE, "curves", 2)
    best_S = validation_SE.max(1)
    return Peek(float(validation_SE[:, -1].mean()), float(best_S.mean()), float(best_S.max()))
