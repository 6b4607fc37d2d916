"""Tables against the records that they are made of, and their renderings."""

import csv
import io
import json
import re
import shutil
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import write_study

from expertgrid.ablations.records.directory import StudyDirectory
from expertgrid.ablations.results.evidence import read_evidence
from expertgrid.ablations.results.levels import marginals
from expertgrid.ablations.results.rows import best_record, best_row, read_results
from expertgrid.ablations.results.stats.contrasts import Judgement
from expertgrid.ablations.results.stats.selection import Interval, accuracy_interval
from expertgrid.ablations.results.tables.cells import columns
from expertgrid.ablations.results.tables.effects import Verdict
from expertgrid.ablations.results.tables.study import study_tables
from expertgrid.model.system.errors import InputError
from expertgrid.model.system.text import (
    Measured,
    Multiple,
    Points,
    Signed,
    Span,
    Table,
    Typed,
    render,
    render_tables,
    shown,
)  # fmt: skip

ROWS = [
    {
        "gate": "mlp", "n": 3, "acc": Interval(90.123, 89, 91.5), "params": 12345, "rate": 1234.5, "latency ms": 0.0123,
    },
    {"gate": "a_b", "n": "1/3", "acc": Interval(80.0), "params": 5, "rate": 33.33, "latency ms": None},
]  # fmt: skip


def test_text():
    assert render(ROWS, "text", ["A note."]).splitlines() == [
        "gate    n                       acc    params    rate    latency ms",
        "------  ---  ----------------------  --------  ------  ------------",
        "mlp     3    90.12 (89.00 to 91.50)    12,345   1,234        0.0123",
        "a_b     1/3                   80.00         5    33.3",
        "",
        "A note.",
    ]


def test_values_as_they_are_shown():
    none = Judgement("none", 0, reason="diverged in 2 of 5 seeds")
    better, undecided = Judgement("better", 5, 1.0), Judgement("open", 5, 1.0)
    for value, text in (
        (Signed(0.412), "+0.41"), (Signed(-0.004), "+0.00"), (Points(-0.001), "0.00"),
        (Span(-0.161, 0.22), "-0.16 to +0.22"), (Span(-0.004, 0.0), "+0.00 to +0.00"),
        (Measured(1.234, 1.2, 1.27), "1.234 ±0.036"), (Measured(1.234, -1e9, 1e9), "1.23 ±?"),
        (Multiple(2.04), "x2.0"), (Multiple(12.3), "x12"), (Points(67.5), "67.50"),
        (Verdict(none), "no verdict: diverged in 2 of 5 seeds"), (Verdict(better), "better"),
        (Verdict(better, True), "better (this split)"), (Verdict(undecided, True), "open"),
    ):  # fmt: skip
        assert shown(value) == text


def test_github_is_a_table_of_markdown():
    lines = render(ROWS, "github", ["A note."]).splitlines()
    assert [len(line.split("|")) for line in lines[:4]] == [8] * 4
    assert lines[-1] == "- A note."


def test_csv_and_json_are_unrounded():
    first, second = csv.DictReader(io.StringIO(render(ROWS, "csv", ["A note."])))
    assert (first["acc"], first["acc low"], second["acc low"], first["rate"]) == ("90.123", "89", "", "1234.5")
    first, second = json.loads(render(ROWS, "json", ["A note."]))
    assert first["acc"] == {"mean": 90.123, "low": 89, "high": 91.5}
    assert second["latency ms"] is None


def test_an_empty_table_is_an_error():
    with pytest.raises(InputError, match="nothing to show"):
        render([], "text")


def test_rows_are_the_records(trained_study):
    directory = StudyDirectory(trained_study)
    rows = read_results(directory).rows
    assert [row.levels for row in rows] == [
        {"experts": "1", "gate": "-"}, {"experts": "2", "gate": "linear"}, {"experts": "2", "gate": "mlp"},
    ]  # fmt: skip
    for row, values in zip(rows, columns(rows)):
        files = [json.loads((trained_study / "trials" / r.trial / "record.json").read_text()) for r in row.records]
        assert [file["seed"] for file in files] == [0, 1]
        accuracies = [100 * file["test_accuracy"] for file in files]
        assert tuple(values["test acc %"]) == pytest.approx(tuple(accuracy_interval(accuracies)))
        assert values["train images/s"] == pytest.approx(np.mean([file["images_per_s"] for file in files]))
        assert values["n"] == 2


ONE_AT_A_TIME = """
question = "?"
design = "one_at_a_time"
seeds = 2
baselines = ["two_block"]
[factors]
experts = [4, 2]
gate = ["mlp", "linear"]
"""


def test_baselines_and_bases_in_tables(expertgrid, digits, tmp_path):
    """The baseline two_block is the base's network: one row, which has both names."""
    directory = write_study(tmp_path / "one", ONE_AT_A_TIME, digits, lambda levels, seed: (80.0 + seed, 80.0))
    results = read_results(directory)
    assert [row.name for row in results.rows] == [
        "experts base / 4, gate base / mlp", "experts 2, gate base", "experts base, gate linear",
    ]  # fmt: skip
    assert results.row("two_block") == results.row("experts=4") == 0
    assert [(level.levels["experts"], level.cells) for level in marginals(read_evidence(directory), ["experts"])] == [
        ("base", 1), ("4", 1), ("2", 1),
    ]  # fmt: skip
    text = expertgrid("table", directory.path, "--notes").out
    assert "base: two_block with the recipe fast and the study's settings." in text
    assert "two_block: the same network as experts base / 4, gate base / mlp, and was trained once." in text


def test_levels_that_are_one_network_are_named(digits, tmp_path):
    text = 'question = "?"\nseeds = 1\n[factors]\nexperts = [1, 2]\nkernel = [[5, 3], 5, 3]'
    directory = write_study(tmp_path / "one", text, digits, lambda levels, seed: None)
    assert [tuple(row.levels.values()) for row in read_results(directory).rows] == [
        ("1", "[5, 3] / 5"), ("1", "3"), ("2", "[5, 3]"), ("2", "5"), ("2", "3"),
    ]  # fmt: skip


def test_best_is_chosen_on_validation(trained_study):
    rows = read_results(StudyDirectory(trained_study)).rows
    best = best_row(rows)
    means = [np.mean([record.validation_accuracy for record in row.records]) for row in rows]
    assert np.mean([record.validation_accuracy for record in best.records]) == max(means)
    assert best_record(best).validation_accuracy == max(r.validation_accuracy for r in best.records)
    assert best_row([]) is None


def test_latex_is_whole(trained_study, tmp_path):
    """Every special character is escaped and every line has as many cells; it compiles where LaTeX is installed."""
    table = columns(read_results(StudyDirectory(trained_study)).rows)
    table[0] = {**table[0], "experts": r"100 % & #1 $x_{2}$ ~ ^ \frac", "test acc %": Interval(90.123, 89, 91.5)}
    text = render(table, "latex", ["100 % of it"])
    assert "90.12 (89.00 to 91.50)" in text
    assert text.endswith("% 100 % of it")
    body = [line for line in text.splitlines() if "&" in line]
    plain = [re.sub(r"\\[&%$#_{}]|\\text[a-z]+\{\}|\\[\^~]\{\}", "", line) for line in body]
    assert {line.count("&") for line in plain} == {len(table[0]) - 1}
    assert all(line.rstrip().endswith(r"\\") for line in plain)
    assert not [line for line in plain if re.search(r"[%$#_{}^~\\]", line.rstrip().removesuffix(r"\\"))]
    assert text.count(r"\begin{") == text.count(r"\end{") == 1
    if not shutil.which("pdflatex"):
        return
    document = rf"\documentclass{{article}}\usepackage{{booktabs}}\begin{{document}}{text}" + "\n\\end{document}"
    (tmp_path / "t.tex").write_text(document)
    done = subprocess.run(["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t.tex"], cwd=tmp_path, timeout=60)
    assert done.returncode == 0


def on_a_terminal(monkeypatch, width: int) -> None:
    monkeypatch.setattr("sys.stdout", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setenv("COLUMNS", str(width))


@pytest.mark.parametrize("width", [40, 60, 80, 130])
def test_a_table_fits_the_terminal(monkeypatch, width):
    """Columns that may fall go first, and the line under the table names them; the others are all there, whole."""
    rows = [{"gate": "mlp" * n, "acc": Interval(90.123, 89, 91.5), "params": 10**n, "seconds": 3.5} for n in (1, 9)]
    on_a_terminal(monkeypatch, width)
    lines = render(rows, "text", ["a note of many words, " * 9], ["seconds", "params"]).splitlines()
    assert max(map(len, lines)) <= width
    titles = lines[0].split()
    assert titles == ["gate", "acc", "params", "seconds"][: {40: 2, 60: 2, 80: 4, 130: 4}[width]]
    left_out = "Without seconds, params: the terminal has " in " ".join(lines)
    assert left_out == (len(titles) == 2)
    assert "".join(lines[2 : lines.index("")]).count("m") == 10  # wrapped, and nothing of it lost


def test_empty_columns_are_not_there_and_json_has_its_schema():
    rows = [
        {"a": None, "b": "", "level": Typed("false", False), "c": 0},
        {"a": None, "b": "", "level": "x / y", "c": None},
    ]
    for format in ("text", "github", "latex", "csv"):
        titles = re.sub(r"[^\w\s,]", " ", render(rows, format).split("false")[0])
        assert not re.search(r"\b[ab]\b", titles) and "level" in titles
    table = Table("cells", "Cells", rows, trained=["Network: net."])
    shown = json.loads(render_tables([table], "json"))
    assert shown == {
        "schema": 2,
        "trained": ["Network: net."],
        "cells": [{"a": None, "b": "", "level": False, "c": 0}, {"a": None, "b": "", "level": "x / y", "c": None}],
    }


def test_latex_has_floats_with_caption_and_label(trained_study):
    text = render_tables(study_tables(directory := StudyDirectory(trained_study), read_evidence(directory)), "latex")
    assert text.count(r"\begin{table}") == text.count(r"\end{table}") == 2
    assert [re.search(r"\\label\{(.*?)\}", part)[1] for part in text.split(r"\begin{table}")[1:]] == [
        "tab:factors",
        "tab:cells",
    ]
    assert r"1 $\to$ 2" in text and "->" not in re.sub("(?m)^%.*", "", text)
    assert text.count("% Network: two_block") == 1
