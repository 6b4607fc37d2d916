"""What a person sees while a study trains, on stderr: a live display on a terminal, a line a trial elsewhere."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from ablations.engines import EpochDone, Event, TrialDone, TrialFailed, cost
from ablations.study import Cell, Trial
from ablations.tables import level_name

console = Console(stderr=True, highlight=False)


class _Trials(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.fields['done']}/{task.fields['trials']} trials")


class StudyProgress:
    """Draws the events of an engine. The bar and the time left go by work: epochs times images times MACs."""

    def __init__(self, cells: list[Cell], trials: list[Trial], image_size: tuple[int, int], done_before: int):
        self.names = {
            trial.id: f"{_cell_name(cell)} seed {trial.seed}" for cell in reversed(cells) for trial in cell.trials
        }
        macs = {trial.model: cost(trial.model, *image_size)[1] for trial in trials}
        self.epoch_work = {trial.id: macs[trial.model] for trial in trials}
        total = sum(self.epoch_work[trial.id] * trial.recipe.epochs for trial in trials)
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(), _Trials(), TextColumn("time left"),
            TimeRemainingColumn(elapsed_when_finished=True), TextColumn("{task.fields[now]}"),
            console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self.task = self.progress.add_task(
            "training", total=total, done=done_before, trials=done_before + len(trials), now=""
        )
        self.done, self.trials = done_before, done_before + len(trials)

    def show(self, event: Event) -> None:
        name = self.names[event.trial.id]
        match event:
            case EpochDone(trial, epoch):
                now = (
                    f"{name}: epoch {epoch.epoch}/{trial.recipe.epochs}, loss {epoch.train_loss:.3f}, "
                    f"val {100 * epoch.validation_accuracy:.1f}%, {epoch.images_per_s:,.0f} images/s"
                )
                self.progress.update(self.task, advance=self.epoch_work[trial.id], now=now)
            case TrialDone(trial, record):
                self.done += 1
                self.progress.update(self.task, done=self.done)
                if not console.is_terminal:
                    console.print(
                        f"trial {self.done}/{self.trials} {name}: val {100 * record.validation_accuracy:.2f}%, "
                        f"{record.images_per_s:,.0f} images/s, {record.train_seconds:.1f} s",
                        soft_wrap=True,
                    )
            case TrialFailed(trial, reason):
                work = self.epoch_work[trial.id] * trial.recipe.epochs
                self.progress.update(self.task, advance=work)
                console.print(f"failed: {name} (trial {trial.id}): {reason}", style="red", soft_wrap=True)

    @contextmanager
    def live(self) -> Iterator[None]:
        with self.progress:
            yield


def _cell_name(cell: Cell) -> str:
    levels = " ".join(f"{name}={level_name(level)}" for name, level in cell.levels.items())
    return levels if set(cell.levels) & {"model", "reference"} else f"{cell.model_name} {levels}".strip()
