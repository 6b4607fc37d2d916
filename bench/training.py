"""Training throughput: expertgrid's loop beside a PyTorch baseline of the same network, and beside bare steps.

The baseline is that of `bench.baseline`. Bare steps are the loop's own training step (`model.training.step`) on one
batch that is ready on the device: the loop's overhead is its time over theirs. All are measured in short rounds, in
turns, so that a change of the machine's speed hits all of them.
"""

import os
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, TypeVar

import torch
from pydantic import BaseModel

from expertgrid.bench.baseline import BaselineImages, baseline_rounds, baseline_transform, textbook
from expertgrid.bench.peaks import Peaks, largest_convolutions, measure_peaks, synchronise
from expertgrid.model.cost import check_image_size, cost
from expertgrid.model.fast.execution import ExecutionOptions, ExecutionPlan
from expertgrid.model.presets import network
from expertgrid.model.system.errors import InputError
from expertgrid.model.system.machine import device_name, usable_cores
from expertgrid.model.training.augment import augment
from expertgrid.model.training.data import ImageData
from expertgrid.model.training.loop import Training, TrainingError, start, train, uses_bfloat16
from expertgrid.model.training.optimise import make_optimizer
from expertgrid.model.training.prepare import prepare
from expertgrid.model.training.recipe import RECIPES, Recipe
from expertgrid.model.training.splits import Splits
from expertgrid.model.training.step import training_step
from expertgrid.model.training.trial import Trial

Key = TypeVar("Key")

CIFAR_TRAIN = 45_000  # images of CIFAR-10 that are trained on; the others validate
SIZE = 32  # height and width of the images, in pixels


class TrainingSpeed(BaseModel):
    """Images a second of three ways to train, each the median of `rounds`, and their raw seconds."""

    model: str
    device: str
    threads: int
    torch: str
    batch: int
    steps: int  # in a round
    rounds: int
    bfloat16: bool  # of the loop and of the bare steps
    kernels: bool  # likewise
    compiled: bool
    graphs: bool
    compile_seconds: float  # of kernels or blocks, before the first round
    images_per_s: float
    bare_images_per_s: float
    baseline_images_per_s: float
    ratio: float  # median over the rounds of the loop's images/s over the baseline's
    overhead_percent: float  # median over the rounds of loop / bare - 1
    peak_memory_bytes: int | None  # of the loop, in its first round
    peak_memory_is: str
    macs: int  # multiply-accumulates of one image's forward pass
    peaks: Peaks
    device_peak_flops: float  # of the peaks, that of the type that the loop computes in
    peak_share: float | None  # that the loop uses; a step is the work of three forward passes. None: above 1, so false
    baseline_workers: int
    loop_s: list[float]
    bare_s: list[float]
    baseline_s: list[float]

    @classmethod
    def of(cls, loop_s: list[float], bare_s: list[float], baseline_s: list[float], **known: Any) -> "TrainingSpeed":
        """The speeds that follow from the seconds of each round; `known` are the other fields."""
        images = known["batch"] * known["steps"]
        rate, bare_rate, baseline_rate = (images / statistics.median(times) for times in (loop_s, bare_s, baseline_s))
        peaks = known["peaks"]
        peak = peaks.bf16_flops if known["bfloat16"] else peaks.fp32_flops
        share = 3 * 2 * known["macs"] * rate / peak
        return cls(
            **known,
            images_per_s=rate,
            bare_images_per_s=bare_rate,
            baseline_images_per_s=baseline_rate,
            ratio=statistics.median(baseline / loop for baseline, loop in zip(baseline_s, loop_s)),
            overhead_percent=100 * (statistics.median(loop / bare for loop, bare in zip(loop_s, bare_s)) - 1),
            device_peak_flops=peak,
            peak_share=share if share <= 1 else None,
            rounds=len(loop_s),
            loop_s=loop_s,
            bare_s=bare_s,
            baseline_s=baseline_s,
        )


def measure_training(
    preset: str,
    batch: int,
    steps: int | None,
    rounds: int,
    device: torch.device,
    execution: ExecutionOptions,
    notice: Callable[[str], object] = lambda text: None,
    matrices: int | None = None,
) -> TrainingSpeed:
    """Trains a preset on random images by its own recipe, or by `fast`, in `rounds` rounds of `steps` steps.

    `steps` is 2, or 100 on CUDA, where it is None. What `execution` leaves to expertgrid is chosen as for a whole
    training on 45,000 images; what does not work is left out, and `notice` is told. The peaks are of `matrices` of that
    size and of the network's convolutions, before and after the rounds. Raises InputError for a preset that does not
    exist or does not take the images, and for what was asked for and does not work.
    """
    execution.check(device)
    steps = steps or (100 if device.type == "cuda" else 2)
    config = network(preset)
    named = recipe_of(preset)
    whole = named.epochs * (CIFAR_TRAIN // batch)
    execution, without = execution.usable([execution.plan(config, whole, device)], device)
    fields: dict[str, Any] = dict(named)
    fields |= {"batch_size": batch, "epochs": rounds + 2, "small_size": 0, "small_share": None}  # all at full size
    recipe = Recipe(**fields)
    images = ImageData.random(train=batch * steps, height=SIZE, width=SIZE)
    splits = Splits.undivided(images, device)
    check_image_size(preset, config, images.image_size, images.name)
    trial = Trial(model_name=preset, model=config, recipe=recipe, source="random", fingerprint="random", seed=0)
    training, bare = start(trial, splits), start(trial, splits)
    shape = batch, images.channels, *images.image_size
    peaks_now = partial(
        measure_peaks, device, size=matrices, convolutions=largest_convolutions(training.net.train(), shape)
    )
    peaks = peaks_now()
    try:
        prepared, _ = (prepare(trial, splits, made, execution, whole) for made in (training, bare))
    except TrainingError as error:
        raise InputError(str(error)) from error
    for text in (*without, *prepared.without):
        notice(f"measured without {text}")
    epochs = train(trial, splits, training)
    memory, memory_is = peak_memory(device, lambda: next(epochs))
    with baseline_of(trial, splits, steps) as baseline_round:
        bare_step = bare_step_of(trial, splits, bare)
        ways = {
            "loop": lambda: next(epochs).train_seconds,
            "bare": lambda: bare_round(bare_step, steps, device),
            "baseline": baseline_round,
        }
        in_turns(ways, 1)
        seconds = in_turns(ways, rounds)
    return TrainingSpeed.of(
        seconds["loop"], seconds["bare"], seconds["baseline"],
        model=preset, device=device_name(device), threads=torch.get_num_threads(), torch=torch.__version__,
        batch=batch, steps=steps, bfloat16=uses_bfloat16(recipe, device), kernels=prepared.plan.kernels,
        compiled=prepared.plan.compile, graphs=prepared.plan.graphs, compile_seconds=prepared.seconds,
        peak_memory_bytes=memory, peak_memory_is=memory_is, macs=cost(config, *images.image_size)[1],
        peaks=peaks.best(peaks_now()), baseline_workers=usable_cores(),
    )  # fmt: skip


def recipe_of(preset: str) -> Recipe:
    """The recipe of a preset's report, or `fast` for a network without one."""
    return RECIPES.get(preset.removeprefix("expertnet_"), RECIPES["fast"])


def bare_step_of(trial: Trial, splits: Splits, training: Training) -> Callable[[], object]:
    """The training step of a trial on its first batch, augmented once; a CUDA graph where the training has those."""
    recipe, device, batch = trial.recipe, splits.device, trial.recipe.batch_size
    mean_C, std_C = (torch.tensor(values, device=device) for values in recipe.mean_std(splits.data))
    x_BCHW = augment(recipe, splits.train.pixels_BHWC[:batch], mean_C, std_C, torch.Generator(device))
    y_B = splits.train.labels_B[:batch]
    step = training_step(training.net.train(), training.optimizer, uses_bfloat16(recipe, device), recipe.smoothing)
    return partial(step if training.recorder is None else partial(training.recorder, step), x_BCHW, y_B, y_B)


def baseline_of(trial: Trial, splits: Splits, steps: int) -> AbstractContextManager[Callable[[], float]]:
    """`baseline_rounds` of a trial's network, from its initial weights, on its images."""
    recipe, device = trial.recipe, splits.device
    net = textbook(start(trial, splits).net.to("cpu").to(memory_format=torch.contiguous_format))
    augmentation = recipe.crop_padding, recipe.hflip, recipe.cutout
    transform = baseline_transform(*recipe.mean_std(splits.data), splits.data.image_size, *augmentation)
    pil_images = BaselineImages(splits.train.pixels_BHWC, splits.train.labels_B, transform)
    return baseline_rounds(
        net, partial(make_optimizer, recipe), pil_images, recipe.batch_size, steps, recipe.smoothing, device
    )


def in_turns(ways: dict[Key, Callable[[], float]], rounds: int) -> dict[Key, list[float]]:
    """The seconds that each way returns, `rounds` times, in turns whose order is reversed each round."""
    seconds: dict[Key, list[float]] = {name: [] for name in ways}
    for i in range(rounds):
        for name in list(ways)[:: 1 if i % 2 else -1]:
            seconds[name].append(ways[name]())
    return seconds


def bare_round(step: Callable[[], object], steps: int, device: torch.device) -> float:
    """Seconds of `steps` steps on one batch that is ready on the device."""
    synchronise(device)
    started = time.perf_counter()
    for _ in range(steps):
        step()
    synchronise(device)
    return time.perf_counter() - started


def peak_memory(device: torch.device, run: Callable[[], object]) -> tuple[int | None, str]:
    """Calls `run`; the most memory that it held, in bytes, and which memory that is.

    On CUDA all that tensors held at a time; on a CPU by how much the most that the process ever had resident grew.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device), "allocated on the GPU"
    try:
        from resource import RUSAGE_SELF, getrusage
    except ImportError:  # Windows
        run()
        return None, "not measured on this system"
    before = getrusage(RUSAGE_SELF).ru_maxrss
    run()
    unit = 1 if os.uname().sysname == "Darwin" else 1024
    return (getrusage(RUSAGE_SELF).ru_maxrss - before) * unit, "growth of the process's largest resident set"


def rows(speed: TrainingSpeed) -> list[dict[str, object]]:
    """The three ways to train as the rows of a table, with their speeds relative to the PyTorch baseline."""
    rates = {
        "expertgrid": (speed.images_per_s, speed.ratio),
        "bare steps on one batch": (
            speed.bare_images_per_s,
            statistics.median(baseline / bare for baseline, bare in zip(speed.baseline_s, speed.bare_s)),
        ),
        "PyTorch baseline": (speed.baseline_images_per_s, 1.0),
    }
    return [
        {"training": name, "images/s": round(rate, 1), "x baseline": round(ratio, 2)}
        for name, (rate, ratio) in rates.items()
    ]


def notes(speed: TrainingSpeed) -> list[str]:
    """What a reader of the table must know, in sentences."""
    peaks, dtype = speed.peaks, "bf16" if speed.bfloat16 else "fp32"
    how = str(ExecutionPlan(kernels=speed.kernels, compile=speed.compiled, graphs=speed.graphs))
    how += f" (compiled in {speed.compile_seconds:.1f} s before the clock started)" * bool(speed.compile_seconds)
    share = (
        f"training uses {100 * speed.peak_share:.1f}% of its {dtype} peak"
        if speed.peak_share
        else ("training was faster than these peaks, so that they are wrong: measure again with nothing else running")
    )
    memory = "" if speed.peak_memory_bytes is None else f"{speed.peak_memory_bytes / 2**20:,.0f} MiB, "
    return [
        f"{speed.model}, batch {speed.batch}, on {speed.device}, {speed.threads} threads, torch {speed.torch}; medians "
        f"of {speed.rounds} rounds of {speed.steps} steps, in turns.",
        f"expertgrid: {dtype}, channels last, {how}, images and augmentation on the device; its loop takes "
        f"{speed.overhead_percent:+.1f}% of the bare steps' time.",
        f"PyTorch baseline: fp32, eager, experts stacked, torchvision transforms in {speed.baseline_workers} worker "
        "processes.",
        f"Memory at most: {memory}{speed.peak_memory_is}.",
        f"{speed.macs:,} MACs an image; the device's peaks, of matrix products and of the network's convolutions: "
        f"{peaks.bf16_flops / 1e12:,.2f} TFLOP/s in bf16 and {peaks.fp32_flops / 1e12:,.2f} in fp32; it copies "
        f"{peaks.copy_bytes_per_s / 1e9:,.1f} GB/s; {share}.",
    ]
