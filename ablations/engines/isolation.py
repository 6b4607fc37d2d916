"""Trials in processes of their own, so that what ends a process ends one trial and no other.

A process trains one trial after another and sends the engine's events. Where it dies, or a trial takes too long, that
trial has failed, and a new process goes on with the next one. It ends with its parent.
"""

import faulthandler
import os
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import wait
from pathlib import Path
from threading import Event as Flag
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

from expertgrid.ablations.engines.events import Event, StateSaved, TrialDone, TrialFailed, TrialNote, TrialStarted
from expertgrid.ablations.engines.gpu_sharing import ALONE, SharedGpu, shared_gpu
from expertgrid.ablations.engines.scheduling import LOOK_EVERY_S, Message, NodeLost, schedule
from expertgrid.ablations.records.directory import StudyDirectory
from expertgrid.ablations.records.record import Failure
from expertgrid.model.fast.execution import ExecutionOptions
from expertgrid.model.system.errors import InputError, reason_of
from expertgrid.model.system.files import now
from expertgrid.model.system.machine import VISIBLE_GPUS, deterministic, gpus, memory_bytes, usable_cores
from expertgrid.model.system.processes import LOST_SERVER, AnsweringProcess, ProcessLost, process_context
from expertgrid.model.training.resume import SAVE_EVERY_S
from expertgrid.model.training.trial import Trial

if TYPE_CHECKING:
    from expertgrid.model.training.data import ImageData

ENGINE = "expertgrid.ablations.engines.local"  # what the processes need, whose import takes seconds
JOB_BYTES = 3 * 2**30  # of memory for each process that trains: PyTorch, the images and a small network
MOST_JOBS = 8  # that "auto" takes; more was not measured
TERMINATED = NodeLost("its process was ended by SIGTERM", asked=True)
LAST_WORDS_S = 2.0  # that a process gets to write where it hangs, and to end after its last message


@dataclass(frozen=True)
class Setup:
    """What the process gets first: everything that its trials share."""

    data: "ImageData"
    device: str
    directory: Path
    begin: Callable[[], None]  # called first: it registers the user's networks
    execution: ExecutionOptions
    deterministic: bool = False
    threads: int | None = None  # of each process; None for as many as PyTorch takes
    at_once: int = 1  # trials that are trained at once
    save_every_s: float = SAVE_EVERY_S
    weights: Mapping[str, bytes] = field(default_factory=dict)  # by fingerprint, for nodes that have no such files
    environment: Mapping[str, str] = field(default_factory=dict)  # of each process, before it starts CUDA


def jobs_for(device: str, cores: int | None = None, memory: int | None = None) -> int:
    """How many trials "auto" trains at once on the device that a user names, without importing PyTorch.

    One for each core of a CPU, at most MOST_JOBS and what the memory has room for. On two cores two trials with a
    thread each did 1.44 times the work of one with two threads, for networks of the quickstart's size, and 1.1 times
    for those of 10 to 65 million MACs. One on each GPU, as it was not measured there what more would gain.
    """
    if names := _gpus(device):
        return len(names)
    if device not in ("auto", "cpu"):
        return 1
    room = (memory or memory_bytes() or JOB_BYTES) // JOB_BYTES
    return max(1, min(cores or usable_cores(), room, MOST_JOBS))


def _is_gpu(device: str) -> bool:
    """Whether the device that a user names is a GPU of NVIDIA."""
    return device.partition(":")[0] == "cuda" or bool(_gpus(device))


def _gpus(device: str) -> list[str]:
    """The GPUs among which trials are dealt; none where the device is another one, or a certain GPU."""
    return gpus() if device in ("auto", "cuda") else []


def device_of(device: str) -> str:
    """What "auto" is, without importing PyTorch."""
    return device if device != "auto" else "cuda" if _is_gpu(device) else "cpu"


@contextmanager
def isolated(jobs: int = 1, device: str = "cpu") -> Generator["Pool"]:
    """A pool whose processes begin to import PyTorch at once, while the caller does other things.

    On several GPUs each has one. Several on a GPU use it side by side, where CUDA's Multi-Process Service is there.
    """
    names = _gpus(device)
    with shared_gpu() if jobs > max(1, len(names)) and _is_gpu(device) else nullcontext(ALONE) as gpu:
        pool = Pool(jobs, gpu, names)
        try:
            yield pool
        finally:
            for trainer in list(pool.trainers):
                pool.end(trainer)


class Trainer(AnsweringProcess):
    """A process that trains one trial at a time, on a GPU of its own where it is given one."""

    def __init__(self, gpu: str | None = None) -> None:
        self.gpu = gpu
        self.steps = process_context(ENGINE).Value("q", 0, lock=False)  # of its trial that are done
        handle, name = tempfile.mkstemp(prefix="expertgrid-", suffix=".txt")
        self.crash = os.fdopen(handle, errors="replace")  # which nobody can remove
        super().__init__(ENGINE, _EngineApart, name, shared=(self.steps,))
        self.trial: Trial | None = None  # that it trains
        self.began = False  # that trial
        self.trials = 0  # that it was asked to train
        self.deadline = float("inf")

    def train(self, trial: Trial, setup: Setup, graphs: bool) -> None:
        """Asks for the events of a training. `graphs` says whether it may have CUDA graphs."""
        self.trial, self.began, self.deadline, self.steps.value = trial, False, float("inf"), 0
        if self.gpu is not None:
            setup = replace(setup, environment={**setup.environment, VISIBLE_GPUS: self.gpu})
        self.ask(trial, graphs, None if self.trials else setup)
        self.trials += 1

    def end(self) -> None:
        super().end()
        self.crash.close()

    def how_it_ended(self) -> str:
        self.process.join(LAST_WORDS_S)
        code = self.process.exitcode
        if code is None or code == LOST_SERVER:
            return "an unknown cause, as the server of the processes was ended or stopped too"
        if code >= 0:
            return f"exit status {code}"
        name = signal.Signals(-code).name
        return f"{name}, as the system does where memory runs out" if name == "SIGKILL" else name

    def failure(self, kind: Literal["crashed", "timeout"], error: str) -> Failure:
        """The failure of its trial, with where its threads are, or were when it crashed."""
        if kind == "timeout" and hasattr(signal, "SIGUSR1"):
            self.signal(signal.SIGUSR1)
            until, size = time.monotonic() + LAST_WORDS_S, 0
            while not (size and size == os.stat(self.crash.fileno()).st_size) and time.monotonic() < until:
                size = os.stat(self.crash.fileno()).st_size  # it still writes
                time.sleep(LOOK_EVERY_S)
        return Failure(kind=kind, error=error, traceback=self.crash.read(), time=now(), step=int(self.steps.value))


class Pool:
    """Processes of this machine that train a trial each: the `scheduling.Cluster` of the local engine.

    They read and write the files of their trials themselves.
    """

    setup: Setup

    def __init__(self, jobs: int, gpu: SharedGpu = ALONE, gpus: Sequence[str] = ()) -> None:
        self.gpu, self.gpus = gpu, gpus if len(gpus) > 1 else ()
        self.at_once = jobs
        self.threads = max(1, usable_cores() // jobs) if jobs > 1 else None  # of each process
        self.timeout_s: float | None = None
        self.stopping = False
        without_server = process_context(ENGINE).get_start_method() == "spawn"  # they import PyTorch themselves
        self.trainers: list[Trainer] = []
        for _ in range(jobs if without_server else 0):
            self._add_trainer()

    @property
    def in_words(self) -> str | None:
        """What a user must know of it."""
        place = f"{len(self.gpus)} GPUs" if self.gpus else "the GPU"
        if self.gpu.missing is not None:
            return f"{self.at_once} trials take turns on {place}, without CUDA's MPS: {self.gpu.missing}"
        return f"{self.at_once} trials at once on {place}" if self.gpus else None

    def _add_trainer(self) -> Trainer:
        """On the GPU that has the fewest."""
        count = Counter(trainer.gpu for trainer in self.trainers)
        self.trainers.append(Trainer(min(self.gpus, key=lambda gpu: count[gpu], default=None)))
        return self.trainers[-1]

    def run(
        self,
        trials: Sequence[Trial],
        setup: Setup,
        directory: StudyDirectory,
        stopped: Flag,
        timeout_s: float | None = None,
    ) -> Iterator[Event]:
        """Trains trials as `scheduling.schedule` does. A trial that takes longer than `timeout_s` has failed.

        All calls have the same setup. Raises what the engine raises, and ProcessLost.
        """
        self.setup, self.timeout_s = replace(setup, environment=self.gpu.environment), timeout_s
        self.stopping = False
        return schedule(trials, directory, self, stopped)

    def room(self) -> int:
        return self.at_once

    def steps_done(self) -> dict[str, int]:
        """Of the trials that are trained."""
        return {trial.id: int(of.steps.value) for of in [*self.trainers] if (trial := of.trial)}

    def submit(self, trial: Trial, resume: Path) -> None:
        self._train(trial)

    def _train(self, trial: Trial, graphs: bool = True) -> None:
        idle = (trainer for trainer in self.trainers if trainer.trial is None)
        trainer = next(idle, None) or self._add_trainer()
        trainer.train(trial, self.setup, graphs)

    def next(self, timeout_s: float) -> tuple[Trial, Message] | None:
        busy = [(trainer, trainer.trial) for trainer in self.trainers if trainer.trial]
        if self.stopping:
            for trainer, _ in busy:
                trainer.signal(signal.SIGTERM)  # which it takes as a request
        readable = wait([trainer.connection for trainer, _ in busy], timeout_s)
        for trainer, trial in busy:
            if trainer.connection in readable:
                try:
                    return self._message(trainer, trial)
                except ProcessLost as error:  # there is no other process for it
                    return trial, error
            if time.monotonic() >= trainer.deadline:
                error = f"not done after --trial-timeout {self.timeout_s:g} s"
                failure = trainer.failure("timeout", error)
                self.end(trainer)
                return trial, failure
        return None

    def _message(self, trainer: Trainer, trial: Trial) -> tuple[Trial, Message] | None:
        try:
            message = trainer.connection.recv()
        except (EOFError, OSError):
            return self._lost(trainer, trial)
        match message:
            case TrialStarted():
                trainer.began = True
                if self.timeout_s is not None:
                    trainer.deadline = time.monotonic() + self.timeout_s
            case TrialFailed(_, reason, of_recording=True):  # which leaves CUDA in a state that nobody describes
                self.end(trainer)
                self._train(trial, graphs=False)
                return trial, TrialNote(trial, f"trained without CUDA graphs: {reason}")
            case TrialDone() | TrialFailed():
                trainer.trial = None
            case BaseException():
                self.end(trainer)
                if isinstance(message, KeyboardInterrupt) and not self.stopping:
                    return trial, TERMINATED
        return trial, message

    def _lost(self, trainer: Trainer, trial: Trial) -> tuple[Trial, Message] | None:
        """What it means that a process has died: a failure only of the trial that it had begun."""
        how = trainer.how_it_ended()
        failure = trainer.failure("crashed", f"the training process was ended by {how}")
        self.end(trainer)
        if how == "SIGTERM":
            return trial, TERMINATED
        if trainer.began:
            return trial, failure
        if trainer.trials == 1:
            return trial, ProcessLost(f"the training process ended before its first trial: {how}")
        self._train(trial)
        return None

    def stop(self) -> None:
        self.stopping = True

    def end(self, trainer: Trainer) -> None:
        """Ends a process, whatever it does."""
        trainer.end()
        self.trainers.remove(trainer)


class _EngineApart:
    """The local engine in the process of a Trainer."""

    def __init__(self, crash: str, steps: Any):
        self.stopped, self.steps, self.crash = False, steps, open(crash, "w")  # noqa: SIM115  (as long as the process)
        with suppress(OSError):  # Windows keeps the name of an open file
            os.unlink(crash)
        faulthandler.enable(self.crash)
        if hasattr(faulthandler, "register"):
            faulthandler.register(signal.SIGUSR1, self.crash)
        import expertgrid.ablations.engines.local  # noqa: F401  (takes seconds, in which the parent reads the data)

    def __call__(self, send: Callable[[object], None], trial: Trial, graphs: bool, setup: Setup | None) -> None:
        from expertgrid.ablations.engines.local import run_local

        self.setup = setup or self.setup
        execution = self.setup.execution if graphs else replace(self.setup.execution, graphs="off")
        try:
            with deterministic(self.setup.deterministic):
                if setup is not None:
                    self._begin(setup)
                for event in run_local(
                    [trial],
                    self.data,
                    StudyDirectory(self.setup.directory),
                    self.setup.save_every_s,
                    execution,
                    self._stop,
                    self.setup.at_once,
                    saved=lambda trial: send(StateSaved(trial)),
                ):
                    send(event)
        except (InputError, OSError):
            raise
        except Exception as error:
            raise RuntimeError(f"{reason_of(error)}\n{traceback.format_exc()}") from error

    def _begin(self, setup: Setup) -> None:
        import torch

        from expertgrid.model.training.splits import ResidentData

        os.environ.update(setup.environment)
        setup.begin()
        if setup.threads is not None:
            torch.set_num_threads(setup.threads)
        self.data = ResidentData(setup.data, torch.device(setup.device))

    def _stop(self, step: int) -> bool:
        """Before the first step of a trial, for which much may be compiled, SIGTERM ends the process at once."""
        signal.signal(signal.SIGTERM, self._terminated if step else signal.SIG_DFL)
        self.steps.value = step
        return self.stopped

    def _terminated(self, signum: int, frame: FrameType | None) -> None:
        self.stopped = True
