"""What a person sees while a study trains, on stderr: a live display on a terminal, a line a trial elsewhere."""

import os
import re
from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from expertgrid.ablations.engines.duration import Running, TimeLeft, in_time
from expertgrid.ablations.engines.events import Event, TrialDone, TrialFailed, TrialNote
from expertgrid.ablations.study.cells import Cell
from expertgrid.ablations.study.levels import level_name
from expertgrid.model.system.errors import printable
from expertgrid.model.training.trial import Trial

STOPPING = "stopping after this step"
ECHO = 3  # columns that stay free, for the "^C" of a terminal: a line that it wraps would be drawn twice


class StudyProgress:
    """Draws the events of an engine: a bar of the time, and a line for each trial that is trained."""

    def __init__(self, cells: list[Cell], time_left: TimeLeft, done_before: int, console: Console):
        self.console, self.time_left, self.stopping = console, time_left, False
        self.names = {trial.id: _trial_name(cell, trial) for cell in reversed(cells) for trial in cell.trials}
        self.shared = set.intersection(*(set(name.split()) for name in self.names.values())) - {"seed"}
        self.done, self.trials = done_before, done_before + len(time_left.waiting)
        self.is_live = bool(console.is_terminal or (console.is_jupyter and find_spec("ipywidgets")))

    def live(self) -> AbstractContextManager:
        """Shows the display while it is entered; nothing where stderr is no terminal, and no notebook with widgets."""
        return Live(self, console=self.console) if self.is_live else nullcontext()

    def stop(self) -> None:
        """Says that the training stops. The handler of a signal calls it, which may have interrupted a `print`."""
        self.stopping = True
        if not self.is_live:
            os.write(2, f"{STOPPING}\n".encode())

    def show(self, event: Event) -> None:
        self.time_left.take(event)
        name = self.names[event.trial.id]
        match event:
            case TrialDone(_, record):
                self.done += 1
                if not self.console.is_terminal:
                    self.console.print(
                        f"trial {self.done}/{self.trials} {name}: val {100 * record.validation_accuracy:.2f}%, "
                        f"{record.images_per_s:,.0f} images/s, {record.train_seconds:.1f} s",
                        soft_wrap=True,
                    )
            case TrialNote(trial, text):
                self.console.print(f"{name} (trial {trial.id}): {text}", soft_wrap=True)
            case TrialFailed(trial, reason):
                self.console.print(f"failed: {name} (trial {trial.id}): {reason}", style="red", soft_wrap=True)

    def __rich__(self) -> Group:
        left_s, passed_s = self.time_left.left_s(), self.time_left.clock() - self.time_left.begun
        running, width = list(self.time_left.running.values()), self.console.width - ECHO
        words = "time left is known soon" if left_s is None else f"about {in_time(left_s)} left"
        if not running and not self.time_left.waiting:
            words, left_s = f"took {in_time(passed_s)}", 0.0
        text = Text(f"{self.done}/{self.trials} trials, {STOPPING if self.stopping else words}", no_wrap=True)
        share = 0.0 if left_s is None else passed_s / (passed_s + left_s)
        head = Table.grid(padding=(0, 1, 0, 0))
        head.add_row(ProgressBar(1.0, share, width=max(10, width - len(text) - 1)), text)
        return Group(head, *(self._line(of, width) for of in running))

    def _line(self, running: Running, width: int) -> Text:
        trial, last = running.trial, running.last
        epoch = min(running.steps // self.time_left.steps(trial) + 1, trial.recipe.epochs)
        text = ": starting" if running.starting else f": epoch {epoch}/{trial.recipe.epochs}"
        if last:
            text += f", loss {last.train_loss:.3f}, val {100 * last.validation_accuracy:.1f}%"
            text += f", {last.images_per_s:,.0f} images/s"
        return Text(shortened(self.names[trial.id], self.shared, width - len(text)) + text, no_wrap=True)


def shortened(name: str, shared: Collection[str], width: int) -> str:
    """A name in so many characters: without words that all names share, then without the factors', then its middle."""
    if len(name) > width:
        name = " ".join(["…", *(word for word in name.split() if word not in shared)])
    if len(name) > width:
        name = re.sub(r"[^ =]+=", "", name)
    end = max(0, width - 1) // 2
    return name if len(name) <= width else f"{name[: max(0, width - 1 - end)]}…{name[len(name) - end :]}"


def _trial_name(cell: Cell, trial: Trial) -> str:
    levels = " ".join(f"{name}={level_name(level)}" for name, level in cell.levels.items())
    named = set(cell.levels) & {"model", "reference"}
    return printable(f"{levels if named else f'{cell.model_name} {levels}'.strip()} seed {trial.seed}")
