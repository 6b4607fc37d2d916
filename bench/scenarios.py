"""The four scenarios of MLPerf Inference, through its own load generator.

single-stream   one image at a time, the next when the last is done       90th percentile of latency
multi-stream    8 images at a time, likewise                              99th percentile of latency
offline         all images at once, in batches of the best size           images a second
server          images arrive at random (Poisson), and wait in a queue    the highest rate whose 99th percentile of
                                                                          latency is under a bound

Reddi et al., "MLPerf Inference Benchmark" (2020). A number of these is no MLPerf result: that needs MLPerf's models,
data and accuracy, and longer runs.
"""

import json
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from expertgrid.bench.engines import Engine, Run, engines
from expertgrid.bench.host import Host, watched
from expertgrid.bench.latency import input_type, open_run, random_images
from expertgrid.bench.timing import Timer, calls_needed
from expertgrid.export.describe import read_onnx
from expertgrid.export.session import check_provider
from expertgrid.model.system.errors import InputError

Scenario = Literal["single-stream", "multi-stream", "offline", "server"]

PERCENTILE = {"single-stream": 90, "multi-stream": 99, "server": 99}
RULE_S = 600.0  # MLPerf's least duration of a run
RULE_QUERIES = {"multi-stream": 662, "offline": 24_576}  # and its least queries, or samples
RATES = {"offline": "result_samples_per_second", "server": "result_completed_samples_per_sec"}  # in the log
IMAGES = 64  # that are kept in memory and sent again and again
STREAMS = 8  # images of a query of multi-stream
MOST_TOGETHER = 8  # images that the server takes from its queue at once
MOST_BATCH = 1024
LONGEST_BATCH_S = 1.0
NEAR = 1.05  # the search for a rate ends where the highest that holds and the lowest that does not are this close
MOST_HALVINGS = 8
SEEDS = {"qsl_rng_seed": 1, "sample_index_rng_seed": 2, "schedule_rng_seed": 3}


@dataclass(frozen=True)
class Load:
    """A run of the load generator."""

    latency_ms: float  # at the scenario's percentile
    images_per_s: float
    queries: int
    seconds: float


@dataclass(frozen=True)
class Result:
    """What a file does in a scenario."""

    file: str
    engine: str
    scenario: Scenario
    batch: int  # images that are computed together, at most
    load: Load
    rate: float | None = None  # of arrivals; None for other scenarios
    too_high: float | None = None  # the lowest rate that was tried and did not hold the bound

    @property
    def shorter(self) -> str:
        """How the run falls short of MLPerf's rules; "" where it does not."""
        least = RULE_QUERIES.get(self.scenario, 0)
        if self.load.seconds >= RULE_S and self.load.queries >= least:
            return ""
        rules = f"{RULE_S:.0f} s" + (f" and {least:,} queries" if least else "")
        return f"{self.load.seconds:.1f} s and {self.load.queries:,} queries, where MLPerf's rules ask for {rules}"


def measure_scenario(
    paths: Sequence[Path],
    scenario: Scenario,
    provider: str,
    kinds: Sequence[str],
    seconds: float,
    bound_ms: float = 10.0,
) -> tuple[list[Result], Host]:
    """Each file and engine in a scenario, one after another; every run takes `seconds` or longer.

    Raises InputError as `engines`, where the load generator is not installed, for a file whose batch size is fixed to
    another than the scenario needs, and where no rate of arrivals holds the bound.
    """
    load_generator()
    check_provider(provider)
    results: list[Result] = []
    with watched(provider != "cpu") as host:
        for path in paths:
            model = read_onnx(path)
            for engine in engines(model, str(path), provider, kinds)[0].values():
                results.append(_measure(path, model, engine, scenario, seconds, bound_ms))
    return results, host


def _measure(path: Path, model: bytes, engine: Engine, scenario: Scenario, seconds: float, bound_ms: float) -> Result:
    images, fixed = random_images(model, IMAGES), fixed_batch(model)
    sent = {"single-stream": 1, "multi-stream": STREAMS, "server": 1}.get(scenario, fixed or 1)
    if fixed and fixed != sent:
        raise InputError(f"{path}: has a fixed batch of {fixed}; {scenario} sends {sent} at a time")

    def open_at(batch: int) -> Run:
        return open_run(engine, taken(images, range(batch)))

    run, name = open_at(sent), (path.name, engine.title, scenario)
    if scenario == "offline":
        batch = fixed or best_batch(lambda size: batch_rate(open_at(size), images, size))
        rate = batch_rate(open_at(batch), images, batch)
        return Result(*name, batch, generate(run, images, scenario, seconds, batch, rate=rate))
    if scenario != "server":
        return Result(*name, sent, generate(run, images, scenario, seconds, sent))
    together = fixed or MOST_TOGETHER
    open_at(together)
    rate, load, too_high = highest_rate(
        lambda rate: generate(run, images, "server", seconds, together, rate=rate),
        bound_ms,
        batch_rate(run, images, 1),
    )
    if rate is None:
        raise InputError(
            f"--bound-ms {bound_ms:g}: {path} in {engine.title} does not hold it at {too_high:.3g} images/s either, "
            f"where the 99th percentile is {load.latency_ms:.3g} ms"
        )
    return Result(*name, together, load, rate, too_high)


def taken(images: np.ndarray, places: Sequence[int]) -> np.ndarray:
    """The images at these places, copied; from the start again where there are too few."""
    return images[np.asarray(places) % len(images)]


def fixed_batch(model: bytes) -> int | None:
    """The batch size of a model whose input has one, else None."""
    return input_type(model).shape.dim[0].dim_value or None


# --- Searches ---


def batch_rate(run: Run, images: np.ndarray, batch: int) -> float:
    """Images a second at a batch size: the median of a fifth of a second of calls, at least 3."""
    timer, calls_ms = Timer(partial(run, taken(images, range(batch)))), []
    while len(calls_ms) < 3 or sum(calls_ms) < 200:
        calls_ms += timer.timed(1)
    return 1000 * batch / float(np.median(calls_ms))


def best_batch(rate: Callable[[int], float]) -> int:
    """The batch size with the highest rate: sizes are doubled until two in a row gain nothing, or take too long."""
    rates: dict[int, float] = {}
    size = best = 1
    while size <= MOST_BATCH:
        rates[size] = rate(size)
        best = max(rates, key=rates.__getitem__)
        if size >= 4 * best or size / rates[size] > LONGEST_BATCH_S:
            break
        size *= 2
    return best


def highest_rate(
    load_at: Callable[[float], Load], bound_ms: float, first: float
) -> tuple[float | None, Load, float | None]:
    """The highest rate of arrivals whose latency holds the bound, its last run, and the lowest rate that failed.

    From `first` the rate is doubled or halved until the bound lies between two rates; then the middle is tried until
    they are near. The rate that is found is loaded once more, and lowered until it holds again: of several noisy runs
    the luckiest was chosen. The rate is None where even the lowest that was tried fails.
    """
    holds, fails, rate, lowest = 0.0, 0.0, first, first / 2**MOST_HALVINGS
    while not (holds and fails and fails / holds <= NEAR):
        load = load_at(rate)
        if load.latency_ms <= bound_ms:
            holds = rate
        else:
            fails = rate
        if not holds and fails < lowest:
            return None, load, fails
        rate = holds * 2 if not fails else fails / 2 if not holds else (holds * fails) ** 0.5
    while (load := load_at(holds)).latency_ms > bound_ms:
        holds, fails = holds / NEAR, holds
        if holds < lowest:
            return None, load, fails
    return holds, load, fails


# --- The load generator ---


def load_generator() -> Any:
    """MLPerf's load generator. Raises InputError where it is not installed."""
    try:
        import mlperf_loadgen  # ty: ignore[import-not-found]  # compiled
    except ImportError:
        raise InputError("--scenario: needs MLPerf's load generator: `uv sync --extra loadgen`") from None
    return mlperf_loadgen


def generate(run: Run, images: np.ndarray, scenario: Scenario, seconds: float, batch: int, rate: float = 0.0) -> Load:
    """Loads an engine for `seconds` or longer: until there are enough queries for the scenario's percentile.

    `batch` is how many images are computed together: all of a query, or at most as many as wait in the server's queue.
    `rate` is that of arrivals, or what is expected offline.
    """
    generator = load_generator()
    settings = generator.TestSettings()
    settings.mode = generator.TestMode.PerformanceOnly
    settings.scenario = getattr(generator.TestScenario, "".join(map(str.capitalize, scenario.split("-"))))
    settings.min_duration_ms = round(1000 * seconds)
    if scenario == "offline":
        settings.offline_expected_qps = rate
    else:
        settings.min_query_count = calls_needed(PERCENTILE[scenario])
    if scenario == "server":
        settings.server_target_qps = rate
    settings.multi_stream_samples_per_query = STREAMS
    for name, seed in SEEDS.items():
        setattr(settings, name, seed)
    computed = _InTurn(run, images, batch) if scenario != "server" else _Queue(run, images, batch)
    system = generator.ConstructSUT(computed.issue, lambda: None)
    library = generator.ConstructQSL(len(images), len(images), lambda places: None, lambda places: None)
    try:
        with tempfile.TemporaryDirectory() as place:
            logs = generator.LogSettings()
            logs.enable_trace = False
            logs.log_output = generator.LogOutputSettings()
            logs.log_output.outdir = place
            logs.log_output.copy_summary_to_stdout = False
            started = time.perf_counter()
            generator.StartTestWithLogSettings(system, library, settings, logs)
            took = time.perf_counter() - started
            lines = Path(place, "mlperf_log_detail.txt").read_text().splitlines()
            entries = (json.loads(line.removeprefix(":::MLLOG ")) for line in lines)
            log = {entry["key"]: entry["value"] for entry in entries}
    finally:
        computed.end()
        generator.DestroyQSL(library)
        generator.DestroySUT(system)
    if computed.error:
        raise computed.error
    in_a_query = STREAMS if scenario == "multi-stream" else 1
    return Load(
        latency_ms=log[f"result_{PERCENTILE.get(scenario, 99)}.00_percentile_latency_ns"] / 1e6,
        images_per_s=log[RATES[scenario]] if scenario in RATES else 1e9 * in_a_query / log["result_mean_latency_ns"],
        queries=computed.images // in_a_query,
        seconds=took,
    )


class _InTurn:
    """Computes each query before the next is sent, in batches of one size: the last is filled up."""

    def __init__(self, run: Run, images: np.ndarray, batch: int):
        self.run, self.pool, self.batch, self.generator = run, images, batch, load_generator()
        self.images = 0  # that are computed
        self.error: Exception | None = None

    def issue(self, samples: Sequence[Any]) -> None:
        for begin in range(0, len(samples), self.batch):
            some = samples[begin : begin + self.batch]
            self.compute(some, np.resize([sample.index for sample in some], self.batch).tolist())

    def compute(self, samples: Sequence[Any], places: Sequence[int]) -> None:
        """The load generator waits until each sample is answered: so it is, after an error too."""
        try:
            if self.error is None:
                self.run(taken(self.pool, places))
        except Exception as error:
            self.error = error
        self.images += len(samples)
        self.generator.QuerySamplesComplete([self.generator.QuerySampleResponse(sample.id, 0, 0) for sample in samples])

    def end(self) -> None:
        pass


class _Queue(_InTurn):
    """Computes what waits, `batch` images at most, in a thread of its own."""

    def __init__(self, run: Run, images: np.ndarray, batch: int):
        super().__init__(run, images, batch)
        self.waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()

    def issue(self, samples: Sequence[Any]) -> None:
        for sample in samples:
            self.waiting.put(sample)

    def _serve(self) -> None:
        has_ended = False
        while not has_ended:
            samples = [self.waiting.get()]
            while len(samples) < self.batch and not self.waiting.empty():
                samples.append(self.waiting.get())
            if has_ended := samples[-1] is None:
                samples.pop()
            if samples:
                self.compute(samples, [sample.index for sample in samples])

    def end(self) -> None:
        self.waiting.put(None)
        self.thread.join()


# --- As a table ---


def rows(results: Sequence[Result]) -> list[dict[str, object]]:
    """The results, with the number that the scenario is about."""
    table = []
    for result in results:
        row: dict[str, object] = {"file": result.file, "engine": result.engine, "scenario": result.scenario}
        load = result.load
        if result.scenario == "server":
            row |= {"images/s": result.rate, "p99 ms": load.latency_ms, "too high at images/s": result.too_high}
        elif result.scenario == "offline":
            row |= {"images/s": load.images_per_s, "batch": result.batch}
        else:
            row |= {f"p{PERCENTILE[result.scenario]} ms": load.latency_ms, "images/s": load.images_per_s}
        table.append(row | {"queries": load.queries, "seconds": load.seconds})
    return table


def notes(results: Sequence[Result], host: Host, bound_ms: float) -> list[str]:
    """What the numbers mean."""
    meaning = {
        "single-stream": "One image at a time, the next when the last is done.",
        "multi-stream": f"{STREAMS} images at a time, the next when the last are done.",
        "offline": "All images at once, in batches of the best size.",
        "server": f"The highest rate of random arrivals at which the 99th percentile holds {bound_ms:g} ms; up to "
        f"{results[0].batch} images that wait are computed together.",
    }
    short = [f"{result.file} in {result.engine}: {result.shorter}" for result in results if result.shorter]
    lines = [meaning[results[0].scenario], "No MLPerf result: that needs MLPerf's models, data and accuracy."]
    return lines + [f"Shorter than MLPerf's runs ({'; '.join(short)})."] * bool(short) + host.notes()
