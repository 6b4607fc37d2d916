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
from expertgrid.bench.host import peak_bytes
from expertgrid.bench.record import Memory
from expertgrid.bench.timing import Call, Timer, rest, timed, warm_up
from expertgrid.model.system.processes import answers

Open = Callable[[Engine, np.ndarray], Call]  # opens an engine for a batch of images
Begin = Callable[[], object]  # what a process does first, such as to import the user's modules


class Apart(Timer):
    """An engine that another process runs on the same images, again and again."""

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
def apart(
    engine: Engine, images: np.ndarray, open_: Open, begin: Begin, memory: Memory
) -> Generator[Callable[[], Apart]]:
    """A candidate of `bench.timing.take_turns` in a process of its own, which ends when the context is left.

    Each call opens the engine anew, with `open_`. `memory` is filled when the context is left. Errors of the process
    are raised here; ProcessLost where it dies.
    """
    with answers(engine.title, _serve, engine, images, open_, begin) as ask:

        def reopen() -> Apart:
            ask("open")
            return Apart(ask)

        ask("begin")
        yield reopen
        memory.peak, memory.before = ask("memory")


class _Served:
    """What the process does when it is asked."""

    def __init__(self, engine: Engine, images: np.ndarray, open_: Open, begin: Begin):
        self.engine, self.images, self.open_, self._begin = engine, images, open_, begin
        self.run: Call | None = None

    def begin(self) -> None:
        self._begin()
        self.before = peak_bytes()

    def open(self) -> None:
        self.run = None  # the engine that was open is closed first
        self.run = self.open_(self.engine, self.images)

    def call(self) -> None:
        assert self.run is not None
        self.run()

    def warm_up(self, longest_s: float) -> tuple[float, bool]:
        assert self.run is not None
        return warm_up(self.run, longest_s)

    def timed(self, count: int) -> list[float]:
        assert self.run is not None
        return timed(self.run, count)

    def rest(self) -> None:
        rest()

    def memory(self) -> tuple[int | None, int | None]:
        return peak_bytes(), self.before


def _serve(*work: Any) -> Callable[..., Any]:
    """In the process: a function that does what a word names."""
    served = _Served(*work)
    return lambda word, *given: getattr(served, word)(*given)
