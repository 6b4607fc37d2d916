"""From records to numbers that statistics take: what a study says of its cells, before anything is rendered.

Accuracies here are in percent. Every choice and every verdict is made on the validation split: which cell is best,
what is better, worse or equivalent, whether a race trains another seed. The test split is read once for each trial, and
is only reported.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np

from ablations.records import Failure, LatencySummary, PlannedCell, Predictions, Race, Record, StudyDirectory
from ablations.results import stats
from ablations.results.stats import Contrast, Interval, Peek, Winner, mean_interval
from ablations.study import BASE, Study, level_name
from model.errors import InputError, unknown
from model.mcnemar import McNemar, mcnemar

ALPHA = 0.05  # the chance that any verdict of a family is wrong
EACH_LEVEL = "-"  # of a factor that changes nothing: the network is the same at each level

Score = Callable[[Record], float]


def on_validation(record: Record) -> float:
    """What every choice and verdict is made on."""
    return _percent(record.validation_accuracy, record.validation_images)


def on_test(record: Record) -> float:
    """What is reported."""
    return _percent(record.test_accuracy, record.test_images)


def _percent(share: float, images: int) -> float:
    """A share of the images exactly: rounding, as older records have it, would look like a spread over seeds."""
    return 100 * round(share * images) / images


# --- Rows: cells, those that are one network together ---


@dataclass(frozen=True)
class Row:
    """A cell, or several that are the same network, with what its finished trials gave."""

    study: str
    model: str
    levels: dict[str, str]
    trials: list[str]  # planned, by seed
    records: list[Record]  # by seed, of those that are finished
    failures: dict[str, Failure]  # by trial, of those that have not finished since
    latency: LatencySummary | None  # of one of its trials
    reported: str
    adopted: dict[str, str] = field(default_factory=dict)  # by trial: the study directory that it was taken over from

    @property
    def seeds(self) -> int:
        """Planned."""
        return len(self.trials)

    @property
    def missing(self) -> list[str]:
        """The trials that were not trained yet, or not to their end."""
        done = {record.trial for record in self.records}
        return [trial for trial in self.trials if trial not in done and trial not in self.failures]

    def interval(self, value: Score) -> Interval | None:
        """Mean and 95% interval over the finished seeds, None where none is."""
        return mean_interval([value(record) for record in self.records]) if self.records else None

    def by_seed(self, value: Score) -> dict[int, float]:
        return {record.seed: value(record) for record in self.records}


def study_rows(directory: StudyDirectory) -> list[Row]:
    """The rows of a study, in the order of its design. Raises InputError for a directory that is none or is damaged."""
    study, plan, latencies = directory.study, directory.plan, directory.latencies()
    same: dict[tuple[str, ...], list[PlannedCell]] = {}
    for cell in plan.cells:
        same.setdefault((*cell.trials, "" if cell.levels else "baseline"), []).append(cell)
    rows = []
    for cells in same.values():
        trials = cells[0].trials
        found = [directory.record(trial) for trial in trials]
        failed = [directory.failure(trial) for trial in trials]
        rows.append(
            Row(
                study=study_name(directory),
                model=cells[0].model_name,
                levels={name: _shared_level(name, cells, study) for name in cells[0].levels},
                trials=trials,
                records=[record for record in found if record is not None],
                failures={
                    trial: failure for trial, failure, record in zip(trials, failed, found) if failure and not record
                },
                latency=next((latencies[trial] for trial in trials if trial in latencies), None),
                reported=next(
                    (study.reported[str(level)] for level in cells[0].levels.values() if str(level) in study.reported),
                    "",
                ),
                adopted={trial: place for trial in trials if (place := directory.adopted(trial))},
            )
        )
    return rows


def measured(rows: Sequence[Row]) -> list[str]:
    """What the rows are of, each with when it was measured: other rows have another list."""
    trials = {f"{record.trial} {record.finished}" for row in rows for record in row.records}
    latencies = {f"{row.latency.file} {row.latency.finished}" for row in rows if row.latency}
    return sorted(trials) + sorted(latencies)


def study_name(directory: StudyDirectory) -> str:
    return directory.path.resolve().name


def _shared_level(factor: str, cells: list[PlannedCell], study: Study) -> str:
    """The level of cells that are one network: "-" where they have every level of the factor, else all they have."""
    names = list(dict.fromkeys(level_name(cell.levels[factor]) for cell in cells))
    every = len(names) > 1 and study.design == "factorial" and len(names) == len(study.factors[factor])
    return EACH_LEVEL if every else " / ".join(names)


def row_name(row: Row) -> str:
    """A row in a few words: its levels, those of factors that change nothing left out; a baseline's network."""
    levels = [f"{name} {level}" for name, level in row.levels.items() if level != EACH_LEVEL]
    return ", ".join(levels) or row.model


def find_row(rows: Sequence[Row], text: str) -> Row:
    """The one row with this name, or with these levels: `experts 2, gate mlp`, `experts=2,gate=mlp`, `experts=4`.

    Raises InputError, with the names there are, where it is none or several.
    """

    def plain(name: str) -> str:
        return re.sub(r"[\s=,]+", " ", name).strip()

    for row in rows:
        if plain(row_name(row)) == plain(text):
            return row
    factors = sorted({name for row in rows for name in row.levels}, key=len, reverse=True)
    parts = re.split(rf"(?:^|[,\s]+)({'|'.join(map(re.escape, factors))})[=\s]", text) if factors else [text]
    wanted = dict(zip(parts[1::2], (level.strip(" ,") for level in parts[2::2])))
    matching = [
        row
        for row in rows
        if wanted and not parts[0].strip() and row.levels and all(
            row.levels[name] in (level, EACH_LEVEL) or level in row.levels[name].split(" / ")
            for name, level in wanted.items()
        )
    ]  # fmt: skip
    if len(matching) == 1:
        return matching[0]
    if matching:
        raise InputError(f"cell {text!r} is {len(matching)} cells: {'; '.join(map(row_name, matching))}")
    raise unknown("cell", text, [row_name(row) for row in rows])


def best_row(rows: Sequence[Row]) -> Row | None:
    """The row with the best mean validation accuracy, the lower validation loss between equals.

    Rows that are `complete` go before those that are not; None where no trial is finished.
    """
    done = complete(rows)
    most = max((len(row.records) for row in rows), default=0)
    done = done or [row for row in rows if row.records and len(row.records) == most]

    def merit(row: Row) -> tuple[float, float]:
        accuracy = round(row.interval(on_validation).mean, 9)  # equal ones differ by rounding
        return accuracy, -row.interval(lambda record: record.validation_loss).mean

    return max(done, key=merit, default=None)


def best_record(row: Row) -> Record:
    """The trial of a row that is best on the validation split."""
    return max(row.records, key=lambda record: (record.validation_accuracy, -record.validation_loss))


def complete(rows: Sequence[Row]) -> list[Row]:
    """The rows with as many seeds as every row should have: in a race, that of the row that needs fewest."""
    every = min((row.seeds for row in rows), default=0)
    return [row for row in rows if len(row.records) >= every]


# --- Verdicts ---


@dataclass(frozen=True)
class Judgement:
    """What may be said of a difference in points of accuracy; the reference itself has none.

    The interval is Student's for this difference alone; in a race it is as wide as all looks together demand. p-values
    are adjusted for the family, and a race has none.
    """

    verdict: stats.Verdict | Literal["reference"]
    mean: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    p_equivalence: float | None = None
    seeds: int = 0
    paired: bool = True
    left_out: tuple[int, ...] = ()  # seeds that only one of the two has
    further_seeds: float | None = None  # about how many would decide it
    reason: str = ""


REFERENCE = Judgement("reference")


def judge(rows: Sequence[Row], margin: float, race: Race | None = None) -> list[Judgement]:
    """A verdict on each row of one study against the first, which the design puts there before anything is trained.

    All verdicts together are wrong with probability `ALPHA` at most: by `stats.decide` for seeds that were fixed
    beforehand, by `stats.race` in a race.
    """
    if not rows:
        return []
    reference, others = rows[0], rows[1:]
    if race is not None:
        return [REFERENCE, *(judge_race(row, reference, race) for row in others)]
    pairs = [(row, reference) for row in others]
    return [REFERENCE, *judge_pairs(pairs, margin)]


def judge_pairs(pairs: Sequence[tuple[Row, Row]], margin: float) -> list[Judgement]:
    """Verdicts on the first of each pair against the second: one family, of seeds that were fixed beforehand."""
    contrasts = [contrast_of(first, second, on_validation) for first, second in pairs]
    judgements = judge_contrasts(contrasts, margin)
    for place, (first, second) in enumerate(pairs):
        if first.trials == second.trials:
            judgements[place] = _same_network(len(first.records))
    return judgements


def contrast_of(first: Row, second: Row, value: Score) -> Contrast:
    """The first row less the second, on their finished seeds."""
    if not (first.records and second.records):
        which = " and ".join(row_name(row) for row in (first, second) if not row.records)
        return Contrast(0.0, 0, reason=f"{which} has no finished trial")
    return stats.contrast(first.by_seed(value), second.by_seed(value))


def judge_contrasts(contrasts: Sequence[Contrast], margin: float) -> list[Judgement]:
    """Verdicts on a family of contrasts."""
    found = []
    for one, decision in zip(contrasts, stats.decide(contrasts, margin, ALPHA)):
        further, reason = None, decision.reason or one.reason
        if decision.verdict == "undecided":
            further = stats.further_seeds(one, ALPHA / len(contrasts), margin)
            if further == math.inf:
                further, reason = None, f"more than {stats.MOST_SEEDS:,} seeds would be needed"
        found.append(
            Judgement(
                verdict=decision.verdict,
                mean=one.mean if one.n else None,
                low=one.low,
                high=one.high,
                p=decision.p_difference,
                p_equivalence=decision.p_equivalence,
                seeds=one.n,
                paired=one.paired,
                left_out=one.left_out,
                further_seeds=further,
                reason=reason,
            )
        )
    return found


def _same_network(seeds: int) -> Judgement:
    return Judgement("equivalent", 0.0, seeds=seeds, reason="it is the same network")


def judge_race(row: Row, reference: Row, race: Race) -> Judgement:
    """Where the race of a row against the reference stands, from the seeds that both have, in their order."""
    if row.trials == reference.trials:
        return _same_network(len(row.records))
    one = race_of(row, reference, race)
    if one is None:
        reason = f"less than {race.first} seeds, from the first on, are finished" + _failed_of(row, reference)
        return Judgement("undecided", reason=reason)
    reason = f"decided at {one.seeds} seeds"
    if one.verdict == "undecided":
        reason = "the race may go on" if one.go_on else f"the race ended at its last seed, {race.last}"
        reason += _failed_of(row, reference)
    return Judgement(one.verdict, one.mean, one.low, one.high, seeds=one.seeds, reason=reason)


def race_of(row: Row, reference: Row, race: Race) -> stats.Race | None:
    """`stats.race` on the seeds that both have, from the first on without a gap; None before the first look."""
    ours, theirs = row.by_seed(on_validation), reference.by_seed(on_validation)
    differences = []
    for seed in range(race.last):
        if seed not in ours or seed not in theirs:
            break
        differences.append(ours[seed] - theirs[seed])
    if len(differences) < race.first:
        return None
    return stats.race(differences, race.last, race.margin, race.contrasts, race.alpha, race.first)


def _failed_of(*rows: Row) -> str:
    failed = [f"{trial} ({failure.kind})" for row in rows for trial, failure in row.failures.items()]
    return f"; failed: {', '.join(failed)}" if failed else ""


# --- The best cell, and its curves ---


def common_scores(rows: Sequence[Row]) -> tuple[list[int], np.ndarray, np.ndarray]:
    """The seeds that all these rows have, and validation and test accuracies (C, S)."""
    seeds = sorted(set.intersection(*({record.seed for record in row.records} for row in rows))) if rows else []
    scores = ([[row.by_seed(value)[seed] for seed in seeds] for row in rows] for value in (on_validation, on_test))
    return seeds, *(np.array(values).reshape(len(rows), len(seeds)) for values in scores)


def winner(rows: Sequence[Row]) -> Winner | None:
    """`stats.winner` among the rows that are `complete`, on the seeds that all of them have.

    None where there are none, or where they make another row the best than `best_row`, as after a race.
    """
    whole = complete(rows)
    seeds, validation_CS, test_CS = common_scores(whole)
    if not seeds:
        return None
    best = best_row(rows)
    order = sorted(range(len(whole)), key=lambda place: whole[place] is not best)  # the first of equals wins
    found = stats.winner(validation_CS[order], test_CS[order])
    return found if found.cell == 0 else None


def curves(directory: StudyDirectory, row: Row) -> np.ndarray:
    """Validation accuracy after each epoch (S, E), in percent, as it was measured while training.

    Raises InputError where an epoch of a finished trial is missing.
    """
    found = []
    for record in row.records:
        epochs = directory.epochs(record.trial)
        if len(epochs) != record.epochs:
            file = directory.trial(record.trial) / "epochs.jsonl"
            raise InputError(f"{file}: has {len(epochs)} epochs, the trial has {record.epochs}")
        found.append([100 * epoch.validation_accuracy for epoch in epochs])
    return np.array(found)


def peek(directory: StudyDirectory, row: Row) -> Peek | None:
    """What picking the best epoch and seed would have claimed for a row; None where no trial is finished."""
    return stats.peek(curves(directory, row)) if row.records else None


# --- Two rows, in full ---


@dataclass(frozen=True)
class SplitContrast:
    contrast: Contrast
    bootstrap: tuple[float, float] | None  # 95% interval; None where there is none


@dataclass(frozen=True)
class Comparison:
    """One row against another: the first less the second."""

    first: Row
    second: Row
    judgement: Judgement
    validation: SplitContrast
    test: SplitContrast
    mcnemar: dict[int, McNemar]  # by seed, on the test images, of the seeds whose predictions were kept

    @cached_property
    def seeds(self) -> list[int]:
        """That either has."""
        return sorted({record.seed for row in (self.first, self.second) for record in row.records})


def compare(directory: StudyDirectory, rows: Sequence[Row], first: Row, second: Row) -> Comparison:
    """The comparison of two rows as the only question asked; in a race, a verdict needs the reference.

    The seeds of a race depend on what was seen, so that tests for a fixed number of them would err too often.
    """
    race = directory.plan.race
    (judgement,) = judge_pairs([(first, second)], directory.study.margin)
    if race is not None and first.trials != second.trials:
        if rows[0] in (first, second):
            judgement = judge_race(first, second, race)
        else:
            reason = "seeds were added by a race, whose verdicts are against its reference"
            judgement = Judgement("undecided", judgement.mean, seeds=judgement.seeds, reason=reason)
    splits = []
    for value in (on_validation, on_test):
        one = contrast_of(first, second, value)
        ours, theirs = first.by_seed(value), second.by_seed(value)
        differences = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
        interval = stats.bootstrap_interval(differences) if one.paired and differences else None
        splits.append(SplitContrast(one, interval))
    return Comparison(first, second, judgement, *splits, mcnemar=_mcnemar(directory, first, second))


def _mcnemar(directory: StudyDirectory, first: Row, second: Row) -> dict[int, McNemar]:
    trials = [{record.seed: record.trial for record in row.records} for row in (first, second)]
    found = {}
    for seed in sorted(trials[0].keys() & trials[1].keys()):
        kept = [directory.predictions(one[seed]) for one in trials]
        if all(kept):
            found[seed] = mcnemar(*(right(one) for one in kept))
    return found


def right(predictions: Predictions) -> np.ndarray:
    """Whether each test image was recognised (B,)."""
    return predictions.test == predictions.test_labels


# --- Factors ---


@dataclass(frozen=True)
class Marginal:
    """Levels of one or two factors, over all levels of the others."""

    levels: dict[str, str]
    cells: int  # that count
    seeds: int
    validation: Interval | None
    test: Interval | None
    effect: Judgement | None  # of one level against the factor's first; of two, their interaction


def marginals(directory: StudyDirectory, factors: Sequence[str]) -> list[Marginal]:
    """The means over the cells of each level, and its effect, on the seeds that all these cells have.

    In a full factorial effects are `stats.factorial_effects`, and those of the factors given are one family. One at a
    time, a level has the cell in which only this factor is changed, and its effect is the contrast with the base.
    Baselines have no levels. Cells without any finished trial are left out, and there are no effects then. In a race
    only the seeds of the first look count, as those were fixed beforehand. Raises InputError for factors that the study
    does not have, and for two of them where the design has no combinations.
    """
    study, plan = directory.study, directory.plan
    if not study.factors:
        raise InputError(f"{directory.path}: the study has no factors")
    for factor in factors:
        if factor not in study.factors:
            raise unknown(f"factor of {directory.path}:", factor, study.factors)
    if len(factors) > 2 or len(set(factors)) < len(factors):
        raise InputError(f"one factor, or two different ones, have effects; found {', '.join(factors)}")
    if len(factors) == 2 and study.design != "factorial":
        raise InputError(f"{directory.path}: one factor at a time was changed; {' and '.join(factors)} never together")
    cells = [cell for cell in plan.cells if cell.levels and _counts(cell, factors, study)]
    records = [{one.seed: one for trial in cell.trials if (one := directory.record(trial))} for cell in cells]
    whole = all(records)
    there = [found.keys() for found in records if found]
    seeds = sorted(set.intersection(*map(set, there))) if there else []
    seeds = [seed for seed in seeds if plan.race is None or seed < plan.race.first]
    effects = _effects(study, cells, records, factors, seeds) if whole and seeds else {}
    groups: dict[tuple[str, ...], list[dict[int, Record]]] = {}
    for cell, found in zip(cells, records):
        groups.setdefault(tuple(level_name(cell.levels[factor]) for factor in factors), []).append(found)
    rows = []
    for levels, group in groups.items():
        group = [found for found in group if found]
        means = [
            mean_interval([float(np.mean([value(found[seed]) for found in group])) for seed in seeds])
            if group and seeds
            else None
            for value in (on_validation, on_test)
        ]
        rows.append(
            Marginal(dict(zip(factors, levels)), len(group), len(seeds) if group else 0, *means, effects.get(levels))
        )
    return rows


def _counts(cell: PlannedCell, factors: Sequence[str], study: Study) -> bool:
    others = [level for name, level in cell.levels.items() if name not in factors]
    return study.design == "factorial" or all(level is BASE for level in others)


def _effects(
    study: Study,
    cells: list[PlannedCell],
    records: list[dict[int, Record]],
    factors: Sequence[str],
    seeds: list[int],
) -> dict[tuple[str, ...], Judgement]:
    """Verdicts by the names of levels, on validation."""
    scores_CS = np.array([[on_validation(found[seed]) for seed in seeds] for found in records])
    if study.design == "one_at_a_time":
        names = [level_name(cell.levels[factors[0]]) for cell in cells]
        scale = float(np.abs(scores_CS).max())
        contrasts = [stats.paired_contrast(scores_S - scores_CS[0], scale=scale) for scores_S in scores_CS[1:]]
        found = judge_contrasts(contrasts, study.margin)
        same = [cell.trials == cells[0].trials for cell in cells[1:]]
        found = [_same_network(len(seeds)) if is_same else one for is_same, one in zip(same, found)]
        return dict(zip([(name,) for name in names], [REFERENCE, *found]))
    levels = {name: [level_name(level) for level in values] for name, values in study.factors.items()}
    scores_LS = scores_CS.reshape(*map(len, levels.values()), len(seeds))
    effects = [
        effect
        for effect in stats.factorial_effects(scores_LS, levels)
        if {name for name, _, _ in effect.changes} == set(factors)
    ]
    found = {}
    for effect, judgement in zip(effects, judge_contrasts([effect.contrast for effect in effects], study.margin)):
        to = {name: level for name, _, level in effect.changes}
        found[tuple(to[factor] for factor in factors)] = judgement
    if len(factors) == 1:
        found[(levels[factors[0]][0],)] = REFERENCE
    return found
