"""Trials in a process of their own, so that what ends that process ends one trial and no other.

The process is started anew and not forked, because neither CUDA nor OpenMP survive a fork. It trains one trial after
another and sends the engine's events. Where it dies, or a trial takes too long, that trial has failed, and a new
process goes on with the next one. It dies with its parent.
"""

import ctypes
import faulthandler
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Event as Flag
from typing import TYPE_CHECKING, Any, Literal

from model.errors import InputError, reason_of
from model.files import now
from model.machine import deterministic

if TYPE_CHECKING:
    from ablations.engines import Event, TrialFailed
    from ablations.records import StudyDirectory
    from ablations.training.data import ImageData
    from ablations.training.trial import Trial
    from model.fast.execution import ExecutionOptions

LOOK_EVERY_S = 0.1  # for a signal and for the time limit
LAST_WORDS_S = 2.0  # that a process gets to write where it hangs, and to end after its last message


class ProcessLost(OSError):
    """The process died, and no trial is to blame. The command line prints it in one line."""


@dataclass(frozen=True)
class Setup:
    """What the process gets first: everything that its trials share."""

    data: "ImageData"
    device: str
    directory: Path
    begin: Callable[[], None]  # called first: it registers the user's networks
    execution: "ExecutionOptions"
    deterministic: bool = False


@dataclass(frozen=True)
class Raised:
    """An error of the engine, which is none of a trial's."""

    error: Exception


class Done:
    """All trials of a list are done."""


class StoppedByUser:
    """The state of the trial is saved."""


@contextmanager
def isolated() -> Generator["Trainer"]:
    """A trainer whose process begins to import PyTorch at once, while the caller does other things."""
    trainer = Trainer()
    try:
        yield trainer
    finally:
        trainer.end()


class Trainer:
    """Trains trials in another process, and starts a new one where that dies."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.steps = context.Value("q", 0, lock=False)  # that the current trial has done
        self.crash = Path(tempfile.mkdtemp(prefix="expertgrid-")) / "crash.txt"
        self.process = context.Process(target=_work, args=(theirs, str(self.crash), self.steps, os.getpid()))
        self.process.start()
        theirs.close()
        self.has_setup = False

    def end(self) -> None:
        """Ends the process, whatever it does."""
        self.process.kill()
        self.process.join()
        self.connection.close()
        self.crash.unlink(missing_ok=True)
        self.crash.parent.rmdir()

    def run(
        self,
        trials: "Sequence[Trial]",
        setup: Setup,
        directory: "StudyDirectory",
        stopped: Flag,
        timeout_s: float | None = None,
    ) -> "Iterator[Event]":
        """Trains trials and yields the engine's events.

        A trial that takes longer than `timeout_s` has failed. When `stopped` is set, the process does its step, saves
        the trial's state and ends; then Stopped is raised. Raises what the engine raises, and ProcessLost.
        """
        from ablations.engines import TrialDone, TrialFailed, TrialStarted, by_architecture

        left = by_architecture(list(trials))  # the process trains them in this order
        while left:
            if not self.has_setup:
                self._send(setup)
                self.has_setup = True
            self._send(left)
            begun = trains = False
            for event in self._events(stopped, timeout_s):
                if isinstance(event, Lost):
                    if not begun:
                        raise ProcessLost(f"the training process ended before its first trial: {event.reason}")
                    if trains:
                        yield _failed(left.pop(0), event, int(self.steps.value), directory)
                    self.end()
                    self._start()
                    break
                yield event
                if isinstance(event, TrialStarted):
                    begun = trains = True
                elif isinstance(event, TrialDone | TrialFailed):
                    left.pop(0)
                    trains = False
            else:
                return

    def _send(self, value: object) -> None:
        try:
            self.connection.send(value)
        except OSError:
            self.process.join(LAST_WORDS_S)
            raise ProcessLost(f"the training process ended before its first trial: {self._why()}") from None

    def _events(self, stopped: Flag, timeout_s: float | None) -> "Iterator[Event | Lost]":
        """The events of a list of trials, and the loss of the process where it is lost."""
        from ablations.engines import Stopped, TrialDone, TrialFailed, TrialStarted

        deadline, told = float("inf"), False
        while True:
            if stopped.is_set() and not told:
                self.process.terminate()  # SIGTERM, which it takes as a request
                told = True
            if time.monotonic() >= deadline:
                yield self._too_late(timeout_s)
                return
            try:
                if not self.connection.poll(LOOK_EVERY_S):
                    continue
                message = self.connection.recv()
            except (EOFError, OSError):
                self.process.join(LAST_WORDS_S)
                yield Lost("crashed", self._why(), self._last_words())
                return
            match message:
                case Done():
                    return
                case StoppedByUser():
                    raise Stopped
                case Raised(error):
                    raise error
                case TrialStarted() if timeout_s is not None:
                    deadline = time.monotonic() + timeout_s
                case TrialDone() | TrialFailed():
                    deadline = float("inf")
            yield message

    def _too_late(self, timeout_s: float | None) -> "Lost":
        if hasattr(signal, "SIGUSR1") and self.process.pid is not None:
            os.kill(self.process.pid, signal.SIGUSR1)  # it writes where it is
            until = time.monotonic() + LAST_WORDS_S
            while not self._last_words() and time.monotonic() < until:
                time.sleep(LOOK_EVERY_S / 4)
        return Lost("timeout", f"not done after --trial-timeout {timeout_s:g} s", self._last_words())

    def _why(self) -> str:
        code = self.process.exitcode
        if code is None or code >= 0:
            return f"exit status {code}"
        name = signal.Signals(-code).name
        return f"{name}, as the system does where memory runs out" if name == "SIGKILL" else name

    def _last_words(self) -> str:
        return self.crash.read_text(errors="replace") if self.crash.exists() else ""


@dataclass(frozen=True)
class Lost:
    """How a process ended that was training."""

    kind: Literal["crashed", "timeout"]
    reason: str
    traceback: str


def _failed(trial: "Trial", lost: Lost, steps: int, directory: "StudyDirectory") -> "TrialFailed":
    """Writes the failure of the trial that a process was training when it was lost."""
    from ablations.engines import TrialFailed
    from ablations.records import Failure

    error = lost.reason if lost.kind == "timeout" else f"the training process was ended by {lost.reason}"
    failure = Failure(kind=lost.kind, error=error, traceback=lost.traceback, time=now(), step=steps)
    directory.write_failure(trial.id, failure)
    return TrialFailed(trial, str(failure))


def _work(connection: Connection, crash: str, steps: Any, parent: int) -> None:
    """The process: trains the lists of trials that it is sent, until it is killed."""
    stopped = Flag()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal: the parent decides
    signal.signal(signal.SIGTERM, lambda signum, frame: stopped.set())
    die_with(parent)
    with open(crash, "w") as file:
        faulthandler.enable(file)
        if hasattr(faulthandler, "register"):
            faulthandler.register(signal.SIGUSR1, file)

        def stop(step: int) -> bool:
            steps.value = step
            return stopped.is_set()

        import ablations.engines  # noqa: F401  (takes seconds, in which the parent reads the data)

        try:
            setup = connection.recv()
            with deterministic(setup.deterministic):
                _train(connection, setup, stop)
        except EOFError:  # the parent needs it no more
            sys.exit(0)


def _train(connection: Connection, setup: Setup, stop: Callable[[int], bool]) -> None:
    import torch

    from ablations.engines import Stopped, run_local
    from ablations.records import StudyDirectory
    from ablations.training.splits import ResidentData

    try:
        setup.begin()
        data, directory = ResidentData(setup.data, torch.device(setup.device)), StudyDirectory(setup.directory)
        while True:
            for event in run_local(connection.recv(), data, directory, execution=setup.execution, stop=stop):
                connection.send(event)
            connection.send(Done())
    except Stopped:
        connection.send(StoppedByUser())
    except (InputError, OSError) as error:
        connection.send(Raised(error))
    except Exception as error:
        connection.send(Raised(RuntimeError(f"{reason_of(error)}\n{traceback.format_exc()}")))


def die_with(parent: int) -> None:
    """Has Linux kill this process when its parent ends. Elsewhere it ends with its next message."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)  # it had ended before
