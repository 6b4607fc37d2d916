"""Scenarios of MLPerf: their numbers against simulations and bare loops."""

import sys
import time

import numpy as np
import pytest
from small import identity

from expertgrid.bench import scenarios
from expertgrid.bench.scenarios import (
    Load,
    Result,
    _Queue,
    best_batch,
    fixed_batch,
    generate,
    highest_rate,
    measure_scenario,
)
from expertgrid.model.system.errors import InputError

IMAGES = np.arange(64, dtype=np.float32)[:, None]


class Sleeper:
    """An engine that sleeps, and notes when each of its calls began and ended, and for how many images."""

    def __init__(self, seconds):
        self.seconds, self.calls = seconds, []

    def __call__(self, images):
        began = time.perf_counter()
        time.sleep(self.seconds)
        self.calls.append((began, time.perf_counter(), len(images)))

    @property
    def took_s(self):
        return np.array([ended - began for began, ended, _ in self.calls])


def waits_s(arrivals_s, services_s):
    """From arrival to end of each query, at a server that takes one at a time: Lindley's recursion."""
    free, waits = 0.0, []
    for arrived, service in zip(arrivals_s, services_s):
        free = max(free, arrived) + service
        waits.append(free - arrived)
    return np.array(waits)


def simulated(rate, service_s=0.005, count=20_000):
    """A server with random arrivals and a constant time of service, without a clock."""
    arrivals_s = np.cumsum(np.random.default_rng(0).exponential(1 / rate, count))
    p99_ms = 1000 * np.percentile(waits_s(arrivals_s, np.full(count, service_s)), 99)
    return Load(float(p99_ms), rate, count, float(arrivals_s[-1]))


def test_a_stream_is_a_bare_loop():
    run = Sleeper(0.004)
    load = generate(run, IMAGES, "single-stream", 0.2, 1)
    assert load.queries == len(run.calls) >= 36
    assert load.latency_ms >= 1000 * np.percentile(run.took_s, 89, method="lower")
    assert load.latency_ms < 10 * 1000 * np.percentile(run.took_s, 90)
    assert load.images_per_s <= 1 / run.took_s.mean()
    assert load.seconds >= 0.2
    run = Sleeper(0.001)
    load = generate(run, IMAGES, "multi-stream", 0.1, 8)
    assert {images for *_, images in run.calls} == {8}
    assert load.queries == len(run.calls) >= 368
    assert load.images_per_s <= 8 / run.took_s.mean()


def test_offline_computes_all_images_in_batches():
    run = Sleeper(0.002)
    load = generate(run, IMAGES, "offline", 0.2, 16, rate=4000)
    assert {images for *_, images in run.calls} == {16}
    assert load.queries >= 800
    between = run.calls[-1][1] - run.calls[0][0]
    assert load.images_per_s <= load.queries / between
    assert load.images_per_s > load.queries / between / 10


@pytest.mark.nightly  # it reads speeds
def test_a_server_waits_as_a_simulation_of_its_arrivals_does(monkeypatch):
    arrivals_s = []
    issue = _Queue.issue

    def noted(self, samples):
        arrivals_s.extend([time.perf_counter()] * len(samples))
        issue(self, samples)

    monkeypatch.setattr(_Queue, "issue", noted)
    run = Sleeper(0.005)
    load = generate(run, IMAGES, "server", 0.5, 1, rate=120)
    assert load.queries == len(run.calls) == len(arrivals_s) >= 368
    assert {images for *_, images in run.calls} == {1}
    ended_s = np.array([ended for _, ended, _ in run.calls])
    services_s = np.diff(ended_s, prepend=0)  # of a busy server, with what is around a call
    busy = np.concatenate([[False], np.array(arrivals_s[1:]) < ended_s[:-1]])
    expected_s = waits_s(arrivals_s, np.where(busy, services_s, run.took_s))
    assert load.latency_ms == pytest.approx(1000 * np.percentile(expected_s, 99), rel=0.25, abs=5)


def test_a_server_computes_together_what_waits():
    run = Sleeper(0.01)
    load = generate(run, IMAGES, "server", 0.2, 8, rate=400)
    sizes = [images for *_, images in run.calls]
    assert sum(sizes) == load.queries
    assert 1 < max(sizes) <= 8


def test_the_highest_rate_is_that_of_a_simulation():
    """Against the rate that all rates from 1% to 100% of the capacity of 200 a second give."""
    holds = [rate for rate in np.linspace(2, 200, 100) if simulated(rate).latency_ms <= 20]
    for first in (1.0, 130.0, 1e4):
        rate, load, too_high = highest_rate(simulated, 20.0, first)
        assert rate == pytest.approx(max(holds), rel=0.06)
        assert load.latency_ms <= 20 < simulated(too_high).latency_ms
    rate, load, too_high = highest_rate(simulated, 4.0, 130.0)
    assert rate is None
    assert load.latency_ms >= 5


def test_a_rate_that_held_by_luck_is_lowered():
    rates = []

    def load_at(rate):
        rates.append(rate)
        lucky = len(rates) == 2  # of 200
        return Load(1.0 if rate <= 190 or lucky else 99.0, rate, 1, 1.0)

    rate, load, too_high = highest_rate(load_at, 10.0, 100.0)
    assert rate <= 190 < too_high
    assert load.latency_ms == 1.0


def test_the_best_batch_is_found():
    tried = []

    def rate(size):
        tried.append(size)
        return 1000 * size / (8 + size if size <= 16 else 4 * size)

    assert best_batch(rate) == 16
    assert tried == [1, 2, 4, 8, 16, 32, 64]
    assert best_batch(lambda size: {1: 200.0, 2: 100.0}.get(size, 900.0)) == 4, "a size without gain is not the end"


def test_a_run_says_how_short_it_is():
    short = Result("a", "e", "multi-stream", 8, Load(1.0, 1.0, 100, 2.0))
    assert short.shorter == "2.0 s and 100 queries, where MLPerf's rules ask for 600 s and 662 queries"
    assert Result("a", "e", "offline", 8, Load(1.0, 1.0, 30_000, 601.0)).shorter == ""


def test_the_command_line(expertgrid, tmp_path, monkeypatch):
    file, fixed = identity(tmp_path / "any.onnx", ["n", 4]), identity(tmp_path / "fixed.onnx", [4, 4])
    outcome = expertgrid("bench", file, "--scenario", "single-stream", "--seconds", 0.1)
    assert outcome.status == 0, outcome.err
    assert "p90 ms" in outcome.out
    assert "Shorter than MLPerf's runs (any.onnx in onnxruntime cpu: " in outcome.out
    for arguments, reason in (
        (["--scenario", "offline", "--bound-ms", 5], "--bound-ms: is for --scenario server"),
        (["--scenario", "offline", "--batch", 4], "--batch: does not go with --scenario offline"),
        (["--scenario", "offline", "--isolate"], "--isolate: does not go with --scenario offline"),
        (["--scenario", "online"], "Invalid value for '--scenario'"),
    ):
        outcome = expertgrid("bench", file, *arguments)
        assert (outcome.status, reason in outcome.complaint) == (2, True), outcome.complaint
    complaint = expertgrid("bench", fixed, "--scenario", "multi-stream").complaint
    assert "fixed.onnx: has a fixed batch of 4; multi-stream sends 8 at a time" in complaint
    assert (fixed_batch(file.read_bytes()), fixed_batch(fixed.read_bytes())) == (None, 4)
    monkeypatch.setattr(scenarios, "highest_rate", lambda *_: (None, Load(3.0, 1.0, 1, 1.0), 0.5))
    outcome = expertgrid("bench", file, "--scenario", "server", "--bound-ms", 2)
    assert outcome.status == 2
    assert "--bound-ms 2: " in outcome.complaint
    assert "does not hold it at 0.5 images/s either, where the 99th percentile is 3 ms" in outcome.complaint
    monkeypatch.setitem(sys.modules, "mlperf_loadgen", None)
    complaint = expertgrid("bench", file, "--scenario", "offline").complaint
    assert "`uv sync --extra loadgen`" in complaint


def test_an_error_of_the_engine_ends_the_run(tmp_path, monkeypatch):
    def broken(images):
        raise InputError("broken")

    for scenario in ("single-stream", "server"):
        with pytest.raises(InputError, match="broken"):
            generate(broken, IMAGES, scenario, 0.01, 1, rate=1e4)
    monkeypatch.setattr(scenarios, "open_run", lambda engine, images: broken)
    with pytest.raises(InputError, match="broken"):
        measure_scenario([identity(tmp_path / "a.onnx", ["n", 4])], "offline", "cpu", ["own"], 0.01)
