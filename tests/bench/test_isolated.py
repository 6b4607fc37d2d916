"""Engines in processes of their own."""

import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
from small import identity

from expertgrid.bench.engines import Engine
from expertgrid.bench.isolated import isolated_engine
from expertgrid.bench.latency import measure, notes, rows
from expertgrid.bench.record import Memory
from expertgrid.bench.timing import Timer, take_turns
from expertgrid.model.system.errors import InputError
from expertgrid.model.system.processes import ProcessLost

ENGINE = Engine("onnxruntime", b"", "file", "cpu", "x", "y", None)
SLEEP_S = 0.02
HELD = 2**27  # bytes


def begin() -> None:
    os.environ["BEGUN"] = "yes"


def open_sleeper(engine, images):
    """A call that sleeps, and leaves its process's id in the first image's folder."""
    assert os.environ["BEGUN"] == "yes"
    held = np.ones(HELD // 8)

    def call():
        with open(str(images[0]), "a") as file:
            print(os.getpid(), file=file)
        time.sleep(SLEEP_S)
        return held[0]

    return Timer(call)


def open_and_die(engine, images):
    os.kill(os.getpid(), signal.SIGKILL)


def test_each_engine_has_a_process_and_they_take_turns(tmp_path):
    files = {name: tmp_path / name for name in ("first", "second")}
    memory = {name: Memory() for name in files}
    work = {name: (ENGINE, np.array([str(file)]), open_sleeper, begin, memory[name]) for name, file in files.items()}
    with isolated_engine(*work["first"]) as first, isolated_engine(*work["second"]) as second:
        times = take_turns({"first": first, "second": second}, 0.2, openings=2)
        assert len(multiprocessing.active_children()) == 2
    assert multiprocessing.active_children() == []
    processes = [set(file.read_text().split()) for file in files.values()]
    assert [len(ids) for ids in processes] == [1, 1]
    assert len({str(os.getpid())}.union(*processes)) == 3
    for name in files:
        assert np.median(times[name].calls_ms) >= 1000 * SLEEP_S
        assert [block.opening for block in times[name].blocks] == sorted([0, 1] * (len(times[name].blocks) // 2))
        assert HELD <= memory[name].added < 1.5 * HELD, "the memory of the opening before is free again"


def test_peak_memory_is_of_the_engine_and_its_batch(tmp_path):
    """The output of a model of the identity is a copy of its input."""
    file = identity(tmp_path / "identity.onnx", ["n", 2**20])
    (record,) = measure([file], batches=(1, 17), measure_s=0.01, openings=1, isolated=begin)
    small, large = record.latencies
    assert small.added_bytes < small.peak_bytes
    added = large.added_bytes - small.added_bytes
    assert 0.9 * 2**22 * 16 < added < 2.5 * 2**22 * 16
    assert rows([record], [])[0]["peak MiB"] == small.peak_bytes / 2**20
    assert any(note.startswith("peak MiB: ") for note in notes([record]))
    (record,) = measure([file], batches=(1,), measure_s=0.01, openings=1)
    assert "peak MiB" not in rows([record], [])[0]


def test_errors_of_the_process_are_raised_here(tmp_path):
    file = identity(tmp_path / "fixed.onnx", [1, 4])
    with pytest.raises(InputError, match=r"fixed.onnx: does not run at batch 2: "):
        measure([file], batches=(2,), measure_s=0.01, isolated=begin)
    with (
        pytest.raises(ProcessLost, match="the process of onnxruntime cpu ended with status -9"),
        isolated_engine(ENGINE, np.zeros(1), open_and_die, begin, Memory()) as reopen,
    ):
        reopen()
    assert multiprocessing.active_children() == []
