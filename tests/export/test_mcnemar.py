"""McNemar's test, by hand and against statsmodels."""

import numpy as np
import pytest
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar

from expertgrid.export.mcnemar import mcnemar


def test_mcnemar_by_hand_and_against_statsmodels():
    first, second = np.zeros(20, dtype=bool), np.zeros(20, dtype=bool)
    first[:8], second[7:10] = True, True  # 7 only the first, 2 only the second, 1 both
    found = mcnemar(first, second)
    assert (found.only_first, found.only_second) == (7, 2)
    assert found.exact_p == pytest.approx(92 / 512)  # 2 P(2 or fewer of 9) = 2 (1 + 9 + 36) / 512
    assert found.exact_p == pytest.approx(statsmodels_mcnemar([[1, 7], [2, 10]], exact=True).pvalue)
    assert mcnemar(first, first).exact_p == 1
    assert mcnemar([True, False], [False, True]).exact_p == pytest.approx(1)
    with pytest.raises(ValueError, match="one value for each image"):
        mcnemar([True], [True, False])
