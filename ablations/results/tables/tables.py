"""The tables of a study: what `evidence` found, as titled values with notes. `rendering` makes text of them."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from expertgrid.ablations.records.directory import StudyDirectory
from expertgrid.ablations.records.record import Record
from expertgrid.ablations.results.answer import answer
from expertgrid.ablations.results.evidence import EXPECTED_ACCURACY, Effect, Evidence, Marginal, Sight, TwoCells
from expertgrid.ablations.results.rows import (
    Results,
    Row,
    best_record,
    best_row,
    common_scores,
    complete,
    latency_front,
    on_test,
    on_validation,
    peek,
    smallest,
    timed_together,
    winner,
)
from expertgrid.ablations.results.stats.contrasts import NONE, OPEN, Judgement
from expertgrid.ablations.results.stats.selection import accuracy_interval
from expertgrid.ablations.results.verdict import Verdict
from expertgrid.ablations.study.cells import EACH_LEVEL
from expertgrid.model.system.text import (
    Measured,
    Points,
    Signed,
    Span,
    Table,
    Times,
    render_tables,
    shown,
)

PARTS = {2: "half", 3: "third", 4: "quarter", 5: "fifth", 8: "eighth", 10: "tenth", 20: "twentieth"}
MOST_NAMED = 5  # cells or trials in a note
FIRST_NAMED = 3  # of more than these; the others are counted
_ACCURACIES: dict[str, Callable[[Record], float]] = {"val acc %": on_validation, "test acc %": on_test}

_FLIP_ACCURACIES: dict[str, Callable[[Record], float | None]] = {  # beside the plain ones, where they were measured
    "val acc % with flip TTA": lambda record: record.validation_accuracy_flip,
    "test acc % with flip TTA": lambda record: record.test_accuracy_flip,
}


def study_tables(directory: StudyDirectory, evidence: Evidence) -> list[Table]:
    """All tables of a study: what each factor does, cells, interactions that are decided, declared contrasts."""
    found = [factor_table(evidence)] if evidence.effects else []
    found.append(cell_table(directory, evidence))
    if evidence.decided_interactions:
        found.insert(1, interaction_table(evidence))
    if evidence.declared:
        found.insert(len(found) - 1, contrast_table(evidence))
    return found


def study_text(directory: StudyDirectory, evidence: Evidence) -> str:
    """A study for a terminal: its question, its tables, and the answer last."""
    tables = render_tables(study_tables(directory, evidence), "text")
    return f"{evidence.results.study.question}\n\n{tables}\n\n{answer(evidence)}"


# --- What each factor does ---


def factor_table(evidence: Evidence) -> Table:
    """The main effects: the first family."""
    rows = [_effect_row(evidence, effect) for effect in evidence.effects]
    return Table(
        "factors", f"What each factor does ({_about(evidence)})", _without_empty(rows), _factor_notes(evidence)
    )


def _effect_row(evidence: Evidence, effect: Effect) -> dict[str, object]:
    values: dict[str, object] = {"factor": effect.factor, "change": effect.change}
    values |= _judged(evidence, effect.judgement)
    costs = ("parameters", "MACs", "training time", "latency")
    return values | {name: Times(effect.cost[name]) if name in effect.cost else None for name in costs}


def _judged(evidence: Evidence, judgement: Judgement | None) -> dict[str, object]:
    """Effect, interval and verdict. The interval that is shown is the one that decides."""
    if judgement is None:
        return {"effect": None, "95% interval": None, "verdict": None}
    return {
        "effect": None if judgement.mean is None else Signed(judgement.mean),
        "95% interval": None
        if judgement.low is None or judgement.high is None
        else Span(judgement.low, judgement.high),
        "verdict": Verdict(judgement, evidence.fixed_split),
    }


def _without_empty(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """The rows without costs that no row has."""
    titles = [title for title in rows[0] if any(row[title] is not None for row in rows)] if rows else []
    kept = ["factor", "change", "effect", "95% interval", "verdict"]
    return [{title: value for title, value in row.items() if title in titles or title in kept} for row in rows]


def _about(evidence: Evidence) -> str:
    plan = evidence.results.plan
    if plan.race:
        return f"validation accuracy, points; a race from {plan.race.first} to {plan.race.last} seeds"
    counts = sorted({judgement.seeds for judgement in evidence.judgements if judgement.seeds})
    counts = counts or [evidence.results.study.seeds]
    seeds = f"{counts[0]} to {counts[-1]} seeds" if len(counts) > 1 else _count(counts[0], "seed")
    part = PARTS.get(plan.hold_out.parts, f"{plan.hold_out.parts}th")
    where = f"all on the same {part}" if evidence.fixed_split else f"each on its own {part}"
    return f"validation accuracy, points; {seeds}, {where} of the images"


def _factor_notes(evidence: Evidence) -> list[str]:
    lines = _verdict_notes(evidence)
    if any(effect.cost for effect in evidence.effects):
        lines.append("Costs: after the change over before, the geometric mean over the cells that differ in it alone.")
    families = ["the main effects (this table)", "the cells against the base"]
    families += ["the declared contrasts"] if evidence.declared else []
    lines.append(f"Families, declared before training: {', '.join(families)}. Everything else is exploratory.")
    needed = {
        f"{effect.name}: about {effect.seeds_to_decide} seeds"
        for effect in evidence.effects
        if effect.seeds_to_decide is not None
    }
    if needed:
        lines.append(f"To decide what is open: {_some(sorted(needed), '; ')}.")
    if evidence.sight:
        lines.append(sight_line(evidence.sight))
    lines += _reasons((effect.name, effect.judgement) for effect in evidence.effects)
    return lines


def _verdict_notes(evidence: Evidence) -> list[str]:
    """What the words mean, and how often such a table is wrong."""
    lines = [
        "better, worse: the whole interval is on one side of 0. same: the interval lies within "
        f'{evidence.margin:g} points. open: not decided; this is not "no difference".'
    ]
    if evidence.fixed_split:
        lines.append("All seeds hold out the same images: each verdict is about this split of the images.")
    lines += _error_notes(evidence)
    bases = {judgement.basis for judgement in evidence.judgements if judgement.basis}
    if "t over seeds" in bases:
        lines.append("2 seeds: some intervals are Student's t over seeds, as the spread of their cells is not known.")
    return lines


def _error_notes(evidence: Evidence) -> list[str]:
    plan, results = evidence.results.plan, evidence.results
    lines = []
    if evidence.added_seeds:
        lines.append('Seeds were added after results were seen: the "1 in 20" does not hold.')
    elif evidence.seen:
        lines.append('Results of these seeds were seen before the study was made: the "1 in 20" does not hold.')
    elif results.unfinished and evidence.decided:
        lines.append(
            f"{_count(len(results.unfinished), 'trial')} not finished: the verdicts are not final, and the "
            '"1 in 20" does not hold yet.'
        )
    elif evidence.decided:
        repeated = "new seeds on this split of the images" if evidence.fixed_split else "new seeds and new images"
        lines.append(
            f"If this study were repeated with {repeated}, at most 1 such table in 20 would hold a wrong verdict."
        )
    if plan.race:
        lines.append(
            f"A race: seeds are added until each contrast is decided; its intervals pay for a look after each seed "
            f"from {plan.race.first} to {plan.race.last}."
        )
        if plan.race.seen:
            lines.append(f"The race was begun after results of {plan.race.seen} trials were seen.")
    return lines


def _reasons(judged: Iterable[tuple[str, Judgement]]) -> list[str]:
    """A line for each reason, with what it is of."""
    found: dict[str, list[str]] = {}
    for name, judgement in judged:
        if judgement.reason:
            word = "No verdict" if judgement.verdict == NONE else judgement.verdict.capitalize()
            found.setdefault(f"{word}: {{}}: {judgement.reason}.", []).append(name)
    return [line.replace("{}", _some(names, "; "), 1) for line, names in found.items()]


def sight_line(sight: Sight) -> str:
    """What a study can see, and how many seeds other differences would need."""
    smaller = [difference for difference in sight.needed if difference < sight.smallest]
    needed = [f"for {difference:g} points: {_about_seeds(sight.needed[difference])}" for difference in sorted(smaller)]
    return f"This study can see effects from about {sight.smallest:.2g} points; {'; '.join(needed)}."


def plan_lines(sight: Sight | None) -> list[str]:
    """For a study that is planned: what it can see, by which spread, and how many seeds differences need."""
    if sight is None:
        return ["One seed or one network has no verdicts."]
    how = (
        f"the seeds of the records that are there spread by {sight.spread:.2g} points"
        if sight.measured
        else f"a spread of {sight.spread:.2g} points, which finite images alone give networks of "
        f"{EXPECTED_ACCURACY:g}% accuracy"
    )
    needed = [f"{difference:g} points: {_about_seeds(count)}" for difference, count in sorted(sight.needed.items())]
    return [
        f"With {sight.seeds} seeds this study can see effects from about {sight.smallest:.2g} points (probability 80%, "
        f"{how}).",
        f"Seeds that a difference needs: {'; '.join(needed)}.",
    ]


def _about_seeds(count: int | None) -> str:
    return "more than 1,000 seeds" if count is None else f"about {_count(count, 'seed')}"


def interaction_table(evidence: Evidence) -> Table:
    """The interactions that are decided: an exploratory family."""
    rows = [
        {"factors": effect.factor, "changes": effect.change, **_judged(evidence, effect.judgement)}
        for effect in evidence.decided_interactions
    ]
    notes = [
        f"{len(rows)} of {_count(len(evidence.interactions), 'interaction')} decided: what one change adds to the "
        "other. Exploratory: not declared before training.",
    ]
    return Table("interactions", "Interactions that are decided (points)", rows, notes)


def contrast_table(evidence: Evidence) -> Table:
    """The contrasts that the study declared."""
    rows = [
        {"cell": found.first.name, "against": found.second.name, **_judged(evidence, found.judgement)}
        for found in evidence.declared
    ]
    judged = [(f"{found.first.name} against {found.second.name}", found.judgement) for found in evidence.declared]
    return Table("contrasts", "Contrasts that the study declares (points)", rows, _reasons(judged))


# --- Cells ---


def cell_table(directory: StudyDirectory, evidence: Evidence) -> Table:
    """The cells with their scores and costs, each against the base: the second family."""
    results = evidence.results
    base = results.base.name if results.base else ""
    title = f"Cells, against {base}" if any(evidence.against_base) else "Cells"
    lines = []
    if any(evidence.against_base):
        lines += [] if evidence.effects else _verdict_notes(evidence)
        if not evidence.effects and evidence.sight:
            lines.append(sight_line(evidence.sight))
        named = [(row.name, judgement) for row, judgement in zip(results.rows, evidence.against_base)]
        lines += _reasons([(name, judgement) for name, judgement in named if judgement])
    return Table("cells", title, columns(results.rows, evidence), lines + notes(directory, results))


def columns(rows: Sequence[Row], evidence: Evidence | None = None) -> list[dict[str, object]]:
    """The rows as titled values. Columns that would be empty or alike are left out.

    With `evidence`, of which these are the rows, each row has its difference from the base and the verdict.
    """
    factors = list(dict.fromkeys(name for row in rows for name in row.levels))
    names = {row.model for row in rows}
    named = "model" in factors or (len(names) > 1 and any(row.model not in row.levels.values() for row in rows))
    against = evidence.against_base if evidence else []
    judged = any(judgement and judgement.low is not None for judgement in against) or any(
        judgement and judgement.verdict == NONE for judgement in against
    )
    front = latency_front(rows)
    table = []
    for place, row in enumerate(rows):
        first = row.records[0] if row.by_seed else None
        values: dict[str, object] = {"study": row.study} if len({row.study for row in rows}) > 1 else {}
        values |= {"model": row.model} if named else {}
        values |= {name: row.levels.get(name, "") for name in factors if name != "model" or row.levels}
        values["n"] = len(row.by_seed) if len(row.by_seed) == row.seeds else f"{len(row.by_seed)}/{row.seeds}"
        values |= {title: row.accuracy(value) for title, value in _ACCURACIES.items()}
        for title, value in _FLIP_ACCURACIES.items():
            if any(value(record) is not None for other in rows for record in other.records):
                there = [found for record in row.records if (found := value(record)) is not None]
                values[title] = accuracy_interval([100 * share for share in there]) if there else None
        if evidence and judged:
            values |= _judged(evidence, against[place])
        if any(row.reported for row in rows):
            values["reported %"] = row.reported
        values["params"] = first.parameters if first else None
        values["MACs"] = first.macs if first else None
        values["train images/s"] = training_rate(row)
        if any(row.latency for row in rows):
            values["latency ms"] = latency_ms(row)
        if front:
            values["front"] = "yes" if row in front else ""
        table.append(values)
    return table


def latency_ms(row: Row) -> Measured | float | None:
    """The median latency of one of its trials, with its interval where the record has one."""
    if row.latency is None:
        return None
    found = smallest(row.latency)
    ends = found.intervals_ms.get("p50")
    return Measured(found.p50_ms, *ends) if ends else found.p50_ms


def training_rate(row: Row) -> float | None:
    """Images/s in training: measured alone where that was done, else of the trials that were trained one at a time."""
    if row.alone is not None or not row.by_seed or row.packed:
        return row.alone
    return row.mean(lambda record: record.images_per_s)


def notes(directory: StudyDirectory, results: Results) -> list[str]:
    """What a reader needs to know of the cells, a line each."""
    plan, rows = results.plan, results.rows
    lines = [f"Data: {plan.data}."]
    intervals = "in brackets the 95% interval of the mean over seeds (Student's t)"
    if any(len(row.by_seed) == 1 for row in rows):
        intervals += "; one seed has no interval"
    several = [row.accuracy(value) for row in rows if len(row.by_seed) > 1 for value in _ACCURACIES.values()]
    if any(found and found.low is None for found in several):
        intervals += "; seeds that all agree have none, as their spread is unknown"
    lines.append(f"n: seeds; {intervals}.")
    if any("base" in row.levels.values() for row in rows):
        base = results.study.base
        lines.append(f"base: {base.model} with the recipe {base.recipe} and the study's settings.")
    if any(EACH_LEVEL in row.levels.values() for row in rows):
        lines.append(f"{EACH_LEVEL}: the network is the same at each level of this factor, and was trained once.")
    if any(row.control for row in rows):
        lines.append(
            "base again: the base trained from other seeds on the same hold-outs. It should come out the same."
        )
    lines += _best_notes(rows)
    if results.timed and any(row.alone for row in rows):
        lines.append(f"Train images/s: each cell alone and in turns at full image size, on {results.timed}.")
    elif any(row.packed for row in rows):
        lines.append("Train images/s: none, as trials were trained at once; `expertgrid bench-train` measures them.")
    environments = dict.fromkeys(_where(record) for row in rows for record in row.records)
    lines += [f"Trained on {where}." for where in environments]
    adopted = {trial: taken.directory for row in rows for trial, taken in row.adopted.items()}
    if adopted:
        lines.append(f"Taken over from {_some(sorted(set(adopted.values())))}: {_count(len(adopted), 'trial')}.")
    lines += _test_read_notes(directory)
    how: dict[str, list[str]] = {}
    for latency in (row.latency for row in rows if row.latency):
        threads = _count(latency.threads, "thread")
        found = smallest(latency)
        engine = "ONNX Runtime" if found.kind == "onnxruntime" else found.engine
        of = f"{latency.cells} cells in turns" if latency.cells else latency.file
        where = f"{engine} at batch {found.batch}, {latency.provider}, {threads}, of {of}, {latency.finished}"
        how.setdefault(where, []).append(latency.trial)
    for where, trials in how.items():
        of = f" (trial {_some(trials)})" if len(how) > 1 else ""
        lines.append(f"Latency: median of {where}{of}.")
    if timed := timed_together(rows):
        lines.append(
            f"front: no other of the {len(timed)} cells that were timed together is as fast and better on validation. "
            "It goes by means, whether or not the differences are decided."
        )
    if missing := results.unfinished:
        lines.append(f"Not finished: {len(missing)} of the trials: {_some(missing)}.")
    if failures := {trial: failure for row in rows for trial, failure in row.failures.items()}:
        counts: Counter[str] = Counter(failure.kind for failure in failures.values())
        lines.append(f"Failed: {len(failures)} of the trials ({_counted(counts)}).")
        lines += [f"Failed: {trial}: {failure}" for trial, failure in failures.items()]
    return lines


def _best_notes(rows: Sequence[Row]) -> list[str]:
    """Which row is the best on validation, and what its test score is worth."""
    best = best_row(rows)
    if best is None:
        return []
    lines = [f"Best on validation: {best.name}, trial {best_record(best).trial}."]
    found, among = winner(rows), [row for row in complete(rows) if not row.control]
    if found is None or found.corrected is None or found.agreement is None or len(among) < 2:
        return lines
    seeds = len(common_scores(among)[0])
    on = f" on the {seeds} seeds that all cells have" if seeds < len(best.by_seed) else ""
    lines.append(
        f"Its test accuracy{on}: {shown(found.reported)}. Corrected for selection as the best of {len(among)}: "
        f"{shown(found.corrected)}. (Each seed is read for the cell that is best on the other seeds: this cell for "
        f"{round(found.agreement * seeds)} of {seeds} seeds.)"
    )
    return lines


def _test_read_notes(directory: StudyDirectory) -> list[str]:
    reads = directory.test_reads()
    readers = Counter(read.reader for read in reads)
    again = f", {readers['rerun']} by trials that were trained again" if readers["rerun"] else ""
    lines = [
        f"Reads of the test split: {readers.total()} ({readers['training']} at the end of a training, "
        f"{readers['export']} to certify an export{again})."
    ]
    if flips := sum(read.tta == "flip" for read in reads):
        lines.append(
            f"Flip TTA: logits averaged over each image and its mirror image; {flips} of these reads predicted both."
        )
    return lines


# --- By factor, by epoch, and two cells ---


def factor_levels(evidence: Evidence, marginals: Sequence[Marginal]) -> Table:
    """The levels of a factor, or of two, with their means and effects."""
    two = len(marginals[0].levels) > 1
    judged = any(marginal.effect for marginal in marginals)
    rows = []
    for marginal in marginals:
        values: dict[str, object] = {**marginal.levels, "cells": marginal.cells, "n": marginal.seeds}
        values |= {"val acc %": marginal.validation, "test acc %": marginal.test}
        if judged:
            judgement = marginal.effect.judgement if marginal.effect else None
            verdict = _judged(evidence, judgement)
            rows.append(values | ({"interaction": verdict.pop("effect")} if two else {}) | verdict)
        else:
            rows.append(values)
    lines = ["Means over the networks of each level, for each seed; in brackets the 95% interval over seeds."]
    if not judged:
        lines.append("No effects: no two networks differ in this alone.")
    elif two:
        lines.append("interaction: what one change of level adds to the other. Exploratory: not declared.")
    else:
        lines.append("effect: over the cells that differ in this factor alone, one of the study's main effects.")
    if judged:
        lines += [*_verdict_notes(evidence)] if not two else []
        effects = [marginal.effect for marginal in marginals if marginal.effect]
        lines += _reasons([(effect.name, effect.judgement) for effect in effects])
    return Table("levels", f"By {' and '.join(marginals[0].levels)}", rows, lines)


def peek_table(directory: StudyDirectory, results: Results) -> Table:
    """What the habit of picking the best epoch and seed would have claimed for each row."""
    rows: list[dict[str, object]] = []
    for row in results.rows:
        found = peek(directory, row)
        rows.append(
            {
                "cell": row.name,
                "n": len(row.by_seed) if len(row.by_seed) == row.seeds else f"{len(row.by_seed)}/{row.seeds}",
                "last epoch": found and Points(found.last),
                "best epoch": found and Points(found.best_epoch),
                "best seed and epoch": found and Points(found.best),
                "flatters by": found and Points(found.gain),
            }
        )
    return Table("peek", "What picking the best epoch and seed would claim", rows, PEEK_NOTES)


PEEK_NOTES = [
    "Validation accuracy in percent, as measured after each epoch in the arithmetic of training: mean over seeds after "
    "the last epoch, mean over seeds at the best epoch of each, and the best seed at its best epoch.",
    "The test split is read once, after the last step. So these are curves of the validation split: they show by how "
    "much reading the test split after each epoch and reporting its best would flatter, without doing it.",
]


def comparison_tables(evidence: Evidence, found: TwoCells) -> list[Table]:
    """Two cells in full, by split and by seed. A is the first, B the second."""
    comparison = found.comparison
    first, second = comparison.first, comparison.second
    splits = []
    for split, judgement in (("validation (decides)", comparison.judgement), ("test", comparison.test)):
        values = {"accuracy in points": split, **_judged(evidence, judgement)}
        values["A - B"] = values.pop("effect")
        verdict = values.pop("verdict")
        splits.append({**values, "verdict": verdict if judgement is comparison.judgement else None})
    seeds = []
    for seed in found.seeds:
        values: dict[str, object] = {"seed": seed}
        for name, value in (("val", on_validation), ("test", on_test)):
            a, b = (value(row.by_seed[seed]) if seed in row.by_seed else None for row in (first, second))
            values |= {f"{name} A": None if a is None else Points(a), f"{name} B": None if b is None else Points(b)}
            values[f"{name} A - B"] = None if a is None or b is None else Signed(a - b)
        if found.mcnemar:
            test = found.mcnemar.get(seed)
            values |= {
                "only A right": test and test.only_first,
                "only B right": test and test.only_second,
                "McNemar p": test and test.exact_p,
            }
        seeds.append(values)
    title = f"A: {first.name}\nB: {second.name}"
    return [Table("splits", title, splits), Table("seeds", "By seed", seeds, comparison_notes(evidence, found))]


def comparison_notes(evidence: Evidence, found: TwoCells) -> list[str]:
    comparison = found.comparison
    lines = []
    if not comparison.declared:
        lines.append(
            "Chosen after seeing the table: read this as a suggestion and test it on new seeds (--first-seed "
            f"{evidence.results.next_seed})."
        )
    lines += _verdict_notes(evidence)[:1]
    if evidence.fixed_split:
        lines.append("All seeds hold out the same images: the verdict is about this split of the images.")
    if comparison.judgement.verdict == OPEN and comparison.seeds_to_decide is not None:
        lines.append(f"About {comparison.seeds_to_decide} seeds would decide it.")
    lines += _reasons([("A against B", comparison.judgement)])
    if found.mcnemar:
        lines.append("McNemar's exact p, of the test images: it is about these two networks, not about the cells.")
    elif comparison.first.by_seed and comparison.second.by_seed:
        lines.append("No McNemar test: the predictions of these trials were not kept.")
    rows = (comparison.first, comparison.second)
    return lines + [f"Failed: {trial}: {why}" for row in rows for trial, why in row.failures.items()]


def _count(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _some(names: Sequence[str], separator: str = ", ") -> str:
    """Names in a note: of more than `MOST_NAMED` the first `FIRST_NAMED`, and how many more there are."""
    if len(names) <= MOST_NAMED:
        return separator.join(names)
    return f"{separator.join(names[:FIRST_NAMED])} and {len(names) - FIRST_NAMED:,} more"


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in counts.items())


def _where(record: Record) -> str:
    here = record.environment
    number = "bf16" if record.bfloat16 else "fp32"
    torch = f"torch {here.versions.get('torch', 'of an unknown version')}"
    return f"{here.device}, {_count(here.threads, 'thread')}, {number}, {torch}"
