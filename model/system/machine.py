"""The machine that a number was measured on: processor, cores, memory, GPU, driver, and the commit of this checkout.

Only what is about a torch device imports torch.
"""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Generator
from contextlib import contextmanager, suppress
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expertgrid.model.system.errors import InputError, unknown

if TYPE_CHECKING:
    import torch

CPUINFO = Path("/proc/cpuinfo")
VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"  # the variable that says which GPUs a process may use
GIT_TIMEOUT_S = 10.0


@cache
def cpu_name() -> str:
    """The processor's model, such as "AMD EPYC 9654"; its architecture where the system does not say the model."""
    if platform.system() == "Linux" and CPUINFO.exists():
        for line in CPUINFO.read_text(errors="replace").splitlines():
            field, _, value = line.partition(":")
            if field.strip() == "model name" and value.strip():
                return " ".join(value.split())
    if platform.system() == "Darwin":
        return _output(["sysctl", "-n", "machdep.cpu.brand_string"]) or platform.machine()
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """The number of logical cores that this process may use; a process may be bound to fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # systems without affinity: macOS, Windows


def memory_bytes() -> int | None:
    """The machine's physical memory in bytes; None on a system that does not say (Windows)."""
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def device_name(device: torch.device) -> str:
    """The name of a torch device: a GPU's own name, or "cpu (MODEL)"."""
    if device.type == "cpu":
        return f"cpu ({cpu_name()})"
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()})"


def computes_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16. Without them a CPU takes a hundred times as long as in fp32."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def torch_device(name: str) -> torch.device:
    """The device that a user calls `name`; "auto" is CUDA where there is a CUDA device, else the CPU.

    Raises InputError for a name that is not a device of this machine.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cuda = ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))] if torch.cuda.is_available() else []
    devices = ["cpu", *cuda, *["mps"] * torch.backends.mps.is_available()]
    if name.startswith("cuda") and not cuda:
        raise InputError(f"--device {name}: there is no CUDA device here")
    if name not in devices:
        raise unknown("device", name, ["auto", *devices])
    return torch.device(name)


def gpu_driver() -> str | None:
    """The version of the NVIDIA driver, such as "570.124.06"; None where no NVIDIA driver is installed."""
    return _from_nvml("nvmlSystemGetDriverVersion")


def gpus() -> list[str]:
    """The NVIDIA GPUs that this process may use, each by a name that CUDA_VISIBLE_DEVICES takes."""
    count = _from_nvml("nvmlDeviceGetCount") or 0
    visible = os.environ.get(VISIBLE_GPUS, ",".join(map(str, range(count)))) if count else ""
    return list(takewhile(lambda name: name not in ("", "-1"), map(str.strip, visible.split(","))))


@cache
def _from_nvml(function: str) -> Any:
    """What a function of NVML returns; None where no NVIDIA driver is installed."""
    with suppress(ImportError):  # there is none for macOS
        import pynvml

        with suppress(pynvml.NVMLError):
            pynvml.nvmlInit()
            try:
                return getattr(pynvml, function)()
            finally:
                pynvml.nvmlShutdown()
    return None


@cache
def checkout_commit() -> str | None:
    """The commit of the git checkout that this package runs from, with "+changes" where tracked files differ from it.

    None where the package is installed, or where there is no git. A package that is installed inside of somebody else's
    checkout is not tracked there, so that checkout's commit is not returned.
    """
    this = Path(__file__).resolve()
    git = ["git", "-C", str(this.parent)]
    if _output([*git, "ls-files", "--error-unmatch", this.name]) is None:
        return None
    commit = _output([*git, "rev-parse", "HEAD"])
    changes = _output([*git, "status", "--porcelain", "--untracked-files=no"])
    return f"{commit}+changes" if commit and changes else commit


def _output(command: list[str]) -> str | None:
    """What a program prints; None where it is not installed or does not succeed."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=GIT_TIMEOUT_S, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


@contextmanager
def deterministic(enabled: bool = True) -> Generator[None]:
    """Within, PyTorch computes the same bits again on a GPU too, and raises RuntimeError where it has no way to.

    To be entered before the first use of CUDA in the process: cuBLAS reads its setting once.
    """
    import torch

    if not enabled:
        yield
        return
    before = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG")
        if before is not None:
            os.environ["CUBLAS_WORKSPACE_CONFIG"] = before
