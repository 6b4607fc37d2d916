"""Trains a trial again and compares the result with its record."""

import tempfile
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from expertgrid.ablations.engines.events import TrialDone
from expertgrid.ablations.engines.local import run_local
from expertgrid.ablations.records.directory import StudyDirectory
from expertgrid.ablations.records.predictions import Predictions
from expertgrid.ablations.records.record import SPLITS, Record
from expertgrid.model.checkpoint import load
from expertgrid.model.fast.execution import ExecutionOptions, ExecutionPlan
from expertgrid.model.system import machine
from expertgrid.model.system.errors import InputError
from expertgrid.model.training.metrics import Scale
from expertgrid.model.training.splits import ResidentData
from expertgrid.model.training.trial import Epoch, Trial


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
    reasons: list[str]  # what differs between the two trainings' environments, so that bits may differ
    margin: float  # of the study's metric, for a training elsewhere
    by: Scale
    apart: float = 0.0  # by which the metric differs at most
    failure: str = ""

    @property
    def same(self) -> bool:
        """On a CPU, or with --deterministic, in the same environment: to the last bit. Else within the margin."""
        if self.failure:
            return False
        return self.apart <= self.margin if self.reasons else all(number.same for number in self.compared)

    @property
    def verdict(self) -> str:
        if self.failure:
            return f"Different: the record is of a trial that was finished, and this time it failed: {self.failure}"
        if not self.reasons:
            if self.same:
                return "The same: weights, losses, accuracies and predictions are equal to the last bit."
            changed = ", ".join(number.what for number in self.compared if not number.same)
            return f"Different: {changed}. In the environment of the record, equality to the last bit is expected."
        what = "accuracies are" if self.by.name == "accuracy" else f"{self.by.title} is"
        return (
            f"{'The same' if self.same else 'Different'}: {what} {'' if self.same else 'not '}within "
            f"{self.margin:g}{self.by.points}; equality to the last bit is not expected ({'; '.join(self.reasons)})."
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
        second = StudyDirectory(Path(place))
        if weights := directory.weights(trial):
            second.write_weights({weights.stem: weights.read_bytes()})
        directory.try_ledger()
        try:
            *_, last = run_local([trial], data, second, execution=ExecutionOptions.requiring(used, not record.bfloat16))
        finally:
            for read in second.test_reads():
                directory.enter_test_read(trial.id, "rerun", read.images, tta=read.tta)
        margin, by = directory.read_study().margin, directory.read_plan().metric
        if not isinstance(last, TrialDone):
            return Rerun([], [], margin, by, failure=str(second.failure(trial.id)))
        again = last.record
        weights = [load(study.checkpoint(trial.id)).weights for study in (directory, second)]
        compared = [_compared_weights(*weights)]
        compared += _compared_epochs(directory.epochs(trial.id), second.epochs(trial.id))
        for name in ("validation_loss", "validation_accuracy", "test_loss", "test_accuracy"):
            first, number = getattr(record, name), getattr(again, name)
            compared.append(Compared(name.replace("_", " "), first, number, abs(number - first), number == first))
        if predictions := directory.predictions(trial.id):
            compared += _compared_predictions(predictions, second.predictions(trial.id))
    kept = directory.with_metric(record, by.name)
    apart = max(abs(again.score(split, by) - kept.score(split, by)) for split in SPLITS)
    reasons = [] if all(number.same for number in compared) else _reasons(record, again, data.device.type == "cpu")
    return Rerun(compared, reasons, margin, by, apart)


@contextmanager
def _threads(count: int) -> Generator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _reasons(record: Record, again: Record, on_cpu: bool) -> list[str]:
    """The reasons not to expect equality to the last bit."""
    first, second = record.environment, again.environment
    ways = ("products" if of.products else "the library's" for of in (record, again))
    changed = [
        f"{name} was {before}, is {now}"
        for name, before, now in (
            ("the device", first.device, second.device),
            ("the number of threads", first.threads, second.threads),
            ("bf16", record.bfloat16, again.bfloat16),
            ("the way to weight gradients of small maps", *ways),
            *((name, version, second.versions.get(name)) for name, version in first.versions.items()),
            *((f"the code of the {part}", code, again.parts.get(part)) for part, code in record.parts.items()),
        )
        if before != now
    ]
    in_any_order = "on this device sums are made in any order, unless --deterministic was given"
    return changed or [in_any_order] * (not on_cpu and not record.deterministic)


def _compared_weights(first: dict[str, Tensor], second: dict[str, Tensor]) -> Compared:
    pairs = [(first[name], second[name]) for name in first.keys() & second.keys()]
    same = first.keys() == second.keys() and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)
    distances = [(a.double() - b.double()).abs().max().item() for a, b in pairs if a.numel()]
    return Compared("weights", None, None, max(distances, default=0.0), same)


def _compared_epochs(first: list[Epoch], second: list[Epoch]) -> Iterator[Compared]:
    for name in ("train_loss", "train_accuracy", "validation_loss", "validation_accuracy"):
        pairs = [(getattr(before, name), getattr(after, name)) for before, after in zip(first, second)]
        largest = max((abs(after - before) for before, after in pairs), default=0.0)
        same = len(first) == len(second) and all(before == after for before, after in pairs)
        yield Compared(f"{name.replace('_', ' ')} by epoch", None, None, largest, same)


def _compared_predictions(first: Predictions, second: Predictions | None) -> Iterator[Compared]:
    for split in ("validation", "test"):
        before, after = getattr(first, split), getattr(second, split)
        changed = int((before != after).sum()) if before.shape == after.shape else max(len(before), len(after))
        yield Compared(f"predictions of {split} images", None, None, changed, np.array_equal(before, after))
