"""A process that measures: one for all steps, and a new one after a step that failed or did not end.

What breaks the device breaks it for its process, so that the next step begins in a fresh one; and a process that
imported PyTorch and holds the data does not have to do so for each step. It dies with its parent.
"""

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from ablations.isolation import end_with_parent, process_context
from bench.gpu.plan import Bench, Measurement, Step
from model.errors import InputError

START_S = 300.0  # for a process to import PyTorch, from a cold disk
GRACE_S = 20.0  # for a step to end by itself, once its time is up
Measure = Callable[[Bench, str, str], Measurement]  # by the names of a piece and of a step


class TimeIsUp(Exception):
    """A step did not end in its time."""


class Worker:
    """Measures steps in another process, which is started with the first of them."""

    def __init__(self, measure: Measure):
        self.measured_by = measure
        self.process: BaseProcess | None = None

    def measure(self, bench: Bench, step: Step, seconds: float) -> Measurement:
        """What a step measures. Raises InputError where it fails, and TimeIsUp where it does not end in time."""
        whole = False
        try:
            if self.process is None:
                self._start()
            self.connection.send((bench, step.piece, step.name, seconds))
            if not self.connection.poll(seconds + GRACE_S):
                raise TimeIsUp
            answer = self.connection.recv()
            whole = isinstance(answer, Measurement)
        except (EOFError, OSError):
            assert self.process is not None  # it was started above
            self.process.join(GRACE_S)
            raise InputError(f"its process ended with status {self.process.exitcode}") from None
        finally:
            if not whole:
                self.end()
        if isinstance(answer, Measurement):
            return answer
        raise InputError(answer)

    def _start(self) -> None:
        context = process_context()
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, self.measured_by))
        self.process.start()
        theirs.close()
        if not self.connection.poll(START_S):
            raise TimeIsUp
        self.connection.recv()  # it imported what it needs

    def end(self) -> None:
        """Ends the process, whatever it does, and the processes that it started. Files are whole whenever it ends."""
        if self.process is None:
            return
        if hasattr(os, "killpg") and self.process.pid is not None:
            with suppress(ProcessLookupError, PermissionError):  # before its setsid there is no such group
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()
        self.connection.close()
        self.process = None


def _work(connection: Connection, measure: Measure) -> None:
    """The process: measures what it is asked for, until it is ended."""
    if hasattr(os, "setsid"):
        os.setsid()  # the processes that it starts end with it, and Ctrl-C is for the process that waits
    end_with_parent()
    connection.send("ready")
    with suppress(EOFError):
        while True:
            bench, piece, name, seconds = connection.recv()
            try:
                connection.send(measure(replace(bench, until=time.monotonic() + seconds), piece, name))
            except Exception as error:  # of a step; its process ends
                connection.send(str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}")
