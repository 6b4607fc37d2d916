"""Engines: they take trials, train them, and leave records. Each yields what happens as it happens."""

import io
import statistics
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch.utils.flop_counter import FlopCounterMode

from ablations.data import ImageData
from ablations.records import Environment, Failure, Record, StudyDirectory, now, write_whole
from ablations.study import Trial
from ablations.train import Epoch, Training, TrainingError, predict, score, start, train, uses_bfloat16
from model.checkpoint import Checkpoint, Trained
from model.presets import Network, build

RESUME_EVERY_S = 30.0  # shorter trials start anew: that costs less than writing their state


@dataclass(frozen=True)
class EpochDone:
    trial: Trial
    epoch: Epoch


@dataclass(frozen=True)
class TrialDone:
    trial: Trial
    record: Record


@dataclass(frozen=True)
class TrialFailed:
    trial: Trial
    reason: str


Event = EpochDone | TrialDone | TrialFailed


def by_architecture(trials: list[Trial]) -> list[Trial]:
    """The trials, once each, those of one network next to each other, otherwise in the order in which they came."""
    groups: dict[str, dict[str, Trial]] = {}
    for trial in trials:
        groups.setdefault(trial.model.model_dump_json(), {})[trial.id] = trial
    return [trial for group in groups.values() for trial in group.values()]


def run_local(
    trials: list[Trial], data: ImageData, directory: StudyDirectory, resume_every_s: float = RESUME_EVERY_S
) -> Iterator[Event]:
    """Trains trials one after another on the data's device, each from where it was interrupted.

    A trial that fails leaves its reason in failure.json and the others go on.
    """
    for trial in by_architecture(trials):
        try:
            yield from _run(trial, data, directory, resume_every_s)
        except Exception as error:  # whatever one trial dies of, the others are worth having
            reason = f"{type(error).__name__}: {str(error) or 'no message'}".splitlines()[0]
            directory.write_failure(trial.id, Failure(error=reason, traceback=traceback.format_exc(), time=now()))
            yield TrialFailed(trial, reason)


def _run(trial: Trial, data: ImageData, directory: StudyDirectory, resume_every_s: float) -> Iterator[Event]:
    place = directory.trial(trial.id)
    directory.write_config(trial)
    training = start(trial, data)
    resume = place / "resume.pt"
    if resume.exists():
        training.load_state_dict(_resumed(resume, data.train.labels_B.device))
    directory.keep_epochs(trial.id, training.epoch)
    saved = time.monotonic()
    for epoch in train(trial, data, training):
        directory.append_epoch(trial.id, epoch)
        if time.monotonic() - saved >= resume_every_s:
            buffer = io.BytesIO()
            torch.save(training.state_dict(), buffer)
            write_whole(resume, buffer.getvalue())
            saved = time.monotonic()
        yield EpochDone(trial, epoch)
    record = _finish(trial, data, directory, training)
    resume.unlink(missing_ok=True)
    (place / "failure.json").unlink(missing_ok=True)
    yield TrialDone(trial, record)


def _resumed(file: Path, device: torch.device) -> dict:
    try:
        return torch.load(file, map_location=device, weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TrainingError(f"{file} is damaged; without it the trial starts anew ({reason})") from error


def _finish(trial: Trial, data: ImageData, directory: StudyDirectory, training: Training) -> Record:
    """Measures the trained network in fp32, on the test split once, and writes checkpoint and record."""
    device = data.train.labels_B.device
    mean, std = trial.recipe.mean_std(data)
    mean_C, std_C = torch.tensor(mean, device=device), torch.tensor(std, device=device)
    validation = score(predict(training.net, data.validation, mean_C, std_C), data.validation.labels_B)
    directory.enter_test_read(trial.id, "training", len(data.test))
    test = score(predict(training.net, data.test, mean_C, std_C), data.test.labels_B)
    trained = Trained(
        trial=trial.id,
        model=trial.model_name,
        data=data.source,
        classes=data.classes,
        image_size=data.image_size,
        mean=mean,
        std=std,
    )
    checkpoint = Checkpoint(trial.model, trained, training.net.state_dict())
    write_whole(directory.checkpoint(trial.id), checkpoint.to_bytes())
    parameters, macs = cost(trial.model, *data.image_size)
    epochs = directory.epochs(trial.id)
    record = Record(
        trial=trial.id,
        seed=trial.seed,
        validation_loss=validation[0],
        validation_accuracy=validation[1],
        validation_images=len(data.validation),
        test_loss=test[0],
        test_accuracy=test[1],
        test_images=len(data.test),
        parameters=parameters,
        macs=macs,
        epochs=len(epochs),
        images_per_s=statistics.median(epoch.images_per_s for epoch in (epochs[1:] or epochs)),
        train_seconds=sum(epoch.train_seconds for epoch in epochs),
        bfloat16=uses_bfloat16(trial.recipe, device),
        environment=Environment.here(device),
        finished=now(),
    )
    write_whole(directory.trial(trial.id) / "record.json", record.model_dump_json(indent=1).encode())
    return record


def cost(config: Network, height: int, width: int) -> tuple[int, int]:
    """Parameters, and multiply-accumulates of one image's forward pass (of convolutions and matrix products)."""
    with torch.device("meta"), torch.no_grad():
        net = build(config).eval()
        with FlopCounterMode(display=False) as counter:
            net(torch.empty(1, config.in_chans, height, width))
    return sum(parameter.numel() for parameter in net.parameters()), counter.get_total_flops() // 2
