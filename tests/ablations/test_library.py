"""`expertgrid.open`, `expertgrid.run` and `expertgrid table --rows`, as a notebook or a script calls them."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from conftest import REPOSITORY, change_json, write_study, written_epochs
from sklearn.metrics import f1_score

import expertgrid as library
from expertgrid.ablations.records.directory import StudyDirectory
from expertgrid.ablations.records.plan import RULES
from expertgrid.model.training.data import load_data

TYPED = """
question = "?"
seeds = 2
baselines = ["eight_block"]
[factors]
experts = [1, 2]
gate = ["mlp", {kind = "constant"}]
lr = [0.1, 1]
residual = [false, true]
"""


@pytest.fixture(scope="module")
def typed(tmp_path_factory, digits):
    """A study of which trials have failed and are missing."""
    results = {(False, 0): (50.0, 40.0), (True, 0): "diverged", (False, 1): (60.0, 40.0)}
    place = tmp_path_factory.mktemp("typed") / "typed"
    return write_study(place, TYPED, digits, lambda levels, seed: results.get((levels.get("residual"), seed)))


def test_trials_are_the_records_with_levels_of_their_types(typed):
    """One expert has no gate, and so no level of it."""
    trials = library.open(typed.path).trials()
    assert set(trials["trial"].to_pylist()) == set(typed.read_plan().trials)
    types = [str(trials.schema.field(name).type) for name in ("experts", "gate", "lr", "residual")]
    assert types == ["int64", "string", "double", "bool"]
    rows = trials.to_pylist()
    varied = [row for row in rows if row["experts"]]
    assert {(row["experts"], row["gate"]) for row in varied} == {(1, None), (2, "mlp"), (2, '{"kind": "constant"}')}
    assert {row["model_name"] for row in rows if not row["experts"]} == {"eight_block"}
    states = {(row["residual"], row["seed"]): row["status"] for row in rows}
    assert states == {
        (False, 0): "done", (True, 0): "failed", (False, 1): "done", (True, 1): "missing",
        (None, 0): "missing", (None, 1): "missing",
    }  # fmt: skip
    for row in rows:
        file = typed.trial(row["trial"]) / "record.json"
        assert file.exists() == (row["status"] == "done")
        assert (row["failure"] or "").startswith("diverged" if row["status"] == "failed" else "")
        if file.exists():
            record = json.loads(file.read_text())
            environment = record.pop("environment")
            assert row["environment.versions.torch"] == environment["versions"]["torch"]
            plain = {name: value for name, value in record.items() if not isinstance(value, dict)}
            assert {name: row[name] for name in plain} == plain


def test_cells_and_effects_are_those_of_the_tables(expertgrid, typed):
    study = library.open(typed.path)
    shown = json.loads(expertgrid("table", typed.path, "--format", "json").out)
    for row, cell in zip(study.cells().to_pylist(), shown["cells"], strict=True):
        done = 0 if cell["val acc %"] is None else 2
        assert (row["n"], row["planned"], row["val acc %"]) == (
            done,
            2,
            cell["val acc %"] and cell["val acc %"]["mean"],
        )
    effects = [row for row in study.effects().to_pylist() if row["family"] == "factors"]
    for row, effect in zip(effects, shown["factors"], strict=True):
        assert (row["factor"], f"{row['before']} -> {row['after']}") == (effect["factor"], effect["change"])
        assert (row["mean"], row["verdict"]) == (pytest.approx(effect["effect"]), effect["verdict"]["verdict"])


def test_epochs_and_predictions_are_those_of_the_files(trained_study):
    study, directory = library.open(trained_study), StudyDirectory(trained_study)
    epochs, predictions = study.epochs().to_pandas(), study.predictions().to_pandas()
    for row in study.trials().to_pylist():
        of_trial = epochs[epochs.trial == row["trial"]]
        assert list(of_trial.train_loss) == [epoch.train_loss for epoch in directory.epochs(row["trial"])]
        for split, images in predictions[predictions.trial == row["trial"]].groupby("split"):
            assert (images.predicted == images.label).mean() == pytest.approx(row[f"{split}_accuracy"])
            assert list(images.image) == list(range(row[f"{split}_images"]))
            log_BN = np.stack(images.log_probabilities).astype(np.float64)
            assert -log_BN[range(len(log_BN)), images.label].mean() == pytest.approx(row[f"{split}_loss"], abs=1e-3)
            assert row[f"{split}_metrics.macro_f1"] == pytest.approx(
                f1_score(images.label, images.predicted, average="macro", zero_division=0)
            )


def test_a_column_that_is_called_as_a_factor_is_told_from_it(tmp_path, digits):
    directory = write_study(
        tmp_path / "s", 'question = "?"\nseeds = 1\n[factors]\nlr = [0.5]', digits, lambda *_: (50, 50)
    )
    written_epochs(directory, directory.read_plan().trials[0], [40.0])
    (epoch,) = library.open(directory.path).epochs().to_pylist()
    assert (epoch["lr"], epoch["measured_lr"]) == (0.5, 0.1)


def test_rows_are_written_for_other_programs(expertgrid, typed, tmp_path):
    trials = library.open(typed.path).trials().to_pandas()
    file = tmp_path / "trials.parquet"
    command = ["table", typed.path, "--rows", "trials", "--format"]
    assert expertgrid(*command, "parquet", "--out", file).status == 0
    pd.testing.assert_frame_equal(pd.read_parquet(file), trials)
    assert json.loads(expertgrid(*command, "json").out)[0]["trial"] == trials.trial[0]
    assert expertgrid(*command, "csv", "--out", tmp_path / "trials.csv").status == 0
    read = pd.read_csv(tmp_path / "trials.csv", dtype={"trial": str})
    assert read.test_loss.equals(trials.test_loss)
    assert list(read.columns) == list(trials.columns) and list(read.trial) == list(trials.trial)
    assert expertgrid("table", typed.path, "--rows", "effects").out.startswith("family")
    for wrong, message in (
        (["--format", "parquet"], "--format parquet: needs --rows and --out FILE"),
        (["--out", "x"], "--out: is for --rows"),
        (
            ["--rows", "cells", "--peek"],
            "--rows: is for one study, without --by, --contrast, --peek, --notes and --methods",
        ),
        (["--rows", "cells", typed.path], "--rows: is for one study"),
    ):
        outcome = expertgrid("table", typed.path, *wrong)
        assert (outcome.status, outcome.out, message in outcome.complaint) == (2, "", True)


def test_no_text_of_a_csv_file_is_a_formula(tmp_path, digits, expertgrid):
    directory = write_study(tmp_path / "s", 'question = "?"', digits, lambda levels, seed: None)
    study_file = directory.path / "plan.json"
    study_file.write_text(study_file.read_text().replace('"two_block"', '"=HYPERLINK(1)"'))
    out = expertgrid("table", directory.path, "--rows", "trials", "--format", "csv").out
    assert ',"\'=HYPERLINK(1)",' in out and ',"=' not in out


def test_what_shows_a_study_is_its_tables(expertgrid, trained_study):
    study = library.open(trained_study)
    shown = expertgrid("table", trained_study).out
    assert shown.strip() in repr(study)
    assert repr(study).startswith("Two experts or one?\n\nWhat each factor does")
    assert "1 -&gt; 2" in study._repr_html_()
    with pytest.raises(library.InputError, match="not a study directory"):
        library.open(trained_study.parent)


SCRIPT = """
print("the script runs")
import sys, expertgrid
assert not {"pydantic", "numpy", "pyarrow", "torch", "expertgrid.ablations"} & set(sys.modules)
expertgrid.open(sys.argv[1]).trials()
assert not {"torch", "timm", "onnx"} & set(sys.modules)
import nets  # the processes that train import it too
fields = {"question": "?", "seeds": 2, "base": {"model": "net_of_a_file"}, "set": {"recipe.epochs": 1}}
study = expertgrid.run(fields, out="runs/of_a_script", device="cpu", jobs=2)
print(study.trials()["status"].to_pylist())
@nets.register_model
def net_of_a_cell(**kwargs):
    return nets.net_of_a_file(**kwargs)
fields["base"]["model"] = "net_of_a_cell"
try:
    expertgrid.run(fields, out="runs/of_a_cell")
except expertgrid.InputError as error:
    print(error)
"""
NETS = """
from timm.models import register_model
from torch import nn

@register_model
def net_of_a_file(pretrained=False, in_chans=3, num_classes=10, **kwargs):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))
"""


def test_a_script_trains_in_other_processes_which_do_not_run_it_again(trained_study, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY / "src"))
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "nets.py").write_text(NETS)
    line = [sys.executable, "script.py", str(trained_study)]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    first, status, refused = done.stdout.splitlines()
    assert (first, status) == ("the script runs", "['done', 'done']")
    assert refused.startswith("net_of_a_cell is registered in this script or notebook, where")
    assert "trial 2/2 net_of_a_file seed" in done.stderr
    assert not (tmp_path / "runs" / "of_a_cell").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({"question": "?"},), "out: a study that is a dict needs a directory"),
        (({"question": "?", "seed": 1},), "wrong.toml: unknown field 'seed'; did you mean 'seeds'?"),
        (("quickstarts",), "unknown study 'quickstarts'; did you mean 'quickstart'?"),
        (("tiny.toml",), "unknown device 'gpu'"),
    ],
)
def test_wrong_input_is_an_error_for_the_caller(tiny_study, arguments, message):
    out = None if "needs a directory" in message else "runs/wrong"
    with pytest.raises(library.InputError, match=message.replace("?", r"\?")):
        library.run(*arguments, out=out, device="gpu" if "gpu" in message else "cpu")
    assert not (tiny_study.parent / "runs").exists()


def test_a_run_goes_on_with_what_the_command_has_trained(tiny_study, trained_study):
    shutil.copytree(trained_study, tiny_study.parent / "runs" / "tiny")
    study = library.run(tiny_study, device="cpu")
    assert study.trials() == library.open(trained_study).trials()


def test_a_module_that_was_changed_since_is_an_error(tmp_path, monkeypatch):
    """The trials would be called by its older code, and trained by its newer one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "changing_nets.py").write_text("first = 1")
    for content, message in (("first = 1", "unknown study"), ("second = 2", "changing_nets.py was changed after it")):
        (tmp_path / "changing_nets.py").write_text(content)
        with pytest.raises(library.InputError, match=message):
            library.run("no_study", imports=["changing_nets.py"])
    del sys.modules["changing_nets"]


def test_the_examples_of_the_page_run(tmp_path):
    """One after another, as a script."""
    page = (REPOSITORY / "ablations" / "README.md").read_text()
    section = page.partition("## From a notebook or a script")[2].partition("\n## ")[0]
    examples = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(examples) == 5
    checks = """
assert means.sort_by("hflip")["hflip"].to_pylist() == [0.0, 0.5] and len(trials) == 4
assert set(open_ones) <= {"hflip 0.0 -> 0.5"} and len(curves) == 4 and confusion.sum() == 4 * 360
"""
    (tmp_path / "examples.py").write_text("\n".join([*examples, checks]))
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY / "src")}
    line = [sys.executable, "examples.py"]
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Do flips help?\n\nWhat each factor does")


def test_scores_of_any_table_are_judged_as_the_command_judges_them(tmp_path, expertgrid):
    scores = {"lr": [0.1] * 3 + [0.2] * 3, "seed": [0, 1, 2] * 2, "score": [91.2, 90.8, 91.1, 92.0, np.nan, 91.9]}
    frame, file = pd.DataFrame(scores), tmp_path / "scores.csv"
    frame.to_csv(file, index=False)
    judged = library.judge(scores, margin=0.5)
    assert repr(judged) == expertgrid("judge", file, "--margin", "0.5").out.rstrip("\n")
    assert "0.1 -&gt; 0.2" in judged._repr_html_()
    arrays = {name: np.array(column, dtype="float32") for name, column in scores.items()}
    for table in (frame.set_index("seed", drop=False), pa.table(scores)):
        assert library.judge(table, margin=0.5).effects == judged.effects
    alone = library.judge(
        arrays["score"], factors={"lr": frame["lr"]}, seed=pa.chunked_array([[0, 1, 2] * 2]), margin=0.5
    )
    assert alone.effects[0].judgement.mean == pytest.approx(judged.effects[0].judgement.mean, rel=1e-5)
    for wrong, message in (
        (arrays["score"], "a table with the columns"),
        (scores | {"seed": [0]}, "different lengths"),
    ):
        with pytest.raises(library.InputError, match=message):
            library.judge(wrong, margin=0.5)


def test_a_study_of_older_rules_says_so(expertgrid, study):
    plan = study.path / "plan.json"
    assert json.loads(plan.read_text())["rules"] == RULES
    change_json(plan, rules=1)
    older = f"Judged by version {RULES} of the rules; the study was begun under version 1"
    assert older in expertgrid("table", study.path, "--notes").out
    fields = study.read_study(), load_data("digits")
    study.write_plan(*fields, fields[0].cells(fields[1]))
    assert study.read_plan().rules == 1  # as the study was begun
    assert (
        json.loads(expertgrid("table", study.path, "--format", "json").out)["factors"][0]["verdict"]["rules"] == RULES
    )
