"""Training a trial again, and checking a study's numbers against what is kept beside them."""

import json
import shutil
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import change_json, snapshot
from safetensors import safe_open
from safetensors.torch import save_file

from expertgrid.ablations.records.directory import StudyDirectory
from expertgrid.ablations.records.ledger import TestRead
from expertgrid.ablations.records.plan import RULES
from expertgrid.ablations.results.rows import newest, read_results
from expertgrid.ablations.results.verify import verify_study
from expertgrid.model.system.text import SCHEMA


@pytest.fixture
def finished(trained_study) -> Path:  # what the fixture `study` copies
    return trained_study


def trial_of(study: StudyDirectory, seed: int = 1) -> str:
    return study.read_plan().cells[-1].trials[seed]


def change_weights(file: Path, by: float) -> None:
    with safe_open(file, "pt") as opened:
        about, weights = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    first = next(name for name, tensor in weights.items() if tensor.is_floating_point())
    weights[first] = weights[first] + by
    save_file(weights, file, about)


def test_a_trial_comes_out_the_same_and_its_record_stays(expertgrid, study):
    before = snapshot(study.path / "trials")
    outcome = expertgrid("rerun", study.path, trial_of(study), "--device", "cpu")
    assert outcome.status == 0, outcome.out + outcome.err
    assert outcome.out.endswith("The same: weights, losses, accuracies and predictions are equal to the last bit.\n")
    assert snapshot(study.path / "trials") == before
    assert [(read.trial, read.reader) for read in study.test_reads()][-1] == (trial_of(study), "rerun")
    assert "1 by trials that were trained again" in expertgrid("table", study.path, "--notes").out


def test_a_trial_that_comes_out_otherwise_is_status_1(expertgrid, study):
    trial = trial_of(study)
    change_weights(study.checkpoint(trial), 1e-7)
    record = study.trial(trial) / "record.json"
    change_json(record, test_loss=study.record(trial).test_loss + 1e-6)
    outcome = expertgrid("rerun", study.path, trial, "--device", "cpu", "--format", "json")
    assert outcome.status == 1
    rows = {row["what"]: row for row in json.loads(outcome.out)}
    assert [what for what, row in rows.items() if not row["same"]] == ["weights", "test loss"]
    assert rows["weights"]["difference"] == pytest.approx(1e-7, rel=0.5)


@pytest.mark.parametrize(("points", "status"), [(0.4, 0), (0.6, 1)])
def test_elsewhere_accuracies_within_the_margin_are_the_same(expertgrid, study, points, status):
    trial = trial_of(study)
    record, threads = study.record(trial), torch.get_num_threads()
    environment = record.environment.model_dump() | {"versions": {**record.environment.versions, "torch": "2.0"}}
    accuracy = record.test_accuracy + points / 100
    change_json(study.trial(trial) / "record.json", environment=environment, test_accuracy=accuracy, products=False)
    outcome = expertgrid("rerun", study.path, trial, "--device", "cpu")
    assert outcome.status == status
    assert "within 0.5 points; equality to the last bit is not expected (" in outcome.out
    assert f"torch was 2.0, is {version('torch')}" in outcome.out
    changed = "the way to weight gradients of small maps was the library's, is products"
    assert (changed in outcome.out) == record.products
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("near", "unknown trial of .*; did you mean '{trial}'?"),
        ("unknown", "unknown trial of"),
        ("unfinished", "trial {trial} of .* has no record to compare with: it is not finished"),
        ("data", "--data digits: not the images that trial {trial} was trained on"),
        ("config", "config.json: not of trial {trial}, its hash is "),
    ],
)
def test_what_cannot_be_trained_again_is_one_line(expertgrid, study, digits, monkeypatch, kind, message):
    trial = trial_of(study)
    named = {"near": trial[:-2], "unknown": "x"}.get(kind, trial)
    if kind == "unfinished":
        (study.trial(trial) / "record.json").unlink()
    if kind == "data":
        monkeypatch.setattr("expertgrid.model.training.data.load_data", lambda *_: replace(digits, fingerprint="other"))
    if kind == "config":
        change_json(study.trial(trial) / "config.json", fingerprint="other")
    outcome = expertgrid("rerun", study.path, named)
    assert outcome.status == 2
    for part in message.format(trial=trial).split(".*"):
        assert part in outcome.complaint


def test_a_study_without_any_weights_is_checked_by_the_rest(expertgrid, study):
    for weights in study.path.glob("trials/*/model.safetensors"):
        weights.unlink()
    outcome = expertgrid("verify", study.path)
    assert outcome.status == 0
    assert outcome.out.startswith("No trial keeps its weights: they were not compared with config.json\n")
    change_json(study.trial(trial_of(study)) / "record.json", macs=7)
    outcome = expertgrid("verify", study.path)
    assert outcome.status == 1
    assert "macs is 7, but " in outcome.out


def without_ledger(study: StudyDirectory, trial: str) -> None:
    lines = (study.path / "ledger.jsonl").read_text().splitlines()
    (study.path / "ledger.jsonl").write_text("".join(f"{line}\n" for line in lines if trial not in line))


def with_other_predictions(study: StudyDirectory, trial: str) -> None:
    before = study.predictions(trial)
    after = replace(before, test=(before.test + 1) % 10, test_labels=np.roll(before.test_labels, 1))
    (study.trial(trial) / "predictions.npz").write_bytes(after.to_bytes())


@pytest.mark.parametrize(
    ("break_it", "problem"),
    [
        (lambda s, t: change_json(s.trial(t) / "record.json", test_accuracy=0.5), "test_accuracy is 0.5, but "),
        (lambda s, t: change_json(s.trial(t) / "record.json", epochs=3), "epochs is 3, but 2 follows from the rest"),
        (lambda s, t: change_json(s.trial(t) / "record.json", seed=0), "seed is 0, but 1 follows"),
        (lambda s, t: change_json(s.trial(t) / "record.json", parameters=7), "parameters is 7, but "),
        (lambda s, t: change_json(s.trial(t) / "record.json", images_per_s=7.0), "images_per_s is 7.0, but "),
        (lambda s, t: change_json(s.trial(t) / "record.json", trial="x"), "trial in record.json is x"),
        (lambda s, t: change_json(s.trial(t) / "record.json", extra=1), "unknown field 'extra'"),
        (lambda s, t: change_json(s.trial(t) / "config.json", seed=5), "hash of config.json is "),
        (lambda s, t: (s.trial(t) / "config.json").unlink(), "there is no config.json"),
        (lambda s, t: s.checkpoint(t).unlink(), "there is no such checkpoint"),
        (lambda s, t: shutil.copy(s.checkpoint(trial_of(s, 0)), s.checkpoint(t)), "trial in model.safe"),
        (lambda s, t: (s.trial(t) / "epochs.jsonl").write_text("{}\n"), "epochs.jsonl"),
        (lambda s, t: (s.trial(t) / "predictions.npz").write_bytes(b"PK"), "predictions.npz: not a file of pred"),
        (with_other_predictions, "trials of one hold-out have different labels: "),
        (without_ledger, "ledger.jsonl: has no read of the test split by the training of "),
    ],
)
def test_each_thing_that_does_not_fit_is_a_line(expertgrid, study, break_it, problem):
    break_it(study, trial_of(study))
    outcome = expertgrid("verify", study.path)
    assert outcome.status == 1
    assert any(problem in line for line in outcome.out.splitlines()[:-1]), outcome.out


def test_a_report_with_other_numbers_is_found_and_an_older_one_is_a_note(expertgrid, study):
    shown = json.loads(expertgrid("table", study.path, "--format", "json").out)
    rows = {key: shown[key] for key in ("factors", "cells")}

    def write(time: str, rules: int = RULES) -> None:
        numbers = json.dumps({"newest": time, "rules": rules, "schema": SCHEMA, "tables": rows})
        script = f'<script type="application/json" id="numbers">{numbers}</script>'
        (study.path / "report.html").write_text(script)

    time = newest(study, read_results(study))
    write(time)
    assert verify_study(study).problems == []
    rows["cells"][1]["test acc %"]["mean"] += 0.01
    write(time)
    (problem,) = verify_study(study).problems
    assert problem.startswith("report.html: test acc % mean in row 2 of cells is ")
    study.enter(TestRead(time="9998", trial=trial_of(study), reader="export", images=360))  # the report is older now
    older = (
        f"report.html is older than the study, or than version {RULES} of the rules, and was not compared; "
        "`expertgrid report` renews it"
    )
    assert (verify_study(study).problems, verify_study(study).skipped) == ([], [older])
    write("9999", rules=1)
    assert (verify_study(study).problems, verify_study(study).skipped) == ([], [older])
    write("9999")
    assert "report.html: time of the newest measurement is 9999, but " in verify_study(study).problems[0]


def test_a_whole_study_fits_and_records_of_before_predictions_were_kept_say_so(expertgrid, study):
    (line,) = expertgrid("verify", study.path).out.splitlines()
    assert line.endswith(" checks, 0 do not fit")
    (study.trial(trial_of(study)) / "predictions.npz").unlink()
    outcome = expertgrid("verify", study.path)
    assert (outcome.status, len(outcome.out.splitlines())) == (0, 2)
    assert outcome.out.startswith("1 trials kept no predictions: their accuracies were not recomputed\n")
