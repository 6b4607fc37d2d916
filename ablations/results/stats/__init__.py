"""Statistics on plain numbers: pure functions of arrays, which know nothing of studies, files or tables.

Shapes: C cells or contrasts, S seeds, E epochs, B images, N classes, L levels of a factor, K looks at a race, X any.

A score is a number that is better when it is higher, in the unit of the margin that it is compared with (percent with
percent); give losses and times negated. Scores of cells that were trained on the same seeds are paired by seed. What is
not finite raises ValueError: a trial that is missing or diverged is for the caller to name, never for these functions
to drop.
"""

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import Literal, NamedTuple, get_args

import numpy as np
from scipy.optimize import brentq
from scipy.special import nctdtr, ndtr, ndtri, stdtr, stdtrit
from scipy.stats import t as student

Verdict = Literal["undecided", "better", "worse", "equivalent"]
VERDICTS = get_args(Verdict)

MOST_SEEDS = 1000  # that a study may have


class Interval(NamedTuple):
    """A mean and half the width of its confidence interval; None where one value, or equal ones, give no interval."""

    mean: float
    half_width: float | None


def mean_interval(values_S: Sequence[float], level: float = 0.95) -> Interval:
    """The mean of S values with Student's t interval, from the sample standard deviation (ddof=1).

    Values that are all equal have no interval: that a few seeds agree does not say that all would. Raises ValueError
    where there is no value.
    """
    if len(values_S) == 0:
        raise ValueError("a mean needs at least one value")
    mean = float(np.mean(values_S))
    sd = float(np.std(values_S, ddof=1)) if len(values_S) > 1 else 0.0
    if _is_nothing(sd, float(np.abs(values_S).max())):
        return Interval(mean, None)
    return Interval(mean, float(student.ppf((1 + level) / 2, len(values_S) - 1) * sd / np.sqrt(len(values_S))))


def _finite(values: object, what: str, dimensions: int) -> np.ndarray:
    """The values as an array of floats. Raises ValueError for another number of dimensions, and for what is missing."""
    array = np.asarray(values, dtype=float)
    if array.ndim != dimensions or array.size == 0:
        raise ValueError(f"{what} need {dimensions} dimensions and at least one value each, found {array.shape}")
    if not np.isfinite(array).all():
        places = ", ".join(map(str, np.argwhere(~np.isfinite(array)).tolist()[:5]))
        raise ValueError(f"{what} must be finite, found {(~np.isfinite(array)).sum()} that are not, at {places}")
    return array


# --- Contrasts: one cell against another ---


@dataclass(frozen=True)
class Contrast:
    """A difference of two cells' means, the first minus the second, in the unit of the scores.

    Where its spread cannot be estimated, `error` to `p` are None and `reason` says why.
    """

    mean: float
    n: int  # pairs; unpaired, the seeds of the cell that has fewer
    sd: float | None = None  # of the difference on one seed
    error: float | None = None  # standard error of the mean
    df: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None  # two-sided, of no difference, for this contrast alone
    paired: bool = True
    left_out: tuple[int, ...] = ()  # seeds that only one of two paired cells has
    reason: str = ""


def contrast(first: Mapping[int, float], second: Mapping[int, float], level: float = 0.95) -> Contrast:
    """The difference of two cells whose scores are given by seed, with Student's t interval.

    Two or more seeds in common: the differences by seed, t with n - 1 degrees of freedom; seeds that only one cell has
    are named in `left_out`, for a reader to see. Fewer in common: Welch's interval over all seeds, `paired` False. Both
    take the scores (or their differences) as normal; that a seed helps both cells alike is not assumed, it only makes
    pairing pay. One seed, or differences that are all equal, give no interval: n equal differences say that the spread
    is below the resolution of the score, not that it is nothing. Raises ValueError for a cell without scores.
    """
    for scores in (first, second):
        _finite(list(scores.values()), "scores", 1)
    common = sorted(first.keys() & second.keys())
    if len(common) > 1 or first.keys() == second.keys():
        left_out = tuple(sorted(first.keys() ^ second.keys()))
        scale = max(abs(scores[seed]) for scores in (first, second) for seed in common)
        return paired_contrast([first[seed] - second[seed] for seed in common], level, left_out, scale)
    values = [np.array(list(scores.values())) for scores in (first, second)]
    mean, n = float(values[0].mean() - values[1].mean()), min(map(len, values))
    if n == 1:
        return Contrast(mean, n, paired=False, reason="a cell has one seed")
    variances = [float(np.var(scores, ddof=1)) for scores in values]
    parts = [variance / len(scores) for variance, scores in zip(variances, values)]
    scale = max(np.abs(scores).max() for scores in values)
    if _is_nothing(math.sqrt(sum(variances)), scale):
        return Contrast(mean, n, paired=False, reason="each cell's scores are all equal")
    df = sum(parts) ** 2 / sum(part**2 / (len(scores) - 1) for part, scores in zip(parts, values))
    return _estimated(mean, math.sqrt(sum(variances)), math.sqrt(sum(parts)), df, n, False, (), level)


def paired_contrast(
    differences_S: Sequence[float], level: float = 0.95, left_out: tuple[int, ...] = (), scale: float = 0.0
) -> Contrast:
    """The mean of S differences, one for each seed, with Student's t interval. Assumes that they are normal.

    `scale` is the size of the scores they come from: a spread that rounding alone explains counts as none.
    """
    differences_S = _finite(differences_S, "differences", 1)
    mean, n = float(differences_S.mean()), len(differences_S)
    if n == 1:
        return Contrast(mean, n, left_out=left_out, reason="one seed has no interval")
    sd = float(differences_S.std(ddof=1))
    if _is_nothing(sd, max(scale, np.abs(differences_S).max())):
        reason = f"the difference is the same for all {n} seeds, and its spread is unknown"
        return Contrast(mean, n, left_out=left_out, reason=reason)
    return _estimated(mean, sd, sd / math.sqrt(n), n - 1, n, True, left_out, level)


def _is_nothing(sd: float, scale: float) -> bool:
    """Whether a standard deviation is nothing but rounding of numbers of this size, that once were single precision."""
    return sd <= 1e-6 * scale


def _estimated(
    mean: float, sd: float, error: float, df: float, n: int, paired: bool, left_out: tuple[int, ...], level: float
) -> Contrast:
    half_width = float(stdtrit(df, (1 + level) / 2)) * error
    p = float(2 * stdtr(df, -abs(mean) / error))
    return Contrast(mean, n, sd, error, df, mean - half_width, mean + half_width, p, paired, left_out)


def bootstrap_interval(
    values_S: Sequence[float], level: float = 0.95, resamples: int = 9999, seed: int = 0
) -> tuple[float, float] | None:
    """The studentised (bootstrap-t) interval of the mean of S values: scores of a cell, or paired differences.

    It does not take the values as normal, and follows their skew. Efron & Tibshirani, An Introduction to the Bootstrap
    (1993), 12.5. Chosen over percentile and BCa intervals, which are too short for so few values: of normal values,
    both cover the mean 86 times of 100 with 5 seeds, and 89 times with 10. No bootstrap learns much from 5 values or
    fewer: with 5 this one is a third wider than Student's, with 4 twice as wide, and below 4 so many resamples repeat
    one value that there is none (None); nor is there one where the values are all equal.
    """
    values_S = _finite(values_S, "values", 1)
    n, mean, sd = len(values_S), values_S.mean(), values_S.std(ddof=1) if len(values_S) > 1 else 0.0
    if n < 4 or _is_nothing(sd, np.abs(values_S).max()):
        return None
    drawn_XS = values_S[np.random.default_rng(seed).integers(n, size=(resamples, n))]
    away_X, sd_X = drawn_XS.mean(1) - mean, drawn_XS.std(1, ddof=1)
    sd_X[sd_X <= 1e-9 * sd] = 0.0
    with np.errstate(divide="ignore", invalid="ignore"):
        t_X = np.where((sd_X == 0) & (np.abs(away_X) <= 1e-9 * sd), 0.0, away_X / (sd_X / math.sqrt(n)))
    low_t, high_t = np.quantile(t_X, [(1 - level) / 2, (1 + level) / 2], method="inverted_cdf")
    interval = mean - high_t * sd / math.sqrt(n), mean - low_t * sd / math.sqrt(n)
    return (float(interval[0]), float(interval[1])) if np.isfinite(interval).all() else None


# --- Verdicts on several contrasts ---


@dataclass(frozen=True)
class Decision:
    """What may be said of a contrast, beside the others of its family. p-values are adjusted for the family."""

    verdict: Verdict
    p_difference: float | None
    p_equivalence: float | None  # None also where there is no margin
    reason: str = ""


def holm(p_C: Sequence[float]) -> np.ndarray:
    """Holm's adjusted p-values (C,): at most `alpha` to find any difference that is none. Any dependence is allowed.

    Holm, A simple sequentially rejective multiple test procedure (1979).
    """
    p_C = _finite(p_C, "p-values", 1)
    return _adjusted(p_C[:, None])[:, 0]


def _adjusted(p_CH: np.ndarray) -> np.ndarray:
    """Adjusted p-values of C contrasts with H hypotheses each, of which one at most is true; Holm's where H is 1."""
    adjusted_CH = np.empty_like(p_CH)
    unrejected_C = np.full(len(p_CH), p_CH.shape[1])
    largest = 0.0
    for place in np.argsort(p_CH, axis=None, kind="stable"):
        row, hypothesis = np.unravel_index(place, p_CH.shape)
        largest = max(largest, min(1.0, p_CH[row, hypothesis] * np.count_nonzero(unrejected_C)))
        adjusted_CH[row, hypothesis] = largest
        unrejected_C[row] -= 1
    return adjusted_CH


def decide(contrasts: Sequence[Contrast], margin: float | None = None, alpha: float = 0.05) -> list[Decision]:
    """A verdict on each contrast of a family, all of them right with probability 1 - `alpha`.

    A false verdict is `better` or `worse` where there is no difference or the opposite one, or `equivalent` where the
    true difference is `margin` or more, either way. Each contrast has two hypotheses: the difference is 0 (two-sided t
    test), and it is at least the margin (two one-sided t tests: Schuirmann 1987), left out where `margin` is None.

    Why the family's error holds. The two hypotheses of a contrast exclude each other, so of the 2 C hypotheses at most
    C are true at once. Holm's argument needs no more: sort all p-values, and compare each with alpha / k, where k is
    the number of contrasts with a hypothesis that is not rejected yet (Shaffer, Modified sequentially rejective
    multiple test procedures, 1986). Before the first false rejection no true hypothesis is rejected, so k is at least
    their number T; each of them is below alpha / T with that probability at most, and any of them with `alpha`.

    The sign costs nothing more. Where the true difference is the margin or more, finding the opposite sign implies
    passing the one-sided test against the margin, so that both mistakes are one event. Signs of smaller differences are
    as safe as Holm's (Finner, Stepwise multiple test procedures and control of directional errors, 1999, for
    independent contrasts; the tests simulate dependent ones).

    What would be wrong is to drop a contrast from k once it has a verdict: one that was found different could have been
    falsely found equivalent, and the family's error can reach 7%. So the price of a margin is that k falls only where
    both hypotheses of a contrast are rejected. Without a margin this is Holm's procedure.

    Where both are rejected there is a difference, and it is too small to matter: `equivalent`, with that reason. A
    contrast without an interval stays undecided and counts in the family. The seeds must have been fixed beforehand:
    for seeds that were added until something was found, see `race`. Raises ValueError for a margin that is not above 0.
    """
    if not contrasts:
        return []
    p_difference_C = np.array([1.0 if one.p is None else one.p for one in contrasts])
    p_CH = p_difference_C[:, None]
    if margin is not None:
        p_CH = np.column_stack([p_difference_C, [equivalence_p(one, margin) for one in contrasts]])
    adjusted_CH = _adjusted(p_CH)
    decisions = []
    for one, adjusted_H in zip(contrasts, adjusted_CH):
        if one.p is None:
            decisions.append(Decision("undecided", None, None, one.reason))
            continue
        different, equivalent = adjusted_H[0] <= alpha, margin is not None and adjusted_H[1] <= alpha
        verdict: Verdict = "undecided"
        if equivalent:
            verdict = "equivalent"
        elif different:
            verdict = "better" if one.mean > 0 else "worse"
        reason = "there is a difference, within the margin" if different and equivalent else ""
        p_equivalence = None if margin is None else float(adjusted_H[1])
        decisions.append(Decision(verdict, float(adjusted_H[0]), p_equivalence, reason))
    return decisions


def equivalence_p(one: Contrast, margin: float) -> float:
    """The p-value of two one-sided t tests that the difference is beyond +-margin; 1 where there is no interval.

    Schuirmann, A comparison of the two one-sided tests procedure and the power approach (1987).
    """
    if not margin > 0:
        raise ValueError(f"the margin must be above 0, found {margin}")
    if one.error is None:
        return 1.0
    return float(stdtr(one.df, (abs(one.mean) - margin) / one.error))


def further_seeds(one: Contrast, alpha: float, margin: float | None = None, power: float = 0.8) -> float | None:
    """About how many more seeds would decide a contrast, were the truth what it looks like now.

    The fewest with which the t test, or with a `margin` the two one-sided ones, succeed with probability `power` at
    `alpha` (give alpha / C in a family of C), for a true difference and standard deviation as observed, and fresh seeds
    throughout. An estimate, and a rough one: with 3 to 5 seeds the standard deviation alone is uncertain by a factor of
    two. Where the cells are unpaired, seeds of each. inf for more than 1,000 in all; None where nothing can be said,
    as there is no interval.
    """
    if one.sd is None:
        return None
    effect = abs(one.mean) / one.sd

    def power_of(n: int) -> float:
        df = (n - 1) * (1 if one.paired else 2)
        found = 1 - nctdtr(df, effect * math.sqrt(n), stdtrit(df, 1 - alpha / 2))
        if margin is None:
            return found
        t = stdtrit(df, 1 - alpha)
        below, above = (nctdtr(df, (effect + sign * margin / one.sd) * math.sqrt(n), sign * t) for sign in (-1, 1))
        return max(found, below - above)

    counts = range(one.n + 1, MOST_SEEDS + 1)
    enough = bisect_left(counts, power, key=power_of)
    return counts[enough] - one.n if enough < len(counts) else math.inf


# --- Racing: seeds added one at a time ---


@dataclass(frozen=True)
class Race:
    """Where a race stands: its verdict, and whether to train another seed."""

    verdict: Verdict
    seeds: int  # at which it was decided, or so far
    go_on: bool
    mean: float  # of the first `seeds` differences
    low: float | None  # repeated confidence interval: all looks at all contrasts cover their truths together
    high: float | None


def race(
    differences_S: Sequence[float],
    last: int,
    margin: float | None = None,
    contrasts: int = 1,
    alpha: float = 0.05,
    first: int = 3,
) -> Race:
    """The verdict on a contrast to which paired seeds are added one at a time, from `first` up to `last`.

    A group-sequential t test: after each seed from `first` on, the p-values that `decide` takes are compared with
    levels (`race_levels`) that together spend alpha / `contrasts`, and no more, over all looks up to `last`. Chosen
    over anytime-valid e-processes, which need no `last` but pay for it with seeds, and over levels made for a known
    variance, which with so few seeds err too often by a quarter. The family's error is at most `alpha` whatever the
    other contrasts do, as the shares add up (Bonferroni; `decide` says why a margin leaves little more to be had), and
    whenever somebody stops early: to give up on a contrast leaves it undecided, which is never false. There is no rule
    for giving up: in simulations it cost as much power as it saved seeds.

    What it saves depends on the study: half of the seeds of a fixed design that decides as many contrasts, where two
    thirds of the contrasts are clear (2 standard deviations of the difference on one seed, or more) and `last` leaves
    room for the others; a quarter where half are clear and `last` is tight. Where all contrasts are equally hard, it
    saves little or nothing.

    All looks so far are taken again from the seeds in their order, so that the verdict is that of the first look that
    gave one, however many seeds came later; its interval is as wide as the looks demand, and is not Student's. `last`,
    `contrasts`, `alpha` and `first` must be fixed before the first look. A look at differences that are all equal, or
    at one of them, decides nothing. Assumes normal differences. Raises ValueError for more than `last` differences.

    Jennison & Turnbull, Group Sequential Methods (2000), chapters 7, 9 and 11.
    """
    differences_S = _finite(differences_S, "differences", 1)
    verdicts_K = race_verdicts(differences_S, last, margin, alpha / contrasts, first)
    decided = np.flatnonzero(verdicts_K)
    seeds = first + int(decided[0]) if len(decided) else len(differences_S)
    now = paired_contrast(differences_S[:seeds])
    low = high = None
    if seeds >= first and now.error is not None:
        level = race_levels(first, last, alpha / contrasts / 2)[seeds - first]
        half_width = -float(stdtrit(now.df, level)) * now.error
        low, high = now.mean - half_width, now.mean + half_width
    verdict = VERDICTS[verdicts_K[decided[0]]] if len(decided) else VERDICTS[0]
    return Race(verdict, seeds, not len(decided) and seeds < last, now.mean, low, high)


def race_verdicts(
    differences_XS: np.ndarray, last: int, margin: float | None, alpha: float, first: int = 3
) -> np.ndarray:
    """What each look at one contrast says, from its own seeds alone: the index in `VERDICTS`.

    From differences (..., S) to looks (..., K), the first one after `first` seeds; none where there are fewer. `alpha`
    is the share of this contrast. Raises ValueError for more than `last` differences, or a margin that is not above 0.
    """
    if differences_XS.shape[-1] > last:
        raise ValueError(f"the race ends after {last} seeds, found {differences_XS.shape[-1]}")
    if margin is not None and not margin > 0:
        raise ValueError(f"the margin must be above 0, found {margin}")
    levels_K, equivalence_levels_K = race_levels(first, last, alpha / 2), race_levels(first, last, alpha)
    n_K = np.arange(first, differences_XS.shape[-1] + 1)
    centre_X1 = differences_XS[..., :1]  # against rounding where the differences are large beside their spread
    sums_XK, squares_XK = (
        np.cumsum((differences_XS - centre_X1) ** power, axis=-1)[..., first - 1 :] for power in (1, 2)
    )
    mean_XK = sums_XK / n_K + centre_X1
    variance_XK = np.maximum(squares_XK - sums_XK**2 / n_K, 0) / (n_K - 1)
    known_XK = variance_XK > (1e-10 * np.abs(differences_XS).max(-1, keepdims=True)) ** 2
    error_XK = np.sqrt(np.where(known_XK, variance_XK, 1) / n_K)
    p_XK = stdtr(n_K - 1, -np.abs(mean_XK) / error_XK)
    found_XK = known_XK & (p_XK <= levels_K[: len(n_K)])
    verdicts_XK = np.where(found_XK, np.where(mean_XK > 0, 1, 2), 0)
    if margin is not None:
        p_XK = stdtr(n_K - 1, (np.abs(mean_XK) - margin) / error_XK)
        verdicts_XK[known_XK & (p_XK <= equivalence_levels_K[: len(n_K)])] = 3
    return verdicts_XK


@lru_cache
def race_levels(first: int, last: int, alpha: float) -> np.ndarray:
    """The one-sided levels (K,) for the t tests after `first`, `first` + 1, ... `last` normal values of one sample.

    With a true mean of 0 any of the p-values is at or below its level with probability `alpha`, of which
    alpha * (n / last)**1.5 is spent by the n-th value: between Pocock's boundaries, which stop early, and those of
    O'Brien & Fleming, which keep all for the end (the power family of Kim & DeMets, 1987). Exact for normal values of
    unknown variance at any n, but for the error of the numeric integration (2% of alpha or less). With
    r = t / sqrt(t**2 + n - 1), the cosine between the values and the diagonal, and w the next value over the root mean
    square of those so far,

        r' = (n r + w) / sqrt(n (n + 1) (1 + w**2 / n)),   w ~ Student's t with n degrees of freedom, whatever r is:

    r is a Markov chain, and the probability of each boundary is found by carrying its distribution forward (as
    Armitage, McPherson & Rowe, 1969, did for a known variance). Raises ValueError for looks that are none.
    """
    if not (2 <= first <= last and 0 < alpha < 0.5):
        raise ValueError(f"looks go from 2 seeds or more up to the last, found {first} to {last}; alpha {alpha}")
    n_K = np.arange(first, last + 1)
    spent_K = alpha * (n_K / last) ** 1.5
    levels = [spent_K[0]]
    r_X, mass_X = np.zeros(0), np.zeros(0)  # of the races that go on
    for k, n in enumerate(n_K):
        if k:
            share = spent_K[k] - spent_K[k - 1]

            def missed(log_level: float, share=share, n=n, r_X=r_X, mass_X=mass_X) -> float:
                return mass_X @ _exceeds(_cosine(math.exp(log_level), n), r_X, n - 1) - share

            levels.append(math.exp(brentq(missed, math.log(share) - 1e-9, math.log(alpha) + 1e-9, xtol=1e-6)))
        z_X = np.linspace(-6, -ndtri(levels[-1]), 401)  # edges of 200 bins, and their middles
        edges_X, middles_X = _cosine(ndtr(-z_X[::2]), n), _cosine(ndtr(-z_X[1::2]), n)
        edges_X[0] = -1.0
        if k:
            mass_X = mass_X @ -np.diff(_exceeds(edges_X, r_X[:, None], n - 1), axis=1)
        else:
            mass_X = -np.diff(np.append(1.0, ndtr(-z_X[2::2])))
        r_X = middles_X
    levels_K = np.array(levels)
    levels_K.flags.writeable = False  # it is cached
    return levels_K


def _cosine(level: np.ndarray | float, n: int) -> np.ndarray:
    """The cosine r of `race_levels` that the one-sided t test of n values gives the p-value `level`."""
    t = -stdtrit(n - 1, level)
    return t / np.sqrt(t**2 + n - 1)


def _exceeds(bound: np.ndarray | float, r: np.ndarray, n: int) -> np.ndarray:
    """The probability that one more value takes the cosine r of n values above `bound`."""
    # with w = sqrt(n) tan(a), r' = (sqrt(n) r cos(a) + sin(a)) / sqrt(n + 1): a sine, above it between two angles
    angle = np.arcsin(np.clip(bound * np.sqrt((n + 1) / (1 + n * r**2)), -1, 1))
    ends = [np.clip(end - np.arctan(np.sqrt(n) * r), -np.pi / 2, np.pi / 2) for end in (angle, np.pi - angle)]
    low, high = (stdtr(n, np.sqrt(n) * np.tan(end)) for end in ends)
    return high - low


# --- Factorial designs ---


@dataclass(frozen=True)
class Effect:
    """A main effect, of one change of a level, or an interaction, of two. A change is (factor, from, to)."""

    changes: tuple[tuple[str, str, str], ...]
    contrast: Contrast


def factorial_effects(scores_LS: np.ndarray, factors: Mapping[str, Sequence[str]], level: float = 0.95) -> list[Effect]:
    """Main effects and two-way interactions of a full factorial, paired by seed.

    `scores_LS` has an axis for each factor, in the order of `factors` (name to names of levels), and seeds last. The
    main effect of a level is its score minus that of the factor's first level, with the mean over all levels of the
    other factors. The interaction of two levels is what the change of one adds to the change of the other, again
    against first levels and with the mean over all other factors: (ab - a1 b) - (a b1 - a1 b1), without the half that
    some books put before it. Each is computed on each seed, and Student's t interval is that of these S numbers: what a
    seed does to all cells alike falls out, cells may differ in their variance, and no residuals are pooled. p-values
    are of each effect alone: give the contrasts to `decide` for a family.

    Cells that are one trained network (with one expert the gate is no choice) appear once for each combination, with
    the same scores. That is sound, as cells need not be independent, only seeds; but the change of gate is then exactly
    0 in these cells, and its main effect is the mean over cells with and without a choice, nearer 0 than in those that
    have one. Its interaction with the experts says by how much. An effect that is the same on every seed has no
    interval.

    Raises ValueError where the array does not fit the factors, and for missing scores.
    """
    scores_LS = _finite(scores_LS, "scores", len(factors) + 1)
    shape = tuple(map(len, factors.values()))
    if scores_LS.shape[:-1] != shape:
        raise ValueError(f"scores {scores_LS.shape[:-1]} do not fit the levels {shape} of {', '.join(factors)}")
    names, scale = list(factors), float(np.abs(scores_LS).max())

    def change(factor: str, to: int) -> tuple[str, str, str]:
        return factor, factors[factor][0], factors[factor][to]

    def marginal(*kept: int) -> np.ndarray:
        return scores_LS.mean(axis=tuple(axis for axis in range(len(names)) if axis not in kept))

    effects = []
    for axis, name in enumerate(names):
        mean_LS = marginal(axis)
        for to in range(1, len(mean_LS)):
            one = paired_contrast(mean_LS[to] - mean_LS[0], level, scale=scale)
            effects.append(Effect((change(name, to),), one))
    for (first, name), (second, other) in combinations(enumerate(names), 2):
        mean_LMS = marginal(first, second)
        for to, also in np.ndindex(mean_LMS.shape[0] - 1, mean_LMS.shape[1] - 1):
            to, also = to + 1, also + 1
            adds_S = (mean_LMS[to, also] - mean_LMS[0, also]) - (mean_LMS[to, 0] - mean_LMS[0, 0])
            one = paired_contrast(adds_S, level, scale=scale)
            effects.append(Effect((change(name, to), change(other, also)), one))
    return effects


# --- The best cell ---


def probability_best(scores_CS: np.ndarray, draws: int = 20_000, seed: int = 0) -> np.ndarray:
    """The probability (C,) that each cell has the highest true mean, from scores that are paired by seed.

    Bayesian: the means are drawn from Student's multivariate t around those observed, with their covariance over seeds
    and S - 1 degrees of freedom, so that of two cells the probability is 1 less the one-sided p-value of their paired t
    test (flat priors). All cells are drawn together, as seeds are shared. A bootstrap over seeds, which it resembles
    with many of them, is too sure with few: of 3 seeds it draws 10 different sets. Equal cells share. It is not a test:
    of 10 equal cells one may have 0.5. From `draws` drawn with `seed`, and so exact to about 0.01. Raises ValueError
    for fewer than two seeds.
    """
    scores_CS = _finite(scores_CS, "scores", 2)
    n = scores_CS.shape[1]
    if n < 2:
        raise ValueError("the probability to be the best needs two seeds or more")
    mean_C = scores_CS.mean(1)
    generator = np.random.default_rng(seed)
    weights_XS = generator.normal(size=(draws, n)) / np.sqrt(n * generator.chisquare(n - 1, size=(draws, 1)))
    means_XC = mean_C + weights_XS @ (scores_CS - mean_C[:, None]).T
    best_XC = _highest(means_XC)
    return (best_XC / best_XC.sum(1, keepdims=True)).mean(0)


def _highest(values_XC: np.ndarray) -> np.ndarray:
    """Where the values are the highest of their row, but for rounding."""
    return values_XC >= values_XC.max(-1, keepdims=True) - 1e-12 * np.abs(values_XC).max()


@dataclass(frozen=True)
class Winner:
    """The cell that is best on validation, and what its test score is worth."""

    cell: int
    reported: Interval  # its test score over all seeds
    corrected: Interval | None  # the test score of winners on seeds that did not choose them; None for one seed
    agreement: float | None  # the share of seeds without which the same cell wins

    @property
    def optimism(self) -> float | None:
        """How much better the reported score is than the corrected one."""
        return None if self.corrected is None else self.reported.mean - self.corrected.mean


def winner(validation_CS: np.ndarray, test_CS: np.ndarray) -> Winner:
    """The cell with the highest mean on validation (the first of equals), and its test score, corrected for the choice.

    To choose on validation does not bias the test score by way of the images: the splits share none. It does by way
    of the seeds: a cell that was lucky with its seeds is lucky on both splits, and the best of C cells is likely to
    have been. So each seed is left out in turn, the winner is chosen by validation on the others, and its test
    score (the mean of equals) is read on the one left out; the mean of these has no such bias, and is what the rule
    "take the best on validation" gives with S - 1 seeds. (Cross-validation over seeds: Stone, 1974. A bootstrap
    that reads the seeds that were not drawn does the same with a third of the seeds left out, and with chance.)
    With S - 1 seeds the choice is a little worse, so `optimism` is rather too large than too small, and with few
    seeds it is noisy and may be negative. The interval of `corrected` is approximate, as the choices share seeds.
    Raises ValueError for shapes that differ.
    """
    validation_CS, test_CS = _finite(validation_CS, "scores", 2), _finite(test_CS, "scores", 2)
    if validation_CS.shape != test_CS.shape:
        raise ValueError(
            f"validation {validation_CS.shape} and test {test_CS.shape} are not of the same cells and seeds"
        )
    n = validation_CS.shape[1]
    cell = int(_highest(validation_CS.mean(1)).argmax())
    reported = mean_interval(test_CS[cell])
    if n == 1:
        return Winner(cell, reported, None, None)
    without_SC = np.array([np.delete(validation_CS, seed, axis=1).mean(1) for seed in range(n)])
    chosen_SC = _highest(without_SC)  # equal ones share: the winner owes its place to the seed left out
    corrected_S = (chosen_SC * test_CS.T).sum(1) / chosen_SC.sum(1)
    return Winner(cell, reported, mean_interval(corrected_S), float(chosen_SC[:, cell].mean()))


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


# --- One network on its images ---


def calibration_error(
    probabilities_BN: np.ndarray, labels_B: np.ndarray, bins: int = 15, equal: Literal["width", "mass"] = "width"
) -> float:
    """The expected calibration error: the mean distance of confidence and accuracy over bins, weighted by images.

    Confidence is the highest probability. Bins of equal width are (0, 1/bins], (1/bins, 2/bins], ...: Guo et al., On
    Calibration of Modern Neural Networks (2017). Bins of equal mass hold the same number of images, or one less, in the
    order of their confidence: Nguyen & O'Connor (2015). Both are above 0 for a network that is perfectly calibrated,
    the more so the fewer the images in a bin. Raises ValueError for probabilities that do not sum to 1.
    """
    probabilities_BN, labels_B = _probabilities(probabilities_BN, labels_B)
    confidence_B = probabilities_BN.max(1)
    gap_B = (probabilities_BN.argmax(1) == labels_B) - confidence_B
    if equal == "mass":
        order_B = np.argsort(confidence_B, kind="stable")
        return float(sum(abs(gap_B[bin_B].sum()) for bin_B in np.array_split(order_B, bins)) / len(gap_B))
    bin_B = np.digitize(confidence_B, np.linspace(0, 1, bins + 1)[1:-1], right=True)
    return float(np.abs(np.bincount(bin_B, gap_B)).sum() / len(gap_B))


def _probabilities(probabilities_BN: np.ndarray, labels_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    probabilities_BN, labels_B = _finite(probabilities_BN, "probabilities", 2), np.asarray(labels_B)
    if labels_B.shape != probabilities_BN.shape[:1]:
        raise ValueError(f"{len(probabilities_BN)} images have {labels_B.shape} labels")
    if (probabilities_BN < 0).any() or np.abs(probabilities_BN.sum(1) - 1).max() > 1e-3:
        raise ValueError("probabilities must sum to 1 for each image; these look like logits")
    return probabilities_BN, labels_B


def confusion_matrix(labels_B: np.ndarray, predicted_B: np.ndarray, classes: int) -> np.ndarray:
    """Counts (N, N) of images: rows are what they are, columns what they were taken for.

    Raises ValueError for a class that is not within 0 and `classes` - 1, and for shapes that differ.
    """
    labels_B, predicted_B = np.asarray(labels_B), np.asarray(predicted_B)
    if labels_B.shape != predicted_B.shape or labels_B.ndim != 1:
        raise ValueError(f"found {labels_B.shape} labels and {predicted_B.shape} predictions")
    for values_B in (labels_B, predicted_B):
        if values_B.size and (values_B.min() < 0 or values_B.max() >= classes):
            raise ValueError(f"classes go from 0 to {classes - 1}, found {values_B.min()} to {values_B.max()}")
    return np.bincount(labels_B * classes + predicted_B, minlength=classes**2).reshape(classes, classes)


@dataclass(frozen=True)
class Share:
    """A share of images with its interval; None of no images."""

    right: int
    images: int
    share: float | None
    low: float
    high: float


def wilson(right: int, images: int, level: float = 0.95) -> Share:
    """A share with Wilson's score interval (1927), for images that were drawn at random: of one network, not of a cell.

    Raises ValueError for more right ones than images.
    """
    if not 0 <= right <= images:
        raise ValueError(f"{right} of {images} images are no share")
    if images == 0:
        return Share(0, 0, None, 0.0, 1.0)
    share, z2 = right / images, float(ndtri((1 + level) / 2)) ** 2
    centre = (share + z2 / (2 * images)) / (1 + z2 / images)
    half_width = math.sqrt(z2 * (share * (1 - share) / images + z2 / (4 * images**2))) / (1 + z2 / images)
    return Share(right, images, share, max(0.0, centre - half_width), min(1.0, centre + half_width))


def class_accuracies(confusion_NN: np.ndarray, level: float = 0.95) -> list[Share]:
    """For each class the share of its images that were taken for it, with Wilson's interval."""
    return [wilson(int(row_N[i]), int(row_N.sum()), level) for i, row_N in enumerate(np.asarray(confusion_NN))]
