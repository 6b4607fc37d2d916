"""Trials in processes of their own, so that what ends a process ends one trial and no other.

A process trains one trial after another and sends the engine's events. Where it dies, or a trial takes too long, that
trial has failed, and a new process goes on with the next one. It ends with its parent.
"""

import faulthandler
import os
import queue
import signal
import sys
import tempfile
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Event as Flag
from threading import Thread
from typing import TYPE_CHECKING, Any, Literal

from expertgrid.ablations.engines.gpu_sharing import ALONE, SharedGpu, shared_gpu
from expertgrid.model.system.errors import InputError, reason_of
from expertgrid.model.system.files import now
from expertgrid.model.system.machine import deterministic, gpu_driver, memory_bytes, usable_cores
from expertgrid.model.system.processes import ProcessLost, end_with_parent, process_context

if TYPE_CHECKING:
    from expertgrid.ablations.engines.events import Event, TrialFailed
    from expertgrid.ablations.records.directory import StudyDirectory
    from expertgrid.model.fast.execution import ExecutionOptions
    from expertgrid.model.training.data import ImageData
    from expertgrid.model.training.trial import Trial

ENGINE = "expertgrid.ablations.engines.local"  # what the processes need, whose import takes seconds
JOB_BYTES = 3 * 2**30  # of memory for each process that trains: PyTorch, the images and a small network
MOST_JOBS = 8  # that "auto" takes; more was not measured
LOOK_EVERY_S = 0.1  # for a signal and for the time limit
LAST_WORDS_S = 2.0  # that a process gets to write where it hangs, and to end after its last message


@dataclass(frozen=True)
class Setup:
    """What the process gets first: everything that its trials share."""

    data: "ImageData"
    device: str
    directory: Path
    begin: Callable[[], None]  # called first: it registers the user's networks
    execution: "ExecutionOptions"
    deterministic: bool = False
    threads: int | None = None  # of each process; None for as many as PyTorch takes
    at_once: int = 1  # trials that are trained at once
    save_every_s: float | None = None  # None for the engine's own
    environment: Mapping[str, str] = field(default_factory=dict)  # of each process, before it starts CUDA


@dataclass(frozen=True)
class Raised:
    """An error of the engine, which is none of a trial's."""

    error: Exception


class Done:
    """All trials of a list are done."""


class StoppedByUser:
    """The state of the trial is saved."""


def jobs_for(device: str, cores: int | None = None, memory: int | None = None) -> int:
    """How many trials "auto" trains at once on the device that a user names, without importing PyTorch.

    One for each core of a CPU, at most MOST_JOBS and what the memory has room for. On two cores two trials with a
    thread each did 1.44 times the work of one with two threads, for networks of the quickstart's size, and 1.1 times
    for those of 10 to 65 million MACs. On a GPU one, as it was not measured there what more would gain.
    """
    if device not in ("auto", "cpu") or _is_gpu(device):
        return 1
    room = (memory or memory_bytes() or JOB_BYTES) // JOB_BYTES
    return max(1, min(cores or usable_cores(), room, MOST_JOBS))


def _is_gpu(device: str) -> bool:
    """Whether the device that a user names is a GPU of NVIDIA."""
    return device.startswith("cuda") or (device == "auto" and gpu_driver() is not None)


@contextmanager
def isolated(jobs: int = 1, device: str = "cpu") -> Generator["Pool"]:
    """Trainers whose processes begin to import PyTorch at once, while the caller does other things.

    Several on a GPU use it side by side, where CUDA's Multi-Process Service is there.
    """
    with shared_gpu() if jobs > 1 and _is_gpu(device) else nullcontext(ALONE) as gpu:
        pool = Pool(jobs, gpu)
        pool.begin()
        try:
            yield pool
        finally:
            for trainer in pool.trainers:
                trainer.end()


class Pool:
    """Trains trials in several processes at once."""

    def __init__(self, jobs: int, gpu: SharedGpu = ALONE) -> None:
        self.trainers: list[Trainer] = []
        self.gpu = gpu
        self.at_once = jobs
        self.threads = max(1, usable_cores() // jobs) if jobs > 1 else None  # of each process

    @property
    def in_words(self) -> str | None:
        """What a user must know of it."""
        if self.gpu.missing is None:
            return None
        return f"{self.at_once} trials take turns on the GPU, without CUDA's MPS: {self.gpu.missing}"

    def begin(self) -> None:
        """Begins to import PyTorch: in the server, whose processes start in `run`, or else in the processes."""
        if process_context(ENGINE).get_start_method() == "forkserver":
            from multiprocessing import forkserver  # Windows has none

            forkserver.ensure_running()
        else:
            self._start()

    def _start(self) -> None:
        self.trainers = [Trainer() for _ in range(self.at_once)]

    def run(
        self,
        trials: "Sequence[Trial]",
        setup: Setup,
        directory: "StudyDirectory",
        stopped: Flag,
        timeout_s: float | None = None,
    ) -> "Iterator[Event]":
        """As `Trainer.run`. Each process takes the next trial when it is done with one.

        Where one of them cannot go on, the others save their states and end, and its error is raised.
        """
        from expertgrid.ablations.engines.events import by_seed

        setup = replace(setup, environment=self.gpu.environment)
        if not self.trainers:
            self._start()
        if len(self.trainers) == 1:
            yield from self.trainers[0].run(trials, setup, directory, stopped, timeout_s)
            return
        left, halted = deque(by_seed(list(trials))), Flag()
        events: queue.Queue[Event | BaseException | None] = queue.Queue()

        def work(trainer: Trainer) -> None:
            try:
                while left and not stopped.is_set() and not halted.is_set():
                    try:
                        trial = left.popleft()
                    except IndexError:  # another one took the last
                        return
                    for event in trainer.run([trial], setup, directory, Either(stopped, halted), timeout_s):
                        events.put(event)
            except BaseException as error:  # raised below, in the thread that waits for it
                events.put(error)
            finally:
                events.put(None)

        threads = [Thread(target=work, args=(trainer,)) for trainer in self.trainers]
        for thread in threads:
            thread.start()
        errors: list[BaseException] = []
        try:
            working = len(threads)
            while working:
                try:
                    event = events.get(timeout=LOOK_EVERY_S)  # a signal that another thread got does not wake this one
                except queue.Empty:
                    continue
                if event is None:
                    working -= 1
                elif isinstance(event, BaseException):
                    errors.append(event)
                    halted.set()
                else:
                    yield event
        except (KeyboardInterrupt, GeneratorExit) as error:
            # The second signal: nobody waits for a step to end. A caller that works on an event closes this instead.
            if isinstance(error, KeyboardInterrupt) or stopped.is_set():
                halted.set()
                for trainer in self.trainers:
                    trainer.process.kill()
            raise
        finally:
            halted.set()
            for thread in threads:
                thread.join()
        if errors:
            raise errors[0]  # what ended the others comes after it
        if stopped.is_set() and left:
            from expertgrid.ablations.engines.events import Stopped

            raise Stopped


class Either:
    """Set where one of two flags is."""

    def __init__(self, first: Flag, second: Flag) -> None:
        self.first, self.second = first, second

    def is_set(self) -> bool:
        return self.first.is_set() or self.second.is_set()


class Trainer:
    """Trains trials in another process, and starts a new one where that dies."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        context = process_context(ENGINE)
        self.connection, theirs = context.Pipe()
        self.steps = context.Value("q", 0, lock=False)  # that the current trial has done
        self.crash = Path(tempfile.mkdtemp(prefix="expertgrid-")) / "crash.txt"
        self.process = context.Process(target=_work, args=(theirs, str(self.crash), self.steps))
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
        stopped: Flag | Either,
        timeout_s: float | None = None,
    ) -> "Iterator[Event]":
        """Trains trials and yields the engine's events.

        A trial that takes longer than `timeout_s` has failed. When `stopped` is set, the process does its step, saves
        the trial's state and ends; then Stopped is raised. Raises what the engine raises, and ProcessLost.
        """
        from expertgrid.ablations.engines.events import Stopped, TrialDone, TrialFailed, TrialStarted, by_seed

        left = by_seed(list(trials))  # the process trains them in this order
        while left:
            if not self.has_setup:
                self._send(setup)
                self.has_setup = True
            self._send(left)
            begun = trains = False
            for event in self._events(stopped, timeout_s):
                if isinstance(event, Lost):
                    if stopped.is_set():
                        raise Stopped
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

    def _events(self, stopped: Flag | Either, timeout_s: float | None) -> "Iterator[Event | Lost]":
        """The events of a list of trials, and the loss of the process where it is lost."""
        from expertgrid.ablations.engines.events import Stopped, TrialDone, TrialFailed, TrialStarted

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
            os.kill(self.process.pid, signal.SIGUSR1)  # it writes where its threads are, the main one last
            until = time.monotonic() + LAST_WORDS_S
            while " in <module>" not in self._last_words() and time.monotonic() < until:
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
    from expertgrid.ablations.engines.events import TrialFailed
    from expertgrid.ablations.records.record import Failure

    error = lost.reason if lost.kind == "timeout" else f"the training process was ended by {lost.reason}"
    failure = Failure(kind=lost.kind, error=error, traceback=lost.traceback, time=now(), step=steps)
    directory.write_failure(trial.id, failure)
    return TrialFailed(trial, str(failure))


def _work(connection: Connection, crash: str, steps: Any) -> None:
    """The process: trains the lists of trials that it is sent, until it is killed."""
    stopped = Flag()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal: the parent decides
    signal.signal(signal.SIGTERM, lambda signum, frame: stopped.set())
    end_with_parent()
    with open(crash, "w") as file:
        faulthandler.enable(file)
        if hasattr(faulthandler, "register"):
            faulthandler.register(signal.SIGUSR1, file)

        def stop(step: int) -> bool:
            steps.value = step
            return stopped.is_set()

        import expertgrid.ablations.engines.local  # noqa: F401  (takes seconds, in which the parent reads the data)

        try:
            setup = connection.recv()
            with deterministic(setup.deterministic):
                _train(connection, setup, stop)
        except EOFError:  # the parent needs it no more
            sys.exit(0)


def _train(connection: Connection, setup: Setup, stop: Callable[[int], bool]) -> None:
    import torch

    from expertgrid.ablations.engines.events import StateSaved, Stopped
    from expertgrid.ablations.engines.local import run_local
    from expertgrid.ablations.records.directory import StudyDirectory
    from expertgrid.model.training.splits import ResidentData

    try:
        os.environ.update(setup.environment)
        setup.begin()
        if setup.threads is not None:
            torch.set_num_threads(setup.threads)
        data, directory = ResidentData(setup.data, torch.device(setup.device)), StudyDirectory(setup.directory)
        trained = partial(
            run_local,
            **({} if setup.save_every_s is None else {"save_every_s": setup.save_every_s}),
            execution=setup.execution,
            stop=stop,
            at_once=setup.at_once,
            saved=lambda trial: connection.send(StateSaved(trial)),
        )
        while True:
            for event in trained(connection.recv(), data, directory):
                connection.send(event)
            connection.send(Done())
    except Stopped:
        connection.send(StoppedByUser())
    except (InputError, OSError) as error:
        connection.send(Raised(error))
    except Exception as error:
        connection.send(Raised(RuntimeError(f"{reason_of(error)}\n{traceback.format_exc()}")))
