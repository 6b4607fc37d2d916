"""The names of a study's cells: which of them are one network, and which cell a text means. Imports no torch."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from expertgrid.model.system.errors import InputError, unknown

EACH_LEVEL = "-"  # of a factor that changes nothing: the network is the same at each level
CONTROL = "base again"  # the name of the control cell


@dataclass(frozen=True)
class CellName:
    """What is known of a cell by its plan alone."""

    model: str
    levels: Mapping[str, str]  # by factor, as tables show them; none for a baseline and the control
    network: str  # the id of its first trial: cells with the same one are one network
    control: bool = False


@dataclass(frozen=True, eq=False)
class Group:
    """A network of a study: the cells that are this network, with the levels that they have together."""

    model: str
    levels: dict[str, str]
    cells: tuple[CellName, ...]

    @property
    def name(self) -> str:
        """The group in a few words: its levels without the factors that change nothing; a baseline's network."""
        levels = [f"{name} {level}" for name, level in self.levels.items() if level != EACH_LEVEL]
        return ", ".join(levels) or self.model

    @property
    def baselines(self) -> list[str]:
        """The names of its cells that have no levels."""
        return [CONTROL if cell.control else cell.model for cell in self.cells if not cell.levels]


def groups(cells: Sequence[CellName], levels: Mapping[str, int]) -> list[Group]:
    """The networks among the cells, in their order. `levels` is how many each factor has, where all are combined."""
    by_network: dict[str, list[CellName]] = {}
    for cell in cells:
        by_network.setdefault(cell.network, []).append(cell)
    networks = []
    for same in by_network.values():
        varied = [cell for cell in same if cell.levels]
        first = (varied or same)[0]
        shared = {}
        for factor in first.levels:
            names = list(dict.fromkeys(cell.levels[factor] for cell in varied))
            shared[factor] = EACH_LEVEL if 1 < len(names) == levels.get(factor) else " / ".join(names)
        networks.append(Group(CONTROL if first.control else first.model, shared, tuple(same)))
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
        and any(cell.levels and wanted.items() <= dict(cell.levels).items() for cell in group.cells)
    ]
    if len(matching) == 1:
        return matching[0]
    if matching:
        raise InputError(
            f"cell {text!r} is {len(matching)} cells: {'; '.join(networks[place].name for place in matching)}"
        )
    raise unknown("cell", text, [group.name for group in networks])
