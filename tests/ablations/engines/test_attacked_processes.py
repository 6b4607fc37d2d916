"""What happens beside a training, and must not end it: signals, a server that dies, folders that go, others' states."""

import copy
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from multiprocessing import forkserver, util
from pathlib import Path
from threading import Event
from types import SimpleNamespace

import pytest
import torch
from conftest import REPOSITORY, TINY_STUDY
from networks_with_faults import networks_with_faults
from test_isolation import trials_of, until

from expertgrid.ablations.engines import local, scheduling
from expertgrid.ablations.engines.events import Stopped, TrialDone, TrialFailed, TrialNote, TrialStarted
from expertgrid.ablations.engines.isolation import Setup, isolated
from expertgrid.ablations.engines.local import run_local
from expertgrid.ablations.records.directory import StudyDirectory
from expertgrid.ablations.study.study import Study
from expertgrid.model.fast.execution import EAGER
from expertgrid.model.system.processes import answers
from expertgrid.model.training.resume import read_state, write_state
from expertgrid.model.training.trial import Trial

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="of Linux's server and /proc")
ENVIRONMENT = os.environ | {"PYTHONPATH": str(REPOSITORY / "src"), "EXPERTGRID_ISOLATE": "1"}
LINE = [sys.executable, "-m", "expertgrid"]


def runs(pid: int) -> bool:
    stat = Path("/proc", str(pid), "stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def kill_the_server() -> None:
    os.kill(forkserver._forkserver._forkserver_pid, signal.SIGKILL)


def stop_the_server() -> None:
    os.kill(forkserver._forkserver._forkserver_pid, signal.SIGSTOP)


def remove_the_temporary_folder() -> None:
    shutil.rmtree(util.get_temp_dir())


@pytest.mark.parametrize("attack", [kill_the_server, stop_the_server, remove_the_temporary_folder])
def test_a_crash_after_an_attack_on_the_server_costs_one_trial(attack, digits, tmp_path):
    """The trial that crashed has failed. Another is stopped, and no process is left."""
    setup, stopped = Setup(digits, "cpu", tmp_path, list, EAGER, threads=1), Event()
    trials = trials_of(digits, 3, **{"recipe.epochs": 2000})
    seen, pids = [], set()
    with isolated(2) as pool, pytest.raises(Stopped):
        for event in pool.run(trials, setup, StudyDirectory(tmp_path), stopped):
            seen.append(event)
            processes = [trainer.process for trainer in pool.trainers]
            pids |= {process.pid for process in processes}
            started = sum(isinstance(event, TrialStarted) for event in seen)
            if started == 2 and len(pids) == 2 and not any(isinstance(event, TrialFailed) for event in seen):
                until(lambda: len(list(tmp_path.glob("trials/*/epochs.jsonl"))) == 2)
                assert "500" in Path(f"/proc/{processes[0].pid}/oom_score_adj").read_text()
                attack()
                os.kill(processes[0].pid, signal.SIGSEGV)
                pids.add(0)
            if started == 3:
                stopped.set()
    pids.discard(0)
    assert len(pids) == 3
    until(lambda: not any(map(runs, pids)), 20)
    (failed,) = (event for event in seen if isinstance(event, TrialFailed))
    assert failed.reason.startswith("crashed: the training process was ended by ")
    assert len(list(tmp_path.glob("trials/*/resume.pt"))) >= 1


def test_sigterm_to_one_process_ends_neither_its_trial_nor_the_study(digits, tmp_path, monkeypatch):
    """As from earlyoom. At the third time the trial has failed."""
    monkeypatch.setattr(scheduling, "TOGETHER_S", 0.2)
    setup, seen = Setup(digits, "cpu", tmp_path, list, EAGER, threads=1), []
    with isolated() as pool:
        for event in pool.run(trials_of(digits, 2, **{"recipe.epochs": 60}), setup, StudyDirectory(tmp_path), Event()):
            seen.append(event)
            if event.trial.seed == 0 and not isinstance(event, TrialStarted | TrialNote | TrialFailed | TrialDone):
                pool.trainers[0].signal(signal.SIGTERM)
    notes = [event.text for event in seen if isinstance(event, TrialNote)]
    assert notes == ["its process was ended by SIGTERM; it goes on from its last saved state"] * 2
    (failed,) = (event for event in seen if isinstance(event, TrialFailed))
    assert failed.reason == "crashed: its process was ended by SIGTERM"
    assert [event.trial.seed for event in seen if isinstance(event, TrialDone)] == [1]


def _hang_in_the_first_step(place: Path) -> None:
    (place / "net_that_hangs.py").write_text(networks_with_faults({"first_step_hangs": "time.sleep(1000)"}))
    sys.path.append(str(place))
    import net_that_hangs  # noqa: F401


def test_nobody_waits_for_a_first_step(digits, tmp_path):
    """In which a network is compiled for half a minute: there is nothing to save yet."""
    begin = partial(_hang_in_the_first_step, tmp_path)
    begin()
    (trial,) = Study(name="s", question="?", seeds=1, factors={"model": ["first_step_hangs"]}).cells(digits)[0].trials
    stopped = Event()
    with isolated() as pool, pytest.raises(Stopped):
        for _ in pool.run([trial], Setup(digits, "cpu", tmp_path, begin, EAGER), StudyDirectory(tmp_path), stopped):
            time.sleep(1)
            stopped.set()
            begun = time.monotonic()
    assert time.monotonic() - begun < 5


def test_the_first_save_comes_soon(resident_digits, digits, tmp_path, monkeypatch):
    """Later ones come every 10 s: a machine that is taken away every 15 s gets on, though it starts slowly."""
    clock, saved, (trial,) = [0.0], [], trials_of(digits, 1, **{"recipe.epochs": 4})
    monkeypatch.setattr(local, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def step(number: int) -> bool:
        clock[0] += 0.5
        return False

    def save(trial: Trial) -> None:
        saved.append(clock[0])

    list(run_local([trial], resident_digits, StudyDirectory(tmp_path), stop=step, saved=save))
    assert saved == [2.0, 12.0]


def changed(state: dict, moments: random.Random) -> dict:
    """The state with something else in one place: removed, or of another type or shape."""
    state = copy.deepcopy(state)
    node, key, depth = state, moments.choice(list(state)), moments.randint(0, 5)
    for _ in range(depth):
        inner = node[key]
        if not isinstance(inner, dict | list) or not inner:
            break
        node, key = inner, moments.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
    others = [None, [], {}, "text", 0.5, 10**6, -1, torch.zeros(3, 5), float("nan"), ("a", 1)]
    if isinstance(node, dict) and moments.random() < 0.2:
        del node[key]
    else:
        node[key] = moments.choice(others)
    return state


@pytest.mark.parametrize("cases", [8, pytest.param(1000, marks=pytest.mark.nightly)])
def test_a_state_of_another_shape_fails_no_trial(cases, resident_digits, digits, tmp_path):
    """A file that is whole, of another version or somebody else's: the trial is trained from the start, with a line."""
    (trial,) = trials_of(digits, 1, **{"recipe.epochs": 2, "recipe.ema_decay": 0.9})
    directory, moments, notes = StudyDirectory(tmp_path), random.Random(0), 0
    with pytest.raises(Stopped):
        list(run_local([trial], resident_digits, directory, stop=lambda step: step == 4))
    good = read_state(directory.resume_file(trial.id))
    for case in range(cases):
        write_state(directory.resume_file(trial.id), changed(good, moments))
        (directory.trial(trial.id) / "record.json").unlink(missing_ok=True)
        events = list(run_local([trial], resident_digits, directory))
        last = events[-1]  # numbers that lead nowhere are believed
        assert isinstance(last, TrialDone) or last.reason.startswith("diverged: "), (case, last)
        notes += any(
            "trained from the start, because" in event.text for event in events if isinstance(event, TrialNote)
        )
    assert notes > cases / 2


@pytest.mark.nightly
def test_the_directory_is_removed_while_it_is_written(tmp_path):
    """The command ends, with a line."""
    (tmp_path / "s.toml").write_text(TINY_STUDY.replace('epochs" = 2', 'epochs" = 3000'))
    line = [*LINE, "run", "s.toml", "--device", "cpu", "--jobs", "1"]
    process = subprocess.Popen(line, cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    until(lambda: list(tmp_path.glob("runs/s/trials/*/epochs.jsonl")))
    shutil.rmtree(tmp_path / "runs", ignore_errors=True)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in err
    assert err.splitlines()[-1] == "error: runs/s: was removed, so that nothing more is trained"


@pytest.mark.parametrize("cases", [1, pytest.param(40, marks=pytest.mark.nightly)])
def test_ctrl_c_in_the_first_seconds_is_one_line(cases, tmp_path):
    """It reaches the server too, which is importing PyTorch then."""
    (tmp_path / "s.toml").write_text(TINY_STUDY)
    moments = random.Random(0)
    for _ in range(cases):
        line = [*LINE, "run", "s.toml", "--device", "cpu"]
        process = subprocess.Popen(
            line, cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        until(lambda process=process: b"forkserver" in _commands_of_children(process.pid))
        time.sleep(moments.uniform(0, 0.8))
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130
        assert err.splitlines()[-1].startswith("stopped; finished work is kept") and "Traceback" not in err


def _commands_of_children(pid: int) -> bytes:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return b" ".join(Path(f"/proc/{child}/cmdline").read_bytes() for child in children)


def test_only_a_signal_is_a_stop(expertgrid, study, monkeypatch):
    """Typer takes the end of any file for one."""

    def read_to_the_end(directory):
        raise EOFError("the file has ended")

    monkeypatch.setattr("expertgrid.ablations.cli.files.check_files", read_to_the_end)
    outcome = expertgrid("check", study.path)
    assert (outcome.status, outcome.complaint) == (1, "error: the file has ended")


def test_a_tracker_that_does_not_answer_is_wrong_input(expertgrid, study):
    """A server that hangs, before anything is imported for it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        uri, begun = f"http://127.0.0.1:{server.getsockname()[1]}", time.monotonic()
        outcome = expertgrid("track", study.path, "--to", f"mlflow:{uri}")
    assert (outcome.status, outcome.out) == (2, "") and time.monotonic() - begun < 6
    assert outcome.complaint == f"error: tracker mlflow: {uri}: TimeoutError: timed out"


def _ignores_sigterm():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return lambda *words: os.getpid()


def test_an_answering_process_that_ignores_sigterm_ends():
    begun = None
    with pytest.raises(KeyboardInterrupt), answers("a test", _ignores_sigterm) as ask:
        pid, begun = ask(), time.monotonic()
        raise KeyboardInterrupt
    assert time.monotonic() - begun < 5 and not runs(pid)
    assert not multiprocessing.active_children()


def test_a_user_without_a_home(tmp_path):
    """As in a container: neither HOME nor an entry of the user."""
    (tmp_path / "sitecustomize.py").write_text(
        "import pwd\ndef getpwuid(uid): raise KeyError(uid)\npwd.getpwuid = getpwuid"
    )
    environment = {name: value for name, value in ENVIRONMENT.items() if name not in ("HOME", "USER", "LOGNAME")}
    environment["PYTHONPATH"] = f"{tmp_path}:{environment['PYTHONPATH']}"
    line = [*LINE, "run", "quickstart", "--dry-run"]
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "~").exists()


def in_place_of(file: Path, way: str) -> None:
    file.unlink()
    if way == "folder":
        file.mkdir()
    elif way == "loop":
        file.symlink_to(file)
    else:
        file.write_bytes(b"\xff\x00\n")


@pytest.mark.parametrize("way", ["folder", "loop", "bytes"])
def test_a_study_beside_that_cannot_be_read_is_left_out(study, trial, way, tmp_path):
    for name in ("record.json", "model.safetensors", "predictions.npz", "epochs.jsonl", "SHA256SUMS", "ledger.jsonl"):
        beside = StudyDirectory(shutil.copytree(study.path, tmp_path / way / name))
        in_place_of(beside.path / name if name == "ledger.jsonl" else beside.trial(trial) / name, way)
        other, refused = StudyDirectory(beside.path.parent / "other"), Counter()
        other.path.mkdir(exist_ok=True)
        assert other.adopt(trial, refused) is None
        assert name != "ledger.jsonl" or any(str(beside.path) in reason for reason in refused)
        shutil.rmtree(beside.path)


HARMFUL = """
import pathlib
pathlib.Path({marks!r}, __name__).touch()
"""
MODULES = (
    "random",
    "types",
    "struct",
    "queue",
    "token",
    "typing",
    "signal",
    "timm",
    "torch",
    "numpy",
    "model",
    "bench",
)
STUDY = TINY_STUDY.replace("experts = [1, 2]", "experts = [1]").replace('gate = ["linear", "mlp"]', "")
COMMANDS = [
    "run s.toml --device cpu --jobs 2 --track tensorboard --track mlflow --track wandb",
    "run s.toml --device cpu --engine ray --out ray --no-adopt",
    "run s.toml --device cpu --compile on --out compiled --no-adopt --set recipe.epochs=1",
    "table runs/s", "report runs/s", "export runs/s", "bench runs/s", "bench-train runs/s", "verify runs/s",
    "check runs/s", "list models", "show-augment fast --out augment.png", "track runs/s --to mlflow",
]  # fmt: skip


@pytest.mark.nightly
def test_no_command_runs_a_file_of_the_working_directory(tmp_path):
    """Neither the command nor a process that it starts."""
    place, marks = tmp_path / "place", tmp_path / "marks"
    place.mkdir(), marks.mkdir()
    (tmp_path / "expertgrid-script.py").write_text(
        "from expertgrid.__main__ import main\nif __name__ == '__main__':\n    main()\n"
    )
    (place / "s.toml").write_text(STUDY)
    for module in MODULES:
        (place / f"{module}.py").write_text(HARMFUL.format(marks=str(marks)))
    for command in COMMANDS:
        line = [sys.executable, str(tmp_path / "expertgrid-script.py"), *command.split()]
        done = subprocess.run(line, cwd=place, env=ENVIRONMENT, capture_output=True, text=True)
        assert done.returncode in (0, 1) and "Traceback" not in done.stderr, f"{command}: {done.stderr}"
        assert not list(marks.iterdir()), command
