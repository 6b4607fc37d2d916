"""Benchmarks: that they measure what they say."""

import json
import multiprocessing
import os
import re
import sys
import time
import zlib
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
import torch.nn.functional as F
from adam import adam
from conftest import REPOSITORY
from expertgrid.bench.experts import FORMS, TOLERANCE, build_form, difference
from expertgrid.bench.floor import floor
from onnx import TensorProto, helper
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode

from expertgrid.bench import step, training
from expertgrid.bench.baseline import (
    BaselineImages,
    TextbookBlock,
    _baseline_rounds,
    baseline_rounds,
    baseline_step,
    baseline_transform,
    textbook,
)
from expertgrid.bench.engines import ENGINES, USUAL, _compiled_net, engines
from expertgrid.bench.latency import (
    Latency,
    LatencyRecord,
    check_comparable,
    measure,
    notes,
    random_images,
    read_latency,
    rows,
    with_baseline,
    with_first,
)
from expertgrid.bench.peaks import Peaks, largest_convolutions, measure_peaks
from expertgrid.bench.timing import Block, Times, compare, take_turns, timed
from expertgrid.bench.training import TrainingSpeed, in_turns
from expertgrid.export.to_onnx import to_onnx
from expertgrid.model.checkpoint import Checkpoint, Trained
from expertgrid.model.fast.execution import ExecutionPlan
from expertgrid.model.pixels import normalise
from expertgrid.model.presets import PRESETS
from expertgrid.model.registry import build
from expertgrid.model.system.errors import InputError
from expertgrid.model.variants import vary

TRAINED = Trained(
    trial="abc", model="two_block", data="digits",
    fingerprint="0123abcd", classes=tuple("0123456789"), image_size=(8, 8), mean=(0.5,) * 3,
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
    blocks = [Block(0, [1.0, 2.0], 3.0), Block(1, [3.0, 4.0], 1.0)] * 10
    found = Latency.of("engine", 8, Times(blocks))
    assert (found.p50_ms, found.calls, found.calls_ms) == (2.5, 40, [1.0, 2.0, 3.0, 4.0] * 10)
    assert found.p90_ms == pytest.approx(np.percentile([1, 2, 3, 4] * 10, 90))
    assert found.p99_ms is None
    assert found.images_per_s == pytest.approx(8 * 4 / 0.010)
    assert found.joules_per_image == pytest.approx(40 / 320)
    assert [(block.opening, block.calls_ms) for block in found.times.blocks] == [block[:2] for block in blocks]


def test_the_clock_is_right():
    times = take_turns({name: lambda s=s: lambda: time.sleep(s) for name, s in (("slow", 0.02), ("quick", 0.01))}, 0.4)
    assert 20 <= np.median(times["slow"].calls_ms) < 23
    assert 10 <= np.median(times["quick"].calls_ms) < 13


def test_a_call_costs_little_more_than_in_a_bare_loop(model):
    """Less than 2 microseconds, and percentiles as those of a bare loop, of calls with bound memory."""
    session = onnxruntime.InferenceSession(model)
    binding = session.io_binding()
    binding.bind_cpu_input("images", random_images(model, 1))
    binding.bind_output("logits")

    def call() -> None:
        session.run_with_iobinding(binding)

    def bare() -> list[float]:
        found = []
        for _ in range(500):
            started = time.perf_counter_ns()
            session.run_with_iobinding(binding)
            found.append((time.perf_counter_ns() - started) / 1e6)
        return found

    bare(), timed(call, 500)
    differences = [np.median(timed(call, 500)) - np.median(bare()) for _ in range(15)]
    assert np.median(differences) < 0.002


def test_record_of_a_file(file):
    (record,) = measure([file], "cpu", batches=(1, 3), measure_s=0.01)
    assert (record.trial, record.model, record.provider) == ("abc", "two_block", "cpu")
    assert [(found.engine, found.batch) for found in record.latencies] == [
        (engine, batch) for batch in (1, 3) for engine in ("onnxruntime cpu", "pytorch eager cpu")
    ]
    for found, row in zip(record.latencies, rows([record], []), strict=True):
        low, high = found.intervals_ms["p50"]
        assert 0 < low <= found.p50_ms <= high
        assert len(found.calls_ms) == found.calls == sum(calls for _, calls in found.blocks) >= 28
        assert row["p50 ms"] == (found.p50_ms, low, high)
        eager = next(e for e in record.latencies if e.batch == found.batch and e.engine == "pytorch eager cpu")
        assert (row["x eager"] is None) == (found is eager)
        if found is not eager:
            assert row["x eager"] == compare(eager.times, found.times)
    assert record.machine["cores"] == len(os.sched_getaffinity(0))
    assert 0 <= record.host.others_share <= 1
    assert notes([record])[0].startswith(record.device)


def test_several_files_are_measured_in_one_run_and_compared_with_the_first(file, tmp_path):
    other = identity(tmp_path / "other.onnx", TensorProto.FLOAT, ["n", 3, 4])
    records = measure([file, other], batches=(1, 3), measure_s=0.01)
    assert [(record.file, record.trial) for record in records] == [(file.name, "abc"), ("other.onnx", "")]
    shown = rows(records, with_first(records))
    assert [(row["x first"], row["verdict"]) for row in shown[:4]] == [(None, None)] * 4
    assert [row["verdict"] for row in shown[4:]] == ["faster"] * 2
    assert [str(one) for one in with_first(records)] == [
        f"other.onnx against model.onnx, batch {batch}, onnxruntime cpu: faster, {row['x first'].value:.3g} times as "
        f"fast ({row['x first'].low:.3g} to {row['x first'].high:.3g})"
        for batch, row in zip((1, 3), shown[4:])
    ]
    assert "x first" not in rows(records[:1], [])[0]
    with pytest.raises(InputError, match="earlier: has none of the engines and batch sizes"):
        with_baseline(records[0], records[1].model_copy(update={"latencies": []}), "earlier")


def test_a_baseline_is_of_this_machine_and_these_versions(file, tmp_path):
    (record,) = measure([file], batches=(1,), measure_s=0.01)
    kept = tmp_path / "record.json"
    kept.write_text(record.model_dump_json())
    baseline = read_latency(kept)
    assert baseline == record
    check_comparable(baseline, record, kept)
    slower = [one.model_copy(update={"calls_ms": [3 * ms for ms in one.calls_ms]}) for one in record.latencies]
    found = with_baseline(record.model_copy(update={"latencies": slower}), baseline, "record.json")
    assert [(one.engine, one.verdict) for one in found] == [(one.engine, "slower") for one in record.latencies]
    assert found[0].ratio[0] == pytest.approx(1 / 3)
    assert found[0].slower_percent() == pytest.approx(200)
    for changed, what in (
        ({"threads": 64}, "threads 64, here it is"),
        ({"versions": record.versions | {"torch": "1.0"}}, "torch 1.0, here it is"),
        ({"machine": record.machine | {"instructions": "SSE"}}, "instructions SSE, here it is"),
    ):
        with pytest.raises(InputError, match=rf"record.json: was measured with {what}.*--across-machines"):
            check_comparable(record.model_copy(update=changed), record, kept)
    for content, reason in (
        ("{}", "record.json.file: field required"),
        ("[", "record.json: not JSON"),
        (record.model_copy(update={"latencies": [slower[0].model_copy(update={"blocks": []})]}).model_dump_json(),
         "record.json: does not say in which blocks"),
    ):  # fmt: skip
        kept.write_text(content)
        with pytest.raises(InputError, match=reason):
            read_latency(kept)
    assert LatencyRecord.model_validate_json(record.model_dump_json()) == record


def test_engines_run_the_same_network(model):
    """PyTorch's weights are fresh, so only shapes and input handling can be compared."""
    openers, metadata = engines(model, "model", "cpu", ENGINES)  # its own is ONNX Runtime, once
    images = random_images(model, 5)
    assert (images.shape, images.dtype) == ((5, 8, 8, 3), np.uint8)
    assert list(openers) == [
        "onnxruntime cpu", "pytorch eager cpu", "pytorch eager bf16 cpu", "pytorch compiled cpu",
        "pytorch compiled bf16 cpu", "openvino cpu", "openvino-bf16 cpu",
    ]  # fmt: skip
    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        with pytest.raises(InputError, match="this processor does not compute in bfloat16"):
            openers.pop("openvino-bf16 cpu")()
    logits_BN = {name: opener()(images) for name, opener in openers.items()}
    assert {found.shape for found in logits_BN.values()} == {(5, 10)}
    np.testing.assert_allclose(logits_BN["openvino cpu"], logits_BN["onnxruntime cpu"], atol=1e-4)
    if "openvino-bf16 cpu" in logits_BN:
        np.testing.assert_allclose(logits_BN["openvino-bf16 cpu"], logits_BN["onnxruntime cpu"], atol=0.1)
    assert metadata.trained == TRAINED
    assert len(engines(model, "model", "cpu")[0]) == len(USUAL)
    with pytest.raises(InputError, match="unknown engine 'openvno'; did you mean 'openvino'"):
        engines(model, "model", "cpu", ["openvno"])


def test_each_batch_size_is_compiled(model, monkeypatch):
    """PyTorch would run what passes its limit eagerly, and a log alone would say so."""
    _compiled_net.cache_clear()
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 1)
    run = engines(model, "model", "cpu", ["compiled"])[0]["pytorch compiled cpu"]()
    before = counters["stats"]["unique_graphs"]
    for batch in (1, 2, 3):
        run(random_images(model, batch))
    assert counters["stats"]["unique_graphs"] == before + 3


def test_an_engine_that_is_not_here_is_an_error(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(InputError, match="provider 'openvino': is not installed"):
        engines(model, "model", "cpu", ["openvino"])
    monkeypatch.setattr("expertgrid.bench.engines.why_unavailable", lambda device: "there is no C++ compiler (g++)")
    with pytest.raises(InputError, match="engine 'compiled': there is no C"):
        engines(model, "model", "cpu", ["compiled"])


def test_a_file_of_other_origin_is_measured_alone(tmp_path):
    path = identity(tmp_path / "other.onnx", TensorProto.FLOAT, ["n", 3, 4])
    (record,) = measure([path], batches=(2,), measure_s=0.01)
    assert [found.engine for found in record.latencies] == ["onnxruntime cpu"]
    assert rows([record], [])[0]["x eager"] is None
    assert record.trial == ""


def test_files_that_cannot_be_measured(tmp_path):
    with pytest.raises(InputError, match="none.onnx: cannot be read: No such file"):
        measure([tmp_path / "none.onnx"])
    (tmp_path / "text.onnx").write_text("hello")
    with pytest.raises(InputError, match="text.onnx: not an ONNX file"):
        measure([tmp_path / "text.onnx"])
    path = identity(tmp_path / "open.onnx", TensorProto.FLOAT, ["n", "height", 4])
    with pytest.raises(InputError, match=r"open.onnx: needs one input of images.* found x: tensor\(float\)"):
        measure([path])
    path = identity(tmp_path / "int64.onnx", TensorProto.INT64, ["n", 4])
    with pytest.raises(InputError, match=r"found x: tensor\(int64\)"):
        measure([path])
    path = identity(tmp_path / "one.onnx", TensorProto.FLOAT, [1, 4])
    with pytest.raises(InputError, match="one.onnx: does not run at batch 2: "):
        measure([path], batches=(1, 2), measure_s=0.01)
    with pytest.raises(InputError, match="unknown provider 'gpu'"):
        measure([path], "gpu")


def test_training_speeds_are_ratios_of_rounds_in_turns():
    order = []

    def rounds(name: str, seconds: list[float]):
        left = iter(seconds)
        return lambda: order.append(name) or next(left)

    times = {"loop": [1.1, 2.2, 4.4], "bare": [1.0, 2.0, 4.0], "baseline": [2.2, 8.8, 13.2]}
    seconds = in_turns({name: rounds(name, values) for name, values in times.items()}, 3)
    assert seconds == times
    assert order == ["baseline", "bare", "loop", "loop", "bare", "baseline", "baseline", "bare", "loop"]
    known = {"model": "net", "device": "cpu", "threads": 1, "torch": "", "peak_memory_bytes": 0, "peak_memory_is": ""}
    peaks = Peaks(bf16_flops=1e6, fp32_flops=1e3, copy_bytes_per_s=1.0)
    speed = TrainingSpeed.of(
        *seconds.values(), batch=8, steps=2, bfloat16=False, compiled=False, kernels=False, graphs=False,
        compile_seconds=0, macs=10, baseline_workers=2, peaks=peaks, **known,
    )  # fmt: skip
    assert (speed.rounds, speed.device_peak_flops) == (3, 1e3)
    assert speed.overhead_percent == pytest.approx(10)
    assert speed.ratio == pytest.approx(3)
    assert speed.images_per_s == pytest.approx(16 / 2.2)
    assert speed.bare_images_per_s == pytest.approx(8)
    assert speed.peak_share == pytest.approx(6 * 10 * speed.images_per_s / 1e3)
    assert f"training uses {100 * speed.peak_share:.1f}% of its fp32 peak" in training.notes(speed)[-1]


def test_a_share_of_the_peak_above_1_is_a_failed_measurement():
    fields = dict.fromkeys(("model", "device", "torch", "peak_memory_is"), "")
    fields |= dict.fromkeys(("bfloat16", "compiled", "kernels", "graphs"), False)
    fields |= dict.fromkeys(("batch", "steps", "threads", "macs", "baseline_workers", "peak_memory_bytes"), 10)
    peaks = Peaks(bf16_flops=1e6, fp32_flops=10.0, copy_bytes_per_s=1.0)
    speed = TrainingSpeed.of([1.0], [1.0], [1.0], compile_seconds=0, peaks=peaks, **fields)
    assert speed.peak_share is None
    assert "training was faster than these peaks, so that they are wrong" in training.notes(speed)[-1]


@pytest.mark.parametrize("preset", PRESETS)
def test_the_baseline_trains_the_same_network(preset):
    """On an un-augmented batch in float32: the loss of our forward pass, from images that went through PIL."""
    torch.manual_seed(0)
    net = build(vary(PRESETS[preset], "width", 0.125))
    for module in net.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    pixels_BHWC = torch.randint(256, (6, 32, 32, 3), dtype=torch.uint8)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    images = BaselineImages(pixels_BHWC, torch.arange(6), baseline_transform(mean, std, (32, 32)))
    plain_BCHW = torch.stack([images[i][0] for i in range(6)])
    y_B = torch.tensor([images[i][1] for i in range(6)])
    ours_BCHW = normalise(pixels_BHWC.permute(0, 3, 1, 2), torch.tensor(mean), torch.tensor(std))
    ours = F.cross_entropy(net(ours_BCHW.contiguous(memory_format=torch.channels_last)), y_B)
    blocks = len(list(PRESETS[preset].blocks()))
    net = textbook(net)
    assert sum(isinstance(module, TextbookBlock) for module in net.modules()) == blocks
    plain = baseline_step(net, torch.optim.SGD(net.parameters(), 0.1), torch.nn.CrossEntropyLoss(), plain_BCHW, y_B)
    assert plain.item() == pytest.approx(ours.item(), rel=1e-4)


def _baseline_work(labels_B: torch.Tensor) -> tuple:
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10))
    transform = baseline_transform((0.5,) * 3, (0.5,) * 3, (8, 8), crop_padding=2, hflip=0.5, cutout=4)
    images = BaselineImages(torch.full((8, 8, 8, 3), 255, dtype=torch.uint8), labels_B, transform)
    assert (images[0][0] == 0).any()  # of Cutout; all else is 1, or -1 where the crop has its border
    return net, images, 4, 2, 0.1, torch.device("cpu")


def test_baseline_rounds_train():
    net, *work = _baseline_work(torch.arange(8))
    optimizers = []

    def optimizer(trained: torch.nn.Module) -> torch.optim.Optimizer:
        optimizers.append(adam(trained))
        return optimizers[0]

    assert next(_baseline_rounds(net, optimizer, *work)) > 0
    (group,) = optimizers[0].param_groups
    assert group["fused"] is None
    assert not torch.equal(group["params"][0], net[1].weight)


def test_baseline_rounds_are_of_a_process_of_their_own_whose_errors_are_raised_here():
    """That it trains there is seen in `measure_training`."""
    net, *work = _baseline_work(torch.arange(8) + 5)
    with baseline_rounds(net, adam, *work) as run, pytest.raises(IndexError, match="Target [0-9]+ is out of bounds"):
        assert len(multiprocessing.active_children()) == 1
        run()
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_a_block_are_one_function(form):
    x_BCHW = torch.randn(3, 8, 6, 6, generator=torch.Generator().manual_seed(0))
    assert difference(build_form(form, 3, 8), build_form("loop", 3, 8), x_BCHW) < TOLERANCE


def test_peaks_are_of_the_device(monkeypatch):
    monkeypatch.setattr("expertgrid.bench.peaks.SIZE", 64)
    peaks = measure_peaks(torch.device("cpu"), measure_s=0.01)
    assert min(peaks.bf16_flops, peaks.fp32_flops, peaks.copy_bytes_per_s) > 1e6
    assert peaks.best(peaks.model_copy(update={"fp32_flops": 1e30})) == peaks.model_copy(update={"fp32_flops": 1e30})


def test_peaks_are_of_a_networks_convolutions_too(monkeypatch):
    """Their operations are those that PyTorch counts. A peak is that of the fastest."""
    net = build(vary(PRESETS["segmented"], "width", 0.125)).eval()
    monkeypatch.setattr("expertgrid.bench.peaks.LARGEST", 1000)
    found = largest_convolutions(net, (2, 3, 32, 32))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.zeros(2, 3, 32, 32))
    counts = counter.get_flop_counts()["Global"]
    of_convolutions = counts[torch.ops.aten.convolution]
    times = Counter((tuple(x.shape), tuple(w.shape)) for x, w in _convolved(net, torch.zeros(2, 3, 32, 32)))
    assert sum(one.operations * times[one.x, one.weight] for one in found) == of_convolutions
    monkeypatch.setattr("expertgrid.bench.peaks._rate", lambda found, device, dtype, measure_s: 1e30 * found.operations)
    peaks = measure_peaks(torch.device("cpu"), measure_s=0, size=8, convolutions=found[-2:])
    assert peaks.fp32_flops == 1e30 * found[-1].operations


def _convolved(net, x_BCHW):
    """The input and the weight of each convolution of a forward pass."""
    given = []
    hooks = [
        module.register_forward_pre_hook(lambda module, args: given.append((args[0], module.weight)))
        for module in net.modules()
        if isinstance(module, torch.nn.Conv2d)
    ]
    net(x_BCHW)
    for hook in hooks:
        hook.remove()
    return given


def test_what_is_copied_cannot_be_compressed(monkeypatch):
    sources = []
    monkeypatch.setattr("expertgrid.bench.peaks.SIZE", 8)
    monkeypatch.setattr("expertgrid.bench.peaks.SOME_BYTES", 2**16)
    copy_ = torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, source: sources.append(source) or copy_(self, source))
    measure_peaks(torch.device("cpu"), measure_s=0)
    assert len(zlib.compress(sources[0].numpy().tobytes())) > 0.99 * 2**16


def test_what_is_timed_is_timed_in_the_settings_of_training(monkeypatch):
    cpu, tuned = torch.device("cpu"), []
    monkeypatch.setattr(
        step, "training_step", lambda *_: lambda *_: tuned.append(torch.backends.cudnn.benchmark) or [Y]
    )
    config = vary(PRESETS["two_block"], "width", 0.0625)
    for run in (
        lambda: step.profile_step(config, 2, 8, cpu, ExecutionPlan(), steps=1, rounds=1),
        lambda: step.agreement(config, 2, 8, cpu, ExecutionPlan(), steps=1),
    ):
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
        tuned.clear()
        run()
        assert tuned
        assert all(tuned)


Y = torch.ones(())


def test_pytest_benchmark_suite(file, tmp_path, monkeypatch, capsys):
    """Twice, with the second run compared to the first, and a histogram."""
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    suite = ["bench", "-q", "-p", "no:cacheprovider", f"--onnx={file}", "--batch=1,2"]
    suite += [f"--benchmark-storage={tmp_path}/storage", f"--benchmark-histogram={tmp_path}/histogram"]
    for more in (["--benchmark-autosave"], ["--benchmark-compare", "--benchmark-json", f"{tmp_path}/result.json"]):
        if "--benchmark-json" in more:
            more += ["--benchmark-save-data"]
        status = pytest.main([*suite, *more])
        printed = capsys.readouterr().out
        assert status == 0, printed
        assert "4 passed" in printed
    assert "(0001_" in printed
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["machine_info"]["cpu"]
    found = result["benchmarks"]
    for benchmark in found:
        extra, stats = benchmark["extra_info"], benchmark["stats"]
        assert extra["p50_ms"] == pytest.approx(1000 * stats["median"])
        assert extra["p90_ms"] == pytest.approx(1000 * np.percentile(stats["data"], 90))
        assert (extra["p99_ms"] is None) == (stats["rounds"] < 368)
        assert (extra["trial"], extra["file"], extra["threads"]) == ("abc", "model.onnx", torch.get_num_threads())
        assert extra["versions"]["onnxruntime"] == onnxruntime.__version__
        assert extra["machine"]["cores"] == len(os.sched_getaffinity(0))
    assert {benchmark["extra_info"]["engine"] for benchmark in found} == {"onnxruntime cpu", "pytorch eager cpu"}
    assert all(benchmark["extra_info"]["images_per_s"] > 0 for benchmark in found)
    assert list(tmp_path.glob("histogram*.svg"))


def test_the_suite_runs_every_published_file_of_a_study(file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    export = tmp_path / "study" / "export"
    export.mkdir(parents=True)
    for name in ("model-uint8.onnx", "model-uint8-tuned.onnx", "model-uint8-int8.rejected.onnx"):
        (export / name).write_bytes(file.read_bytes())
    suite = ["bench", "-q", "-p", "no:cacheprovider", "--batch=1", "--benchmark-disable"]
    monkeypatch.setenv("EXPERTGRID_STUDY", str(tmp_path / "study"))
    assert pytest.main([*suite, "--collect-only"]) == 0
    printed = capsys.readouterr().out
    ids = set(re.findall(r"test_latency\[(.*)\]", printed))
    assert len(ids) == 4, printed
    assert sum("model-uint8-tuned" in name for name in ids) == sum("own" in name for name in ids) == 2
    assert not any("rejected" in name for name in ids)
    assert pytest.main([*suite, f"--study={tmp_path / 'study'}", "-k", "own"]) == 0
    assert "2 passed" in capsys.readouterr().out
    assert pytest.main([*suite, f"--study={tmp_path}"]) != 0
    assert "no published file in its export folder" in capsys.readouterr().out


def test_losses_of_two_ways_agree_or_are_an_error(monkeypatch):
    config, cpu = vary(PRESETS["two_block"], "width", 0.0625), torch.device("cpu")
    found = step.agreement(config, 2, 8, cpu, ExecutionPlan(), steps=3)
    assert (found.largest, len(found.eager)) == (0, 3)
    assert found.eager[2] < found.eager[0], "it trains"
    for wrong in (1.01, float("nan")):
        losses = iter([[1.0, 1.0], [1.0, wrong]])
        monkeypatch.setattr(step, "_losses", lambda *_, losses=losses: next(losses))
        with pytest.raises(ValueError, match="with Triton kernels the losses of the same steps differ by"):
            step.agreement(config, 2, 8, cpu, ExecutionPlan(kernels=True), steps=2)


def test_a_step_on_a_known_gpu_is_a_share_of_its_floor(monkeypatch, capsys):
    """By its data sheet."""
    monkeypatch.setattr(step, "device_name", lambda device: "NVIDIA H200")
    small = ["two_block", "--batch", "2", "--size", "8", "--width", "0.0625", "--steps", "1", "--rounds", "1"]
    assert step.main([*small, "--device", "cpu", "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    least = floor(vary(PRESETS["two_block"], "width", 0.0625), 2, 8, 8)
    assert found["floor_ms"] == pytest.approx(1000 * max(least.flops / 989e12, least.bytes / 4.8e12))
    assert step.main([*small, "--device", "cpu"]) == 0
    assert re.search(r"GB, 0\.000 ms by the data sheet: 0\.0% of the step\. Losses", capsys.readouterr().out)


def test_a_step_is_measured_from_the_command_line(capsys):
    def called(*arguments: str) -> int:
        return step.main([*arguments, "--device", "cpu"])

    small = "--batch", "2", "--size", "8", "--width", "0.0625", "--steps", "1", "--rounds", "2"
    assert called("two_block", *small, "--format", "json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["model"], found["means"], len(found["step_ms"])) == ("two_block", "eager", 2)
    assert found["floor"]["flops"] == floor(vary(PRESETS["two_block"], "width", 0.0625), 2, 8, 8).flops
    assert 0.5 < sum(kernel["share"] for kernel in found["kernels"]) <= 1.001  # the longest of them
    assert called("two_block", *small) == 0
    assert "Losses differ from those of eager steps, both in float32, by 0.0e+00" in capsys.readouterr().out
    for wrong, reason in (
        (("two_block", "--kernels"), "--kernels on: Triton kernels are for CUDA"),
        (("speed", "--size", "4"), "leaves none"),
        (("resnet18",), "unknown preset 'resnet18'"),
        (("two_block", "--batch", "0"), "Invalid value for '--batch'"),
        (("two_block", "--format", "xml"), "Invalid value for '--format'"),
    ):
        assert called(*wrong) == 2
        complaint = capsys.readouterr().err
        assert complaint.startswith("error: ")
        assert reason in complaint
        assert complaint.count("\n") == 1
