"""An engine in a process of its own, so that no other engine's threads and memory are in its way.

The process that asks decides whose turn it is, so that engines still take turns in random blocks; the engine's process
has the clock. Times are sent when a block is done.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from expertgrid.bench.engines import Engine
from expertgrid.bench.host import peak_bytes, reset_peak
from expertgrid.bench.record import Memory
from expertgrid.bench.timing import Timer
from expertgrid.model.system.processes import answers

Open = Callable[[Engine, np.ndarray], Timer]  # opens an engine for a batch of images
Begin = Callable[[], object]  # what a process does first, such as to import the user's modules


class IsolatedTimer(Timer):
    """Times the calls of an engine that another process has opened."""

    def __init__(self, ask: Callable[..., Any]):
        self.ask = ask
        super().__init__(partial(ask, "call"))

    def warm_up(self, longest_s: float) -> tuple[float, bool]:
        return self.ask("warm_up", longest_s)

    def timed(self, count: int) -> list[float]:
        return self.ask("timed", count)

    def rest(self) -> None:
        self.ask("rest")


@contextmanager
def isolated_engine(
    engine: Engine, images: np.ndarray, open_: Open, begin: Begin, memory: Memory
) -> Generator[Callable[[], IsolatedTimer]]:
    """A candidate of `bench.timing.take_turns` in a process of its own, which ends when the context is left.

    Each call opens the engine anew, with `open_`. `memory` is filled when the context is left. Errors of the process
    are raised here; ProcessLost where it dies.
    """
    with answers(engine.title, _serve, engine, images, open_, begin) as ask:

        def reopen() -> IsolatedTimer:
            ask("open")
            return IsolatedTimer(ask)

        ask("begin")
        yield reopen
        memory.peak, memory.before = ask("memory")


def _serve(engine: Engine, images: np.ndarray, open_: Open, begin: Begin) -> Callable[..., Any]:
    """In the process: a function that does what a word names."""
    timer: Timer | None = None
    before: int | None = None

    def answer(word: str, *arguments: Any) -> Any:
        nonlocal timer, before
        match word:
            case "begin":
                begin()
                before = reset_peak()
            case "open":
                timer = None  # the engine that was open is closed first
                timer = open_(engine, images)
            case "memory":
                return peak_bytes(), before
            case "call":
                assert timer is not None
                timer.call()
            case method:
                return getattr(timer, method)(*arguments)
        return None

    return answer
