"""Nothing is lost: by crashes, full disks, two writers, and files that were cut short."""

import ctypes
import errno
import fcntl
import json
import os
import random
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from attacks import NPZ_BOMB, PLACED
from conftest import REPOSITORY, change_json, snapshot

from expertgrid.ablations.engines.events import TrialDone
from expertgrid.ablations.engines.local import run_local
from expertgrid.ablations.records.checksums import OF_A_STUDY, OF_A_TRIAL, SUMS, changed_files
from expertgrid.ablations.records.directory import StudyDirectory
from expertgrid.ablations.records.lock import WRITER
from expertgrid.ablations.study import disk
from expertgrid.ablations.study.disk import bytes_needed, check_space, stored_bytes
from expertgrid.ablations.study.study import Study
from expertgrid.model.checkpoint import load
from expertgrid.model.config import GateConfig, NormConfig
from expertgrid.model.presets import PRESETS, network
from expertgrid.model.registry import build
from expertgrid.model.system.errors import InputError
from expertgrid.model.system.files import (
    append_line,
    cut_incomplete_line,
    read_whole,
    whole_lines,
    write_together,
    write_whole,
)
from expertgrid.model.training.data import ImageData
from expertgrid.model.training.splits import ResidentData

FULL = OSError(errno.ENOSPC, "No space left on device")


# --- Writes ---


def test_the_names_of_a_file_and_of_its_new_folders_reach_the_disk(tmp_path, monkeypatch):
    happened, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (happened.append(os.fstat(handle).st_ino), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda a, b: (happened.append("replace"), replace(a, b)))
    file = tmp_path / "a" / "b" / "file"
    write_whole(file, b"content")
    *folders, content, replaced, name = happened
    assert folders == [path.stat().st_ino for path in (tmp_path, tmp_path / "a")]
    assert (content, replaced, name) == (file.stat().st_ino, "replace", file.parent.stat().st_ino)


@pytest.mark.parametrize("kind", ["pipe", "socket", "/dev/zero", "folder", "loop", "sparse"])
def test_only_regular_files_are_opened(tmp_path, kind):
    """Neither to be read nor to be written: a line that goes to /dev/zero is lost."""
    file = tmp_path / "file"
    PLACED[kind](file, b"")
    with pytest.raises(InputError, match=r"file: cannot be read: (not a regular|No such device|Too many|it has 1,099)"):
        read_whole(file)
    with pytest.raises(OSError, match=r"not a |Is a directory|Too many|No such device"):
        append_line(file, "line")


def test_files_are_written_together_or_not_at_all(tmp_path, monkeypatch):
    files = [tmp_path / name for name in "abc"]
    before = dict.fromkeys(files, b"old")
    write_together(before)
    for failing, number in (("fsync", 2), ("write", 3), ("fsync", 3)):
        calls, real = [], getattr(os, failing)

        def fails(*words, calls=calls, number=number, real=real):
            calls.append(words)
            if len(calls) == number:
                raise FULL
            return real(*words)

        monkeypatch.setattr(os, failing, fails)
        with pytest.raises(OSError, match="No space"):
            write_together(dict.fromkeys(files, b"new"))
        monkeypatch.undo()
    files[2].unlink()
    files[2].mkdir()
    with pytest.raises(IsADirectoryError):
        write_together(dict.fromkeys(files, b"new"))
    assert {file: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()} == dict(list(before.items())[:2])


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_a_file_has_the_rights_that_the_umask_leaves(tmp_path, mask):
    before = os.umask(mask)
    try:
        write_whole(tmp_path / "file", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~mask


@pytest.mark.parametrize("torn", [b"", b"half a li", b"x" * 9000])
def test_a_line_is_added_to_whole_lines(tmp_path, torn):
    file = tmp_path / "lines"
    file.write_bytes(b"first\n" + torn)
    assert whole_lines(file) == [b"first"]
    append_line(file, "second")
    assert file.read_bytes() == b"first\nsecond\n"
    file.write_bytes(b"first\n" + torn)
    assert cut_incomplete_line(file) == len(torn)
    assert file.read_bytes() == b"first\n"
    assert whole_lines(tmp_path / "none") == []


def test_a_line_that_finds_no_space_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    file, write = tmp_path / "lines", os.write
    append_line(file, "first")

    def half(handle, content):
        if len(content) < 5:
            raise FULL
        return write(handle, content[:4])

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(OSError, match="No space"):
        append_line(file, "second")
    assert file.read_bytes() == b"first\n"


# --- The ledger ---


def test_each_changed_character_of_a_ledger_is_seen(tmp_path):
    study = StudyDirectory(tmp_path)
    study.enter_test_read("abc", "training", 360, tta="flip")
    (read,) = study.test_reads()
    assert (read.trial, read.images, read.tta) == ("abc", 360, "flip")
    ledger = tmp_path / "ledger.jsonl"
    line = ledger.read_bytes()
    for place in range(len(line) - 1):
        ledger.write_bytes(line[:place] + bytes([line[place] ^ 1]) + line[place + 1 :])
        with pytest.raises(InputError, match=r"ledger.jsonl: line 1.*; the file is damaged: delete the damaged line"):
            study.test_reads()


def test_lines_of_older_versions_have_no_checksum(tmp_path):
    study, ledger = StudyDirectory(tmp_path), tmp_path / "ledger.jsonl"
    ledger.write_text('{"time": "t", "trial": "abc", "reader": "export", "images": 3}\n')
    study.enter_test_read("def", "export", 4)
    assert [(read.trial, read.images) for read in study.test_reads()] == [("abc", 3), ("def", 4)]
    assert "crc32" in json.loads(ledger.read_text().splitlines()[1])


# --- Checksums ---


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs sha256sum")
def test_sha256sum_checks_a_trial_and_a_study(study, trial):
    for place, count in ((study.path, 2), (study.trial(trial), len(OF_A_TRIAL))):
        done = subprocess.run(["sha256sum", "--check", "--strict", SUMS], cwd=place, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        assert lines == sorted(lines)
        assert [line.endswith(": OK") for line in lines] == [True] * count


def test_the_record_is_the_last_file_of_a_trial(study, trial, monkeypatch):
    written, replace = [], os.replace
    record, predictions = study.record(trial), study.predictions(trial)
    checkpoint = study.checkpoint(trial).read_bytes()
    before = snapshot(study.trial(trial))
    monkeypatch.setattr(os, "replace", lambda a, b: (written.append(Path(b).name), replace(a, b)))
    study.finish(trial, record, checkpoint, predictions)
    assert written == ["model.safetensors", "predictions.npz", SUMS, "record.json"]
    monkeypatch.undo()
    assert changed_files(study.trial(trial), OF_A_TRIAL) == {}
    after = snapshot(study.trial(trial))
    assert {name for name in before if before[name] != after[name]} <= {SUMS, "record.json"}  # indented otherwise


# --- Files that were cut short ---


@pytest.mark.parametrize("name", [*OF_A_STUDY, "ledger.jsonl", *OF_A_TRIAL, SUMS])
def test_a_file_that_was_cut_short_is_damaged_or_shorter(study, trial, name):
    read = {
        "study.toml": study.read_plan,
        "plan.json": study.read_plan,
        "ledger.jsonl": study.test_reads,
        "config.json": lambda: study.config(trial),
        "record.json": lambda: study.record(trial),
        "epochs.jsonl": lambda: study.epochs(trial),
        "predictions.npz": lambda: study.predictions(trial),
        "model.safetensors": lambda: load(file),
        SUMS: lambda: changed_files(file.parent, OF_A_TRIAL),
    }[name]
    file = (study.path if name in (*OF_A_STUDY, "ledger.jsonl") else study.trial(trial)) / name
    whole, lines = file.read_bytes(), read()
    most = 40 if name == "model.safetensors" else 200
    for length in {*random.Random(0).sample(range(len(whole)), min(len(whole), most)), 0, 1, 8, len(whole) - 1}:
        file.write_bytes(whole[:length])
        if name.endswith(".jsonl"):
            assert read() == lines[: whole[:length].count(b"\n")]
        elif name == "study.toml":
            with suppress(InputError):  # one that is cut at a line's end can be whole
                read()
        else:
            with pytest.raises(InputError) as error:
                read()
            assert str(error.value).startswith(str(file))


def test_arrays_of_gigabytes_are_refused_before_they_are_expanded(expertgrid, study, trial):
    file = study.trial(trial) / "predictions.npz"
    file.write_bytes(NPZ_BOMB)
    with pytest.raises(InputError, match="not a file of predictions"):
        study.predictions(trial)
    assert f"trials/{trial}/predictions.npz: changed since {SUMS}" in expertgrid("check", study.path).out


def test_arrays_with_changed_bytes_are_read_or_refused(study, trial):
    file, random_ = study.trial(trial) / "predictions.npz", random.Random(1)
    whole, refused = file.read_bytes(), 0
    for _ in range(300):
        place = random_.randrange(len(whole))
        file.write_bytes(whole[:place] + bytes([random_.randrange(256)]) + whole[place + 1 :])
        try:
            study.predictions(trial)
        except InputError:
            refused += 1
    assert refused > 100


# --- One writer ---

WRITES = """
import sys
from pathlib import Path
from expertgrid.ablations.records.directory import StudyDirectory
from expertgrid.ablations.study.study_file import parse_study
from expertgrid.model.training.data import ImageData
from expertgrid.model.system.errors import InputError

study, data = parse_study('question = "?"', Path("s.toml")), ImageData.random(100, 8, 8)
print("ready", flush=True)
for line in sys.stdin:
    try:
        with StudyDirectory(Path(line.strip())).written(study, data, []):
            print("writes", flush=True)
            sys.stdin.readline()
    except InputError as error:
        print(error, flush=True)
        sys.stdin.readline()
    print("done", flush=True)
"""


def test_of_two_processes_one_writes_and_the_other_names_it(tmp_path):
    line, pipe = [sys.executable, "-c", WRITES], subprocess.PIPE
    both = [subprocess.Popen(line, stdin=pipe, stdout=pipe, text=True, cwd=REPOSITORY) for _ in range(2)]
    with both[0], both[1]:
        assert [process.stdout.readline() for process in both] == ["ready\n"] * 2
        for number in range(10):
            place = tmp_path / str(number)
            for process in both:
                process.stdin.write(f"{place}\n")
                process.stdin.flush()
            said = [process.stdout.readline().strip() for process in both]
            writer = said.index("writes")
            start_of_error = f"--out {place}: process {both[writer].pid} on host {os.uname().nodename} is writing this"
            assert said[1 - writer].startswith(f"{start_of_error} study since 2")
            assert (place / WRITER).exists()
            for process in both:
                process.stdin.write("\n")
                process.stdin.flush()
            assert [process.stdout.readline() for process in both] == ["done\n"] * 2
            assert not (place / WRITER).exists()
        for process in both:
            process.stdin.close()


def test_what_a_killed_writer_left_means_nothing(tmp_path):
    study = StudyDirectory(tmp_path)
    write_whole(tmp_path / WRITER, b'{"host": "elsewhere", "process": 1, "since": ""}')
    with study.held():
        assert json.loads((tmp_path / WRITER).read_bytes())["process"] == os.getpid()
    assert not (tmp_path / WRITER).exists()


def test_a_crash_before_the_first_file_was_whole_leaves_no_other_study(tmp_path, digits):
    study = Study(name="test", question="?")
    (tmp_path / ".study.toml.abcd1234").write_bytes(b"ques")
    with StudyDirectory(tmp_path).written(study, digits, study.cells(digits)):
        pass
    assert StudyDirectory(tmp_path).read_study().question == "?"


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks_is_refused(tmp_path, monkeypatch, code):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(InputError, match="this file system keeps no locks"), StudyDirectory(tmp_path).held():
        pass


# --- Full disks ---


@pytest.mark.parametrize("name", [*PRESETS, "resnet18"])
def test_the_bytes_of_a_network_are_those_of_its_state(name):
    configs = [network(name)]
    if name in PRESETS:
        gate = GateConfig(kind="mlp", hidden=(8,), frozen=True)
        frozen = configs[0].map_blocks(lambda block: block.change(gate=gate if len(block.kernels) > 1 else None))
        configs.append(frozen.change(norm=NormConfig(scale=False)))
    for config in configs:
        assert stored_bytes(config) == sum(tensor.numpy().nbytes for tensor in build(config).state_dict().values())


def test_a_study_takes_no_more_than_was_estimated_and_is_refused_without_that_room(study, digits, monkeypatch):
    trials = [study.config(trial) for trial in study.read_plan().trials]
    size = sum(file.stat().st_size for file in (study.path / "trials").rglob("*") if file.is_file())
    needed = bytes_needed(trials, digits)
    assert size <= needed <= size + 10**6
    assert bytes_needed([], digits) == 0
    usage = shutil.disk_usage(study.path)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: usage._replace(free=needed))
    check_space(trials, digits, study.path)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    with pytest.raises(InputError, match=rf"--out {study.path}: {len(trials)} trials need .* kB, and the disk has"):
        check_space(trials, digits, study.path)


TIMED = {"images_per_s", "train_seconds", "validation_seconds", "finished"}


def result(directory: StudyDirectory, trial: str) -> tuple:
    epochs = [epoch.model_dump(exclude=TIMED) for epoch in directory.epochs(trial)]
    record = directory.record(trial).model_dump(exclude=TIMED)
    return record, epochs, directory.checkpoint(trial).read_bytes()


FEW_IMAGES = ResidentData(ImageData.random(100, 8, 8), torch.device("cpu"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A trial, and what it gives where nothing fails."""
    fields = {"width": 0.0625, "recipe.epochs": 2, "recipe.batch_size": 16, "recipe.amp": "off", "experts": 1}
    (cell,) = Study(name="test", question="?", seeds=1, set=fields).cells(FEW_IMAGES.data)
    (trial,) = cell.trials
    directory = StudyDirectory(tmp_path_factory.mktemp("undisturbed"))
    list(run_local([trial], FEW_IMAGES, directory, save_every_s=0))
    return trial, result(directory, trial.id)


@pytest.mark.parametrize("seed", range(6))
def test_a_disk_that_fills_up_costs_no_finished_work(seed, tmp_path, undisturbed, monkeypatch):
    """At random writes a call of the system fails, up to three times; then the study is done as if nothing had been."""
    trial, expected = undisturbed
    directory, random_ = StudyDirectory(tmp_path), random.Random(seed)
    for _ in range(3):
        left = [random_.randrange(30)]
        for name in ("write", "fsync", "replace"):
            real = getattr(os, name)

            def fails(*arguments, real=real, left=left):
                left[0] -= 1
                if left[0] < 0:
                    raise OSError(random_.choice([errno.ENOSPC, errno.EDQUOT]), "full")
                return real(*arguments)

            monkeypatch.setattr(os, name, fails)
        try:
            list(run_local([trial], FEW_IMAGES, directory, save_every_s=0))
        except OSError as error:
            assert error.errno in (errno.ENOSPC, errno.EDQUOT)  # noqa: PT017 (the trial may be done before)
        monkeypatch.undo()
        assert directory.failure(trial.id) is None
        if directory.record(trial.id):
            break
    if directory.record(trial.id) is None:
        assert isinstance(list(run_local([trial], FEW_IMAGES, directory))[-1], TrialDone)
    assert result(directory, trial.id) == expected
    assert changed_files(directory.trial(trial.id), OF_A_TRIAL) == {}


def test_a_full_disk_is_one_line(expertgrid, tiny_study, tmp_path, monkeypatch):
    real = os.replace

    def fails(source, target):
        if Path(target).name == "predictions.npz":
            raise FULL
        real(source, target)

    monkeypatch.setattr(os, "replace", fails)
    outcome = expertgrid("run", tiny_study, "--device", "cpu", "--set", "recipe.epochs=1")
    assert outcome.status == 1
    assert outcome.complaint.startswith("error: disk full: ")
    assert outcome.complaint.endswith("finished trials are kept, and the same command continues once there is space")
    assert not list((tmp_path / "runs").rglob("failure.json"))


def test_what_makes_room_needs_none(expertgrid, study, trial, monkeypatch):
    """`clean` and `check --repair` on a full disk."""
    (study.trial(trial) / "resume.pt").write_bytes(b"state")
    (study.path / "damaged").mkdir()
    cut = study.trial(study.read_plan().trials[0]) / "record.json"
    cut.write_bytes(b"{")

    def full(*_):
        raise FULL

    monkeypatch.setattr(os, "write", full)
    assert "moved: " in expertgrid("check", study.path, "--repair").out
    assert expertgrid("clean", study.path, "--yes").out.endswith("removed\n")
    assert not (study.path / "damaged").exists()


def mount(place: Path, options: bytes, flags: int = 0) -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    return libc.mount(b"none", bytes(place), b"tmpfs", flags, options) == 0


@pytest.mark.skipif(not sys.platform.startswith("linux") or os.geteuid() != 0, reason="needs root, to mount a disk")
def test_a_disk_of_a_few_pages(tmp_path, undisturbed):
    trial, expected = undisturbed
    if not mount(tmp_path, b"size=48k"):
        pytest.skip("no disk can be mounted here")
    try:
        directory = StudyDirectory(tmp_path)
        with pytest.raises(OSError, match="No space left"):
            list(run_local([trial], FEW_IMAGES, directory, save_every_s=0))
        assert directory.record(trial.id) is None
        assert mount(tmp_path, b"size=4m", 32)  # MS_REMOUNT
        assert isinstance(list(run_local([trial], FEW_IMAGES, directory))[-1], TrialDone)
        assert result(directory, trial.id) == expected
    finally:
        ctypes.CDLL(None).umount2(bytes(tmp_path), 2)


def test_the_id_of_a_trial_cannot_be_a_path(study):
    """A plan leads to folders below the study's own alone."""
    change_json(study.path / "plan.json", cells=[{"model_name": "", "levels": {}, "trials": ["../../../etc"]}])
    with pytest.raises(InputError, match=r"plan.json: cells.0.trials.0: .*found '../../../etc'"):
        study.read_plan()
