"""The study directory: what was run and what came of it, as files that appear whole or not at all.

study.toml        the study as it was run
plan.json         its cells, with their levels and trial ids, and the data
SHA256SUMS        the checksums of these two, as `sha256sum --check` reads them
trials/ID/        config.json, epochs.jsonl, model.safetensors, predictions.npz, SHA256SUMS and record.json once done:
                  record.json is written last, and says that the trial is finished; until then resume.pt, and
                  failure.json where training failed; adopted.json where another study trained it
export/  bench/   what `expertgrid export` and `bench` add
training.json     the training speed of each cell alone, where `expertgrid bench-train DIR` measured it
accuracy.svg      the picture of its table
ledger.jsonl      a line for each read of the test split, by a training or by an export, with its checksum
.lock             locked by the process that writes; .lock.json says which process that is
damaged/          what `expertgrid check --repair` moved out of the way

A file is on the disk when the function that writes it returns, so that a power cut takes nothing that was finished.
"""

import errno
import hashlib
import io
import json
import os
import platform
import re
import shutil
import struct
import tempfile
import time
import zlib
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar
from zipfile import BadZipFile

import filelock
import numpy as np
import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from expertgrid.ablations.study.cells import CellName
from expertgrid.ablations.study.study import CONTROL_SEEDS, Cell, Level, Study, level_name, read_study
from expertgrid.bench.record import LatencyRecord
from expertgrid.model.system import machine
from expertgrid.model.system.errors import InputError, invalid
from expertgrid.model.system.files import (
    LEFT_BY_A_CRASH,
    append_line,
    disk_full,
    make_folder,
    now,
    sync_folder,
    sync_tree,
    whole_lines,
    write_whole,
)
from expertgrid.model.training.data import ImageData
from expertgrid.model.training.holdout import HoldOut
from expertgrid.model.training.trial import Epoch, Trial

if TYPE_CHECKING:
    import torch


class Environment(BaseModel):
    """The machine, the software and the settings that a number was measured with.

    Records of older versions have no processor, cores, memory, driver and commit.
    """

    device: str  # that trained: the GPU's name, or cpu (the processor's model)
    threads: int  # of PyTorch on the CPU
    python: str
    versions: dict[str, str]
    cpu: str = ""  # the processor's model
    cores: int | None = None  # logical cores that the process could use
    memory_bytes: int | None = None  # physical memory of the machine; None where the system does not say
    driver: str | None = None  # version of the NVIDIA driver, for numbers of a CUDA device
    commit: str | None = (
        None  # of the git checkout that expertgrid ran from, with "+changes" where files differ from it
    )

    @classmethod
    def here(cls, device: "torch.device") -> "Environment":
        """This machine, for numbers that are measured on `device`."""
        import torch

        versions = {}
        for package in ("expertgrid", "torch", "torchvision", "timm"):
            with suppress(PackageNotFoundError):  # expertgrid runs from a checkout too
                versions[package] = version(package)
        return cls(
            device=machine.device_name(device),
            threads=torch.get_num_threads(),
            python=platform.python_version(),
            versions=versions,
            cpu=machine.cpu_name(),
            cores=machine.usable_cores(),
            memory_bytes=machine.memory_bytes(),
            driver=machine.gpu_driver() if device.type == "cuda" else None,
            commit=machine.checkout_commit(),
        )


Share = Annotated[float, Field(ge=0, le=1)]


class Record(BaseModel):
    """The result of a trial: accuracies, losses, cost and speed.

    An accuracy is a share of the split's images, from 0 to 1. A loss is a mean cross entropy in nats. Both are of the
    network after the last epoch, in fp32. Validation images are those that the trial's seed holds out.
    """

    model_config = ConfigDict(extra="forbid")

    trial: str
    seed: int
    validation_accuracy: Share
    validation_loss: float
    validation_images: int
    test_accuracy: Share
    test_loss: float
    test_images: int
    validation_accuracy_flip: Share | None = None  # with logits averaged over each image and its mirror image;
    test_accuracy_flip: Share | None = None  # only where the recipe's tta is "flip"
    parameters: int
    macs: int  # multiply-accumulates of one image's forward pass
    epochs: int
    images_per_s: float  # while training: the median of the epochs after the first
    train_seconds: float  # of all epochs, without validation
    bfloat16: bool  # whether the forward pass of the training ran in bfloat16
    kernels: bool = False  # whether it used the fused Triton kernels,
    compiled: bool = False  # blocks compiled by torch.compile,
    graphs: bool = False  # and steps recorded as CUDA graphs
    deterministic: bool = False  # and whether the same bits come again on a GPU (--deterministic)
    at_once: int = 1  # trials that were trained at once: where it is more, the times are no speeds
    compile_seconds: float = 0.0  # before the first epoch, for kernels and blocks; not part of train_seconds
    environment: Environment
    finished: str  # UTC, ISO 8601

    @property
    def execution(self) -> str:
        """How the steps ran, in words."""
        used = {"Triton kernels": self.kernels, "torch.compile": self.compiled, "CUDA graphs": self.graphs}
        return ", ".join(name for name, is_used in used.items() if is_used) or "eager"


TrialId = Annotated[str, Field(pattern="^[0-9a-f]{12}$")]  # it names a folder, and so cannot be a path


class PlannedCell(BaseModel):
    """A cell in plan.json. Baselines and the control have no levels."""

    model_name: str
    levels: dict[str, Level]
    trials: list[TrialId]  # by seed
    control: bool = False


class Race(BaseModel):
    """What was fixed before the first look at a race, on validation."""

    alpha: float
    margin: float  # in points of accuracy
    first: int  # seeds at the first look; there is one after each further seed
    last: int
    contrasts: int
    seen: int = 0  # trials whose results were there before


class Plan(BaseModel):
    """The file plan.json: the cells of a study for its data. In a race cells have different numbers of seeds."""

    data: str  # in words, with the number of images
    source: str
    image_size: int | None = None  # that the images were brought to
    pixels: tuple[int, int] | None = None  # height and width of the images; None in plans of older versions
    hold_out: HoldOut = HoldOut()
    first_seed: int = 0
    margin: float | None = None  # None in plans of older versions
    contrasts: list[tuple[str, str]] = []  # declared with the study
    cells: list[PlannedCell]
    race: Race | None = None
    seen: list[int] = []  # seeds of which results were there to be seen when the study was made, or got more seeds

    def seeds_of(self, cell: PlannedCell) -> dict[str, int]:
        """The seed of each trial of a cell; of the control, CONTROL_SEEDS more than the seed of its hold-out."""
        first = self.first_seed + (CONTROL_SEEDS if cell.control else 0)
        return {trial: first + place for place, trial in enumerate(cell.trials)}


UNREADABLE_ARRAYS = (  # what NumPy and zipfile raise for damaged files of arrays
    ArithmeticError, AttributeError, BadZipFile, EOFError, LookupError, MemoryError, RuntimeError, SyntaxError,
    TypeError, ValueError, struct.error, zlib.error,
)  # fmt: skip


@dataclass(frozen=True)
class Predictions:
    """The class that a trained network predicted for each image, and the image's own: integers (B,), in split order.

    Tables and reports about single images read these, so that they need not read the test split again. Predictions
    from logits averaged with the mirror image are there where the recipe's tta is "flip".
    """

    validation: np.ndarray
    validation_labels: np.ndarray
    test: np.ndarray
    test_labels: np.ndarray
    validation_flip: np.ndarray | None = None
    test_flip: np.ndarray | None = None

    def to_bytes(self) -> bytes:
        """The file predictions.npz."""
        file = io.BytesIO()
        arrays = {name: array for name, array in vars(self).items() if array is not None}
        kind = np.uint8 if max(int(array.max()) for array in arrays.values()) < 256 else np.uint16
        np.savez_compressed(file, **{name: array.astype(kind) for name, array in arrays.items()})
        return file.getvalue()

    @classmethod
    def of_file(cls, file: Path) -> "Predictions":
        """Raises InputError for a damaged file."""
        try:
            content = io.BytesIO(file.read_bytes())  # so that no wrong offset in it becomes an error of the system
            with np.load(content, allow_pickle=False) as arrays:
                found = cls(**{name: arrays[name].astype(np.int64) for name in arrays.files})
        except UNREADABLE_ARRAYS:
            raise _damaged(file, InputError(f"{file}: not a file of predictions")) from None
        for split in ("validation", "test"):
            arrays = (array for name, array in vars(found).items() if name.startswith(split))
            shapes = {array.shape for array in arrays if array is not None}
            if len(shapes) > 1 or len(next(iter(shapes))) != 1:
                found = InputError(f"{file}: the arrays of {split} have the shapes {sorted(shapes)}")
                raise _damaged(file, found)
        return found


FAILED = {  # the kinds of failures, in words
    "diverged": "diverged",
    "out_of_memory": "out of memory",
    "crashed": "crashed",
    "timeout": "took too long",
    "error": "failed",
}


class Failure(BaseModel):
    """Why a trial failed.

    A diverged trial has the step, counted from 1 over all epochs, the epoch and the learning rate. A trial that ran out
    of memory has the batch size. One whose process crashed, or that took longer than --trial-timeout, has the steps
    that were done and where its process was.
    """

    kind: Literal["diverged", "out_of_memory", "crashed", "timeout", "error"] = "error"
    error: str
    traceback: str
    time: str
    step: int | None = None
    epoch: int | None = None  # from 1
    lr: float | None = None  # of that step
    batch_size: int | None = None

    def __str__(self) -> str:
        return f"{self.kind}: {self.error}"


class TestRead(BaseModel):
    """A line of ledger.jsonl: one read of the test split.

    The line ends in `crc32`: 8 hexadecimal digits, the CRC-32 of the line's JSON without it and without spaces. Lines
    of older versions have none.
    """

    model_config = ConfigDict(extra="forbid")
    __test__ = False  # pytest would take it for a class of tests

    time: str
    trial: str
    reader: str  # "training", "export" or "rerun"
    images: int
    tta: Literal["flip"] | None = None  # "flip": the mirror images were predicted in the same read

    def to_line(self) -> str:
        fields = self.model_dump(mode="json", exclude_none=True)
        return _compact(fields | {"crc32": _crc32(fields)})

    @classmethod
    def of_line(cls, line: bytes, where: str) -> "TestRead":
        """Raises InputError, naming `where`, for a damaged line."""
        try:
            fields = json.loads(line)
            kept = fields.pop("crc32", None)
            if kept is not None and kept != _crc32(fields):
                raise InputError(f"{where}: its checksum is {str(kept)[:8]}, {_crc32(fields)} follows from the line")
            return cls.model_validate(fields)
        except ValidationError as error:
            raise invalid(where, error, cls.model_fields) from None
        except InputError:
            raise
        except (ValueError, TypeError, AttributeError, RecursionError):
            raise InputError(f"{where}: not a line of a ledger") from None


def _compact(fields: dict[str, object]) -> str:
    return json.dumps(fields, separators=(",", ":"), ensure_ascii=False)


def _crc32(fields: dict[str, object]) -> str:
    return f"{zlib.crc32(_compact(fields).encode()):08x}"


class Writer(BaseModel):
    """The file .lock.json: the process that writes a study."""

    host: str
    process: int
    since: str  # UTC, ISO 8601

    @property
    def runs(self) -> bool:
        """Whether the process is there. One on another host is taken to be."""
        if self.host != platform.node():
            return True
        try:
            os.kill(self.process, 0)
        except ProcessLookupError:
            return False
        except (OSError, OverflowError):
            return True
        return True


class Adopted(BaseModel):
    """Beside the record of a trial that was not trained here."""

    directory: str  # the name of the neighbouring study directory that it was taken over from
    time: str


class TrainingRates(BaseModel):
    """The training speed of the cells of a study, alone on the machine and in turns, by a trial of each."""

    device: str
    threads: int
    bfloat16: bool
    torch: str
    others_share: float | None = None  # of the processors' time, taken by other processes meanwhile
    finished: str
    images_per_s: dict[str, float]  # medians over the rounds
    rounds: dict[str, list[float]]

    def __str__(self) -> str:
        busy = f", {self.others_share:.0%} of its processors taken by others" if self.others_share else ""
        number = "bf16" if self.bfloat16 else "fp32"
        return f"{self.device}, {self.threads} threads, {number}, torch {self.torch}{busy}"


def cell_names(plan: Plan) -> list[CellName]:
    """The names of a plan's cells, without those of which no trial is planned."""
    return [
        CellName(
            cell.model_name,
            {name: level_name(level) for name, level in cell.levels.items()},
            cell.trials[0],
            cell.control,
        )
        for cell in plan.cells
        if cell.trials
    ]


def _in_words(value: object) -> str:
    return json.dumps(value) if value else "not given"


def write_sums(place: Path, contents: dict[str, bytes]) -> None:
    """Writes the SHA256SUMS of files by their names, in the format of `sha256sum`."""
    lines = [f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in sorted(contents.items())]
    write_whole(place / SUMS, "".join(lines).encode())


def read_sums(place: Path, names: Sequence[str]) -> dict[str, str] | None:
    """The checksums in a folder's SHA256SUMS by the files' names; None where there is no such file.

    Raises InputError for a damaged file: each of `names` must be in it, and no other.
    """
    file = place / SUMS
    try:
        content = file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    found = re.findall(r"^([0-9a-f]{64})  ([\w.]+)\n", content.decode(errors="replace"), re.MULTILINE)
    whole = "".join(f"{digest}  {name}\n" for digest, name in found).encode() == content
    if not whole or sorted(name for _, name in found) != sorted(names):
        raise _damaged(file, InputError(f"{file}: not the checksums of {', '.join(names)}"))
    return {name: digest for digest, name in found}


def changed_files(place: Path, names: Sequence[str]) -> dict[str, str]:
    """The files of a folder that are not those of its SHA256SUMS: "missing", or "changed".

    Nothing is found where there is no SHA256SUMS, as in folders of older versions. Raises InputError for a damaged one.
    """
    found = {}
    for name, digest in (read_sums(place, names) or {}).items():
        try:
            with (place / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    found[name] = "changed"
        except FileNotFoundError:
            found[name] = "missing"
    return found


Kept = TypeVar("Kept", bound=BaseModel)

LOCK = ".lock"
WRITER = ".lock.json"
ADOPTS = ".adopt."  # the folder of a trial that is being copied begins so
SUMS = "SHA256SUMS"
OF_A_TRIAL = ("config.json", "epochs.jsonl", "model.safetensors", "predictions.npz", "record.json")  # in its SHA256SUMS
OF_A_STUDY = ("study.toml", "plan.json")  # in the study's
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
TRAINING = "training.json"
WRITER_S = 1.0  # for which the next writer waits to learn who has the lock


def _may_be_there(name: str) -> bool:
    """Whether a file may lie in a directory before a study is written there: a process may have been killed before."""
    return name in (LOCK, WRITER) or LEFT_BY_A_CRASH.fullmatch(name) is not None


def _damaged(file: Path, error: InputError) -> InputError:
    """The error for a damaged file of a study directory: what is wrong, and what to do."""
    if file.name == SUMS and file.parent.parent.name != "trials":
        remedy = "run the study again"
    elif file.parent.parent.name == "trials":
        remedy = f"delete {file.parent} and run the study again: this trial is then trained again"
    elif file.name == TRAINING:
        remedy = "delete it and run expertgrid bench-train again"
    elif file.parent.name == "bench":
        remedy = "delete it and run expertgrid bench again"
    elif file.name == "ledger.jsonl":
        remedy = "delete the damaged line"
    else:
        remedy = "delete it and run the study again"
    return InputError(f"{error}; the file is damaged: {remedy}")


def read_record(kind: type[Kept], file: Path) -> Kept | None:
    """The record in a JSON file of a study directory, None where there is no file.

    Raises InputError for a damaged file: which file, what is wrong, and what to do.
    """
    try:
        return kind.model_validate_json(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from None
    except ValidationError as error:
        raise _damaged(file, invalid(str(file), error, kind.model_fields)) from None


class StudyDirectory:
    """Reads and writes one study directory. Writers hold it with `written`, or with `held`."""

    def __init__(self, path: Path):
        self.path = path

    @property
    def study(self) -> Study:
        """The study that was run here. Raises InputError where there is none."""
        file = self.path / "study.toml"
        if not file.is_file():
            raise InputError(f"{self.path}: not a study directory: there is no study.toml in it")
        return read_study(file)

    @property
    def plan(self) -> Plan:
        """The cells of that study. Raises InputError where there are none, or those of another study."""
        return self._plan_of(self.study)

    def _plan_of(self, study: Study) -> Plan:
        file = self.path / "plan.json"
        plan, factors = read_record(Plan, file), list(study.factors)
        if plan is None:
            raise InputError(f"{self.path}: not a study directory: there is no plan.json in it")
        for cell in plan.cells:
            if cell.levels and list(cell.levels) != factors:
                raise InputError(f"{file}: a cell has the factors {list(cell.levels)}, study.toml has {factors}")
        settings = study.settings()
        if [cell.levels for cell in plan.cells[: len(settings)]] != settings:
            raise InputError(f"{file}: its cells are not those of study.toml")
        if plan.margin is not None:
            for field in ("margin", "first_seed", "contrasts"):
                if (planned := getattr(plan, field)) != (now := getattr(study, field)):
                    raise InputError(
                        f"{file}: {field} was {_in_words(planned)} when the study was begun, study.toml has "
                        f"{_in_words(now)}; what is declared cannot be changed afterwards"
                    )
        return plan

    @property
    def race(self) -> Race | None:
        """The race that was begun here, None where there is none, also where plan and study do not fit each other."""
        plan = read_record(Plan, self.path / "plan.json")
        return None if plan is None else plan.race

    def check_holds(self, study: Study) -> None:
        """Raises InputError where `study` cannot be written here: the directory has something else in it."""
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"--out {self.path}: there is a file of this name")
        if (self.path / "study.toml").exists():
            if apart := study.apart_from(self.study):
                raise InputError(
                    f"--out {self.path}: holds another study, or more of this one: {apart}; give another directory "
                    "with --out"
                )
            self._check_families(study)
        elif (self.path / "plan.json").exists():  # study.toml was lost, and is written again
            self._plan_of(study)
        elif self.path.is_dir() and not all(_may_be_there(file.name) for file in self.path.iterdir()):
            if not (self.path / "study.toml").exists():
                raise InputError(f"--out {self.path}: is not empty, and holds no study")
            self.check_holds(study)  # again: since the first look another process has begun a study

    def _check_families(self, study: Study) -> None:
        """Raises InputError for more levels or baselines than there were when the first results came."""
        older = self.study
        if not (self.path / "ledger.jsonl").exists():
            return
        for what, there, here in (
            ("baselines", older.baselines, study.baselines),
            *((f"levels of {name}", older.factors[name], levels) for name, levels in study.factors.items()),
        ):
            if added := [level_name(level) for level in here if level not in there]:
                raise InputError(
                    f"--out {self.path}: has results, and the study now has more {what}: {', '.join(added)}; what is "
                    "compared is declared before the first result. Give another directory with --out: it takes over "
                    "the finished trials"
                )

    @contextmanager
    def written(self, study: Study, data: ImageData, cells: list[Cell], race: Race | None = None) -> Generator[None]:
        """Makes this the directory of `study` and keeps others from writing to it. Raises InputError if it is taken."""
        self.check_holds(study)
        with self.held():
            self.check_holds(study)  # again: another process may have begun a study before the lock was had
            fields = study.model_dump(mode="json", exclude_none=True)
            write_whole(self.path / "study.toml", tomli_w.dumps(fields).encode())
            self.write_plan(study, data, cells, race)
            yield

    @contextmanager
    def held(self) -> Generator[None]:
        """Keeps other writers out. Raises InputError where another process writes, and where no lock can be had.

        The lock is one of the operating system (flock): it ends with its process, however that ends. On NFS, Linux
        makes it a lock of the server, which holds for all machines. The file .lock.json says who has the lock. It is
        read only while the lock is taken, so that one which a killed process left means nothing.
        """
        try:
            make_folder(self.path)
            lock = filelock.FileLock(self.path / LOCK, fallback_to_soft=False)
            lock.acquire(timeout=0)
        except filelock.Timeout:
            raise InputError(f"--out {self.path}: {self._writer()}") from None
        except OSError as error:
            if error.errno in NO_LOCKS:
                raise InputError(
                    f"--out {self.path}: this file system keeps no locks, so that two processes could write to one "
                    "study; give a directory on another file system"
                ) from None
            if disk_full(error):
                raise
            raise InputError(f"--out {self.path}: cannot be written: {error.strerror}") from None
        try:
            writer = Writer(host=platform.node(), process=os.getpid(), since=now())
            write_whole(self.path / WRITER, writer.model_dump_json().encode())
            yield
        finally:
            (self.path / WRITER).unlink(missing_ok=True)
            lock.release()

    def _writer(self) -> str:
        """Who has the lock, in words. Waits a moment for a process that has just taken it, and has not said so yet."""
        deadline, writer = time.monotonic() + WRITER_S, None
        while time.monotonic() < deadline:
            with suppress(InputError):
                writer = read_record(Writer, self.path / WRITER)
            if writer and writer.runs:
                break
            time.sleep(0.02)
        if writer is None:
            return "another process is writing this study"
        return f"process {writer.process} on host {writer.host} is writing this study since {writer.since}"

    def write_plan(self, study: Study, data: ImageData, cells: list[Cell], race: Race | None = None) -> None:
        planned = [
            PlannedCell(
                model_name=cell.model_name,
                levels=cell.levels,
                trials=[trial.id for trial in cell.trials],
                control=cell.control,
            )
            for cell in cells
        ]
        hold_out = data.hold_out(study.base.hold_out)
        plan = Plan(
            data=data.in_words(hold_out),
            source=data.source,
            image_size=study.base.image_size,
            pixels=data.image_size,
            hold_out=hold_out,
            first_seed=study.first_seed,
            margin=study.margin,
            contrasts=study.contrasts,
            cells=planned,
            race=race,
        )
        before = read_record(Plan, self.path / "plan.json")
        if before is None:
            plan.seen = self._seen_beside(plan)
        else:
            had, has = (max((len(cell.trials) for cell in found.cells), default=0) for found in (before, plan))
            here = self._seen([self], before) if race is None and has > had else set()
            plan.seen = sorted({*before.seen, *here})
        write_whole(self.path / "plan.json", plan.model_dump_json(indent=1).encode())
        write_sums(self.path, {name: (self.path / name).read_bytes() for name in OF_A_STUDY})

    def _seen_beside(self, plan: Plan) -> list[int]:
        """The seeds of which a directory beside this one has results.

        Where that directory has this very plan, it is the same study, and only what had been seen before it counts.
        """
        trials = {trial for cell in plan.cells for trial in cell.trials}
        seen: set[int] = set()
        for file in sorted(self.path.resolve().parent.glob("*/plan.json")):
            beside = StudyDirectory(file.parent)
            if beside.path == self.path.resolve():
                continue
            try:
                other = read_record(Plan, file)
            except InputError:
                other = None  # it is damaged, and its trials still count
            same = other is not None and {trial for cell in other.cells for trial in cell.trials} == trials
            seen |= set(other.seen) if same else self._seen([beside], plan)
        return sorted(seen)

    def _seen(self, places: Sequence["StudyDirectory"], plan: Plan) -> set[int]:
        """The seeds of a plan of which a directory has a record."""
        return {
            plan.first_seed + place
            for cell in plan.cells
            for place, trial in enumerate(cell.trials)
            if any((directory.trial(trial) / "record.json").exists() for directory in places)
        }

    def trial(self, trial_id: str) -> Path:
        return self.path / "trials" / trial_id

    def checkpoint(self, trial_id: str) -> Path:
        return self.trial(trial_id) / "model.safetensors"

    def resume_file(self, trial_id: str) -> Path:
        return self.trial(trial_id) / "resume.pt"

    def record(self, trial_id: str) -> Record | None:
        """The record of a finished trial, None for another. Raises InputError for a damaged one."""
        return read_record(Record, self.trial(trial_id) / "record.json")

    def adopted(self, trial_id: str) -> Adopted | None:
        """Where a trial was taken over from, None for one that was trained here. Raises InputError."""
        return read_record(Adopted, self.trial(trial_id) / "adopted.json")

    def hold_out(self, trial_id: str) -> HoldOut | None:
        """The hold-out of a trial, None for one without its config. Raises InputError for a damaged one."""
        file = self.trial(trial_id) / "config.json"
        try:
            return HoldOut.model_validate(json.loads(file.read_bytes()).get("hold_out", {}))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except ValidationError as error:
            raise invalid(str(file), error, HoldOut.model_fields) from None
        except (ValueError, AttributeError, RecursionError):
            raise InputError(f"{file}: damaged: not the config of a trial") from None

    def config(self, trial_id: str) -> Trial | None:
        """What a trial is, None where it was never begun. Raises InputError for a damaged one."""
        return read_record(Trial, self.trial(trial_id) / "config.json")

    def failure(self, trial_id: str) -> Failure | None:
        """Why a trial failed, None where it did not. Raises InputError for a damaged one."""
        return read_record(Failure, self.trial(trial_id) / "failure.json")

    def write_failure(self, trial_id: str, failure: Failure) -> None:
        write_whole(self.trial(trial_id) / "failure.json", failure.model_dump_json(indent=1).encode())

    def adopt(self, trial_id: str) -> str | None:
        """Takes over a finished trial of the same id, and its reads of the test split, from a study beside this one.

        Returns the name of that study's directory, None where no study has the trial undamaged.
        """
        for record in sorted(self.path.parent.glob(f"*/trials/{trial_id}/record.json")):
            beside_this = StudyDirectory(record.parent.parent.parent)
            try:
                from expertgrid.model.checkpoint import load

                if changed_files(record.parent, OF_A_TRIAL):
                    continue
                beside_this.record(trial_id)
                load(beside_this.checkpoint(trial_id))
                beside_this.predictions(trial_id)
                reads = [read for read in beside_this.test_reads() if read.trial == trial_id]
            except InputError:
                continue  # a damaged trial is trained again
            with tempfile.TemporaryDirectory(dir=self.path, prefix=ADOPTS) as beside:
                copy = shutil.copytree(record.parent, Path(beside) / trial_id)
                if not (copy / "adopted.json").exists():
                    taken = Adopted(directory=beside_this.path.name, time=now())
                    write_whole(copy / "adopted.json", taken.model_dump_json().encode())
                sync_tree(copy)
                entered = self.test_reads()  # by an adoption that was interrupted
                for read in reads:
                    if read not in entered:
                        self.enter(read)
                make_folder(self.trial(trial_id).parent)
                shutil.rmtree(self.trial(trial_id), ignore_errors=True)
                copy.rename(self.trial(trial_id))
                sync_folder(self.trial(trial_id).parent)
            return beside_this.path.name
        return None

    def write_config(self, trial: Trial) -> None:
        """Begins a training of the trial here."""
        (self.trial(trial.id) / "adopted.json").unlink(missing_ok=True)
        write_whole(self.trial(trial.id) / "config.json", trial.model_dump_json(indent=1).encode())

    def append_epoch(self, trial_id: str, epoch: Epoch) -> None:
        append_line(self.trial(trial_id) / "epochs.jsonl", epoch.model_dump_json())

    def epochs(self, trial_id: str) -> list[Epoch]:
        """What each epoch gave, without one that is being written. Raises InputError for a damaged file."""
        file = self.trial(trial_id) / "epochs.jsonl"
        try:
            return [Epoch.model_validate_json(line) for line in self._epoch_lines(trial_id)]
        except ValidationError as error:
            raise _damaged(file, invalid(str(file), error, Epoch.model_fields)) from None

    def predictions(self, trial_id: str) -> Predictions | None:
        """None for a trial without them: an unfinished one, or one of an older version. Raises InputError."""
        file = self.trial(trial_id) / "predictions.npz"
        return Predictions.of_file(file) if file.exists() else None

    def write_epochs(self, trial_id: str, lines: list[str]) -> None:
        """Writes the lines of the epochs that a training goes on after."""
        content = "".join(f"{line}\n" for line in lines)
        write_whole(self.trial(trial_id) / "epochs.jsonl", content.encode())

    def _epoch_lines(self, trial_id: str) -> list[bytes]:
        return whole_lines(self.trial(trial_id) / "epochs.jsonl")

    def finish(self, trial_id: str, record: Record, checkpoint: bytes, predictions: Predictions) -> None:
        """Writes what a training gave, and the checksums of the trial's files. The record comes last."""
        place = self.trial(trial_id)
        written = {"model.safetensors": checkpoint, "predictions.npz": predictions.to_bytes()}
        for name, content in written.items():
            write_whole(place / name, content)
        written["record.json"] = record.model_dump_json(indent=1).encode()
        before = {name: (place / name).read_bytes() for name in OF_A_TRIAL if name not in written}
        write_sums(place, before | written)
        write_whole(place / "record.json", written["record.json"])

    def enter_test_read(self, trial_id: str, reader: str, images: int, tta: Literal["flip"] | None = None) -> None:
        """Adds the ledger's line for one read of the test split."""
        self.enter(TestRead(time=now(), trial=trial_id, reader=reader, images=images, tta=tta))

    def enter(self, read: TestRead) -> None:
        """Adds a line to the ledger."""
        append_line(self.path / "ledger.jsonl", read.to_line())

    def test_reads(self) -> list[TestRead]:
        """Each time the test split was read, without one that is being written. Raises InputError for damage."""
        ledger = self.path / "ledger.jsonl"
        try:
            return [
                TestRead.of_line(line, f"{ledger}: line {number}")
                for number, line in enumerate(whole_lines(ledger), start=1)
            ]
        except OSError as error:
            raise InputError(f"{ledger}: cannot be read: {error.strerror}") from None
        except InputError as error:
            raise _damaged(ledger, error) from None

    def training_rates(self) -> TrainingRates | None:
        """None where they were not measured. Raises InputError for damage."""
        return read_record(TrainingRates, self.path / TRAINING)

    def write_training_rates(self, rates: TrainingRates) -> None:
        write_whole(self.path / TRAINING, rates.model_dump_json(indent=1).encode())

    def latencies(self) -> dict[str, LatencyRecord]:
        """The latency record of each trial that was exported as it is, in fp32, and benched.

        The newest of a run of all cells, else of a file by itself.
        """
        found = [read_record(LatencyRecord, file) for file in sorted((self.path / "bench").glob("*.json"))]
        records = [record for record in found if record and record.precision == "fp32" and not record.pruned]
        return {record.trial: record for record in sorted(records, key=LatencyRecord.rank)}
