"""Benchmarks: that they measure what they say."""

import json
import subprocess
import sys
import time

import numpy as np
import onnx
import pytest
import torch
from conftest import REPOSITORY
from onnx import TensorProto, helper

from bench.latency import Latency, engines, measure, random_images, rows, take_turns
from bench.training import compare
from export.to_onnx import to_onnx
from model.checkpoint import Checkpoint, Trained
from model.errors import InputError
from model.presets import PRESETS, build
from model.variants import vary

TRAINED = Trained(
    trial="abc", model="two_block", data="digits", classes=tuple("0123456789"), image_size=(8, 8), mean=(0.5,) * 3,
    std=(0.25,) * 3,
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> bytes:
    config = vary(PRESETS["two_block"], "width", 0.125)
    torch.manual_seed(0)
    return to_onnx(Checkpoint(config, TRAINED, build(config).state_dict()), "uint8")


@pytest.fixture
def file(model, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(model)
    return path


def identity(path, dtype, shape):
    """An ONNX file of other origin: its output is its input."""
    ends = [helper.make_tensor_value_info(name, dtype, shape) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", ends[:1], ends[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def test_percentiles_and_rate():
    one = Latency.of("engine", 8, [1.0, 2.0, 3.0, 4.0])
    assert (one.p50_ms, one.calls, one.calls_ms) == (2.5, 4, [1.0, 2.0, 3.0, 4.0])
    assert one.p90_ms == pytest.approx(np.percentile([1, 2, 3, 4], 90))
    assert one.images_per_s == pytest.approx(8 * 4 / 0.010)


def test_clock_is_right_and_engines_take_turns():
    order = []

    def engine(name: str, seconds: float):
        def run(images: np.ndarray) -> np.ndarray:
            order.append(name)
            time.sleep(seconds)
            return images

        return run

    times = take_turns({"slow": engine("slow", 0.02), "quick": engine("quick", 0.01)}, np.zeros(1), measure_s=0.4)
    assert 20 <= np.median(times["slow"]) < 23
    assert 10 <= np.median(times["quick"]) < 13
    assert min(map(len, times.values())) >= 30
    assert sum(times["quick"]) >= 400
    after_warm_up = order[order.index("quick") + 33 :]
    changes = sum(a != b for a, b in zip(after_warm_up, after_warm_up[1:]))
    assert changes >= 10


def test_record_of_a_file(file):
    record = measure(file, "cpu", batches=(1, 3), measure_s=0.01)
    assert (record.trial, record.model, record.provider) == ("abc", "two_block", "cpu")
    assert [(one.engine, one.batch) for one in record.latencies] == [
        (engine, batch) for batch in (1, 3) for engine in ("onnxruntime cpu", "pytorch eager cpu")
    ]
    for one, row in zip(record.latencies, rows(record)):
        assert 0 < one.p50_ms <= one.p90_ms <= one.p99_ms
        assert len(one.calls_ms) == one.calls >= 30
        eager = next(e for e in record.latencies if e.batch == one.batch and e.engine == "pytorch eager cpu")
        assert row["x eager"] == pytest.approx(eager.p50_ms / one.p50_ms, abs=0.01)


def test_engines_run_the_same_network(model):
    """PyTorch's weights are fresh, so only shapes and input handling can be compared."""
    runs, metadata = engines(model, "model", "cpu")
    images = random_images(model, 5)
    assert (images.shape, images.dtype) == ((5, 8, 8, 3), np.uint8)
    assert [run(images).shape for run in runs.values()] == [(5, 10)] * 2
    assert metadata["trial"] == "abc"


def test_a_file_of_other_origin_is_measured_alone(tmp_path):
    path = identity(tmp_path / "other.onnx", TensorProto.FLOAT, ["n", 3, 4])
    record = measure(path, batches=(2,), measure_s=0.01)
    assert [one.engine for one in record.latencies] == ["onnxruntime cpu"]
    assert rows(record)[0]["x eager"] is None
    assert record.trial == ""


def test_files_that_cannot_be_measured(tmp_path):
    with pytest.raises(InputError, match="none.onnx: cannot be read: No such file"):
        measure(tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_text("hello")
    with pytest.raises(InputError, match="text.onnx: not an ONNX file"):
        measure(tmp_path / "text.onnx")
    path = identity(tmp_path / "open.onnx", TensorProto.FLOAT, ["n", "height", 4])
    with pytest.raises(InputError, match=r"open.onnx: needs one input of images.* found x: tensor\(float\)"):
        measure(path)
    path = identity(tmp_path / "int64.onnx", TensorProto.INT64, ["n", 4])
    with pytest.raises(InputError, match=r"found x: tensor\(int64\)"):
        measure(path)
    path = identity(tmp_path / "one.onnx", TensorProto.FLOAT, [1, 4])
    with pytest.raises(InputError, match="one.onnx: does not run at batch 2: "):
        measure(path, batches=(1, 2), measure_s=0.01)
    with pytest.raises(InputError, match="unknown provider 'gpu'"):
        measure(path, "gpu")


def test_training_overhead_is_a_ratio_of_rounds_in_turns():
    order = []

    def rounds(name: str, seconds: list[float]):
        left = iter(seconds)
        return lambda: order.append(name) or next(left)

    loop, bare = rounds("loop", [9.0, 1.1, 2.2, 4.4]), rounds("bare", [9.0, 1.0, 2.0, 4.0])
    speed = compare("net", "cpu", batch=8, steps=2, rounds=3, loop=loop, bare=bare)
    assert order == ["loop", "bare", "bare", "loop", "loop", "bare", "bare", "loop"]
    assert speed.overhead_percent == pytest.approx(10)
    assert speed.images_per_s == pytest.approx(16 / 2.2)
    assert speed.bare_images_per_s == pytest.approx(8)


def test_pytest_benchmark_suite(file, tmp_path):
    """As a user calls it, twice, with the second run compared to the first, and a histogram."""
    command = [sys.executable, "-m", "pytest", "bench", "-q", "-p", "no:cacheprovider", f"--onnx={file}", "--batch=1,2"]
    command += [f"--benchmark-storage={tmp_path}/storage", f"--benchmark-histogram={tmp_path}/histogram"]
    for more in (["--benchmark-autosave"], ["--benchmark-compare", "--benchmark-json", f"{tmp_path}/result.json"]):
        done = subprocess.run([*command, *more], cwd=REPOSITORY, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "4 passed" in done.stdout
    assert "(0001_" in done.stdout
    found = json.loads((tmp_path / "result.json").read_text())["benchmarks"]
    assert {one["extra_info"]["engine"] for one in found} == {"onnxruntime cpu", "pytorch eager cpu"}
    assert all(one["extra_info"]["images_per_s"] > 0 for one in found)
    assert list(tmp_path.glob("histogram*.svg"))
