"""Times of candidates that take turns, and what they say about which is faster.

A program runs faster or slower by some percent each time that it is opened, by where its memory happens to lie; and a
machine's speed changes while it works. So each candidate is opened several times. In each opening the candidates run in
short blocks in a random order, and neighbouring blocks are compared. Between blocks the threads of a candidate come to
rest: ONNX Runtime's spin for 40 ms after a call, on cores that the next candidate needs.
"""

import itertools
import math
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import numpy as np
from scipy.special import stdtrit

from expertgrid.model.system.text import Measured

Key = TypeVar("Key")
Call = Callable[[], object]

OPENINGS = 24
LEAST_OPENINGS = 7  # where a call takes longer than a block, or all others differ from the first candidate by far
FAR = 0.1  # from 1, for the whole interval of a ratio
BLOCK_S = 0.02
LEAST_BLOCKS = 4  # of a candidate in an opening
CHUNKS = 8  # of calls whose times are tested for a trend, while warming up
CHUNK_S = 0.02
LONGEST_WARM_UP_S = 2.0  # of a candidate in its first opening, and at most twice what is measured
AGAIN_S = 0.04  # of a candidate in each later opening
RAMP_S = 0.005  # of the calls at the start of a block that are not counted: after the rest, caches are cold
LOOK_S = 0.002  # between looks at what threads do
TICK_S = 0.01  # in which a system's clock of the time that threads had goes on
LONGEST_REST_S = 0.3
TASKS = Path("/proc/self/task")  # the threads of this process, as Linux shows them
LEVEL = 0.95  # of intervals of percentiles
VERDICT_LEVEL = 0.98  # a file against itself is then called faster or slower twice in 100 times
TRIM = 0.2  # of the openings, that do not count at either end
RESAMPLES = 400

Word = Literal["faster", "slower", "can't tell"]


class Block(NamedTuple):
    """Calls of a candidate in a row."""

    opening: int
    calls_ms: Sequence[float]
    joules: float | None = None  # that the device used, where a meter says it


class Timer:
    """Times the calls of a candidate that is open."""

    def __init__(self, call: Call):
        self.call = call

    def timed(self, count: int) -> list[float]:
        """Milliseconds of each of `count` calls."""
        clock, call, stamps = time.perf_counter_ns, self.call, [0] * (count + 1)
        stamps[0] = clock()
        for i in range(1, count + 1):
            call()
            stamps[i] = clock()
        return [(after - before) / 1e6 for before, after in itertools.pairwise(stamps)]

    def warm_up(self, longest_s: float) -> tuple[float, bool]:
        """Calls until the times have no trend; the seconds of a call, and whether that was reached.

        The test is Kendall's, on the medians of the last chunks of calls, at 5%.
        """
        started = time.perf_counter()
        self.call()
        chunks: list[float] = []
        while True:
            begun, calls_ms = time.perf_counter(), []
            while not calls_ms or time.perf_counter() - begun < CHUNK_S:
                calls_ms += self.timed(1)
            chunks.append(float(np.median(calls_ms)))
            last = chunks[-CHUNKS:]
            if len(last) == CHUNKS and not has_trend(last):
                return float(np.median(last)) / 1000, True
            if time.perf_counter() - started > longest_s:
                return float(np.median(last)) / 1000, len(last) < CHUNKS  # too few calls to see a trend

    def rest(self) -> None:
        """Waits until no other thread of the process computes, LONGEST_REST_S at most."""
        until = time.perf_counter() + LONGEST_REST_S
        while time.perf_counter() < until and _others_compute():
            time.sleep(LOOK_S)


@dataclass
class Times:
    """All calls of a candidate that count. The blocks of all candidates of a run are in the same order."""

    blocks: list[Block] = field(default_factory=list)
    steady: bool = True  # its times had no trend after the first warm-up

    @property
    def calls_ms(self) -> list[float]:
        return [ms for block in self.blocks for ms in block.calls_ms]

    @property
    def openings(self) -> list[list[Block]]:
        numbers = sorted({block.opening for block in self.blocks})
        return [[block for block in self.blocks if block.opening == number] for number in numbers]


class Ratio(Measured):
    """How many times as fast one candidate is as another, with the interval of the verdict."""

    @property
    def word(self) -> Word:
        return "faster" if self.low > 1 else "slower" if self.high < 1 else "can't tell"


def take_turns(
    candidates: Mapping[Key, Callable[[], Timer]],
    measure_s: float = 1.0,
    openings: int | None = None,
    meter: Callable[[], float | None] = lambda: None,
) -> dict[Key, Times]:
    """Times of each candidate's calls, about `measure_s` seconds of each.

    A candidate is a function that opens it. Each is opened `openings` times, or else OPENINGS times, and LEAST_OPENINGS
    times where these are enough. `meter` gives the joules that the device has used so far.
    """
    times: dict[Key, Times] = {key: Times() for key in candidates}
    measured = dict.fromkeys(candidates, 0.0)
    order, most, slow = random.Random(0), openings or OPENINGS, False
    warm_up_s = min(LONGEST_WARM_UP_S, 2 * measure_s)
    for opening in range(most):
        is_last = openings is None and opening + 1 >= LEAST_OPENINGS and (slow or _far_apart(times))
        timers = {key: candidates[key]() for key in _shuffled(candidates, order)}
        call_s: dict[Key, float] = {}
        for key, timer in timers.items():
            call_s[key], steady = timer.warm_up(AGAIN_S if opening else warm_up_s)
            times[key].steady &= steady or opening > 0
            timer.rest()
        block_s = max(BLOCK_S, *call_s.values())
        slow |= block_s > BLOCK_S
        goal_s, previous = measure_s * (1.0 if is_last else (opening + 1) / most), None
        for done in itertools.count():
            if done >= LEAST_BLOCKS and min(measured.values()) >= goal_s:
                break
            for key in _shuffled(timers, order):
                if previous not in (None, key):
                    timers[previous].rest()
                previous = key
                for _ in range(max(1, round(RAMP_S / call_s[key]))):
                    timers[key].call()
                before = meter()
                calls_ms = timers[key].timed(max(1, round(block_s / call_s[key])))
                after = meter()
                joules = None if before is None or after is None else after - before
                times[key].blocks.append(Block(opening, calls_ms, joules))
                measured[key] += sum(calls_ms) / 1000
        if is_last:
            break
    return times


def _far_apart(times: Mapping[Key, Times]) -> bool:
    """Whether all others are much faster or slower than the first, so that more openings would not change a verdict."""
    first, *others = times.values()
    ratios = [compare(first, other) for other in others]
    return all(ratio.low > 1 + FAR or ratio.high < 1 - FAR for ratio in ratios)


def _others_compute() -> bool:
    """Whether another thread of this process computes. Where the system does not say it, this takes TICK_S."""
    if not TASKS.exists():
        before = time.process_time()
        time.sleep(TICK_S)
        return time.process_time() - before > TICK_S / 10
    this = str(threading.get_native_id())
    for task in TASKS.iterdir():
        with suppress(OSError):  # a thread that has ended meanwhile
            if task.name != this and (task / "stat").read_text().rpartition(")")[2].split()[0] == "R":
                return True
    return False


def has_trend(values: Sequence[float]) -> bool:
    """Whether values rise or fall with time, by Kendall's test at 5%."""
    from scipy import stats  # slow to import, and tables read records of times

    return bool(stats.kendalltau(range(len(values)), values).pvalue < 0.05)


def calls_needed(percentile: float) -> int:
    """The calls from which a percentile has a 95% interval whatever the distribution: p50 6, p90 36, p99 368."""
    share = max(percentile, 100 - percentile) / 100
    return math.ceil(math.log((1 - LEVEL) / 2) / math.log(share))


def percentiles(times: Times, percents: Sequence[float]) -> list[Measured | None]:
    """Percentiles of the calls in milliseconds, with bootstrap intervals; None where there are too few calls.

    Openings are drawn, then blocks of each: calls next to each other are alike.
    """
    openings = [[np.asarray(block.calls_ms) for block in blocks] for blocks in times.openings]
    rng = np.random.default_rng(0)
    drawn = np.empty((RESAMPLES, len(percents)))
    for row in drawn:
        picked = [
            openings[i][j]
            for i in rng.integers(len(openings), size=len(openings))
            for j in rng.integers(len(openings[i]), size=len(openings[i]))
        ]
        row[:] = np.percentile(np.concatenate(picked), percents)
    calls_ms = times.calls_ms
    values = np.percentile(calls_ms, percents)
    ends = np.percentile(drawn, (50 * (1 - LEVEL), 50 * (1 + LEVEL)), axis=0)
    estimates = [Measured(*map(float, estimate)) for estimate in zip(values, *ends)]
    return [value if len(calls_ms) >= calls_needed(p) else None for value, p in zip(estimates, percents)]


def compare(first: Times, second: Times) -> Ratio:
    """How many times as fast `second` is as `first`, of one run of `take_turns`.

    In each opening, the median over pairs of neighbouring blocks of the logarithm of their medians' ratio. Then
    `typical_ratio` over openings, as these are what a new run would draw again.
    """
    return typical_ratio(
        [
            float(np.median([_log_median(a) - _log_median(b) for a, b in zip(of_first, of_second, strict=True)]))
            for of_first, of_second in zip(first.openings, second.openings, strict=True)
        ]
    )


def typical_ratio(logs: Sequence[float]) -> Ratio:
    """The trimmed mean of logarithms of ratios, with Student's interval for it (Yuen's), as a ratio.

    A burst of other work on the machine spoils some of them, and the others count. The interval of a single one is
    without end.
    """
    return _ratio(*_trimmed(logs))


def compare_runs(first: Times, second: Times) -> Ratio:
    """As `compare`, of two runs: Welch's interval. What changed the machine's speed between them is not in it."""
    logs = [
        [float(np.median(list(map(_log_median, blocks)))) for blocks in times.openings] for times in (first, second)
    ]
    (mean, error, df), (other, other_error, other_df) = map(_trimmed, logs)
    parts = error**2, other_error**2
    total = sum(parts)
    if not 0 < total < math.inf:
        return _ratio(mean - other, math.sqrt(total), 1)
    return _ratio(mean - other, math.sqrt(total), total**2 / (parts[0] ** 2 / df + parts[1] ** 2 / other_df))


def _trimmed(values: Sequence[float]) -> tuple[float, float, int]:
    """The mean without the lowest and highest TRIM of the values, Yuen's standard error, and the degrees of freedom."""
    cut, ordered = int(TRIM * len(values)), np.sort(values)
    left = len(values) - 2 * cut
    if left < 2:
        return float(np.mean(values)), math.inf, 1
    inner = ordered[cut : cut + left]
    winsorised = np.clip(ordered, inner[0], inner[-1])
    squares = (len(values) - 1) * np.var(winsorised, ddof=1)
    return float(np.mean(inner)), math.sqrt(squares / (left * (left - 1))), left - 1


def _ratio(log: float, error: float, df: float) -> Ratio:
    half = float(stdtrit(max(df, 1), (1 + VERDICT_LEVEL) / 2)) * error if error else 0.0
    return Ratio(math.exp(log), math.exp(log - half), math.exp(log + half) if half < 700 else math.inf)


def _log_median(block: Block) -> float:
    return math.log(float(np.median(block.calls_ms)))


def _shuffled(keys: Mapping[Key, object], order: random.Random) -> list[Key]:
    return order.sample(list(keys), len(keys))
