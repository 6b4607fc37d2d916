"""Ctrl-C: what it does, and how a command sees that it came."""

import signal
from threading import Event
from types import FrameType

INTERRUPTED = 130  # the exit status that shells have for Ctrl-C
stopped = Event()  # by the user


def watch() -> None:
    """From now on Ctrl-C sets `stopped` as well. A signal that the parent process ignores stays ignored."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop)


def _stop(signum: int, frame: FrameType | None) -> None:
    """Python drops an exception that it meets while it finalises an object, but not the event."""
    stopped.set()
    raise KeyboardInterrupt
