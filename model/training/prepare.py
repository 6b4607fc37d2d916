"""What is settled before a training's first step: how it is computed, and which batch size fits."""

from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

import torch

from expertgrid.model.fast.compiled import compile_net
from expertgrid.model.fast.cuda_graphs import Recorder
from expertgrid.model.fast.execution import LABELS, ExecutionOptions, ExecutionPlan
from expertgrid.model.system.errors import reason_of
from expertgrid.model.training.augment import augment
from expertgrid.model.training.loader import steps_per_epoch
from expertgrid.model.training.loop import Training, TrainingError, start, train, uses_bfloat16
from expertgrid.model.training.splits import ResidentData, Splits
from expertgrid.model.training.trial import Trial


class _FirstStep(Exception):
    """A training has done its first step."""


def fitting_batch_size(trial: Trial, data: ResidentData) -> int | None:
    """The largest of a half, a quarter, ... of a trial's batch size at which one step fits into the device's memory.

    None where none fits.
    """

    def end() -> None:
        raise _FirstStep

    size = trial.recipe.batch_size // 2
    while size >= 2:  # batch norm needs two values
        smaller = trial.model_copy(update={"recipe": trial.recipe.model_copy(update={"batch_size": size})})
        try:
            splits = data.splits(trial.hold_out, trial.seed)
            with suppress(_FirstStep):
                list(train(smaller, splits, start(smaller, splits), after_step=end))
            return size
        except torch.OutOfMemoryError:
            size //= 2
        finally:
            if data.device.type == "cuda":
                torch.cuda.empty_cache()
    return None


def planned_steps(trial: Trial, images: int) -> int:
    """The steps of a whole training on so many images."""
    return steps_per_epoch(trial.recipe, images) * trial.recipe.epochs


@dataclass(frozen=True)
class Prepared:
    """How a training runs."""

    plan: ExecutionPlan  # what it uses
    seconds: float  # that the compilers took
    without: list[str]  # what failed and is not used, each with its reason


def prepare(trial: Trial, splits: Splits, training: Training, execution: ExecutionOptions, steps: int) -> Prepared:
    """Prepares a training of `steps` steps to run as `execution` chooses: precision, kernels, compiler, CUDA graphs.

    Kernels and networks are compiled for the image sizes of the trial. Raises TrainingError where something fails that
    was asked for.
    """
    device = splits.device
    training.bfloat16 = uses_bfloat16(trial.recipe, device, execution.fp32)
    plan = execution.plan(trial.model, steps, device, training.optimizer)
    compile_seconds, without = 0.0, []
    for name in ("kernels", "compile"):  # the compiler takes what the kernels leave
        if getattr(plan, name):
            try:
                seconds = _compile(name, trial, splits, training, steps if execution.compile == "auto" else None)
            except Exception as error:  # neither compiler's errors have a type of their own
                if getattr(execution, name) == "on":
                    raise TrainingError(f"--{name} on: {LABELS[name]} failed: {reason_of(error)}") from error
                without.append(f"{LABELS[name]}, which failed: {reason_of(error)}")
                seconds = 0.0
            compile_seconds += seconds
            plan = replace(plan, **{name: seconds > 0})
    if execution.graphs == "on" and not plan.graphs:
        raise TrainingError(f"--graphs on: the optimiser {trial.recipe.opt} cannot be recorded in a CUDA graph")
    if plan.graphs:
        training.recorder = Recorder(training.optimizer, device)
    return Prepared(plan, compile_seconds, without)


def _compile(name: str, trial: Trial, splits: Splits, training: Training, steps: int | None) -> float:
    """Compiles a network's kernels, or the network, on batches like the trial's, and has the network use them.

    `name` is "kernels" or "compile", which with `steps` must be faster. Returns the seconds that it took; 0 where
    the network stays as it is.
    """
    recipe, device = trial.recipe, splits.device
    if training.frozen:  # both compute norms by the batch
        return 0.0
    if name == "kernels":
        from expertgrid.model.fast.kernels import use_kernels as use  # Triton is not everywhere
    else:
        use = partial(compile_net, steps=steps)
    mean_C, std_C = (torch.tensor(values, device=device) for values in recipe.mean_std(splits.data))
    pixels_BHWC, generator = splits.train.pixels(slice(recipe.batch_size)), torch.Generator(device)
    sizes = recipe.image_sizes(splits.data.image_size)
    augmented = [augment(recipe, pixels_BHWC, mean_C, std_C, generator, size=size) for size in sizes]
    return use(training.net, augmented, training.bfloat16)
