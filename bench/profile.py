"""Where the time of a training goes: the longest operators of its steps, or kernels on CUDA.

The steps are real ones of the recipe: its loader, augmentation and image sizes, its optimiser, schedule and moving
average of weights.
"""

from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, schedule

from expertgrid.bench.rounds import prepared_training
from expertgrid.bench.training import CIFAR_TRAIN, random_trial
from expertgrid.model.config import Network
from expertgrid.model.fast.cuda_graphs import WARM_UP
from expertgrid.model.fast.execution import ExecutionOptions
from expertgrid.model.system.machine import device_name
from expertgrid.model.training.loop import train
from expertgrid.model.training.recipe import Recipe

LONGEST = 20  # operators or kernels that have a row
NAME = 60  # characters of a name: a kernel's can have hundreds


def profile_training(
    name: str,
    config: Network,
    own: Recipe,
    batch: int | None,
    image_size: int,
    steps: int | None,
    device: torch.device,
    execution: ExecutionOptions,
    notice: Callable[[str], object],
) -> tuple[list[dict[str, object]], list[str]]:
    """The rows and notes of a table: the operators or kernels of a step, for each size that the recipe gives images.

    `batch` is the recipe's and `steps` 2, or 20 on CUDA, where they are None. Execution and errors are as in
    `bench.training.measure_training`.
    """
    execution.check(device)
    on_cuda = device.type == "cuda"
    steps, warm_up = steps or (20 if on_cuda else 2), WARM_UP + 2 if on_cuda else 1
    recipe = own.model_copy(update={"batch_size": batch or own.batch_size})
    trial, splits = random_trial(name, config, recipe, warm_up + steps, image_size, device)
    whole = recipe.epochs * (CIFAR_TRAIN // recipe.batch_size)
    training, prepared = prepared_training(trial, splits, execution, whole, notice)
    part, kind = ("kernel", DeviceType.CUDA) if on_cuda else ("operator", DeviceType.CPU)
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_cuda]
    when = schedule(wait=warm_up - 1, warmup=1, active=steps, repeat=1)
    table: list[dict[str, object]] = []
    epochs = {recipe.image_size(epoch, splits.data.image_size): epoch for epoch in (0, recipe.epochs - 1)}
    for (height, width), training.epoch in epochs.items():
        with profile(activities=activities, schedule=when) as profiled:
            next(train(trial, splits, training, after_step=profiled.step))
        parts = sorted(
            (event.self_device_time_total if on_cuda else event.self_cpu_time_total, event.count, event.key[:NAME])
            for event in profiled.key_averages()
            if event.device_type == kind and not event.is_user_annotation
        )
        others, longest = parts[:-LONGEST], parts[: -LONGEST - 1 : -1]
        if others:
            longest.append((sum(us for us, *_ in others), sum(calls for _, calls, _ in others), "others"))
        total_us = sum(us for us, *_ in parts)
        table += [
            {"images": f"{height}x{width}", part: name, "calls a step": calls / steps, "ms a step": us / steps / 1000,
             "share %": 100 * us / total_us}
            for us, calls, name in longest
        ]  # fmt: skip
    average = f", moving average {recipe.ema_decay:g}" if training.average else ""
    dtype = "bf16" if training.bfloat16 else "fp32"
    return table, [
        f"{name}, batch {recipe.batch_size}, {recipe.opt}{average}, {dtype}, {prepared.plan}, on "
        f"{device_name(device)}; means of {steps} steps. The profiler makes operators slower that take microseconds."
    ]
