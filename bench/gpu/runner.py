"""Measures pieces, and keeps what was measured after each step."""

import multiprocessing
import os
import platform
import re
import shutil
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bench.gpu import stages
from bench.gpu.pieces import Measured, Piece, read_piece
from bench.gpu.stages import PIECES, SMOKE, WORK, Bench, Measurement, Size, TimeIsUp
from model.errors import InputError, unknown
from model.files import now, write_whole
from model.machine import checkout_commit, cpu_name, device_name, gpu_driver, memory_bytes, torch_device, usable_cores

RESULTS = Path(__file__).parent.parent / "results"
PACKAGES = ("expertgrid", "torch", "torchvision", "timm", "triton", "onnxruntime", "onnxruntime-gpu")
GRACE_S = 20.0  # for a step to end by itself, once its time is up
LEAST_MEMORY = 16 * 2**30  # of the GPU, free
LONGEST_MINUTES = 60


@dataclass(frozen=True)
class Asked:
    """What the command line asks."""

    pieces: str | None  # separated by commas; None for all
    data: str | None
    device: str | None
    out: Path
    minutes: float
    smoke: bool
    again: bool
    command: str


def run(asked: Asked) -> int:
    """Measures the pieces that are asked for; 0 where all are done, else 1. Raises InputError."""
    names = list(PIECES) if asked.pieces is None else asked.pieces.split(",")
    for name in names:
        if name not in PIECES:
            raise unknown("piece", name, PIECES)
    if not 0 < asked.minutes <= LONGEST_MINUTES:
        raise InputError(f"--minutes {asked.minutes:g}: more than 0 and at most {LONGEST_MINUTES} are needed")
    if asked.device is None and not torch.cuda.is_available() and not asked.smoke:
        raise InputError("there is no CUDA device here; --smoke runs all pieces small on the CPU")
    device = torch_device(asked.device or "auto")
    check_device(device, asked.smoke)
    where = place(asked.out, device)
    data = asked.data or (random_images(asked.out / "images") if asked.smoke else "cifar10")
    bench = Bench(where, device, data, asked.smoke, SMOKE if asked.smoke else Size())
    if asked.again:
        for name in names:
            (where / f"{name}.json").unlink(missing_ok=True)
            for folder in WORK.get(name, ()):
                shutil.rmtree(bench.work / folder, ignore_errors=True)
    done = [measure(name, bench, asked.minutes, asked.command) for name in PIECES if name in names]
    return 0 if all(done) else 1


def measure(name: str, bench: Bench, minutes: float, command: str) -> bool:
    """Measures a piece, or goes on with it; whether it is done. Its file is written after each step."""
    file = bench.place / f"{name}.json"
    piece = read_piece(file)
    steps = PIECES[name](bench)
    if piece and (piece.data, piece.smoke) != (data_name(bench.data), bench.smoke):
        raise InputError(f"{file}: was measured on {piece.data}; give --data as then, --again, or another --out")
    if piece and piece.done:
        print(f"{name}: done before; --again measures it anew", file=sys.stderr)
        return True
    piece = piece or Piece(piece=name, smoke=bench.smoke, data=data_name(bench.data), command=command)
    here = environment(bench.device)
    if here not in piece.environments:
        piece.environments.append(here)
    bench.until = time.monotonic() + 60 * minutes - min(GRACE_S, 6 * minutes)
    failed = []
    for step in steps:
        if step in piece.steps and piece.steps[step].complete:
            continue
        started = time.monotonic()
        try:
            if started >= bench.until:
                raise TimeIsUp
            print(f"{name}: {step}", file=sys.stderr, flush=True)
            found = measured_apart(bench, name, step) if bench.device.type == "cuda" else steps[step]()
        except TimeIsUp:
            return _stopped(name, minutes)
        except Exception as error:  # a step that fails leaves the others
            failed.append(step)
            reason = " ".join(str(error).split())[:500] or type(error).__name__
            print(f"error: {name}: {step}: {reason}", file=sys.stderr)
            continue
        piece.steps[step] = Measured(
            complete=found.complete,
            finished=now(),
            seconds=round(time.monotonic() - started, 3),
            environment=piece.environments.index(here),
            value=found.value,
        )
        piece.done = all(name in piece.steps and piece.steps[name].complete for name in steps)
        write_whole(file, piece.model_dump_json(indent=1).encode())
        if not found.complete and time.monotonic() >= bench.until:
            return _stopped(name, minutes)
    print(f"{name}: {'done' if piece.done else f'not done: {failed}'}: {file}", file=sys.stderr)
    return piece.done


def _stopped(name: str, minutes: float) -> bool:
    print(f"{name}: stopped after {minutes:g} minutes; the same command goes on from there", file=sys.stderr)
    return False


def measured_apart(bench: Bench, piece: str, step: str) -> Measurement:
    """What a step measures in a process of its own: what breaks the device there ends with the process.

    Where the user stops, or the step does not end `GRACE_S` after its time is up, its process is ended. Raises TimeIsUp
    then, InputError where the step fails.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    left_s = bench.until - time.monotonic()
    process = context.Process(target=_measure_here, args=(there, bench, piece, step, left_s))
    process.start()
    there.close()
    try:
        if not here.poll(max(0.0, left_s + GRACE_S)):
            raise TimeIsUp
        answer = here.recv()
        process.join(GRACE_S)
    except EOFError:
        process.join()
        raise InputError(f"its process ended with status {process.exitcode}") from None
    finally:
        _end(process)
        here.close()
    if isinstance(answer, Measurement):
        return answer
    raise TimeIsUp if answer is None else InputError(answer)


def _measure_here(answer: Connection, bench: Bench, piece: str, step: str, left_s: float) -> None:
    """In its own process: sends a step's Measurement, the text of its error, or None where its time is up."""
    if hasattr(os, "setsid"):
        os.setsid()  # the processes that it starts end with it, and Ctrl-C is for the process that waits
    bench = replace(bench, until=time.monotonic() + left_s)
    with answer:
        try:
            answer.send(stages.PIECES[piece](bench)[step]())
        except TimeIsUp:
            answer.send(None)
        except Exception as error:
            answer.send(f"{type(error).__name__}: {error}" if not isinstance(error, InputError) else str(error))


def _end(process: BaseProcess) -> None:
    """Ends a step's process and the processes that it started. Files are whole whenever a process ends."""
    for name, end in (("SIGTERM", process.terminate), ("SIGKILL", process.kill)):
        if process.exitcode is not None:
            return
        if hasattr(os, "killpg") and process.pid is not None:
            with suppress(ProcessLookupError, PermissionError):  # before its setsid there is no such group
                os.killpg(process.pid, getattr(signal, name))
        end()
        process.join(GRACE_S)


def environment(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on: machine, device, driver, versions and commit."""
    versions = {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    found = {
        "device": device_name(device),
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "host_memory_bytes": memory_bytes(),
        "python": platform.python_version(),
        "versions": versions,
        "commit": checkout_commit(),
    }
    if device.type == "cuda":
        found |= {"memory_bytes": torch.cuda.get_device_properties(device).total_memory, "driver": gpu_driver()}
        found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return found


def check_device(device: torch.device, smoke: bool) -> None:
    """Raises InputError for a device on which the measurement would say nothing."""
    if smoke:
        return
    if device.type != "cuda":
        raise InputError(f"--device {device}: a CUDA device is measured; --smoke runs all pieces small on a CPU")
    name = device_name(device)
    if torch.cuda.get_device_capability(device) < (8, 0):
        raise InputError(
            f"{name} has no bfloat16, which the networks train in; a GPU of compute capability 8.0 is needed"
        )
    free, total = torch.cuda.mem_get_info(device)
    if free < LEAST_MEMORY:
        sizes = [f"{size / 2**30:.1f}" for size in (free, total, LEAST_MEMORY)]
        raise InputError(
            f"{name}: {sizes[0]} of {sizes[1]} GiB of memory are free; {sizes[2]} are needed, so end what else runs "
            "there"
        )


def place(out: Path, device: torch.device) -> Path:
    """The newest directory of this device's results, or a new one with the date of today."""
    slug = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    older = sorted(out.glob(f"{slug}-????-??-??"))
    return older[-1] if older else out / f"{slug}-{datetime.now(UTC):%Y-%m-%d}"


def data_name(source: str) -> str:
    """A data source as a table calls it: a folder's is that of the folder."""
    _, _, directory = source.partition(":")
    return Path(directory).expanduser().resolve().name if directory else source


def random_images(directory: Path) -> str:
    """A data source of a few random images of 32x32 pixels, for a smoke run."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 8)):
        for label in "ab":
            for i in range(count):
                file = directory / split / label / f"{i}.png"
                if not file.exists():
                    file.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(rng.integers(256, size=(32, 32, 3), dtype=np.uint8)).save(file)
    return f"folder:{directory}"
