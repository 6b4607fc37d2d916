"""Training a study."""

from collections import Counter
from pathlib import Path

from ablations import racing
from ablations.cli.devices import device, usable
from ablations.cli.interrupt import stopped
from ablations.cli.plan import Asked, plan
from ablations.cli.terminal import console
from ablations.disk import check_space
from ablations.engines import TrialFailed, by_architecture, planned_steps, run_local
from ablations.progress import StudyProgress
from ablations.records import StudyDirectory
from ablations.results.answer import answer
from ablations.results.evidence import read_evidence
from ablations.results.plots import accuracy_plot
from ablations.results.rendering import render_tables
from ablations.results.tables import study_tables
from ablations.study import Cell
from ablations.training.splits import ResidentData
from model.fast.execution import ExecutionOptions
from model.files import write_whole


def train_study(
    asked: Asked, data_dir: Path | None, device_name: str, execution: ExecutionOptions, adopts: bool
) -> int:
    """Trains what is not there yet; 1 where some trial failed."""
    on = device(device_name)
    execution.check(on)
    planned = plan(asked, data_dir)
    study, directory, cells, race = planned.study, planned.directory, planned.cells, planned.race
    console.print(f"{study.question}\n{planned.data.in_words(planned.hold_out)}", soft_wrap=True)
    counts = {cell.trials[0].id: study.seeds for cell in cells}
    if directory.race:
        counts |= {cell.trials[0]: max(len(cell.trials), study.seeds) for cell in directory.plan.cells}
    with directory.written(study, planned.data, racing.cells_with(cells, counts), race):
        images = ResidentData(planned.data, on)
        failed = _train(racing.cells_with(cells, counts), images, directory, execution, adopts)
        while race:
            found = read_evidence(directory)
            wanted = racing.next_counts(found, counts)
            console.print(racing.look_in_words(found, wanted, counts), soft_wrap=True)
            if wanted == counts:
                break
            counts = wanted
            directory.write_plan(study, planned.data, racing.cells_with(cells, counts), race)
            failed |= _train(racing.cells_with(cells, counts), images, directory, execution, adopts)
    return 1 if failed else 0


def train_and_show(
    asked: Asked, data_dir: Path | None, device_name: str, execution: ExecutionOptions, adopts: bool
) -> int:
    """Trains a study and prints its table; 1 where some trial failed."""
    failed = train_study(asked, data_dir, device_name, execution, adopts)
    show_study(asked.directory)
    return failed


def _train(
    cells: list[Cell], data: ResidentData, directory: StudyDirectory, execution: ExecutionOptions, adopts: bool
) -> bool:
    """Trains what is not there yet; whether some trial failed.

    With `adopts`, finished trials of the studies beside this one are taken over.
    """
    trials = by_architecture([trial for cell in cells for trial in cell.trials])
    pending = [trial for trial in trials if directory.record(trial.id) is None]
    if adopts:
        taken = Counter(place for trial in pending if (place := directory.adopt(trial.id)))
        for place, count in taken.items():
            console.print(f"taken over from {directory.path.parent / place}: {count} trials", soft_wrap=True)
        pending = [trial for trial in pending if directory.record(trial.id) is None]
    done_before = len(trials) - len(pending)
    console.print(f"{len(trials)} trials, {done_before} of them done before; {directory.path}", soft_wrap=True)
    check_space(pending, data.data, directory.path)
    steps = {trial.id: planned_steps(trial, data.data.trained_on(trial.hold_out)) for trial in pending}
    chosen = [execution.plan(trial.model, steps[trial.id], data.device) for trial in pending]
    execution = usable(execution, chosen, data.device)
    progress = StudyProgress(cells, pending, data.data.image_size, done_before, console)
    failed = False
    with progress.live():
        for event in run_local(pending, data, directory, execution=execution):
            progress.show(event)
            failed |= isinstance(event, TrialFailed)
            if stopped.is_set():
                raise KeyboardInterrupt
    return failed


def show_study(directory: StudyDirectory) -> None:
    """The study's question, its tables and the answer on stdout, and its picture in its directory."""
    found = read_evidence(directory)
    picture = directory.path / "accuracy.svg"
    write_whole(picture, accuracy_plot(directory.study.question, found.results.rows))
    print(f"{found.results.study.question}\n\n{render_tables(study_tables(directory, found), 'text')}\n")
    print(f"Picture: {picture}\n\n{answer(found)}", flush=True)
