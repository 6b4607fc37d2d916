"""Statistics against scipy and by hand; tables against the records they are made of."""

import csv
import io
import json

import numpy as np
import pytest
import scipy.stats

from ablations.engines import run_local
from ablations.records import StudyDirectory
from ablations.results.evidence import best_record, best_row, marginals, row_name, study_rows
from ablations.results.stats import Interval, mean_interval
from ablations.results.tables import columns, marginal_columns, notes, render
from ablations.study import parse_study
from model.errors import InputError

ROWS = [
    {"gate": "mlp", "n": 3, "acc": Interval(90.123, 1.5), "params": 12345, "rate": 1234.5, "latency ms": 0.0123},
    {"gate": "a_b", "n": "1/3", "acc": Interval(80.0, None), "params": 5, "rate": 33.33, "latency ms": None},
]


def test_mean_interval_by_hand():
    # deviations -1, 0, 1: s = 1, and t(0.975, 2) = 4.30265
    assert mean_interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 4.30265 / 3**0.5), rel=1e-5)
    assert mean_interval([0.5]) == (0.5, None)
    with pytest.raises(ValueError, match="at least one"):
        mean_interval([])


@pytest.mark.parametrize("level", [0.9, 0.95])
def test_mean_interval_is_scipys(level):
    values = np.random.default_rng(0).normal(size=7)
    low, high = scipy.stats.ttest_1samp(values, 0).confidence_interval(level)
    mean, half_width = mean_interval(values, level)
    assert (mean - half_width, mean + half_width) == pytest.approx((low, high))


def test_intervals_cover_the_truth():
    samples = np.random.default_rng(1).normal(3, 2, size=(4000, 3))
    covered = [abs(mean - 3) <= half for mean, half in map(mean_interval, samples)]
    assert 0.94 <= np.mean(covered) <= 0.96


def test_text():
    assert render(ROWS, "text", ["A note."]).splitlines() == [
        "gate    n             acc    params    rate    latency ms",
        "------  ---  ------------  --------  ------  ------------",
        "mlp     3    90.12 ± 1.50    12,345   1,234        0.0123",
        "a_b     1/3         80.00         5    33.3",
        "",
        "A note.",
    ]


def test_github_is_a_table_of_markdown():
    lines = render(ROWS, "github", ["A note."]).splitlines()
    assert [len(line.split("|")) for line in lines[:4]] == [8] * 4
    assert lines[-1] == "- A note."


def test_latex_is_escaped():
    shown = render(ROWS, "latex", ["A note."])
    assert r"90.12 $\pm$ 1.50" in shown
    assert r"a\_b" in shown
    assert shown.startswith(r"\begin{tabular}")
    assert shown.endswith("% A note.")


def test_csv_and_json_are_unrounded():
    first, second = csv.DictReader(io.StringIO(render(ROWS, "csv", ["A note."])))
    assert (first["acc"], first["acc ±"], second["acc ±"], first["rate"]) == ("90.123", "1.5", "", "1234.5")
    first, second = json.loads(render(ROWS, "json", ["A note."]))
    assert first["acc"] == {"mean": 90.123, "half_width": 1.5}
    assert second["latency ms"] is None


def test_an_empty_table_is_an_error():
    with pytest.raises(InputError, match="nothing to show"):
        render([], "text")


def test_rows_are_the_records(trained_study):
    directory = StudyDirectory(trained_study)
    rows = study_rows(directory)
    assert [row.levels for row in rows] == [
        {"experts": "1", "gate": "-"}, {"experts": "2", "gate": "linear"}, {"experts": "2", "gate": "mlp"},
    ]  # fmt: skip
    for row, shown in zip(rows, columns(rows)):
        files = [json.loads((trained_study / "trials" / r.trial / "record.json").read_text()) for r in row.records]
        assert [file["seed"] for file in files] == [0, 1]
        accuracies = [100 * file["test_accuracy"] for file in files]
        assert shown["test acc %"] == pytest.approx(
            (np.mean(accuracies), 12.7062 * np.std(accuracies, ddof=1) / 2**0.5)
        )
        assert shown["train images/s"] == pytest.approx(np.mean([file["images_per_s"] for file in files]))
        assert shown["n"] == 2


ONE_AT_A_TIME = """
question = "?"
design = "one_at_a_time"
seeds = 2
baselines = ["two_block"]
[set]
width = 0.0625
epochs = 1
[factors]
experts = [4, 2]
gate = ["mlp", "linear"]
"""


def test_baselines_and_bases_in_tables(digits, tmp_path):
    study = parse_study(ONE_AT_A_TIME, tmp_path / "one.toml")
    directory, cells = StudyDirectory(tmp_path / "one"), study.cells(digits)
    with directory.written(study, digits, cells):
        list(run_local([trial for cell in cells for trial in cell.trials], digits, directory))
    rows = study_rows(directory)
    assert [row_name(row) for row in rows] == [
        "experts base / 4, gate base / mlp", "experts 2, gate base", "experts base, gate linear", "two_block",
    ]  # fmt: skip
    assert [(row["experts"], row["cells"]) for row in marginal_columns(marginals(directory, ["experts"]))] == [
        ("base", 1), ("4", 1), ("2", 1),
    ]  # fmt: skip
    shown = render(columns(rows), "text", notes(directory, directory.plan, rows))
    assert "base: as in two_block with the recipe fast and the study's settings." in shown


def test_levels_that_are_one_network_are_named(digits, tmp_path):
    text = 'question = "?"\nseeds = 1\n[factors]\nexperts = [1, 2]\nkernel = [[5, 3], 5, 3]'
    study = parse_study(text, tmp_path / "one.toml")
    directory = StudyDirectory(tmp_path / "one")
    with directory.written(study, digits, study.cells(digits)):
        pass
    assert [tuple(row.levels.values()) for row in study_rows(directory)] == [
        ("1", "[5, 3] / 5"), ("1", "3"), ("2", "[5, 3]"), ("2", "5"), ("2", "3"),
    ]  # fmt: skip


def test_best_is_chosen_on_validation(trained_study):
    rows = study_rows(StudyDirectory(trained_study))
    best = best_row(rows)
    means = [np.mean([record.validation_accuracy for record in row.records]) for row in rows]
    assert np.mean([record.validation_accuracy for record in best.records]) == max(means)
    assert best_record(best).validation_accuracy == max(r.validation_accuracy for r in best.records)
    assert best_row([]) is None


def test_marginal_means(trained_study):
    directory = StudyDirectory(trained_study)
    one, two = marginal_columns(marginals(directory, ["experts"]))
    assert (one["cells"], two["cells"], two["n"]) == (2, 2, 2)
    records = [row.records for row in study_rows(directory)[1:]]
    by_seed = [100 * np.mean([record.test_accuracy for record in seed]) for seed in zip(*records)]
    assert two["test acc %"] == pytest.approx(mean_interval(by_seed))
    with pytest.raises(InputError, match="unknown factor of .*: 'expert'; did you mean 'experts'?"):
        marginals(directory, ["expert"])
