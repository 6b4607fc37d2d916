"""What a study could see, before anything is trained, and how many seeds a difference needs.

All of it is for the verdicts of `contrasts`: its critical values, and its errors as they come out where all cells
spread alike. A verdict better, worse or same is a decision; power is its probability.

Shapes: Q contrasts, C cells, D differences, X draws.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.special import ndtr, stdtrit

from expertgrid.ablations.results.stats.contrasts import FEW, KNOWN, OPEN, TOO_FEW, Judgement, surcharge
from expertgrid.ablations.results.stats.critical import correlation, crossing, joint_t

POWER = 0.8
MOST_SEEDS = 1000
DRAWS = 2048


class PowerAnalysis:
    """A family of contrasts (Q, C) whose scores spread by `spread` after cell and seed, in the unit of the scores."""

    def __init__(self, weights_QC: np.ndarray, spread: float) -> None:
        self.weights_QC = np.asarray(weights_QC, dtype=float)
        if not spread > 0:
            raise ValueError(f"the spread must be above 0, found {spread}")
        self.spread, self._joint = spread, joint_t(correlation(self.weights_QC))
        self._rank = self._joint.root_QR.shape[1]

    def power(self, contrast: int, difference: float, seeds: int, margin: float | None = None) -> float:
        """The probability that a true `difference` is found: better if it is above 0, worse below.

        With a margin, the probability of any verdict but open, `same` included. 0 for one seed. Within 5 points of
        what simulated studies give (by its tests), with 4 cells or more and 3 seeds or more within 3.
        """
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

    def detectable(self, contrast: int, seeds: int) -> float:
        """The difference that `seeds` seeds find with a power of 80%; inf where they have no verdict."""
        weights_C = self.weights_QC[contrast]
        if _own_df(weights_C, seeds) < TOO_FEW:
            return math.inf
        most = self.spread * math.sqrt((weights_C**2).sum() / seeds) * (50 + 50 * self._constant(seeds))
        return crossing(lambda difference: self.power(contrast, difference, seeds) > POWER, 0.0, most)

    def seeds_for(self, contrast: int, difference: float, margin: float | None = None, most: int = MOST_SEEDS) -> float:
        """The fewest seeds that find a true difference with a power of 80%; with a margin, that decide it either way.

        inf for more than `most`.
        """
        counts = range(2, most + 1)
        place = bisect_left(counts, True, key=lambda seeds: self.power(contrast, difference, seeds, margin) >= POWER)
        return counts[place] if place < len(counts) else math.inf

    def _constant(self, seeds: int) -> float:
        return self._joint.constant((self.weights_QC.shape[1] - 1) * (seeds - 1))


@dataclass(frozen=True)
class Sight:
    """What a study can see. Differences and the spread are in points, or as the metric counts."""

    spread: float | None  # of a cell's score from seed to seed beyond its block; None where it is not known
    seeds: int
    smallest: float  # difference (in spreads, where none is known) that the hardest contrast shows in 80% of studies
    needed: dict[float, float]  # seeds by difference; inf for more than `most`
    most: int  # seeds that a plan may have


def sight(
    weights_QC: np.ndarray, spread: float | None, seeds: int, differences: Sequence[float], most: int = MOST_SEEDS
) -> Sight | None:
    """What `seeds` seeds can see by a spread, and how many `differences` need. None without contrasts, for one seed."""
    if not len(weights_QC) or seeds < 2:
        return None
    analysis = PowerAnalysis(weights_QC, spread or 1.0)
    hardest = int((weights_QC**2).sum(1).argmax())
    smallest = analysis.detectable(hardest, seeds)
    half = [float(f"{smallest / 2:.1g}")] if smallest < differences[0] else []
    sizes = (*differences, *half) if spread else ()
    needed = {difference: analysis.seeds_for(hardest, difference, most=most) for difference in sizes}
    return Sight(spread, seeds, smallest, needed, most)


def seeds_to_decide(
    weights_QC: np.ndarray, judgements: Sequence[Judgement], margin: float, most: int = MOST_SEEDS
) -> list[float | None]:
    """About how many seeds in all would decide each open contrast of a family, were the truth what it looks like now.

    By the spread that the contrast's own interval shows. A rough answer: the estimate is uncertain by half an interval.
    None for what is decided, or has no interval; inf for more than `most`.
    """
    needed: list[float | None] = []
    for place, judgement in enumerate(judgements):
        if judgement.verdict != OPEN or judgement.mean is None or judgement.error is None:
            needed.append(None)
            continue
        spread = judgement.error * math.sqrt(judgement.seeds / (np.asarray(weights_QC)[place] ** 2).sum())
        needed.append(PowerAnalysis(weights_QC, spread).seeds_for(place, judgement.mean, margin, most))
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
