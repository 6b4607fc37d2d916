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

from expertgrid.ablations.records.directory import StudyDirectory
from expertgrid.ablations.results.answer import answer
from expertgrid.ablations.results.report import plots
from expertgrid.ablations.results.report.findings import MOST_CURVES, DifferentImage, Findings, Mistake
from expertgrid.ablations.results.rows import (
    Row,
    latency_front,
    newest,
    on_test,
    on_validation,
    smallest,
    timed_together,
)
from expertgrid.ablations.results.tables.study import study_tables
from expertgrid.model.system.text import MOST_NOTES, Points, Table, render_tables, shown, sort_key

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


def said(found: Findings) -> list[str]:
    """The answer to the study's question, and which cell is the best on validation."""
    lines = [answer(found.evidence)]
    if found.best is not None:
        over = f"over {len(found.best.by_seed)} seeds" if len(found.best.by_seed) > 1 else "with one seed"
        lines.append(
            f"Best on validation: {found.best.name}, {shown(found.best.accuracy(on_validation))}% {over}; "
            f"{shown(found.best.accuracy(on_test))}% on test."
        )
    return lines


def unfinished(rows: Sequence[Row]) -> list[str]:
    """A line for each trial that failed or is not there, with its cell."""
    lines = [f"{row.name}, trial {trial}: {failure}" for row in rows for trial, failure in row.failures.items()]
    return lines + [f"{row.name}, trial {trial}: not finished" for row in rows for trial in row.missing]


def counted(rows: Sequence[Row]) -> str:
    """How many trials there are, and what became of them."""
    kinds = Counter({trial: failure.kind for row in rows for trial, failure in row.failures.items()}.values())
    done = len({record.trial for row in rows for record in row.records})
    missing = len({trial for row in rows for trial in row.missing})
    parts = [f"{done:,} finished", *(f"{count:,} {kind.replace('_', ' ')}" for kind, count in kinds.items())]
    parts += [f"{missing:,} not finished"] if missing else []
    planned = len({trial for row in rows for trial in row.trials.values()})
    return f"{planned:,} trials were planned: {', '.join(parts)}."


def commands(found: Findings) -> list[dict[str, object]]:
    """For each row its trials, and the command that trains one again; where none is finished, for the first time.

    The command reads the test split, and says so in the ledger.
    """
    directory = shlex.quote(str(found.path))
    study = shlex.quote(str(found.path / "study.toml"))
    return [
        {
            "cell": row.name,
            "command": f"expertgrid rerun {directory} {row.records[0].trial}"
            if row.by_seed
            else f"expertgrid run {study} --out {directory}",
            "trials": list(row.trials.values()),
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
    return titles, [
        [Cell(shown(value), sort_key(value), heading=place == 0) for place, value in enumerate(row.values())]
        for row in rows
    ]


def _gate_rows(found: Findings) -> list[dict[str, object]]:
    return [
        {
            "block": gate.block,
            "experts": gate.experts,
            "mean weights": "  ".join(f"{weight:.2f}" for weight in gate.mean_K),
            "entropy, bits": Points(gate.entropy),
            "at most": Points(gate.most_entropy),
            "information, bits": f"{gate.information:.3f}",
            "collapsed": f"{len(gate.collapsed)} of {gate.experts}"
            + (f" (expert {', '.join(map(str, gate.collapsed))})" if gate.collapsed else ""),
        }
        for gate in found.examined.gates
    ]


def _confusion_rows(confusion_NN: np.ndarray, classes: Sequence[str]) -> list[str]:
    """The most frequent confusions, in words."""
    counts_NN = confusion_NN.copy()
    np.fill_diagonal(counts_NN, 0)
    places = np.argsort(-counts_NN, axis=None, kind="stable")[:MOST_CONFUSIONS]
    pairs = [np.unravel_index(place, counts_NN.shape) for place in places]
    return [f"{classes[i]} taken for {classes[j]}: {counts_NN[i, j]:,}" for i, j in pairs if counts_NN[i, j]]


def _class_rows(found: Findings) -> list[dict[str, object]]:
    return [
        {
            "class": name,
            "images": share.images,
            "recognised %": None if share.share is None else Points(100 * share.share),
            "95% from": None if share.share is None else Points(100 * share.low),
            "to": None if share.share is None else Points(100 * share.high),
        }
        for name, share in zip(found.examined.classes, found.examined.shares)
    ]


def _image_rows(images: Sequence[DifferentImage]) -> list[dict[str, object]]:
    return [
        {"image": str(image.number), "is": image.truth, "A takes it for": image.first, "B takes it for": image.second}
        for image in images
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
    ranked = [*([found.best] if found.best else []), *found.others]
    if not ranked:
        return {}
    best = ranked[0]
    drawn, most = (
        ranked[:MOST_ROWS],
        f"The {MOST_ROWS} best of {len(ranked)} cells. " if len(ranked) > MOST_ROWS else "",
    )
    sections = {"table": [_accuracy(drawn, most)], "effects": _effects(found), "curves": _curves(found)}
    if others := ranked[1 : MOST_ROWS + 1]:
        sections["differences"] = [
            Picture(
                "differences",
                lambda: plots.differences_figure(best, others),
                f"Dots for each seed: validation accuracy of {best.name} less that of each other cell.",
                most + "Right of the line the best cell is better at that seed. Dots on both sides: the order of the "
                "two depends on the seed. The best cell was chosen by these same scores.",
            )
        ]
    sections |= {"cost": _cost(found, ranked), "gates": _gates(found), "confusion": _confusion(found)}
    return {name: drawn for name, drawn in sections.items() if drawn}


def _accuracy(rows: list[Row], most: str) -> Picture:
    best = rows[0]
    return Picture(
        "accuracy",
        lambda: plots.accuracy_figure("", rows),
        f"Validation and test accuracy of {len(rows)} cells; best on validation is {best.name}.",
        most
        + "Lines are 95% intervals of the mean over seeds; a dot without one has a single seed, or seeds that agree.",
    )


def _effects(found: Findings) -> list[Picture]:
    explained = {
        "main effects": (found.evidence.effects, "The mean over the cells that differ in this factor alone."),
        "interactions": (
            found.evidence.interactions,
            "What one change adds to the other: 0 where each does the same with and without the other. Exploratory.",
        ),
    }
    drawn = []
    for title, (effects, meaning) in explained.items():
        effects = [effect for effect in effects if effect.judgement.mean is not None]
        if not effects:
            continue
        largest = sorted(effects, key=lambda effect: -abs(effect.judgement.mean or 0))[:MOST_EFFECTS]
        left_out = f" The {MOST_EFFECTS} largest of {len(effects)}." if len(effects) > MOST_EFFECTS else ""
        drawn.append(
            Picture(
                title.replace(" ", "-"),
                lambda largest=largest: plots.effects_figure(
                    [(effect.name, effect.judgement) for effect in largest], found.study.margin
                ),
                f"{title.capitalize()}: "
                + "; ".join(f"{effect.name}: {effect.judgement.mean:+.2f}" for effect in largest[:8]),
                f"{title.capitalize()}. {meaning} Lines are the simultaneous 95% intervals that decide, the shade is "
                f"the margin; a filled dot has a verdict.{left_out}",
            )
        )
    return drawn


def _curves(found: Findings) -> list[Picture]:
    drawn = []
    for number, (row, by_seed) in enumerate(found.curves, 1):
        name, by_seed = row.name, [epochs for epochs in by_seed if epochs]
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
    """Accuracy against latency where two rows were timed together, else against MACs."""
    if rows := timed_together(ranked):
        costs = [smallest(row.latency).p50_ms for row in rows if row.latency]
        batch = smallest(rows[0].latency).batch if rows[0].latency else 1
        what = f"measured latency, ms (median, batch {batch})"
        front = [rows.index(row) for row in latency_front(ranked)]
        names = "; ".join(f"{number}: {rows[place].name}" for number, place in enumerate(front, 1))
        on_front = f"; the Pareto front is {names}"
        said = (
            f"The {len(rows)} cells that were exported and timed in turns. No cell is both faster and better than one "
            f"on the front ({names}); the front goes by means, and does not ask whether the differences are decided."
        )
    else:
        rows, costs, front, on_front = ranked, [row.records[0].macs / 1e6 for row in ranked], [], ""
        what = "multiply-accumulates of one image, millions"
        said = (
            "Against multiply-accumulates, which are no time, as fewer than two cells have a measured latency. "
            f"`expertgrid bench {shlex.quote(str(found.path))}` measures all of them."
        )
    return [
        Picture(
            "cost",
            lambda: plots.costs_figure(rows, costs, front, what),
            f"Validation accuracy against {what}{on_front}.",
            said,
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
    examined = found.examined
    confusion_NN = examined.confusion_NN
    if confusion_NN is None:
        return []
    right, images = int(np.trace(confusion_NN)), int(confusion_NN.sum())
    return [
        Picture(
            "confusion",
            lambda: plots.confusion_figure(confusion_NN, examined.classes),
            f"Confusion matrix: {right:,} of {images:,} {examined.confusion_split} images are recognised.",
            f"{right:,} of {images:,} {examined.confusion_split} images are on the diagonal. Rows are what an image "
            "is, columns what it was taken for; the colour is the share of its row.",
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
    loader = jinja2.PackageLoader("expertgrid.ablations.results.report", ".")
    environment = jinja2.Environment(
        loader=loader,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    script = loader.get_source(environment, "report.js")[0]
    examined, directory = found.examined, StudyDirectory(found.path)
    shown_tables = study_tables(directory, found.evidence) if found.rows else []
    by_key = {table.key: table for table in shown_tables}
    tables_of = {table.key: table.rows for table in shown_tables} | {
        "gates": _gate_rows(found),
        "classes": _class_rows(found),
        "only-a": _image_rows(found.images.only_first) if found.images else [],
        "only-b": _image_rows(found.images.only_second) if found.images else [],
        "ledger": _ledger_rows(found),
        "environment": _environment_rows(found),
    }
    return environment.get_template("report.html.j2").render(
        found=found,
        answer=said(found),
        by_key=by_key,
        counted=counted(found.rows),
        unfinished=unfinished(found.rows),
        tables={name: table_cells(rows) for name, rows in tables_of.items() if rows},
        pictures=pictures(found),
        curves_said=_curves_said(found),
        differences_missing=_differences_missing(found),
        confusions=_confusion_rows(examined.confusion_NN, examined.classes)
        if examined.confusion_NN is not None
        else [],
        mistakes=[(mistake, mistake_uri(mistake)) for mistake in examined.mistakes or []],
        examined_name=examined.row.name if examined.row else "",
        gates_name=examined.gates_row.name if examined.gates_row else "",
        gates_drawn=MOST_GATES,
        commands=commands(found),
        one_seed=bool(found.best) and max(len(row.by_seed) for row in found.rows) == 1,
        numbers=_numbers(newest(directory, found.evidence.results), shown_tables),
        most_notes=MOST_NOTES,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _numbers(newest_time: str, shown_tables: Sequence[Table]) -> str:
    """The tables, and how new they are, for `expertgrid verify`: JSON with nothing that could end its element."""
    numbers = f'{{"newest": {json.dumps(newest_time)}, "tables": {render_tables(shown_tables, "json")}}}'
    return numbers.replace("<", "\\u003c")


def _curves_said(found: Findings) -> str:
    trained = sum(bool(row.by_seed) for row in found.rows)
    if trained > MOST_CURVES:
        return f"The {MOST_CURVES} cells that are best on validation, of {trained}."
    return "All cells, best on validation first." if trained else ""


def _differences_missing(found: Findings) -> str:
    if not found.best:
        return "No trial is finished."
    return "" if found.others else "There is one cell, and nothing to compare it with."


def mistake_uri(mistake: Mistake) -> str:
    """An image as it is, as a PNG in a data URI."""
    pixels = mistake.pixels_HWC
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(file, "PNG")
    return _uri(file.getvalue(), "png")
