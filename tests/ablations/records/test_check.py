"""Checking the files of a study, moving damaged trials away, and removing what nothing needs."""

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from attacks import place
from conftest import TINY_STUDY, change_json, snapshot

from expertgrid.ablations.records.check import check_files
from expertgrid.ablations.records.checksums import OF_A_TRIAL, SUMS
from expertgrid.ablations.records.directory import StudyDirectory
from expertgrid.ablations.records.record import Failure
from expertgrid.ablations.study.study_file import parse_study
from expertgrid.model.system.errors import InputError
from expertgrid.model.system.files import write_whole
from expertgrid.model.training.resume import write_state


@pytest.fixture(autouse=True)
def temporary_folder(tmp_path_factory, monkeypatch):
    """Of these tests alone: that of the machine may have what a crash left."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("system")))


def unfinished(study: StudyDirectory, trial: str) -> Path:
    """Makes the trial one that is being trained. Returns the file of its state."""
    for name in ("record.json", SUMS, "model.safetensors", "predictions.npz"):
        (study.trial(trial) / name).unlink()
    state = study.trial(trial) / "resume.pt"
    write_state(state, {"epochs": [], "training": {}})
    return state


def cut(file: Path, size: int = -1) -> None:
    file.write_bytes(file.read_bytes()[:size])


def test_a_whole_study_is_left_as_it_is(expertgrid, study):
    before, outcome = snapshot(study.path), expertgrid("check", study.path)
    assert (outcome.status, outcome.err) == (0, "")
    assert outcome.out == f"{study.path}: 6 of 6 trials finished, nothing is damaged\n"
    assert snapshot(study.path) == before


def test_the_images_of_a_source_are_compared_with_those_of_the_study(expertgrid, study, trial):
    assert expertgrid("check", study.path, "--data", "digits").out.endswith("\ndigits: has the images of the study\n")
    change_json(study.trial(trial) / "config.json", fingerprint="other")
    outcome = expertgrid("check", study.path, "--data", "digits")
    assert outcome.status == 2
    assert "data source 'digits': has other images than trial" in outcome.complaint


OF_TRIALS: dict[str, tuple[Callable[[StudyDirectory, Path], object], str]] = {
    "record cut": (lambda s, p: cut(p / "record.json"), "record.json"),
    "record empty": (lambda s, p: cut(p / "record.json", 0), "record.json"),
    "another record": (lambda s, p: change_json(p / "record.json", trial="abc"), "record.json"),
    "accuracy changed": (lambda s, p: change_json(p / "record.json", test_accuracy=0.25), "record.json"),
    "config missing": (lambda s, p: (p / "config.json").unlink(), "config.json"),
    "another config": (lambda s, p: change_json(p / "config.json", seed=7), "config.json"),
    "epoch missing": (lambda s, p: cut(p / "epochs.jsonl"), "epochs.jsonl"),
    "epochs missing": (lambda s, p: (p / "epochs.jsonl").unlink(), "epochs.jsonl"),
    "predictions missing": (lambda s, p: (p / "predictions.npz").unlink(), "predictions.npz"),
    "predictions cut": (lambda s, p: cut(p / "predictions.npz", 100), "predictions.npz"),
    "record missing": (lambda s, p: (p / "record.json").unlink(), "record.json"),
    "weights missing": (lambda s, p: (p / "model.safetensors").unlink(), "model.safetensors"),
    "weights cut": (lambda s, p: cut(p / "model.safetensors"), "model.safetensors"),
    "other weights": (lambda s, p: shutil.copy(s.checkpoint(s.read_plan().trials[0]), p), "model.safetensors"),
    "sums cut": (lambda s, p: cut(p / SUMS, 200), SUMS),
    "adopted": (lambda s, p: (p / "adopted.json").write_text("{"), "adopted.json"),
    "failure": (lambda s, p: (p / "failure.json").write_text("{}"), "failure.json"),
    "state": (lambda s, p: cut(unfinished(s, p.name), 100), "resume.pt"),
    "another state": (lambda s, p: unfinished(s, p.name).write_bytes(b"of an older version"), "resume.pt"),
}  # fmt: skip


@pytest.mark.parametrize("damage", OF_TRIALS)
def test_a_damaged_trial_is_named_and_moved_away(expertgrid, study, trial, damage):
    harm, name = OF_TRIALS[damage]
    harm(study, study.trial(trial))
    before = snapshot(study.path)
    outcome = expertgrid("check", study.path)
    assert (outcome.status, outcome.err) == (1, "")
    *lines, verdict = outcome.out.splitlines()
    (line,) = (line for line in lines if line.startswith("damaged: "))
    assert line.startswith(f"damaged: trials/{trial}/{name}: ")
    assert line.endswith("; `expertgrid check --repair` moves the trial away, and the next run trains it again")
    assert "trials finished, 1 damaged or missing" in verdict
    assert snapshot(study.path) == before

    outcome = expertgrid("check", study.path, "--repair")
    assert outcome.status == 0
    assert outcome.out.startswith(f"moved: trials/{trial} to damaged/{trial}; the next run trains the trial again\n")
    moved = {name.replace(f"trials/{trial}", f"damaged/{trial}"): content for name, content in before.items()}
    assert snapshot(study.path) == moved
    assert study.record(trial) is None


OF_STUDIES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no study": (lambda p: (p / "study.toml").unlink(), "study.toml"),
    "study cut": (lambda p: cut(p / "study.toml", 30), "study.toml"),
    "study changed": (lambda p: (p / "study.toml").write_text((p / "study.toml").read_text() + "# \n"), "study.toml"),
    "no plan": (lambda p: (p / "plan.json").unlink(), "plan.json"),
    "plan cut": (lambda p: cut(p / "plan.json"), "plan.json"),
    "plan changed": (lambda p: change_json(p / "plan.json", data="others"), "plan.json"),
    "sums": (lambda p: cut(p / SUMS, 10), SUMS),
    "ledger": (lambda p: (p / "ledger.jsonl").write_text("{}\n"), "ledger.jsonl"),
    "ledger missing": (lambda p: (p / "ledger.jsonl").unlink(), "ledger.jsonl"),
    "ledger empty": (lambda p: cut(p / "ledger.jsonl", 0), "ledger.jsonl"),
    "a line of the ledger": (
        lambda p: cut(p / "ledger.jsonl", (p / "ledger.jsonl").read_bytes().find(b"\n") + 1),
        "ledger.jsonl",
    ),
    "training": (lambda p: write_whole(p / "training.json", b"{"), "training.json"),
    "bench": (lambda p: write_whole(p / "bench" / "x.json", b"{"), "bench/x.json"),
    "export": (lambda p: write_whole(p / "export" / "x.onnx", b"{"), "export/x.onnx"),
    "no export": (lambda p: write_whole(p / "export" / "x.certificate.json", b"{"), "export/x.certificate.json"),
}


@pytest.mark.parametrize("damage", OF_STUDIES)
def test_a_damaged_file_of_the_study_is_named(expertgrid, study, damage):
    harm, place = OF_STUDIES[damage]
    harm(study.path)
    before = snapshot(study.path)
    outcome = expertgrid("check", study.path)
    (line,) = (line for line in outcome.out.splitlines() if line.startswith("damaged: "))
    assert line.startswith(f"damaged: {place}: ")
    assert "; " in line
    assert str(study.path) not in line
    assert outcome.status == 1
    assert expertgrid("check", study.path, "--repair").status == 1, "what it cannot repair stays as it is"
    assert snapshot(study.path) == before


@pytest.mark.parametrize("kind", ["pipe", "/dev/zero", "folder", "loop", "long link"])
def test_what_cannot_be_read_is_named_and_the_check_goes_on(expertgrid, study, trial, kind):
    """A file of each kind is something else at once; the input error is that of a disk."""
    export = study.path / "export" / "x.onnx"
    export.parent.mkdir()
    files = [study.path / name for name in ("ledger.jsonl", "plan.json", "training.json", "bench")]
    files += [study.trial(trial) / name for name in (*OF_A_TRIAL, SUMS, "failure.json", "adopted.json")]
    for file in (*files, export, study.trial(study.read_plan().trials[0])):
        place(file, kind)
    outcome = expertgrid("check", study.path)
    assert outcome.status == 1
    named = {line.split(": ")[1] for line in outcome.out.splitlines() if line.startswith("damaged: ")}
    missing = {str(file.relative_to(study.path)) for file in (*files, export)} - named
    assert missing <= ({"bench"} if kind == "folder" else set()), outcome.out


def test_a_lost_ledger_still_keeps_new_levels_out(study, digits):
    (study.path / "ledger.jsonl").unlink()
    more = parse_study(TINY_STUDY.replace("experts = [1, 2]", "experts = [1, 2, 4]"), study.path.with_suffix(".toml"))
    with pytest.raises(InputError, match="has results, and the study now has more levels of experts: 4"):
        study.check_holds(more)


def test_a_trial_whose_training_is_in_the_ledger_is_lost_not_unbegun(expertgrid, study, trial):
    shutil.rmtree(study.trial(trial))
    assert f"damaged: trials/{trial}: missing, and the ledger has its training" in expertgrid("check", study.path).out


@pytest.mark.parametrize("name", ["study.toml", "plan.json", SUMS])
def test_the_same_command_writes_what_the_study_lost(study, digits, name):
    whole, before = study.read_study(), snapshot(study.path)
    (study.path / name).unlink()
    with study.written(whole, digits, whole.cells(digits)):
        pass
    assert snapshot(study.path) == before


def test_an_unfinished_study_is_not_damaged(expertgrid, study):
    begun, failed, never, *_ = study.read_plan().trials
    unfinished(study, begun)
    unfinished(study, failed).unlink()
    study.write_failure(failed, Failure(kind="diverged", error="the loss is nan", traceback="", time=""))
    shutil.rmtree(study.trial(never))
    for weights in study.path.rglob("model.safetensors"):
        weights.unlink()
    ledger = study.path / "ledger.jsonl"
    lines = [line for line in ledger.read_text().splitlines() if never not in line]
    ledger.write_text("\n".join([*lines, '{"time": "2']))
    outcome = expertgrid("check", study.path)
    assert outcome.status == 0, outcome.out
    assert outcome.out.splitlines() == [
        "unfinished: ledger.jsonl: 11 bytes of an incomplete last line, which no reader takes; the next line that is "
        "written replaces it",
        f"unfinished: trials/{begun}: begun; the next run trains it",
        f"unfinished: trials/{failed}: failed (diverged: the loss is nan); the next run trains it",
        f"unfinished: trials/{never}: not begun; the next run trains it",
        f"note: trials/{study.read_plan().trials[3]} and 2 more: no weights",
        f"{study.path}: 3 of 6 trials finished, nothing is damaged",
    ]
    assert expertgrid("check", study.path, "--repair").out.startswith("cut: ledger.jsonl: 11 bytes")
    assert ledger.read_text().splitlines() == lines


def test_studies_of_older_versions_are_not_damaged(expertgrid, study):
    for file in study.path.rglob(SUMS):
        file.unlink()
    outcome = expertgrid("check", study.path)
    assert outcome.status == 0
    first, second, _ = outcome.out.splitlines()
    assert first.startswith(f"note: {SUMS}: missing, as in studies of older versions")
    assert "and 5 more: no SHA256SUMS, as in trials of older versions" in second


def test_repair_overwrites_nothing_and_needs_the_lock(expertgrid, study, trial):
    for number in (1, 2):
        if number == 2:
            shutil.copytree(study.path / "damaged" / trial, study.trial(trial))
        cut(study.trial(trial) / "record.json")
        with study.held():
            complaint = expertgrid("check", study.path, "--repair").complaint
            assert f"process {os.getpid()} on host" in complaint
            assert study.trial(trial).exists()
        assert expertgrid("check", study.path, "--repair").status == 0
    assert sorted(path.name for path in (study.path / "damaged").iterdir()) == [trial, f"{trial}-2"]


def test_what_is_no_study_is_refused(expertgrid, tmp_path):
    assert "there is no study.toml, plan.json or trials in it" in expertgrid("check", tmp_path).complaint


# --- What nothing needs ---


def litter(study: StudyDirectory) -> set[str]:
    """Adds all that can be removed. Returns the files."""
    trial, other = study.read_plan().cells[0].trials
    unfinished(study, other)
    made = [
        study.trial(trial) / "resume.pt",
        study.path / ".plan.json.abcd1234",
        study.trial(other) / ".resume.pt.abcd_123",
        study.path / ".adopt.abcd1234" / trial / "record.json",
        study.path / "damaged" / trial / "record.json",
    ]
    for file in made:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"12345")
        os.utime(file, (time.time() - 10_000,) * 2)
    users_own = [".plan.json.abcd5678", ".notes.markdown", "report.html", "notes.txt", "export/.notes"]
    (study.path / "export").mkdir()
    (study.path / "trials" / "elsewhere").mkdir()
    for name in (*users_own, "trials/elsewhere/record.json"):
        (study.path / name).write_bytes(b"mine")  # the first of these is new: a process may be writing it
    (study.path / ".notes.markdown").touch()
    os.utime(study.path / ".notes.markdown", (0, 0))
    return {str(file.relative_to(study.path)) for file in made}


def test_only_what_nothing_needs_is_removed(expertgrid, study, monkeypatch):
    made, before = litter(study), snapshot(study.path)
    outcome = expertgrid("clean", study.path)
    assert outcome.status == 0
    assert outcome.out.splitlines()[-2:] == [
        f"{study.path}: 5 to remove, 25 bytes", "nothing was removed; --yes removes these"
    ]  # fmt: skip
    assert snapshot(study.path) == before
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    for answer in ("n", ""):
        monkeypatch.setattr("builtins.input", lambda _, answer=answer: answer)
        assert expertgrid("clean", study.path).out.endswith("nothing was removed\n")
    assert snapshot(study.path) == before
    with study.held():
        assert f"process {os.getpid()} on host" in expertgrid("clean", study.path, "--yes").complaint
    assert snapshot(study.path) == before
    monkeypatch.setattr("builtins.input", lambda _: "y")
    assert expertgrid("clean", study.path).out.endswith("removed\n")
    assert snapshot(study.path) == {name: content for name, content in before.items() if name not in made}
    assert not list(study.path.glob(".adopt.*"))
    assert check_files(study).damaged == []
    assert expertgrid("clean", study.path, "--yes").out == f"{study.path}: 0 to remove, 0 bytes\n"


def test_trials_that_are_not_planned_go_where_that_is_asked_for(expertgrid, study):
    litter(study)
    before = snapshot(study.path)
    assert expertgrid("clean", study.path, "--yes", "--trials").status == 0
    gone = before.keys() - snapshot(study.path).keys()
    assert "trials/elsewhere/record.json" in gone
    assert {path.name for path in study.path.glob("trials/*")} == set(study.read_plan().trials)


def test_the_state_of_a_damaged_trial_stays(expertgrid, study, trial):
    (study.trial(trial) / "resume.pt").write_bytes(b"state")
    cut(study.trial(trial) / "record.json")
    assert expertgrid("clean", study.path, "--yes").out.endswith("0 to remove, 0 bytes\n")


def test_exports_are_compared_with_their_certificates(study, monkeypatch):
    """The certificates are tested with the exports; here each file is asked for."""
    from expertgrid.export import exported

    monkeypatch.setattr(exported, "read_onnx", lambda file: b"model")
    (study.path / "export").mkdir()
    (study.path / "export" / "a.onnx").touch()
    (damage,) = check_files(study).damaged
    assert str(damage) == "damaged: export/a.onnx: has no certificate; delete it and run expertgrid export again"


def test_clean_knows_what_a_crash_left_in_the_temporary_folder(expertgrid, study):
    old, new = (Path(tempfile.gettempdir()) / name for name in ("expertgrid-old", "expertgrid-new"))
    for folder in (old, new):
        folder.mkdir()
    os.utime(old, (time.time() - 30 * 86_400,) * 2)
    assert f"{old}  (left by a crash in the system's temporary folder)" in expertgrid("clean", study.path, "--yes").out
    assert (old.exists(), new.exists()) == (False, True)
