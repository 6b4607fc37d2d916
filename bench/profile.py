"""Where the time of a training goes: the longest operators of its steps, or kernels on CUDA.

The steps are real ones of the recipe: its loader, augmentation and image sizes, its optimiser, schedule and moving
average of weights.
"""

from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, schedule

from expertgrid.bench.training import CIFAR_TRAIN, prepared_training, random_trial, recipe_of
from expertgrid.model.fast.cuda_graphs import WARM_UP
from expertgrid.model.fast.execution import ExecutionOptions
from expertgrid.model.system.machine import device_name
from expertgrid.model.training.loop import train, uses_bfloat16

LONGEST = 20  # operators or kernels that have a row
NAME = 60  # characters of a name: a kernel's can have hundreds


def profile_training(
    preset: str,
    batch: int | None,
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
    own = recipe_of(preset)
    recipe = own.model_copy(update={"batch_size": batch or own.batch_size})
    trial, splits = random_trial(preset, recipe, warm_up + steps, device)
    whole = recipe.epochs * (CIFAR_TRAIN // recipe.batch_size)
    training, prepared = prepared_training(trial, splits, execution, whole, notice)
    kind, part = (DeviceType.CUDA, "kernel") if on_cuda else (DeviceType.CPU, "operator")
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_cuda]
    table: list[dict[str, object]] = []
    epochs = {recipe.image_size(epoch, splits.data.image_size): epoch for epoch in (0, recipe.epochs - 1)}
    for (height, width), training.epoch in epochs.items():
        with profile(
            activities=activities, schedule=schedule(wait=0, warmup=warm_up, active=steps, repeat=1)
        ) as profiled:
            next(train(trial, splits, training, after_step=profiled.step))
        events = [
            event for event in profiled.key_averages() if event.device_type == kind and not event.is_user_annotation
        ]
        us = {event: event.self_device_time_total if on_cuda else event.self_cpu_time_total for event in events}
        longest = sorted(us, key=lambda event: -us[event])
        parts = [(event.key[:NAME], event.count, us[event]) for event in longest[:LONGEST]]
        others = longest[LONGEST:]
        parts += [("others", sum(event.count for event in others), sum(us[event] for event in others))] * bool(others)
        table += [
            {"images": f"{height}x{width}", part: name, "calls a step": calls / steps,
             "ms a step": time_us / steps / 1000, "share %": 100 * time_us / sum(us.values())}
            for name, calls, time_us in parts
        ]  # fmt: skip
    average = f", moving average {recipe.ema_decay:g}" if training.average else ""
    dtype = "bf16" if uses_bfloat16(recipe, device) else "fp32"
    return table, [
        f"{preset}, batch {recipe.batch_size}, {recipe.opt}{average}, {dtype}, {prepared.plan}, on "
        f"{device_name(device)}; means of {steps} steps. The profiler makes operators slower that take microseconds."
    ]
