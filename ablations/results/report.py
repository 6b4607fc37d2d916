"""A study's report: what `findings` has found as one HTML file that needs nothing else, or as figures for a paper."""

import base64
import hashlib
import io
import json
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import jinja2
import numpy as np
from PIL import Image

from ablations.records import StudyDirectory
from ablations.results import plots, tables
from ablations.results.evidence import (
    Judgement,
    Marginal,
    Row,
    complete,
    measured,
    on_test,
    on_validation,
    row_name,
    winner,
)
from ablations.results.findings import MOST_CURVES, Findings, Mistake, pareto
from ablations.results.stats import Interval
from ablations.results.tables import shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Format = Literal["html", "pdf-figures", "png-figures"]
FORMATS = get_args(Format)

MOST_ROWS = 24  # cells in a figure
MOST_EFFECTS = 24  # in a figure
MOST_GATES = 12  # blocks whose heat maps are drawn
MOST_CONFUSIONS = 12


@dataclass(frozen=True)
class Picture:
    """A figure with the words for those who don't see it, and those under it."""

    name: str  # of its file
    draw: Callable[[], "Figure"]
    alt: str
    caption: str
    wide: bool = True

    @property
    def uri(self) -> str:
        return _uri(plots.save(self.draw(), "svg"), "svg+xml")


def _uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


# --- What it says ---


def answer(found: Findings) -> list[str]:
    """The answer to the study's question in sentences, of which the first is the answer. No more than was found."""
    best, margin = found.best, found.study.margin
    if best is None:
        return ["No trial is finished, so there is no answer yet."]
    seeds = len(best.records)
    over = f"over {seeds} seeds" if seeds > 1 else "with one seed"
    ranked = f"{row_name(best)}: {shown(best.interval(on_validation))}% {over}"
    if not found.leads:
        return [f"There is one network to speak of, {ranked}, and nothing to compare it with."]
    first = f"Best on validation is {ranked}; {_lead(found)}."
    lines = [first]
    if found.probability is not None:
        lines.append(
            f"By these scores alone, the probability that its true mean is the highest of all cells is "
            f"{found.probability:.2f}: too high where cells hardly differ."
        )
    corrected = winner(found.rows)
    test = f"Its test accuracy is {shown(best.interval(on_test))}%"
    if corrected is not None and corrected.corrected is not None:
        test += f"; corrected for its luck as the best of {len(complete(found.rows))}, {shown(corrected.corrected)}%"
    lines.append(f"{test}.")
    verdicts = Counter(one.verdict for one in found.judgements if one.verdict != "reference")
    said = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items())
    lines.append(
        f"Against the design's first cell, {row_name(found.rows[0])}, the others are on validation: {said} "
        f"(equivalent: within {margin:g} points)."
    )
    return lines


def _lead(found: Findings) -> str:
    """Whether the best is better than the others, in half a sentence."""
    second = found.leads[0]
    name, gap = row_name(second.row), f"{second.contrast.mean:+.2f} points"
    if found.plan.race is not None:
        return f"the runner-up is {name} ({gap}), and the race's verdicts are against its first cell only"
    if min(len(found.best.records), len(second.row.records)) == 1:
        return (
            f"whether it is better than the runner-up, {name} ({gap}), cannot be said: one seed has no interval, and "
            "another seed may turn the order round"
        )
    beaten = sum(lead.better for lead in found.leads)
    than = f"beyond chance it is better than {beaten or 'none'} of the {len(found.leads)} others"
    than = than if len(found.leads) > 1 else ""
    whether = "it is better than" if second.better else "whether it is better is undecided against"
    said = f"{whether} the runner-up, {name} ({gap}"
    if second.p is None:
        said += f"; {second.contrast.reason})"
    else:
        said += f", 95% interval {second.contrast.low:+.2f} to {second.contrast.high:+.2f}, p {_p(second.p)})"
    return "; ".join(filter(None, (said, than)))


def _p(p: float) -> str:
    return "below 0.001" if p < 0.001 else f"{p:.2g}"


def unfinished(rows: Sequence[Row]) -> list[str]:
    """A line for each trial that failed or is not there, with its cell."""
    lines = [f"{row_name(row)}, trial {trial}: {failure}" for row in rows for trial, failure in row.failures.items()]
    return lines + [f"{row_name(row)}, trial {trial}: not finished" for row in rows for trial in row.missing]


def counted(rows: Sequence[Row]) -> str:
    """How many trials there are, and what became of them."""
    kinds = Counter({trial: failure.kind for row in rows for trial, failure in row.failures.items()}.values())
    done = len({record.trial for row in rows for record in row.records})
    missing = len({trial for row in rows for trial in row.missing})
    parts = [f"{done:,} finished", *(f"{count:,} {kind.replace('_', ' ')}" for kind, count in kinds.items())]
    parts += [f"{missing:,} not finished"] if missing else []
    return f"{len({trial for row in rows for trial in row.trials}):,} trials were planned: {', '.join(parts)}."


def commands(found: Findings) -> list[dict[str, object]]:
    """For each row its trials, and the command that trains one again; where none is finished, for the first time.

    The command reads the test split, and says so in the ledger.
    """
    directory = shlex.quote(str(found.path))
    study = shlex.quote(str(found.path / "study.toml"))
    return [
        {
            "cell": row_name(row),
            "command": f"expertgrid rerun {directory} {row.records[0].trial}"
            if row.records
            else f"expertgrid run {study} --out {directory}",
            "trials": row.trials,
        }
        for row in found.rows
    ]


# --- Its tables: titles, and values with what they sort by ---


@dataclass(frozen=True)
class Cell:
    text: str
    key: float | None = None  # None: sorted by its text
    heading: bool = False  # of its row


def table_cells(rows: Sequence[dict[str, object]]) -> tuple[list[str], list[list[Cell]]]:
    """Titles and cells of titled values."""
    titles = list(rows[0]) if rows else []
    return titles, [[_cell(value, place == 0) for place, value in enumerate(row.values())] for row in rows]


def _cell(value: object, heading: bool) -> Cell:
    match value:
        case Interval():
            return Cell(shown(value), value.mean, heading)
        case bool() | None | str() | Judgement():
            return Cell(shown(value), None, heading)
        case int() | float():
            return Cell(shown(value), float(value), heading)
    return Cell(str(value), None, heading)


def _gate_rows(found: Findings) -> list[dict[str, object]]:
    return [
        {
            "block": gate.block,
            "experts": gate.experts,
            "mean weights": "  ".join(f"{weight:.2f}" for weight in gate.mean_K),
            "entropy, bits": tables.Points(gate.entropy),
            "at most": tables.Points(gate.most_entropy),
            "information, bits": f"{gate.information:.3f}",
            "collapsed": f"{len(gate.collapsed)} of {gate.experts}"
            + (f" (expert {', '.join(map(str, gate.collapsed))})" if gate.collapsed else ""),
        }
        for gate in found.examined.gates
    ]


def _confusion_rows(found: Findings) -> list[str]:
    """The most frequent confusions, in words."""
    counts_NN = found.examined.confusion_NN.copy()
    np.fill_diagonal(counts_NN, 0)
    places = np.argsort(-counts_NN, axis=None, kind="stable")[:MOST_CONFUSIONS]
    pairs = [np.unravel_index(place, counts_NN.shape) for place in places]
    classes = found.examined.classes
    return [f"{classes[i]} taken for {classes[j]}: {counts_NN[i, j]:,}" for i, j in pairs if counts_NN[i, j]]


def _class_rows(found: Findings) -> list[dict[str, object]]:
    return [
        {
            "class": name,
            "images": one.images,
            "recognised %": None if one.share is None else tables.Points(100 * one.share),
            "95% from": None if one.share is None else tables.Points(100 * one.low),
            "to": None if one.share is None else tables.Points(100 * one.high),
        }
        for name, one in zip(found.examined.classes, found.examined.shares)
    ]


def _ledger_rows(found: Findings) -> list[dict[str, object]]:
    return [
        {
            "reader": reader,
            "reads": len(reads),
            "trials": len({read.trial for read in reads}),
            "with mirror images": sum(read.tta == "flip" for read in reads),
            "first": min(read.time for read in reads),
            "last": max(read.time for read in reads),
        }
        for reader in dict.fromkeys(read.reader for read in found.reads)
        if (reads := [read for read in found.reads if read.reader == reader])
    ]


def _environment_rows(found: Findings) -> list[dict[str, object]]:
    records = {record.trial: record for row in found.rows for record in row.records}
    kinds = Counter(
        (r.environment.device, r.environment.threads, r.bfloat16, r.execution, r.environment.python)
        + tuple(sorted(r.environment.versions.items()))
        for r in records.values()
    )
    return [
        {
            "device": device,
            "threads": threads,
            "numbers": "bfloat16" if bfloat16 else "fp32",
            "steps": means,
            "Python": python,
            **dict(versions),
            "trials": count,
        }
        for (device, threads, bfloat16, means, python, *versions), count in kinds.items()
    ]


# --- Its pictures ---


def pictures(found: Findings) -> dict[str, list[Picture]]:
    """The figures of each section that has some."""
    ranked = [*([found.best] if found.best else []), *(lead.row for lead in found.leads)]
    if not ranked:
        return {}
    drawn, most = (
        ranked[:MOST_ROWS],
        f"The {MOST_ROWS} best of {len(ranked)} cells. " if len(ranked) > MOST_ROWS else "",
    )
    sections = {"table": [_accuracy(drawn, most)], "effects": _effects(found), "curves": _curves(found)}
    if others := ranked[1 : MOST_ROWS + 1]:
        sections["differences"] = [
            Picture(
                "differences",
                lambda: plots.differences_figure(found.best, others),
                f"Dots for each seed: validation accuracy of {row_name(found.best)} less that of each other cell.",
                most + "Right of the line the best cell is better with that seed. Dots on both sides: the order of the "
                "two depends on the seed.",
            )
        ]
    sections |= {"cost": _cost(found, ranked), "gates": _gates(found), "confusion": _confusion(found)}
    return {name: drawn for name, drawn in sections.items() if drawn}


def _accuracy(rows: list[Row], most: str) -> Picture:
    best = rows[0]
    return Picture(
        "accuracy",
        lambda: plots.accuracy_figure("", rows),
        f"Validation and test accuracy of {len(rows)} cells; best on validation is {row_name(best)}.",
        most
        + "Lines are 95% intervals of the mean over seeds; a dot without one has a single seed, or seeds that agree.",
    )


def effect_name(one: Marginal, reference: dict[str, str]) -> str:
    """A change in words: `experts 1 to 2`; of two, `experts 1 to 2, with gate linear to mlp`."""
    return ", with ".join(f"{name} {reference[name]} to {level}" for name, level in one.levels.items())


def _effects(found: Findings) -> list[Picture]:
    groups: dict[str, list[tuple[str, Judgement]]] = {"main effects": [], "interactions": []}
    for names, rows in found.effects.items():
        group = groups["main effects" if len(names) == 1 else "interactions"]
        first = rows[0].levels
        group += [
            (effect_name(row, first), row.effect)
            for row in rows
            if row.effect and row.effect.verdict != "reference" and row.effect.mean is not None
        ]
    explained = {
        "main effects": "What a change of level adds to validation accuracy, the mean over all levels of the others.",
        "interactions": "What one change adds to the other: 0 where each does the same with and without the other.",
    }
    drawn = []
    for title, effects in groups.items():
        if effects:
            largest = sorted(effects, key=lambda effect: -abs(effect[1].mean))[:MOST_EFFECTS]
            left_out = f" The {MOST_EFFECTS} largest of {len(effects)}." if len(effects) > MOST_EFFECTS else ""
            drawn.append(
                Picture(
                    title.replace(" ", "-"),
                    lambda largest=largest: plots.effects_figure(largest, found.study.margin),
                    f"{title.capitalize()}: " + "; ".join(f"{name}: {one.mean:+.2f}" for name, one in largest[:8]),
                    f"{title.capitalize()}. {explained[title]} Lines are 95% intervals, the shade is the margin within "
                    f"which levels count as equivalent; a filled dot has a verdict.{left_out}",
                )
            )
    return drawn


def _curves(found: Findings) -> list[Picture]:
    drawn = []
    for number, (row, by_seed) in enumerate(found.curves, 1):
        name, by_seed = row_name(row), [epochs for epochs in by_seed if epochs]
        if by_seed:
            last = sum(epochs[-1].validation_accuracy for epochs in by_seed) / len(by_seed)
            drawn.append(
                Picture(
                    f"curves-{number}",
                    lambda name=name, by_seed=by_seed: plots.curves_figure(name, by_seed),
                    f"Loss and accuracy by epoch of {name}: {100 * last:.1f}% validation accuracy at the end.",
                    f"{number}. {name}, {len(by_seed)} seed{'s' if len(by_seed) > 1 else ''}.",
                    wide=False,
                )
            )
    return drawn


def _cost(found: Findings, ranked: list[Row]) -> list[Picture]:
    """Accuracy against latency where two rows have one, else against MACs."""
    timed = [row for row in ranked if row.latency]
    if len(timed) > 1:
        rows, costs = timed, [tables.smallest(row.latency).p50_ms for row in timed]
        batches = sorted({tables.smallest(row.latency).batch for row in timed})
        what = f"measured latency, ms (median, batch {', '.join(map(str, batches))})"
        said = f"Measured latency of the {len(timed)} cells that were exported and timed."
    else:
        rows, costs = ranked, [row.records[0].macs / 1e6 for row in ranked]
        what = "multiply-accumulates of one image, millions"
        said = "Against multiply-accumulates, which are no time, as fewer than two cells have a measured latency."
    front = pareto(costs, [row.interval(on_test).mean for row in rows])
    names = "; ".join(f"{number}: {row_name(rows[place])}" for number, place in enumerate(front, 1))
    return [
        Picture(
            "cost",
            lambda: plots.costs_figure(rows, costs, front, what),
            f"Test accuracy against {what}; the Pareto front is {names}.",
            f"{said} No cell is both cheaper and better than one on the front ({names}); the front goes by means, and "
            "does not ask whether the differences are decided.",
        )
    ]


def _gates(found: Findings) -> list[Picture]:
    gates, classes = found.examined.gates, found.examined.classes
    if not gates:
        return []
    drawn = [
        Picture(
            f"gate-{number}",
            lambda gate=gate: plots.gate_figure(gate, classes),
            f"Mean gate weight by class and expert in block {gate.block}: "
            + ", ".join(f"expert {k} {weight:.2f}" for k, weight in enumerate(gate.mean_K)),
            f"Block {gate.block}: mean weight of each expert, by class.",
            wide=False,
        )
        for number, gate in enumerate(gates[:MOST_GATES], 1)
    ]
    entropy = Picture(
        "gate-entropy",
        lambda: plots.entropy_figure(gates, classes),
        "Entropy of the gate by block and class: "
        + ", ".join(f"{gate.block} {gate.entropy:.2f} bits" for gate in gates),
        "Entropy of the gate by block and class, as a share of that of equal weights: 1 where all experts count alike, "
        "0 where one has all the weight.",
    )
    return [*drawn, entropy]


def _confusion(found: Findings) -> list[Picture]:
    one = found.examined
    if one.confusion_NN is None:
        return []
    right, images = int(np.trace(one.confusion_NN)), int(one.confusion_NN.sum())
    return [
        Picture(
            "confusion",
            lambda: plots.confusion_figure(one.confusion_NN, one.classes),
            f"Confusion matrix: {right:,} of {images:,} {one.confusion_split} images are recognised.",
            f"{right:,} of {images:,} {one.confusion_split} images are on the diagonal. Rows are what an image is, "
            "columns what it was taken for; the colour is the share of its row.",
        )
    ]


# --- As files ---


def figures(found: Findings, kind: Literal["pdf", "png"]) -> dict[str, bytes]:
    """Each figure of the report as a file for a paper, by its name."""
    return {
        f"{picture.name}.{kind}": plots.save(picture.draw(), kind)
        for section in pictures(found).values()
        for picture in section
    }


def html(found: Findings) -> str:
    """The report as one file: nothing in it is fetched from anywhere, and no other script than its own can run."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ablations.results", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    script = environment.loader.get_source(environment, "report.js")[0]
    examined = found.examined
    tables_of = {
        "cells": tables.columns(found.rows, found.judgements) if found.rows else [],
        "gates": _gate_rows(found),
        "classes": _class_rows(found),
        "ledger": _ledger_rows(found),
        "environment": _environment_rows(found),
    }
    return environment.get_template("report.html.j2").render(
        found=found,
        answer=answer(found),
        notes=tables.notes(StudyDirectory(found.path), found.plan, found.rows, found.judgements) if found.rows else [],
        counted=counted(found.rows),
        unfinished=unfinished(found.rows),
        tables={name: table_cells(rows) for name, rows in tables_of.items() if rows},
        pictures=pictures(found),
        curves_said=_curves_said(found),
        differences_missing=_differences_missing(found),
        confusions=_confusion_rows(found) if examined.confusion_NN is not None else [],
        mistakes=[(one, mistake_uri(one)) for one in examined.mistakes or []],
        examined_name=row_name(examined.row) if examined.row else "",
        gates_name=row_name(examined.gates_row) if examined.gates_row else "",
        gates_drawn=MOST_GATES,
        commands=commands(found),
        one_seed=bool(found.best) and max(len(row.records) for row in found.rows) == 1,
        numbers=_numbers(found.rows, tables_of["cells"]),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _numbers(rows: list[Row], cells: list[dict[str, object]]) -> str:
    """What the table is of, and the table, for `expertgrid verify`: JSON, with nothing that could end its element."""
    numbers = f'{{"measured": {json.dumps(measured(rows))}, "table": {tables.render(cells, "json")}}}'
    return numbers.replace("<", "\\u003c")


def _curves_said(found: Findings) -> str:
    trained = sum(bool(row.records) for row in found.rows)
    if trained > MOST_CURVES:
        return f"The {MOST_CURVES} cells that are best on validation, of {trained}."
    return "All cells, best on validation first." if trained else ""


def _differences_missing(found: Findings) -> str:
    if not found.best:
        return "No trial is finished."
    return "" if found.leads else "There is one cell, and nothing to compare it with."


def mistake_uri(mistake: Mistake) -> str:
    """An image as it is, as a PNG in a data URI."""
    pixels = mistake.pixels_HWC
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(file, "PNG")
    return _uri(file.getvalue(), "png")
