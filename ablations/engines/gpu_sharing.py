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

from expertgrid.model.system.machine import VISIBLE_GPUS

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
    """A service for the processes that start within, and end within too. One that is there already is used.

    One that was killed has left its pipes and does not answer; then a new one is started.
    """
    pipes, control = Path(os.environ.get(PIPES, USUAL)), shutil.which(CONTROL)
    if (pipes / "control").exists() and not (control and _refusal([control], "get_server_list\n", pipes, END_S)):
        yield SharedGpu({PIPES: str(pipes)})
        return
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


def _refusal(command: list[str], text: str, pipes: Path, timeout_s: float) -> str | None:
    """Why the control program of the service with these pipes failed; None where it did not."""
    environment = os.environ | {PIPES: str(pipes), LOGS: str(pipes)}
    environment.pop(VISIBLE_GPUS, None)  # else the service would number its GPUs anew, and its clients would not
    try:
        with tempfile.TemporaryFile("w+", errors="replace") as output:  # no pipe: the service may never close it
            done = subprocess.run(
                command, input=text, env=environment, stdout=output, stderr=output, text=True, timeout=timeout_s
            )
            output.seek(0)
            lines = output.read().strip().splitlines()
    except subprocess.TimeoutExpired:
        return f"{CONTROL} did not answer in {timeout_s:g} s"
    except OSError as error:
        return f"{CONTROL}: {error.strerror}"
    if done.returncode:
        return f"{CONTROL} failed: {lines[-1] if lines else f'exit status {done.returncode}'}"
    return None
