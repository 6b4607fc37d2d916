"""CUDA's Multi-Process Service, with which the kernels of several processes run on a GPU side by side.

Without it processes take turns: each has the whole GPU for some milliseconds, however little of it a kernel fills.
"""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

CONTROL = "nvidia-cuda-mps-control"  # comes with NVIDIA's driver
PIPES, LOGS = "CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"
USUAL = Path("/tmp/nvidia-mps")  # the pipes of a service that was started without PIPES
START_S, END_S = 30, 10


@dataclass(frozen=True)
class SharedGpu:
    """How processes use one GPU."""

    environment: Mapping[str, str] = field(default_factory=dict)  # of a process, before it starts CUDA
    missing: str | None = None  # why they take turns


ALONE = SharedGpu()  # one process, or no GPU


@contextmanager
def shared_gpu() -> Generator[SharedGpu]:
    """A service for the processes that start within, and end within too. One that is there already is used."""
    here = Path(os.environ.get(PIPES, USUAL))
    if (here / "control").exists():
        yield SharedGpu({PIPES: str(here)})
        return
    control = shutil.which(CONTROL)
    if control is None:
        yield SharedGpu(missing=f"{CONTROL} is not there")
        return
    folder = Path(tempfile.mkdtemp(prefix="expertgrid-mps-"))
    missing = _refusal([control, "-d"], "", folder, START_S)
    try:
        yield SharedGpu(missing=missing) if missing else SharedGpu({PIPES: str(folder)})
    finally:
        if not missing:
            _refusal([control], f"quit -t {END_S // 2}\n", folder, END_S)
        shutil.rmtree(folder, ignore_errors=True)  # the service may still write to its log


def _refusal(command: list[str], told: str, folder: Path, timeout_s: float) -> str | None:
    """Why the control program of the service in `folder` failed; None where it did not."""
    environment = os.environ | {PIPES: str(folder), LOGS: str(folder)}
    said = folder / "said.txt"  # not a pipe, whose end would be waited for: the service may hold it
    try:
        with said.open("w") as out:
            done = subprocess.run(
                command, input=told, env=environment, stdout=out, stderr=out, text=True, timeout=timeout_s
            )
    except subprocess.TimeoutExpired:
        return f"{CONTROL} did not answer in {timeout_s:g} s"
    except OSError as error:
        return f"{CONTROL}: {error.strerror}"
    if done.returncode:
        lines = said.read_text(errors="replace").strip().splitlines()
        return f"{CONTROL} failed: {lines[-1] if lines else f'exit status {done.returncode}'}"
    return None
