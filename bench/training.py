"""Training throughput: expertgrid's loop beside a PyTorch baseline of the same network, and beside bare steps.

The baseline is that of `bench.baseline`. Bare steps are the loop's own training step (`model.training.step`) on one
batch that is ready on the device: the loop's overhead is its time over theirs. All are measured in short rounds, in
turns, so that a change of the machine's speed hits all of them.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from expertgrid.bench.baseline import Baseline, BaselineImages, baseline_transform, textbook
from expertgrid.bench.host import peak_bytes, reset_peak
from expertgrid.bench.peaks import Peaks, largest_convolutions, measure_peaks
from expertgrid.bench.precision import time_both
from expertgrid.bench.rounds import at_full_size, in_turns, prepared_training
from expertgrid.bench.timing import Ratio, Word, typical_ratio
from expertgrid.bench.timm_script import timm_network, timm_script
from expertgrid.model.config import Network, TimmModel
from expertgrid.model.cost import check_image_size, cost
from expertgrid.model.fast.compiled import why_unavailable
from expertgrid.model.fast.execution import ExecutionOptions, ExecutionPlan
from expertgrid.model.foreign import described
from expertgrid.model.registry import build
from expertgrid.model.system.errors import reason_of
from expertgrid.model.system.machine import computes_bfloat16, device_name, usable_cores
from expertgrid.model.training.data import ImageData
from expertgrid.model.training.loader import Loader
from expertgrid.model.training.loop import Training, seconds, start, train
from expertgrid.model.training.optimise import make_optimizer
from expertgrid.model.training.recipe import RECIPES, Recipe
from expertgrid.model.training.splits import Splits
from expertgrid.model.training.step import training_step
from expertgrid.model.training.trial import Trial

CIFAR_TRAIN = 45_000  # images of CIFAR-10 that are trained on; the others validate


class TrainingSpeed(BaseModel):
    """Images a second of the ways to train, each the median of `rounds`, and their raw seconds."""

    model: str
    device: str
    threads: int
    torch: str
    batch: int
    image_size: int  # height and width, in pixels
    steps: int  # in a round
    rounds: int
    bfloat16: bool  # of the loop and of the bare steps
    kernels: bool  # likewise
    compiled: bool
    graphs: bool
    compile_seconds: float  # of kernels or the network, before the first round
    images_per_s: float
    bare_images_per_s: float
    baseline_images_per_s: float
    baseline: str  # the fastest of the PyTorch baselines, which is the one that is meant elsewhere
    ratio: float  # how many times as fast as the baseline the loop is
    ratio_interval: tuple[float, float]  # 98%, over the rounds; without end for a single one
    verdict: Word  # on the loop, against the baseline
    overhead_percent: float  # time of the loop over that of bare steps, less 1
    peak_memory_bytes: int | None  # of the loop, in its first round
    peak_memory_is: str
    macs: int  # multiply-accumulates of one image's forward pass
    peaks: Peaks
    device_peak_flops: float  # of the peaks, that of the type that the loop computes in
    peak_share: float | None  # that the loop uses; a step is the work of three forward passes. None: above 1, so false
    baseline_workers: int
    loop_s: list[float]
    bare_s: list[float]
    baselines_s: dict[str, list[float]]  # of each PyTorch baseline

    @classmethod
    def of(
        cls, loop_s: list[float], bare_s: list[float], baselines_s: dict[str, list[float]], **known: Any
    ) -> "TrainingSpeed":
        """The speeds that follow from the seconds of each round; `known` are the other fields."""
        baseline = min(baselines_s, key=lambda name: statistics.median(baselines_s[name]))
        baseline_s = baselines_s[baseline]
        images = known["batch"] * known["steps"]
        rate, bare_rate, baseline_rate = (images / statistics.median(times) for times in (loop_s, bare_s, baseline_s))
        peaks, ratio = known["peaks"], times_as_fast(baseline_s, loop_s)
        peak = peaks.bf16_flops if known["bfloat16"] else peaks.fp32_flops
        share = 3 * 2 * known["macs"] * rate / peak
        return cls(
            **known,
            images_per_s=rate,
            bare_images_per_s=bare_rate,
            baseline_images_per_s=baseline_rate,
            baseline=baseline,
            ratio=ratio.value,
            ratio_interval=(ratio.low, ratio.high),
            verdict=ratio.word,
            overhead_percent=100 * (1 / times_as_fast(bare_s, loop_s).value - 1),
            device_peak_flops=peak,
            peak_share=share if share <= 1 else None,
            rounds=len(loop_s),
            loop_s=loop_s,
            bare_s=bare_s,
            baselines_s=baselines_s,
        )


def times_as_fast(reference_s: Sequence[float], other_s: Sequence[float]) -> Ratio:
    """How many times as fast the other is, by the seconds of the same rounds of both."""
    return typical_ratio([math.log(reference / other) for reference, other in zip(reference_s, other_s, strict=True)])


def measure_training(
    name: str,
    config: Network,
    own: Recipe,
    batch: int,
    image_size: int,
    steps: int | None,
    rounds: int,
    device: torch.device,
    execution: ExecutionOptions,
    notice: Callable[[str], object] = lambda text: None,
    peer: Path | None = None,
) -> TrainingSpeed:
    """Trains a network on random images by a recipe, in `rounds` rounds of `steps` steps.

    `image_size` is the height and width of all images; `steps` is 2, or 100 on CUDA, where it is None. What `execution`
    leaves to expertgrid is chosen as for a whole training on 45,000 images; what does not work is left out, and
    `notice` is told. timm's `train.py`, of the check-out `peer`, is a baseline in the loop's precision, eager and
    compiled. Raises InputError for a network that does not take the images, and for what was asked for and does not
    work.
    """
    execution.check(device)
    steps = steps or (100 if device.type == "cuda" else 2)
    recipe = at_full_size(own, rounds + 2).model_copy(update={"batch_size": batch})
    trial, splits = random_trial(name, config, recipe, steps, image_size, device)
    script = (peer, timm_network(peer, trial.model)) if peer else None
    whole = own.epochs * (CIFAR_TRAIN // batch)
    if recipe.amp == "auto" and device.type == "cpu" and computes_bfloat16(device):
        execution = dataclasses.replace(execution, fp32=time_both([trial], splits.data))
    training, prepared = prepared_training(trial, splits, execution, whole, notice)
    epochs = train(trial, splits, training)
    memory, memory_is = peak_memory(device, lambda: next(epochs))
    same = ExecutionOptions.requiring(prepared.plan, not training.bfloat16)
    bare_step = bare_step_of(trial, splits, prepared_training(trial, splits, same, whole)[0])
    shape = batch, splits.data.channels, *splits.data.image_size
    convolutions = largest_convolutions(build(trial.model).train(), shape)
    peaks = measure_peaks(device, convolutions=convolutions)
    with ExitStack() as processes:
        baselines = {}
        for baseline in baselines_of(trial, splits, steps, execution.compile != "off"):
            baseline_round = processes.enter_context(baseline.in_own_process())
            try:
                baseline_round()
            except Exception as error:  # of the compiler, whose errors have no type of their own
                if not baseline.compiled:
                    raise
                notice(f"no PyTorch baseline in {baseline}: {reason_of(error)}")
            else:
                baselines[f"PyTorch, {baseline}"] = baseline_round
                if script and baseline.bfloat16 == training.bfloat16:
                    script_round = processes.enter_context(timm_script(*script, baseline, rounds + 1))
                    baselines[f"timm's train.py, {baseline}"] = script_round
        bare = partial(bare_round, bare_step, steps, device)
        ways = {"loop": lambda: next(epochs).train_seconds, "bare": bare, **baselines}
        in_turns(ways, 1)
        rounds_s = in_turns(ways, rounds)
    return TrainingSpeed.of(
        rounds_s["loop"], rounds_s["bare"], {name: rounds_s[name] for name in baselines},
        model=name, device=device_name(device), threads=torch.get_num_threads(), torch=torch.__version__,
        batch=batch, image_size=image_size, steps=steps, bfloat16=training.bfloat16, kernels=prepared.plan.kernels,
        compiled=prepared.plan.compile, graphs=prepared.plan.graphs, compile_seconds=prepared.seconds,
        peak_memory_bytes=memory, peak_memory_is=memory_is, macs=cost(trial.model, *splits.data.image_size)[1],
        peaks=peaks.best(measure_peaks(device, convolutions=convolutions)), baseline_workers=usable_cores(),
    )  # fmt: skip


def recipe_of(preset: str) -> Recipe:
    """The recipe of a preset's report, or `fast` for a network without one."""
    return RECIPES.get(preset.removeprefix("expertnet_"), RECIPES["fast"])


def random_trial(
    name: str, config: Network, recipe: Recipe, steps: int, image_size: int, device: torch.device
) -> tuple[Trial, Splits]:
    """A trial of a network on the random images of `steps` batches. Raises InputError as `measure_training`."""
    images = ImageData.random(train=recipe.batch_size * steps, height=image_size, width=image_size)
    if isinstance(config, TimmModel):
        config = described(config, images.image_size, images.name)
    else:
        check_image_size(name, config, images.image_size, images.name)
    trial = Trial(model_name=name, model=config, recipe=recipe, source="random", fingerprint="random", seed=0)
    return trial, Splits.undivided(images, device)


def bare_step_of(trial: Trial, splits: Splits, training: Training) -> Callable[[], object]:
    """The training step of a trial on its first batch, augmented once; a CUDA graph where the training has those."""
    loader = Loader(trial.recipe, splits, trial.seed)
    batch, weights_N = next(loader.epoch(0)), loader.class_weights_N
    step = training_step(training.net.train(), training.optimizer, training.bfloat16, trial.recipe, weights_N)
    take = partial(training.recorder, step) if training.recorder else step
    return partial(take, batch.x_BCHW, batch.targets, batch.labels_B)


def baselines_of(trial: Trial, splits: Splits, steps: int, compiled: bool) -> list[Baseline]:
    """The baselines of a trial's network, from its initial weights, on its images: the plain, and the tuned."""
    recipe = trial.recipe
    net = textbook(start(trial, splits).net.to("cpu").to(memory_format=torch.contiguous_format))
    augmentation = recipe.crop_padding, recipe.hflip, recipe.cutout
    transform = baseline_transform(*recipe.mean_std(splits.data), splits.data.image_size, *augmentation)
    images = BaselineImages(splits.train.pixels(), splits.train.labels_B, transform)
    optimizer = partial(make_optimizer, recipe)
    plain = Baseline(net, optimizer, images, recipe.batch_size, steps, recipe.smoothing, splits.device)
    bfloat16 = [True] * computes_bfloat16(splits.device)
    tuned = [(number, False) for number in bfloat16]
    tuned += [(number, True) for number in (False, *bfloat16) if compiled and not why_unavailable(splits.device)]
    return [plain, *(dataclasses.replace(plain, bfloat16=number, compiled=compiles) for number, compiles in tuned)]


def bare_round(step: Callable[[], object], steps: int, device: torch.device) -> float:
    """Seconds of `steps` steps on one batch that is ready on the device."""
    started = seconds(device)
    for _ in range(steps):
        step()
    return seconds(device) - started


def peak_memory(device: torch.device, run: Callable[[], object]) -> tuple[int | None, str]:
    """Calls `run`; the most memory that it held, in bytes, and which memory that is.

    On CUDA that of all tensors at a time; on a CPU the process's largest resident set.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device), "allocated on the GPU"
    reset_peak()
    run()
    most = peak_bytes()
    return most, "not measured on this system" if most is None else "of the process, with PyTorch and the images"


def rows(speed: TrainingSpeed) -> list[dict[str, object]]:
    """The ways to train as the rows of a table, with their speeds relative to the fastest PyTorch baseline."""
    images = speed.batch * speed.steps
    ways = {
        "expertgrid": (speed.images_per_s, speed.loop_s),
        "bare steps on one batch": (speed.bare_images_per_s, speed.bare_s),
        **{name: (images / statistics.median(rounds_s), rounds_s) for name, rounds_s in speed.baselines_s.items()},
    }
    table: list[dict[str, object]] = []
    for name, (rate, rounds_s) in ways.items():
        against = times_as_fast(speed.baselines_s[speed.baseline], rounds_s) if name != speed.baseline else None
        verdict = against.word if against else "the baseline"
        table.append({"training": name, "images/s": round(rate, 1), "x baseline": against, "verdict": verdict})
    return table


def notes(speed: TrainingSpeed) -> list[str]:
    """What a reader of the table must know, in sentences."""
    peaks, dtype = speed.peaks, "bf16" if speed.bfloat16 else "fp32"
    how = str(ExecutionPlan(kernels=speed.kernels, compile=speed.compiled, graphs=speed.graphs))
    how += f" (compiled in {speed.compile_seconds:.1f} s before the clock started)" * bool(speed.compile_seconds)
    share = (
        f"training uses {100 * speed.peak_share:.1f}% of its {dtype} peak"
        if speed.peak_share
        else "training was faster than these peaks, so that they are wrong: measure again with nothing else running"
    )
    memory = "" if speed.peak_memory_bytes is None else f"{speed.peak_memory_bytes / 2**20:,.0f} MiB, "
    return [
        f"{speed.model}, batches of {speed.batch} images of {speed.image_size}x{speed.image_size} pixels, on "
        f"{speed.device}, {speed.threads} threads, torch {speed.torch}; medians of {speed.rounds} rounds of "
        f"{speed.steps} steps, in turns. x: times as fast; ±: half of its 98% interval.",
        f"expertgrid: {dtype}, channels last, {how}, images and augmentation on the device; its loop takes "
        f"{speed.overhead_percent:+.1f}% of the bare steps' time.",
        f"The baseline is the fastest of these ways: {speed.baseline}. The ways of PyTorch stack the outputs of "
        f"experts, and use torchvision's transforms in {speed.baseline_workers} worker processes.",
        f"Memory at most: {memory}{speed.peak_memory_is}.",
        f"{speed.macs:,} MACs an image; the device's peaks, of matrix products and of the network's convolutions: "
        f"{peaks.bf16_flops / 1e12:,.2f} TFLOP/s in bf16 and {peaks.fp32_flops / 1e12:,.2f} in fp32; it copies "
        f"{peaks.copy_bytes_per_s / 1e9:,.1f} GB/s; {share}.",
    ]
