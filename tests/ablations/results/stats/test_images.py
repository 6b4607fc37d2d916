"""Networks on their images, by hand and against statsmodels and scikit-learn."""

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix as sklearns_confusion_matrix
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar
from statsmodels.stats.proportion import proportion_confint

from ablations.results.stats.images import (
    Consistent,
    class_accuracies,
    confusion_matrix,
    consistent_differences,
    mcnemar,
    wilson,
)


def test_mcnemar_by_hand_and_against_statsmodels():
    first, second = np.zeros(20, dtype=bool), np.zeros(20, dtype=bool)
    first[:8], second[7:10] = True, True  # 7 only the first, 2 only the second, 1 both
    found = mcnemar(first, second)
    assert (found.only_first, found.only_second) == (7, 2)
    # 2 P(2 or fewer of 9) = 2 (1 + 9 + 36) / 512, and half of the 36 less on each side
    assert (found.exact_p, found.mid_p) == pytest.approx((92 / 512, (92 - 36) / 512))
    assert found.exact_p == pytest.approx(statsmodels_mcnemar([[1, 7], [2, 10]], exact=True).pvalue)
    assert mcnemar(first, first).exact_p == 1
    even = mcnemar([True, False], [False, True])
    assert (even.exact_p, even.mid_p) == pytest.approx((1, 0.5))
    with pytest.raises(ValueError, match="one value for each image"):
        mcnemar([True], [True, False])


def test_consistent_differences_by_hand():
    first = np.array([[1, 0, 1, 0, 1], [1, 0, 1, 1, 1], [1, 1, 1, 0, 0]], bool)
    second = np.array([[0, 1, 1, 1, 0], [0, 1, 1, 0, 1], [0, 1, 1, 1, 1]], bool)
    found = consistent_differences(first, second)
    assert found == [
        Consistent(0, 3, 0, pytest.approx(1)),
        Consistent(1, 1, 3, pytest.approx(-2 / 3)),
        Consistent(3, 1, 2, pytest.approx(-1 / 3)),
    ]
    assert consistent_differences(first, second, most=1) == found[:1]
    with pytest.raises(ValueError, match="each seed and image"):
        consistent_differences(first, second[:2])


def test_confusion_and_class_accuracies():
    labels, predicted = np.random.default_rng(19).integers(4, size=(2, 50))
    found = confusion_matrix(labels, predicted, 5)  # the last class has no images
    assert found.tolist() == sklearns_confusion_matrix(labels, predicted, labels=range(5)).tolist()
    shares = class_accuracies(found)
    assert [share.images for share in shares] == [*np.bincount(labels), 0]
    assert shares[0].right == ((labels == 0) & (predicted == 0)).sum()
    assert (shares[4].share, shares[4].low, shares[4].high) == (None, 0, 1)
    with pytest.raises(ValueError, match="classes go from 0 to 2"):
        confusion_matrix(labels, predicted, 3)
    with pytest.raises(ValueError, match="labels and"):
        confusion_matrix(labels, predicted[:49], 4)


@pytest.mark.parametrize(("right", "images"), [(0, 10), (3, 10), (10, 10), (991, 1000)])
def test_wilson_is_statsmodels(right, images):
    found = wilson(right, images)
    assert (found.low, found.high) == pytest.approx(proportion_confint(right, images, method="wilson"), abs=1e-12)
    assert found.share == right / images


def test_wilson_of_no_share():
    with pytest.raises(ValueError, match="no share"):
        wilson(3, 2)
