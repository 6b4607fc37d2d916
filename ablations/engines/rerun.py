"""Trains a trial again and compares the result with its record."""

import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from expertgrid.ablations.engines.events import TrialFailed
from expertgrid.ablations.engines.local import run_local
from expertgrid.ablations.records.directory import StudyDirectory
from expertgrid.ablations.records.record import Record
from expertgrid.model.checkpoint import load
from expertgrid.model.fast.execution import ExecutionOptions, ExecutionPlan
from expertgrid.model.system import machine
from expertgrid.model.system.errors import InputError
from expertgrid.model.training.splits import ResidentData
from expertgrid.model.training.trial import Trial


@dataclass(frozen=True)
class Compared:
    """One number of a trial, as it was kept and as it came out again."""

    what: str
    kept: float | None
    again: float | None
    difference: float | None  # the largest, of many numbers; None where there is nothing to compare
    same: bool  # to the last bit


@dataclass(frozen=True)
class Rerun:
    """A trial that was trained twice."""

    compared: list[Compared]
    elsewhere: list[str]  # what differs between the two trainings' environments
    margin: float  # in points of accuracy, for a training elsewhere
    failure: str = ""

    @property
    def same(self) -> bool:
        """On a CPU, or with --deterministic, in the same environment: to the last bit. Else within the margin."""
        if self.failure:
            return False
        if not self.elsewhere:
            return all(number.same for number in self.compared)
        differences = [number.difference or 0.0 for number in self.compared if number.what.endswith("accuracy")]
        return all(100 * difference <= self.margin for difference in differences)

    @property
    def verdict(self) -> str:
        if self.failure:
            return f"Different: the record is of a trial that was finished, and this time it failed: {self.failure}"
        if not self.elsewhere:
            if self.same:
                return "The same: weights, losses, accuracies and predictions are equal to the last bit."
            changed = ", ".join(number.what for number in self.compared if not number.same)
            return f"Different: {changed}. In the environment of the record, equality to the last bit is expected."
        return (
            f"{'The same' if self.same else 'Different'}: accuracies are {'' if self.same else 'not '}within "
            f"{self.margin:g} points; equality to the last bit is not expected ({'; '.join(self.elsewhere)})."
        )


def train_again(directory: StudyDirectory, trial: Trial, record: Record, data: ResidentData) -> Rerun:
    """Trains a trial again on the data's device, in a temporary directory, and compares.

    The study's ledger gets the read of the test split, and nothing else of the study is written. Raises InputError for
    data that is not what the trial was trained on, and for damaged files.
    """
    if data.data.fingerprint != trial.fingerprint:
        raise InputError(f"--data {data.data.source}: not the images that trial {trial.id} was trained on")
    used = ExecutionPlan(kernels=record.kernels, compile=record.compiled, graphs=record.graphs)
    with (
        tempfile.TemporaryDirectory(prefix="expertgrid-rerun-") as place,
        _threads(record.environment.threads),
        machine.deterministic(record.deterministic),
    ):
        beside = StudyDirectory(Path(place))
        try:
            events = list(run_local([trial], data, beside, execution=ExecutionOptions.requiring(used)))
        finally:
            for read in beside.test_reads():
                directory.enter_test_read(trial.id, "rerun", read.images, tta=read.tta)
        failures = [event.reason for event in events if isinstance(event, TrialFailed)]
        margin = directory.read_study().margin
        if failures:
            return Rerun([], [], margin, failures[0])
        again = beside.record(trial.id)
        assert again is not None  # a trial that did not fail has its record
        compared = [_weights(directory, beside, trial.id), *_epochs(directory, beside, trial.id)]
        for name in ("validation_loss", "validation_accuracy", "test_loss", "test_accuracy"):
            kept, found = getattr(record, name), getattr(again, name)
            compared.append(Compared(name.replace("_", " "), kept, found, abs(found - kept), found == kept))
        compared += _predictions(directory, beside, trial.id)
    return Rerun(compared, _elsewhere(record, again), margin)


@contextmanager
def _threads(count: int) -> Generator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _elsewhere(record: Record, again: Record) -> list[str]:
    """The reasons not to expect equality to the last bit."""
    kept, here = record.environment, again.environment
    found = [
        f"{name} was {before}, is {now}"
        for name, before, now in (
            ("the device", kept.device, here.device),
            ("the number of threads", kept.threads, here.threads),
            ("bf16", record.bfloat16, again.bfloat16),
            *((name, version, here.versions.get(name)) for name, version in kept.versions.items()),
        )
        if before != now
    ]
    exact = here.device.startswith("cpu") or record.deterministic
    return found or ([] if exact else ["on this device sums are made in any order, unless --deterministic was given"])


def _weights(directory: StudyDirectory, beside: StudyDirectory, trial: str) -> Compared:
    kept, again = (load(study.checkpoint(trial)).weights for study in (directory, beside))
    same = kept.keys() == again.keys() and all(_equal(kept[name], again[name]) for name in kept)
    largest = max((_distance(kept[name], again[name]) for name in kept.keys() & again.keys()), default=0.0)
    return Compared("weights", None, None, largest, same)


def _equal(kept: Tensor, again: Tensor) -> bool:
    return kept.dtype == again.dtype and torch.equal(kept, again)


def _distance(kept: Tensor, again: Tensor) -> float:
    return (kept.double() - again.double()).abs().max().item() if kept.numel() else 0.0


def _epochs(directory: StudyDirectory, beside: StudyDirectory, trial: str) -> list[Compared]:
    kept, again = directory.epochs(trial), beside.epochs(trial)
    found = []
    for name in ("train_loss", "train_accuracy", "validation_loss", "validation_accuracy"):
        pairs = [(getattr(before, name), getattr(after, name)) for before, after in zip(kept, again)]
        largest = max((abs(after - before) for before, after in pairs), default=0.0)
        same = len(kept) == len(again) and all(before == after for before, after in pairs)
        found.append(Compared(f"{name.replace('_', ' ')} by epoch", None, None, largest, same))
    return found


def _predictions(directory: StudyDirectory, beside: StudyDirectory, trial: str) -> list[Compared]:
    kept, again = directory.predictions(trial), beside.predictions(trial)
    if kept is None:
        return []
    found = []
    for split in ("validation", "test"):
        before, after = getattr(kept, split), getattr(again, split)
        changed = int((before != after).sum()) if before.shape == after.shape else max(len(before), len(after))
        found.append(Compared(f"predictions of {split} images", None, None, changed, np.array_equal(before, after)))
    return found
