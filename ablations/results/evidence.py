"""The verdicts of a study: contrasts of its cells, in families that are declared before anything is trained.

1. The main effects of the factors, each over the matched cells that differ in nothing else.
2. Each cell against the base, the design's first cell.
3. The contrasts that the study declares.

Everything else, interactions too, is exploratory. `stats.contrasts` judges all of them, on validation accuracy in
percent.

Shapes: Q contrasts, U networks, S seeds.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from expertgrid.ablations.records.directory import StudyDirectory
from expertgrid.ablations.records.plan import RaceRules
from expertgrid.ablations.records.record import FAILED, Record
from expertgrid.ablations.results.rows import (
    Results,
    Row,
    latency_run,
    on_test,
    on_validation,
    read_results,
    right_on_test,
    smallest,
)
from expertgrid.ablations.results.stats import contrasts, factors, planning
from expertgrid.ablations.results.stats.contrasts import NONE, OPEN, SAME, Family, Judgement
from expertgrid.ablations.results.stats.planning import Plan
from expertgrid.ablations.results.stats.race import Race, race
from expertgrid.ablations.results.stats.selection import Interval, accuracy_interval
from expertgrid.ablations.study.cells import PlannedCell
from expertgrid.ablations.study.levels import level_name
from expertgrid.ablations.study.study import Study
from expertgrid.export.mcnemar import McNemar, mcnemar
from expertgrid.model.system.errors import InputError, unknown

DIFFERENCES = (0.3, 0.5, 1.0)  # points, for which a plan says how many seeds they need
EXPECTED_ACCURACY = 90.0  # percent: what a plan takes networks to reach, before any is trained


# --- What a study asks ---


@dataclass(frozen=True)
class Questions:
    """The contrasts of a study's networks, from its cells alone."""

    networks: list[str]  # ids of first trials; the base is the first
    network_of: list[int]  # of each cell
    effects: list[factors.Effect]
    interactions: list[factors.Effect]

    @property
    def effect_weights_QU(self) -> np.ndarray:
        return self._weights(self.effects)

    @property
    def interaction_weights_QU(self) -> np.ndarray:
        return self._weights(self.interactions)

    def _weights(self, effects: Sequence[factors.Effect]) -> np.ndarray:
        return np.array([effect.weights_C for effect in effects]).reshape(-1, len(self.networks))

    @property
    def first_family_QU(self) -> np.ndarray:
        """The main effects; of a study without any, the cells against the base."""
        if self.effects or len(self.networks) < 2:
            return self.effect_weights_QU
        return factors.against(0, len(self.networks))

    @property
    def in_no_effect(self) -> list[int]:
        """The networks that are in no main effect, without the base."""
        weights_QU = self.effect_weights_QU
        return [network for network in range(1, len(self.networks)) if not weights_QU[:, network].any()]

    @property
    def race_QU(self) -> np.ndarray:
        """What a race decides: the main effects, and the cells that are in none of them against the base."""
        differences = [factors.difference(network, 0, len(self.networks)) for network in self.in_no_effect]
        return np.vstack([self.effect_weights_QU, *differences])


def questions(study: Study, cells: Sequence[PlannedCell]) -> Questions:
    """What a study asks of its cells."""
    networks = list(dict.fromkeys(cell.network for cell in cells))
    network_of = [networks.index(cell.network) for cell in cells]
    base = ["base"] if study.design == "one_at_a_time" else []
    levels = {name: [*base, *map(level_name, of)] for name, of in study.factors.items()}
    points = [cell.level_names for cell in cells if cell.levels]
    places = [network_of[place] for place, cell in enumerate(cells) if cell.levels]
    return Questions(
        networks=networks,
        network_of=network_of,
        effects=factors.main_effects(levels, points, places, len(networks)),
        interactions=factors.interactions(levels, points, places, len(networks)),
    )


# --- What is said of it ---


@dataclass(frozen=True)
class Effect:
    """A main effect (one change) or an interaction (two changes), in words, with its verdict and its price."""

    changes: tuple[tuple[str, str, str], ...]  # factor, before, after
    judgement: Judgement
    cost: dict[str, float]  # after over before, mean over the matched cells: parameters, MACs, training time, latency
    seeds_to_decide: int | None = None  # about how many in all; None for what is decided

    @property
    def factor(self) -> str:
        return " and ".join(factor for factor, _, _ in self.changes)

    @property
    def change(self) -> str:
        return ", ".join(f"{before} -> {after}" for _, before, after in self.changes)

    @property
    def name(self) -> str:
        return ", with ".join(f"{factor} {before} -> {after}" for factor, before, after in self.changes)


@dataclass(frozen=True)
class Comparison:
    """The first row less the second, on validation, and on test for the record."""

    first: Row
    second: Row
    judgement: Judgement
    test: Judgement
    declared: bool
    seeds_to_decide: int | None = None


@dataclass(frozen=True)
class Sight:
    """What a study can see."""

    spread: float  # points, of a cell's accuracy from seed to seed beyond its block
    measured: bool  # from records; else the binomial floor
    seeds: int
    smallest: float  # difference that is found with a probability of 80%, for the contrast that is hardest to see
    needed: dict[float, int | None]  # seeds by difference; None for more than 1,000


@dataclass(frozen=True)
class Evidence:
    """All verdicts of a study."""

    results: Results
    asked: Questions
    effects: list[Effect]
    against_base: list[Judgement | None]  # by row; None for the base, and for all rows after a race
    interactions: list[Effect]
    declared: list[Comparison]
    spread: float | None
    sight: Sight | None
    race: Race | None

    @property
    def margin(self) -> float:
        return self.results.study.margin

    @property
    def fixed_split(self) -> bool:
        """Whether the verdicts are about one split of the images."""
        return self.results.plan.hold_out.kind == "fixed"

    @property
    def judgements(self) -> list[Judgement]:
        """Of the declared families."""
        declared = [*(effect.judgement for effect in self.effects), *(found.judgement for found in self.declared)]
        return declared + [judgement for judgement in self.against_base if judgement]

    @property
    def decided(self) -> bool:
        return any(judgement.verdict not in (OPEN, NONE) for judgement in self.judgements)

    @property
    def added_seeds(self) -> bool:
        """Whether seeds were added after results of others were there to be seen."""
        plan = self.results.plan
        planned = {seed for row in self.results.rows for seed in row.trials}
        return bool(plan.seen) and bool(planned - set(plan.seen))

    @property
    def seen(self) -> bool:
        """Whether results of this study's seeds were there to be seen when it was made."""
        return bool(self.results.plan.seen)

    @property
    def holds(self) -> bool:
        """Whether at most 1 such table in 20 holds a wrong verdict."""
        return not self.seen and not self.results.unfinished

    @property
    def race_names(self) -> list[str]:
        """Of the contrasts of a race."""
        rows = {cell: self.results.rows[row].name for cell, row in enumerate(self.results.row_of)}
        names = {network: rows[cell] for cell, network in reversed(list(enumerate(self.asked.network_of)))}
        against = [f"{names[network]} against {names[0]}" for network in self.asked.in_no_effect]
        return [*(effect.name for effect in self.effects), *against]

    @cached_property
    def decided_interactions(self) -> list[Effect]:
        return [effect for effect in self.interactions if effect.judgement.verdict in ("better", "worse")]


def weigh(results: Results) -> Evidence:
    """The verdicts of a study, as it is."""
    study, plan = results.study, results.plan
    asked = questions(study, plan.cells_with_trials)
    model = _Model(results, asked)
    race_found, names = None, asked.effects
    if plan.race is not None and len(asked.networks) > 1:
        race_found = model.race(plan.race)
        effects = Family(race_found.judgements[: len(names)], model.spread, 0.0)
    else:
        effects = model.judge(asked.effect_weights_QU)
    to_decide: Sequence[int | None] = [None] * len(names)
    if plan.race is None:
        to_decide = planning.seeds_to_decide(asked.effect_weights_QU, effects, study.margin)
    found = [
        Effect(_changes(effect), model.explained(judgement, effect.weights_C), model.cost(effect.pairs), seeds)
        for effect, judgement, seeds in zip(names, effects.judgements, to_decide)
    ]
    exploratory = model.judge(asked.interaction_weights_QU) if plan.race is None else Family([], None, 0.0)
    return Evidence(
        results=results,
        asked=asked,
        effects=found,
        against_base=model.against_base(race_found),
        interactions=[
            Effect(_changes(effect), model.explained(judgement, effect.weights_C), {})
            for effect, judgement in zip(asked.interactions, exploratory.judgements)
        ],
        declared=model.declared(),
        spread=model.spread,
        sight=_sight(asked, model.spread, study.seeds) if model.spread and plan.race is None else None,
        race=race_found,
    )


def read_evidence(directory: StudyDirectory) -> Evidence:
    """Reads a study directory and judges it. Raises InputError where there is no study, and for damaged files."""
    return weigh(read_results(directory))


def _changes(effect: factors.Effect) -> tuple[tuple[str, str, str], ...]:
    return tuple((change.factor, str(change.before), str(change.after)) for change in effect.changes)


class _Model:
    """The networks of a study with their scores, and what `stats` says of their contrasts."""

    def __init__(self, results: Results, asked: Questions) -> None:
        self.results, self.asked, self.margin = results, asked, results.study.margin
        self.network_of_row = dict(zip(results.row_of, asked.network_of))
        row_of_network = dict(zip(reversed(asked.network_of), reversed(results.row_of)))  # the first row of each
        places = [row_of_network[network] for network in range(len(asked.networks))]
        self.rows = [results.rows[place] for place in places]
        self.scores_US = results.scores(on_validation)[places] if places else np.zeros((0, 0))
        self.test_US = results.scores(on_test)[places] if places else np.zeros((0, 0))
        self.no_verdict = {unit: row.no_verdict for unit, row in enumerate(self.rows) if row.no_verdict}

    def judge(self, weights_QU: np.ndarray, scores_US: np.ndarray | None = None) -> Family:
        if not len(weights_QU):
            return Family([], None, 0.0)
        scores_US = self.scores_US if scores_US is None else scores_US
        return contrasts.judge(weights_QU, scores_US, self.margin, self.no_verdict)

    def race(self, plan: RaceRules) -> Race:
        return race(self.asked.race_QU, self.scores_US, plan.margin, plan.last, plan.first, self.no_verdict)

    @cached_property
    def spread(self) -> float | None:
        """The pooled residual standard deviation, None where it is not known or nothing."""
        whole_US = self.scores_US.copy()
        whole_US[list(self.no_verdict)] = np.nan
        if len(whole_US) < 2 or np.isnan(whole_US).all():
            return None
        found = contrasts.residual_variances(np.nan_to_num(whole_US), ~np.isnan(whole_US))
        spread = float(np.sqrt(found.pooled_X)) if found.df > 0 else 0.0
        return spread if spread > 1e-6 * float(np.nanmax(whole_US)) else None

    def explained(self, judgement: Judgement, weights_U: np.ndarray) -> Judgement:
        """A judgement without a verdict with the reason of all its cells together."""
        if judgement.verdict != NONE:
            return judgement
        used = [self.rows[unit] for unit in np.flatnonzero(weights_U)]
        if sum(bool(row.no_verdict) for row in used) == 1 and len(used) == 2:
            return judgement
        kinds = Counter(failure.kind for row in used for failure in row.failures.values())
        total = sum(row.seeds for row in used)
        return replace(
            judgement,
            reason=", ".join(f"{FAILED[kind]} in {count} of {total} trainings" for kind, count in kinds.items()),
        )

    def against_base(self, race_found: Race | None) -> list[Judgement | None]:
        """Each row against the base, in a race those that it judges so."""
        count = len(self.asked.networks)
        found: dict[int, Judgement] = {}
        if count > 1 and self.results.plan.race is None:
            found = dict(enumerate(self.judge(factors.against(0, count)).judgements, 1))
        elif race_found is not None:
            judged_alone = race_found.judgements[len(self.asked.effects) :]
            found = dict(zip(self.asked.in_no_effect, judged_alone))
        judged: list[Judgement | None] = []
        for place, row in enumerate(self.results.rows):
            unit = self.network_of_row[place]
            if place and unit == 0:
                judged.append(Judgement(SAME, len(row.by_seed), 0.0, reason="it is the same network"))
            else:
                judged.append(found.get(unit))
        return judged

    def declared(self) -> list[Comparison]:
        pairs = [(self.results.row(first), self.results.row(second)) for first, second in self.results.study.contrasts]
        if not pairs or self.results.plan.race is not None:
            return []
        return self.compare(pairs, declared=True)

    def compare(self, pairs: Sequence[tuple[int, int]], declared: bool) -> list[Comparison]:
        """Pairs of rows as one family."""
        count = len(self.asked.networks)
        units = [tuple(self.network_of_row[row] for row in pair) for pair in pairs]
        weights_QU = np.array([factors.difference(*pair, count) for pair in units])
        validation, test = (self.judge(weights_QU, scores_US) for scores_US in (self.scores_US, self.test_US))
        seeds = planning.seeds_to_decide(weights_QU, validation, self.margin)
        rows = self.results.rows
        return [
            Comparison(rows[first], rows[second], ours, theirs, declared, needed)
            for (first, second), ours, theirs, needed in zip(pairs, validation.judgements, test.judgements, seeds)
        ]

    # --- The price of a change ---

    def cost(self, pairs: Sequence[tuple[int, int]]) -> dict[str, float]:
        """Costs after over before, geometric means over the matched cells; what cannot be compared is left out."""
        rows = [(self.rows[before], self.rows[after]) for before, after in pairs]
        flat = [row for pair in rows for row in pair]
        if not rows or not all(row.by_seed for row in flat):
            return {}
        found = {
            "parameters": _ratio(rows, lambda row: row.records[0].parameters),
            "MACs": _ratio(rows, lambda row: row.records[0].macs),
        }
        if all(row.alone for row in flat):
            found["training time"] = _ratio(rows, lambda row: 1 / (row.alone or 1))
        elif _timed_alike(flat):
            found["training time"] = _ratio(rows, lambda row: row.mean(lambda record: record.train_seconds))
        if _latency_alike(flat):
            found["latency"] = _ratio(rows, _latency_ms)
        return found


def _ratio(pairs: Sequence[tuple[Row, Row]], value: Callable[[Row], float]) -> float:
    return float(np.exp(np.mean([np.log(value(after) / value(before)) for before, after in pairs])))


def _timed_alike(rows: Sequence[Row]) -> bool:
    """Whether trainings were timed here, one at a time, on one machine and with the same options."""
    if any(row.adopted or row.packed for row in rows):
        return False
    return len({_machine(record) for row in rows for record in row.records}) == 1


def _machine(record: Record) -> tuple:
    here = record.environment
    means = record.bfloat16, record.kernels, record.compiled, record.graphs
    return here.device, here.cpu, here.threads, here.cores, here.versions.get("torch"), *means


def _latency_alike(rows: Sequence[Row]) -> bool:
    found = [row.latency for row in rows if row.latency]
    return len(found) == len(rows) and len({latency_run(latency) for latency in found}) == 1


def _latency_ms(row: Row) -> float:
    assert row.latency is not None  # rows are compared by latency only where all have one
    return smallest(row.latency).p50_ms


# --- What it can see ---


def _sight(asked: Questions, spread: float, seeds: int, measured: bool = True) -> Sight | None:
    weights_QU = asked.first_family_QU
    if not len(weights_QU) or seeds < 2:
        return None
    plan = Plan(weights_QU, spread)
    hardest = int((weights_QU**2).sum(1).argmax())
    smallest_seen = float(plan.detectable(seeds)[hardest])
    needed = {difference: plan.seeds_for(hardest, difference) for difference in DIFFERENCES}
    if smallest_seen < DIFFERENCES[0]:
        half = float(f"{smallest_seen / 2:.1g}")
        needed |= {half: plan.seeds_for(hardest, half)}
    return Sight(spread, measured, seeds, smallest_seen, needed)


def foresee(study: Study, cells: Sequence[PlannedCell], images: int, directory: StudyDirectory) -> Sight | None:
    """What a study can see before it is trained, from the spread in its directory's records, if there are enough.

    Without records the spread is the binomial floor for networks of `EXPECTED_ACCURACY` on `images` validation images.
    None for a study with one network or one seed.
    """
    asked = questions(study, cells)
    spread = None
    if (directory.path / "plan.json").exists():
        spread = read_evidence(directory).spread
    floor = planning.binomial_spread(EXPECTED_ACCURACY, images)
    return _sight(asked, spread or floor, study.seeds, measured=spread is not None)


# --- Two rows, in full ---


@dataclass(frozen=True)
class TwoCells:
    """One row against another, with every seed."""

    comparison: Comparison
    mcnemar: dict[int, McNemar]  # by seed, on the test images, of the seeds whose predictions were kept

    @property
    def seeds(self) -> list[int]:
        """That either has."""
        return sorted(self.comparison.first.by_seed.keys() | self.comparison.second.by_seed.keys())


def compare(directory: StudyDirectory, evidence: Evidence, first: int, second: int) -> TwoCells:
    """The comparison of two rows: as it was declared, else as a question of its own that was chosen afterwards.

    After a race it has no verdict, as the seeds depend on what was seen. Raises InputError for a row and itself.
    """
    results = evidence.results
    model = _Model(results, evidence.asked)
    if model.network_of_row[first] == model.network_of_row[second]:
        raise InputError(f"--contrast: {results.rows[first].name!r} and {results.rows[second].name!r} are one cell")
    places = {(results.row(a), results.row(b)): at for at, (a, b) in enumerate(results.study.contrasts)}
    if (at := places.get((first, second))) is not None and evidence.declared:
        found = evidence.declared[at]
    elif (at := places.get((second, first))) is not None and evidence.declared:
        found = _turned(evidence.declared[at])
    else:
        (found,) = model.compare([(first, second)], declared=False)
        if results.plan.race is not None:
            reason = "seeds were added by a race, which decides other contrasts"
            found = replace(found, judgement=replace(found.judgement, verdict=NONE, low=None, high=None, reason=reason))
    return TwoCells(found, _mcnemar(directory, found.first, found.second))


def _turned(found: Comparison) -> Comparison:
    def turn(judgement: Judgement) -> Judgement:
        verdict = {"better": "worse", "worse": "better"}.get(judgement.verdict, judgement.verdict)
        mean, low, high = (value and -value for value in (judgement.mean, judgement.high, judgement.low))
        return replace(judgement, verdict=verdict, mean=mean, low=low, high=high)

    turned = turn(found.judgement), turn(found.test)
    return Comparison(found.second, found.first, *turned, found.declared, found.seeds_to_decide)


def _mcnemar(directory: StudyDirectory, first: Row, second: Row) -> dict[int, McNemar]:
    found = {}
    for seed in sorted(first.by_seed.keys() & second.by_seed.keys()):
        kept, other = (directory.predictions(row.by_seed[seed].trial) for row in (first, second))
        if kept is not None and other is not None:
            found[seed] = mcnemar(right_on_test(kept), right_on_test(other))
    return found


# --- The levels of a factor ---


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
    results = evidence.results
    study, path = results.study, results.path
    if not study.factors:
        raise InputError(f"{path}: the study has no factors")
    for name in names:
        if name not in study.factors:
            raise unknown(f"factor of {path}:", name, study.factors)
    if len(names) > 2 or len(set(names)) < len(names):
        raise InputError(f"one factor, or two different ones, have effects; found {', '.join(names)}")
    if len(names) == 2 and study.design != "factorial":
        raise InputError(f"{path}: one factor at a time was changed; {' and '.join(names)} never together")
    grouped: dict[tuple[str, ...], dict[int, Row]] = {}
    for cell, row in zip(results.plan.cells_with_trials, results.row_of):
        others = [level for name, level in cell.level_names.items() if name not in names]
        if cell.levels and (study.design == "factorial" or all(level == "base" for level in others)):
            grouped.setdefault(tuple(cell.level_names[name] for name in names), {})[row] = results.rows[row]
    done = [row for group in grouped.values() for row in group.values() if row.by_seed]
    seeds = sorted(set.intersection(*(set(row.by_seed) for row in done))) if done else []
    judged = evidence.effects if len(names) == 1 else evidence.interactions
    effects = {
        tuple(levels[name] for name in names): effect
        for effect in judged
        if (levels := {factor: after for factor, _, after in effect.changes}).keys() == set(names)
    }
    found = []
    for levels, group in grouped.items():
        rows = [row for row in group.values() if row.by_seed]
        means = [
            accuracy_interval([float(np.mean([value(row.by_seed[seed]) for row in rows])) for seed in seeds])
            if rows and seeds
            else None
            for value in (on_validation, on_test)
        ]
        count = len(seeds) if rows else 0
        found.append(Marginal(dict(zip(names, levels)), len(rows), count, *means, effects.get(levels)))
    return found
