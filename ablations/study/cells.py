"""The cells of a study: their trials, which of them are one network, and which one a text means. Imports no torch."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, Field

from expertgrid.ablations.study.levels import Level, level_name
from expertgrid.model.system.errors import InputError, unknown
from expertgrid.model.training.trial import Trial

EACH_LEVEL = "-"  # of a factor that changes nothing: the network is the same at each level
CONTROL = "base again"  # the name of the control cell
CONTROL_SEEDS = 1_000_000  # by so many the seeds of the control cell are higher than those of the others

TrialId = Annotated[str, Field(pattern="^[0-9a-f]{12}$")]  # it names a folder, and so cannot be a path


class PlannedCell(BaseModel):
    """A cell by the ids of its trials, as plan.json has it. Baselines and the control have no levels."""

    model_name: str
    levels: dict[str, Level]  # by factor
    trials: Annotated[list[TrialId], Field(min_length=1)]  # by seed
    control: bool = False

    @property
    def network(self) -> str:
        """The id of the first trial: cells with the same one are one network."""
        return self.trials[0]

    @property
    def level_names(self) -> dict[str, str]:
        """The levels as tables show them."""
        return {name: level_name(level) for name, level in self.levels.items()}


@dataclass(frozen=True)
class Cell:
    """One combination of levels, and its trials: one for each seed. Baselines and the control have no levels."""

    model_name: str
    levels: dict[str, Level]
    trials: tuple[Trial, ...]
    control: bool = False

    @property
    def planned(self) -> PlannedCell:
        ids = [trial.id for trial in self.trials]
        return PlannedCell(model_name=self.model_name, levels=self.levels, trials=ids, control=self.control)


def control_cell(base: Cell) -> Cell:
    """The base once more: trained from other seeds, on the same hold-outs."""
    hold_out = base.trials[0].hold_out.model_copy(update={"offset": CONTROL_SEEDS})
    changes = [{"seed": trial.seed + CONTROL_SEEDS, "hold_out": hold_out} for trial in base.trials]
    trials = tuple(Trial.model_validate(dict(trial) | change) for trial, change in zip(base.trials, changes))
    return Cell(base.model_name, {}, trials, control=True)


@dataclass(frozen=True, eq=False)
class Group:
    """A network of a study: the cells that are this network, with the levels that they have together."""

    model: str
    levels: dict[str, str]
    cells: tuple[PlannedCell, ...]

    @property
    def name(self) -> str:
        """The group in a few words: its levels without the factors that change nothing; a baseline's network."""
        levels = [f"{name} {level}" for name, level in self.levels.items() if level != EACH_LEVEL]
        return ", ".join(levels) or self.model

    @property
    def baselines(self) -> list[str]:
        """The names of its cells that have no levels."""
        return [CONTROL if cell.control else cell.model_name for cell in self.cells if not cell.levels]


def groups(cells: Sequence[PlannedCell], levels: Mapping[str, int]) -> list[Group]:
    """The networks among the cells, in their order. `levels` is how many each factor has, where all are combined."""
    by_network: dict[str, list[PlannedCell]] = {}
    for cell in cells:
        by_network.setdefault(cell.network, []).append(cell)
    networks = []
    for same in by_network.values():
        varied = [cell for cell in same if cell.levels]
        first = (varied or same)[0]
        shared = {}
        for factor in first.levels:
            names = list(dict.fromkeys(cell.level_names[factor] for cell in varied))
            shared[factor] = EACH_LEVEL if 1 < len(names) == levels.get(factor) else " / ".join(names)
        networks.append(Group(CONTROL if first.control else first.model_name, shared, tuple(same)))
    return networks


def find_cell(networks: Sequence[Group], text: str) -> int:
    """The place among the networks of the cell that a text names, or whose levels it gives.

    `experts 2, gate mlp`, `experts=2,gate=mlp`, and `experts=4` where only one network has this level. Raises
    InputError, with the names there are, where the text means no network or several.
    """

    def plain(name: str) -> str:
        return re.sub(r"[\s=,]+", " ", name).strip()

    for place, group in enumerate(networks):
        if plain(text) in map(plain, (group.name, *group.baselines)):
            return place
    varied = [cell for group in networks for cell in group.cells if cell.levels]
    factors = sorted({name for cell in varied for name in cell.levels}, key=len, reverse=True)
    parts = re.split(rf"(?:^|[,\s]+)({'|'.join(map(re.escape, factors))})[=\s]", text) if factors else [text]
    wanted = dict(zip(parts[1::2], (level.strip(" ,") for level in parts[2::2])))
    matching = [
        place
        for place, group in enumerate(networks)
        if wanted
        and not parts[0].strip()
        and any(cell.levels and wanted.items() <= cell.level_names.items() for cell in group.cells)
    ]
    if len(matching) == 1:
        return matching[0]
    if matching:
        raise InputError(
            f"cell {text!r} is {len(matching)} cells: {'; '.join(networks[place].name for place in matching)}"
        )
    raise unknown("cell", text, [group.name for group in networks])
