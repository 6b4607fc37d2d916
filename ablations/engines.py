"""The local engine: it trains trials and writes their records, and yields an event for each thing that happens."""

import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ablations.events import EpochDone, Event, Stopped, TrialDone, TrialFailed, TrialNote, TrialStarted, by_seed
from ablations.isolation import SAVE_EVERY_S
from ablations.records import Environment, Failure, Predictions, Record, StudyDirectory
from ablations.training.augment import augment
from ablations.training.loop import (
    Diverged,
    Training,
    TrainingError,
    batches,
    mirrored,
    predict,
    score,
    start,
    train,
    uses_bfloat16,
)
from ablations.training.resume import read_state, write_state
from ablations.training.splits import ResidentData, Split, Splits
from ablations.training.trial import Trial
from model.checkpoint import Checkpoint, Trained
from model.cost import cost
from model.errors import InputError, reason_of
from model.fast.compiled import compile_blocks
from model.fast.cuda_graphs import Recorder
from model.fast.execution import EAGER, LABELS, ExecutionOptions, ExecutionPlan
from model.files import disk_full, now

CPU_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory")  # as PyTorch's CPU allocator says it
DEATH_S = 0.5  # in which the system tells of a process that died, after the connection to it was lost
SAVING_SHARE = 0.01  # of the time, at most, is spent on saving: where it takes long, it is done less often


@dataclass
class Saver:
    """Keeps a training's state in resume.pt, and ends the training where the user stopped it. Called after each step.

    After a crash at most SAVE_EVERY_S seconds of training are lost, or 100 times what one save takes, if that is more.
    """

    directory: StudyDirectory
    trial: Trial
    training: Training
    every_s: float
    stop: Callable[[int], bool]  # asked after each step, with the number of steps that were done
    saved: Callable[[Trial], None] = lambda trial: None  # called after each save
    due: float = field(init=False)

    def __post_init__(self) -> None:
        self.due = time.monotonic() + self.every_s

    def __call__(self) -> None:
        so_far = self.training.so_far
        assert so_far is not None  # a step was just done
        stopped = self.stop(self.training.epoch * len(so_far.losses_S) + len(so_far.rates))
        if stopped or time.monotonic() >= self.due:
            self.save()
        if stopped:
            raise Stopped

    def save(self) -> None:
        begun = time.monotonic()
        state = self.training.state_dict()
        epochs = [epoch.model_dump_json() for epoch in self.directory.epochs(self.trial.id)]
        write_state(self.directory.resume_file(self.trial.id), {"epochs": epochs, "training": state})
        now = time.monotonic()
        self.due = now + max(self.every_s, (now - begun) / SAVING_SHARE)
        self.saved(self.trial)


def run_local(
    trials: list[Trial],
    data: ResidentData,
    directory: StudyDirectory,
    save_every_s: float = SAVE_EVERY_S,
    execution: ExecutionOptions = EAGER,
    stop: Callable[[int], bool] = lambda step: False,
    at_once: int = 1,
    saved: Callable[[Trial], None] = lambda trial: None,
) -> Iterator[Event]:
    """Trains trials one after another on the data's device, each from where it was interrupted.

    Where a trial fails, its reason is written to failure.json and the other trials go on. Where the disk is full, none
    can go on, and the OSError goes to the caller. Where `execution` leaves a choice open and what is chosen fails, the
    trial is trained without it, and a TrialNote says so. `stop` is asked after each step, with the number of the
    trial's steps that are done; where it says yes, the state is saved, and Stopped is raised. It is asked before each
    trial too. `saved` is called after each save of a trial's state. The records say that `at_once` trials were trained
    at once, here and in other processes.
    """
    for trial in by_seed(trials):
        if stop(0):
            raise Stopped
        yield TrialStarted(trial)
        try:
            yield from _run(trial, data, directory, save_every_s, execution, stop, at_once, saved)
        except Exception as error:  # the other trials go on, whatever this one failed of
            if disk_full(error):
                raise
            try:
                if isinstance(error, ConnectionError | EOFError):
                    time.sleep(DEATH_S)
                failure = _failure(trial, error, data)
            except RuntimeError as later:  # PyTorch's handler of SIGCHLD, which raises at any place
                failure = _failure(trial, later, data)
            directory.write_failure(trial.id, failure)
            yield TrialFailed(trial, str(failure))


def _run(
    trial: Trial,
    data: ResidentData,
    directory: StudyDirectory,
    save_every_s: float,
    execution: ExecutionOptions,
    stop: Callable[[int], bool],
    at_once: int,
    saved: Callable[[Trial], None],
) -> Iterator[Event]:
    directory.write_config(trial)
    splits = data.splits(trial.hold_out, trial.seed)
    training, epochs = start(trial, splits), []
    resume = directory.resume_file(trial.id)
    if resume.exists():
        try:
            state = read_state(resume)
        except InputError as error:
            yield TrialNote(trial, f"trained from the start, because {error}")
        else:
            training.load_state_dict(state["training"])
            epochs = state["epochs"]
    directory.write_epochs(trial.id, epochs)
    prepared = prepare(trial, splits, training, execution, planned_steps(trial, len(splits.train)))
    yield from (TrialNote(trial, f"trained without {text}") for text in prepared.without)
    saver = Saver(directory, trial, training, save_every_s, stop, saved)
    for epoch in train(trial, splits, training, after_step=saver):
        directory.append_epoch(trial.id, epoch)
        yield EpochDone(trial, epoch)
    if training.recorder and training.recorder.refused:
        yield TrialNote(trial, f"trained without CUDA graphs, which failed: {training.recorder.refused}")
    record = _finish(trial, splits, directory, training, prepared, at_once)
    resume.unlink(missing_ok=True)
    (directory.trial(trial.id) / "failure.json").unlink(missing_ok=True)
    yield TrialDone(trial, record)


def _failure(trial: Trial, error: Exception, data: ResidentData) -> Failure:
    """The record of a trial that failed. The trial is not tried again with other values."""
    found: dict[str, Any] = {"traceback": traceback.format_exc(), "time": now()}
    if isinstance(error, Diverged):
        return Failure(kind="diverged", error=str(error), step=error.step, epoch=error.epoch, lr=error.lr, **found)
    cpu_message = isinstance(error, RuntimeError) and any(text in str(error) for text in CPU_OUT_OF_MEMORY)
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or cpu_message:
        size = trial.recipe.batch_size
        reason = f"no memory left at batch size {size}: {reason_of(error)}"
        if isinstance(error, torch.OutOfMemoryError):  # of a device: nothing else is lost where it is tried again
            traceback.clear_frames(error.__traceback__)  # they hold the network
            fits = fitting_batch_size(trial, data)
            reason += f"; a step at batch size {fits} fits" if fits else "; no smaller batch size fits"
        return Failure(kind="out_of_memory", error=reason, batch_size=size, **found)
    return Failure(error=reason_of(error), **found)


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
    _, steps = batches(trial.recipe, images)
    return steps * trial.recipe.epochs


@dataclass(frozen=True)
class Prepared:
    """How a training runs."""

    means: ExecutionPlan  # what it uses
    seconds: float  # that the compilers took
    without: list[str]  # what failed and is not used, each with its reason


def prepare(trial: Trial, splits: Splits, training: Training, execution: ExecutionOptions, steps: int) -> Prepared:
    """Prepares a training of `steps` steps to run as `execution` chooses: kernels, compiled blocks, CUDA graphs.

    Kernels and blocks are compiled for the image sizes of the trial. Raises TrainingError where something fails that
    was asked for.
    """
    device = splits.device
    means = execution.plan(trial.model, steps, device, training.optimizer)
    took, without = 0.0, []
    for name in ("kernels", "compile"):  # the compiler takes what the kernels leave
        if getattr(means, name):
            try:
                seconds = _compile(name, trial, splits, training)
            except Exception as error:  # neither compiler's errors have a type of their own
                if getattr(execution, name) == "on":
                    raise TrainingError(f"--{name} on: {LABELS[name]} failed: {reason_of(error)}") from error
                without.append(f"{LABELS[name]}, which failed: {reason_of(error)}")
                seconds = 0.0
            took += seconds
            means = replace(means, **{name: seconds > 0})
    if execution.graphs == "on" and not means.graphs:
        raise TrainingError(f"--graphs on: the optimiser {trial.recipe.opt} cannot be recorded in a CUDA graph")
    if means.graphs:
        training.recorder = Recorder(training.optimizer, device, strict=execution.graphs == "on")
    return Prepared(means, took, without)


def _compile(name: str, trial: Trial, splits: Splits, training: Training) -> float:
    """Compiles a network's kernels, or its blocks, on batches like the trial's, and has the network use them.

    `name` is "kernels" or "compile". Returns the seconds that it took; 0 where the network has no part for them.
    """
    recipe, device = trial.recipe, splits.device
    if name == "kernels":
        from model.fast.kernels import use_kernels as use  # Triton is not everywhere
    else:
        use = compile_blocks
    mean_C, std_C = (torch.tensor(values, device=device) for values in recipe.mean_std(splits.data))
    batch, _ = batches(recipe, len(splits.train))
    pixels_BHWC, generator = splits.train.pixels_BHWC[:batch], torch.Generator(device)
    sizes = {recipe.image_size(epoch, splits.data.image_size) for epoch in (0, recipe.epochs - 1)}
    augmented = [augment(recipe, pixels_BHWC, mean_C, std_C, generator, size=size) for size in sizes]
    return use(training.net, augmented, uses_bfloat16(recipe, device))


def _finish(
    trial: Trial, splits: Splits, directory: StudyDirectory, training: Training, prepared: Prepared, at_once: int
) -> Record:
    """Measures the trained network in fp32 and writes checkpoint, predictions and record. Reads the test split once."""
    data, device = splits.data, splits.device
    mean, std = trial.recipe.mean_std(data)
    mean_C, std_C = torch.tensor(mean, device=device), torch.tensor(std, device=device)
    flip = trial.recipe.tta == "flip"

    kept = {}

    def measure(split: Split, name: str) -> tuple[float, float, float | None]:
        """Loss and accuracy, and the accuracy with the mirror images; keeps the predicted classes."""
        logits_BN = predict(training.result, split, mean_C, std_C)
        loss, accuracy = score(logits_BN, split.labels_B)
        kept[name], kept[f"{name}_labels"] = logits_BN.argmax(1).cpu().numpy(), split.labels_B.cpu().numpy()
        if not flip:
            return loss, accuracy, None
        both_BN = (logits_BN + predict(training.result, mirrored(split), mean_C, std_C)) / 2
        kept[f"{name}_flip"] = both_BN.argmax(1).cpu().numpy()
        return loss, accuracy, score(both_BN, split.labels_B)[1]

    validation = measure(splits.validation, "validation")
    directory.enter_test_read(trial.id, "training", len(splits.test), tta="flip" if flip else None)
    test = measure(splits.test, "test")
    trained = Trained(
        trial=trial.id,
        model=trial.model_name,
        data=data.name,
        fingerprint=data.fingerprint,
        classes=data.classes,
        image_size=data.image_size,
        mean=mean,
        std=std,
    )
    checkpoint = Checkpoint(trial.model, trained, training.result.state_dict())
    parameters, macs = cost(trial.model, *data.image_size)
    epochs = directory.epochs(trial.id)
    record = Record(
        trial=trial.id,
        seed=trial.seed,
        validation_loss=validation[0],
        validation_accuracy=validation[1],
        validation_accuracy_flip=validation[2],
        validation_images=len(splits.validation),
        test_loss=test[0],
        test_accuracy=test[1],
        test_accuracy_flip=test[2],
        test_images=len(splits.test),
        parameters=parameters,
        macs=macs,
        epochs=len(epochs),
        images_per_s=statistics.median(epoch.images_per_s for epoch in (epochs[1:] or epochs)),
        train_seconds=sum(epoch.train_seconds for epoch in epochs),
        bfloat16=uses_bfloat16(trial.recipe, device),
        kernels=prepared.means.kernels,
        compiled=prepared.means.compile,
        graphs=training.recorded,
        at_once=at_once,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        compile_seconds=prepared.seconds,
        environment=Environment.here(device),
        finished=now(),
    )
    directory.finish(trial.id, record, checkpoint.to_bytes(), Predictions(**kept))
    return record
