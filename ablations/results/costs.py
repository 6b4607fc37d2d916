"""What a change costs: ratios of parameters, multiply-accumulates, training time and latency, after over before.

Each is the geometric mean over the matched cells. Parameters and multiply-accumulates are exact. A ratio of times has
an interval:

- *training time*, where each cell was timed alone and in turns: Student's t interval at 95% of the logarithm of the
  ratio over the rounds, in each of which all cells were timed; else the same over the seeds that all cells have, of
  trainings that were timed one at a time on one machine;
- *latency*, of files that were timed in turns: the low end of the one over the high end of the other, which is wider
  than 95% needs.

One round or seed, or equal ones, give no interval.

Shapes: P pairs of cells, N rounds or seeds.
"""

from collections.abc import Sequence

import numpy as np

from expertgrid.ablations.records.record import Record
from expertgrid.ablations.results.rows import Row, latency_run, smallest
from expertgrid.ablations.results.stats.selection import mean_interval
from expertgrid.bench.record import Latency
from expertgrid.model.system.text import MeasuredMultiple, Multiple

Costs = dict[str, Multiple | MeasuredMultiple]


def costs(pairs: Sequence[tuple[Row, Row]]) -> Costs:
    """The costs after over before of pairs (before, after), by their names; what cannot be compared is left out."""
    rows = [row for pair in pairs for row in pair]
    if not rows or not all(row.by_seed for row in rows):
        return {}
    records = [row.records[0] for row in rows]
    parameters, macs = [record.parameters for record in records], [record.macs for record in records]
    ratios: Costs = {"parameters": _exact(parameters), "MACs": _exact(macs)}
    if seconds := _training_seconds(rows):
        logs_PN = np.log([np.divide(seconds[after], seconds[before]) for before, after in pairs])
        mean, *ends = mean_interval(logs_PN.mean(0))
        low, high = (None if end is None else float(np.exp(end)) for end in ends)
        ratios["training time"] = MeasuredMultiple(float(np.exp(mean)), low, high)
    latencies = [smallest(row.latency) for row in rows if row.latency]
    if len(latencies) == len(rows) and len({latency_run(row.latency) for row in rows if row.latency}) == 1:
        ratios["latency"] = _latency_ratio(latencies[::2], latencies[1::2])
    return ratios


def _mean_ratio(before: Sequence[float], after: Sequence[float]) -> float:
    """The geometric mean."""
    return float(np.exp(np.mean(np.log(after) - np.log(before))))


def _exact(values: Sequence[int]) -> Multiple:
    """Of values before and after by turns."""
    return Multiple(_mean_ratio(values[::2], values[1::2]))


def _training_seconds(rows: Sequence[Row]) -> dict[Row, Sequence[float]] | None:
    """Times of training (N,) for each row, measured together; None where they cannot be compared."""
    if all(row.alone for row in rows):
        rounds = {row: row.rounds for row in rows}
        if len({len(rates) for rates in rounds.values()}) > 1 or not all(rounds.values()):
            rounds = {row: (row.alone or 1,) for row in rows}
        return {row: [1 / rate for rate in rates] for row, rates in rounds.items()}
    seeds = sorted(set.intersection(*(set(row.by_seed) for row in rows)))
    if not seeds or not _timed_alike(rows):
        return None
    return {row: [row.by_seed[seed].train_seconds for seed in seeds] for row in rows}


def _timed_alike(rows: Sequence[Row]) -> bool:
    """Whether trainings were timed here, one at a time, on one machine and with the same options."""
    if any(row.adopted or row.packed for row in rows):
        return False
    return len({_machine(record) for row in rows for record in row.records}) == 1


def _machine(record: Record) -> tuple:
    machine = record.environment
    execution = record.bfloat16, record.kernels, record.compiled, record.graphs
    return machine.device, machine.cpu, machine.threads, machine.cores, machine.versions.get("torch"), *execution


def _latency_ratio(before: Sequence[Latency], after: Sequence[Latency]) -> MeasuredMultiple:
    value = _mean_ratio([timed.p50_ms for timed in before], [timed.p50_ms for timed in after])
    if not all("p50" in timed.intervals_ms for timed in (*before, *after)):
        return MeasuredMultiple(value)
    ends = [[timed.intervals_ms["p50"] for timed in of] for of in (before, after)]
    (low_before, high_before), (low_after, high_after) = (zip(*intervals) for intervals in ends)
    return MeasuredMultiple(value, _mean_ratio(high_before, low_after), _mean_ratio(low_before, high_after))
