"""What `run` was asked for: the study, its cells on its data, and the race it may be. Trains and writes nothing."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from expertgrid.ablations.cli.sources import read_data
from expertgrid.ablations.records.directory import Race, StudyDirectory
from expertgrid.ablations.study.study import Cell, Level, Study, level_name, load_study
from expertgrid.model.system.errors import InputError
from expertgrid.model.training.data import ImageData
from expertgrid.model.training.holdout import HoldOut


@dataclass(frozen=True)
class Asked:
    """A study as the command line changed it, and the directory that it is kept in."""

    study: Study
    directory: StudyDirectory
    last_seed: int | None  # of a race


def ask(
    study: str,
    seeds: int | None,
    first_seed: int | None,
    data: str | None,
    settings: Mapping[str, Level],
    out: Path | None,
    until: str | None,
    max_seeds: int | None,
) -> Asked:
    """Reads and changes the study. Raises InputError for wrong options and a directory that holds something else."""
    changed = load_study(study).change(seeds, data, settings, first_seed)
    from expertgrid.ablations.results import (
        racing,  # a wrong name of a study is an error before its statistics are imported
    )

    racing.check_options(until, max_seeds, changed)
    directory = StudyDirectory(out or Path("runs") / changed.name)
    directory.check_holds(changed)
    begun = directory.race
    if begun and until is None:
        raise InputError(f"--out {directory.path}: holds a race; go on with --until decided --max-seeds {begun.last}")
    return Asked(changed, directory, max_seeds)


@dataclass(frozen=True)
class Plan:
    """The cells of a study on its data."""

    study: Study
    directory: StudyDirectory
    data: ImageData
    cells: list[Cell]  # with all seeds that may be trained
    race: Race | None

    @property
    def hold_out(self) -> HoldOut:
        return self.data.hold_out(self.study.base.hold_out)


def plan(asked: Asked, data_dir: Path | None) -> Plan:
    """Reads the data and resolves the study. Raises InputError where they do not fit each other."""
    study, directory = asked.study, asked.directory
    data = read_data(study.base.data, data_dir, study.base.image_size)
    cells = study.change(seeds=asked.last_seed).cells(data)
    race = None
    if asked.last_seed is not None:
        from expertgrid.ablations.results import racing

        trials = {trial.id for cell in cells for trial in cell.trials}
        seen = sum(any(directory.path.parent.glob(f"*/trials/{trial}/record.json")) for trial in trials)
        race = racing.new_race(cells, study, asked.last_seed, seen)
        if before := directory.race:
            racing.check_same(before, race)
            race = before
    return Plan(study, directory, data, cells, race)


def plan_table(plan: Plan) -> str:
    """The cells with their costs, for a person to read before the training."""
    from expertgrid.ablations.results.evidence import foresee
    from expertgrid.ablations.results.tables.notes import plan_lines
    from expertgrid.model.cost import cost
    from expertgrid.model.system.text import render

    rows: list[dict[str, object]] = []
    for cell in plan.cells:
        parameters, macs = cost(cell.trials[0].model, *plan.data.image_size)
        done = sum(plan.directory.record(trial.id) is not None for trial in cell.trials)
        recipe = cell.trials[0].recipe
        levels = {name: level_name(level) for name, level in cell.levels.items()}
        row: dict[str, object] = {
            "model": cell.model_name,
            **levels,
            "first trial": cell.trials[0].id,
            "seeds": len(cell.trials),
        }
        rows.append(row | {"done": done, "epochs": recipe.epochs, "params": parameters, "MACs": macs})
    different = {trial.id for cell in plan.cells for trial in cell.trials}
    notes = [
        f"Data: {plan.data.in_words(plan.hold_out)}.",
        f"{len(different)} different trials in {plan.directory.path}; nothing was trained or written.",
    ]
    if plan.race is None:
        images = len(plan.data.train) - plan.data.trained_on(plan.hold_out)
        notes += plan_lines(foresee(plan.study, plan.study.names(plan.cells), images, plan.directory))
    if race := plan.race:
        done = sum(plan.directory.record(trial) is not None for trial in different)
        first = {trial.id for cell in plan.cells for trial in cell.trials[: race.first]}
        notes.append(
            f"A race: the first look is at {race.first} seeds, and needs {len(first)} trials. If every contrast goes "
            f"on to seed {race.last}, all {len(different)} trials are trained. {done} are done."
        )
    return f"{plan.study.question}\n\n{render(rows, 'text', notes)}"
