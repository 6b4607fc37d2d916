"""Critical values of several contrasts together: the joint t distribution.

Q contrasts have estimates that are jointly normal with a known correlation, and share an estimate of their variance
that has `df` degrees of freedom. The constant c with |estimate - truth| < c * error for all of them at once, with
probability `level`, makes their intervals simultaneous. Dunnett's constant (cells against one base) is a special case
(Dunnett 1955), as is Student's (one contrast).

Shapes: Q contrasts, R their rank, X directions.
"""

import itertools
from collections.abc import Callable
from functools import cached_property, lru_cache

import numpy as np
from scipy.special import chdtrc, fdtrc, ndtri, stdtrit

DIRECTIONS = 24576
NEIGHBOURS = 32
LEVEL = 0.95


class JointT:
    """The largest |t| of Q contrasts, from the correlation (Q, Q) of their estimates.

    Write the estimates as radius times direction. Their radius is independent of their direction, and radius**2 over
    the variance's estimate is F distributed, so that for a direction in which the largest estimate is m,

        P(largest |t| > c) = P(F(R, df) > c**2 / (R m**2)),

    exactly. What is left is the mean over directions. They are a fixed lattice (the square roots of primes, folded:
    Richtmyer's, as in Genz & Bretz, Computation of Multivariate Normal and t Probabilities, 2009), so the same question
    always has the same answer. The constants are within 0.3% of Dunnett's for 2 to 199 contrasts (by its tests).
    Raises ValueError for what is not a correlation matrix.
    """

    def __init__(self, correlation_QQ: np.ndarray) -> None:
        self.correlation_QQ = np.asarray(correlation_QQ, dtype=float)
        shape = self.correlation_QQ.shape
        if len(shape) != 2 or shape[0] != shape[1] or shape[0] == 0:
            raise ValueError(f"a correlation matrix is square, found {shape}")
        if not np.allclose(np.diag(self.correlation_QQ), 1, atol=1e-6):
            raise ValueError("a correlation matrix has 1 on its diagonal")
        self._constants: dict[tuple[float, float], float] = {}

    @cached_property
    def root_QR(self) -> np.ndarray:
        """A root of the correlation: estimates are independent normal values (R,) times it.

        It is Cholesky's, which takes the contrast with the most variance left, the first of equals. Eigenvectors would
        be others on each kind of processor, as equal eigenvalues leave them free, and so would the constants.
        """
        values_Q = np.linalg.eigvalsh(self.correlation_QQ)
        if values_Q[0] < -1e-6 * values_Q[-1]:
            raise ValueError("a correlation matrix has no negative eigenvalue")
        columns: list[np.ndarray] = []
        left_QQ = self.correlation_QQ.copy()
        while (variance_Q := np.diag(left_QQ).round(9)).max() > 0:
            most = int(variance_Q.argmax())
            columns.append(left_QQ[:, most] / np.sqrt(left_QQ[most, most]))
            left_QQ -= np.outer(columns[-1], columns[-1])
        return np.stack(columns, axis=1)

    @cached_property
    def _largest(self) -> tuple[np.ndarray, int]:
        """The largest estimate in each direction (X,), and the rank R."""
        root_QR = self.root_QR
        rank = root_QR.shape[1]
        if rank == 1:
            return np.ones(1), 1
        place_X1 = np.arange(1, DIRECTIONS + 1)[:, None]
        fold_XR = np.abs(2 * ((place_X1 * np.sqrt(_primes(rank))) % 1) - 1)
        normal_XR = ndtri(np.clip(fold_XR, 1e-12, 1 - 1e-12))
        direction_XR = normal_XR / np.linalg.norm(normal_XR, axis=1, keepdims=True)
        largest_X = np.sort(np.abs(direction_XR @ root_QR.T).max(1))
        return largest_X.reshape(-1, NEIGHBOURS).mean(1), rank  # the tail is smooth in it: neighbours count as one

    def tail(self, constant: float, df: float) -> float:
        """The probability that the largest |t| is above `constant`."""
        largest_X, rank = self._largest
        bound_X = (constant / largest_X) ** 2
        tail_X = chdtrc(rank, bound_X) if np.isinf(df) else fdtrc(rank, df, bound_X / rank)
        return float(tail_X.mean())

    def tails(self, constants: np.ndarray, df: float) -> np.ndarray:
        """`tail` of many constants, from 32 of them: its logarithm is almost linear in the square of the constant."""
        knots = np.linspace(0, float(np.max(constants)), 32)
        logs = np.log([max(self.tail(knot, df), 1e-300) for knot in knots])
        return np.exp(np.interp(np.square(constants), knots**2, logs))

    def constant(self, df: float, level: float = LEVEL) -> float:
        """The constant that the largest |t| stays below with probability `level`. Raises ValueError for df of 0."""
        if not df > 0:
            raise ValueError(f"a critical value needs degrees of freedom, found {df}")
        if (df, level) not in self._constants:
            self._constants[df, level] = self._solve(df, level)
        return self._constants[df, level]

    def _solve(self, df: float, level: float) -> float:
        alpha, count = 1 - level, len(self.correlation_QQ)
        single = float(-stdtrit(df, alpha / 2)) if np.isfinite(df) else float(-ndtri(alpha / 2))
        if self._largest[1] == 1:
            return single
        bonferroni = float(-stdtrit(df, alpha / 2 / count)) if np.isfinite(df) else float(-ndtri(alpha / 2 / count))
        return crossing(lambda c: self.tail(c, df) < alpha, 0.99 * single, 1.01 * bonferroni)


def crossing(is_above: Callable[[float], bool], low: float, high: float) -> float:
    """The value between `low` and `high` from which on `is_above` holds, to 1e-6 of it, by bisection.

    Not by scipy.optimize, whose import takes longer than all critical values of a table.
    """
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if is_above(middle) else (middle, high)
    return (low + high) / 2


def joint_t(correlation_QQ: np.ndarray) -> JointT:
    """The `JointT` of a correlation matrix, kept from an earlier call where there was one (to 1e-12)."""
    rounded_QQ = np.round(np.asarray(correlation_QQ, dtype=float), 12) + 0.0  # no -0
    return _kept(rounded_QQ.tobytes(), rounded_QQ.shape)


@lru_cache(maxsize=64)
def _kept(data: bytes, shape: tuple[int, ...]) -> JointT:
    return JointT(np.frombuffer(data).reshape(shape))


def correlation(weights_QC: np.ndarray) -> np.ndarray:
    """The correlation (Q, Q) of contrasts of C means that are independent and of equal variance. No row may be 0."""
    weights_QC = np.asarray(weights_QC, dtype=float)
    unit_QC = weights_QC / np.linalg.norm(weights_QC, axis=1, keepdims=True)
    return unit_QC @ unit_QC.T


def _primes(count: int) -> np.ndarray:
    """The first primes."""
    primes = [2]
    while len(primes) < count:
        primes.append(next(n for n in itertools.count(primes[-1] + 1) if all(n % prime for prime in primes)))
    return np.array(primes[:count])
