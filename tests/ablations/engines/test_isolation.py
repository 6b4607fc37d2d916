"""Trials in a process of their own: what ends that process, what stops it, and that the others go on."""

import os
import runpy
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from threading import Event, Thread

import pytest
import torch
from networks_with_faults import networks_with_faults

from expertgrid.ablations.engines.events import Stopped, TrialDone, TrialStarted
from expertgrid.ablations.engines.isolation import (
    MOST_JOBS,
    Lost,
    Pool,
    ProcessLost,
    Setup,
    Trainer,
    isolated,
    jobs_for,
)
from expertgrid.ablations.engines.local import run_local
from expertgrid.ablations.records.directory import StudyDirectory
from expertgrid.ablations.study.study import Study
from expertgrid.model.fast.execution import EAGER
from expertgrid.model.system.machine import usable_cores
from expertgrid.model.training.resume import read_state
from expertgrid.model.training.splits import ResidentData

NETWORKS = networks_with_faults(
    {"with_none": "pass", "with_crash": "ctypes.string_at(0)", "with_hang": "time.sleep(1000)"}
)
STUDY = """
question = "Do the others go on?"
seeds = 1
[base]
recipe = "fast"
data = "digits"
[set]
"recipe.epochs" = 2
[factors]
model = ["with_crash", "with_hang", "with_none"]
"""
LINE = [sys.executable, "-m", "expertgrid", "run", "study.toml", "--device", "cpu", "--import", "networks_of_faults"]


@pytest.fixture
def study(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("EXPERTGRID_ISOLATE", "1")
    monkeypatch.setenv("PYTHONFAULTHANDLER", "1")
    (tmp_path / "networks_of_faults.py").write_text(NETWORKS)
    (tmp_path / "study.toml").write_text(STUDY)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3] / "src"))
    return tmp_path


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has them")
def test_several_processes_are_forked_from_one_that_only_imports(digits, tmp_path):
    trials = Study(name="test", question="?", seeds=2, set={"recipe.epochs": 1}).cells(digits)[0].trials
    with isolated(2) as pool:
        list(pool.run(trials, Setup(digits, "cpu", tmp_path, list, EAGER), StudyDirectory(tmp_path), Event()))
        parents = {
            Path(f"/proc/{trainer.process.pid}/stat").read_text().rpartition(")")[2].split()[1]
            for trainer in pool.trainers
        }
    (server,) = parents - {str(os.getpid())}
    loaded = Path(f"/proc/{server}/maps").read_text()
    assert "libtorch" in loaded and "libcuda.so" not in loaded


def test_what_ends_one_of_several_processes_ends_one_trial(study):
    line = [*LINE, "--jobs", "2", "--trial-timeout", "3"]
    done = subprocess.run(line, cwd=study, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    directory = StudyDirectory(study / "runs" / "study")
    crashed, hung, trained = (cell.trials[0] for cell in directory.read_plan().cells)
    assert directory.record(trained).epochs == 2

    failure = directory.failure(crashed)
    assert (failure.kind, failure.step) == ("crashed", 0)
    assert failure.error == "the training process was ended by SIGSEGV"
    assert "networks_of_faults.py" in failure.traceback and "in forward" in failure.traceback

    failure = directory.failure(hung)
    assert (failure.kind, failure.error) == ("timeout", "not done after --trial-timeout 3 s")
    assert "networks_of_faults.py" in failure.traceback and "in forward" in failure.traceback

    said = done.stderr[done.stderr.index("2 trials failed, and the same command tries again:") :].splitlines()
    assert len(said) == 3
    assert f"{crashed}, seed 0: crashed: the training process was ended by SIGSEGV; traceback in " in said[1]
    assert f"{hung}, seed 0: timeout: not done after --trial-timeout 3 s; traceback in " in said[2]
    assert "no verdict" in done.stdout


def test_the_first_signal_waits_for_the_step_and_the_second_does_not(study):
    """SIGTERM, as a system sends it to all processes of a job, and then Ctrl-C, which reaches all of a terminal.

    The network that hangs never ends its step.
    """
    (study / "study.toml").write_text(STUDY.replace('["with_crash", "with_hang", "with_none"]', '["with_hang"]'))
    process = subprocess.Popen(LINE, cwd=study, stderr=subprocess.PIPE, text=True, start_new_session=True)
    trials = study / "runs" / "study" / "trials"
    until = time.monotonic() + 100
    while not list(trials.glob("*/epochs.jsonl")):
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    time.sleep(1)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    try:
        _, err = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)
        pytest.fail(f"it does not end:\n{process.communicate()[1]}")
    assert process.returncode == 130
    assert err.splitlines()[-1].endswith("the same command continues it: expertgrid " + " ".join(LINE[3:]))


def test_a_second_signal_while_the_caller_works_on_an_event(study, digits):
    """It closes the events. Nobody waits for the steps, which never end."""
    begin = partial(runpy.run_path, str(study / "networks_of_faults.py"), run_name="networks_of_faults")
    begin()
    trials = Study(name="s", question="?", seeds=2, factors={"model": ["with_hang"]}).cells(digits)[0].trials
    setup, directory, stopped = Setup(digits, "cpu", study, begin, EAGER), StudyDirectory(study), Event()
    with isolated(2) as pool:
        events = pool.run(trials, setup, directory, stopped)
        assert isinstance(next(events), TrialStarted)
        stopped.set()
        closing = Thread(target=events.close)
        closing.start()
        closing.join(60)
        ended = not closing.is_alive()
    closing.join()
    assert ended


def test_a_signal_saves_the_state_in_the_other_process(study):
    """In the middle of a long training, which then goes on."""
    longer = STUDY.replace('["with_crash", "with_hang", "with_none"]', '["with_none"]').replace("= 2", "= 3000")
    (study / "study.toml").write_text(longer)
    process = subprocess.Popen(LINE, cwd=study, stderr=subprocess.DEVNULL, start_new_session=True)
    until = time.monotonic() + 100
    while not [file for file in (study / "runs").glob("study/trials/*/epochs.jsonl") if file.read_bytes()]:
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    process.wait(timeout=20)
    assert process.returncode == 130
    directory = StudyDirectory(study / "runs" / "study")
    ((trial,),) = (cell.trials for cell in directory.read_plan().cells)
    state = read_state(directory.resume_file(trial))
    assert 1 <= len(state["epochs"]) == state["training"]["epoch"] < 3000


def test_a_process_without_a_parent_ends(study):
    process = subprocess.Popen(LINE, cwd=study, stderr=subprocess.DEVNULL, start_new_session=True)
    until = time.monotonic() + 100
    while not list((study / "runs").glob("study/trials/*/epochs.jsonl")):  # the other process trains
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    until = time.monotonic() + 30
    while _processes_of(process.pid):
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_process_outlives_the_thread_that_started_it(digits, tmp_path):
    """As those of several jobs do, which are started again in the thread where one crashed."""
    directory = StudyDirectory(tmp_path)
    trials = Study(name="test", question="?", seeds=2, set={"recipe.epochs": 1}).cells(digits)[0].trials
    setup, found = Setup(digits, "cpu", tmp_path, list, EAGER), []

    def train() -> None:
        found.append(Trainer())
        list(found[0].run(trials[:1], setup, directory, Event()))

    thread = Thread(target=train)
    thread.start()
    thread.join()
    (trainer,) = found
    first = trainer.process.pid
    try:
        assert isinstance(list(trainer.run(trials[1:], setup, directory, Event()))[-1], TrialDone)
        assert trainer.process.pid == first
    finally:
        trainer.end()


def _processes_of(session: int) -> list[int]:
    """The processes of a session that have not ended, in Linux."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, *_, its_session = stat.read_text().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended meanwhile
        if int(its_session) == session and state != "Z":
            found.append(int(stat.parent.name))
    return found


def _fail_at_once() -> None:
    raise OSError(28, "No space left on device")


def test_an_error_of_no_trial_is_raised_here(digits, tmp_path):
    """An error of the process itself, and its death before it was asked for anything."""
    directory, trials = StudyDirectory(tmp_path), Study(name="test", question="?", seeds=1).cells(digits)[0].trials
    with isolated() as trainer:
        setup = Setup(digits, "cpu", tmp_path, _fail_at_once, EAGER)
        with pytest.raises(OSError, match="No space left on device"):
            list(trainer.run(trials, setup, directory, Event()))
    trainer = Trainer()
    trainer.process.kill()
    trainer.process.join()
    with pytest.raises(ProcessLost, match="the training process ended before its first trial: SIGKILL"):
        list(trainer.run(trials, setup, directory, Event()))
    trainer.end()


def test_a_process_that_is_lost_between_trials_costs_none(digits, tmp_path, monkeypatch):
    """The trial before it is finished, and a new process trains those that are left. A second loss ends the study."""
    trials = list(Study(name="test", question="?", seeds=3).cells(digits)[0].trials)
    lost = Lost("crashed", "SIGKILL", "")
    rounds = [[TrialStarted(trials[0]), TrialDone(trials[0], None), lost], [lost]]
    sent: list = []
    for name, stub in {
        "_start": lambda self: setattr(self, "has_setup", False),
        "end": lambda self: None,
        "_send": lambda self, value: sent.append(value if isinstance(value, Setup) else list(value)),
        "_events": lambda self, stopped, timeout_s: iter(rounds.pop(0)),
    }.items():
        monkeypatch.setattr(Trainer, name, stub)
    setup, directory = Setup(digits, "cpu", tmp_path, _fail_at_once, EAGER), StudyDirectory(tmp_path)
    events = Trainer().run(trials, setup, directory, Event())
    assert [type(next(events)) for _ in range(2)] == [TrialStarted, TrialDone]
    with pytest.raises(ProcessLost):
        next(events)
    assert sent == [setup, trials, setup, trials[1:]]
    assert directory.failure(trials[0].id) is None


def test_several_trials_at_once_give_the_same_records(study, digits):
    """As one at a time with as many threads, down to the last bit; their times are marked as no speeds."""
    healthy = STUDY.replace('"with_crash", "with_hang", "with_none"', '"two_block"').replace("seeds = 1", "seeds = 4")
    (study / "study.toml").write_text(healthy.replace("[set]", "[set]\nwidth = 0.0625"))
    line = [*LINE[:-2], "--jobs", "2"]
    done = subprocess.run(line, cwd=study, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Train images/s: each cell alone and in turns" in done.stdout
    directory = StudyDirectory(study / "runs" / "study")
    assert len(directory.test_reads()) == 4
    trials = directory.read_study().cells(digits)[0].trials
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, usable_cores() // 2))
    try:
        list(run_local(trials, ResidentData(digits, torch.device("cpu")), StudyDirectory(study / "alone")))
    finally:
        torch.set_num_threads(before)
    for trial in trials:
        one, two = StudyDirectory(study / "alone").record(trial.id), directory.record(trial.id)
        assert (one.at_once, two.at_once) == (1, 2)
        assert one.environment.threads == two.environment.threads
        assert (one.validation_loss, one.test_loss) == (two.validation_loss, two.test_loss)


def test_an_error_of_one_process_ends_the_others_with_their_states_saved(digits, tmp_path, monkeypatch):
    """The disk is full for one; the other is in the middle of a trial."""
    trials = Study(name="s", question="?", seeds=3).cells(digits)[0].trials
    ended = []

    class Fake:
        def run(self, trials, setup, directory, stopped, timeout_s):
            yield TrialStarted(trials[0])
            if trials[0].seed == 1:
                raise OSError(28, "No space left on device")
            while not stopped.is_set():
                time.sleep(0.01)
            ended.append(trials[0].seed)
            raise Stopped

    pool = Pool(0)
    pool.trainers = [Fake(), Fake()]
    with pytest.raises(OSError, match="No space left"):
        list(pool.run(trials, Setup(digits, "cpu", tmp_path, list, EAGER), StudyDirectory(tmp_path), Event()))
    assert ended == [0]


def test_jobs_by_themselves(monkeypatch):
    gib = 2**30
    monkeypatch.setattr("expertgrid.ablations.engines.isolation.gpu_driver", lambda: None)
    assert [jobs_for("cpu", cores, 100 * gib) for cores in (1, 2, 4, 64)] == [1, 2, 4, MOST_JOBS]
    assert jobs_for("auto", 4, 7 * gib) == 2
    assert jobs_for("cpu", 4, 1 * gib) == 1
    assert jobs_for("cuda:0", 4, 100 * gib) == jobs_for("mps", 4, 100 * gib) == 1
    monkeypatch.setattr("expertgrid.ablations.engines.isolation.gpu_driver", lambda: "570.1")
    assert jobs_for("auto", 4, 100 * gib) == 1


def test_only_the_server_ignores_sigterm():
    """Another process that imports what the server does keeps its signals, and its exit status."""
    code = (
        "import signal, sys, expertgrid.model.system.server\n"
        "sys.exit(3 + (signal.getsignal(signal.SIGTERM) != signal.SIG_DFL))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 3
