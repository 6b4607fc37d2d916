"""The study directory: whole files, one writer, and nothing lost."""

import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import filelock
import pytest
import torch

from expertgrid.ablations.records.directory import StudyDirectory
from expertgrid.ablations.records.lock import LOCK
from expertgrid.ablations.records.record import Environment
from expertgrid.ablations.study.study_file import parse_study
from expertgrid.bench.record import Latency, LatencyRecord
from expertgrid.bench.timing import Block, Times
from expertgrid.model.system import machine
from expertgrid.model.system.errors import InputError
from expertgrid.model.system.files import write_whole

STUDY = parse_study('question = "?"\n[factors]\nexperts = [1, 2]', Path("study.toml"))


def test_a_file_is_whole_or_the_old_one(tmp_path, monkeypatch):
    file = tmp_path / "folder" / "file"
    write_whole(file, b"old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        write_whole(file, b"new")
    assert file.read_bytes() == b"old"
    assert [path.name for path in file.parent.iterdir()] == ["file"]


def test_study_comes_back_as_it_was(tmp_path, digits):
    directory = StudyDirectory(tmp_path / "runs" / "study")
    with directory.written(STUDY, digits, STUDY.cells(digits)):
        pass
    assert directory.read_study().model_dump() == STUDY.model_dump()
    assert [cell.levels for cell in directory.read_plan().cells] == [{"experts": 1}, {"experts": 2}]


def test_another_process_keeps_out(tmp_path, digits):
    """A process that has the lock of the directory, as one that writes there."""
    directory = StudyDirectory(tmp_path / "study")
    directory.path.mkdir()
    code = (
        "import sys, time, filelock\nwith filelock.FileLock(sys.argv[1]): print('locked', flush=True); sys.stdin.read()"
    )
    line = [sys.executable, "-c", code, directory.path / LOCK]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "locked\n"
        with (
            pytest.raises(InputError, match="another process is writing this study"),
            directory.written(STUDY, digits, []),
        ):
            pass
        assert not (directory.path / "study.toml").exists()
        other.stdin.close()
        assert other.wait(timeout=60) == 0
    with directory.written(STUDY, digits, []), pytest.raises(filelock.Timeout):
        filelock.FileLock(directory.path / LOCK).acquire(timeout=0)
    assert directory.read_study() == STUDY


def test_another_study_keeps_its_directory(tmp_path, digits):
    directory = StudyDirectory(tmp_path / "study")
    with directory.written(STUDY, digits, []):
        pass
    before = (directory.path / "study.toml").read_bytes()
    smaller = STUDY.model_copy(update={"factors": {"experts": [2]}})
    with pytest.raises(InputError, match="holds another study"), directory.written(smaller, digits, []):
        pass
    assert (directory.path / "study.toml").read_bytes() == before
    with directory.written(STUDY.model_copy(update={"seeds": 5}), digits, []):
        pass
    assert directory.read_study().seeds == 5


def test_directories_that_are_no_study(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name, message in (("full", "is not empty, and holds no study"), ("file", "there is a file of this name")):
        with pytest.raises(InputError, match=message):
            StudyDirectory(tmp_path / name).check_holds(STUDY)
    with pytest.raises(InputError, match="not a study directory"):
        _ = StudyDirectory(tmp_path).read_study()


def test_a_damaged_record_says_what_is_wrong_and_what_to_do(tmp_path):
    directory = StudyDirectory(tmp_path)
    place = directory.trial("abc")
    remedy = f"the file is damaged: delete {place} and run the study again: this trial is then trained again"
    for content, wrong in (
        ('{"trial": "abc"}', ": seed: field required"),
        (
            '{"trial": "abc", "seed": "none"}',
            ": seed: input should be a valid integer, unable to parse",
        ),
        ('{"trial": "' + 500 * "x", ": not JSON: EOF while parsing a string at line 1 column 511"),
        ('["' + 500 * "x" + '"]', ": input should be an object, found ['" + 75 * "x" + "..."),
    ):
        write_whole(place / "record.json", content.encode())
        with pytest.raises(InputError) as error:
            directory.record("abc")
        message = str(error.value)
        assert message.startswith(f"{place / 'record.json'}{wrong}")
        assert message.endswith(f"; {remedy}")
        assert 20 * "x" not in message.replace(75 * "x", ""), "no dump of the file"
        assert "\n" not in message
    assert directory.record("other") is None


DAMAGED = {
    "trials/abc/record.json": "delete {path}/trials/abc and run the study again: this trial is then trained again",
    "trials/abc/config.json": "delete {path}/trials/abc and run the study again: this trial is then trained again",
    "trials/abc/epochs.jsonl": "delete {path}/trials/abc and run the study again: this trial is then trained again",
    "trials/abc/failure.json": "delete {path}/trials/abc and run the study again: this trial is then trained again",
    "trials/abc/predictions.npz": "delete {path}/trials/abc and run the study again: this trial is then trained again",
    "bench/x.json": "delete it and run expertgrid bench again",
    "ledger.jsonl": "delete the damaged line",
    "plan.json": "delete it and run the study again",
}


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[]", b"{}", b"null"])
@pytest.mark.parametrize("name", DAMAGED)
def test_whatever_is_damaged_is_named(name, content, tmp_path):
    if name.endswith(".jsonl") and not content:
        return  # no lines
    directory = StudyDirectory(tmp_path)
    write_whole(tmp_path / "study.toml", b'question = "?"')
    write_whole(tmp_path / name, content + b"\n" * name.endswith(".jsonl"))  # without it, a line is being written
    with pytest.raises(InputError) as error:
        _ = directory.record("abc"), directory.failure("abc"), directory.config("abc"), directory.epochs("abc")
        _ = directory.predictions("abc"), directory.latencies(), directory.test_reads(), directory.read_plan()
    assert str(error.value).startswith(str(tmp_path / name))
    assert str(error.value).endswith(f"; the file is damaged: {DAMAGED[name].format(path=tmp_path)}")
    assert "\n" not in str(error.value)


def test_doing_what_the_error_says_mends_a_study(trained_study, tmp_path, digits):
    study = StudyDirectory(shutil.copytree(trained_study, tmp_path / "tiny"))
    asked, before = study.read_study(), study.read_plan()
    (study.path / "plan.json").write_text("{")
    with pytest.raises(InputError, match=r"plan.json: not JSON: .*; the file is damaged: delete it and run"):
        _ = study.read_plan()
    (study.path / "plan.json").unlink()
    with study.written(asked, digits, asked.cells(digits)):
        pass
    assert study.read_plan() == before


def test_the_environment_says_what_it_was_measured_on(monkeypatch):
    """The parts that model/machine.py finds are tested there."""
    monkeypatch.setattr(machine, "checkout_commit", lambda: "0123abc+changes")
    monkeypatch.setattr(machine, "gpu_driver", lambda: "570.1")
    here = Environment.of_machine(torch.device("cpu"))
    assert (here.cpu, here.device) == (machine.cpu_name(), f"cpu ({machine.cpu_name()})")
    assert (here.cores, here.memory_bytes) == (machine.usable_cores(), machine.memory_bytes())
    assert here.threads == torch.get_num_threads()
    assert here.versions["torch"] == version("torch")
    assert (here.commit, here.driver) == ("0123abc+changes", None), "the driver is for numbers of a GPU"
    monkeypatch.setattr(machine, "device_name", lambda device: "H100")
    on_gpu = Environment.of_machine(torch.device("cuda"))
    assert (on_gpu.device, on_gpu.driver, on_gpu.cpu) == ("H100", "570.1", here.cpu)


def test_records_of_trainings_have_the_environment(trained_study):
    study = StudyDirectory(trained_study)
    records = [study.record(trial) for cell in study.read_plan().cells for trial in cell.trials]
    expected = Environment.of_machine(torch.device("cpu"))
    assert {record.environment.model_dump_json() for record in records} == {expected.model_dump_json()}


def test_records_from_before_the_environment_had_its_processor_are_read(tmp_path):
    old = {"device": "cpu", "threads": 1, "python": "3.11", "versions": {"torch": "2"}}
    environment = Environment.model_validate(old)
    assert (environment.cpu, environment.cores, environment.driver, environment.commit) == ("", None, None, None)


def test_latency_is_that_of_the_network_as_it_is(tmp_path):
    """Neither of a later file of lower precision, nor of a pruned one."""
    made = [("model.onnx", "fp32", False), ("model-int8.onnx", "int8", False), ("model-pruned.onnx", "fp32", True)]
    for i, (file, precision, pruned) in enumerate(made):
        latency = Latency.of("onnxruntime cpu", 1, Times([Block(0, [1.0])]))
        record = LatencyRecord(
            file=file, sha256="", trial="abc", model="", precision=precision, pruned=pruned, provider="cpu", device="",
            threads=1, versions={}, finished=f"2026-01-0{i + 1}", latencies=[latency],
        )  # fmt: skip
        write_whole(tmp_path / "bench" / f"{file}.json", record.model_dump_json().encode())
    latencies = StudyDirectory(tmp_path).latencies()
    assert {trial: latency.file for trial, latency in latencies.items()} == {"abc": "model.onnx"}


def test_plan_of_other_factors(trained_study, tmp_path):
    for name, old in (("study.toml", b"gate = "), ("plan.json", b"")):
        write_whole(tmp_path / name, (trained_study / name).read_bytes().replace(old, b"residual = " if old else b""))
    with pytest.raises(InputError, match=r"plan.json: a cell has the factors \['experts', 'gate'\]"):
        _ = StudyDirectory(tmp_path).read_plan()


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
    assert beside.adopted(trial).directory == "tiny"
    assert StudyDirectory(trained_study).adopted(trial) is None
    assert beside.record(trial) == StudyDirectory(trained_study).record(trial)
    assert beside.checkpoint(trial).read_bytes() == StudyDirectory(trained_study).checkpoint(trial).read_bytes()
    assert not beside.adopt("no such trial")
    assert [(read.trial, read.reader) for read in beside.test_reads()] == [(trial, "training")]
    assert sorted(path.name for path in beside.path.iterdir()) == ["ledger.jsonl", "trials"]
    beside.write_config(beside.config(trial))  # a training here begins
    assert beside.adopted(trial) is None
