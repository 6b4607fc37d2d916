"""What a study's records say of its cells. Each record is read once.

Scores are values of the metric that decides, in percent where its unit is points. Every choice and every verdict is
made on the validation split. The test split is read once for each trial, and is only reported.

Shapes: C rows (one for each network of the study), S seeds, E epochs.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from expertgrid.ablations.records.directory import StudyDirectory
from expertgrid.ablations.records.plan import Plan
from expertgrid.ablations.records.predictions import Predictions
from expertgrid.ablations.records.record import SPLITS, Adopted, Failure, Record, Split, TrainingRates
from expertgrid.ablations.results.stats import selection
from expertgrid.ablations.results.stats.selection import Interval, Peek, Winner, accuracy_interval, mean_interval
from expertgrid.ablations.study.cells import Group, find_cell, groups
from expertgrid.ablations.study.study import Study
from expertgrid.bench.record import Latency, LatencyRecord
from expertgrid.model.system.errors import InputError
from expertgrid.model.system.text import rounded
from expertgrid.model.training.metrics import ACCURACY, Scale, scale
from expertgrid.model.training.parts import changed_parts


def interval(values_S: Sequence[float], scale: Scale) -> Interval:
    """The mean of scores with its 95% interval, which stays between 0 and 100 percent where they are in points."""
    return rounded((accuracy_interval if scale.unit == "points" else mean_interval)(values_S), scale.decimals)


@dataclass(frozen=True, eq=False)
class Row(Group):
    """A network of a study, which may be several of its cells, with what its finished trials gave."""

    trials: dict[int, str]  # planned, by seed; those of the control by the seed whose hold-out they share
    by_seed: dict[int, Record]  # that are finished
    failures: dict[str, Failure]  # by trial, of those that have not finished since
    adopted: dict[str, Adopted]  # by trial, of those that another study trained
    latency: LatencyRecord | None  # of one of its trials
    alone: float | None = None  # images/s in training, measured alone: the median over the rounds
    rounds: tuple[float, ...] = ()  # images/s in each of them
    reported: str = ""
    scale: Scale = ACCURACY  # of the metric that decides
    other_code: tuple[str, ...] = ()  # finished trials of other code than the newest one's: they do not count

    @property
    def control(self) -> bool:
        return self.cells[0].control

    @property
    def records(self) -> list[Record]:
        return list(self.by_seed.values())

    @property
    def seeds(self) -> int:
        """Planned."""
        return len(self.trials)

    @property
    def missing(self) -> list[str]:
        """The trials that were not trained yet, or not to their end."""
        done = {record.trial for record in self.by_seed.values()}
        return [trial for trial in self.trials.values() if trial not in done and trial not in self.failures]

    @property
    def packed(self) -> bool:
        """Whether some of its trials were trained beside others, so that their times are no speeds."""
        return any(record.at_once > 1 for record in self.records)

    def scores(self, split: Split) -> list[float]:
        """The metric that decides on a split, of each finished seed: in percent where it is in points."""
        return [record.score(split, self.scale) for record in self.records]

    def interval(self, split: Split) -> Interval | None:
        """The mean over the finished seeds with its 95% interval, None where no seed is."""
        return interval(self.scores(split), self.scale) if self.by_seed else None

    def mean(self, split: Split) -> float:
        """Over the finished seeds; NaN without any."""
        return float(np.mean(self.scores(split))) if self.by_seed else float("nan")

    @property
    def merit(self) -> float:
        """The mean on validation, turned so that higher is better."""
        return self.scale.sign * self.mean("validation")

    @property
    def diverged(self) -> int:
        """Trainings."""
        return sum(failure.kind == "diverged" for failure in self.failures.values())

    @cached_property
    def no_verdict(self) -> str:
        """Why the row may not be judged, such as `diverged in 2 of 5 seeds`; "" where it may.

        A training that diverged is a result. One that ended for another reason is missing.
        """
        return f"diverged in {self.diverged} of {self.seeds} seeds" if self.diverged else ""


@dataclass(frozen=True)
class Results:
    """A study directory as it was read, once."""

    name: str
    path: Path
    study: Study
    plan: Plan
    rows: list[Row]  # that of the design's first cell, the base, comes first
    scale: Scale  # of the metric that decides, that of the study unless another one was chosen afterwards
    margin: float
    timed: TrainingRates | None = None  # the speeds of the rows, measured alone

    @property
    def chosen_afterwards(self) -> bool:
        """Whether the metric is another one than the study declares."""
        return self.scale.name != self.study.metric

    @property
    def next_seed(self) -> int:
        """The first seed that a fresh study of the same question would take."""
        return max([self.study.first_seed + self.study.seeds, *(seed + 1 for row in self.rows for seed in row.trials)])

    @property
    def unfinished(self) -> list[str]:
        """The trials that are planned, did not fail and are not finished."""
        return list(dict.fromkeys(trial for row in self.rows for trial in row.missing))

    def scores(self, split: Split = "validation") -> np.ndarray:
        """The scores (C, S) of the rows by planned seed; NaN for a trial that is not finished."""
        seeds = sorted({seed for row in self.rows for seed in row.trials})
        by_seed = [dict(zip(row.by_seed, row.scores(split))) for row in self.rows]
        every = [[scores.get(seed, np.nan) for seed in seeds] for scores in by_seed]
        return np.array(every).reshape(len(self.rows), len(seeds))

    def row(self, text: str) -> int:
        """The place of the row that a text names. Raises InputError, with the names there are."""
        return find_cell(self.rows, text)


def read_results(directory: StudyDirectory, metric: str | None = None) -> Results:
    """Reads a study directory, by another metric (NAME or NAME:MARGIN) where one is given.

    Raises InputError where it is none, is damaged, or mixes records of hold-outs, and for a metric that it has not.
    """
    study = directory.read_study()
    plan, latencies = directory.read_plan(study), directory.latencies()
    by, margin = _chosen(study, plan, metric)
    timed = directory.training_rates()
    rows = []
    for group in groups(plan.cells, study.combined_levels):
        cell = group.cells[0]
        trials = {plan.first_seed + place: trial for place, trial in enumerate(cell.trials)}
        by_seed = {seed: record for seed, trial in trials.items() if (record := directory.record(trial))}
        for seed in by_seed:
            by_seed[seed] = directory.with_metric(by_seed[seed], by.name)
            _check_hold_out(directory, plan, trials[seed])
        newest = max(by_seed.values(), key=lambda record: (record.finished, record.seed), default=None)
        code = directory.network(newest.trial) if newest else None
        other = directory.of_other_code({trials[seed]: code for seed in by_seed} if code else {})
        parts = newest.parts if newest else {}
        other |= {record.trial: "parts" for record in by_seed.values() if changed_parts(record.parts, parts)}
        by_seed = {seed: record for seed, record in by_seed.items() if record.trial not in other}
        timed_trial = next((trial for trial in trials.values() if timed and trial in timed.images_per_s), None)
        rows.append(
            Row(
                **vars(group),
                trials=trials,
                by_seed=by_seed,
                other_code=tuple(other),
                failures={
                    trial: failure
                    for seed, trial in trials.items()
                    if seed not in by_seed and (failure := directory.failure(trial))
                },
                adopted={trials[seed]: taken for seed in by_seed if (taken := directory.adopted(trials[seed]))},
                latency=max(
                    (latencies[trial] for trial in trials.values() if trial in latencies),
                    key=LatencyRecord.rank,
                    default=None,
                ),
                alone=timed.images_per_s[timed_trial] if timed and timed_trial else None,
                rounds=tuple(timed.rounds.get(timed_trial, ())) if timed and timed_trial else (),
                reported=next(
                    (study.reported[level] for level in cell.level_names.values() if level in study.reported), ""
                ),
                scale=by,
            )
        )
    return Results(study_name(directory), directory.path, study, plan, rows, by, margin, timed)


def _chosen(study: Study, plan: Plan, metric: str | None) -> tuple[Scale, float]:
    """How the metric that decides is read, and its margin. Raises InputError for what does not fit the study."""
    if metric in (None, study.metric):
        return plan.metric, study.margin
    name, _, margin = metric.partition(":")
    by, number = scale(name), re.fullmatch(r"\d*\.?\d+", margin)
    if name == study.metric or plan.race:
        problem = "and what is declared stays" if name == study.metric else "which a race has decided by"
        raise InputError(f"--metric {metric}: the study declares {study.metric}, margin {study.margin:g}, {problem}")
    if not margin and by.unit == plan.metric.unit == "points":
        return by, study.margin
    if number is None or not float(margin):
        raise InputError(f"--metric {metric}: NAME:MARGIN is needed: which difference in {by.title} matters?")
    return scale(name, float(margin)), float(margin)


def _check_hold_out(directory: StudyDirectory, plan: Plan, trial: str) -> None:
    config = directory.config(trial)
    if config and (config.hold_out.kind, config.hold_out.share) != (plan.hold_out.kind, plan.hold_out.share):
        raise InputError(
            f"{directory.trial(trial) / 'config.json'}: its hold-out is {config.hold_out}, and plan.json has "
            f"{plan.hold_out}; the records of one directory need the same hold-out"
        )


def study_name(directory: StudyDirectory) -> str:
    return directory.path.resolve().name


def newest(directory: StudyDirectory, results: Results) -> str:
    """When the newest of what the tables and the report show was measured or read (UTC, ISO 8601); "" for nothing."""
    times = [record.finished for row in results.rows for record in row.records]
    times += [row.latency.finished for row in results.rows if row.latency]
    times += [results.timed.finished] if results.timed else []
    return max([*times, *(read.time for read in directory.test_reads())], default="")


# --- The best cell ---


def best_row(rows: Sequence[Row]) -> Row | None:
    """The row that is best on validation by its metric, the lower validation loss between equals.

    Rows that are `complete` go before those that are not; None where no trial is finished. The control is left out: it
    is the base again.
    """
    rows = [row for row in rows if not row.control]
    done = complete(rows)
    most = max((len(row.by_seed) for row in rows), default=0)
    done = done or [row for row in rows if row.by_seed and len(row.by_seed) == most]
    return max(done, key=_merit, default=None)


def _merit(row: Row) -> tuple[float, float]:
    loss = float(np.mean([record.validation_loss for record in row.records]))
    return round(row.merit, 9), -loss  # equal ones differ by rounding


def best_record(row: Row) -> Record:
    """The trial of a row that is best on the validation split."""
    merits = [row.scale.sign * score for score in row.scores("validation")]
    return max(zip(merits, row.records), key=lambda pair: (pair[0], -pair[1].validation_loss))[1]


def complete(rows: Sequence[Row]) -> list[Row]:
    """The rows with as many seeds as every row should have: in a race, that of the row that needs fewest."""
    every = min((row.seeds for row in rows), default=0)
    return [row for row in rows if row.by_seed and len(row.by_seed) >= every]


def ranking(rows: Sequence[Row]) -> list[Row]:
    """The rows with a finished trial, best on validation first; that of `best_row` leads. Without the control."""
    best = best_row(rows)
    done = [row for row in rows if row.by_seed and not row.control]
    return sorted(done, key=lambda row: (row is not best, -row.merit))


def common_scores(rows: Sequence[Row]) -> tuple[list[int], np.ndarray, np.ndarray]:
    """The seeds that all these rows have, and scores (C, S) on validation and test."""
    seeds = sorted(set.intersection(*(set(row.by_seed) for row in rows))) if rows else []
    scores = [[[row.by_seed[seed].score(split, row.scale) for seed in seeds] for row in rows] for split in SPLITS]
    validation_CS, test_CS = np.array(scores, dtype=float).reshape(2, len(rows), len(seeds))
    return seeds, validation_CS, test_CS


def winner(rows: Sequence[Row]) -> Winner | None:
    """`selection.winner` among the rows that are `complete`, on the seeds that all of them have.

    None where there are none, or where they make another row the best than `best_row`, as after a race.
    """
    whole = [row for row in complete(rows) if not row.control]
    seeds, validation_CS, test_CS = common_scores(whole)
    if not seeds:
        return None
    best = best_row(rows)
    order = sorted(range(len(whole)), key=lambda place: whole[place] is not best)  # the first of equals wins
    by = best.scale if best else ACCURACY
    first = selection.winner(by.sign * validation_CS[order], test_CS[order], partial(interval, scale=by))
    return first if first.cell == 0 else None


# --- Accuracy against latency ---


def smallest(latency: LatencyRecord) -> Latency:
    """ONNX Runtime at the smallest batch size that was measured."""
    return min(latency.latencies, key=lambda timed: (timed.kind != "onnxruntime", timed.batch))


def latency_run(latency: LatencyRecord) -> tuple[str | int, ...]:
    """What two latencies have in common where they were measured in turns."""
    timed = smallest(latency)
    return latency.finished, latency.provider, latency.threads, timed.engine, timed.batch


def timed_together(rows: Sequence[Row]) -> list[Row]:
    """The rows of the newest run that timed two or more of them in turns. Without the control."""
    by_run: dict[tuple[str | int, ...], list[Row]] = {}
    for row in rows:
        if row.latency and row.by_seed and not row.control:
            by_run.setdefault(latency_run(row.latency), []).append(row)
    several = [run for run, together in by_run.items() if len(together) > 1]
    return by_run[max(several, key=str)] if several else []


def pareto(costs_C: Sequence[float], scores_C: Sequence[float]) -> list[int]:
    """The places of those that nothing cheaper, or as cheap, is better than, in the order of their costs."""
    front, best = [], -np.inf
    for place in sorted(range(len(costs_C)), key=lambda place: (costs_C[place], -scores_C[place])):
        if scores_C[place] > best:
            front.append(place)
            best = scores_C[place]
    return front


def latency_front(rows: Sequence[Row]) -> list[Row]:
    """The Pareto front of latency and the score on validation among `timed_together`, fastest first."""
    timed = timed_together(rows)
    costs = [smallest(row.latency).p50_ms for row in timed if row.latency]
    return [timed[place] for place in pareto(costs, [row.merit for row in timed])]


# --- Curves and predictions, which are read when they are asked for ---


def peek(directory: StudyDirectory, row: Row) -> Peek | None:
    """What picking the best epoch and seed would have claimed for a row; None where no trial is finished.

    It is about validation accuracy in percent, as it was measured while training. Raises InputError where an epoch of a
    finished trial is missing.
    """
    accuracies = []  # (S, E)
    for record in row.records:
        epochs = directory.epochs(record.trial)
        if len(epochs) != record.epochs:
            file = directory.trial(record.trial) / "epochs.jsonl"
            raise InputError(f"{file}: has {len(epochs)} epochs, the trial has {record.epochs}")
        accuracies.append([100 * epoch.validation_accuracy for epoch in epochs])
    return selection.peek(np.array(accuracies)) if accuracies else None


def right_on_test(predictions: Predictions) -> np.ndarray:
    """Whether each test image was recognised (B,)."""
    return predictions.test == predictions.test_labels
