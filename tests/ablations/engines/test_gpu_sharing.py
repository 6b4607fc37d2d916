"""CUDA's Multi-Process Service: when it is started, what the processes are told, and that it ends.

A script stands in for NVIDIA's control program, which starts the service only where there is a GPU.
"""

import os
from functools import partial
from pathlib import Path
from threading import Event

import pytest

from expertgrid.ablations.engines import gpu_sharing, isolation
from expertgrid.ablations.engines.gpu_sharing import CONTROL, LOGS, PIPES, SharedGpu, shared_gpu
from expertgrid.ablations.engines.isolation import Setup, isolated
from expertgrid.ablations.records.directory import StudyDirectory
from expertgrid.ablations.study.study import Study
from expertgrid.model.fast.execution import EAGER
from expertgrid.model.system.machine import VISIBLE_GPUS

SCRIPT = f"""#!/bin/sh
if [ "$1" = -d ]; then
    echo started "${PIPES}" "${LOGS}" ${VISIBLE_GPUS} >> "$(dirname "$0")/calls"
    touch "${PIPES}/control"
else
    read line
    echo "$line" "${PIPES}" >> "$(dirname "$0")/calls"
    if [ -e "${PIPES}/killed" ]; then
        echo Cannot find MPS control daemon process >&2
        exit 1
    fi
    [ "$line" = get_server_list ] || rm "${PIPES}/control"
fi
"""


@pytest.fixture
def control(tmp_path, monkeypatch) -> Path:
    """NVIDIA's program on the path, and no service."""
    program = tmp_path / "bin" / CONTROL
    program.parent.mkdir()
    program.write_text(SCRIPT)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.delenv(PIPES, raising=False)
    monkeypatch.setattr(gpu_sharing, "USUAL", tmp_path / "no-service")
    return program


def calls(control: Path) -> list[list[str]]:
    file = control.parent / "calls"
    return [line.split() for line in file.read_text().splitlines()] if file.exists() else []


def test_a_service_of_all_gpus_is_started_and_ended(control, monkeypatch):
    monkeypatch.setenv(VISIBLE_GPUS, "1")
    with shared_gpu() as gpu:
        place = gpu.environment[PIPES]
        assert (Path(place) / "control").exists() and gpu.missing is None
        assert calls(control) == [["started", place, place]]
    assert calls(control)[1:] == [["quit", "-t", "5", place]]
    assert not Path(place).exists()
    assert PIPES not in os.environ


def test_it_is_ended_after_an_error_too(control):
    with pytest.raises(KeyboardInterrupt), shared_gpu():
        raise KeyboardInterrupt
    assert [call[0] for call in calls(control)] == ["started", "quit"]


@pytest.mark.parametrize("named", [True, False])
def test_one_that_is_there_is_used_and_stays(control, tmp_path, monkeypatch, named):
    place = tmp_path / "theirs"
    place.mkdir()
    (place / "control").touch()
    if named:
        monkeypatch.setenv(PIPES, str(place))
    else:
        monkeypatch.setattr(gpu_sharing, "USUAL", place)
    with shared_gpu() as gpu:
        assert gpu == SharedGpu({PIPES: str(place)})
    assert calls(control) == [["get_server_list", str(place)]] and (place / "control").exists()
    control.unlink()  # as in a container that shares the service of its host
    with shared_gpu() as gpu:
        assert gpu == SharedGpu({PIPES: str(place)})


def test_one_that_was_killed_is_replaced(control, tmp_path, monkeypatch):
    for name in ("control", "killed"):
        (tmp_path / name).touch()
    monkeypatch.setenv(PIPES, str(tmp_path))
    with shared_gpu() as gpu:
        assert gpu.missing is None and gpu.environment[PIPES] != str(tmp_path)
    assert [call[0] for call in calls(control)] == ["get_server_list", "started", "quit"]


def test_why_there_is_none(control, monkeypatch):
    control.write_text("#!/bin/sh\necho An instance of this daemon is already running >&2\nexit 1\n")
    with shared_gpu() as gpu:
        assert gpu.missing == f"{CONTROL} failed: An instance of this daemon is already running"
    control.write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(gpu_sharing, "START_S", 0.2)
    with shared_gpu() as gpu:
        assert gpu.missing == f"{CONTROL} did not answer in 0.2 s"
    control.write_text("no program")
    with shared_gpu() as gpu:
        assert gpu.missing == f"{CONTROL}: Exec format error"
    control.unlink()
    with isolated(2, "cuda") as pool:
        assert pool.in_words == f"2 trials take turns on the GPU, without CUDA's MPS: {CONTROL} is not there"


def test_several_trainers_on_a_gpu_are_its_clients(control, digits, tmp_path, monkeypatch):
    """They have the service in their environment before they start CUDA. On a CPU none is a client, nor one alone."""
    monkeypatch.setattr(isolation, "gpus", list)
    for jobs, device in ((1, "cuda"), (2, "cpu"), (2, "auto")):
        with isolated(jobs, device) as pool:
            assert not pool.gpu.environment
    assert calls(control) == []
    fields = {"width": 0.0625, "recipe.epochs": 1}
    trials = Study(name="test", question="?", seeds=2, set=fields).cells(digits)[0].trials
    setup = Setup(digits, "cpu", tmp_path, partial(_write_environment, tmp_path), EAGER)
    with isolated(2, "cuda:0") as pool:
        list(pool.run(trials, setup, StudyDirectory(tmp_path), Event()))
        place = pool.gpu.environment[PIPES]
        assert pool.in_words is None
    assert [file.read_text() for file in tmp_path.glob("environment-*")] == [f"{place} "] * 2
    assert [call[0] for call in calls(control)] == ["started", "quit"]


@pytest.mark.parametrize(("jobs", "dealt", "started"), [(2, ["2", "5"], 0), (3, ["2", "2", "5"], 1)])
def test_trials_are_dealt_to_the_gpus(control, digits, tmp_path, monkeypatch, jobs, dealt, started):
    monkeypatch.setattr(isolation, "gpus", lambda: ["2", "5"])
    fields = {"width": 0.0625, "recipe.epochs": 1}
    trials = Study(name="test", question="?", seeds=jobs, set=fields).cells(digits)[0].trials
    setup = Setup(digits, "cpu", tmp_path, partial(_write_environment, tmp_path), EAGER)
    with isolated(jobs, "cuda") as pool:
        list(pool.run(trials, setup, StudyDirectory(tmp_path), Event()))
        assert pool.in_words == f"{jobs} trials at once on 2 GPUs"
    assert sorted(file.read_text().split()[-1] for file in tmp_path.glob("environment-*")) == dealt
    assert len(calls(control)) == 2 * started


def _write_environment(place: Path) -> None:
    text = f"{os.environ.get(PIPES, '')} {os.environ.get(VISIBLE_GPUS, '')}"
    (place / f"environment-{os.getpid()}").write_text(text)
