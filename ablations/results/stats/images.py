"""Networks on their images: which are right on which, and how far a share of images is known.

Shapes: B images, N classes, S seeds.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ConsistentImages:
    """The images that all networks of one cell recognise and no network of the other: indices."""

    only_first: np.ndarray
    only_second: np.ndarray
    by_chance: float  # how many of both together two equal cells would show


def consistent_images(first_SB: np.ndarray, second_SB: np.ndarray) -> ConsistentImages:
    """On which images two cells differ at every seed, from whether each network is right (S, B).

    The cells may have different numbers of seeds. `by_chance` is what a random division of the same networks into two
    such groups gives on average (hypergeometric).
    """
    from scipy.stats import hypergeom  # slow to import

    ours, theirs = len(first_SB), len(second_SB)
    first_B, second_B = first_SB.sum(0), second_SB.sum(0)
    right_B = first_B + second_B
    chances = [
        float(hypergeom.pmf(ours, ours + theirs, ours, ours)),  # all that are right are in the first cell
        float(hypergeom.pmf(0, ours + theirs, theirs, ours)),  # or in the second
    ]
    by_chance = (right_B == ours).sum() * chances[0] + (right_B == theirs).sum() * chances[1]
    return ConsistentImages(
        only_first=np.flatnonzero((first_B == ours) & (second_B == 0)),
        only_second=np.flatnonzero((second_B == theirs) & (first_B == 0)),
        by_chance=float(by_chance),
    )


def images_variance(right_CB: np.ndarray) -> float:
    """What B random images add to the variance of a cell's share of right ones, beyond what all C cells share.

    From whether each network is right, one of each cell, all on the same images. For two cells this is half of the
    variance of McNemar's difference. In percent squared.
    """
    right_CB = np.asarray(right_CB, dtype=float)
    count, images = right_CB.shape
    left_CB = right_CB - right_CB.mean(0) - right_CB.mean(1, keepdims=True) + right_CB.mean()
    return float(1e4 * (left_CB**2).sum() / ((count - 1) * (images - 1) * images))


@dataclass(frozen=True)
class Share:
    """A share of images with its interval; None of no images."""

    images: int
    share: float | None
    low: float
    high: float


def wilson(right: int, images: int) -> Share:
    """A share with Wilson's score interval (1927), for images that were drawn at random: it is of one network."""
    from scipy.stats import binomtest  # slow to import

    if images == 0:
        return Share(0, None, 0.0, 1.0)
    interval = binomtest(right, images).proportion_ci(method="wilson")
    return Share(images, right / images, float(interval.low), float(interval.high))


def class_accuracies(confusion_NN: np.ndarray) -> list[Share]:
    """For each class the share of its images that were taken for it, with Wilson's interval."""
    return [wilson(int(row_N[i]), int(row_N.sum())) for i, row_N in enumerate(np.asarray(confusion_NN))]
