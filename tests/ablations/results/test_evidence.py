"""What a table claims, against scipy and by hand, on records that were written for it."""

import csv
import io
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import scipy.stats
from conftest import write_study, written_epochs

from ablations.records import Plan, Predictions, Race, StudyDirectory
from ablations.results import stats
from ablations.results.evidence import (
    best_row,
    common_scores,
    compare,
    contrast_of,
    find_row,
    judge,
    marginals,
    on_test,
    on_validation,
    peek,
    row_name,
    study_rows,
    winner,
)
from ablations.results.tables import columns, comparison_columns, comparison_notes, notes, render
from model.errors import InputError
from model.files import write_whole

GRID = """
question = "?"
seeds = 6
margin = 1.0
[set]
width = 0.0625
epochs = 2
[factors]
experts = [2, 4]
kernel = [3, 5, 7]
"""
ONE = """
question = "?"
design = "one_at_a_time"
seeds = 4
baselines = ["segmented"]
[set]
width = 0.0625
epochs = 2
[factors]
experts = [4, 2]
gate = ["mlp"]
"""
EFFECTS = {"3": 0.0, "5": 4.0, "7": 0.1}  # of the kernel, in points


def drawn(levels: dict, seed: int) -> tuple[float, float]:
    """Validation and test accuracy: an effect, what the seed does to all cells, and noise."""
    rng = np.random.default_rng([seed, levels["experts"], levels["kernel"]])
    shared = np.random.default_rng(seed).normal(0, 2)
    both = 80 + EFFECTS[str(levels["kernel"])] + shared
    return both + rng.normal(0, 0.3), both - 1 + rng.normal(0, 0.3)


@pytest.fixture
def grid(digits, tmp_path) -> StudyDirectory:
    return write_study(tmp_path / "grid", GRID, digits, drawn)


def by_hand(p_values: list[float]) -> list[float]:
    """Holm's adjusted p-values."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, p_values[i] * (len(p_values) - rank)))
        adjusted[i] = largest
    return adjusted


def test_verdicts_are_paired_t_tests(grid):
    rows = study_rows(grid)
    judgements = judge(rows, 1.0)
    assert judgements[0].verdict == "reference"
    _, scores_CS, _ = common_scores(rows)
    for row_S, one in zip(scores_CS[1:], judgements[1:]):
        oracle = scipy.stats.ttest_rel(row_S, scores_CS[0])
        assert one.mean == pytest.approx(np.mean(row_S - scores_CS[0]))
        assert (one.low, one.high) == pytest.approx(tuple(oracle.confidence_interval()))
        assert (one.seeds, one.paired, one.left_out) == (6, True, ())
    assert [one.verdict for one in judgements[1:]] == ["better", "equivalent", "equivalent", "better", "equivalent"]
    shown = columns(rows, judgements)
    assert [row["verdict"].verdict for row in shown] == [one.verdict for one in judgements]


def test_p_values_are_holms(grid):
    rows = study_rows(grid)
    _, scores_CS, _ = common_scores(rows)
    contrasts = [stats.paired_contrast(row_S - scores_CS[0]) for row_S in scores_CS[1:]]
    p = [scipy.stats.ttest_rel(row_S, scores_CS[0]).pvalue for row_S in scores_CS[1:]]
    assert [one.p_difference for one in stats.decide(contrasts)] == pytest.approx(by_hand(p))


def test_the_scores_decide_and_are_those_of_validation(digits, tmp_path):
    """A cell that is better on test alone is not better, and is not the best."""
    directory = write_study(
        tmp_path / "s", GRID, digits, lambda levels, seed: (80 + 0.1 * seed, 99.0 if levels["kernel"] == 7 else 70.0)
    )
    rows = study_rows(directory)
    judgements = judge(rows, 1.0)
    assert {one.verdict for one in judgements[1:]} == {"undecided"}
    assert all("the same for all 6 seeds" in one.reason for one in judgements[1:])
    assert best_row(rows) is rows[0]


def test_one_seed_has_no_interval_and_the_table_says_why(digits, tmp_path):
    directory = write_study(tmp_path / "s", GRID.replace("seeds = 6", "seeds = 1"), digits, drawn)
    rows = study_rows(directory)
    judgements = judge(rows, 1.0)
    table = render(columns(rows, judgements), "text", notes(directory, directory.plan, rows, judgements))
    assert "verdict" not in table.splitlines()[0]
    assert "one seed has no interval." in table
    assert re.search(r"No verdict on experts 2, kernel 5;.*: one seed has no interval\.", table)
    assert "±" not in table.split("\n\n")[0]


def test_what_is_missing_or_failed_is_counted_and_named(digits, tmp_path):
    def some(levels, seed):
        if levels == {"experts": 2, "kernel": 5} and seed == 1:
            return "diverged"
        if levels == {"experts": 4, "kernel": 7}:
            return "out_of_memory" if seed == 0 else None
        return drawn(levels, seed)

    directory = write_study(tmp_path / "s", GRID, digits, some)
    rows = study_rows(directory)
    judgements = judge(rows, 1.0)
    assert (judgements[1].seeds, judgements[1].left_out) == (5, (1,))
    assert judgements[-1].verdict == "undecided"
    table = render(columns(rows, judgements), "text", notes(directory, directory.plan, rows, judgements))
    diverged = rows[1].trials[1]
    assert "5/6" in table
    assert "0/6" in table
    assert "Failed: 2 of the trials (1 diverged, 1 out_of_memory)." in table
    assert f"Failed: {diverged}: diverged: the loss is nan" in table
    assert f"Not finished: 5 of the trials: {', '.join(rows[-1].trials[1:])}." in table
    assert "Verdict on experts 2, kernel 5: without seed 1, which only one of the two has." in table
    assert "No verdict on experts 4, kernel 7: experts 4, kernel 7 has no finished trial." in table


def test_cells_without_common_seeds_are_unpaired_and_say_so(digits, tmp_path):
    def halves(levels, seed):
        early = levels["experts"] == 2
        return drawn(levels, seed) if early == (seed < 3) else None

    directory = write_study(tmp_path / "s", GRID, digits, halves)
    rows = study_rows(directory)
    one = judge(rows, 1.0)[-1]
    groups = [list(row.by_seed(on_validation).values()) for row in (rows[-1], rows[0])]
    low, high = scipy.stats.ttest_ind(*groups, equal_var=False).confidence_interval()
    assert (one.paired, one.low, one.high) == (False, pytest.approx(low), pytest.approx(high))
    text = "\n".join(notes(directory, directory.plan, rows, judge(rows, 1.0)))
    assert "unpaired, fewer than two seeds are common" in text


def test_one_at_a_time_is_against_the_base_and_has_baselines(digits, tmp_path):
    def scores(levels, seed):
        value = 70 + seed if not levels else 80 + seed + 0.01 * seed * seed
        return (value, value) if levels.get("experts") != 2 else (value + 5 + 0.2 * seed, value)

    directory = write_study(tmp_path / "s", ONE, digits, scores)
    rows = study_rows(directory)
    judgements = dict(zip(map(row_name, rows), judge(rows, 0.5)))
    assert [one.verdict for one in judgements.values()] == ["reference", "better", "worse"]
    levels = {one.levels["experts"]: one.effect for one in marginals(directory, ["experts"])}
    assert (levels["base"].verdict, levels["2"].verdict) == ("reference", "better")
    assert (levels["4"].verdict, levels["4"].reason) == ("equivalent", "it is the same network")
    with pytest.raises(InputError, match="experts and gate never together"):
        marginals(directory, ["experts", "gate"])


def test_main_effects_and_interactions_by_hand(grid):
    rows = study_rows(grid)
    _, scores_CS, test_CS = common_scores(rows)
    scores_LMS = scores_CS.reshape(2, 3, 6)
    three, five, seven = marginals(grid, ["kernel"])
    assert three.effect.verdict == "reference"
    for one, level in ((five, 1), (seven, 2)):
        differences_S = (scores_LMS[:, level] - scores_LMS[:, 0]).mean(0)
        low, high = scipy.stats.ttest_1samp(differences_S, 0).confidence_interval()
        assert (one.effect.mean, one.effect.low, one.effect.high) == pytest.approx((differences_S.mean(), low, high))
        assert one.validation == pytest.approx(stats.mean_interval(scores_LMS[:, level].mean(0)))
        assert one.test.mean == pytest.approx(test_CS.reshape(2, 3, 6)[:, level].mean())
    assert (five.effect.verdict, seven.effect.verdict) == ("better", "equivalent")
    both = {tuple(one.levels.values()): one.effect for one in marginals(grid, ["kernel", "experts"])}
    assert both["3", "2"] is both["5", "2"] is both["3", "4"] is None
    adds_S = (scores_LMS[1, 1] - scores_LMS[1, 0]) - (scores_LMS[0, 1] - scores_LMS[0, 0])
    assert both["5", "4"].mean == pytest.approx(adds_S.mean())


def test_a_hole_in_the_design_leaves_means_and_no_effects(expertgrid, digits, tmp_path):
    def holed(levels, seed):
        return None if levels == {"experts": 4, "kernel": 7} else drawn(levels, seed)

    directory = write_study(tmp_path / "s", GRID, digits, holed)
    rows = marginals(directory, ["experts"])
    assert [(one.cells, one.effect) for one in rows] == [(3, None), (2, None)]
    assert "No effects: some cell has no finished trial" in expertgrid("table", directory.path, "--by", "experts").out


def test_the_winner_is_corrected_for_having_been_the_best(digits, tmp_path):
    """Equal cells: the best on validation looks good on test by its seeds, and on the seed left out it does not."""
    rng = np.random.default_rng(0)
    luck = {}

    def equal(levels, seed):
        both = luck.setdefault((str(levels), seed), rng.normal(80, 2))
        return both + rng.normal(0, 0.1), both + rng.normal(0, 0.1)

    directory = write_study(tmp_path / "s", GRID, digits, equal)
    rows = study_rows(directory)
    found = winner(rows)
    _, validation_CS, test_CS = common_scores(rows)
    chosen = [np.delete(validation_CS, seed, 1).mean(1).argmax() for seed in range(6)]
    corrected = np.mean([test_CS[cell, seed] for seed, cell in enumerate(chosen)])
    assert found.corrected.mean == pytest.approx(corrected)
    assert found.reported.mean == pytest.approx(test_CS[validation_CS.mean(1).argmax()].mean())
    assert found.reported.mean == pytest.approx(best_row(rows).interval(on_test).mean)
    text = "\n".join(notes(directory, directory.plan, rows))
    assert f"corrected for its luck as the best of 6: {corrected:.2f} ±" in text


def test_seeds_that_would_decide_pay_for_the_whole_family(digits, tmp_path):
    rows = study_rows(write_study(tmp_path / "s", GRID, digits, drawn))
    judgements = judge(rows, 0.5)
    undecided = [(row, one) for row, one in zip(rows[1:], judgements[1:]) if one.further_seeds]
    assert undecided
    for row, one in undecided:
        contrast = contrast_of(row, rows[0], on_validation)
        assert one.further_seeds == stats.further_seeds(contrast, 0.05 / (len(rows) - 1), 0.5)


def test_seeds_that_were_added_after_a_look_take_the_guarantee_away(digits, tmp_path):
    directory = write_study(tmp_path / "s", GRID.replace("seeds = 6", "seeds = 3"), digits, drawn)
    assert "right with probability 0.95" in "\n".join(notes_of(directory))
    write_study(tmp_path / "s", GRID, digits, drawn)
    text = "\n".join(notes_of(directory))
    assert "right with probability" not in text
    assert "Seeds were added after the results of 3 were there to be seen" in text


def notes_of(directory):
    rows = study_rows(directory)
    return notes(directory, directory.plan, rows, judge(rows, 1.0))


def test_peeking_is_of_the_validation_curves(expertgrid, digits, tmp_path):
    directory = write_study(tmp_path / "s", GRID.replace("seeds = 6", "seeds = 2"), digits, drawn)
    curves = {0: [70.0, 60.0], 1: [50.0, 75.0]}
    for row in study_rows(directory):
        for record in row.records:
            written_epochs(directory, record.trial, curves[record.seed])
    one = peek(directory, study_rows(directory)[0])
    assert (one.last, one.best_epoch, one.best, one.gain) == pytest.approx((67.5, 72.5, 75.0, 7.5))
    outcome = expertgrid("table", directory.path, "--peek")
    assert re.search(r"experts 2, kernel 3 +2 +67.50 +72.50 +75.00 +7.50", outcome.out)
    assert (
        "The test split is read once, after the last step, so these are curves of the validation split" in outcome.out
    )
    file = next(directory.path.glob("trials/*/epochs.jsonl"))
    file.write_text(file.read_text().splitlines()[0] + "\n")
    assert "epochs.jsonl: has 1 epochs, the trial has 2" in expertgrid("table", directory.path, "--peek").complaint


def test_cells_are_found_by_name_and_by_levels(grid, digits, tmp_path):
    rows = study_rows(grid)
    for text in ("experts 4, kernel 5", "experts=4,kernel=5", "kernel=5 experts=4", "kernel 5, experts 4"):
        assert find_row(rows, text) is rows[4]
    with pytest.raises(InputError, match=r"cell 'experts=4' is 3 cells: experts 4, kernel 3; "):
        find_row(rows, "experts=4")
    for text in ("experts=8,kernel=3", "mlp", "", "experts"):
        with pytest.raises(InputError, match=r"unknown cell .* Accepted: experts 2, kernel 3, experts 2, kernel 5"):
            find_row(rows, text)
    text = GRID.replace("experts = [2, 4]", "experts = [1, 2]").replace(
        "kernel = [3, 5, 7]", 'gate = ["linear", "mlp"]'
    )
    shared = study_rows(write_study(tmp_path / "s", text, digits, lambda levels, seed: (80.0, 80.0)))
    assert find_row(shared, "experts=1,gate=mlp") is find_row(shared, "experts=1") is shared[0]


def test_a_contrast_in_full(grid, expertgrid):
    rows = study_rows(grid)
    rng = np.random.default_rng(0)
    labels = rng.integers(10, size=360)
    for row in rows[:2]:
        for record in row.records:
            predicted = np.where(rng.random(360) < 0.8, labels, (labels + 1) % 10)
            kept = Predictions(labels[:144], labels[:144], predicted, labels)
            write_whole(grid.trial(record.trial) / "predictions.npz", kept.to_bytes())
    one = compare(grid, rows, rows[1], rows[0])
    splits, seeds = comparison_columns(one)
    _, validation_CS, test_CS = common_scores(rows)
    for split, scores_CS in zip(splits, (validation_CS, test_CS)):
        oracle = scipy.stats.ttest_rel(scores_CS[1], scores_CS[0])
        assert (split["p"], split["t low"], split["t high"]) == pytest.approx(
            (oracle.pvalue, *oracle.confidence_interval())
        )
        assert split["bootstrap low"] < split["A - B"] < split["bootstrap high"]
    for seed, row in enumerate(seeds):
        kept = [grid.predictions(one.trials[seed]) for one in (rows[1], rows[0])]
        right = [predictions.test == labels for predictions in kept]
        only = [int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())]
        assert [row["only A right"], row["only B right"]] == only
        assert row["McNemar p"] == pytest.approx(scipy.stats.binomtest(only[0], sum(only)).pvalue)
        assert row["val A - B"] == pytest.approx(validation_CS[1, seed] - validation_CS[0, seed])
    assert "Verdict, on validation: A is better than B." in comparison_notes(one, 1.0)
    again = json.loads(
        expertgrid("table", grid.path, "--contrast", "experts=2,kernel=5", "experts=2,kernel=3", "--format", "json").out
    )
    assert again["verdict"]["mean"] == pytest.approx(one.judgement.mean)
    assert again["seeds"] == json.loads(render(seeds, "json"))
    assert (
        "No McNemar test" in expertgrid("table", grid.path, "--contrast", "experts=4,kernel=5", row_name(rows[0])).out
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--contrast", "experts=2,kernel=3", "kernel=9"], "unknown cell 'kernel=9'"),
        (["--contrast", "experts=2", "experts=4"], "cell 'experts=2' is 3 cells"),
        (["--contrast", "experts=2,kernel=3", "experts 2, kernel 3"], "are one cell"),
        (["--contrast", "experts=2"], "Option '--contrast' requires 2 arguments"),
        (["--by", "experts", "--peek"], "--by, --contrast and --peek are different tables"),
        (["--by", "experts,kernels"], "unknown factor of .*: 'kernels'; did you mean 'kernel'?"),
        (["--by", "experts,experts"], "one factor, or two different ones"),
    ],
)
def test_wrong_questions_are_one_line(expertgrid, grid, arguments, message):
    outcome = expertgrid("table", grid.path, *arguments)
    assert (outcome.status, outcome.out) == (2, "")
    assert re.search(message, outcome.complaint)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("record.json", '{"trial": 1'),
        ("record.json", None),
        ("failure.json", "{}"),
    ],
)
def test_a_damaged_record_is_named(expertgrid, grid, name, content):
    file = grid.trial(study_rows(grid)[0].trials[0]) / name
    fields = json.loads((file.parent / "record.json").read_text())
    file.write_text(content or json.dumps({**fields, "test_accuracy": 1.5}))
    outcome = expertgrid("table", grid.path)
    assert outcome.status == 2
    assert str(file) in outcome.complaint


def test_a_verdict_in_csv_and_json_has_its_numbers(expertgrid, grid):
    judgements = judge(study_rows(grid), 1.0)
    rows = json.loads(expertgrid("table", grid.path, "--format", "json").out)
    flat = list(csv.DictReader(io.StringIO(expertgrid("table", grid.path, "--format", "csv").out)))
    for one, row, line in zip(judgements[1:], rows[1:], flat[1:]):
        assert row["verdict"]["mean"] == one.mean == float(line["verdict mean"])
        assert row["verdict"]["p"] == one.p == float(line["verdict p"])
    assert rows[0]["verdict"]["verdict"] == flat[0]["verdict"] == "reference"


def test_a_race_gives_the_verdicts_of_a_race(grid):
    rows = study_rows(grid)
    race = Race(alpha=0.05, margin=1.0, first=3, last=6, contrasts=5)
    judgements = judge(rows, 9.0, race)
    for row, one in zip(rows[1:], judgements[1:]):
        differences = [row.by_seed(on_validation)[seed] - rows[0].by_seed(on_validation)[seed] for seed in range(6)]
        oracle = stats.race(differences, 6, 1.0, 5, 0.05, 3)
        assert (one.verdict, one.seeds, one.low) == (oracle.verdict, oracle.seeds, oracle.low)
    fixed = judge(rows, 1.0)[1]
    assert judgements[1].seeds < 6
    assert judgements[1].high - judgements[1].low > fixed.high - fixed.low
    plan = Plan(**{**dict(grid.plan), "race": race})
    write_whole(grid.path / "plan.json", plan.model_dump_json().encode())
    assert "by a race of 3 to 6 seeds" in "\n".join(notes(grid, grid.plan, rows, judgements))
    assert compare(grid, rows, rows[1], rows[0]).judgement == judgements[1]
    other = compare(grid, rows, rows[1], rows[2]).judgement
    assert (other.verdict, other.reason[:26]) == ("undecided", "seeds were added by a race")
    assert {one.seeds for one in marginals(grid, ["kernel"])} == {3}


def test_latex_is_whole(grid, tmp_path):
    """Every special character is escaped and every line has as many cells; it compiles where LaTeX is installed."""
    rows = study_rows(grid)
    table = columns(rows, judge(rows, 1.0))
    table[0] = {**table[0], "experts": r"100 % & #1 $x_{2}$ ~ ^ \frac"}
    text = render(table, "latex", ["100 % of it"])
    body = [line for line in text.splitlines() if "&" in line]
    plain = [re.sub(r"\$\\pm\$|\\[&%$#_{}]|\\text[a-z]+\{\}|\\[\^~]\{\}", "", line) for line in body]
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
