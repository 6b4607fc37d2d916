"""The local engine: it trains trials and writes their records, and yields an event for each thing that happens."""

import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch

from expertgrid.ablations.engines.events import (
    EpochDone,
    Event,
    Stopped,
    TrialDone,
    TrialFailed,
    TrialNote,
    TrialStarted,
    by_seed,
)
from expertgrid.ablations.records.directory import StudyDirectory
from expertgrid.ablations.records.predictions import Predictions
from expertgrid.ablations.records.record import Environment, Failure, Record
from expertgrid.ablations.study.disk import log_bytes
from expertgrid.model.checkpoint import Checkpoint, Trained
from expertgrid.model.cost import cost
from expertgrid.model.fast.cuda_graphs import RecordingError
from expertgrid.model.fast.execution import EAGER, ExecutionOptions
from expertgrid.model.probe import Probe, probe_of
from expertgrid.model.system.errors import InputError, reason_of, reason_with_place
from expertgrid.model.system.files import disk_full, now
from expertgrid.model.training.loop import Diverged, Training, predict, score, start, train
from expertgrid.model.training.metrics import METRICS, measured
from expertgrid.model.training.parts import changed_parts, codes_of
from expertgrid.model.training.prepare import Prepared, fitting_batch_size, planned_steps, prepare
from expertgrid.model.training.resume import SAVE_EVERY_S, read_state, write_state
from expertgrid.model.training.splits import ResidentData, Split, Splits
from expertgrid.model.training.trial import Trial

CPU_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory")  # as PyTorch's CPU allocator says it
NOT_OF_A_STATE = (Diverged, RecordingError, torch.OutOfMemoryError, MemoryError, OSError)  # errors with other causes
DEATH_S = 0.5  # in which the system tells of a process that died, after the connection to it was lost
FIRST_SAVE_S = 1.0  # after the start, so that a machine that starts slowly and is taken away often gets on
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
    network: str = ""  # what the code of a user's network computes, as JSON
    compiled: bool = False  # which is measured once for a trial
    due: float | None = None  # by the clock; None before the first step
    saves: int = 0

    def __call__(self) -> None:
        stopped, now_s = self.stop(self.training.steps), time.monotonic()
        self.due = self.due or now_s + min(self.every_s, FIRST_SAVE_S)
        if stopped or now_s >= self.due:
            self.save()
        if stopped:
            raise Stopped

    def save(self) -> None:
        self.training.stop_clock()
        begun = time.monotonic()
        state = self.training.state_dict()
        epochs = [epoch.model_dump_json() for epoch in self.directory.epochs(self.trial.id)]
        state = {"epochs": epochs, "training": state, "network": self.network, "parts": codes_of(self.trial.recipe)}
        state["compiled"] = self.compiled
        write_state(self.directory.resume_file(self.trial.id), state)
        ended = time.monotonic()
        self.due = ended + max(self.every_s, (ended - begun) / SAVING_SHARE)
        self.saves += 1
        self.saved(self.trial)
        self.training.start_clock()


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
    can go on, and the OSError goes to the caller. Where `execution` leaves a choice open and what is chosen cannot be
    compiled, the trial is trained without it, and a TrialNote says so. `stop` is asked after each step, with the number
    of the trial's steps that are done; where it says yes, the state is saved, and Stopped is raised. It is asked before
    each trial too. `saved` is called after each save of a trial's state. The records say that `at_once` trials were
    trained at once, here and in other processes.
    """

    probed = cache(partial(probe_of, size=data.data.image_size))

    def run(trial: Trial) -> Iterator[Event]:
        network = probed(trial.model)
        directory.write_config(trial, network)
        splits = data.splits(trial.hold_out, trial.seed)
        resume = directory.resume_file(trial.id)
        training, epochs, went_on = start(trial, splits, directory.weights(trial)), [], resume.exists()
        if network and network.dtype == "float32":
            yield TrialNote(trial, "its network needs float32: a change of its code by less than 0.1% will not be seen")
        code = network.model_dump_json() if network else ""
        saver, how = Saver(directory, trial, training, save_every_s, stop, saved, code), execution
        try:
            if went_on:
                state = read_state(resume)
                if network and Probe.model_validate_json(state["network"]).difference(network):
                    raise InputError("the code of its network was changed")
                if changed := changed_parts(state.get("parts", {})):
                    raise InputError(f"the code of the {' and the '.join(changed)} was changed")
                training.load_state_dict(state["training"])
                epochs = state["epochs"]
                if not isinstance(compiled := state.get("compiled", False), bool):
                    raise TypeError(f"compiled is {compiled!r}")
                how = execution.as_before(compiled) if "compiled" in state else execution
            directory.write_epochs(trial.id, epochs)
            if len(directory.epochs(trial.id)) != training.epoch:
                raise ValueError("its epochs are not those of its weights")
            prepared = prepare(trial, splits, training, how, planned_steps(trial, len(splits.train)))
            saver.compiled = prepared.plan.compile
            yield from (TrialNote(trial, f"trained without {text}") for text in prepared.without)
            for epoch in train(trial, splits, training, after_step=saver):
                directory.append_epoch(trial.id, epoch)
                yield EpochDone(trial, epoch)
        except Exception as error:
            if isinstance(error, NOT_OF_A_STATE) or not went_on or saver.saves:
                raise
            resume.unlink()  # another version may have written it, or somebody else
            why = str(error) if isinstance(error, InputError) else f"{resume} does not fit: {reason_of(error)}"
            yield TrialNote(trial, f"trained from the start, because {why}")
            yield from run(trial)
            return
        record = _finish(trial, splits, directory, training, prepared, at_once)
        yield TrialDone(trial, record)

    for trial in by_seed(trials):
        if stop(0):
            raise Stopped
        yield TrialStarted(trial)
        try:
            yield from run(trial)
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
            yield TrialFailed(trial, str(failure), isinstance(error, RecordingError) and execution.graphs != "on")


def _failure(trial: Trial, error: Exception, data: ResidentData) -> Failure:
    """The record of a trial that failed. The trial is not tried again with other values."""
    when: dict[str, Any] = {"traceback": traceback.format_exc(), "time": now()}
    if isinstance(error, Diverged):
        return Failure(kind="diverged", error=str(error), step=error.step, epoch=error.epoch, lr=error.lr, **when)
    of_cpu = isinstance(error, RuntimeError) and any(text in str(error) for text in CPU_OUT_OF_MEMORY)
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or of_cpu:
        size = trial.recipe.batch_size
        reason = f"no memory left at batch size {size}: {reason_of(error)}"
        if isinstance(error, torch.OutOfMemoryError):  # of a device: nothing else is lost where it is tried again
            traceback.clear_frames(error.__traceback__)  # they hold the network
            fits = fitting_batch_size(trial, data)
            reason += f"; a step at batch size {fits} fits" if fits else "; no smaller batch size fits"
        return Failure(kind="out_of_memory", error=reason, batch_size=size, **when)
    return Failure(error=reason_with_place(error), **when)


def _finish(
    trial: Trial, splits: Splits, directory: StudyDirectory, training: Training, prepared: Prepared, at_once: int
) -> Record:
    """Measures the trained network in fp32 and writes checkpoint, predictions and record. Reads the test split once."""
    data, device = splits.data, splits.device
    mean, std = trial.recipe.mean_std(data)
    mean_C, std_C = torch.tensor(mean, device=device), torch.tensor(std, device=device)
    flip, most = trial.recipe.tta == "flip", trial.recipe.batch_size

    predictions = {}

    others = [name for name in METRICS if name not in ("accuracy", "cross_entropy")]

    def measure(split: Split, name: str) -> dict[str, Any]:
        """The record's numbers of a split. Enters the predicted classes."""
        logits_BN = predict(training.result, split, mean_C, std_C, most=most)
        loss, accuracy = score(logits_BN, split.labels_B)
        numbers = {f"{name}_loss": loss, f"{name}_accuracy": accuracy, f"{name}_images": len(split)}
        predictions[name] = logits_BN.argmax(1).cpu().numpy()
        predictions[f"{name}_labels"] = labels_B = split.labels_B.cpu().numpy()
        log_BN = logits_BN.log_softmax(1).half().clamp(min=torch.finfo(torch.half).min).cpu().numpy()
        if log_bytes([trial], data):
            predictions[f"{name}_log"] = log_BN
        numbers[f"{name}_metrics"] = measured(labels_B, predictions[name], log_BN, len(data.classes), others)
        if flip:
            both_BN = (logits_BN + predict(training.result, split, mean_C, std_C, most=most, mirrored=True)) / 2
            predictions[f"{name}_flip"] = both_BN.argmax(1).cpu().numpy()
            numbers[f"{name}_accuracy_flip"] = score(both_BN, split.labels_B)[1]
        return numbers

    numbers = measure(splits.validation, "validation")
    directory.enter_test_read(trial.id, "training", len(splits.test), tta="flip" if flip else None)
    numbers |= measure(splits.test, "test")
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
        **numbers,
        parameters=parameters,
        macs=macs,
        epochs=len(epochs),
        images_per_s=statistics.median(epoch.images_per_s for epoch in (epochs[1:] or epochs)),
        train_seconds=sum(epoch.train_seconds for epoch in epochs),
        bfloat16=training.bfloat16,
        products=training.bfloat16 and device.type == "cpu",
        kernels=prepared.plan.kernels,
        compiled=prepared.plan.compile,
        graphs=prepared.plan.graphs,
        at_once=at_once,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        parts=codes_of(trial.recipe),
        compile_seconds=prepared.seconds,
        environment=Environment.of_machine(device),
        finished=now(),
    )
    directory.finish(trial.id, record, checkpoint.to_bytes(), Predictions(**predictions))
    return record
