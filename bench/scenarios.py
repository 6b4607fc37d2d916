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
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx

from expertgrid.bench.engines import Engine, Run, engines
from expertgrid.bench.host import Host, watched
from expertgrid.bench.latency import open_run, random_images
from expertgrid.bench.timing import calls_needed, timed
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
class Loaded:
    """A run of the load generator."""

    latency_ms: float  # at the scenario's percentile
    images_per_s: float
    queries: int
    seconds: float


@dataclass(frozen=True)
class Found:
    """What a file does in a scenario."""

    file: str
    engine: str
    scenario: Scenario
    batch: int  # images that are computed together, at most
    run: Loaded
    rate: float | None = None  # of arrivals; None for other scenarios
    too_high: float | None = None  # the lowest rate that was tried and did not hold the bound

    @property
    def shorter(self) -> str:
        """How the run falls short of MLPerf's rules; "" where it does not."""
        least = RULE_QUERIES.get(self.scenario, 0)
        if self.run.seconds >= RULE_S and self.run.queries >= least:
            return ""
        asked = f"{RULE_S:.0f} s" + (f" and {least:,} queries" if least else "")
        return f"{self.run.seconds:.1f} s and {self.run.queries:,} queries, where MLPerf's rules ask for {asked}"


def measure_scenario(
    paths: Sequence[Path],
    scenario: Scenario,
    provider: str,
    wanted: Sequence[str],
    seconds: float,
    bound_ms: float = 10.0,
) -> tuple[list[Found], Host]:
    """Each file and engine in a scenario, one after another; every run takes `seconds` or longer.

    Raises InputError as `engines`, where the load generator is not installed, for a file whose batch size is fixed to
    another than the scenario needs, and where no rate of arrivals holds the bound.
    """
    load_generator()
    check_provider(provider)
    found: list[Found] = []
    with watched(provider != "cpu") as host:
        for path in paths:
            model = read_onnx(path)
            opened, _ = engines(model, str(path), provider, wanted)
            for engine in opened.values():
                found.append(_measure(path, model, engine, scenario, seconds, bound_ms))
    return found, host


def _measure(path: Path, model: bytes, engine: Engine, scenario: Scenario, seconds: float, bound_ms: float) -> Found:
    images, fixed = random_images(model, IMAGES), fixed_batch(model)
    asked = {"single-stream": 1, "multi-stream": STREAMS, "server": 1}.get(scenario, fixed or 1)
    if fixed and fixed != asked:
        raise InputError(f"{path}: has a fixed batch of {fixed}; {scenario} sends {asked} at a time")
    run = opened(engine, images, asked)
    if scenario == "offline":
        batch = fixed or best_batch(lambda size: batch_rate(opened(engine, images, size), images, size))
        rate = batch_rate(opened(engine, images, batch), images, batch)
        load = generate(run, images, scenario, seconds, batch, rate=rate)
        return Found(path.name, engine.title, scenario, batch, load)
    if scenario != "server":
        load = generate(run, images, scenario, seconds, asked)
        return Found(path.name, engine.title, scenario, asked, load)
    together = fixed or MOST_TOGETHER
    opened(engine, images, together)
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
    return Found(path.name, engine.title, scenario, together, load, rate, too_high)


def opened(engine: Engine, images: np.ndarray, batch: int) -> Run:
    """The engine, after its first call at a batch size. Raises InputError where it does not run at this size."""
    return open_run(engine, taken(images, range(batch)))


def taken(images: np.ndarray, places: Sequence[int]) -> np.ndarray:
    """The images at these places, copied; from the start again where there are too few."""
    return images[np.asarray(places) % len(images)]


def fixed_batch(model: bytes) -> int | None:
    """The batch size of a model whose input has one, else None."""
    graph = onnx.load_from_string(model).graph
    weights = {weight.name for weight in graph.initializer}
    first = next(given for given in graph.input if given.name not in weights)
    return first.type.tensor_type.shape.dim[0].dim_value or None


# --- Searches ---


def batch_rate(run: Run, images: np.ndarray, batch: int) -> float:
    """Images a second at a batch size: the median of a fifth of a second of calls, at least 3."""
    some, calls_ms = taken(images, range(batch)), []
    while len(calls_ms) < 3 or sum(calls_ms) < 200:
        calls_ms += timed(lambda: run(some), 1)
    return 1000 * batch / float(np.median(calls_ms))


def best_batch(rate: Callable[[int], float]) -> int:
    """The batch size with the highest rate: sizes are doubled until two in a row gain nothing, or take too long."""
    rates: dict[int, float] = {}
    size = 1
    while size <= MOST_BATCH:
        rates[size] = rate(size)
        best = max(rates, key=lambda tried: rates[tried])
        if size >= 4 * best or size / rates[size] > LONGEST_BATCH_S:
            break
        size *= 2
    return max(rates, key=lambda tried: rates[tried])


def highest_rate(
    load: Callable[[float], Loaded], bound_ms: float, first: float
) -> tuple[float | None, Loaded, float | None]:
    """The highest rate of arrivals whose latency holds the bound, its last run, and the lowest rate that failed.

    From `first` the rate is doubled or halved until the bound lies between two rates; then the middle is tried until
    they are near. The rate that is found is loaded once more, and lowered until it holds again: of several noisy runs
    the luckiest was chosen. The rate is None where even the lowest that was tried fails.
    """
    holds, fails, rate = 0.0, 0.0, first
    while not (holds and fails and fails / holds <= NEAR):
        found = load(rate)
        if found.latency_ms <= bound_ms:
            holds = rate
        else:
            fails = rate
        if not holds and fails < first / 2**MOST_HALVINGS:
            return None, found, fails
        rate = holds * 2 if not fails else fails / 2 if not holds else (holds * fails) ** 0.5
    while True:
        again = load(holds)
        if again.latency_ms <= bound_ms:
            return holds, again, fails
        holds, fails = holds / NEAR, holds
        if holds < first / 2**MOST_HALVINGS:
            return None, again, fails


# --- The load generator ---


def load_generator() -> Any:
    """MLPerf's load generator. Raises InputError where it is not installed."""
    try:
        import mlperf_loadgen  # ty: ignore[import-not-found]  # compiled
    except ImportError:
        raise InputError("--scenario: needs MLPerf's load generator: `uv sync --extra loadgen`") from None
    return mlperf_loadgen


def generate(run: Run, images: np.ndarray, scenario: Scenario, seconds: float, batch: int, rate: float = 0.0) -> Loaded:
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
            log = _read_log(Path(place, "mlperf_log_detail.txt"))
    finally:
        computed.end()
        generator.DestroyQSL(library)
        generator.DestroySUT(system)
    if computed.error:
        raise computed.error
    in_a_query = STREAMS if scenario == "multi-stream" else 1
    return Loaded(
        latency_ms=log[f"result_{PERCENTILE.get(scenario, 99)}.00_percentile_latency_ns"] / 1e6,
        images_per_s=log[RATES[scenario]] if scenario in RATES else 1e9 * in_a_query / log["result_mean_latency_ns"],
        queries=computed.images // in_a_query,
        seconds=took,
    )


def _read_log(file: Path) -> dict[str, Any]:
    """What the load generator found, by its names for it."""
    entries = (json.loads(line.removeprefix(":::MLLOG ")) for line in file.read_text().splitlines())
    return {entry["key"]: entry["value"] for entry in entries}


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
        self.generator.QuerySamplesComplete([self.generator.QuerySampleResponse(one.id, 0, 0) for one in samples])

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
        while (sample := self.waiting.get()) is not None:
            some = [sample]
            while len(some) < self.batch and not self.waiting.empty():
                some.append(self.waiting.get())
            ended = some[-1] is None
            some = some[:-1] if ended else some
            self.compute(some, [sample.index for sample in some])
            if ended:
                return

    def end(self) -> None:
        self.waiting.put(None)
        self.thread.join()


# --- As a table ---


def rows(found: Sequence[Found]) -> list[dict[str, object]]:
    """What was found, with the number that the scenario is about."""
    shown = []
    for one in found:
        row: dict[str, object] = {"file": one.file, "engine": one.engine, "scenario": one.scenario}
        if one.scenario == "server":
            row |= {"images/s": one.rate, "p99 ms": one.run.latency_ms, "too high at images/s": one.too_high}
        elif one.scenario == "offline":
            row |= {"images/s": one.run.images_per_s, "batch": one.batch}
        else:
            row |= {f"p{PERCENTILE[one.scenario]} ms": one.run.latency_ms, "images/s": one.run.images_per_s}
        shown.append(row | {"queries": one.run.queries, "seconds": one.run.seconds})
    return shown


def notes(found: Sequence[Found], host: Host, bound_ms: float) -> list[str]:
    """What the numbers mean."""
    scenario = found[0].scenario
    meaning = {
        "single-stream": "One image at a time, the next when the last is done.",
        "multi-stream": f"{STREAMS} images at a time, the next when the last are done.",
        "offline": "All images at once, in batches of the best size.",
        "server": f"The highest rate of random arrivals at which the 99th percentile holds {bound_ms:g} ms; up to "
        f"{found[0].batch} images that wait are computed together.",
    }
    short = [f"{one.file} in {one.engine}: {one.shorter}" for one in found if one.shorter]
    lines = [meaning[scenario], "No MLPerf result: that needs MLPerf's models, data and accuracy."]
    if short:
        lines.append(f"Shorter than MLPerf's runs ({'; '.join(short)}).")
    return lines + host.notes()
