"""Scores that were made elsewhere get the verdicts that a study of the same scores gets."""

import json
from itertools import product

import numpy as np
import pytest

from expertgrid.ablations.results.scores import judge_scores, read_scores
from expertgrid.ablations.results.stats.contrasts import judge
from expertgrid.model.system.errors import InputError

POINTS = list(product(("0.1", "0.2"), ("relu", "gelu", "silu")))
SCORES = np.random.default_rng(0).normal(90, 0.3, size=(6, 5)) + np.array([[0, 1, 2, 0.1, 1, 2]]).T


def columns(scores_CS=SCORES):
    rows = [(*point, seed, scores_CS[cell, seed]) for cell, point in enumerate(POINTS) for seed in range(5)]
    return dict(zip(("lr", "act", "seed", "score"), map(list, zip(*rows))))


def test_verdicts_are_those_of_the_model():
    judged = judge_scores(columns(), margin=0.5)
    assert [(effect.factor, effect.before, effect.after) for effect in judged.effects] == [
        ("lr", "0.1", "0.2"), ("act", "relu", "gelu"), ("act", "relu", "silu"),
    ]  # fmt: skip
    weights = np.array([[-1, -1, -1, 1, 1, 1], [-1.5, 1.5, 0] * 2, [-1.5, 0, 1.5] * 2]) / 3
    assert [effect.judgement for effect in judged.effects] == judge(weights, SCORES, 0.5)
    assert [cell.may_be_best for cell in judged.cells] == [False, False, True, False, False, True]
    assert judged.cells[0].mean == pytest.approx(SCORES[0].mean())


def test_a_loss_is_turned():
    judged = judge_scores(columns(), margin=0.5)
    turned = judge_scores(columns(-SCORES), margin=0.5, lower_is_better=True)
    assert [effect.judgement.verdict for effect in turned.effects] == [
        effect.judgement.verdict for effect in judged.effects
    ]
    assert turned.effects[2].judgement.mean == -judged.effects[2].judgement.mean < 0
    assert [cell.may_be_best for cell in turned.cells] == [cell.may_be_best for cell in judged.cells]
    assert turned.cells[0].mean == -judged.cells[0].mean


def test_a_missing_score_costs_itself():
    table = columns()
    table["score"][7] = None
    judged = judge_scores(table, margin=0.5)
    assert (judged.missing, judged.cells[1].seeds) == (1, 4)
    assert 4 < judged.effects[0].judgement.seeds < 5
    shorter = {name: values[:7] + values[8:] for name, values in columns().items()}
    assert judge_scores(shorter, margin=0.5) == judged


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": ["x"] * 30}, "row 1: the score is 'x'; a finite number is needed"),
        ({"score": [float("inf")] * 30}, "row 1: the score is inf"),
        ({"seed": [0] * 30}, "row 2: a second score of lr 0.1, act relu at seed 0"),
        ({"lr": ["1"] * 30, "act": ["1"] * 30}, "fewer than two cells"),
    ],
)
def test_what_is_no_table_of_scores(change, message):
    with pytest.raises(InputError, match=message):
        judge_scores(columns() | change, margin=0.5)
    with pytest.raises(InputError, match="no column 'score'"):
        judge_scores({"seed": [0]}, margin=0.5)
    with pytest.raises(InputError, match="margin must be above 0"):
        judge_scores(columns(), margin=float("nan"))


def test_the_command(tmp_path, expertgrid):
    file, table = tmp_path / "scores.csv", columns()
    lines = [",".join(table), *(",".join(map(str, row)) for row in zip(*table.values()))]
    file.write_text("\n".join(lines))
    assert {name: list(map(str, values)) for name, values in read_scores(file).items()}["act"] == table["act"]
    outcome = expertgrid("judge", file, "--margin", "0.5", "--format", "json")
    rows = json.loads(outcome.out)["factors"]
    assert [row["change"] for row in rows] == ["0.1 -> 0.2", "relu -> gelu", "relu -> silu"]
    assert [row["verdict"]["verdict"] for row in rows][1:] == ["better", "better"]
    file.write_text("lr,seed\n1,2\n")
    outcome = expertgrid("judge", file, "--margin", "0.5")
    assert (outcome.status, outcome.err) == (2, "error: the table has no column 'score'; its columns are lr, seed\n")
