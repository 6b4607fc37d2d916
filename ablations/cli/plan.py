"""What `run` will train: the study, its cells on its data, and the race it may be. Trains and writes nothing."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from expertgrid.ablations.cli.sources import read_data
from expertgrid.ablations.records.directory import StudyDirectory
from expertgrid.ablations.records.plan import RaceRules
from expertgrid.ablations.study.cells import Cell
from expertgrid.ablations.study.levels import Level
from expertgrid.ablations.study.study import Study
from expertgrid.ablations.study.study_file import load_study
from expertgrid.model.system.errors import InputError
from expertgrid.model.training.data import ImageData
from expertgrid.model.training.holdout import HoldOut
from expertgrid.model.training.metrics import scale


@dataclass(frozen=True)
class StudyRequest:
    """A study as the command line changed it, and its directory."""

    study: Study
    directory: StudyDirectory
    last_seed: int | None  # of a race


def read_request(
    study: str,
    seeds: int | None,
    first_seed: int | None,
    data: str | None,
    settings: Mapping[str, Level],
    out: Path | None,
    until: str | None,
    max_seeds: int | None,
) -> StudyRequest:
    """Reads and changes the study. Raises InputError for wrong options and a directory that holds something else."""
    changed = load_study(study).change(seeds, data, settings, first_seed)  # fails before the statistics are imported
    from expertgrid.ablations.results import racing

    racing.check_options(until, max_seeds, changed)
    directory = StudyDirectory(out or Path("runs") / changed.name)
    directory.check_holds(changed)
    begun = directory.read_race()
    if begun and until is None:
        raise InputError(f"--out {directory.path}: holds a race; go on with --until decided --max-seeds {begun.last}")
    return StudyRequest(changed, directory, max_seeds)


@dataclass(frozen=True)
class PlannedRun:
    """The cells of a study on its data."""

    study: Study
    directory: StudyDirectory
    data: ImageData
    cells: list[Cell]  # with all seeds that may be trained
    race: RaceRules | None

    @property
    def hold_out(self) -> HoldOut:
        return self.data.hold_out(self.study.base.hold_out)


def plan_run(request: StudyRequest, data_dir: Path | None) -> PlannedRun:
    """Reads the data and resolves the study. Raises InputError where they do not fit each other."""
    study, directory = request.study, request.directory
    data = read_data(study.base.data, data_dir, study.base.image_size)
    cells = study.change(seeds=request.last_seed).cells(data)
    race = None
    if request.last_seed is not None:
        from expertgrid.ablations.results import racing

        trials = {trial.id for cell in cells for trial in cell.trials}
        seen = sum(any(directory.path.parent.glob(f"*/trials/{trial}/record.json")) for trial in trials)
        race = racing.new_race(cells, study, request.last_seed, seen)
        if before := directory.read_race():
            racing.check_same(before, race)
            race = before
    return PlannedRun(study, directory, data, cells, race)


def plan_table(planned: PlannedRun) -> str:
    """The cells with their costs, for a person to read before the training."""
    from expertgrid.ablations.results.evidence import foresee
    from expertgrid.ablations.results.tables.notes import plan_lines
    from expertgrid.ablations.study.disk import bytes_needed, in_words, log_bytes
    from expertgrid.model.cost import cost
    from expertgrid.model.system.text import render

    rows: list[dict[str, object]] = []
    trials = {trial.id for cell in planned.cells for trial in cell.trials}
    finished = {trial for trial in trials if planned.directory.record(trial) is not None}
    for cell in planned.cells:
        first = cell.trials[0]
        parameters, macs = cost(first.model, *planned.data.image_size)
        done = sum(trial.id in finished for trial in cell.trials)
        row = {"model": cell.model_name, **cell.planned.level_names, "first trial": first.id, "seeds": len(cell.trials)}
        rows.append(row | {"done": done, "epochs": first.recipe.epochs, "params": parameters, "MACs": macs})
    notes = [
        f"Data: {planned.data.in_words(planned.hold_out)}.",
        f"{len(trials)} different trials in {planned.directory.path}; nothing was trained or written.",
    ]
    if to_do := list({of.id: of for cell in planned.cells for of in cell.trials if of.id not in finished}.values()):
        log = f", {in_words(log_bytes(to_do, planned.data))} of them log-probabilities of each image"
        notes.append(f"Disk: at most {in_words(bytes_needed(to_do, planned.data))} for what is not done{log}.")
    if planned.race is None:
        study, cells = planned.study, [cell.planned for cell in planned.cells]
        images = float(len(planned.data.train) - planned.data.trained_on(planned.hold_out))
        if study.metric == "balanced_accuracy":  # as many as would tell as much of classes of one size
            shares_N = np.bincount(planned.data.train.labels_B) / len(planned.data.train)
            images /= (1 / shares_N).mean() / len(shares_N)
        foreseen = foresee(study, cells, images, planned.directory)
        notes += plan_lines(foreseen, scale(study.metric, study.margin))
    if race := planned.race:
        first_look = {trial.id for cell in planned.cells for trial in cell.trials[: race.first]}
        notes.append(
            f"A race: the first look is at {race.first} seeds, and needs {len(first_look)} trials. If every contrast "
            f"goes on to seed {race.last}, all {len(trials)} trials are trained. {len(finished)} are done."
        )
    return f"{planned.study.question}\n\n{render(rows, 'text', notes)}"
