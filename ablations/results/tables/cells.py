"""The tables of a study's cells: their scores and costs, what optimistic picks would claim, and two of them in full."""

from collections.abc import Callable, Sequence

import numpy as np

from expertgrid.ablations.records.directory import StudyDirectory
from expertgrid.ablations.records.record import Record, Split
from expertgrid.ablations.results.comparison import TwoCells
from expertgrid.ablations.results.evidence import Evidence
from expertgrid.ablations.results.rows import Results, Row, latency_front, peek, smallest
from expertgrid.ablations.results.stats.contrasts import NONE
from expertgrid.ablations.results.stats.selection import accuracy_interval
from expertgrid.ablations.results.tables.description import describe
from expertgrid.ablations.results.tables.effects import judged
from expertgrid.ablations.results.tables.notes import (
    cell_notes,
    comparison_notes,
    reasons,
    sight_line,
    verdict_notes,
)
from expertgrid.ablations.study.levels import level_name
from expertgrid.model.system.text import Measured, Points, Signed, Table, Typed, rounded

HEADS: dict[str, Split] = {"val": "validation", "test": "test"}  # of columns
FLIP_ACCURACIES: dict[str, Callable[[Record], float | None]] = {  # beside the plain ones, where they were measured
    "val acc % with flip TTA": lambda record: record.validation_accuracy_flip,
    "test acc % with flip TTA": lambda record: record.test_accuracy_flip,
}


def cell_table(directory: StudyDirectory, evidence: Evidence) -> Table:
    """The cells with their scores and costs, each against the base: the second family."""
    results, notes = evidence.results, cell_notes(directory, evidence)
    title = "Cells"
    if any(evidence.against_base):
        title = f"Cells, against {results.rows[0].name}"
        notes = reasons((row.name, judgement) for row, judgement in zip(results.rows, evidence.against_base)) + notes
        if not evidence.effects:
            sight = [sight_line(evidence.sight, evidence.scale)] if evidence.sight else []
            notes = verdict_notes(evidence) + notes + sight
    falls = ["train images/s", "params", *FLIP_ACCURACIES, f"test {evidence.scale.column}", "MACs", "95% interval", "n"]
    return Table("cells", title, columns(results.rows, evidence), notes, describe(directory, results), falls)


def columns(rows: Sequence[Row], evidence: Evidence | None = None) -> list[dict[str, object]]:
    """The rows as titled values. Columns that would be empty or alike are left out.

    With `evidence`, of which these are the rows, each row has its difference from the base and the verdict.
    """
    factors = list(dict.fromkeys(name for row in rows for name in row.levels))
    names = {row.model for row in rows}
    named = "model" in factors or (len(names) > 1 and any(row.model not in row.levels.values() for row in rows))
    against = evidence.against_base if evidence else []
    has_verdicts = any(judgement and (judgement.low is not None or judgement.verdict == NONE) for judgement in against)
    front, records = latency_front(rows), [record for row in rows for record in row.records]
    flips = {title: of for title, of in FLIP_ACCURACIES.items() if any(of(record) is not None for record in records)}
    table = []
    for place, row in enumerate(rows):
        first = row.records[0] if row.by_seed else None
        values: dict[str, object] = {"model": row.model} if named else {}
        values |= {name: _level(row, name) for name in factors if name != "model" or row.levels}
        values["n"] = _seeds(row)
        values |= {f"{head} {row.scale.column}": row.interval(split) for head, split in HEADS.items()}
        for title, value in flips.items():
            shares = [share for record in row.records if (share := value(record)) is not None]
            values[title] = accuracy_interval([100 * share for share in shares]) if shares else None
        if evidence and has_verdicts:
            values |= judged(evidence, against[place])
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


def _level(row: Row, factor: str) -> str:
    """A level of its own type in JSON; as text where the row has several, or each."""
    text, levels = row.levels.get(factor, ""), [cell.levels[factor] for cell in row.cells if cell.levels]
    return next((Typed(text, level) for level in levels if level_name(level) == text), text)


def latency_ms(row: Row) -> Measured | float | None:
    """The median latency of one of its trials, with its interval where the record has one."""
    if row.latency is None:
        return None
    timed = smallest(row.latency)
    ends = timed.intervals_ms.get("p50")
    return Measured(timed.p50_ms, *ends) if ends else timed.p50_ms


def _seeds(row: Row) -> int | str:
    """The seeds that are finished, and of how many, where some are not."""
    return len(row.by_seed) if len(row.by_seed) == row.seeds else f"{len(row.by_seed)}/{row.seeds}"


def training_rate(row: Row) -> float | None:
    """Images/s in training: measured alone where that was done, else of the trials that were trained one at a time."""
    if row.alone is not None or not row.by_seed or row.packed:
        return row.alone
    return float(np.mean([record.images_per_s for record in row.records]))


def peek_table(directory: StudyDirectory, results: Results) -> Table:
    """What the habit of picking the best epoch and seed would have claimed for each row."""
    rows: list[dict[str, object]] = []
    for row in results.rows:
        peeked = peek(directory, row)
        rows.append(
            {
                "cell": row.name,
                "n": _seeds(row),
                "last epoch": peeked and Points(peeked.last),
                "best epoch": peeked and Points(peeked.best_epoch),
                "best seed and epoch": peeked and Points(peeked.best),
                "flatters by": peeked and Points(peeked.gain),
            }
        )
    return Table("peek", "What picking the best epoch and seed would claim", rows, PEEK_NOTES)


PEEK_NOTES = [
    "Validation accuracy in percent, as measured after each epoch in the arithmetic of training: mean over seeds after "
    "the last epoch, mean over seeds at the best epoch of each, and the best seed at its best epoch.",
    "The test split is read once, after the last step. So these are curves of the validation split: they show by how "
    "much reading the test split after each epoch and reporting its best would flatter, without doing it.",
]


def comparison_tables(evidence: Evidence, two: TwoCells) -> list[Table]:
    """Two cells in full, by split and by seed. A is the first, B the second."""
    first, second, by = two.comparison.first, two.comparison.second, evidence.scale
    what = f"{by.title} in points" if by.points else by.title
    splits = [
        {what: "validation (decides)", **judged(evidence, two.comparison.judgement, "A - B")},
        {what: "test", **judged(evidence, two.comparison.test, "A - B"), "verdict": None},
    ]
    seeds = []
    for seed in two.seeds:
        values: dict[str, object] = {"seed": seed}
        for name, split in HEADS.items():
            a, b = (row.by_seed[seed].score(split, by) if seed in row.by_seed else None for row in (first, second))
            values |= {
                f"{name} {which}": x if x is None else rounded(Points(x), by.decimals) for which, x in zip("AB", (a, b))
            }
            values[f"{name} A - B"] = None if a is None or b is None else rounded(Signed(a - b), by.decimals)
        if two.mcnemar:
            test = two.mcnemar.get(seed)
            values |= {
                "only A right": test and test.only_first,
                "only B right": test and test.only_second,
                "McNemar p": test and test.exact_p,
            }
        seeds.append(values)
    title = f"A: {first.name}\nB: {second.name}"
    return [Table("splits", title, splits), Table("seeds", "By seed", seeds, comparison_notes(evidence, two))]
