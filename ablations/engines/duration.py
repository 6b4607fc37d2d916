"""How long trials take: by what steps of their cells took so far, in records, or in short trials. Imports no torch."""

import math
import statistics
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from expertgrid.ablations.engines.events import EpochDone, Event, TrialDone, TrialFailed, TrialStarted
from expertgrid.ablations.records.reading import read_config, read_record
from expertgrid.ablations.records.record import Record
from expertgrid.model.cost import cost
from expertgrid.model.system.errors import InputError
from expertgrid.model.system.machine import cpu_name, usable_cores
from expertgrid.model.training.data import ImageData
from expertgrid.model.training.trial import Epoch, Trial

LATEST = 8  # epochs of a cell that count: the speed of a machine changes
AROUND_S = 0.2  # of a trial, for its start and its files
EVALUATION = 1 / 3  # of what an image takes in training: there is no backward pass
ROUNDS, SHARE, LEAST_S = 3, 0.05, 10.0  # of timing each cell alone: its share of the training, what it may always take


def in_time(seconds: float) -> str:
    """A time in a few figures: 40 s, 12 min, 3.5 h, 2.1 days."""
    units = ((1, "s", 99.5), (60, "min", 99.5), (3600, "h", 36), (86400, "days", math.inf))
    size, unit = next((size, unit) for size, unit, most in units if seconds / size < most)
    return f"{seconds / size:.{int(size >= 3600 and seconds / size < 9.95)}f} {unit}"


def cell(trial: Trial) -> object:
    """What trials share whose steps take equally long."""
    return trial.model, trial.recipe.model_copy(update={"epochs": 1, "lr": 1.0}), trial.fingerprint


@dataclass
class Running:
    """A trial that is trained."""

    trial: Trial
    steps: int = 0  # that are done
    last: Epoch | None = None
    starting: bool = False  # no step is done yet: its data are loaded, and its network may be compiled
    first: tuple[float, int] | None = None  # the time when steps were first seen, and how many were done then


class TimeLeft:
    """The seconds until trials are done and what follows, by the events of a training of `slots` trials at once.

    Where there are several slots, each cell is then timed alone by `timing`. More follows for `after_s` seconds.
    `steps_done` gives the steps of the trials that run.
    """

    def __init__(
        self, trials: Iterable[Trial], data: ImageData, slots: int, device: str = "cpu", timing: bool = False,
        after_s: float = 0.0, steps_done: Callable[[], Mapping[str, int]] = dict,
        clock: Callable[[], float] = time.monotonic,
    ):  # fmt: skip
        self.waiting, self.running = {of.id: of for of in trials}, dict[str, Running]()
        self.data, self.slots, self.device, self.after_s = data, slots, device, after_s
        self.most_steps = (100 if device.startswith("cuda") else 4) * (timing and slots > 1)  # of a round
        self.steps_done, self.clock, self.begun = steps_done, clock, clock()
        self.trained_on, macs = cache(data.trained_on), cache(lambda model: cost(model, *data.image_size)[1])
        self.cells = {of.id: cell(of) for of in self.waiting.values()}
        self.work = {self.cells[of.id]: max(1, macs(of.model)) * of.recipe.batch_size for of in self.waiting.values()}
        self.step_s: dict[object, deque[float]] = defaultdict(lambda: deque(maxlen=LATEST))
        self.rough: dict[object, float] = {}  # the same, by the steps of an epoch that is not done

    def read_records(self, studies: Path) -> None:
        """Enters records of the study directories in a folder that were made like this. Damaged ones are left out."""
        for file in sorted(studies.glob("*/trials/*/record.json")):
            with suppress(InputError, OSError):
                trial, record = read_config(file.parent), read_record(Record, file)
                if trial and record and cell(trial) in self.work:
                    by = record.environment
                    how = by.cpu, by.cores, by.device[:3] == "cpu", record.at_once
                    if how == (cpu_name(), usable_cores(), self.device == "cpu", self.slots):
                        self.step_s[cell(trial)].append(record.train_seconds / record.epochs / self.steps(trial))

    def steps(self, trial: Trial) -> int:
        """Of an epoch."""
        return self.trained_on(trial.hold_out) // trial.recipe.batch_size

    def take(self, event: Event) -> None:
        trial = event.trial
        self.waiting.pop(trial.id, None)
        if isinstance(event, TrialStarted) or trial.id not in self.running:
            self.running[trial.id] = Running(trial)
        if isinstance(event, EpochDone):
            running, epoch = self.running[trial.id], event.epoch
            running.last, running.steps = epoch, epoch.epoch * self.steps(trial)
            self.step_s[self.cells[trial.id]].append(epoch.train_seconds / self.steps(trial))
        elif isinstance(event, TrialDone | TrialFailed):
            del self.running[trial.id]

    def _steps_s(self) -> dict[object, float]:
        """Seconds of a step by cell, also of one that was not measured, by the nearest MACs; empty where none was."""
        known = self.rough | {of: statistics.median(taken) for of, taken in list(self.step_s.items())}

        def like(of: object) -> float:
            near = min(known, key=lambda other: (other != of, abs(math.log(self.work[other] / self.work[of]))))
            return known[near] * self.work[of] / self.work[near]

        return {of: like(of) for of in self.work if known}

    def _trial_s(self, trial: Trial, step_s: float, done: int = 0) -> float:
        """Seconds of a trial after so many steps, with the images that it evaluates."""
        times = trial.recipe.epochs + 1 - done // self.steps(trial)  # once more at the end
        images = times * (len(self.data.train) - self.trained_on(trial.hold_out)) + len(self.data.test)
        steps = self.steps(trial) * trial.recipe.epochs - done
        return step_s * (steps + EVALUATION * images / trial.recipe.batch_size) + AROUND_S

    def left_s(self) -> float | None:
        """None where nothing is known yet. It looks at the steps that are done."""
        now, done, running = self.clock(), self.steps_done(), list(self.running.values())
        for of in running:
            steps = done.get(of.trial.id)
            of.starting = steps == 0
            if steps and steps > of.steps:
                of.steps, of.first = steps, of.first or (now, steps)
                since, before = of.first  # a trial that goes on has steps from before
                if steps > before:
                    self.rough[self.cells[of.trial.id]] = (now - since) / (steps - before)
        if not (steps_s := self._steps_s()):
            return None
        ends = [self._trial_s(of.trial, steps_s[self.cells[of.trial.id]], of.steps) for of in running]
        ends += [0.0] * (self.slots - len(ends))
        for trial in list(self.waiting.values()):  # each slot takes the next one
            ends[ends.index(min(ends))] += self._trial_s(trial, steps_s[self.cells[trial.id]])
        return max(ends) + self.timing(now - self.begun + max(ends))[1] + self.after_s

    def timing(self, training_s: float) -> tuple[int, float]:
        """Steps in a round with which timing each cell alone is short beside the training, and its seconds; 0: none."""
        each_s = (ROUNDS + 1) * sum(self._steps_s().values())
        steps = min(self.most_steps, int(max(LEAST_S, SHARE * training_s) / (each_s or 1.0)))
        return steps, steps * each_s
