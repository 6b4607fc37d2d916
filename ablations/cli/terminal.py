"""What a person sees on stderr while something runs. Light: it is imported before PyTorch is."""

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

from expertgrid.model.system.errors import printable


class _Terminal(Console):
    """Shows no character of a text as a command."""

    def print(self, *objects: Any, **style: Any) -> None:
        super().print(*(printable(part) if isinstance(part, str) else part for part in objects), **style)


console = _Terminal(stderr=True, highlight=False, markup=False, emoji=False)
notice = partial(console.print, soft_wrap=True)
_step = ""


def begin_step(name: str, seconds: dict[str, float]) -> None:
    """Begins one of the steps that follow the training and take so long: `status` shows a bar. "" ends the last."""
    global _step
    places = list(seconds)
    left_s = sum(list(seconds.values())[places.index(name) :]) if name else 0.0
    done = "━" * round(20 * (1 - left_s / sum(seconds.values())))
    title = f"{name}, step {places.index(name) + 1} of {len(places)}" if name else ""
    _step = f"{done:┈<20} {title}, about {left_s:.0f} s left: " if name else ""


def status(text: str) -> AbstractContextManager:
    """A spinner with a text on a terminal, and nothing elsewhere: for work that cannot say how far it is.

    It is drawn at once, unlike that of `Console.status`, which waits for its thread.
    """
    if console.is_jupyter:  # where each needs a widget
        return nullcontext()
    text = printable(_step + text)
    return Live(Spinner("dots", Text(text)), console=console, transient=True, refresh_per_second=12.5)


def starting() -> AbstractContextManager:
    """The status while PyTorch and what needs it are imported, which takes seconds."""
    return status("starting: loading PyTorch")
