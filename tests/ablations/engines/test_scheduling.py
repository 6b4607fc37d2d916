"""Trials on nodes that are lost: the scheduling of the Ray engine on a simulated cluster with a clock of its own."""

import heapq
import random
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from threading import Event as Flag

import numpy as np
import pytest
from conftest import written_record

from expertgrid.ablations.engines.events import (
    EpochDone,
    StateSaved,
    Stopped,
    TrialDone,
    TrialFailed,
    TrialNote,
    TrialStarted,
)
from expertgrid.ablations.engines.scheduling import MOST_LOSSES, NodeLost, Report, crashed, schedule, write_report
from expertgrid.ablations.records.directory import StudyDirectory
from expertgrid.ablations.records.ledger import TestRead
from expertgrid.ablations.records.predictions import Predictions
from expertgrid.ablations.records.record import Failure, Record
from expertgrid.ablations.study.study import Study
from expertgrid.model.training.trial import Epoch, Trial

SAVE_S = 10.0  # between two saved states
TRIAL_S = (30.0, 300.0)  # of work
PREDICTIONS = Predictions(*(np.zeros(1, np.int64),) * 4)
MEMORY = Path("/dev/shm")
LOST = NodeLost("its node was lost")
ENDED = crashed("its task ended before it was done")
KILLED = Failure(kind="crashed", error="killed", traceback="", time="")


@pytest.fixture(scope="module")
def first(digits) -> Trial:
    return Study(name="s", question="?", seeds=1).cells(digits)[0].trials[0]


def trials_of(first: Trial, number: int) -> list[Trial]:
    return [Trial.model_validate(first.model_dump() | {"seed": seed}) for seed in range(number)]


def epoch(number: int) -> Epoch:
    return Epoch(
        epoch=number, lr=0.1, train_loss=1.0, train_accuracy=0.5, validation_loss=1.0, validation_accuracy=0.5,
        images_per_s=1.0, train_seconds=0.5, validation_seconds=0.1,
    )  # fmt: skip


def started(trial: Trial) -> Report:
    return Report(TrialStarted(trial))


def passed(number: int) -> Callable[[Trial], Report]:
    return lambda trial: Report(EpochDone(trial, epoch(number)))


def saved(trial: Trial, state: bytes) -> Report:
    return Report(StateSaved(trial), {"resume.pt": state})


def done(trial: Trial) -> Report:
    record = Record.model_validate_json(written_record(trial, 50.0, 50.0))
    files = {"epochs.jsonl": b"as on the node", "model.safetensors": b"weights"}
    return Report(
        TrialDone(trial, record), files, PREDICTIONS, [TestRead(time="", trial=trial.id, reader="training", images=1)]
    )


class Script:
    """A cluster that answers each submission with the next list of messages."""

    def __init__(self, *answers, room: int = 1) -> None:
        self.answers, self.places = deque(answers), room
        self.submitted: list[tuple[int, bytes | None]] = []
        self.messages: deque = deque()
        self.running: list[Trial] = []
        self.stops = 0

    def room(self) -> int:
        return self.places

    def submit(self, trial, resume) -> None:
        self.submitted.append((trial.seed, resume.read_bytes() if resume.exists() else None))
        self.running.append(trial)
        self.messages.extend(
            (trial, message(trial) if callable(message) else message) for message in self.answers.popleft()
        )

    def next(self, timeout_s):
        return self.messages.popleft() if self.messages else None

    def stop(self) -> None:
        """Each task sends its state and ends."""
        self.stops += 1
        for trial in self.running:
            self.messages.extend([(trial, saved(trial, b"at the stop")), (trial, ENDED)])


def test_a_trial_goes_on_from_its_last_state_before_the_others(first, tmp_path):
    before = [
        started,
        passed(1),
        lambda trial: saved(trial, b"one epoch"),
        passed(2),
        LOST,
    ]
    after = [started, passed(2), passed(3), done, ENDED]
    cluster = Script(before, after, [started, done, ENDED])
    directory = StudyDirectory(tmp_path)
    trials = trials_of(first, 2)
    events = list(schedule(trials, directory, cluster, Flag()))
    assert [event.text for event in events if isinstance(event, TrialNote)] == [
        "its node was lost; it goes on from its last saved state"
    ]
    assert sum(isinstance(event, TrialDone) for event in events) == 2
    assert cluster.submitted == [(0, None), (0, b"one epoch"), (1, None)]
    assert [directory.record(trial.id).seed for trial in trials] == [0, 1]
    lines = (directory.trial(trials[0].id) / "epochs.jsonl").read_bytes()
    assert lines == b"as on the node"
    assert not directory.resume_file(trials[0].id).exists()
    assert [read.trial for read in directory.test_reads()] == [trial.id for trial in trials]


def test_a_trial_that_takes_its_nodes_with_it_fails(first, tmp_path):
    """Those that come forward between two losses do not."""
    cluster = Script(
        *[[LOST]] * (MOST_LOSSES - 1), [lambda t: saved(t, b"more"), LOST], *[[LOST]] * MOST_LOSSES, [started, done]
    )
    trials = trials_of(first, 2)
    *_, failed, _, other = schedule(trials, StudyDirectory(tmp_path), cluster, Flag())
    assert isinstance(failed, TrialFailed) and failed.reason == "crashed: its node was lost"
    assert isinstance(other, TrialDone)
    assert len(cluster.submitted) == 2 * MOST_LOSSES + 1
    assert StudyDirectory(tmp_path).failure(trials[0].id).kind == "crashed"


def test_a_study_whose_directory_is_removed_ends(first, tmp_path):
    (tmp_path / "study" / "study.toml").parent.mkdir()
    (tmp_path / "study" / "study.toml").touch()
    cluster = Script([started, passed(1)])
    with pytest.raises(FileNotFoundError, match="study: was removed, so that nothing more is trained"):
        for event in schedule(trials_of(first, 2), StudyDirectory(tmp_path / "study"), cluster, Flag()):
            if isinstance(event, EpochDone):
                shutil.rmtree(tmp_path / "study")
    assert not (tmp_path / "study").exists()


def test_a_process_that_is_lost_fails_its_trial_alone(first, tmp_path):
    cluster = Script([KILLED], [ENDED], [started, done, KILLED])  # the last one after it was done
    events = list(schedule(trials_of(first, 3), StudyDirectory(tmp_path), cluster, Flag()))
    assert [type(event) for event in events] == [TrialFailed, TrialFailed, TrialStarted, TrialDone]
    assert [event.reason for event in events[:2]] == ["crashed: killed", "crashed: its task ended before it was done"]


@pytest.mark.parametrize("how", ["signal", "closed", "error", "process"])
def test_states_come_here_where_a_study_is_stopped(first, tmp_path, how):
    """By a signal here, by a caller that ends it, by an error of no trial, by a signal to a process that trains."""
    error = {"error": [OSError(28, "full")], "process": [Stopped()]}.get(how, [])
    cluster = Script([started], [started, *error], room=2)
    directory, stopped, trials = StudyDirectory(tmp_path), Flag(), trials_of(first, 3)
    events = schedule(trials, directory, cluster, stopped)
    next(events), next(events)
    if how == "signal":
        stopped.set()
        with pytest.raises(Stopped):
            list(events)
    elif how == "closed":
        events.close()
    else:
        with pytest.raises(OSError if how == "error" else Stopped):
            list(events)
    states = [file.read_bytes() for trial in trials if (file := directory.resume_file(trial.id)).exists()]
    assert states == [b"at the stop"] * (1 if error else 2)
    assert [seed for seed, _ in cluster.submitted] == [0, 1]
    assert cluster.stops == 1


def test_a_process_that_dies_after_a_stop_fails_no_trial(first, tmp_path):
    cluster, directory, stopped = Script([started, KILLED]), StudyDirectory(tmp_path), Flag()
    events = schedule(trials_of(first, 1), directory, cluster, stopped)
    next(events)
    stopped.set()
    with pytest.raises(Stopped):
        list(events)
    assert directory.failure(cluster.running[0].id) is None


def test_nobody_waits_for_states_at_the_second_signal(first, tmp_path):
    """Which closes the events where it comes while the caller is at work on one."""
    cluster, directory, stopped = Script([started]), StudyDirectory(tmp_path), Flag()
    events = schedule(trials_of(first, 1), directory, cluster, stopped)
    next(events)
    stopped.set()
    events.close()
    assert cluster.stops == 0


def test_epochs_after_the_last_state_are_told_again(first, tmp_path):
    directory, (trial,) = StudyDirectory(tmp_path), trials_of(first, 1)
    write_report(started(trial), directory)
    for number in (1, 2, 3, 2):
        write_report(passed(number)(trial), directory)
    assert [line.epoch for line in directory.epochs(trial.id)] == [1, 2]


@dataclass
class Simulation:
    """Nodes that are lost at a rate and come back later, and a driver that is killed, in seconds of its own clock."""

    nodes: int
    slots: int  # of each node
    mean_s_to_failure: float  # of a node
    messages_to_kill: int  # of the driver, in the mean
    seed: int = 0
    clock: float = 0.0
    worked_s: float = 0.0  # of all trials, with what was lost
    failures: int = 0
    kills: int = 0
    finished: list[str] = field(default_factory=list)
    needed_s: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.chance, self.number = random.Random(self.seed), count()
        self.happens: list = []  # a heap of times and what happens then
        self.up = dict.fromkeys(range(self.nodes), True)
        self.training: dict[str, tuple[int, int]] = {}  # by trial: its node, and the attempt
        self.waiting: deque = deque()
        for node in self.up:
            self._at(self.chance.expovariate(1 / self.mean_s_to_failure), ("lost", node))

    def _at(self, after_s: float, what: tuple) -> None:
        heapq.heappush(self.happens, (self.clock + after_s, next(self.number), what))

    def room(self) -> int:
        return 2 * self.slots * sum(self.up.values())

    def submit(self, trial: Trial, resume: Path) -> None:
        assert trial.id not in self.finished, "a finished trial is trained again"
        self.needed_s.setdefault(trial.id, self.chance.uniform(*TRIAL_S))
        self.waiting.append((trial, float(resume.read_bytes() if resume.exists() else 0)))
        self._fill()

    def _fill(self) -> None:
        used = [node for node, _ in self.training.values()]
        for node in self.up:
            for _ in range(self.slots - used.count(node) if self.up[node] else 0):
                if not self.waiting:
                    return
                trial, progress = self.waiting.popleft()
                attempt = next(self.number)
                self.training[trial.id] = (node, attempt)
                self._at(0.0, ("begun", trial, attempt))
                self._step(trial, attempt, progress)

    def _step(self, trial: Trial, attempt: int, progress: float) -> None:
        step = min(SAVE_S, self.needed_s[trial.id] - progress)
        self._at(step, ("step", trial, attempt, progress, self.clock))

    def next(self, timeout_s: float):
        if self.chance.random() < 1 / self.messages_to_kill:
            self.kills += 1
            raise KeyboardInterrupt  # nothing more is written, as where a process is killed
        self.clock, _, (what, *about) = heapq.heappop(self.happens)
        if what == "lost":
            return self._lose(*about)
        if what == "back":
            self.up[about[0]] = True
            self._fill()
            return None
        if what == "begun":
            return about[0], started(about[0])
        if what == "told":
            return about[0], LOST
        trial, attempt, progress, begun = about
        if self.training.get(trial.id, (0, -1))[1] != attempt:
            return None  # its node was lost meanwhile, or the driver killed
        self.worked_s += self.clock - begun
        progress += self.clock - begun
        if progress < self.needed_s[trial.id] - 1e-6:
            self._step(trial, attempt, progress)
            return trial, saved(trial, repr(progress).encode())
        del self.training[trial.id]
        self.finished.append(trial.id)
        self._fill()
        return trial, done(trial)

    def _lose(self, node: int) -> None:
        self.up[node] = False
        self.failures += 1
        self._at(600.0, ("back", node))
        self._at(600.0 + self.chance.expovariate(1 / self.mean_s_to_failure), ("lost", node))
        self._end([trial for trial, (place, _) in self.training.items() if place == node], told=True)

    def _end(self, ended: list[str], told: bool) -> None:
        """What tasks did since their last states is lost."""
        for _, _, (what, *about) in list(self.happens):
            if what == "step" and about[0].id in ended and self.training.get(about[0].id, (0, -1))[1] == about[1]:
                self.worked_s += self.clock - about[3]
                del self.training[about[0].id]
                if told:
                    self._at(15.0, ("told", about[0]))  # a cluster takes its time to give up a node

    def driver_killed(self) -> None:
        """The cluster ends the tasks of a driver that is gone."""
        self._end(list(self.training), told=False)
        self.waiting.clear()
        self.happens = [item for item in self.happens if item[2][0] != "told"]
        heapq.heapify(self.happens)

    def stop(self) -> None:
        raise AssertionError("nobody stops it")


def simulate(simulation: Simulation, trials: list[Trial], directory: StudyDirectory) -> None:
    """Trains all trials. A driver that was killed is started again."""
    while pending := [trial for trial in trials if directory.record(trial.id) is None]:
        try:
            list(schedule(pending, directory, simulation, Flag()))
        except KeyboardInterrupt:
            simulation.driver_killed()


def check(simulation: Simulation, trials: list[Trial], directory: StudyDirectory) -> None:
    """No finished trial was lost, and the work that was repeated is what failures cost: SAVE_S for a slot at most."""
    assert sorted(simulation.finished) == sorted(trial.id for trial in trials)
    assert len(directory.test_reads()) == len(trials)
    repeated = simulation.worked_s - sum(simulation.needed_s.values())
    lost_slots = simulation.slots * (simulation.failures + simulation.nodes * simulation.kills)
    assert 0 <= repeated <= SAVE_S * lost_slots


@pytest.fixture
def memory(tmp_path) -> Iterator[Path]:
    """A folder that waits for no disk, where the system has one."""
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else tmp_path) as place:
        yield Path(place)


@pytest.mark.parametrize(
    ("trials", "simulation", "failures"),
    [
        (60, Simulation(4, 2, mean_s_to_failure=400.0, messages_to_kill=300), 5),
        # A node is lost once an hour, which is a hundred times as often as machines are.
        pytest.param(
            10_000, Simulation(64, 8, mean_s_to_failure=3600.0, messages_to_kill=20_000), 20, marks=pytest.mark.nightly
        ),
    ],
    ids=["60 trials on 4 nodes", "10,000 trials on 64 nodes"],
)
def test_what_failures_cost(trials, simulation, failures, first, memory):
    trials = trials_of(first, trials)
    simulate(simulation, trials, StudyDirectory(memory))
    check(simulation, trials, StudyDirectory(memory))
    assert simulation.failures > failures and simulation.kills > 1
