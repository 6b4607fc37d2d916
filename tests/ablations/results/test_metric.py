"""A study by another metric than accuracy: verdicts, tables, the best cell, races; a study that is read by another."""

import json
import re
import shutil

import numpy as np
import pytest
from conftest import change_json, write_study
from PIL import Image
from scipy.special import softmax
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from expertgrid.ablations.records.directory import StudyDirectory
from expertgrid.ablations.records.predictions import Predictions
from expertgrid.ablations.results.answer import answer
from expertgrid.ablations.results.comparison import compare
from expertgrid.ablations.results.evidence import read_evidence
from expertgrid.ablations.results.report import plots
from expertgrid.ablations.results.rows import best_record, best_row, ranking, read_results, winner
from expertgrid.ablations.results.stats.contrasts import TURNED
from expertgrid.ablations.results.stats.selection import accuracy_interval, mean_interval
from expertgrid.ablations.results.tables.study import study_tables
from expertgrid.ablations.study.study_file import parse_study
from expertgrid.model.system.errors import InputError
from expertgrid.model.system.text import render_tables

STUDY = """
question = "?"
seeds = 6
{metric}
contrasts = [["kernel=5", "kernel=7"]]
[set]
width = 0.0625
epochs = 2
[factors]
kernel = [3, 5, 7]
"""
ENTROPY = 'metric = "cross_entropy"\nmargin = 0.02'


def drawn(levels: dict, seed: int) -> tuple[float, float]:
    """Validation and test accuracy: the kernel 5 is 4 points better than 3, and 7 is 4 points worse."""
    effect = {3: 0.0, 5: 4.0, 7: -4.0}[levels["kernel"]]
    rng = np.random.default_rng([seed, levels["kernel"]])
    return tuple(80 + effect + seed % 3 + rng.normal(0, 0.3, 2))


def written(digits, place, metric: str, **of_record) -> StudyDirectory:
    """A study whose records hold, beside their accuracy, numbers that follow from it by these functions."""
    directory = write_study(place, STUDY.format(metric=metric), digits, drawn)
    for file in directory.path.glob("trials/*/record.json"):
        record = json.loads(file.read_text())
        fields = {}
        for split in ("validation", "test"):
            accuracy = record[f"{split}_accuracy"]
            fields |= {f"{split}_loss": 2 - 2 * accuracy, f"{split}_metrics": {"auroc": (1 + accuracy) / 2}}
        change_json(file, **fields)
    return directory


@pytest.fixture
def entropy(digits, tmp_path) -> StudyDirectory:
    return written(digits, tmp_path / "entropy", ENTROPY)


@pytest.fixture
def accuracy(digits, tmp_path) -> StudyDirectory:
    return written(digits, tmp_path / "accuracy", "margin = 1.0")


def test_where_lower_is_better_all_is_accuracy_turned(entropy, accuracy):
    """The cross entropy of these records is 2 less twice the accuracy: a margin of 0.02 is one of 1 point."""
    ours, theirs = read_evidence(entropy), read_evidence(accuracy)
    assert [effect.judgement.verdict for effect in ours.effects] == ["better", "worse"]
    pairs = [(of.judgement, by.judgement) for of, by in zip(ours.effects, theirs.effects)]
    pairs += [*zip(ours.against_base[1:], theirs.against_base[1:]), (ours.declared[0].test, theirs.declared[0].test)]
    for of, by in pairs:
        assert of.verdict == by.verdict
        assert (of.mean, of.low, of.high) == pytest.approx((-by.mean / 50, -by.high / 50, -by.low / 50))
    assert ours.spread == pytest.approx(theirs.spread / 50)
    assert ours.sight.smallest == pytest.approx(theirs.sight.smallest / 50)
    rows, others = ours.results.rows, theirs.results.rows
    assert best_row(rows).name == best_row(others).name == "kernel 5"
    assert [row.name for row in ranking(rows)] == ["kernel 5", "kernel 3", "kernel 7"]
    assert best_record(best_row(rows)).trial == best_record(best_row(others)).trial
    assert winner(rows).corrected.mean == pytest.approx(2 - winner(others).corrected.mean / 50)
    assert rows[0].interval("test") == pytest.approx(mean_interval([of.test_loss for of in rows[0].records]))
    back = compare(entropy, ours, 2, 1).comparison
    assert back.judgement.verdict == TURNED[ours.declared[0].judgement.verdict] == "worse"


def test_tables_answer_and_figures_name_the_metric(entropy):
    evidence = read_evidence(entropy)
    text = render_tables(study_tables(entropy, evidence), "text", None)
    assert "What each factor does (validation cross entropy, lower is better; 6 seeds, each on its own tenth" in text
    assert re.search(r"kernel +3 -> 5 +-0\.0\d\d  -0\.\d{3} to -0\.\d{3}  better", text)
    assert "Contrasts that the study declares (lower is better)" in text
    assert re.search(r"n +val cross entropy +test cross entropy +effect", text)
    assert "the interval lies within 0.02. open" in text
    assert "Its test cross entropy: 0.3" in text
    assert not re.search("accuracy|acc %|points", text)
    assert re.match(r"Kernel 5 instead of 3 lowers cross entropy by 0\.0\d\d.*; kernel 7 .* raises", answer(evidence))
    figure = plots.accuracy_figure("", evidence.results.rows)
    assert figure.axes[0].get_xlabel().startswith("cross entropy: mean over seeds")
    assert figure.axes[0].texts[0].get_text() == "kernel 5"


def test_a_metric_in_points_is_read_as_accuracy_is(digits, tmp_path):
    directory = written(digits, tmp_path / "auroc", 'metric = "auroc"')
    row = read_results(directory).rows[0]
    values = [100 * of.validation_metrics["auroc"] for of in row.records]
    assert row.interval("validation") == pytest.approx(accuracy_interval(values))
    evidence = read_evidence(directory)
    assert evidence.effects[0].judgement.mean == pytest.approx(2, abs=0.3)
    assert answer(evidence).startswith("Kernel 5 instead of 3 adds 2.1 points of AUROC")


def test_a_race_goes_by_the_metric(entropy):
    plan = json.loads((entropy.path / "plan.json").read_text())
    rules = {"alpha": 0.05, "margin": 0.02, "first": 4, "last": 8, "contrasts": 2}
    change_json(entropy.path / "plan.json", race=rules)
    evidence = read_evidence(entropy)
    assert [(of.verdict, of.seeds) for of in evidence.race.judgements] == [("better", 4), ("worse", 4)]
    assert not evidence.race.go_on
    with pytest.raises(
        InputError, match="--metric auroc: the study declares cross_entropy, .* which a race has decided by"
    ):
        read_evidence(entropy, "auroc")
    assert plan["metric"] == {"name": "cross_entropy", "higher_is_better": False, "unit": "plain", "decimals": 3}


def test_a_study_is_read_by_another_metric_and_says_so(expertgrid, accuracy):
    out = expertgrid("table", accuracy.path, "--metric", "cross_entropy:0.02", "--notes").out
    assert "(validation cross entropy, lower is better, chosen after seeing; 6 seeds" in out
    assert "The metric, cross entropy, was chosen after seeing the results, so more than 1 such table in 20" in out
    assert "at most 1 such table" not in out
    two = ("--contrast", "kernel 3", "kernel 5", "--metric", "auroc")
    assert "Chosen after seeing the table" in expertgrid("table", accuracy.path, *two).out
    for metric, problem in (
        ("cross_entropy", "NAME:MARGIN is needed: which difference in cross entropy matters?"),
        ("auroc:nan", "NAME:MARGIN is needed"),
        ("accuracy:2", "the study declares accuracy, margin 1, and what is declared stays"),
        (
            "auc",
            "unknown metric 'auc'; did you mean 'auroc'? Accepted: accuracy, balanced_accuracy",
        ),
        (
            "macro_f1",
            "has no macro_f1, and its predictions do not give it; those of older studies, and of many classes",
        ),
    ):
        outcome = expertgrid("table", accuracy.path, "--metric", metric)
        assert outcome.status == 2
        assert problem in outcome.complaint
    assert "--peek is about accuracy" in expertgrid("table", accuracy.path, "--peek", "--metric", "auroc").complaint


def test_the_metric_is_declared_before_and_stays(expertgrid, accuracy, entropy):
    for metric, problem in (
        ('metric = "cross_entropy"', "metric 'cross_entropy' needs a margin"),
        ('metric = "auroc"\nmargin = 1.0', 'metric was "accuracy" when the study was begun, study.toml has "auroc"'),
    ):
        (accuracy.path / "study.toml").write_text(STUDY.format(metric=metric))
        assert problem in expertgrid("table", accuracy.path).complaint
    study = parse_study(STUDY.format(metric='metric = "auroc"\nmargin = 0.02'), entropy.path.with_suffix(".toml"))
    with pytest.raises(InputError, match='metric is "cross_entropy" there, and "auroc" here'):
        entropy.check_holds(study)


# --- What a training keeps ---

TINY = """
question = "?"
seeds = 2
metric = "auroc"
[base]
data = "folder:few"
[set]
width = 0.0625
epochs = 1
batch_size = 16
"""


def images(place, counts: dict[str, int]) -> None:
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name, count in counts.items():
            (place / "few" / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(256, size=(8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / "few" / split / name / f"{number}.png")


def test_a_training_keeps_what_any_metric_needs(expertgrid, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images(tmp_path, {"a": 40, "b": 30, "c": 20})
    (tmp_path / "mine.toml").write_text(TINY)
    plan = expertgrid("run", "mine.toml", "--dry-run").out
    assert "class 'c' has 2 validation images, which say little of it (3 classes have fewer than 10)." in plan
    assert "for log-probabilities of each image." in plan
    assert "One seed or one network has no verdicts." in plan
    outcome = expertgrid("run", "mine.toml", "--device", "cpu")
    assert outcome.status == 0, outcome.err
    assert re.search("n +val AUROC % +test AUROC %", outcome.out)
    directory = StudyDirectory(tmp_path / "runs" / "mine")
    for trial in directory.read_plan().trials:
        record, predictions = directory.record(trial), directory.predictions(trial)
        for split in ("validation", "test"):
            labels_B, log_BN = getattr(predictions, f"{split}_labels"), getattr(predictions, f"{split}_log")
            assert log_BN.dtype == np.float16
            auroc = roc_auc_score(labels_B, softmax(log_BN.astype(float), axis=1), multi_class="ovr")
            balanced = balanced_accuracy_score(labels_B, getattr(predictions, split))
            values = getattr(record, f"{split}_metrics")
            assert values == pytest.approx(
                {"balanced_accuracy": balanced, "macro_f1": values["macro_f1"], "auroc": auroc}
            )
    assert expertgrid("verify", directory.path).status == 0

    older = shutil.copytree(directory.path, tmp_path / "runs" / "older")  # before there were metrics
    for file in older.glob("trials/*/record.json"):
        change_json(file, validation_metrics={}, test_metrics={})
        with np.load(file.with_name("predictions.npz")) as arrays:
            whole = {name: array for name, array in arrays.items() if not name.endswith("_log")}
        np.savez_compressed(file.with_name("predictions.npz"), **whole)
    assert "has no auroc, and its predictions do not give it" in expertgrid("table", older).complaint
    by_hand = [
        100 * balanced_accuracy_score(of.validation_labels, of.validation)
        for of in map(StudyDirectory(older).predictions, directory.read_plan().cells[0].trials)
    ]
    row = read_results(StudyDirectory(older), "balanced_accuracy").rows[0]
    assert row.scores("validation") == pytest.approx(by_hand)

    trial = directory.read_plan().trials[0]
    change_json(directory.trial(trial) / "record.json", test_metrics={"auroc": 0.1})
    assert re.search(
        rf"trial {trial}: auroc of test is 0.1, but 0\.\d+ follows", expertgrid("verify", directory.path).out
    )
    file = directory.trial(trial) / "predictions.npz"
    whole = vars(directory.predictions(trial))
    for wrong, problem in (
        (whole["test_log"][1:], "the arrays of test have the shapes"),
        (whole["test_log"] * np.nan, "log-probabilities of test are not finite"),
    ):
        file.write_bytes(Predictions(**whole | {"test_log": wrong}).to_bytes())
        with pytest.raises(InputError, match=f"{problem}"):
            directory.predictions(trial)


def test_a_metric_that_some_seed_cannot_have_is_refused_before_training(expertgrid, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images(tmp_path, {"a": 40, "b": 30, "c": 3})
    (tmp_path / "mine.toml").write_text(TINY.replace("seeds = 2", "seeds = 10"))
    outcome = expertgrid("run", "mine.toml")
    assert outcome.status == 2
    assert re.search(
        r"metric auroc: is not defined on the hold-out of seed \d: class 'c' has no image", outcome.complaint
    )
    assert not (tmp_path / "runs").exists()
