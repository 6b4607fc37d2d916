"""Measuring latency and training speed."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

import bench.training as timing
from ablations.cli.devices import device, usable
from ablations.cli.options import write_out
from ablations.cli.terminal import console, status
from ablations.engines import prepare
from ablations.records import Environment
from ablations.results.tables import Format, render
from ablations.study import check_fit
from ablations.training.data import ImageData
from ablations.training.loop import TrainingError, start, train, uses_bfloat16
from ablations.training.recipe import RECIPES, Recipe
from ablations.training.trial import Trial
from bench.latency import measure, rows
from bench.peaks import measure_peaks
from model.cost import cost
from model.errors import InputError
from model.fast.execution import Execution
from model.files import write_whole
from model.presets import network

CIFAR_TRAIN = 45_000  # images of CIFAR-10 that are trained on, the others validate


def bench(
    files: Sequence[Path],
    provider: str = "cpu",
    batches: Sequence[int] = (1, 8, 64),
    format: Format = "text",
    json: Path | None = None,
) -> int:
    """Prints the latency of ONNX files, and keeps the records of those in a study's export folder."""
    with status(f"measuring {', '.join(map(str, files))}"):
        records = measure(files, provider, batches)
    for file, record in zip(files, records):
        content = record.model_dump_json(indent=1).encode()
        study = file.resolve().parent.parent
        if record.trial and file.resolve().parent.name == "export" and (study / "study.toml").exists():
            write_whole(study / "bench" / f"{file.stem}-{provider}.json", content)
        if json is not None:
            write_out("--json", json, content)
    note = f"{record.device}, {record.threads} threads; images/s from the mean of all calls."
    first = [f"x first: against {files[0].name} in ONNX Runtime at the same batch size."] if len(files) > 1 else []
    print(render(rows(records), format, [note, *first]))
    return 0


def bench_train(
    preset: str, batch: int, steps: int | None, rounds: int, device_name: str, execution: Execution, format: Format
) -> int:
    """Prints the speed of a training beside the PyTorch baseline and beside bare steps on one batch."""
    on = device(device_name)
    execution.check(on)
    steps = steps or (100 if on.type == "cuda" else 2)
    config = network(preset)
    recipe = RECIPES.get(preset.removeprefix("expertnet_"), RECIPES["fast"])
    whole = recipe.epochs * (CIFAR_TRAIN // batch)
    execution = usable(execution, [execution.chosen(config, whole, on)], on)
    at_full_size = {"small_size": 0, "small_share": None}
    recipe = Recipe(**{**dict(recipe), **at_full_size, "batch_size": batch, "epochs": rounds + 2})
    images = ImageData.random(train=batch * steps, height=32, width=32).to(on)
    check_fit(preset, config, images.channels, images.image_size, images.name)
    trial = Trial(model_name=preset, model=config, recipe=recipe, source="random", fingerprint="random", seed=0)
    mean, std = recipe.mean_std(images)
    mean_C, std_C = torch.tensor(mean, device=on), torch.tensor(std, device=on)
    x_BCHW = recipe.augment(images.train.pixels_BHWC[:batch], mean_C, std_C, torch.Generator(on))
    y_B = images.train.labels_B[:batch]
    amp = uses_bfloat16(recipe, on)
    transform = timing.plain_transform(mean, std, images.image_size, recipe.crop_padding, recipe.hflip, recipe.cutout)

    with status(f"training {preset}"):
        training, bare = start(trial, images), start(trial, images)
        try:
            prepared, _ = (prepare(trial, images, state, execution, whole) for state in (training, bare))
        except TrainingError as error:
            raise InputError(str(error)) from error
        for text in prepared.without:
            console.print(f"measured without {text}", soft_wrap=True)
        epochs = train(trial, images, training)
        memory, memory_is = timing.peak_memory(on, lambda: next(epochs))
        plain = timing.textbook(start(trial, images).net.to("cpu", memory_format=torch.contiguous_format))
        plain_images = timing.PlainImages(images.train.pixels_BHWC, images.train.labels_B, transform)
        plainly = plain, recipe.optimizer, plain_images, batch, steps, recipe.smoothing, on
        with timing.plain_rounds(*plainly) as plain_round:
            bare_step = timing.bare_step(bare.net.train(), bare.optimizer, amp)
            bare_step = partial(bare_step if bare.recorder is None else partial(bare.recorder, bare_step), x_BCHW, y_B)
            ways = {
                "loop": lambda: next(epochs).train_seconds,
                "bare": lambda: timing.bare_round(bare_step, steps, on),
                "plain": plain_round,
            }
            timing.in_turns(ways, 1)
            seconds = timing.in_turns(ways, rounds)
        peaks = measure_peaks(on)
    speed = timing.TrainingSpeed.of(
        seconds["loop"], seconds["bare"], seconds["plain"],
        model=preset, device=Environment.here(on).device, threads=torch.get_num_threads(), torch=torch.__version__,
        batch=batch, steps=steps, bfloat16=amp, kernels=prepared.means.kernels, compiled=prepared.means.compile,
        graphs=training.recorded, compile_seconds=prepared.seconds,
        peak_memory_bytes=memory, peak_memory_is=memory_is, macs=cost(config, *images.image_size)[1], peaks=peaks,
        plain_workers=timing.plain_workers(),
    )  # fmt: skip
    if format == "json":
        print(speed.model_dump_json(indent=1))
        return 0
    print(render(timing.rows(speed), format, timing.notes(speed)))
    return 0
