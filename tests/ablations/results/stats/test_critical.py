"""Critical values against Student's, Dunnett's table, an integral of our own, scipy's multivariate t and bounds."""

import numpy as np
import pytest
import scipy.stats
from scipy.optimize import brentq
from scipy.special import ndtr

from expertgrid.ablations.results.stats.critical import JointT, correlation, joint_t
from expertgrid.ablations.results.stats.factors import against


def dunnett_constant(contrasts, df, alpha=0.05):
    """For equal numbers of seeds: given the base's deviation z and the spread s, cells are independent."""
    z, weight_z = np.polynomial.hermite_e.hermegauss(64)
    u, weight_u = np.polynomial.legendre.leggauss(64)
    s = np.sqrt(scipy.stats.chi2.ppf((u + 1) / 2, df) / df)[:, None]

    def missed(c):
        inside = ndtr(np.sqrt(2) * c * s - z) - ndtr(-np.sqrt(2) * c * s - z)
        return 1 - weight_u / 2 @ inside**contrasts @ (weight_z / weight_z.sum()) - alpha

    return brentq(missed, 0.5, 60)


@pytest.mark.parametrize("df", [1, 4, 18, 1e6])
def test_one_contrast_is_students(df):
    assert JointT([[1.0]]).constant(df) == pytest.approx(scipy.stats.t.ppf(0.975, df), rel=1e-6)
    assert JointT([[1.0]]).constant(df, level=0.9) == pytest.approx(scipy.stats.t.ppf(0.95, df), rel=1e-6)
    equal = JointT([[1.0, 1.0], [1.0, 1.0]])  # one question asked twice
    assert equal.constant(df) == pytest.approx(scipy.stats.t.ppf(0.975, df), rel=1e-6)


def test_the_table_of_dunnett():
    # Dunnett 1955, table 2a (two-sided, joint 95%): 3 treatments, 12 degrees of freedom; 9 treatments, 20
    assert JointT(correlation(against(0, 4))).constant(12) == pytest.approx(2.68, abs=0.006)
    assert JointT(correlation(against(0, 10))).constant(20) == pytest.approx(2.95, abs=0.006)


@pytest.mark.parametrize("cells", [3, 4, 10, 20, 50, 200])
@pytest.mark.parametrize("df", [4, 36, 1000])
def test_cells_against_the_base_are_dunnetts(cells, df):
    constant = JointT(correlation(against(0, cells))).constant(df)
    assert constant == pytest.approx(dunnett_constant(cells - 1, df), rel=3e-3)


def test_any_correlation_is_scipys_multivariate_t():
    weights_QC = np.array([[-1, 0.5, 0.5, 0], [0, -1, 0, 1], [1, 1, -1, -1], [1, 0, 0, -1]], float)
    joint = JointT(correlation(weights_QC))
    full_rank = correlation(weights_QC[:3])
    constant = JointT(full_rank).constant(9)
    inside = scipy.stats.multivariate_t(shape=full_rank, df=9, seed=0).cdf(
        np.full(3, constant), lower_limit=np.full(3, -constant), maxpts=200_000
    )
    assert inside == pytest.approx(0.95, abs=5e-4)
    assert joint.tail(joint.constant(9), 9) == pytest.approx(0.05, abs=1e-6)


def test_independent_contrasts_are_sidaks_and_none_is_above_bonferronis():
    alpha = 1 - 0.95 ** (1 / 5)
    assert JointT(np.eye(5)).constant(np.inf) == pytest.approx(scipy.stats.norm.isf(alpha / 2), rel=2e-3)
    for weights_QC in (against(0, 6), np.random.default_rng(0).normal(size=(5, 8))):
        for df in (3, 10, 100):
            constant = JointT(correlation(weights_QC)).constant(df)
            assert scipy.stats.t.isf(0.025, df) < constant < scipy.stats.t.isf(0.025 / 5, df)


def test_many_tails():
    joint = JointT(correlation(against(0, 8)))
    constants = np.array([0.3, 1.7, 2.5, 3.9, 7.0])
    for df in (6, 40):
        expected = [joint.tail(constant, df) for constant in constants]
        assert joint.tails(constants, df) == pytest.approx(expected, rel=0.01)


def test_the_same_question_has_the_same_answer():
    weights_QC = np.random.default_rng(0).normal(size=(6, 9))
    first = JointT(correlation(weights_QC)).constant(20)
    assert JointT(correlation(weights_QC)).constant(20) == first
    assert joint_t(correlation(weights_QC)) is joint_t(correlation(3 * weights_QC))


@pytest.mark.parametrize(
    ("matrix", "df", "message"),
    [
        ([[1.0, 0.5]], 5, "square"),
        ([[2.0]], 5, "1 on its diagonal"),
        ([[1.0, 1.2], [1.2, 1.0]], 5, "negative eigenvalue"),
        ([[1.0]], 0, "degrees of freedom"),
    ],
)
def test_what_has_no_constant(matrix, df, message):
    with pytest.raises(ValueError, match=message):
        JointT(matrix).constant(df)
