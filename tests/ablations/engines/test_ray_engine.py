"""The Ray engine on real Ray: several nodes on this machine. Trials give the local engine's records, whatever is lost.

Each test has nodes of its own, which it kills or ends.
"""

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from threading import Event as Flag

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, written_record
from networks_with_faults import networks_with_faults
from safetensors.torch import save_file

from expertgrid.ablations.engines.events import EpochDone, Event, StateSaved, TrialDone, TrialFailed, TrialNote
from expertgrid.ablations.engines.isolation import Pool, Setup, isolated
from expertgrid.ablations.engines.local import run_local
from expertgrid.ablations.engines.ray import RayEngine, ray_engine
from expertgrid.ablations.records.directory import StudyDirectory
from expertgrid.ablations.records.predictions import Predictions
from expertgrid.ablations.study.study_file import parse_study
from expertgrid.model.fast.execution import EAGER
from expertgrid.model.registry import build
from expertgrid.model.training.data import ImageData
from expertgrid.model.training.splits import ResidentData
from expertgrid.model.training.trial import Trial
from expertgrid.model.weights import read_weights

if find_spec("ray") is None:  # it is imported by the engine, which sets it before
    pytest.skip("Ray is not installed", allow_module_level=True)

NETWORKS = networks_with_faults(
    {
        "ray_none": "pass",
        "ray_raise": "raise RuntimeError('on purpose')",
        "ray_kill": "os.kill(os.getpid(), signal.SIGKILL)",
        "ray_kill_task": "os.kill(multiprocessing.parent_process().pid, signal.SIGKILL)",
    }
)
STUDY = """
question = "Do nodes give the same?"
seeds = 1
[base]
model = "two_block"
recipe = "fast"
data = "digits"
[set]
width = 0.0625
"recipe.epochs" = {epochs}
"""
RAY = [str(Path(sys.executable).with_name("ray"))]
OF_RAY = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
    "RAY_worker_register_timeout_seconds": "600",  # on a machine that does other things
}
ENVIRONMENT = (
    os.environ | OF_RAY | {"PYTHONPATH": str(REPOSITORY / "src"), "OMP_NUM_THREADS": "1", "EXPERTGRID_ISOLATE": "1"}
)
SAVE_S = 0.5  # between saves, so that trials are short
EPOCHS = 100  # of a trial that is saved some times, and still trains when something happens to it
SAVES_OFTEN = f"""
from functools import partial
import expertgrid.ablations.cli.run
expertgrid.ablations.cli.run.Setup = partial(expertgrid.ablations.cli.run.Setup, save_every_s={SAVE_S})
from expertgrid.ablations.cli.entry import main
main()
"""
MEMORY = Path("/dev/shm")


@contextmanager
def cluster(nodes: int) -> Iterator[tuple[str, list]]:
    """The address of a cluster whose head trains nothing, and its other nodes, with a CPU each."""
    from ray.cluster_utils import Cluster

    os.environ |= OF_RAY
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        yield made.address, [made.add_node(num_cpus=1) for _ in range(nodes)]
    finally:
        made.shutdown()


def train(engine: RayEngine | Pool, trials: list[Trial], data: ImageData, place: Path) -> Iterator[Event]:
    """With a thread. Networks are registered by the engine."""
    setup = Setup(data, "cpu", place, list, EAGER, threads=1, save_every_s=SAVE_S)
    return engine.run(trials, setup, StudyDirectory(place), Flag())


def trained_here(trials: list[Trial], data: ImageData, place: Path) -> StudyDirectory:
    """The local engine's records, with a thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        list(run_local(trials, ResidentData(data, torch.device("cpu")), StudyDirectory(place)))
    finally:
        torch.set_num_threads(threads)
    return StudyDirectory(place)


def assert_same(local: StudyDirectory, by_ray: StudyDirectory, trial: str) -> None:
    """Weights and predictions to the last bit, and records but for times."""
    timed = {"images_per_s", "train_seconds", "finished", "at_once"}
    expected, remote = local.record(trial), by_ray.record(trial)
    assert expected.model_dump(exclude=timed) == remote.model_dump(exclude=timed)
    for name in ("config.json", "model.safetensors", "predictions.npz"):
        assert (local.trial(trial) / name).read_bytes() == (by_ray.trial(trial) / name).read_bytes(), name
    timed = {"images_per_s", "train_seconds", "validation_seconds"}
    assert [e.model_dump(exclude=timed) for e in local.epochs(trial)] == [
        e.model_dump(exclude=timed) for e in by_ray.epochs(trial)
    ]
    assert {path.name for path in local.trial(trial).iterdir()} == {path.name for path in by_ray.trial(trial).iterdir()}
    assert [read.trial for read in by_ray.test_reads()].count(trial) == 1


def test_ray_gives_the_local_records_and_faults_stay_alone(digits, tmp_path, monkeypatch):
    """A module that --import names by its file is sent to the nodes, and so are weights that a trial starts from. One
    trial raises, and two are killed.

    Nothing in the working directory is taken for a module.
    """
    (tmp_path / "networks").mkdir()
    (tmp_path / "networks" / "networks_on_ray.py").write_text(NETWORKS)
    for module in ("random", "statistics", "timm"):
        (tmp_path / f"{module}.py").write_text("raise SystemExit('a file of the user')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path / "networks"))
    import_module("networks_on_ray")
    text = STUDY.format(epochs=2).replace("width = 0.0625", "")
    levels = '[factors]\nmodel = ["two_block", "ray_raise", "ray_kill", "ray_kill_task", "ray_none"]'
    cells = parse_study(text + levels, tmp_path / "s.toml").cells(digits)
    trials = [cell.trials[0] for cell in cells]
    directory = StudyDirectory(tmp_path / "ray")
    save_file(build(trials[0].model).state_dict(), "start.safetensors")
    initial = read_weights("start.safetensors", trials[0].model, digits.classes)
    trials[0] = Trial.model_validate(trials[0].model_dump() | {"weights": initial.weights})
    for place in ("ray", "local"):
        StudyDirectory(tmp_path / place).write_weights({initial.weights.fingerprint: initial.file})
    with ray_engine("auto", 1, None, "auto", ["networks/networks_on_ray.py"]) as engine:
        assert engine.in_words.startswith("Ray, embedded on this machine: room for ")
        events = list(train(engine, trials, digits, directory.path))
        assert_nobody_can_join()
    assert sum(isinstance(event, TrialDone) for event in events) == 2
    reasons = {event.trial.model_name: event.reason for event in events if isinstance(event, TrialFailed)}
    failed_at, _, reasons["ray_raise"] = reasons["ray_raise"].partition(": RuntimeError: ")
    assert "networks_on_ray.py:" in failed_at
    killed = "crashed: the training process was ended by SIGKILL, as the system does where memory runs out"
    assert reasons == {
        "ray_raise": "on purpose",
        "ray_kill": killed,
        "ray_kill_task": "crashed: the process of its task was killed",
    }
    assert "on purpose" in (directory.trial(trials[1].id) / "traceback.txt").read_text()
    healthy = [trials[0], trials[4]]
    local = trained_here(healthy, digits, tmp_path / "local")
    for trial in healthy:
        assert_same(local, directory, trial.id)


def assert_nobody_can_join() -> None:
    """Another process has no token, and the cluster listens on this machine alone."""
    import ray

    address = ray.get_runtime_context().gcs_address
    assert address.startswith("127.0.0.1:")
    with pytest.raises(OSError), socket.create_connection((machine_address(), int(address.partition(":")[2])), 5):
        pass
    script = f"import ray; ray.init({address!r}); ray.get(ray.remote(print).remote('ran'))"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    line = [sys.executable, "-P", "-c", script]
    done = subprocess.run(line, env=environment | {"HOME": "/nowhere"}, capture_output=True, text=True, timeout=100)
    assert done.returncode and "AuthenticationError" in done.stderr, done.stderr


def machine_address() -> str:
    """That of this machine for others; where it has none, one of its loopback's that nothing listens on."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as route, suppress(OSError):
        route.connect(("192.0.2.99", 9))  # sends nothing
        return route.getsockname()[0]
    return "127.0.0.2"


def processes(node) -> tuple[int, list[int]]:
    """A node's daemon, and the processes that it started."""
    (daemon,) = (process.process.pid for started in node.all_processes.values() for process in started)
    return daemon, [int(pid) for pid in subprocess.check_output(["pgrep", "-P", str(daemon)]).split()]


def lose_power(node) -> list[int]:
    daemon, children = processes(node)
    for pid in (daemon, *children):
        os.kill(pid, signal.SIGKILL)
    return []


def fall_silent(node) -> list[int]:
    """The daemon is killed, and the tasks say no more and do not end: Ray does not tell that they are lost.

    Returns the processes that are left.
    """
    daemon, children = processes(node)
    for pid in children:
        os.kill(pid, signal.SIGSTOP)
    os.kill(daemon, signal.SIGKILL)
    return children


def lost_and_gone_on(events: Iterator[Event], nodes: list, way) -> list[Event]:
    """Kills the node of the one trial once it has sent a state after its second epoch."""
    seen, survivors, killed = [], [], False
    for event in events:
        seen.append(event)
        epochs = sum(isinstance(before, EpochDone) for before in seen)
        if isinstance(event, StateSaved) and epochs >= 2 and not killed:
            (busy,) = (node for node in nodes if trains(node))
            survivors, killed = way(busy), True
    for pid in survivors:
        with suppress(ProcessLookupError):  # some end with the daemon
            os.kill(pid, signal.SIGKILL)
    return seen


def trains(node) -> bool:
    """Whether a task of ours runs on a node."""
    _, children = processes(node)
    return any(b"ray::_train" in Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children)


@pytest.mark.nightly
@pytest.mark.parametrize("way", [lose_power, fall_silent])
def test_a_trial_goes_on_where_its_node_is_killed(digits, tmp_path, way):
    (trial,) = parse_study(STUDY.format(epochs=EPOCHS), tmp_path / "s.toml").cells(digits)[0].trials
    with cluster(2) as (address, nodes), ray_engine(address, 1, None, "cpu", []) as engine:
        assert engine.in_words == f"Ray, at {address}, 3 nodes: room for 2 trials at once"
        seen = lost_and_gone_on(train(engine, [trial], digits, tmp_path / "ray"), nodes, way)
    (lost,) = (place for place, event in enumerate(seen) if isinstance(event, TrialNote))
    assert seen[lost].text == "its node was lost; it goes on from its last saved state"
    epochs = [event.epoch.epoch for event in seen[lost:] if isinstance(event, EpochDone)]
    assert epochs[0] > 1 and epochs == list(range(epochs[0], EPOCHS + 1))  # it went on from the saved state
    assert_same(trained_here([trial], digits, tmp_path / "local"), StudyDirectory(tmp_path / "ray"), trial.id)


def run_line(study: Path, *options: str) -> list[str]:
    return [sys.executable, "-c", SAVES_OFTEN, "run", str(study), "--engine", "ray", "--device", "cpu", *options]


def until(condition, process: subprocess.Popen, seconds: float = 300.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, process.poll()
        time.sleep(0.1)


@pytest.mark.nightly
@pytest.mark.parametrize(("signum", "status"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_a_driver_that_is_ended_goes_on(digits, tmp_path, signum, status):
    """Killed, where the cluster stays; or stopped by Ctrl-C, which reaches all processes of a terminal."""
    (tmp_path / "s.toml").write_text(STUDY.format(epochs=EPOCHS))
    (trial,) = parse_study(STUDY.format(epochs=EPOCHS), tmp_path / "s.toml").cells(digits)[0].trials
    directory = StudyDirectory(tmp_path / "runs" / "s")

    def ended_and_run_again(*options: str) -> None:
        line = run_line(tmp_path / "s.toml", *options)
        process = subprocess.Popen(line, cwd=tmp_path, env=ENVIRONMENT, start_new_session=True)
        wanted = (
            directory.resume_file(trial.id) if signum == signal.SIGKILL else directory.trial(trial.id) / "epochs.jsonl"
        )
        until(wanted.exists, process)
        os.killpg(process.pid, signum)
        assert process.wait(120) == status
        assert directory.resume_file(trial.id).exists() and directory.record(trial.id) is None
        done = subprocess.run(line, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("Do nodes give the same?\n")  # Ray printed nothing there

    if signum == signal.SIGKILL:
        with cluster(1) as (address, _):
            ended_and_run_again("--address", address)
    else:
        ended_and_run_again()
    assert_same(trained_here([trial], digits, tmp_path / "local"), directory, trial.id)


@pytest.mark.nightly
def test_a_race_goes_on_ray_until_it_is_decided(digits, tmp_path):
    """Several rounds of one engine."""
    factors = "[factors]\nwidth = [0.0625, 0.125]\n"
    text = STUDY.format(epochs=1).replace("width = 0.0625\n", "").replace("seeds = 1", "seeds = 5") + factors
    (tmp_path / "s.toml").write_text(text)
    line = run_line(tmp_path / "s.toml", "--until", "decided", "--max-seeds", "6")
    done = subprocess.run(line, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert "look at 5 seeds:" in done.stderr


NAMESPACES = ("expertgrid-a", "expertgrid-b")


@contextmanager
def machines() -> Iterator[None]:
    """Two network namespaces with a bridge between them, as two machines: 10.77.0.1 and 10.77.0.2."""
    made = []

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    try:
        for name in NAMESPACES:
            ip("netns", "add", name)
            made.append(name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("link", "add", "eg-a", "netns", NAMESPACES[0], "type", "veth", "peer", "eg-b", "netns", NAMESPACES[1])
        for number, (name, link) in enumerate(zip(NAMESPACES, ("eg-a", "eg-b")), 1):
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", link)
            ip("-n", name, "link", "set", link, "up")
    except (OSError, subprocess.CalledProcessError) as error:
        for name in made:
            subprocess.run(["ip", "netns", "del", name])
        pytest.skip(f"no network namespaces: {error}")
    try:
        yield
    finally:
        for name in made:
            pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split()
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", name], check=True)


@pytest.mark.nightly
@pytest.mark.skipif(sys.platform != "linux", reason="network namespaces are Linux's")
def test_nodes_with_networks_of_their_own(digits, tmp_path):
    """`ray start` on two machines, as the README says it. The driver's has no CPU for trials."""
    (tmp_path / "s.toml").write_text(STUDY.format(epochs=2))
    (trial,) = parse_study(STUDY.format(epochs=2), tmp_path / "s.toml").cells(digits)[0].trials

    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}

    def inside(place: int, *line: str) -> None:
        node = [f"--temp-dir={sockets}/{place}", f"--node-ip-address=10.77.0.{place + 1}"]
        line = (*line, *node) if line[0] == RAY[0] else line
        words = ["ip", "netns", "exec", NAMESPACES[place], *line]
        done = subprocess.run(words, cwd=tmp_path, env=ENVIRONMENT | token, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr

    with tempfile.TemporaryDirectory(prefix="ray") as sockets, machines():  # their names can have 107 characters
        inside(0, *RAY, "start", "--head", "--port=6379", "--num-cpus=0", "--include-dashboard=false")
        inside(1, *RAY, "start", "--address=10.77.0.1:6379", "--num-cpus=1")
        inside(0, *run_line(tmp_path / "s.toml", "--address", "10.77.0.1:6379"))
    assert_same(trained_here([trial], digits, tmp_path / "local"), StudyDirectory(tmp_path / "runs" / "s"), trial.id)


@pytest.mark.nightly
@pytest.mark.skipif(not MEMORY.is_dir(), reason="the disk would be measured")
def test_empty_trials_are_scheduled_at_100_a_second(digits, tmp_path, monkeypatch):
    """1,000 tasks that report a finished trial at once, on two CPUs; the study directory is in memory.

    The driver is what limits the rate, so that its CPU time says the rate of a machine that does nothing else.
    """
    (first,) = parse_study(STUDY.format(epochs=1), tmp_path / "s.toml").cells(digits)[0].trials
    trials = [Trial.model_validate(first.model_dump() | {"seed": seed}) for seed in range(1_100)]
    record, predictions = written_record(first, 50.0, 50.0), Predictions(*(np.zeros(1, np.int64),) * 4)

    def empty(trial, state, shared):
        import ray

        from expertgrid.ablations.engines.events import TrialDone, TrialStarted
        from expertgrid.ablations.engines.scheduling import Report
        from expertgrid.ablations.records.record import Record

        yield ray.get_runtime_context().get_node_id()
        yield Report(TrialStarted(trial))
        files = {"epochs.jsonl": b"", "model.safetensors": b""}
        yield Report(TrialDone(trial, Record.model_validate_json(record)), files, predictions)

    monkeypatch.setattr("expertgrid.ablations.engines.ray._train", empty)
    with tempfile.TemporaryDirectory(dir=MEMORY) as place, ray_engine("auto", 1, None, "cpu", []) as engine:
        list(train(engine, trials[:100], digits, Path(place)))  # its processes start
        begun, used = time.monotonic(), time.process_time()
        events = list(train(engine, trials[100:], digits, Path(place)))
        rate, undisturbed = 1_000 / (time.monotonic() - begun), 1_000 / (time.process_time() - used)
    assert sum(isinstance(event, TrialDone) for event in events) == 1_000
    print(f"{rate:.0f} empty trials a second, {undisturbed:.0f} by the CPU time of the driver")
    assert max(rate, undisturbed) >= 100


@pytest.mark.nightly
def test_a_trial_takes_at_most_half_a_second_more_than_with_the_local_engine(digits, tmp_path):
    """After start-up, two at once with a thread each."""
    text = STUDY.format(epochs=1).replace("seeds = 1", "seeds = 24")
    trials = list(parse_study(text, tmp_path / "s.toml").cells(digits)[0].trials)

    def seconds(engine: RayEngine | Pool, place: Path) -> float:
        list(train(engine, trials[:4], digits, place))
        begun = time.monotonic()
        list(train(engine, trials[4:], digits, place))
        return (time.monotonic() - begun) / 20

    with isolated(2) as pool:
        local = seconds(pool, tmp_path / "local")
    with ray_engine("auto", 1, None, "cpu", []) as engine:
        on_ray = seconds(engine, tmp_path / "ray")
    print(f"{local:.3f} s a trial with the local engine, {on_ray:.3f} s with Ray's")
    assert on_ray - local <= 0.5


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--address", "auto"], "--address: is for --engine ray"),
        (["--gpus-per-trial", "0.5"], "--gpus-per-trial: is for --engine ray"),
        (["--engine", "ray", "--jobs", "2"], "--jobs: is for --engine local"),
        (["--engine", "ray", "--address", "ray://here"], "--address ray://here: auto or HOST:PORT is needed"),
    ],
)
def test_options_of_the_other_engine_are_refused(expertgrid, tiny_study, monkeypatch, options, complaint):
    monkeypatch.setenv("EXPERTGRID_ISOLATE", "1")
    outcome = expertgrid("run", tiny_study, *options)
    assert outcome.status == 2 and complaint in outcome.complaint


def test_without_ray_the_error_names_the_extra(expertgrid, tiny_study, monkeypatch):
    monkeypatch.setenv("EXPERTGRID_ISOLATE", "1")
    monkeypatch.setitem(sys.modules, "ray", None)
    outcome = expertgrid("run", tiny_study, "--engine", "ray")
    assert outcome.status == 2 and "`uv sync --extra ray`" in outcome.complaint
