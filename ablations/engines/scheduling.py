"""Trials on a cluster: which is trained next, what is kept of it, and what is done where a process or node is lost.

The cluster may be the processes of this machine or the nodes of Ray's; how messages travel is not known here. Nodes
report what happens and send the files of a trial with it, which are written to the study directory here alone, so that
no file system is shared.
"""

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event as Flag
from typing import Protocol

from expertgrid.ablations.engines.events import (
    EpochDone,
    Event,
    StateSaved,
    Stopped,
    TrialDone,
    TrialFailed,
    TrialNote,
    TrialStarted,
    by_seed,
)
from expertgrid.ablations.records.directory import StudyDirectory
from expertgrid.ablations.records.ledger import TestRead
from expertgrid.ablations.records.predictions import Predictions
from expertgrid.ablations.records.record import Failure
from expertgrid.model.system.files import now, whole_lines, write_whole
from expertgrid.model.system.processes import ProcessLost
from expertgrid.model.training.trial import Trial

LOOK_EVERY_S = 0.1  # for a signal
TOGETHER_S = 5.0  # in which the command is asked to end too, by a system that asks all processes of a job
MOST_TERMINATIONS = 3  # of a trial's processes: then it has failed
MOST_LOSSES = 5  # of a trial's nodes, one after another without a new state between: the trial itself may be the cause


@dataclass(frozen=True)
class Report:
    """An event on a node, with the files of the trial that are not in the event.

    StateSaved has resume.pt; TrialFailed has failure.json and traceback.txt; TrialDone has epochs.jsonl,
    model.safetensors, the predictions and the reads of the test split.
    """

    event: Event
    files: dict[str, bytes] = field(default_factory=dict)
    predictions: Predictions | None = None
    test_reads: Sequence[TestRead] = ()


@dataclass(frozen=True)
class NodeLost:
    """A trial's task is over, because its node or its process was lost: the trial can go on elsewhere."""

    reason: str
    asked: bool = False  # the process to end, by SIGTERM, and nobody has asked the command so far


# An event, whose files the cluster has written itself, or with the files that are to be written here. A failure is that
# of a trial whose process was lost, or whose task is over: of one that is done, nobody reads it. An exception is an
# error of no trial, and ends its task; so does Stopped.
Message = Event | Report | NodeLost | Failure | BaseException


class Cluster(Protocol):
    """Where trials are trained."""

    def room(self) -> int:
        """How many trials may be submitted and not over at the same time."""

    def submit(self, trial: Trial, resume: Path) -> None:
        """Has a trial trained, from the state in the file `resume` where there is one."""

    def next(self, timeout_s: float) -> tuple[Trial, Message] | None:
        """The next message about a submitted trial; None where none comes in time."""

    def stop(self) -> None:
        """Trials that are trained save their states and end at the next step, and the others do not begin."""


def schedule(trials: Sequence[Trial], directory: StudyDirectory, cluster: Cluster, stopped: Flag) -> Iterator[Event]:
    """Trains trials on a cluster, each from its last saved state, and yields the engine's events.

    A trial whose node was lost is trained on, from the last state that came here, before all trials that have not
    begun. A trial whose process was lost has failed. When `stopped` is set, the states of all trials that are trained
    are saved, and Stopped is raised. They are saved too where the caller ends this, and where an error of no trial is
    raised.
    """
    waiting, submitted = deque(by_seed(list(trials))), set[str]()
    losses: Counter[str] = Counter()
    terminations: Counter[str] = Counter()
    told, study = False, directory.path / "study.toml"
    of_a_study = study.exists()  # nodes have directories without one

    def receive() -> tuple[Trial, Event | NodeLost | Failure | BaseException] | None:
        """The next message, after its files are written. None in its place for the end of a task that was over."""
        arrived = cluster.next(LOOK_EVERY_S)
        if arrived is None or arrived[0].id not in submitted:
            return None
        trial, message = arrived
        event = message.event if isinstance(message, Report) else message
        if not isinstance(event, TrialStarted | EpochDone | StateSaved | TrialNote):
            submitted.remove(trial.id)
        if isinstance(message, Report):
            write_report(message, directory)
        return trial, event

    try:
        while waiting or submitted:
            if of_a_study and not study.exists():
                submitted.clear()  # nothing can be saved
                raise FileNotFoundError(f"{directory.path}: was removed, so that nothing more is trained")
            if stopped.is_set() and not told:
                cluster.stop()
                told = True
            while waiting and not told and len(submitted) < cluster.room():
                cluster.submit(waiting[0], directory.resume_file(waiting[0].id))
                submitted.add(waiting.popleft().id)
            if not submitted:
                raise Stopped
            received = receive()
            if received is None:
                continue
            trial, message = received
            if isinstance(message, NodeLost) and message.asked:
                stopped.wait(TOGETHER_S)
                terminations[trial.id] += 1
            match message:
                case NodeLost() | Failure() | ProcessLost() | Stopped() if stopped.is_set():
                    waiting.appendleft(trial)
                case NodeLost(reason) if losses[trial.id] < MOST_LOSSES and terminations[trial.id] < MOST_TERMINATIONS:
                    losses[trial.id] += 1
                    waiting.appendleft(trial)
                    yield TrialNote(trial, f"{reason}; it goes on from its last saved state")
                case NodeLost() | Failure():
                    failure = message if isinstance(message, Failure) else crashed(message.reason)
                    directory.write_failure(trial.id, failure)
                    yield TrialFailed(trial, str(failure))
                case BaseException():
                    raise message
                case _:
                    if isinstance(message, StateSaved):
                        losses.pop(trial.id, None)
                    yield message
    except (KeyboardInterrupt, GeneratorExit) as error:
        # The second signal: nobody waits for a step to end. A caller that works on an event closes this instead.
        if (isinstance(error, KeyboardInterrupt) and not isinstance(error, Stopped)) or stopped.is_set():
            submitted.clear()
        raise
    finally:
        if submitted:
            cluster.stop()
        while submitted:
            with suppress(OSError):  # such as a full disk: the error that ended this is told
                receive()


def write_report(report: Report, directory: StudyDirectory) -> None:
    """Writes what a node has sent. A trial's reads of the test split come first and its record comes last."""
    event, place = report.event, directory.trial(report.event.trial.id)
    if isinstance(event, TrialStarted):
        directory.write_config(event.trial)
    if isinstance(event, EpochDone):
        before = whole_lines(place / "epochs.jsonl")
        if len(before) >= event.epoch.epoch:  # it was trained before, after the state from which it went on
            directory.write_epochs(event.trial.id, [line.decode() for line in before[: event.epoch.epoch - 1]])
        directory.append_epoch(event.trial.id, event.epoch)
    files = dict(report.files)
    checkpoint = files.pop("model.safetensors", b"")
    for read in report.test_reads:
        directory.enter(read)
    for name, content in files.items():
        write_whole(place / name, content)
    if isinstance(event, TrialDone):
        assert report.predictions is not None
        directory.finish(event.trial.id, event.record, checkpoint, report.predictions)


def crashed(reason: str) -> Failure:
    """The failure of a trial whose task is over, where nobody knows more."""
    return Failure(kind="crashed", error=reason, traceback="", time=now())
