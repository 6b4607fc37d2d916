"""What `run` will train: the study, its cells on its data, and the race it may be. Trains and writes nothing."""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from rich.filesize import decimal

from expertgrid.ablations.cli.sources import read_data
from expertgrid.ablations.cli.terminal import status
from expertgrid.ablations.engines.isolation import Setup
from expertgrid.ablations.records.directory import StudyDirectory
from expertgrid.ablations.records.plan import RaceRules
from expertgrid.ablations.study.cells import CONTROL, Cell, groups
from expertgrid.ablations.study.levels import Level
from expertgrid.ablations.study.study import Study
from expertgrid.ablations.study.study_file import load_study
from expertgrid.model.config import TimmModel
from expertgrid.model.probe import probe_of
from expertgrid.model.system.errors import InputError, all_of, collected
from expertgrid.model.training.data import ImageData
from expertgrid.model.training.holdout import HoldOut
from expertgrid.model.training.metrics import scale
from expertgrid.model.training.trial import Trial

QUICKSTART = {"export": 2.0, "tuning": 15.0, "latency": 9.0, "report": 2.0}  # steps, and their seconds on two cores
MOST_COMPARED = 64  # pairs of networks


@dataclass(frozen=True)
class StudyRequest:
    """A study as the command line changed it, and its directory."""

    study: Study
    directory: StudyDirectory
    last_seed: int | None  # of a race


def read_request(
    study: str | Study,
    seeds: int | None,
    first_seed: int | None,
    data: str | None,
    settings: Mapping[str, Level],
    out: Path | None,
    until: str | None,
    max_seeds: int | None,
    extend: bool = False,
) -> StudyRequest:
    """Reads and changes the study. Raises InputError where it is wrong, or an option. The directory is not read yet."""
    study = load_study(study) if isinstance(study, str) else study
    directory = StudyDirectory(out or Path("runs") / study.name, extend)
    if seeds is None and "seeds" not in study.model_fields_set and (directory.path / "study.toml").exists():
        seeds = directory.read_study().seeds
    changed = study.change(seeds, data, settings, first_seed)  # fails before the statistics are imported
    from expertgrid.ablations.results import racing

    racing.check_options(until, max_seeds, changed)
    return StudyRequest(changed, directory, max_seeds)


@dataclass(frozen=True)
class PlannedRun:
    """The cells of a study on its data."""

    study: Study
    directory: StudyDirectory
    data: ImageData
    cells: list[Cell]  # with all seeds that may be trained
    race: RaceRules | None
    weights: Mapping[str, bytes]  # files that trials start from, by their fingerprints

    @property
    def weight_lines(self) -> list[str]:
        """What the networks start from, where it is to be said, and what [base] does not name."""
        base, factors = self.study.base, self.study.factors
        named = base.model_fields_set | ({"model", "recipe"} if "reference" in factors else factors.keys())
        unnamed = [f"{name} {getattr(base, name)}" for name in ("model", "recipe", "data") if name not in named]
        line = f"[base] does not name all, and these are taken: {', '.join(unnamed)}" if unnamed else ""
        return [line for line in (line, *dict.fromkeys(_start(cell.trials[0]) for cell in self.cells)) if line]

    def check_directory(self) -> None:
        """Raises InputError where the directory holds what does not let the study be trained in it."""
        self.directory.check_holds(self.study)
        begun, path = self.directory.read_race(), self.directory.path
        if begun and self.race is None:
            raise InputError(f"--out {path}: holds a race; go on with --until decided --max-seeds {begun.last}")
        if self.race:
            from expertgrid.ablations.results import racing

            if begun:
                racing.check_same(begun, self.race)
            else:
                racing.check_images(self.race, self.study, self.hold_out)
        self.directory.check_weights(cell.trials[0] for cell in self.cells)
        self.check_code()

    def check_code(self) -> None:
        """Raises InputError where finished trials are of other code than their network has now."""
        path, probed = self.directory.path, cache(partial(probe_of, size=self.data.image_size))
        begun = [trial for cell in self.cells for trial in cell.trials if self.directory.network(trial.id)]
        other = self.directory.of_other_code({trial.id: now for trial in begun if (now := probed(trial.model))})
        if not other:
            return
        cells = [cell for cell in self.cells if any(trial.id in other for trial in cell.trials)]
        names = dict.fromkeys(group.name for group in groups([cell.planned for cell in cells], {}))
        raise InputError(
            f"{path}: {len(other)} finished trials are of other code than {cells[0].model_name} has now (cells: "
            f"{'; '.join(names)}; {', '.join(dict.fromkeys(other.values()))} differ): `expertgrid retire {path} "
            f"--import MODULE` moves these trials to {path}/retired; or give another directory with --out"
        )

    def idle_factors(self) -> Iterator[str]:
        """A line for each factor whose levels are the same network and recipe, or are too many to compare."""
        probed = cache(partial(probe_of, size=self.data.image_size, of_timm=True))

        def described(trial: Trial) -> object:
            built = trial.model.structure if isinstance(trial.model, TimmModel) else None
            return (trial.recipe, trial.weights, built) if built else trial.id

        def compute_the_same(first: Trial, second: Trial) -> bool:
            before, after = probed(first.model), probed(second.model)
            return before is not None and after is not None and not before.difference(after)

        for factor in self.study.factors:
            alike: dict[str, list[Trial]] = defaultdict(list)
            for cell in filter(lambda cell: cell.levels, self.cells):
                alike[json.dumps({**cell.levels, factor: None})].append(cell.trials[0])
            pairs = [(first, other) for first, *others in alike.values() for other in others]
            if not pairs or any(described(first) != described(other) for first, other in pairs):
                continue
            pairs = [(first, other) for first, other in pairs if first.id != other.id]
            if len(pairs) > MOST_COMPARED:
                yield f"{factor} changes nothing that is built; {len(pairs)} networks were not run to compare them."
            elif all(compute_the_same(*pair) for pair in pairs):
                yield f"{factor} changes nothing: the network is the same at each level."

    @property
    def hold_out(self) -> HoldOut:
        return self.data.hold_out(self.study.base.hold_out)


def plan_run(request: StudyRequest, data_dir: Path | None) -> PlannedRun:
    """Reads the data and resolves the study. Raises InputError where they do not fit each other."""
    study, directory = request.study, request.directory
    errors = study.unknown_choices()
    with collected(errors):
        data = read_data(study.base.data, data_dir, study.base.image_size)
    if errors:
        raise all_of(errors)
    weights: dict[str, bytes] = {}
    cells = study.change(seeds=request.last_seed).cells(data, weights)
    race = None
    if request.last_seed is not None:
        from expertgrid.ablations.results import racing

        trials = {trial.id for cell in cells for trial in cell.trials}
        seen = sum(any(directory.path.parent.glob(f"*/trials/{trial}/record.json")) for trial in trials)
        race = racing.new_race(cells, study, request.last_seed, seen)
    return PlannedRun(study, directory, data, cells, race, weights)


def _start(trial: Trial) -> str:
    """What a training starts from; "" where it starts as one expects."""
    weights, name, by = trial.weights, trial.model_name, trial.recipe.normalise
    if weights is None:
        has_tag = isinstance(trial.model, TimmModel) and "." in trial.model.timm
        tag = 'although its name has the tag of weights; weights = "timm" in [base] starts from those'
        return f"{name} starts from fresh weights, {tag}" if has_tag else ""
    loaded = f"{weights.tensors} tensors are loaded, new: {', '.join(weights.new) or 'none'}"
    images = by if isinstance(by, str) else f"mean {list(by[0])} and std {list(by[1])}"
    return f"{name} starts from {weights.source}: {loaded}; images normalised by {images}"


def plan_table(planned: PlannedRun, setup: Setup | None, timing: bool, after_s: float) -> str:
    """The cells with their costs, for a person to read before the training. Nobody knows the time without a `setup`."""
    from expertgrid.ablations.engines.duration import TimeLeft
    from expertgrid.ablations.results.evidence import foresee, images_again
    from expertgrid.ablations.results.tables.notes import plan_lines
    from expertgrid.ablations.speed.sampling import duration
    from expertgrid.ablations.study.disk import log_bytes
    from expertgrid.model.cost import cost
    from expertgrid.model.system.text import render

    rows: list[dict[str, object]] = []
    trials = {trial.id for cell in planned.cells for trial in cell.trials}
    finished: set[str] = set()
    refused: list[InputError] = []
    with collected(refused):
        planned.check_directory()
        finished = {trial for trial in trials if planned.directory.record(trial) is not None}
    for cell in planned.cells:
        first = cell.trials[0]
        parameters, macs = cost(first.model, *planned.data.image_size)
        done = sum(trial.id in finished for trial in cell.trials)
        levels = dict.fromkeys(planned.study.factors, "") | cell.planned.level_names
        row = {
            "model": CONTROL if cell.control else cell.model_name,
            **levels,
            "first trial": first.id,
            "seeds": len(cell.trials),
        }
        rows.append(row | {"done": done, "epochs": first.recipe.epochs, "params": parameters, "MACs": macs})
    notes = [
        f"Data: {planned.data.in_words(planned.hold_out)}.",
        *(f"{line}." for line in planned.weight_lines),
        f"{len(trials)} different trials in {planned.directory.path}; nothing was trained or written.",
        *(f"Without --dry-run this is refused: {error}." for error in refused),
        *["Where levels or baselines are added after results, the study is exploratory."] * planned.directory.extends,
    ]
    if to_do := list({of.id: of for cell in planned.cells for of in cell.trials if of.id not in finished}.values()):
        notes.append(f"Disk: {decimal(log_bytes(to_do, planned.data))} for log-probabilities of each image.")
        if setup:
            left = TimeLeft(to_do, planned.data, setup.at_once, setup.device, timing, after_s)
            with status("training a little, to know how long it takes"):
                notes += duration(left, setup, planned.directory.path.parent)
    notes += planned.idle_factors()
    if planned.race is None:
        study, cells = planned.study, [cell.planned for cell in planned.cells]
        by, again = scale(study.metric, study.margin), images_again(study.base.data, planned.hold_out)
        foreseen = foresee(study, cells, planned.hold_out, None if refused else planned.directory)
        notes += plan_lines(foreseen, by, study.margin, again)
        if planned.hold_out.kind == "rotating" and study.seeds > planned.hold_out.parts:
            notes.append(f"{again}: verdicts are then of new seeds on these images.")
    if race := planned.race:
        first_look = {trial.id for cell in planned.cells for trial in cell.trials[: race.first]}
        notes.append(
            f"A race: the first look is at {race.first} seeds, and needs {len(first_look)} trials. If every contrast "
            f"goes on to seed {race.last}, all {len(trials)} trials are trained. {len(finished)} are done."
        )
    return f"{planned.study.question}\n\n{render(rows, 'text', notes)}"
