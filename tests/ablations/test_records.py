"""The study directory: whole files, one writer, and nothing lost."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ablations.records import StudyDirectory
from ablations.study import parse_study
from bench.latency import Latency, LatencyRecord
from model.errors import InputError
from model.files import write_whole

STUDY = parse_study('question = "?"\n[factors]\nexperts = [1, 2]', Path("one.toml"))


def test_a_file_is_whole_or_the_old_one(tmp_path, monkeypatch):
    file = tmp_path / "folder" / "file"
    write_whole(file, b"old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        write_whole(file, b"new")
    assert file.read_bytes() == b"old"
    assert [path.name for path in file.parent.iterdir()] == ["file"]


def test_study_comes_back_as_it_was(tmp_path, digits):
    directory = StudyDirectory(tmp_path / "runs" / "one")
    with directory.written(STUDY, digits, STUDY.cells(digits)):
        pass
    assert directory.study.model_dump() == STUDY.model_dump()
    assert [cell.levels for cell in directory.plan.cells] == [{"experts": 1}, {"experts": 2}]


def test_another_process_keeps_out(tmp_path, digits):
    directory = StudyDirectory(tmp_path / "one")
    with directory.written(STUDY, digits, []):
        code = (
            "import sys; from ablations.records import *; from ablations.training.data import load_data\n"
            "d = StudyDirectory(Path(sys.argv[1]))\n"
            "with d.written(d.study, load_data('digits'), []): pass"
        )
        other = subprocess.run([sys.executable, "-c", code, directory.path], capture_output=True, text=True)
        assert "another process is writing this study" in other.stderr
    with directory.written(STUDY, digits, []):
        pass


def test_another_study_keeps_its_directory(tmp_path, digits):
    directory = StudyDirectory(tmp_path / "one")
    with directory.written(STUDY, digits, []):
        pass
    before = (directory.path / "study.toml").read_bytes()
    smaller = STUDY.model_copy(update={"factors": {"experts": [2]}})
    with pytest.raises(InputError, match="holds another study"), directory.written(smaller, digits, []):
        pass
    assert (directory.path / "study.toml").read_bytes() == before
    with directory.written(STUDY.model_copy(update={"seeds": 5}), digits, []):
        pass
    assert directory.study.seeds == 5


def test_directories_that_are_no_study(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name, message in (("full", "is not empty, and holds no study"), ("file", "there is a file of this name")):
        with pytest.raises(InputError, match=message):
            StudyDirectory(tmp_path / name).check_holds(STUDY)
    with pytest.raises(InputError, match="not a study directory"):
        _ = StudyDirectory(tmp_path).study


def test_damaged_records_are_named(trained_study, tmp_path):
    directory = StudyDirectory(tmp_path)
    place = directory.trial("abc")
    place.mkdir(parents=True)
    (place / "record.json").write_text('{"trial": "abc"}')
    with pytest.raises(InputError, match=r"abc/record.json.seed: field required"):
        directory.record("abc")
    assert directory.record("other") is None


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[]", b"{}", b"null"])
@pytest.mark.parametrize("name", ["trials/abc/record.json", "trials/abc/failure.json", "bench/x.json", "plan.json"])
def test_whatever_is_damaged_is_named(name, content, tmp_path):
    directory = StudyDirectory(tmp_path)
    write_whole(tmp_path / "study.toml", b'question = "?"')
    write_whole(tmp_path / name, content)
    with pytest.raises(InputError, match=name):
        _ = directory.record("abc"), directory.failure("abc"), directory.latencies(), directory.plan


def test_latency_is_that_of_the_network_as_it_is(tmp_path):
    """Neither of a later file of lower precision, nor of a pruned one."""
    made = [("model.onnx", "fp32", False), ("model-int8.onnx", "int8", False), ("model-pruned.onnx", "fp32", True)]
    for i, (file, precision, pruned) in enumerate(made):
        latency = Latency.of("onnxruntime cpu", 1, [1.0])
        record = LatencyRecord(
            file=file, sha256="", trial="abc", model="", precision=precision, pruned=pruned, provider="cpu", device="",
            threads=1, versions={}, finished=f"2026-01-0{i + 1}", latencies=[latency],
        )  # fmt: skip
        write_whole(tmp_path / "bench" / f"{file}.json", record.model_dump_json().encode())
    assert {trial: one.file for trial, one in StudyDirectory(tmp_path).latencies().items()} == {"abc": "model.onnx"}


def test_a_damaged_ledger_is_named(tmp_path):
    write_whole(tmp_path / "ledger.jsonl", b"\xff\n")
    with pytest.raises(InputError, match=r"ledger.jsonl"):
        StudyDirectory(tmp_path).test_reads()


def test_plan_of_other_factors(trained_study, tmp_path):
    for name, old in (("study.toml", b"gate = "), ("plan.json", b"")):
        write_whole(tmp_path / name, (trained_study / name).read_bytes().replace(old, b"residual = " if old else b""))
    with pytest.raises(InputError, match=r"plan.json: a cell has the factors \['experts', 'gate'\]"):
        _ = StudyDirectory(tmp_path).plan


def test_a_damaged_trial_beside_is_not_taken_over(trained_study, tmp_path):
    beside = shutil.copytree(trained_study, tmp_path / "runs" / "tiny")
    study = StudyDirectory(tmp_path / "runs" / "other")
    study.path.mkdir()
    no_record, no_weights, whole, *_ = (place.name for place in sorted((beside / "trials").iterdir()))
    (beside / "trials" / no_record / "record.json").write_text("{}")
    (beside / "trials" / no_weights / "model.safetensors").unlink()
    assert [study.adopt(trial) for trial in (no_record, no_weights, whole)] == [None, None, "tiny"]


def test_a_trial_is_taken_over_from_the_study_beside(trained_study, tmp_path):
    beside = StudyDirectory(tmp_path / "runs" / "beside")
    beside.path.mkdir(parents=True)
    (tmp_path / "runs" / "tiny").symlink_to(trained_study)
    trial = next((trained_study / "trials").iterdir()).name
    assert beside.adopt(trial) == "tiny"
    assert beside.adopted(trial) == "tiny"
    assert StudyDirectory(trained_study).adopted(trial) is None
    assert beside.record(trial) == StudyDirectory(trained_study).record(trial)
    assert beside.checkpoint(trial).read_bytes() == StudyDirectory(trained_study).checkpoint(trial).read_bytes()
    assert not beside.adopt("no such trial")
    assert [(read.trial, read.reader) for read in beside.test_reads()] == [(trial, "training")]
    assert sorted(path.name for path in beside.path.iterdir()) == ["ledger.jsonl", "trials"]
    beside.write_config(beside.config(trial))  # a training here begins
    assert beside.adopted(trial) is None
