"""The training speed of a study's cells, measured alone."""

import json
import shutil

import numpy as np
import pytest

from expertgrid.ablations.records.directory import TRAINING, StudyDirectory


@pytest.fixture
def study(trained_study, tmp_path):
    return shutil.copytree(trained_study, tmp_path / "tiny")


def test_cells_are_timed_in_turns_and_the_table_shows_it(expertgrid, study):
    before = json.loads(expertgrid("table", study, "--format", "json").out)["cells"]
    short = "--steps", 1, "--rounds", 3, "--device", "cpu", "--format", "json"
    outcome = expertgrid("bench-train", study, *short)
    assert outcome.status == 0, outcome.err
    found = json.loads(outcome.out)
    rates = StudyDirectory(study).training_rates()
    assert len(found) == len(before) == len(rates.images_per_s)
    for row, (trial, rate) in zip(found, rates.images_per_s.items(), strict=True):
        assert row["slowest"] <= row["train images/s"] == rate == np.median(rates.rounds[trial]) <= row["fastest"]
        assert len(rates.rounds[trial]) == 3
    after = json.loads(expertgrid("table", study, "--format", "json").out)["cells"]
    assert [row["train images/s"] for row in after] == list(rates.images_per_s.values())
    assert [row["val acc %"] for row in after] == [row["val acc %"] for row in before]
    said = "Train images/s: each cell alone and in turns at full image size, on cpu"
    assert said in expertgrid("table", study, "--notes").out
    assert expertgrid("check", study).status == 0
    assert expertgrid("verify", study).status == 0


def test_what_cannot_be_timed(expertgrid, study, tmp_path):
    for arguments, reason in (
        (["bench-train", study, "--batch", 8], "--batch: a study's recipes have the batch sizes"),
        (["bench-train", study, "--image-size", 64], "--image-size: a study's data has the size of its images"),
        (["bench-train", study, "--set", "experts=2"], "--set: is for a model; a study directory was given"),
        (["bench-train", study, "--profile"], "--profile: is for a model; a study directory was given"),
        (["bench-train", tmp_path], "not a study directory: there is no study.toml"),
        (["bench-train", "two_block", "--data", "digits"], "--data: is for a study directory"),
    ):
        outcome = expertgrid(*arguments)
        assert (outcome.status, reason in outcome.complaint) == (2, True), outcome.complaint
    (study / TRAINING).write_text("{}")
    outcome = expertgrid("table", study)
    assert (outcome.status, "delete it and run expertgrid bench-train again" in outcome.complaint) == (2, True)
    (study / TRAINING).unlink()
    shutil.rmtree(study / "trials")
    assert "no trial of this study is finished" in expertgrid("bench-train", study, "--device", "cpu").complaint
