"""Measures the steps in the order of their worth, and keeps what was measured after each of them."""

import platform
import re
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bench.gpu import check, stages
from bench.gpu.pieces import Measured, Piece, bring_back, keep, read_piece, write_piece
from bench.gpu.plan import SMOKE, Bench, Measurement, Size, Step
from bench.gpu.stages import MINUTES, PIECES
from bench.gpu.worker import GRACE_S, TimeIsUp, Worker
from model.errors import InputError, reason_of, unknown
from model.files import now
from model.machine import checkout_commit, cpu_name, device_name, gpu_driver, memory_bytes, torch_device, usable_cores

RESULTS = Path(__file__).parent.parent / "results"
PACKAGES = ("expertgrid", "torch", "torchvision", "timm", "triton", "onnxruntime", "onnxruntime-gpu")
LEAST_MEMORY = 16 * 2**30  # of the GPU, free
LONGEST_MINUTES = 24 * 60


@dataclass(frozen=True)
class Asked:
    """What the command line asks."""

    pieces: str | None  # separated by commas; None for all
    data: str | None
    device: str | None
    out: Path
    kept: Path | None  # the file with all results
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
    if asked.kept:
        bring_back(asked.kept, asked.out)
    where = place(asked.out, device)
    data = asked.data or (random_images(asked.out / "images") if asked.smoke else "cifar10")
    bench = Bench(where, device, data, asked.smoke, SMOKE if asked.smoke else Size())
    steps = [step for step in stages.steps(bench) if step.piece in names]
    if asked.again:
        for name in names:
            (where / f"{name}.json").unlink(missing_ok=True)
        for trainings in {step.trainings.name for step in steps if step.trainings}:
            shutil.rmtree(bench.work / trainings, ignore_errors=True)
    kept, out = asked.kept, asked.out
    run = Run(bench, steps, asked.command, environment(device), lambda: keep(out, kept) if kept else None)
    if device.type != "cuda":  # which a step can break for its process
        return run.go_on(asked.minutes, measured_here)
    worker = Worker(stages.measure)
    try:
        return run.go_on(asked.minutes, worker.measure)
    finally:
        worker.end()


def measured_here(bench: Bench, step: Step, seconds: float) -> Measurement:
    """What a step measures, in this process: where it does not stop by itself, it takes longer than that."""
    return step.measure(replace(bench, until=time.monotonic() + seconds))


@dataclass
class Run:
    """The steps of a bench, and the files of their pieces."""

    bench: Bench
    steps: Sequence[Step]
    command: str
    here: dict[str, Any]  # the environment
    keep: Callable[[], object] = lambda: None  # called after each measurement
    clock: Callable[[], float] = time.monotonic
    left_out: Callable[[Piece | None, torch.device], dict[str, str]] = check.left_out
    pieces: dict[str, Piece] = field(init=False)

    def __post_init__(self) -> None:
        self.pieces = {name: self._piece(name) for name in dict.fromkeys(step.piece for step in self.steps)}

    def file(self, piece: str) -> Path:
        return self.bench.place / f"{piece}.json"

    def _piece(self, name: str) -> Piece:
        """A piece as its file has it, or a new one. Raises InputError for one that was measured on other data."""
        bench, piece = self.bench, read_piece(self.file(name))
        if piece and (piece.data, piece.smoke) != (data_name(bench.data), bench.smoke):
            raise InputError(
                f"{self.file(name)}: was measured on {piece.data}; give --data as then, --again, or another --out"
            )
        return piece or Piece(piece=name, smoke=bench.smoke, data=data_name(bench.data), command=self.command)

    def go_on(self, minutes: float, measure: Callable[[Bench, Step, float], Measurement]) -> int:
        """Measures what is not done yet, for so many minutes; 0 where all is done then, else 1.

        First each piece has its `MINUTES`, and no step is tried that failed before. In the time that is left, what is
        not done goes on.
        """
        self.until = self.clock() + 60 * minutes - min(GRACE_S, 6 * minutes)
        self.tried: set[str] = set()
        used = dict.fromkeys(self.pieces, 0.0)
        said = "check" not in self.pieces
        for first in (True, False):
            for step in self.steps:
                if first and step.name in self.pieces[step.piece].failed:
                    continue
                if not said and step.piece != "check":
                    print(
                        *check.report(self.pieces["check"], self.bench.without), sep="\n", file=sys.stderr, flush=True
                    )
                    said = True
                most_s = 60 * MINUTES.get(step.piece, minutes) if first else float("inf")
                used[step.piece] += self._measure(step, most_s - used[step.piece], measure)
        return self._outcome()

    def _is_done(self, step: Step) -> bool:
        measured = self.pieces[step.piece].steps.get(step.name)
        return measured is not None and measured.complete

    def _measure(self, step: Step, most_s: float, measure: Callable[[Bench, Step, float], Measurement]) -> float:
        """Measures a step until it is done, fails, or is no more begun after `most_s` seconds; the seconds taken."""
        piece, begun = self.pieces[step.piece], self.clock()
        checked = self.pieces.get("check") or read_piece(self.file("check"))
        self.bench.without = self.left_out(checked, self.bench.device)
        lacking = [f"{name}: {self.bench.without[name]}" for name in step.needs if name in self.bench.without]
        if lacking and step.name not in piece.failed:
            if not self._is_done(step) and piece.left_out.get(step.name) != lacking[0]:
                piece.left_out[step.name] = lacking[0]
                print(f"{step.title}: left out: {lacking[0]}", file=sys.stderr, flush=True)
                self._write(step.piece)
            return 0.0
        piece.left_out.pop(step.name, None)
        while not self._is_done(step) and step.title not in self.tried:
            left_s = self.until - self.clock()
            if left_s <= 0 or self.clock() - begun >= most_s:
                break
            self._measure_once(step, min(step.limit_s, left_s), measure)
        return self.clock() - begun

    def _measure_once(self, step: Step, seconds: float, measure: Callable[[Bench, Step, float], Measurement]) -> None:
        piece, started = self.pieces[step.piece], self.clock()
        print(step.title, file=sys.stderr, flush=True)
        try:
            found = measure(self.bench, step, seconds)
        except TimeIsUp:
            if seconds < step.limit_s:
                return  # the time of this call is up, and the next one begins the step anew
            reason = f"did not end in {step.limit_s:g} s"
        except InputError as error:
            reason = str(error)
        except Exception as error:  # a step that fails leaves the others
            reason = reason_of(error)
        else:
            piece.failed.pop(step.name, None)
            piece.steps[step.name] = Measured(
                complete=found.complete,
                finished=now(),
                seconds=round(self.clock() - started, 3),
                environment=self._environment(piece),
                value=found.value,
            )
            self._write(step.piece)
            return
        self.tried.add(step.title)
        piece.failed[step.name] = " ".join(reason.split())[:500]
        print(f"error: {step.title}: {piece.failed[step.name]}", file=sys.stderr, flush=True)
        self._write(step.piece)

    def _environment(self, piece: Piece) -> int:
        """The number of this machine and its packages in a piece."""
        if self.here not in piece.environments:
            piece.environments.append(self.here)
        return piece.environments.index(self.here)

    def _write(self, name: str) -> None:
        piece = self.pieces[name]
        piece.done = not self.missing(name)
        write_piece(self.file(name), piece)
        self.keep()

    def missing(self, name: str) -> list[str]:
        """The steps of a piece that are neither done nor left out."""
        return [
            step.name
            for step in self.steps
            if step.piece == name and not self._is_done(step) and step.name not in self.pieces[name].left_out
        ]

    def _outcome(self) -> int:
        """Says what is done; 0 where that is all, else 1."""
        missing = {name: self.missing(name) for name in self.pieces}
        for name, steps in missing.items():
            state = f"not done: {', '.join(steps)}; the same command goes on from there" if steps else "done"
            print(f"{name}: {state}", file=sys.stderr)
        return 1 if any(missing.values()) else 0


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
