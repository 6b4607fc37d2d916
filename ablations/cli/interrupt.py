"""Ctrl-C and SIGTERM: the first one stops a training at its next step, the second one ends the command at once."""

import signal
from collections.abc import Callable, Generator
from contextlib import contextmanager
from threading import Event
from types import FrameType

INTERRUPTED = 130  # the exit status that shells have for Ctrl-C
stopped = Event()  # by the user, or by a system that takes the machine away
_say: Callable[[], object] | None = None  # that a training stops, while there is one


def watch() -> None:
    """From now on both signals set `stopped` and end the command. One that the parent ignores stays ignored."""
    for signum, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        if signal.getsignal(signum) is usual:
            signal.signal(signum, _stop)


@contextmanager
def training(say: Callable[[], object]) -> Generator[None]:
    """Within, the first signal only sets `stopped` and calls `say`: the training looks at it after each step."""
    global _say
    _say = say
    try:
        yield
    finally:
        _say = None


def _stop(signum: int, frame: FrameType | None) -> None:
    """Python drops an exception that it meets while it finalises an object, but not the event."""
    is_first = not stopped.is_set()
    stopped.set()
    if not (is_first and _say):
        raise KeyboardInterrupt
    _say()
