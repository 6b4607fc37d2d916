"""The levels of a factor, or of two, over all levels of the others."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from expertgrid.ablations.records.record import SPLITS
from expertgrid.ablations.results.evidence import Effect, Evidence
from expertgrid.ablations.results.rows import Row, interval
from expertgrid.model.system.errors import InputError, unknown
from expertgrid.model.system.text import Interval


@dataclass(frozen=True)
class Marginal:
    """A level of one factor, or levels of two, over all levels of the others."""

    levels: dict[str, str]
    cells: int  # networks that count
    seeds: int
    validation: Interval | None
    test: Interval | None
    effect: Effect | None  # of one level, its main effect; of two, their interaction


def marginals(evidence: Evidence, names: Sequence[str]) -> list[Marginal]:
    """The means over the networks of each level on the seeds that all of them have, and its effect where it has one.

    One factor at a time, only the cells in which no other factor is changed count. Baselines and the control have no
    levels. Raises InputError for factors that the study does not have, and for two of them where the design has no
    combinations.
    """
    study, path, by = evidence.results.study, evidence.results.path, evidence.scale
    if not study.factors:
        raise InputError(f"{path}: the study has no factors")
    for name in names:
        if name not in study.factors:
            raise unknown(f"factor of {path}:", name, study.factors)
    if len(names) > 2 or len(set(names)) < len(names):
        raise InputError(f"one factor, or two different ones, have effects; found {', '.join(names)}")
    if len(names) == 2 and study.design != "factorial":
        raise InputError(f"{path}: one factor at a time was changed; {' and '.join(names)} never together")
    by_network = {row.cells[0].network: row for row in evidence.results.rows}
    by_levels: dict[tuple[str, ...], dict[str, Row]] = {}
    for cell in evidence.results.plan.cells:
        others = [level for name, level in cell.level_names.items() if name not in names]
        if cell.levels and (study.design == "factorial" or all(level == "base" for level in others)):
            levels = tuple(cell.level_names[name] for name in names)
            by_levels.setdefault(levels, {})[cell.network] = by_network[cell.network]
    done = [row for rows in by_levels.values() for row in rows.values() if row.by_seed]
    seeds = sorted(set.intersection(*(set(row.by_seed) for row in done))) if done else []
    judged = evidence.effects if len(names) == 1 else evidence.interactions
    effects = {
        tuple(levels[name] for name in names): effect
        for effect in judged
        if (levels := {factor: after for factor, _, after in effect.changes}).keys() == set(names)
    }
    every_level = []
    for levels, networks in by_levels.items():
        rows = [row for row in networks.values() if row.by_seed]
        means = [
            interval([float(np.mean([row.by_seed[seed].score(split, by) for row in rows])) for seed in seeds], by)
            if rows and seeds
            else None
            for split in SPLITS
        ]
        count = len(seeds) if rows else 0
        every_level.append(Marginal(dict(zip(names, levels)), len(rows), count, *means, effects.get(levels)))
    return every_level
