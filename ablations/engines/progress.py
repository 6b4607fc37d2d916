"""What a person sees while a study trains, on stderr: a live display on a terminal, a line a trial elsewhere."""

from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from expertgrid.ablations.engines.events import EpochDone, Event, TrialDone, TrialFailed, TrialNote, TrialStarted
from expertgrid.ablations.study.cells import Cell
from expertgrid.ablations.study.levels import level_name
from expertgrid.model.cost import cost
from expertgrid.model.system.errors import printable
from expertgrid.model.training.trial import Trial


class StudyProgress:
    """Draws the events of an engine. The bar and the time left go by work: epochs times MACs."""

    def __init__(
        self,
        cells: list[Cell],
        trials: list[Trial],
        image_size: tuple[int, int],
        done_before: int,
        console: Console,
    ):
        self.console = console
        self.names = {trial.id: _trial_name(cell, trial) for cell in reversed(cells) for trial in cell.trials}
        macs = {trial.model: cost(trial.model, *image_size)[1] for trial in trials}
        self.epoch_work = {trial.id: macs[trial.model] for trial in trials}
        self.left = {trial.id: trial.recipe.epochs * macs[trial.model] for trial in trials}
        self.bar = Progress(
            BarColumn(20),
            TextColumn("{task.fields[done]}/{task.fields[trials]} trials, time left"),
            TimeRemainingColumn(),
            console=console,
        )
        trials_in_all = done_before + len(trials)
        self.task = self.bar.add_task("", total=sum(self.left.values()), done=done_before, trials=trials_in_all)
        self.now = Text(no_wrap=True, overflow="ellipsis")

    def live(self) -> AbstractContextManager:
        """Shows the display while it is entered; nothing where stderr is no terminal, and no notebook with widgets."""
        is_live = self.console.is_terminal or (self.console.is_jupyter and find_spec("ipywidgets"))
        return Live(Group(self.bar, self.now), console=self.console) if is_live else nullcontext()

    def show(self, event: Event) -> None:
        name = self.names[event.trial.id]
        match event:
            case TrialStarted():
                pass
            case EpochDone(trial, epoch):
                self.now.plain = (
                    f"epoch {epoch.epoch}/{trial.recipe.epochs}, loss {epoch.train_loss:.3f}, "
                    f"val {100 * epoch.validation_accuracy:.1f}%, {epoch.images_per_s:,.0f} images/s: {name}"
                )
                self._advance(trial, (trial.recipe.epochs - epoch.epoch) * self.epoch_work[trial.id])
            case TrialDone(trial, record):
                self._advance(trial, 0, done=1)
                if not self.console.is_terminal:
                    done, trials = (self.bar.tasks[0].fields[field] for field in ("done", "trials"))
                    self.console.print(
                        f"trial {done}/{trials} {name}: val {100 * record.validation_accuracy:.2f}%, "
                        f"{record.images_per_s:,.0f} images/s, {record.train_seconds:.1f} s",
                        soft_wrap=True,
                    )
            case TrialNote(trial, text):
                self.console.print(f"{name} (trial {trial.id}): {text}", soft_wrap=True)
            case TrialFailed(trial, reason):
                self._advance(trial, 0)
                self.console.print(f"failed: {name} (trial {trial.id}): {reason}", style="red", soft_wrap=True)

    def _advance(self, trial: Trial, left: int, done: int = 0) -> None:
        done += self.bar.tasks[0].fields["done"]
        self.bar.update(self.task, advance=self.left[trial.id] - left, done=done)
        self.left[trial.id] = left


def _trial_name(cell: Cell, trial: Trial) -> str:
    levels = " ".join(f"{name}={level_name(level)}" for name, level in cell.levels.items())
    named = set(cell.levels) & {"model", "reference"}
    return printable(f"{levels if named else f'{cell.model_name} {levels}'.strip()} seed {trial.seed}")
