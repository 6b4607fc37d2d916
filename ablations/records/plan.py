"""The file plan.json: the cells of a study for its data."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field

from expertgrid.ablations.records.reading import read_record
from expertgrid.ablations.study.cells import CONTROL_SEEDS, Cell, PlannedCell
from expertgrid.ablations.study.study import Study
from expertgrid.model.system.errors import InputError, wrong_file
from expertgrid.model.training.data import LARGEST_SIDE, ImageData
from expertgrid.model.training.holdout import HoldOut
from expertgrid.model.training.metrics import ACCURACY, Scale, scale

RULES = 2  # the version of the rules that judge; ablations/results/README.md says what each one changed
Some = Annotated[int, Field(ge=1)]


class RaceRules(BaseModel):
    """What was fixed before the first look at a race, on validation."""

    alpha: Annotated[float, Field(gt=0, lt=1)]
    margin: Annotated[float, Field(gt=0)]
    first: Some  # seeds at the first look; there is one after each further seed
    last: Annotated[int, Field(ge=1, le=1000)]
    contrasts: Some
    seen: int = 0  # trials whose results were there before


class Plan(BaseModel):
    """The file plan.json: the cells of a study for its data. In a race cells have different numbers of seeds."""

    data: str  # in words, with the number of images
    source: str
    image_size: Annotated[int, Field(ge=1, le=LARGEST_SIDE)] | None = None  # that the images were brought to
    pixels: tuple[Some, Some] | None = None  # height and width of the images; None in plans of older versions
    hold_out: HoldOut = HoldOut()
    first_seed: Annotated[int, Field(ge=0, lt=CONTROL_SEEDS)] = 0
    metric: Scale = ACCURACY
    margin: float | None = None  # None in plans of older versions
    contrasts: list[tuple[str, str]] = []  # declared with the study
    cells: list[PlannedCell]
    race: RaceRules | None = None
    extended: bool = False  # by levels or baselines, after results were seen
    seen: list[int] = []  # seeds of which results were there to be seen when the study was made, or got more seeds
    fp32: dict[str, bool] = {}  # by device: whether fp32 is used where a recipe's amp is "auto"; none in older plans
    rules: int = 1  # of the version that began the study

    @property
    def by_cell(self) -> list[list[str]]:
        """The ids of the trials of each cell, by seed."""
        return [cell.trials for cell in self.cells]

    @property
    def trials(self) -> list[str]:
        """The ids of all trials, each once: cells that are the same network share theirs."""
        return list(dict.fromkeys(itertools.chain(*self.by_cell)))

    def seeds_of(self, cell: PlannedCell) -> dict[str, int]:
        """The seed of each trial of a cell; of the control, CONTROL_SEEDS more than the seed of its hold-out."""
        first = self.first_seed + (CONTROL_SEEDS if cell.control else 0)
        return {trial: first + place for place, trial in enumerate(cell.trials)}


def make_plan(study: Study, data: ImageData, cells: Sequence[Cell], race: RaceRules | None) -> Plan:
    """The plan of a study's cells on its data, as if nothing had been seen before."""
    hold_out = data.hold_out(study.base.hold_out)
    return Plan(
        data=data.in_words(hold_out),
        source=data.source,
        image_size=study.base.image_size,
        pixels=data.image_size,
        hold_out=hold_out,
        first_seed=study.first_seed,
        metric=scale(study.metric, study.margin),
        margin=study.margin,
        contrasts=study.contrasts,
        cells=[cell.planned for cell in cells],
        race=race,
        rules=RULES,
    )


def read_plan(path: Path, study: Study) -> Plan:
    """The plan in a study directory. Raises InputError where there is none, or that of another study."""
    file = path / "plan.json"
    plan, factors = read_record(Plan, file), list(study.factors)
    if plan is None:
        raise InputError(f"{path}: not a study directory: there is no plan.json in it")
    for cell in plan.cells:
        if cell.levels and list(cell.levels) != factors:
            raise wrong_file(file, f"a cell has the factors {list(cell.levels)}, study.toml has {factors}")
    settings = study.settings()
    if [cell.levels for cell in plan.cells[: len(settings)]] != settings:
        raise wrong_file(file, "its cells are not those of study.toml")
    declared = {
        field: getattr(plan, field) for field in ("margin", "first_seed", "contrasts") if plan.margin is not None
    }
    for field, planned in (("metric", plan.metric.name), *declared.items()):
        if planned != (now := getattr(study, field)):
            raise wrong_file(
                file,
                f"{field} was {_in_words(planned)} when the study was begun, study.toml has {_in_words(now)}",
                "what is declared cannot be changed afterwards",
            )
    return plan


def _in_words(value: object) -> str:
    return json.dumps(value) if value else "not given"
