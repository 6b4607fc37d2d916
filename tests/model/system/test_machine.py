"""What is said of the machine, against what other programs say of it."""

import os
import platform
import shutil
import subprocess
import sys

import pytest
import torch

from expertgrid.model.system import machine
from expertgrid.model.system.errors import InputError


@pytest.fixture(autouse=True)
def fresh():
    """Each test asks the machine anew, and leaves no answer of a machine that it made up."""
    cached = machine.cpu_name, machine._from_nvml, machine.checkout_commit
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


@pytest.mark.parametrize(
    ("lines", "name"),
    [
        ("model name\t: AMD EPYC  9654 96-Core: Processor\nmodel name\t: other\n", "AMD EPYC 9654 96-Core: Processor"),
        ("BogoMIPS\t: 50.00\n", "aarch64"),  # as on ARM
    ],
)
def test_the_processor_has_the_name_of_its_model_or_architecture(monkeypatch, tmp_path, lines, name):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\n{lines}")
    monkeypatch.setattr(machine, "CPUINFO", cpuinfo)
    for function, value in {"processor": "", "system": "Linux", "machine": "aarch64"}.items():
        monkeypatch.setattr(platform, function, lambda value=value: value)
    assert machine.cpu_name() == name


@pytest.mark.skipif(shutil.which("nproc") is None, reason="no nproc")
def test_usable_cores_are_those_of_nproc():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    done = subprocess.run(["nproc"], capture_output=True, text=True, check=True, env=environment)
    assert machine.usable_cores() == int(done.stdout)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="processes are not bound to cores here")
def test_a_bound_process_uses_its_cores_only():
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert machine.usable_cores() == 1
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.skipif(not os.path.exists("/proc/meminfo"), reason="not Linux")
def test_memory_is_that_of_the_kernel():
    with open("/proc/meminfo") as file:
        kibibytes = next(int(line.split()[1]) for line in file if line.startswith("MemTotal:"))
    assert machine.memory_bytes() == pytest.approx(kibibytes * 1024, rel=1e-3)


def test_devices_have_names(monkeypatch):
    monkeypatch.setattr(machine, "cpu_name", lambda: "A processor")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    assert machine.device_name(torch.device("cpu")) == "cpu (A processor)"
    assert machine.device_name(torch.device("cuda", 1)) == "GPU 1"


def test_devices_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine.torch_device("auto") == machine.torch_device("cpu") == torch.device("cpu")
    with pytest.raises(InputError, match="--device cuda: there is no CUDA device here"):
        machine.torch_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert machine.torch_device("auto") == torch.device("cuda")
    assert machine.torch_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(InputError, match="unknown device 'cuda:2'"):
        machine.torch_device("cuda:2")


def test_the_driver_is_that_of_nvml(monkeypatch):
    pynvml = pytest.importorskip("pynvml")
    shutdowns: list[str] = []
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlSystemGetDriverVersion", lambda: "570.124.06")
    monkeypatch.setattr(pynvml, "nvmlShutdown", lambda: shutdowns.append("shutdown"))
    assert machine.gpu_driver() == "570.124.06"
    assert len(shutdowns) == 1


@pytest.mark.parametrize(
    ("visible", "names"),
    [(None, ["0", "1", "2"]), ("2, 0", ["2", "0"]), ("GPU-5a,-1,0", ["GPU-5a"]), ("", []), ("-1", [])],
)
def test_gpus_are_those_that_cuda_shows(visible, names, monkeypatch):
    pynvml = pytest.importorskip("pynvml")
    for function, value in (("nvmlInit", None), ("nvmlShutdown", None), ("nvmlDeviceGetCount", 3)):
        monkeypatch.setattr(pynvml, function, lambda value=value: value)
    monkeypatch.delenv(machine.VISIBLE_GPUS, raising=False)
    if visible is not None:
        monkeypatch.setenv(machine.VISIBLE_GPUS, visible)
    assert machine.gpus() == names
    machine._from_nvml.cache_clear()
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 0)
    assert machine.gpus() == []


def test_no_driver(monkeypatch):
    pynvml = pytest.importorskip("pynvml")

    def fail() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_DRIVER_NOT_LOADED)

    monkeypatch.setattr(pynvml, "nvmlInit", fail)
    assert machine.gpu_driver() is None
    machine._from_nvml.cache_clear()
    monkeypatch.setitem(sys.modules, "pynvml", None)  # as on macOS
    assert machine.gpu_driver() is None


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A git repository with this module in it, in its first commit."""
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    (tmp_path / "machine.py").write_text("")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "machine.py")
    git(tmp_path, "-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-q", "-m", "first")
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "machine.py"))
    return tmp_path


def git(place, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(place), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.skipif(shutil.which("git") is None, reason="no git")
def test_the_commit_of_a_checkout(checkout):
    commit = git(checkout, "rev-parse", "HEAD")
    assert machine.checkout_commit() == commit
    machine.checkout_commit.cache_clear()
    (checkout / "other.py").write_text("not tracked")
    assert machine.checkout_commit() == commit
    machine.checkout_commit.cache_clear()
    (checkout / "machine.py").write_text("changed")
    assert machine.checkout_commit() == f"{commit}+changes"


@pytest.mark.skipif(shutil.which("git") is None, reason="no git")
def test_a_package_inside_of_another_checkout_has_no_commit(checkout, monkeypatch):
    (checkout / "site-packages").mkdir()
    (checkout / "site-packages" / "machine.py").write_text("")
    monkeypatch.setattr(machine, "__file__", str(checkout / "site-packages" / "machine.py"))
    assert machine.checkout_commit() is None


def test_no_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert machine.checkout_commit() is None


def test_deterministic_refuses_what_has_no_such_way():
    x, indices, values = torch.zeros(3), torch.tensor([0, 0]), torch.ones(2)
    with machine.deterministic():
        assert torch.are_deterministic_algorithms_enabled()
        with pytest.raises(RuntimeError, match="put_"):
            x.put_(indices, values)
    with machine.deterministic(False):
        assert not torch.are_deterministic_algorithms_enabled()
        x.put_(indices, values)
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
