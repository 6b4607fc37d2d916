"""The speed of a training: ratios of rounds, the baseline beside it, the peaks of a device, the profile of a step."""

import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import zlib
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import REPOSITORY
from scipy import stats
from small import adam
from torch.utils.flop_counter import FlopCounterMode

from expertgrid.ablations.study.study import Study
from expertgrid.bench import precision, training
from expertgrid.bench.baseline import (
    Baseline,
    BaselineImages,
    TextbookBlock,
    baseline_step,
    baseline_transform,
    textbook,
)
from expertgrid.bench.peaks import Peaks, largest_convolutions, measure_peaks
from expertgrid.bench.rounds import in_turns
from expertgrid.bench.training import TrainingSpeed
from expertgrid.model.pixels import normalise
from expertgrid.model.presets import PRESETS
from expertgrid.model.registry import build
from expertgrid.model.variants import vary


def speed_of(loop_s: list[float], bare_s: list[float], baseline_s: list[float], fp32_flops: float) -> TrainingSpeed:
    """Of steps of 2 batches of 8 images in float32, on a device with that peak."""
    known = dict.fromkeys(("model", "device", "torch", "peak_memory_is"), "")
    known |= dict.fromkeys(("bfloat16", "compiled", "kernels", "graphs"), False)
    known |= {"batch": 8, "image_size": 32, "steps": 2, "threads": 1, "macs": 10, "baseline_workers": 2}
    known |= {"peak_memory_bytes": 0}
    peaks = Peaks(bf16_flops=1e6, fp32_flops=fp32_flops, copy_bytes_per_s=1.0)
    baselines_s = {"slow": [100.0] * len(baseline_s), "fp32, eager": baseline_s}
    return TrainingSpeed.of(loop_s, bare_s, baselines_s, peaks=peaks, compile_seconds=0, **known)


def test_training_speeds_are_ratios_of_rounds_in_turns():
    order = []

    def rounds(name: str, seconds: list[float]):
        left = iter(seconds)
        return lambda: order.append(name) or next(left)

    times = {"loop": [1.1, 2.2, 4.4], "bare": [1.0, 2.0, 4.0], "baseline": [2.2, 8.8, 13.2]}
    seconds = in_turns({name: rounds(name, values) for name, values in times.items()}, 3)
    assert seconds == times
    assert order == ["baseline", "bare", "loop", "loop", "bare", "baseline", "baseline", "bare", "loop"]
    speed = speed_of(*seconds.values(), fp32_flops=1e3)
    assert (speed.rounds, speed.device_peak_flops) == (3, 1e3)
    assert speed.overhead_percent == pytest.approx(10)
    assert speed.images_per_s == pytest.approx(16 / 2.2)
    assert speed.bare_images_per_s == pytest.approx(8)
    assert speed.peak_share == pytest.approx(6 * 10 * speed.images_per_s / 1e3)
    assert f"training uses {100 * speed.peak_share:.1f}% of its fp32 peak" in training.notes(speed)[-1]


def test_a_ratio_of_times_has_an_interval_over_its_rounds():
    """Of 20.8, 18.8 and 230.7 images/s nothing can be told, and of a single round neither."""
    logs = np.log([2.0, 4.0, 3.0])
    mean, half = logs.mean(), stats.t.ppf(0.99, 2) * stats.sem(logs)
    speed = speed_of([1.0] * 3, [1.0] * 3, [2.0, 4.0, 3.0], fp32_flops=1e3)
    assert (speed.ratio, *speed.ratio_interval) == pytest.approx(np.exp([mean, mean - half, mean + half]))
    assert training.rows(speed)[0]["x baseline"] == (speed.ratio, *speed.ratio_interval)
    for baseline_s, verdict in (
        ([1 / 20.8, 1 / 18.8, 1 / 230.7], "can't tell"), ([9.0], "can't tell"), ([2.0, 2.1, 2.2], "faster"),
    ):  # fmt: skip
        ones = [1.0] * len(baseline_s)
        assert speed_of(ones, ones, baseline_s, fp32_flops=1e3).verdict == verdict


def test_a_share_of_the_peak_above_1_is_a_failed_measurement():
    speed = speed_of([1.0], [1.0], [1.0], fp32_flops=10.0)
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


def small_baseline(labels_B: torch.Tensor) -> Baseline:
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10))
    transform = baseline_transform((0.5,) * 3, (0.5,) * 3, (8, 8), crop_padding=2, hflip=0.5, cutout=4)
    images = BaselineImages(torch.full((8, 8, 8, 3), 255, dtype=torch.uint8), labels_B, transform)
    assert (images[0][0] == 0).any()  # of Cutout; all else is 1, or -1 where the crop has its border
    return Baseline(net, adam, images, batch=4, steps=2, smoothing=0.1, device=torch.device("cpu"))


@pytest.mark.parametrize("bfloat16", [False, True])
def test_baseline_rounds_train(bfloat16):
    baseline, optimizers = dataclasses.replace(small_baseline(torch.arange(8)), bfloat16=bfloat16), []

    def optimizer(net: torch.nn.Module) -> torch.optim.Optimizer:
        optimizers.append(adam(net))
        return optimizers[0]

    assert next(dataclasses.replace(baseline, optimizer=optimizer).rounds()) > 0
    (group,) = optimizers[0].param_groups
    assert group["fused"] is None
    assert not torch.equal(group["params"][0], baseline.net[1].weight)


@pytest.mark.parametrize(("fp32_s", "is_faster"), [(0.5, True), (0.95, False), (2.0, False)])
def test_the_precision_is_that_of_the_faster_steps(fp32_s, is_faster, monkeypatch, digits):
    times = {True: fp32_s, False: 1.0}
    monkeypatch.setattr(precision, "rounds_of", lambda trial, data, device, how, *_: lambda: times[how.fp32])
    fields = {"width": 0.0625, "recipe.epochs": 2}
    trials = [cell.trials[0] for cell in Study(name="test", question="?", seeds=1, set=fields).cells(digits)]
    assert precision.time_both(trials, digits) is is_faster
    monkeypatch.setattr(precision, "computes_bfloat16", lambda device: True)
    assert precision.networks_to_time(trials, digits, torch.device("cpu")) == []
    monkeypatch.setattr(precision, "LONG", 0)
    assert precision.networks_to_time(trials, digits, torch.device("cpu")) == [], "too few steps"
    monkeypatch.setattr(precision, "ROUNDS", 0)
    monkeypatch.setattr(precision, "STEPS", 1)
    assert precision.networks_to_time(trials, digits, torch.device("cpu")) == trials[:1]
    assert precision.networks_to_time(trials, digits, torch.device("cuda")) == []


def test_the_baseline_has_a_process_of_its_own_whose_errors_are_raised_here():
    """That it trains there is seen in `measure_training`."""
    baseline = small_baseline(torch.arange(8) + 10)
    with baseline.in_own_process() as run, pytest.raises(IndexError, match="Target [0-9]+ is out of bounds"):
        assert len(multiprocessing.active_children()) == 1
        run()
    assert multiprocessing.active_children() == []


def test_peaks_are_of_the_device(monkeypatch):
    monkeypatch.setattr("expertgrid.bench.peaks.SIZE", 64)
    peaks = measure_peaks(torch.device("cpu"), measure_s=0.01)
    assert min(peaks.bf16_flops, peaks.fp32_flops, peaks.copy_bytes_per_s) > 1e6
    assert peaks.best(peaks.model_copy(update={"fp32_flops": 1e30})) == peaks.model_copy(update={"fp32_flops": 1e30})


def test_peaks_are_of_a_networks_convolutions_too(monkeypatch):
    """Their operations are those that PyTorch counts. A peak is that of the fastest."""
    net = build(vary(PRESETS["segmented"], "width", 0.125)).eval()
    monkeypatch.setattr("expertgrid.bench.peaks.LARGEST", 1000)
    convolutions = largest_convolutions(net, (2, 3, 32, 32))
    times = Counter()
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_pre_hook(lambda conv, x: times.update([(x[0].shape, conv.weight.shape)]))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.zeros(2, 3, 32, 32))
    operations = sum(conv.operations * times[conv.x, conv.weight] for conv in convolutions)
    assert operations == counter.get_flop_counts()["Global"][torch.ops.aten.convolution]
    monkeypatch.setattr("expertgrid.bench.peaks._rate", lambda conv, *_: 1e30 * conv.operations)
    peaks = measure_peaks(torch.device("cpu"), measure_s=0, size=8, convolutions=convolutions[-2:])
    assert peaks.fp32_flops == 1e30 * convolutions[-1].operations


def test_what_is_copied_cannot_be_compressed(monkeypatch):
    sources = []
    monkeypatch.setattr("expertgrid.bench.peaks.SIZE", 8)
    monkeypatch.setattr("expertgrid.bench.peaks.SOME_BYTES", 2**16)
    copy_ = torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, source: sources.append(source) or copy_(self, source))
    measure_peaks(torch.device("cpu"), measure_s=0)
    assert len(zlib.compress(sources[0].numpy().tobytes())) > 0.99 * 2**16


def test_a_profile_is_of_real_steps_of_the_recipe(expertgrid):
    """In both image sizes of the recipe, with its optimiser and its moving average."""
    arguments = "bench-train", "speed", "--profile", "--batch", 2, "--steps", 1, "--device", "cpu", "--compile", "off"
    outcome = expertgrid(*arguments, "--format", "json")
    assert outcome.status == 0, outcome.err
    table = json.loads(outcome.out)
    for size in ("24x24", "32x32"):
        rows = {row["operator"]: row for row in table if row["images"] == size}
        assert sum(row["share %"] for row in rows.values()) == pytest.approx(100)
        assert {"aten::convolution_backward", "aten::baddbmm", "aten::lerp_"} <= set(rows), "Muon, and the average"
        assert rows["aten::convolution_backward"]["calls a step"] == 10


STOPPED = """
from expertgrid.ablations.cli import interrupt

if __name__ == "__main__":
    interrupt.watch()
    try:
        import torch
        from test_training import small_baseline

        with small_baseline(torch.arange(8)).in_own_process() as run:
            run()
            print("trains", flush=True)
            while True:
                run()
    except KeyboardInterrupt:
        raise SystemExit(interrupt.INTERRUPTED) from None
"""


@pytest.mark.parametrize("send", [os.killpg, pytest.param(os.kill, marks=pytest.mark.nightly)])
def test_a_signal_ends_the_baseline_and_its_workers_in_silence(send):
    """To all processes of a job, as a system sends it, or to the first alone."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY / "src"), str(REPOSITORY / "tests"), *sys.path])}
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPED], text=True, env=env, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout.readline() == "trains\n"
    send(process.pid, signal.SIGTERM)
    assert process.communicate(timeout=60) == ("", "")  # all processes have closed their ends
    assert process.returncode == 130
