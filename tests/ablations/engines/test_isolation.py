"""Trials in processes of their own: what ends such a process, what stops it, and that the others go on."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from multiprocessing import parent_process
from pathlib import Path
from threading import Event

import pytest
import torch
from conftest import REPOSITORY
from networks_with_faults import networks_with_faults

from expertgrid.ablations.engines.events import TrialDone, TrialFailed, TrialNote, TrialStarted
from expertgrid.ablations.engines.isolation import MOST_JOBS, Setup, isolated, jobs_for
from expertgrid.ablations.engines.local import run_local
from expertgrid.ablations.records.directory import StudyDirectory
from expertgrid.ablations.study.study import Study
from expertgrid.model.fast.cuda_graphs import Recorder, RecordingError
from expertgrid.model.fast.execution import EAGER, ExecutionOptions, ExecutionPlan
from expertgrid.model.system.machine import usable_cores
from expertgrid.model.system.processes import ProcessLost, process_context
from expertgrid.model.training.data import ImageData
from expertgrid.model.training.resume import read_state
from expertgrid.model.training.trial import Trial

NETWORKS = networks_with_faults(
    {
        "with_none": "pass",
        "with_crash": "ctypes.string_at(0)",
        "with_hang": "time.sleep(1000)",
        "with_late_hang": "self.steps = getattr(self, 'steps', 0) + 1; "
        "self.steps == 3 and (open('hangs', 'w').close(), time.sleep(1000))",
    }
)
STUDY = """
question = "Do the others go on?"
seeds = 1
[base]
recipe = "fast"
data = "digits"
[set]
"recipe.epochs" = {epochs}
[factors]
model = {networks}
"""
LINE = [sys.executable, "-m", "expertgrid", "run", "study.toml", "--device", "cpu", "--jobs", "2"]
LINE += ["--import", "networks_of_faults"]


@pytest.fixture
def study(tmp_path, monkeypatch) -> Callable[..., StudyDirectory]:
    """Writes a study of networks with faults, and gives the directory of its run."""
    monkeypatch.setenv("EXPERTGRID_ISOLATE", "1")
    monkeypatch.setenv("PYTHONFAULTHANDLER", "1")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY / "src"))
    (tmp_path / "networks_of_faults.py").write_text(NETWORKS)

    def write(epochs: int, *networks: str) -> StudyDirectory:
        (tmp_path / "study.toml").write_text(STUDY.format(epochs=epochs, networks=list(networks)))
        return StudyDirectory(tmp_path / "runs" / "study")

    return write


def until(condition: Callable[[], object], seconds: float = 100.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def trials_of(digits: ImageData, seeds: int, **fields) -> list[Trial]:
    fields = {"width": 0.0625, "recipe.epochs": 1} | fields
    return list(Study(name="test", question="?", seeds=seeds, set=fields).cells(digits)[0].trials)


def test_what_ends_one_of_several_processes_ends_one_trial(study, tmp_path, digits):
    """The others give the records of one trial at a time, to the last bit; their times are marked as no speeds."""
    directory = study(2, "with_crash", "with_hang", "with_none")
    line = [*LINE, "--trial-timeout", "3"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    crashed, hung, trained = (cell.trials[0] for cell in directory.read_plan().cells)

    failure = directory.failure(crashed)
    assert (failure.kind, failure.step) == ("crashed", 0)
    assert failure.error == "the training process was ended by SIGSEGV"
    traceback = (directory.trial(crashed) / "traceback.txt").read_text()
    assert "networks_of_faults.py" in traceback and "in forward" in traceback

    failure = directory.failure(hung)
    assert (failure.kind, failure.error) == ("timeout", "not done after --trial-timeout 3 s")
    traceback = (directory.trial(hung) / "traceback.txt").read_text()
    assert "networks_of_faults.py" in traceback and "in forward" in traceback

    said = done.stderr[done.stderr.index("2 trials failed, and the same command tries again:") :].splitlines()
    assert len(said) == 3
    assert f"{crashed}, seed 0: crashed: the training process was ended by SIGSEGV; traceback in " in said[1]
    assert f"{hung}, seed 0: timeout: not done after --trial-timeout 3 s; traceback in " in said[2]
    assert "is not decided" in done.stdout  # what was lost is a gap
    assert "train images/s" in done.stdout

    record, config = directory.record(trained), directory.config(trained)
    runpy.run_path(str(tmp_path / "networks_of_faults.py"), run_name="networks_of_faults")
    alone = trained_here(config, digits, tmp_path / "alone", max(1, usable_cores() // 2))
    assert (record.at_once, alone.record(trained).at_once) == (2, 1)
    assert directory.checkpoint(trained).read_bytes() == alone.checkpoint(trained).read_bytes()
    timed = {"at_once", "images_per_s", "train_seconds", "finished"}
    assert record.model_dump(exclude=timed) == alone.record(trained).model_dump(exclude=timed)


def trained_here(trial: Trial, digits: ImageData, place: Path, threads: int) -> StudyDirectory:
    from expertgrid.model.training.splits import ResidentData

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        list(run_local([trial], ResidentData(digits, torch.device("cpu")), StudyDirectory(place)))
    finally:
        torch.set_num_threads(before)
    return StudyDirectory(place)


def test_the_first_signal_waits_for_the_step_and_the_second_does_not(study, tmp_path):
    """SIGTERM, as a system sends it to all processes of a job, and then Ctrl-C, which reaches all of a terminal.

    At the first one process saves the state of a long training. The network that hangs never ends its step.
    """
    directory = study(3000, "with_none", "with_late_hang")
    process = subprocess.Popen(LINE, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True)

    def both_train() -> bool:
        sizes = [file.stat().st_size for file in directory.path.glob("trials/*/epochs.jsonl")]
        hangs = (tmp_path / "hangs").exists()  # its file of epochs is there before its first step
        return process.poll() is not None or (hangs and len(sizes) == 2 and max(sizes) > 0)

    until(both_train)
    os.killpg(process.pid, signal.SIGTERM)
    until(lambda: process.poll() is not None or list(directory.path.glob("trials/*/resume.pt")))
    time.sleep(0.5)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-1].endswith("the same command continues it: expertgrid " + " ".join(LINE[3:]))
    (resume,) = directory.path.glob("trials/*/resume.pt")
    state = read_state(resume)
    assert 1 <= len(state["epochs"]) == state["training"]["epoch"] < 3000


def test_a_second_signal_while_the_caller_works_on_an_event(study, digits, tmp_path):
    """It closes the events. Nobody waits for the steps, which never end."""
    study(1, "with_hang")
    begin = partial(runpy.run_path, str(tmp_path / "networks_of_faults.py"), run_name="networks_of_faults")
    begin()
    trials = Study(name="s", question="?", seeds=2, factors={"model": ["with_hang"]}).cells(digits)[0].trials
    setup, directory, stopped = Setup(digits, "cpu", tmp_path, begin, EAGER), StudyDirectory(tmp_path), Event()
    with isolated(2) as pool:
        events = pool.run(trials, setup, directory, stopped)
        assert isinstance(next(events), TrialStarted)
        stopped.set()
        events.close()
        assert all(trainer.process.is_alive() for trainer in pool.trainers)


def _train_long(data: ImageData, trials: list[Trial], place: Path) -> None:
    setup = Setup(data, "cpu", place, list, EAGER)
    with isolated() as pool:
        for _ in pool.run(trials, setup, StudyDirectory(place), Event()):
            (place / "pid").write_text(str(pool.trainers[0].process.pid))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_without_a_parent_ends(digits, tmp_path):
    trials = trials_of(digits, 1, **{"recipe.epochs": 3000})
    parent = process_context("torch").Process(target=_train_long, args=(digits, trials, tmp_path))
    parent.start()
    until(lambda: (tmp_path / "trials" / trials[0].id / "epochs.jsonl").exists() and (tmp_path / "pid").exists())
    trainer = Path("/proc", (tmp_path / "pid").read_text())
    assert trainer.exists()
    parent.kill()
    parent.join()
    until(lambda: not trainer.exists() or (trainer / "stat").read_text().rpartition(")")[2].split()[0] == "Z")


def _fail_at_once() -> None:
    raise OSError(28, "No space left on device")


def test_an_error_of_no_trial_is_raised_here(digits, tmp_path):
    """An error of the process itself, and its death before it began a trial."""
    for begin, error, text in (
        (_fail_at_once, OSError, "No space left on device"),
        (partial(os._exit, 3), ProcessLost, "the training process ended before its first trial: exit status 3"),
    ):
        setup = Setup(digits, "cpu", tmp_path, begin, EAGER)
        with isolated() as pool, pytest.raises(error, match=text):
            list(pool.run(trials_of(digits, 2), setup, StudyDirectory(tmp_path), Event()))


def test_a_process_that_is_lost_between_trials_costs_none(digits, tmp_path):
    """A new process trains those that are left."""
    setup, directory = Setup(digits, "cpu", tmp_path, list, EAGER), StudyDirectory(tmp_path)
    with isolated() as pool:
        for event in pool.run(trials_of(digits, 3), setup, directory, Event()):
            if isinstance(event, TrialDone) and event.trial.seed == 0:
                first = pool.trainers[0].process
                first.kill()
                first.join()
        assert pool.trainers[0].process.pid != first.pid
    records = [directory.record(trial.id) for trial in trials_of(digits, 3)]
    assert [record.seed for record in records] == [0, 1, 2]


class _NothingIsRecorded(Recorder):
    def __init__(self, *arguments):
        pass

    def __call__(self, step, *inputs):
        raise RecordingError("operation not permitted")


def _record_nothing() -> None:
    """In the process that trains, graphs are chosen where they are not left out, and cannot be recorded."""
    from expertgrid.model.training import prepare

    assert parent_process() is not None
    prepare.Recorder = _NothingIsRecorded
    ExecutionOptions.plan = lambda options, *_: ExecutionPlan(graphs=options.graphs == "auto")


def test_where_no_graph_can_be_recorded_a_new_process_trains_without(digits, tmp_path):
    setup, directory = Setup(digits, "cpu", tmp_path, _record_nothing, ExecutionOptions()), StudyDirectory(tmp_path)
    (trial,) = trials_of(digits, 1)
    with isolated() as pool:
        events = list(pool.run([trial], setup, directory, Event()))
    assert not any(isinstance(event, TrialFailed) for event in events)
    (note,) = (event.text for event in events if isinstance(event, TrialNote))
    assert note.startswith("trained without CUDA graphs: error: ")
    assert note.endswith("operation not permitted")
    assert directory.record(trial.id).graphs is False and directory.failure(trial.id) is None


def test_jobs_by_themselves(monkeypatch):
    gib = 2**30
    monkeypatch.setattr("expertgrid.ablations.engines.isolation.gpus", list)
    assert [jobs_for("cpu", cores, 100 * gib) for cores in (1, 2, 4, 64)] == [1, 2, 4, MOST_JOBS]
    assert jobs_for("auto", 4, 7 * gib) == 2
    assert jobs_for("cpu", 4, 1 * gib) == 1
    assert jobs_for("cuda:0", 4, 100 * gib) == jobs_for("mps", 4, 100 * gib) == 1
    assert jobs_for("cuda", 4, 100 * gib) == 1
    monkeypatch.setattr("expertgrid.ablations.engines.isolation.gpus", lambda: ["0", "1", "2"])
    assert jobs_for("auto", 4, 100 * gib) == jobs_for("cuda", 4, 100 * gib) == 3
    assert jobs_for("cuda:1", 4, 100 * gib) == 1


SCRIPT = """
import sys
from expertgrid.ablations.engines.isolation import ENGINE
from expertgrid.model.system.processes import process_context
REPORT = '''
import json, os, signal, sys
from pathlib import Path
print(json.dumps([
    sorted(sys.modules),
    os.environ.get("PYTHONSAFEPATH"),
    Path("/proc", str(os.getppid()), "maps").read_text(),
    signal.getsignal(signal.SIGTERM) == signal.SIG_IGN,
]), flush=True)
'''
if __name__ == "__main__":
    process = process_context(ENGINE).Process(target=exec, args=(REPORT,))
    process.start()
    process.join()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has the server")
def test_processes_are_forked_from_a_server_that_has_imported_all_and_begun_nothing(tmp_path):
    """It finds no module in the working directory, ignores SIGTERM, and gives its processes the user's environment."""
    (tmp_path / "script").mkdir()
    (tmp_path / "script" / "main.py").write_text(SCRIPT)
    (tmp_path / "random.py").write_text("raise SystemExit('the file of the user')")
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY / "src")}
    line = [sys.executable, tmp_path / "script" / "main.py"]
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    modules, safe_path, mapped, ignores = json.loads(done.stdout)
    assert {"expertgrid.model.system.server", "expertgrid.ablations.engines.local"} <= set(modules)
    assert safe_path is None and ignores
    assert "libtorch" in mapped and "libcuda.so" not in mapped


HOLDER = """
import multiprocessing
from expertgrid.model.system.processes import AnsweringProcess


def begin():
    lock = multiprocessing.get_context("spawn").Lock()  # has a name, which multiprocessing's tracker knows
    return lambda send: send(lock._semlock.name)


if __name__ == "__main__":
    from holder import begin  # the process knows this file by that name alone

    process = AnsweringProcess("expertgrid.model.system.processes", begin)
    process.ask()
    print(process.connection.recv())
    process.end()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has the tracker")
def test_what_a_killed_process_held_is_freed_without_a_word(tmp_path):
    (tmp_path / "holder.py").write_text(HOLDER)
    environment = os.environ | {"PYTHONPATH": f"{REPOSITORY / 'src'}:{tmp_path}"}
    line = [sys.executable, tmp_path / "holder.py"]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert not Path("/dev/shm", f"sem.{done.stdout.strip().lstrip('/')}").exists()


def test_only_the_server_ignores_sigterm():
    """Another process that imports what the server does keeps its signals, and its exit status."""
    code = (
        "import signal, sys, expertgrid.model.system.server\n"
        "sys.exit(3 + (signal.getsignal(signal.SIGTERM) != signal.SIG_DFL))"
    )
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY / "src")}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 3
