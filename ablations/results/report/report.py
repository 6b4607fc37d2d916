"""A study's report: what `findings` has found as one HTML file that needs nothing else, or as figures for a paper."""

import base64
import hashlib
import io
import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import jinja2
import numpy as np
from markupsafe import Markup, escape
from PIL import Image

from expertgrid.ablations.records.directory import StudyDirectory
from expertgrid.ablations.records.plan import RULES
from expertgrid.ablations.results.answer import answer
from expertgrid.ablations.results.evidence import read_evidence
from expertgrid.ablations.results.report import plots
from expertgrid.ablations.results.report.findings import Examined, Findings
from expertgrid.ablations.results.report.pictures import MOST_GATES, pictures
from expertgrid.ablations.results.rows import Row, newest
from expertgrid.ablations.results.tables.cells import columns
from expertgrid.ablations.results.tables.description import describe, trials_line
from expertgrid.ablations.results.tables.effects import factor_table
from expertgrid.ablations.results.tables.notes import test_read_notes
from expertgrid.ablations.results.tables.study import study_tables
from expertgrid.model.system.errors import InputError
from expertgrid.model.system.text import MOST_NOTES, SCHEMA, Points, filled, rows_by_key, shown, sort_key

MOST_CONFUSIONS = 12


# --- What it says ---


def best_line(best: Row) -> str:
    """Which cell is the best on validation."""
    by, percent = best.scale, "%" if best.scale.points else ""
    over = f"over {len(best.by_seed)} seeds" if len(best.by_seed) > 1 else "with one seed"
    return (
        f"Best on validation: {best.name}, {'' if by.name == 'accuracy' else f'{by.title} '}"
        f"{shown(best.interval('validation'))}{percent} {over}; {shown(best.interval('test'))}{percent} on test."
    )


def unfinished(rows: Sequence[Row]) -> list[str]:
    """A line for each trial that failed or is not there, with its cell."""
    lines = [f"{row.name}, trial {trial}: {failure}" for row in rows for trial, failure in row.failures.items()]
    return lines + [f"{row.name}, trial {trial}: not finished" for row in rows for trial in row.missing]


# --- Its own tables ---


def _gate_rows(examined: Examined) -> list[dict[str, object]]:
    return [
        {
            "block": gate.block,
            "experts": gate.experts,
            "mean weights": "  ".join(f"{weight:.2f}" for weight in gate.mean_K),
            "entropy, bits": Points(gate.entropy),
            "at most": Points(np.log2(gate.experts)),
            "information, bits": f"{gate.information:.3f}",
            "collapsed": f"{len(gate.collapsed)} of {gate.experts}"
            + (f" (expert {', '.join(map(str, gate.collapsed))})" if gate.collapsed else ""),
        }
        for gate in examined.gates
    ]


def _confusions(examined: Examined) -> list[str]:
    """The most frequent confusions, in words."""
    if examined.confusion_NN is None:
        return []
    counts_NN, classes = examined.confusion_NN.copy(), examined.classes
    np.fill_diagonal(counts_NN, 0)
    places = np.argsort(-counts_NN, axis=None, kind="stable")[:MOST_CONFUSIONS]
    pairs = [np.unravel_index(place, counts_NN.shape) for place in places]
    return [f"{classes[i]} taken for {classes[j]}: {counts_NN[i, j]:,}" for i, j in pairs if counts_NN[i, j]]


def _class_rows(examined: Examined) -> list[dict[str, object]]:
    return [
        {
            "class": name,
            "images": share.images,
            "recognised %": None if share.share is None else Points(100 * share.share),
            "95% from": None if share.share is None else Points(100 * share.low),
            "to": None if share.share is None else Points(100 * share.high),
        }
        for name, share in zip(examined.classes, examined.shares)
    ]


# --- As files ---


def _with_code(text: str) -> Markup:
    """A line as HTML, with what is between backticks as code."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(text))))


PAGES = jinja2.Environment(
    loader=jinja2.PackageLoader("expertgrid.ablations.results.report", "."),
    autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined,
)  # fmt: skip
PAGES.filters |= {
    "code": _with_code,
    "sort_key": sort_key,
    "shown": lambda value: shown(value).replace(" to ", "\u00a0to\u00a0"),  # a line does not break within an interval
}
SCRIPT = (Path(__file__).parent / "report.js").read_text()


def figures(findings: Findings, kind: Literal["pdf", "png"]) -> dict[str, bytes]:
    """Each figure of the report as a file for a paper, by its name."""
    return {f"{picture.name}.{kind}": plots.save(picture.draw(), kind) for picture in pictures(findings)}


def html(findings: Findings) -> str:
    """The report as one file: nothing in it is fetched from anywhere, and no other script than its own can run."""
    examined, results = findings.examined, findings.evidence.results
    missing = findings.images_missing, *examined.missing.values()
    directory = StudyDirectory(results.path)
    tables = study_tables(directory, findings.evidence) if results.rows else []
    rows_by_table = {table.key: table.rows for table in tables} | {
        "gates": _gate_rows(examined),
        "classes": _class_rows(examined),
    }
    numbers = {
        "newest": newest(directory, results),
        "metric": f"{results.scale.name}:{results.margin!r}" if results.chosen_afterwards else None,
        "rules": RULES,
        "schema": SCHEMA,
        "tables": rows_by_key(tables),
    }
    return PAGES.get_template("report.html.j2").render(
        findings=findings,
        results=results,
        title=results.scale.title[:1].upper() + results.scale.title[1:],
        answer=[answer(findings.evidence), *map(best_line, findings.ranked[:1])],
        by_key={table.key: table for table in tables},
        counted=trials_line(results.rows),
        unfinished=unfinished(results.rows),
        tables={name: filled(rows) for name, rows in rows_by_table.items() if rows},
        trained=describe(directory, results),
        reads=test_read_notes(directory),
        pictures=pictures(findings),
        confusions=_confusions(examined),
        image_uri=image_uri,
        left_out=list(filter(None, dict.fromkeys(missing))) if findings.ranked else [],
        gates_drawn=MOST_GATES,
        quoted=shlex.quote,
        numbers=json.dumps(numbers).replace("<", "\\u003c"),  # for `expertgrid verify`: nothing ends its element
        most_notes=MOST_NOTES,
        script=SCRIPT,
        script_hash=base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode(),
    )


def html_of_two(directories: Sequence[StudyDirectory], metric: str | None = None) -> str:
    """Two studies of the same cells and data side by side, as one file. Raises InputError for others."""
    both = [read_evidence(directory, metric) for directory in directories]
    names = [str(of.results.path) for of in both]
    for what, values in {
        "factors": [of.results.study.factors for of in both],
        "cells": [[row.name for row in of.results.rows] for of in both],
        "metrics": [of.scale.name for of in both],
        "data": [of.results.plan.data for of in both],
    }.items():
        if values[0] != values[1]:
            raise InputError(f"{' and '.join(names)} have different {what}: {values[0]} and {values[1]}")
    shown_rows = [{"factors": factor_table(of).rows, "cells": columns(of.results.rows)} for of in both]
    return PAGES.get_template("two.html.j2").render(
        both=both,
        alike=("factor", "change", "model", *both[0].results.study.factors),
        about=[(name, answer(of), describe(at, of.results)) for name, of, at in zip(names, both, directories)],
        tables=[{key: filled(rows) for key, rows in of.items() if rows} for of in shown_rows],
    )


def image_uri(pixels_HWC: np.ndarray) -> str:
    """An image as it is, as a PNG in a data URI."""
    file = io.BytesIO()
    Image.fromarray(pixels_HWC[..., 0] if pixels_HWC.shape[2] == 1 else pixels_HWC).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
