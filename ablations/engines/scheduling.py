"""Trials on the nodes of a cluster: which is trained next, what is kept of it, and what is done where a node is lost.

Which cluster that is, and how messages travel, is not known here. Nodes report what happens and send the files of a
trial with it. They are written to the study directory here alone, so that no file system is shared.
"""

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal, Protocol

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
from expertgrid.model.training.trial import Trial

LOOK_EVERY_S = 0.1  # for a signal
MOST_LOSSES = 5  # of a trial's nodes, one after another without a new state between: the trial itself may be the cause


@dataclass(frozen=True)
class Report:
    """An event on a node, with the files of the trial that are not in the event.

    StateSaved has resume.pt; TrialFailed has failure.json; TrialDone has epochs.jsonl, model.safetensors, the
    predictions and the reads of the test split.
    """

    event: Event
    files: dict[str, bytes] = field(default_factory=dict)
    predictions: Predictions | None = None
    test_reads: Sequence[TestRead] = ()


@dataclass(frozen=True)
class Ended:
    """A trial's task is over: the trial is done or has failed, or the task was stopped."""


@dataclass(frozen=True)
class Lost:
    """A trial's task is over, because its node or its process was lost."""

    what: Literal["node", "process"]
    reason: str


Message = Report | Ended | Lost | BaseException  # an exception is an error of no trial, and ends its task


class Cluster(Protocol):
    """Where trials are trained."""

    def room(self) -> int:
        """How many trials may be submitted and not over at the same time."""

    def submit(self, trial: Trial, state: bytes | None) -> None:
        """Has a trial trained, from a saved state where there is one."""

    def next(self, timeout_s: float) -> tuple[Trial, Message] | None:
        """The next message about a submitted trial; None where none comes in time."""

    def stop(self) -> None:
        """Trials that are trained save their states and end at the next step, and the others do not begin."""


class Flag(Protocol):
    def is_set(self) -> bool: ...


def schedule(trials: Sequence[Trial], directory: StudyDirectory, cluster: Cluster, stopped: Flag) -> Iterator[Event]:
    """Trains trials on a cluster, each from its last saved state, and yields the engine's events.

    A trial whose node was lost is trained on, from the last state that came here, before all trials that have not
    begun. A trial whose process was lost has failed. When `stopped` is set, the states of all trials that are trained
    come here, and Stopped is raised. They come here too where the caller ends this, and where an error of no trial is
    raised.
    """
    left, submitted = deque(by_seed(list(trials))), set[str]()
    losses: Counter[str] = Counter()
    told = False
    try:
        while left or submitted:
            if stopped.is_set() and not told:
                cluster.stop()
                told = True
            while left and not told and len(submitted) < cluster.room():
                submitted.add(left[0].id)
                cluster.submit(left[0], _state(directory, left.popleft()))
            if not submitted:
                raise Stopped
            found = cluster.next(LOOK_EVERY_S)
            if found is None or found[0].id not in submitted:  # or the end of a task whose trial is done
                continue
            trial, message = found
            if _ends(message):
                submitted.remove(trial.id)
            match message:
                case Report(event):
                    keep(message, directory)
                    if isinstance(event, StateSaved):
                        losses.pop(trial.id, None)
                    yield event
                case Ended() if told:
                    left.appendleft(trial)
                case Ended():
                    yield _fail(trial, "its task ended before it was done", directory)
                case Lost("node", reason) if losses[trial.id] < MOST_LOSSES:
                    losses[trial.id] += 1
                    left.appendleft(trial)
                    yield TrialNote(trial, f"{reason}; it goes on from its last saved state")
                case Lost(_, reason):
                    yield _fail(trial, reason, directory)
                case BaseException():
                    raise message
    except (KeyboardInterrupt, GeneratorExit) as error:
        # The second signal: nobody waits for a step to end. A caller that works on an event closes this instead.
        if isinstance(error, KeyboardInterrupt) or stopped.is_set():
            submitted.clear()
        raise
    finally:
        if submitted:
            cluster.stop()
        while submitted:
            found = cluster.next(LOOK_EVERY_S)
            if found and found[0].id in submitted:
                trial, message = found
                if isinstance(message, Report):
                    with suppress(OSError):  # such as a full disk: the error that ended this is told
                        keep(message, directory)
                if _ends(message):
                    submitted.remove(trial.id)


def keep(report: Report, directory: StudyDirectory) -> None:
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
        directory.resume_file(event.trial.id).unlink(missing_ok=True)
        (place / "failure.json").unlink(missing_ok=True)


def _ends(message: Message) -> bool:
    """Whether a message is the last one about a trial."""
    return not isinstance(message, Report) or isinstance(message.event, TrialDone | TrialFailed)


def _state(directory: StudyDirectory, trial: Trial) -> bytes | None:
    file = directory.resume_file(trial.id)
    return file.read_bytes() if file.exists() else None


def _fail(trial: Trial, reason: str, directory: StudyDirectory) -> TrialFailed:
    failure = Failure(kind="crashed", error=reason, traceback="", time=now())
    directory.write_failure(trial.id, failure)
    return TrialFailed(trial, str(failure))
