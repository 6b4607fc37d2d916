"""Trackers: places where people look at runs. What an engine does, or a study has kept, is shown there too.

No table and no report reads what a tracker keeps. A tracker that fails is named once, and everything else goes on.
"""

import json
import shlex
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from queue import Queue
from threading import Thread

from PIL import Image

from expertgrid.ablations.engines.events import (
    EpochDone,
    Event,
    StateSaved,
    TrialDone,
    TrialFailed,
    TrialNote,
    TrialStarted,
)
from expertgrid.ablations.records.directory import StudyDirectory
from expertgrid.ablations.records.record import SPLITS, Record
from expertgrid.ablations.results.rows import best_record, best_row, read_results, study_name
from expertgrid.ablations.study.cells import Group, groups
from expertgrid.export.exported import ExportedFile, exported_files
from expertgrid.model.system.errors import InputError, reason_of
from expertgrid.model.training.contact_sheet import contact_sheet
from expertgrid.model.training.data import ImageData
from expertgrid.model.training.trial import Epoch, Trial

Value = bool | int | float | str

SHEET_IMAGES = 8
OF_A_STUDY = ("study.toml", "plan.json", "accuracy.svg", "report.html")  # kept by trackers that keep files
OF_AN_EPOCH = ("lr", "train_loss", "train_accuracy", "validation_loss", "validation_accuracy")
OF_A_RECORD = (
    "validation_loss", "validation_accuracy", "validation_accuracy_flip", "test_loss", "test_accuracy",
    "test_accuracy_flip", "parameters", "macs",
)  # fmt: skip
SPEEDS = ("images_per_s", "train_seconds")  # of a trial that was trained alone


@dataclass(frozen=True)
class StudyRun:
    """A study, as trackers show it."""

    directory: Path  # absolute
    name: str
    question: str
    parameters: dict[str, Value]


@dataclass(frozen=True)
class TrialRun:
    """A trial, as trackers show it. `parameters` are the levels of its cell, its seed, its data and its recipe."""

    trial: str
    name: str
    parameters: dict[str, Value]
    begun: datetime | None = None  # of one that is shown after its end


@dataclass(frozen=True)
class Ended:
    """What there is of a study when it ends, or is looked at: all that is kept by now."""

    metrics: dict[str, float]
    files: list[Path]  # of the study
    exported: list[ExportedFile]  # certified ONNX files
    winner: str | None  # the best trial on validation of the best cell; None where no trial is finished


class Tracker(ABC):
    """A place where people look at runs. A trial that is begun again replaces what there was of it."""

    @abstractmethod
    def begin_trial(self, run: TrialRun) -> None: ...

    @abstractmethod
    def add_images(self, run: TrialRun, sheet: Image.Image) -> None:
        """The contact sheet of the trial's augmentation: the first trial of each recipe gets it."""

    @abstractmethod
    def add_epoch(self, run: TrialRun, epoch: int, metrics: dict[str, float]) -> None:
        """Epochs come in order, from 1."""

    @abstractmethod
    def end_trial(self, run: TrialRun, record: Record, metrics: dict[str, float]) -> None: ...

    @abstractmethod
    def fail_trial(self, run: TrialRun, reason: str) -> None: ...

    @abstractmethod
    def close(self, ended: Ended) -> None:
        """Trials that are begun and not ended were interrupted."""

    def holds(self, record: Record) -> bool:
        """Whether the place has this very trial whole, so that it need not be sent again."""
        return False


@dataclass
class Tracking:
    """Several trackers of one study, and what they were shown.

    They work in a thread of their own: a slow one holds up no training, and no trial takes too long because of it.
    """

    directory: StudyDirectory
    data: ImageData | None  # None: there are no contact sheets
    trackers: dict[str, Tracker]  # by name; one that fails is taken out
    say: Callable[[str], None]
    lost: list[str] = field(default_factory=list)  # that failed
    networks: dict[str, Group] = field(default_factory=dict)  # of the plan, by trial
    runs: dict[str, TrialRun] = field(default_factory=dict)  # by trial
    shown: dict[str, int] = field(default_factory=dict)  # epochs, of the trials that are under way
    done: set[str] = field(default_factory=set)  # trials that were shown to their end
    sheets: set[str] = field(default_factory=set)  # recipes whose contact sheet was drawn, as JSON
    jobs: "Queue[Callable[[], None] | None]" = field(default_factory=Queue)  # None: the last one
    thread: Thread = field(init=False)

    def __post_init__(self) -> None:
        self.thread = Thread(target=self._work, name="trackers", daemon=True)
        self.thread.start()

    def show(self, event: Event) -> None:
        """Has an event of an engine shown."""
        if not isinstance(event, TrialNote | StateSaved):
            self.jobs.put(lambda: self._show(event))

    def replay(self, failures: bool = False) -> None:
        """Has the trials shown that are finished, and were not shown yet, from what is kept of them.

        With `failures` those that failed, too. Raises InputError where something is damaged.
        """
        if not self.trackers:
            return
        for trial_id in self.directory.read_plan().trials:
            trial = self.directory.config(trial_id)
            if trial is None or trial_id in self.done:
                continue
            if record := self.directory.record(trial_id):
                end: TrialDone | TrialFailed = TrialDone(trial, record)
            elif failures and (failure := self.directory.failure(trial_id)):
                end = TrialFailed(trial, str(failure))
            else:
                continue
            self.jobs.put(partial(self._replay, end, self.directory.epochs(trial_id)))

    def close(self) -> None:
        """Has all shown that there is of the study now, and waits for it."""
        self.jobs.put(self._close)
        self.jobs.put(None)
        self.thread.join()

    def _work(self) -> None:
        while (job := self.jobs.get()) is not None:
            try:
                if self.trackers:
                    job()
            except Exception as error:  # of what is read or drawn for them: no trial may fail of it
                self._lose(list(self.trackers), error)

    def _show(self, event: Event) -> None:
        trial = event.trial
        if isinstance(event, TrialStarted) or trial.id not in self.shown:
            self._begin(trial)
        match event:
            case EpochDone(trial, epoch):
                self._epochs(trial, [*self._earlier(trial, epoch), epoch])
            case TrialDone(trial, record):
                run, metrics = self._run(trial), _final(record)
                self._each(lambda tracker: tracker.end_trial(run, record, metrics))
                self.done.add(trial.id)
                del self.shown[trial.id]
            case TrialFailed(trial, reason):
                run = self._run(trial)
                self._each(lambda tracker: tracker.fail_trial(run, reason))
                del self.shown[trial.id]

    def _replay(self, end: TrialDone | TrialFailed, epochs: list[Epoch]) -> None:
        """Shows a trial to the trackers that do not hold it yet."""
        everybody, held = self.trackers, []
        if isinstance(end, TrialDone):
            took = sum(epoch.train_seconds + epoch.validation_seconds for epoch in epochs)
            begun = datetime.fromisoformat(end.record.finished) - timedelta(seconds=took)
            self.runs[end.trial.id] = replace(self._run(end.trial), begun=begun)
            self._each(lambda tracker: held.append(tracker) if tracker.holds(end.record) else None)
        self.trackers = {name: tracker for name, tracker in everybody.items() if tracker not in held}
        try:
            if self.trackers:
                self._show(TrialStarted(end.trial))
                self._epochs(end.trial, epochs)
                self._show(end)
        finally:
            self.trackers = {name: tracker for name, tracker in everybody.items() if name not in self.lost}
        self.done.add(end.trial.id)

    def _close(self) -> None:
        try:
            ended = _ended(self.directory)
        except InputError as error:
            self.say(f"trackers get no files of the study: {error}")
            ended = Ended({}, [], [], None)
        self._each(lambda tracker: tracker.close(ended))

    def _begin(self, trial: Trial) -> None:
        run = self._run(trial)
        self.shown[trial.id] = 0
        self._each(lambda tracker: tracker.begin_trial(run))
        recipe = trial.recipe.model_dump_json()
        if self.data is None or recipe in self.sheets:
            return
        self.sheets.add(recipe)
        sheet = contact_sheet(trial.recipe, self.data, trial.seed, min(SHEET_IMAGES, len(self.data.train)))
        self._each(lambda tracker: tracker.add_images(run, sheet))

    def _earlier(self, trial: Trial, epoch: Epoch) -> list[Epoch]:
        """Epochs that were trained before an interruption: no event tells of them."""
        done = self.shown[trial.id]
        return self.directory.epochs(trial.id)[done : epoch.epoch - 1] if epoch.epoch - 1 > done else []

    def _epochs(self, trial: Trial, epochs: Iterable[Epoch]) -> None:
        run = self._run(trial)
        for epoch in epochs:
            number, metrics = epoch.epoch, {name: float(getattr(epoch, name)) for name in OF_AN_EPOCH}
            self._each(lambda tracker, number=number, metrics=metrics: tracker.add_epoch(run, number, metrics))
            self.shown[trial.id] = number

    def _run(self, trial: Trial) -> TrialRun:
        if trial.id not in self.networks:  # nothing was shown yet, or a race went on to further seeds
            self.networks = _planned_networks(self.directory)
        if trial.id not in self.networks:
            raise InputError(f"{self.directory.path / 'plan.json'}: trial {trial.id} is not planned")
        if trial.id not in self.runs:
            self.runs[trial.id] = _trial_run(trial, self.networks[trial.id])
        return self.runs[trial.id]

    def _each(self, call: Callable[[Tracker], object]) -> None:
        for name, tracker in list(self.trackers.items()):
            try:
                call(tracker)
            except Exception as error:  # whatever it is: no trial may fail of it
                self._lose([name], error)

    def _lose(self, names: list[str], error: Exception) -> None:
        for name in names:
            del self.trackers[name]
            self.lost.append(name)
            later = f"expertgrid track {shlex.quote(str(self.directory.path))} --to {shlex.quote(name)}"
            self.say(f"tracker {name}: {reason_of(error)}; everything else goes on, and this sends the rest: {later}")


def study_run(directory: StudyDirectory) -> StudyRun:
    """A study that is written, or begun. Raises InputError for a damaged one."""
    study = directory.read_study()
    plan = directory.read_plan(study)
    parameters: dict[str, Value] = {"data": plan.source, "design": study.design, "seeds": study.seeds}
    parameters |= {f"factor.{name}": _value(list(levels)) for name, levels in study.factors.items()}
    return StudyRun(directory.path.resolve(), study_name(directory), study.question, parameters)


def _planned_networks(directory: StudyDirectory) -> dict[str, Group]:
    """The network of each planned trial, by the trial's id. Raises InputError for a damaged plan."""
    study = directory.read_study()
    networks = groups(directory.read_plan(study).cells, study.combined_levels)
    return {trial: network for network in networks for trial in network.cells[0].trials}


def _trial_run(trial: Trial, network: Group) -> TrialRun:
    parameters: dict[str, Value] = {
        "model": trial.model_name,
        **network.levels,
        "seed": trial.seed,
        "data": trial.source,
    }
    recipe = trial.recipe.model_dump(mode="json", exclude_none=True)
    parameters |= {f"recipe.{name}": _value(value) for name, value in recipe.items()}
    return TrialRun(trial.id, f"{network.name}, seed {trial.seed}", parameters)


def _value(value: object) -> Value:
    return value if isinstance(value, bool | int | float | str) else json.dumps(value)


def _final(record: Record) -> dict[str, float]:
    names = OF_A_RECORD if record.at_once > 1 else OF_A_RECORD + SPEEDS
    final = {name: float(value) for name in names if (value := getattr(record, name)) is not None}
    for split in SPLITS:
        final |= {f"{split}_{name}": value for name, value in getattr(record, f"{split}_metrics").items()}
    return {f"final/{name}": value for name, value in final.items()}


def _ended(directory: StudyDirectory) -> Ended:
    rows = read_results(directory).rows
    best = best_row(rows)
    metrics = {"trials_finished": float(len({record.trial for row in rows for record in row.records}))}
    metrics |= {"trials_failed": float(len({trial for row in rows for trial in row.failures}))}
    if best is not None:
        mean = best.mean("validation")
        metrics[f"best_validation_{best.scale.name}"] = mean / 100 if best.scale.points else mean
    files = [file for name in OF_A_STUDY if (file := directory.path / name).is_file()]
    exported = exported_files(directory.path / "export")
    return Ended(metrics, files, exported, best_record(best).trial if best else None)
