"""Tables of a study: what `evidence` says, as titled values; and their rendering."""

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Literal, get_args

from tabulate import tabulate

from ablations.records import Benched, LatencySummary, Plan, Record, StudyDirectory
from ablations.results.evidence import (
    ALPHA,
    EACH_LEVEL,
    Comparison,
    Judgement,
    Marginal,
    Row,
    best_record,
    best_row,
    common_scores,
    complete,
    on_test,
    on_validation,
    row_name,
    winner,
)
from ablations.results.stats import Interval, Peek, mean_interval
from model.errors import InputError, unknown

Format = Literal["text", "github", "latex", "csv", "json"]
FORMATS = get_args(Format)


FURTHER = (
    "(+N): about N further seeds would decide it, were the truth what it looks like now: in a fresh study of that "
    "many, or with some more in a race, which adds them one at a time (run --until decided)."
)


class Points(float):
    """Percent, or points of accuracy: shown with two decimals."""


_ACCURACIES: dict[str, Callable[[Record], float]] = {"val acc %": on_validation, "test acc %": on_test}

_FLIP_ACCURACIES: dict[str, Callable[[Record], float | None]] = {  # beside the plain ones, where they were measured
    "val acc % with flip TTA": lambda record: record.validation_accuracy_flip,
    "test acc % with flip TTA": lambda record: record.test_accuracy_flip,
}


def columns(rows: Sequence[Row], judgements: Sequence[Judgement] = ()) -> list[dict[str, object]]:
    """The rows as titled values; intervals are still numbers. Columns that would be empty or alike are left out.

    `judgements` are those on the rows, as `evidence.judge` gives them for the rows of one study.
    """
    factors = list(dict.fromkeys(name for row in rows for name in row.levels))
    names = {row.model for row in rows}
    named = "model" in factors or (len(names) > 1 and any(row.model not in row.levels.values() for row in rows))
    judged = any(one.verdict not in ("reference", "undecided") or one.low is not None for one in judgements)
    comparable = _comparable_speed(rows)
    table = []
    for place, row in enumerate(rows):
        first = row.records[0] if row.records else None
        values: dict[str, object] = {"study": row.study} if len({row.study for row in rows}) > 1 else {}
        values |= {"model": row.model} if named else {}
        values |= {name: row.levels.get(name, "") for name in factors if name != "model" or row.levels}
        values["n"] = len(row.records) if len(row.records) == row.seeds else f"{len(row.records)}/{row.seeds}"
        values |= {title: row.interval(value) for title, value in _ACCURACIES.items()}
        for title, value in _FLIP_ACCURACIES.items():
            if any(value(record) is not None for one in rows for record in one.records):
                there = [found for record in row.records if (found := value(record)) is not None]
                values[title] = mean_interval([100 * share for share in there]) if there else None
        if judged:
            values["verdict"] = judgements[place]
        if any(row.reported for row in rows):
            values["reported %"] = row.reported
        values["params"] = first.parameters if first else None
        values["MACs"] = first.macs if first else None
        rates = [record.images_per_s for record in row.records if record.trial in comparable]
        values["train images/s"] = sum(rates) / len(rates) if rates else None
        if any(row.latency for row in rows):
            values["latency ms"] = smallest(row.latency).p50_ms if row.latency else None
        table.append(values)
    return table


def _comparable_speed(rows: Sequence[Row]) -> set[str]:
    """The trials whose training speed is shown: all that were trained here, and of those taken over the ones like them.

    They are alike if they ran on the same machine with the same versions and options. A study that trained nothing
    itself shows speeds if all its trials are alike.
    """

    def conditions(row: Row, record: Record) -> tuple[str, str, str, bool]:
        environment = record.environment.model_dump_json(exclude={"commit"})
        return row.study, environment, record.execution, record.bfloat16

    pairs = [(row, record) for row in rows for record in row.records]
    shown = {conditions(row, record) for row, record in pairs if record.trial not in row.adopted}
    for study in {row.study for row in rows} - {study for study, *_ in shown}:
        found = {conditions(row, record) for row, record in pairs if row.study == study}
        shown |= found if len(found) == 1 else set()
    return {record.trial for row, record in pairs if conditions(row, record) in shown}


def smallest(latency: LatencySummary) -> Benched:
    """ONNX Runtime at the smallest batch size that was measured."""
    return min(latency.latencies, key=lambda one: (not one.engine.startswith("onnxruntime"), one.batch))


def notes(
    directory: StudyDirectory, plan: Plan, rows: Sequence[Row], judgements: Sequence[Judgement] = ()
) -> list[str]:
    """What a reader needs to know under the table, a line each."""
    lines = [f"Data: {plan.data}."]
    intervals = "± is half of the 95% interval of the mean over seeds (Student's t)"
    if any(len(row.records) == 1 for row in rows):
        intervals += "; one seed has no interval"
    if any(
        len(row.records) > 1 and row.interval(value).half_width is None
        for row in rows
        for value in _ACCURACIES.values()
    ):
        intervals += "; seeds that all agree have none, as their spread is unknown"
    lines.append(f"n: seeds; {intervals}.")
    if any("base" in row.levels.values() for row in rows):
        base = directory.study.base
        lines.append(f"base: as in {base.model} with the recipe {base.recipe} and the study's settings.")
    if any(EACH_LEVEL in row.levels.values() for row in rows):
        lines.append(f"{EACH_LEVEL}: the network is the same at each level of this factor, and was trained once.")
    lines += _verdict_notes(plan, rows, judgements, directory.study.margin)
    if best := best_row(rows):
        lines.append(f"Best on validation: {row_name(best)}, trial {best_record(best).trial}.")
        lines += _winner_notes(rows, best)
    environments = dict.fromkeys(_where(record) for row in rows for record in row.records)
    lines += [f"Trained on {where}." for where in environments]
    lines += _adopted_notes(rows)
    reads = directory.test_reads()
    readers = Counter(read.reader for read in reads)
    again = f", {readers['rerun']} by trials that were trained again" if readers["rerun"] else ""
    lines.append(
        f"Reads of the test split: {readers.total()} ({readers['training']} at the end of a training, "
        f"{readers['export']} to certify an export{again})."
    )
    if flips := sum(read.tta == "flip" for read in reads):
        lines.append(
            f"Flip TTA: logits averaged over each image and its mirror image; {flips} of these reads predicted both."
        )
    how: dict[str, list[str]] = {}
    for latency in (row.latency for row in rows if row.latency):
        where = f"batch {smallest(latency).batch}, {latency.provider}, {latency.threads} threads, of {latency.file}"
        how.setdefault(where, []).append(latency.trial)
    for where, trials in how.items():
        of = f" (trial {', '.join(trials)})" if len(how) > 1 else ""
        lines.append(f"Latency: median of ONNX Runtime at {where}{of}.")
    if missing := list(dict.fromkeys(trial for row in rows for trial in row.missing)):
        lines.append(f"Not finished: {len(missing)} of the trials: {', '.join(missing)}.")
    if failures := {trial: failure for row in rows for trial, failure in row.failures.items()}:
        counts = Counter(failure.kind for failure in failures.values())
        lines.append(f"Failed: {len(failures)} of the trials ({_counted(counts)}).")
        lines += [f"Failed: {trial}: {failure}" for trial, failure in failures.items()]
    return lines


def _adopted_notes(rows: Sequence[Row]) -> list[str]:
    """Which trials another study trained, and whether their speed is left out."""
    adopted = {trial: place for row in rows for trial, place in row.adopted.items()}
    comparable, finished = _comparable_speed(rows), {record.trial for row in rows for record in row.records}
    lines = []
    for place in dict.fromkeys(adopted.values()):
        trials = [trial for trial, found in adopted.items() if found == place and trial in finished]
        hidden = [trial for trial in trials if trial not in comparable]
        left_out = f"; the images/s of {len(hidden)} are not shown: another machine or other options" if hidden else ""
        lines.append(f"Taken over from ../{place}: {len(trials)} trials ({', '.join(trials)}){left_out}.")
    return lines


def _verdict_notes(plan: Plan, rows: Sequence[Row], judgements: Sequence[Judgement], margin: float) -> list[str]:
    if len(judgements) < 2:
        return []
    lines, others = [], list(zip(rows, judgements))[1:]
    if any(one.verdict != "undecided" or one.low is not None for _, one in others):
        race = plan.race
        how = (
            f"by a race of {race.first} to {race.last} seeds with a look after each"
            if race
            else f"paired by seed, with Holm's correction for {len(others)}"
        )
        lines.append(
            f"Verdict: on validation, against {row_name(rows[0])}, the design's first cell; equivalent: within "
            f"{race.margin if race else margin:g} points; {how}."
        )
        if plan.grown:
            had = " and then ".join(map(str, plan.grown))
            lines.append(
                f"Seeds were added after the results of {had} were there to be seen: these verdicts are wrong more "
                f"often than {ALPHA:g}. A race (run --until decided) pays for its looks."
            )
        else:
            lines.append(f"All verdicts are right with probability {1 - (race.alpha if race else ALPHA):g} or more.")
        if race and race.seen:
            lines.append(f"The race was begun when the results of {race.seen} trials were there to be seen.")
    if any(one.further_seeds for _, one in others):
        lines.append(FURTHER)
    reasons: dict[str, list[str]] = {}
    for row, one in others:
        if one.verdict == "undecided" and one.reason:
            reasons.setdefault(f"No verdict on {{}}: {one.reason}.", []).append(row_name(row))
        elif one.reason and not plan.race:
            reasons.setdefault(f"Verdict on {{}}: {one.reason}.", []).append(row_name(row))
        if not one.paired:
            reasons.setdefault("Verdict on {}: unpaired, fewer than two seeds are common.", []).append(row_name(row))
        if one.left_out:
            seeds = f"seed{'s' if len(one.left_out) > 1 else ''} {', '.join(map(str, one.left_out))}"
            reasons.setdefault(f"Verdict on {{}}: without {seeds}, which only one of the two has.", []).append(
                row_name(row)
            )
    return lines + [line.replace("{}", "; ".join(names), 1) for line, names in reasons.items()]


def _winner_notes(rows: Sequence[Row], best: Row) -> list[str]:
    """What the test score of the best row is worth."""
    found = winner(rows)
    among = complete(rows)
    if found is None or found.corrected is None or len(among) < 2:
        return []
    seeds = len(common_scores(among)[0])
    on = f" on the {seeds} seeds that all cells have" if seeds < len(best.records) else ""
    return [
        f"Its test accuracy{on}: {shown(found.reported)}; corrected for its luck as the best of {len(among)}: "
        f"{shown(found.corrected)}, read on each seed for the cell that is best on the others, which was this one for "
        f"{round(found.agreement * seeds)} of {seeds}."
    ]


def marginal_columns(marginals: Sequence[Marginal]) -> list[dict[str, object]]:
    """Levels with their means and effects."""
    table = []
    for one in marginals:
        values = {**one.levels, "cells": one.cells, "n": one.seeds, "val acc %": one.validation, "test acc %": one.test}
        if any(other.effect for other in marginals):
            title = "effect" if len(one.levels) == 1 else "interaction"
            values |= {title: _difference(one.effect), "verdict": one.effect}
        table.append(values)
    return table


def _difference(one: Judgement | None) -> Interval | None:
    if one is None or one.mean is None:
        return None
    return Interval(one.mean, None if one.low is None else one.high - one.mean)


def marginal_notes(directory: StudyDirectory, marginals: Sequence[Marginal]) -> list[str]:
    lines = ["Means over the cells of each level, for each seed; ± is half of the 95% interval over seeds."]
    effects = [one.effect for one in marginals if one.effect and one.effect.verdict != "reference"]
    if not effects:
        return [*lines, "No effects: some cell has no finished trial, so that the levels are not alike in the others."]
    first = next(iter(marginals[0].levels.values()))
    what = (
        f"effect: what the level changes in validation accuracy, against {first}"
        if len(marginals[0].levels) == 1
        else "interaction: what one change of level adds to the other, in validation accuracy"
    )
    lines.append(
        f"{what}; paired by seed, verdicts with Holm's correction for {len(effects)}, equivalent within "
        f"{directory.study.margin:g} points."
    )
    if any(one.further_seeds for one in effects):
        lines.append(FURTHER)
    reasons = dict.fromkeys(
        ("No verdict" if one.verdict == "undecided" else one.verdict, one.reason) for one in effects
    )
    lines += [f"{verdict.capitalize()}: {reason}." for verdict, reason in reasons if reason]
    if race := directory.plan.race:
        lines.append(f"Of the race only the first {race.first} seeds count, as these were fixed beforehand.")
    return lines


def peek_columns(rows: Sequence[Row], peeks: Sequence[Peek | None]) -> list[dict[str, object]]:
    """What the habit of picking the best epoch and seed would have claimed for each row."""
    several = len({row.study for row in rows}) > 1
    return [
        ({"study": row.study} if several else {})
        | {
            "cell": row_name(row),
            "n": len(row.records) if len(row.records) == row.seeds else f"{len(row.records)}/{row.seeds}",
            "last epoch": found and Points(found.last),
            "best epoch": found and Points(found.best_epoch),
            "best seed and epoch": found and Points(found.best),
            "flatters by": found and Points(found.gain),
        }
        for row, found in zip(rows, peeks)
    ]


PEEK_NOTES = [
    "Validation accuracy in percent, as measured after each epoch, in the arithmetic of training: mean over seeds "
    "after the last one, mean over seeds at the best one of each, and the best seed at its best epoch.",
    "The test split is read once, after the last step, so these are curves of the validation split: they show by how "
    "much the habit of reading the test split after each epoch and reporting its best would flatter, without doing it.",
]


def comparison_columns(one: Comparison) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """A comparison as two tables: by split, and by seed. A is the first row, B the second."""
    splits = []
    for title, split in (("validation (decides)", one.validation), ("test", one.test)):
        contrast = split.contrast
        low, high = split.bootstrap or (None, None)
        splits.append(
            {
                "accuracy in points": title,
                "A - B": Points(contrast.mean) if contrast.n else None,
                "t low": None if contrast.low is None else Points(contrast.low),
                "t high": None if contrast.high is None else Points(contrast.high),
                "bootstrap low": None if low is None else Points(low),
                "bootstrap high": None if high is None else Points(high),
                "p": contrast.p,
            }
        )
    seeds = []
    for seed in one.seeds:
        values: dict[str, object] = {"seed": seed}
        for name, value in (("val", on_validation), ("test", on_test)):
            a, b = (row.by_seed(value).get(seed) for row in (one.first, one.second))
            values |= {f"{name} A": None if a is None else Points(a), f"{name} B": None if b is None else Points(b)}
            values[f"{name} A - B"] = None if a is None or b is None else Points(a - b)
        if one.mcnemar:
            found = one.mcnemar.get(seed)
            values |= {
                "only A right": found and found.only_first,
                "only B right": found and found.only_second,
                "McNemar p": found and found.exact_p,
            }
        seeds.append(values)
    return splits, seeds


def comparison_notes(one: Comparison, margin: float) -> list[str]:
    judgement = one.judgement
    verdict = {
        "better": "A is better than B",
        "worse": "A is worse than B",
        "equivalent": "A and B are equivalent",
        "undecided": "undecided",
    }[judgement.verdict]
    lines = [f"Verdict, on validation: {verdict}{f' ({judgement.reason})' if judgement.reason else ''}."]
    if judgement.further_seeds:
        lines.append(f"About {judgement.further_seeds:,.0f} further seeds would decide it.")
    pairing = "paired by seed" if one.validation.contrast.paired else "unpaired, as fewer than two seeds are common"
    lines.append(f"{pairing[0].upper()}{pairing[1:]}; margin of equivalence {margin:g} points; 95% intervals.")
    if one.validation.contrast.left_out:
        lines.append(
            f"Without the seeds {', '.join(map(str, one.validation.contrast.left_out))}: one of both lacks them."
        )
    if one.validation.contrast.low is not None and one.validation.bootstrap is None:
        lines.append("No bootstrap interval: it needs four seeds in common.")
    if one.mcnemar:
        lines.append("McNemar's exact p, of the test images: it speaks of these two networks, not of the cells.")
    elif one.first.records and one.second.records:
        lines.append("No McNemar test: the predictions of these trials were not kept.")
    lines += [f"Failed: {trial}: {why}" for row in (one.first, one.second) for trial, why in row.failures.items()]
    return lines


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in counts.items())


def _where(record: Record) -> str:
    here = record.environment
    number = "bf16" if record.bfloat16 else "fp32"
    return (
        f"{here.device}, {here.threads} threads, {number}, torch {here.versions.get('torch', 'of an unknown version')}"
    )


def check_format(format: str) -> None:
    """Raises InputError for a format that tables do not have."""
    if format not in FORMATS:
        raise unknown("format", format, FORMATS)


def render(table: Sequence[dict[str, object]], format: Format, notes: Sequence[str] = ()) -> str:
    """A table as text; notes go under it in the formats that people read. Raises InputError for an empty table.

    In `csv` and `json` numbers are unrounded, an interval is two of them, its mean and half its width, and a verdict
    has its difference and p-values with it.
    """
    if not table:
        raise InputError("there is nothing to show: the study has no cells")
    if format == "json":
        return json.dumps([{title: _plain(value) for title, value in row.items()} for row in table], indent=1)
    if format == "csv":
        file = io.StringIO()
        flat = [dict(pair for title, value in row.items() for pair in _flat(title, value)) for row in table]
        writer = csv.DictWriter(file, list(dict.fromkeys(title for row in flat for title in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(flat)
        return file.getvalue().rstrip("\n")
    plus_minus = "+-" if format == "latex" else "±"
    cells = [[shown(value, plus_minus) for value in row.values()] for row in table]
    styles = {"text": "simple", "github": "github", "latex": "latex_booktabs"}
    numeric = [all(isinstance(row[title], int | float | Interval | None) for row in table) for title in table[0]]
    align = ["right" if is_number else "left" for is_number in numeric]
    text = tabulate(cells, headers=list(table[0]), tablefmt=styles[format], colalign=align, disable_numparse=True)
    if format == "latex":
        text = text.replace(" +- ", r" $\pm$ ")
        return "\n".join([text, *(f"% {note}" for note in notes)])
    return "\n".join(
        [text, *([""] if notes else []), *((f"- {note}" if format == "github" else note) for note in notes)]
    )


def _plain(value: object) -> object:
    match value:
        case Interval():
            return value._asdict()
        case Judgement():
            return asdict(value)
    return value


def _flat(title: str, value: object) -> list[tuple[str, object]]:
    if isinstance(value, Interval):
        return [(title, value.mean), (f"{title} ±", value.half_width)]
    if isinstance(value, Judgement):
        fields = ("mean", "low", "high", "p", "p_equivalence", "seeds", "paired", "further_seeds", "reason")
        return [(title, value.verdict), *((f"{title} {field}", getattr(value, field)) for field in fields)]
    return [(title, value)]


def shown(value: object, plus_minus: str = "±") -> str:
    """A value as a table shows it."""
    match value:
        case None:
            return ""
        case Interval(mean, None):
            return f"{mean:.2f}"
        case Interval(mean, half_width):
            return f"{mean:.2f} {plus_minus} {half_width:.2f}"
        case Judgement():
            return value.verdict + (f" (+{value.further_seeds:,.0f})" if value.further_seeds else "")
        case Points():
            return f"{value:.2f}"
        case int():
            return f"{value:,}"
        case float():
            return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 10 else f"{value:.1f}"
    return str(value)
