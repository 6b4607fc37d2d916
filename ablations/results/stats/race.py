"""A race: seeds are added until every contrast of a family is decided, or the last seed came.

A look is taken after `first` seeds, `first` + 1, ... `last`. It judges as a fixed design does: the same contrasts, the
same errors from pooled residuals, the same verdicts. Only its critical values are higher, so that all looks at all
contrasts together err with probability 5%: look n of N takes the joint t constant at the level a (n / N)**`SHAPE`, and
`a` is found by simulation of the looks (as in error spending: Jennison & Turnbull, Group Sequential Methods, 2000,
chapters 7 and 19). A contrast that has a verdict keeps it, and a cell that no open contrast needs gets no more seeds.

That cells drop out does not bend what is left: an open contrast has all seeds of all of its cells, and its estimate
does not depend on other cells. Where a race stands follows from the scores alone, so that an interrupted one goes on.

Shapes: Q contrasts, C cells, S seeds, K looks, X simulated races, R the contrasts' rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from expertgrid.ablations.results.stats.contrasts import OPEN, Judgement, checked, errors, judged, without_verdict
from expertgrid.ablations.results.stats.critical import LEVEL, JointT, correlation, joint_t

FIRST = 4  # seeds of the first look: fewer know the spread too badly
# between Pocock's boundaries, which stop early, and those of O'Brien and Fleming, which keep all for the end
SHAPE = 1.5
PATHS = 100_000


@dataclass(frozen=True)
class RaceState:
    """Where a race stands. An open contrast has the interval of the last look that was taken, if there was one."""

    judgements: list[Judgement]  # `seeds` is the look that gave the verdict
    wanted_C: np.ndarray  # seeds of each cell that the next look needs; for cells that are done, that they needed
    go_on: bool  # whether there is a next look


def race(
    weights_QC: np.ndarray,
    scores_CS: np.ndarray,
    margin: float,
    last: int,
    first: int = FIRST,
    no_verdict: Mapping[int, str] | None = None,
) -> RaceState:
    """The verdicts of a race so far, from scores (NaN where a trial was not trained), and what to train next.

    `weights_QC`, `margin`, `first` and `last` must be fixed before the first look. All looks are taken again
    from the seeds in their order; what was trained beyond a look does not count in it. A cell of `no_verdict` ends its
    contrasts with that reason. Raises ValueError as `judge` does, for a first look at fewer than 4 seeds, and for more
    seeds than `last`.
    """
    weights_QC, scores_CS = checked(weights_QC, scores_CS, margin)
    if not FIRST <= first <= last:
        raise ValueError(f"a race looks first at {FIRST} seeds or more, and last at no fewer; found {first} and {last}")
    if scores_CS.shape[1] > last:
        raise ValueError(f"the race ends after {last} seeds, found {scores_CS.shape[1]}")
    count, joint = len(scores_CS), joint_t(correlation(weights_QC))
    scores_CS = np.pad(scores_CS, ((0, 0), (0, last - scores_CS.shape[1])), constant_values=np.nan)
    judgements = [
        without_verdict(weights_C, no_verdict or {}) or Judgement(OPEN, 0, reason=f"fewer than {first} seeds")
        for weights_C in weights_QC
    ]
    wanted_C = np.zeros(count, dtype=int)
    for n, alpha in zip(range(first, last + 1), look_levels(joint, count, first, last, 1 - LEVEL)):
        open_Q = [place for place, judgement in enumerate(judgements) if judgement.verdict == OPEN]
        if not open_Q:
            return RaceState(judgements, wanted_C, go_on=False)
        wanted_C[(weights_QC[open_Q] != 0).any(0)] = n
        looked_CS = np.where(np.arange(last) < wanted_C[:, None], scores_CS, np.nan)
        if (~np.isnan(looked_CS)).sum() < wanted_C.sum():
            return RaceState(judgements, wanted_C, go_on=True)
        estimates = errors(weights_QC[open_Q], looked_CS)
        constant = joint.constant(estimates.df, 1 - alpha)
        estimates = estimates._replace(constant_Q=np.full(len(open_Q), constant))
        for place, contrast in enumerate(open_Q):
            judgements[contrast] = judged(estimates, place, margin)
    return RaceState(judgements, wanted_C, go_on=False)


@lru_cache(maxsize=64)
def look_levels(joint: JointT, cells: int, first: int, last: int, alpha: float) -> np.ndarray:
    """The levels (K,) at which the looks after `first`, ... `last` seeds take their constants.

    Any |t| of any contrast at any look is above its constant with probability `alpha`, for `cells` cells that have all
    seeds and a common spread, by simulation: within 4% of `alpha`, for 200 contrasts 10%.
    """
    root_QR, rng = joint.root_QR, np.random.default_rng(0)
    n_K = np.arange(first, last + 1)
    share_K = (n_K / last) ** SHAPE
    paths = min(PATHS, max(10_000, 30_000_000 // (root_QR.size * len(n_K))))
    sum_XQ, squares_X = np.zeros((paths, len(root_QR))), np.zeros(paths)
    smallest_X = np.full(paths, np.inf)
    for n, share in zip(n_K, share_K):
        more = first if n == first else 1
        sum_XQ += rng.normal(0, more**0.5, size=(paths, root_QR.shape[1])) @ root_QR.T
        squares_X += rng.chisquare((cells - 1) * (more - (n == first)), paths)
        df = (cells - 1) * (n - 1)
        largest_X = np.abs(sum_XQ).max(1) / np.sqrt(n * squares_X / df)
        smallest_X = np.minimum(smallest_X, joint.tails(largest_X, df) / share)
    levels_K = np.quantile(smallest_X, alpha) * share_K
    levels_K.flags.writeable = False  # the cache shares it
    return levels_K
