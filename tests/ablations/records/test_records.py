"""The study directory: whole files, one writer, and nothing lost."""

import os
import shutil
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import filelock
import pytest
import torch
from conftest import snapshot, write_latency, written_record

from expertgrid.ablations.records.directory import StudyDirectory
from expertgrid.ablations.records.lock import LOCK
from expertgrid.ablations.records.record import Environment
from expertgrid.ablations.study.study_file import parse_study
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


def test_another_process_keeps_out(tmp_path, digits):
    """A lock of the operating system that another part of any program has."""
    directory = StudyDirectory(tmp_path / "study")
    directory.path.mkdir()
    refused = pytest.raises(InputError, match="another process is writing this study")
    with filelock.FileLock(directory.path / LOCK), refused, directory.written(STUDY, digits, []):
        pass
    assert not (directory.path / "study.toml").exists()
    with directory.written(STUDY, digits, STUDY.cells(digits)), pytest.raises(filelock.Timeout):
        filelock.FileLock(directory.path / LOCK).acquire(timeout=0)
    assert directory.read_study().model_dump() == STUDY.model_dump()
    assert [cell.levels for cell in directory.read_plan().cells] == [{"experts": 1}, {"experts": 2}]


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
    write_whole(tmp_path / "full" / "notes.txt", b"mine")
    write_whole(tmp_path / "hidden" / ".notes.markdown", b"mine")
    write_whole(tmp_path / "file", b"mine")
    full = "is not empty, and holds no study"
    for name, message in (("full", full), ("hidden", full), ("file", "there is a file of this name")):
        with pytest.raises(InputError, match=message):
            StudyDirectory(tmp_path / name).check_holds(STUDY)
    with pytest.raises(InputError, match="not a study directory"):
        _ = StudyDirectory(tmp_path).read_study()


def test_a_damaged_record_says_what_is_wrong_and_what_to_do(tmp_path):
    directory = StudyDirectory(tmp_path)
    place, whole = directory.trial("abc"), written_record(SimpleNamespace(id="abc", seed=0), 50, 50)
    remedy = f"the file is damaged: delete {place} and run the study again: this trial is then trained again"
    for content, wrong in (
        ('{"trial": "abc"}', ": seed: is missing"),
        ('{"trial": "abc", "seed": "none"}', ": seed: a whole number is needed, found 'none'"),
        ('{"trial": "' + 500 * "x", ": not JSON: EOF while parsing a string at line 1 column 511"),
        (whole.replace('"test_accuracy":0.5', '"test_accuracy":1.5'), ": test_accuracy: 1 or less is needed"),
        ('["' + 500 * "x" + '"]', ": a table of fields is needed, found ['" + 75 * "x" + "..."),
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


TRAIN_AGAIN = "delete {path}/trials/abc and run the study again: this trial is then trained again"
DAMAGED = {
    **dict.fromkeys(
        [f"trials/abc/{name}" for name in ("record.json", "config.json", "epochs.jsonl", "failure.json")], TRAIN_AGAIN
    ),
    "trials/abc/predictions.npz": TRAIN_AGAIN,
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


def test_the_environment_says_what_it_was_measured_on(monkeypatch):
    """The parts that model/machine.py finds are tested there."""
    monkeypatch.setattr(machine, "checkout_commit", lambda: "0123abc+changes")
    monkeypatch.setattr(machine, "gpu_driver", lambda: "570.1")
    on_cpu = Environment.of_machine(torch.device("cpu"))
    assert (on_cpu.cpu, on_cpu.device) == (machine.cpu_name(), f"cpu ({machine.cpu_name()})")
    assert (on_cpu.cores, on_cpu.memory_bytes) == (machine.usable_cores(), machine.memory_bytes())
    assert on_cpu.threads == torch.get_num_threads()
    assert on_cpu.versions["torch"] == version("torch")
    assert (on_cpu.commit, on_cpu.driver) == ("0123abc+changes", None), "the driver is for numbers of a GPU"
    monkeypatch.setattr(machine, "device_name", lambda device: "H100")
    on_gpu = Environment.of_machine(torch.device("cuda"))
    assert (on_gpu.device, on_gpu.driver, on_gpu.cpu) == ("H100", "570.1", on_cpu.cpu)


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
    write_latency(tmp_path, "abc", 1.0, "2026-01-01")
    write_latency(tmp_path, "abc", 1.0, "2026-01-02", precision="int8")
    write_latency(tmp_path, "abc", 1.0, "2026-01-03", pruned=True)
    latencies = StudyDirectory(tmp_path).latencies()
    assert {trial: latency.finished for trial, latency in latencies.items()} == {"abc": "2026-01-01"}


def test_plan_of_other_factors(trained_study, tmp_path):
    for name, old in (("study.toml", b"gate = "), ("plan.json", b"")):
        write_whole(tmp_path / name, (trained_study / name).read_bytes().replace(old, b"residual = " if old else b""))
    with pytest.raises(InputError, match=r"plan.json: a cell has the factors \['experts', 'gate'\]"):
        _ = StudyDirectory(tmp_path).read_plan()


def test_a_damaged_trial_beside_is_not_taken_over(study):
    other = StudyDirectory(study.path.parent / "other")
    other.path.mkdir()
    no_record, no_weights, changed, whole, *_ = study.read_plan().trials
    (study.trial(no_record) / "record.json").write_text("{}")
    study.checkpoint(no_weights).unlink()
    epochs = study.trial(changed) / "epochs.jsonl"
    epochs.write_bytes(epochs.read_bytes().replace(b'"epoch":2', b'"epoch":3'))
    assert len(study.epochs(changed)) == 2
    refused = Counter()
    adopted = [other.adopt(trial, refused) for trial in (no_record, no_weights, changed, "no such trial", whole)]
    assert adopted == [None, None, None, None, "tiny"]
    since = "changed since SHA256SUMS was written"
    reasons = [f"record.json is {since}", "model.safetensors is missing", f"epochs.jsonl is {since}"]
    assert list(refused) == [f"{study.path}: {reason}" for reason in reasons]


def test_a_trial_is_taken_over_from_the_study_beside(study, trial):
    other = StudyDirectory(study.path.parent / "other")
    other.path.mkdir()
    assert other.adopt(trial, Counter()) == "tiny"
    assert other.adopted(trial).directory == "tiny"
    assert study.adopted(trial) is None
    copied = snapshot(other.trial(trial))
    assert copied.pop("adopted.json")
    assert copied == snapshot(study.trial(trial))
    assert [(read.trial, read.reader) for read in other.test_reads()] == [(trial, "training")]
    assert sorted(path.name for path in other.path.iterdir()) == ["ledger.jsonl", "trials"]
    shutil.rmtree(other.trial(trial))  # as if the copy had been interrupted after the ledger's line
    assert other.adopt(trial, Counter()) == "tiny"
    assert len(other.test_reads()) == 1
    other.write_config(other.config(trial))  # a training here begins
    assert other.adopted(trial) is None
