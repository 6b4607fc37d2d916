"""What a study could see, before anything is trained, and how many seeds a difference needs.

All of it is for the verdicts of `contrasts`: its critical values, and its errors as they come out where all cells
spread alike. A verdict better, worse or same is a decision; power is its probability.

Shapes: Q contrasts, C cells, D differences, X draws.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.special import ndtr, stdtrit

from expertgrid.ablations.results.stats.contrasts import FEW, KNOWN, OPEN, TOO_FEW, Family, surcharge
from expertgrid.ablations.results.stats.critical import LEVEL, correlation, crossing, joint_t

POWER = 0.8
MOST_SEEDS = 1000
DRAWS = 2048


def binomial_spread(accuracy: float, images: float) -> float:
    """The standard deviation of an accuracy in percent that `images` random images alone give: a floor for the spread.

    Jordan 2023 (arXiv 2304.01910) finds most of the spread of seeds on CIFAR-10 to be this. Raises ValueError for an
    accuracy that is not between 0 and 100 percent.
    """
    if not 0 < accuracy < 100 or images < 1:
        raise ValueError(f"an accuracy between 0 and 100 and 1 image or more are needed, found {accuracy} and {images}")
    return math.sqrt(accuracy * (100 - accuracy) / images)


class PowerAnalysis:
    """A family of contrasts (Q, C) whose scores spread by `spread` after cell and seed, in the unit of the scores."""

    def __init__(self, weights_QC: np.ndarray, spread: float, level: float = LEVEL) -> None:
        self.weights_QC = np.asarray(weights_QC, dtype=float)
        if not spread > 0:
            raise ValueError(f"the spread must be above 0, found {spread}")
        self.spread, self.level = spread, level
        self._joint = joint_t(correlation(self.weights_QC))
        self._rank = self._joint.root_QR.shape[1]

    def power(self, contrast: int, difference: float, seeds: int, margin: float | None = None) -> float:
        """The probability that a true `difference` is found: better if it is above 0, worse below.

        With a margin, the probability of any verdict but open, `same` included. 0 for one seed. Within 5 points of
        what simulated studies give (by its tests), with 4 cells or more and 3 seeds or more within 3.
        """
        if seeds < 2:
            return 0.0
        weights_C = self.weights_QC[contrast]
        unit = self.spread * math.sqrt((weights_C**2).sum() / seeds)
        if _own_df(weights_C, seeds) < TOO_FEW:
            return 0.0
        half_X = self._constant(seeds) * _widths(_form(weights_C), seeds, self._rank)
        effect = abs(difference) / unit
        decided_X = ndtr(effect - half_X)
        if margin is not None:  # estimates within margin - half are the same, those above half (or there too) better
            inside_X = np.maximum(margin / unit - half_X, 0)
            same_X = ndtr(inside_X - effect) - ndtr(-inside_X - effect)
            above_X = ndtr(effect - np.maximum(half_X, inside_X))
            decided_X = above_X + same_X
        return float(decided_X.mean())

    def detectable(self, seeds: int, power: float = POWER) -> np.ndarray:
        """The difference of each contrast (Q,) that `seeds` seeds find with this power; inf for one seed."""
        if seeds < 2:
            return np.full(len(self.weights_QC), np.inf)
        forms = [_form(weights_C) for weights_C in self.weights_QC]  # those of one form see the same
        by_form = {form: self._detectable(forms.index(form), seeds, power) for form in dict.fromkeys(forms)}
        return np.array([by_form[form] for form in forms])

    def _detectable(self, contrast: int, seeds: int, power: float) -> float:
        weights_C = self.weights_QC[contrast]
        unit = self.spread * math.sqrt((weights_C**2).sum() / seeds)
        if _own_df(weights_C, seeds) < TOO_FEW:
            return math.inf
        most = unit * (50 + 50 * self._constant(seeds))
        return crossing(lambda difference: self.power(contrast, difference, seeds) > power, 0.0, most)

    def seeds_for(
        self, contrast: int, difference: float, margin: float | None = None, power: float = POWER
    ) -> int | None:
        """The fewest seeds that find a true difference with this power; with a margin, that decide it either way.

        None for more than 1,000.
        """
        return _fewest(lambda seeds: self.power(contrast, difference, seeds, margin) >= power)

    def _constant(self, seeds: int) -> float:
        return self._joint.constant((self.weights_QC.shape[1] - 1) * (seeds - 1), self.level)


@dataclass(frozen=True)
class Sight:
    """What a study can see. Differences and the spread are in points, or as the metric counts."""

    spread: float  # of a cell's score from seed to seed beyond its block
    measured: bool  # from records; else the binomial floor
    seeds: int
    smallest: float  # difference that is found with a probability of 80%, for the contrast that is hardest to see
    needed: dict[float, int | None]  # seeds by difference; None for more than 1,000


def sight(
    weights_QC: np.ndarray, spread: float, seeds: int, differences: Sequence[float], measured: bool = True
) -> Sight | None:
    """What `seeds` seeds can see by a spread, and how many `differences` need. None without contrasts, for one seed."""
    if not len(weights_QC) or seeds < 2:
        return None
    analysis = PowerAnalysis(weights_QC, spread)
    hardest = int((weights_QC**2).sum(1).argmax())
    smallest = float(analysis.detectable(seeds)[hardest])
    half = [float(f"{smallest / 2:.1g}")] if smallest < differences[0] else []
    needed = {difference: analysis.seeds_for(hardest, difference) for difference in (*differences, *half)}
    return Sight(spread, measured, seeds, smallest, needed)


def seeds_to_decide(weights_QC: np.ndarray, family: Family, margin: float, power: float = POWER) -> list[int | None]:
    """About how many seeds in all would decide each open contrast of a family, were the truth what it looks like now.

    By the spread that the contrast's own interval shows. A rough answer: the estimate is uncertain by half an interval.
    None for what is decided, or has no interval, and for more than 1,000.
    """
    needed: list[int | None] = []
    for place, judgement in enumerate(family.judgements):
        if judgement.verdict != OPEN or judgement.mean is None or judgement.error is None:
            needed.append(None)
            continue
        spread = judgement.error * math.sqrt(judgement.seeds / (np.asarray(weights_QC)[place] ** 2).sum())
        needed.append(PowerAnalysis(weights_QC, spread).seeds_for(place, judgement.mean, margin, power))
    return needed


def _form(weights_C: np.ndarray) -> tuple[float, ...]:
    """The weights without signs and order: what the distribution of a contrast's error depends on."""
    return tuple(np.sort(np.round(np.abs(weights_C), 12)).tolist())


def _own_df(weights_C: np.ndarray, seeds: int) -> float:
    return (seeds - 1) * (weights_C**2).sum() ** 2 / (weights_C**4).sum()


@lru_cache(maxsize=4096)
def _widths(weights: tuple[float, ...], seeds: int, rank: int) -> np.ndarray:
    """Errors (X,) that `estimate` gives a contrast, over the true one, where all cells spread alike: drawn, fixed seed.

    `weights` is a `_form`, so that contrasts of one form have one answer, and `rank` that of their family. Drawn from
    chi-squared distributions, the variances over seeds as if they were independent of those of cells.
    """
    count, used_C = len(weights), np.array([weight for weight in weights if weight])
    share_C, own_df, rng = used_C**2 / (used_C**2).sum(), _own_df(used_C, seeds), np.random.default_rng(0)
    over_seeds_X = rng.chisquare(seeds - 1, DRAWS) / (seeds - 1)
    if count == 2:
        return np.sqrt(over_seeds_X)
    if len(used_C) > 2 and rank < count - 1:
        others_X = rng.chisquare((rank - 1) * (seeds - 1), DRAWS) if rank > 1 else 0.0
        family_X = (over_seeds_X * (seeds - 1) + others_X) / (rank * (seeds - 1))
        wider = stdtrit(rank * (seeds - 1), KNOWN) / stdtrit((count - 1) * (seeds - 1), KNOWN)
        over_seeds_X = np.maximum(over_seeds_X, family_X) * wider**2
    own_XC = rng.chisquare(seeds - 1, (DRAWS, len(used_C))) / (seeds - 1)
    others = count - len(used_C)
    others_X = rng.chisquare(others * (seeds - 1), DRAWS) / (seeds - 1) if others else 0.0
    pooled_X = (own_XC.sum(1) + others_X) / count
    excess_XC = own_XC - pooled_X[:, None]
    apart = own_df < FEW
    excess_X = np.maximum(excess_XC, 0) @ share_C if apart else np.maximum(excess_XC @ share_C, 0)
    return np.sqrt(np.maximum(pooled_X + surcharge(seeds) * excess_X, over_seeds_X))


def _fewest(enough: Callable[[int], bool]) -> int | None:
    """The smallest number of seeds that is enough, 2 to 1,000, where more seeds are never worse."""
    low, high = 1, 2
    while not enough(high):
        if high == MOST_SEEDS:
            return None
        low, high = high, min(2 * high, MOST_SEEDS)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
