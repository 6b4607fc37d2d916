"""Networks on their images, by hand and against statsmodels."""

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix
from statsmodels.stats.proportion import proportion_confint

from expertgrid.ablations.results.stats.images import (
    class_accuracies,
    consistent_images,
    images_variance,
    wilson,
)


def test_images_that_tell_cells_apart_by_hand():
    first_SB = [[1, 1, 0, 0, 1], [1, 1, 0, 1, 1]]
    second_SB = [[0, 1, 1, 0, 0], [0, 1, 1, 0, 1]]
    images = consistent_images(np.array(first_SB, bool), np.array(second_SB, bool))
    assert (images.only_first.tolist(), images.only_second.tolist()) == ([0], [2])
    # images 0 and 2 have two of four right: of the 6 ways to choose 2 of 4, one is all in the first, one in the second
    assert images.by_chance == pytest.approx(2 * (1 / 6 + 1 / 6))


def test_equal_cells_show_as_many_as_chance_gives():
    rng = np.random.default_rng(0)
    hardness_B = rng.beta(2, 1, size=20_000)
    right_SB = rng.random((7, 20_000)) < hardness_B
    images = consistent_images(right_SB[:4], right_SB[4:])
    counts = len(images.only_first) + len(images.only_second)
    assert images.by_chance > 100
    assert counts == pytest.approx(images.by_chance, abs=4 * np.sqrt(images.by_chance))


def test_the_images_part_of_two_cells_is_half_of_mcnemars_variance():
    first_B, second_B = np.random.default_rng(3).random((2, 500)) < [[0.8], [0.7]]
    only_first, only_second = (first_B & ~second_B).sum(), (second_B & ~first_B).sum()
    mcnemar = (
        (only_first + only_second - (only_first - only_second) ** 2 / 500) / 500 / 499
    )  # of a difference of shares
    assert images_variance([first_B, second_B]) == pytest.approx(1e4 * mcnemar / 2)


def test_class_accuracies():
    labels, predicted = np.random.default_rng(19).integers(4, size=(2, 50))
    shares = class_accuracies(confusion_matrix(labels, predicted, labels=range(5)))  # the last class has no images
    assert [share.images for share in shares] == [*np.bincount(labels), 0]
    assert shares[0].share == (predicted[labels == 0] == 0).mean()
    assert (shares[4].share, shares[4].low, shares[4].high) == (None, 0, 1)


@pytest.mark.parametrize(("right", "images"), [(0, 10), (3, 10), (10, 10), (991, 1000)])
def test_wilson_is_statsmodels(right, images):
    share = wilson(right, images)
    assert (share.low, share.high) == pytest.approx(proportion_confint(right, images, method="wilson"), abs=1e-12)
    assert share.share == right / images
