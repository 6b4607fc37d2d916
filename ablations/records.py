"""The study directory: what was run and what came of it, as files that appear whole or not at all.

study.toml        the study as it was run
plan.json         its cells, with their levels and trial ids, and the data
trials/ID/        config.json, epochs.jsonl, record.json, predictions.npz and model.safetensors once done; until then
                  resume.pt, and failure.json where training failed; adopted.json where another study trained it
export/  bench/   what `expertgrid export` and `bench` add
accuracy.svg      the picture of its table
ledger.jsonl      a line for each read of the test split, by a training or by an export
"""

import io
import json
import platform
import shutil
import tempfile
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

from ablations.cells import CellName
from ablations.study import CONTROL_SEEDS, Cell, Level, Study, level_name, read_study
from ablations.training.data import ImageData
from ablations.training.holdout import HoldOut
from ablations.training.trial import Epoch, Trial
from model import machine
from model.errors import InputError, invalid
from model.files import now, write_whole

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
    compile_seconds: float = 0.0  # before the first epoch, for kernels and blocks; not part of train_seconds
    environment: Environment
    finished: str  # UTC, ISO 8601

    @property
    def execution(self) -> str:
        """How the steps ran, in words."""
        used = {"Triton kernels": self.kernels, "torch.compile": self.compiled, "CUDA graphs": self.graphs}
        return ", ".join(name for name, is_used in used.items() if is_used) or "eager"


class PlannedCell(BaseModel):
    """A cell in plan.json. Baselines and the control have no levels."""

    model_name: str
    levels: dict[str, Level]
    trials: list[str]  # ids, by seed
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
            with np.load(file, allow_pickle=False) as arrays:
                found = cls(**{name: arrays[name].astype(np.int64) for name in arrays.files})
        except (ValueError, EOFError, TypeError, KeyError, AttributeError, BadZipFile, zlib.error):
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
    """A line of ledger.jsonl: one read of the test split."""

    __test__ = False  # pytest would take it for a class of tests

    time: str
    trial: str
    reader: str  # "training", "export" or "rerun"
    images: int
    tta: Literal["flip"] | None = None  # "flip": the mirror images were predicted in the same read


class Adopted(BaseModel):
    """Beside the record of a trial that was not trained here."""

    directory: str  # the name of the neighbouring study directory that it was taken over from
    time: str


class Benched(BaseModel):
    """The latency of one engine at one batch size: the part that tables need."""

    engine: str
    batch: int
    p50_ms: float


class LatencySummary(BaseModel):
    """The latency record of an exported trial: the part that tables need."""

    file: str
    trial: str
    precision: str = "fp32"
    pruned: bool = False
    provider: str
    threads: int
    finished: str
    latencies: Annotated[list[Benched], Field(min_length=1)]


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


Kept = TypeVar("Kept", bound=BaseModel)

LOCK = ".lock"


def _damaged(file: Path, error: InputError) -> InputError:
    """The error for a damaged file of a study directory: what is wrong, and what to do."""
    if file.parent.parent.name == "trials":
        remedy = f"delete {file.parent} and run the study again: this trial is then trained again"
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
    """Reads and writes one study directory. Writers hold it with `written`."""

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
        file = self.path / "plan.json"
        plan, factors = read_record(Plan, file), list(self.study.factors)
        if plan is None:
            raise InputError(f"{self.path}: not a study directory: there is no plan.json in it")
        for cell in plan.cells:
            if cell.levels and list(cell.levels) != factors:
                raise InputError(f"{file}: a cell has the factors {list(cell.levels)}, study.toml has {factors}")
        study = self.study
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
        elif self.path.is_dir() and any(file.name != LOCK for file in self.path.iterdir()):
            raise InputError(f"--out {self.path}: is not empty, and holds no study")

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
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(self.path / LOCK)
            lock.acquire(timeout=0)
        except filelock.Timeout:
            raise InputError(f"--out {self.path}: another process is writing this study") from None
        except OSError as error:
            raise InputError(f"--out {self.path}: cannot be written: {error.strerror}") from None
        with lock:
            fields = study.model_dump(mode="json", exclude_none=True)
            write_whole(self.path / "study.toml", tomli_w.dumps(fields).encode())
            self.write_plan(study, data, cells, race)
            yield

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
        except (ValueError, AttributeError):
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
                from model.checkpoint import load

                beside_this.record(trial_id)
                load(beside_this.checkpoint(trial_id))
                beside_this.predictions(trial_id)
                reads = [read for read in beside_this.test_reads() if read.trial == trial_id]
            except InputError:
                continue  # a damaged trial is trained again
            with tempfile.TemporaryDirectory(dir=self.path, prefix=".adopt.") as beside:
                copy = shutil.copytree(record.parent, Path(beside) / trial_id)
                if not (copy / "adopted.json").exists():
                    taken = Adopted(directory=beside_this.path.name, time=now())
                    write_whole(copy / "adopted.json", taken.model_dump_json().encode())
                shutil.rmtree(self.trial(trial_id), ignore_errors=True)
                self.trial(trial_id).parent.mkdir(exist_ok=True)
                copy.rename(self.trial(trial_id))
            for read in reads:
                self._enter(read)
            return beside_this.path.name
        return None

    def write_config(self, trial: Trial) -> None:
        """Begins a training of the trial here."""
        (self.trial(trial.id) / "adopted.json").unlink(missing_ok=True)
        write_whole(self.trial(trial.id) / "config.json", trial.model_dump_json(indent=1).encode())

    def append_epoch(self, trial_id: str, epoch: Epoch) -> None:
        with (self.trial(trial_id) / "epochs.jsonl").open("a") as file:
            file.write(epoch.model_dump_json() + "\n")

    def epochs(self, trial_id: str) -> list[Epoch]:
        """What each epoch gave. Raises InputError for a damaged file."""
        file = self.trial(trial_id) / "epochs.jsonl"
        try:
            return [Epoch.model_validate_json(line) for line in self._epoch_lines(trial_id)]
        except ValidationError as error:
            raise _damaged(file, invalid(str(file), error, Epoch.model_fields)) from None
        except UnicodeDecodeError as error:
            raise _damaged(file, InputError(f"{file}: not text: {error.reason}")) from None

    def predictions(self, trial_id: str) -> Predictions | None:
        """None for a trial without them: an unfinished one, or one of an older version. Raises InputError."""
        file = self.trial(trial_id) / "predictions.npz"
        return Predictions.of_file(file) if file.exists() else None

    def write_epochs(self, trial_id: str, lines: list[str]) -> None:
        """Writes the lines of the epochs that a training goes on after."""
        content = "".join(f"{line}\n" for line in lines)
        write_whole(self.trial(trial_id) / "epochs.jsonl", content.encode())

    def _epoch_lines(self, trial_id: str) -> list[str]:
        file = self.trial(trial_id) / "epochs.jsonl"
        return file.read_text().splitlines() if file.exists() else []

    def enter_test_read(self, trial_id: str, reader: str, images: int, tta: Literal["flip"] | None = None) -> None:
        """Adds the ledger's line for one read of the test split."""
        self._enter(TestRead(time=now(), trial=trial_id, reader=reader, images=images, tta=tta))

    def _enter(self, read: TestRead) -> None:
        with (self.path / "ledger.jsonl").open("a") as ledger:
            ledger.write(read.model_dump_json(exclude_none=True) + "\n")

    def test_reads(self) -> list[TestRead]:
        """Each time the test split was read. Raises InputError for a damaged ledger."""
        ledger = self.path / "ledger.jsonl"
        try:
            return [TestRead.model_validate_json(line) for line in ledger.read_bytes().splitlines()]
        except FileNotFoundError:
            return []
        except ValidationError as error:
            raise _damaged(ledger, invalid(str(ledger), error, TestRead.model_fields)) from None

    def latencies(self) -> dict[str, LatencySummary]:
        """The newest latency record of each trial that was exported as it is, in fp32, and benched."""
        found = [read_record(LatencySummary, file) for file in sorted((self.path / "bench").glob("*.json"))]
        records = [record for record in found if record and record.precision == "fp32" and not record.pruned]
        return {record.trial: record for record in sorted(records, key=lambda record: record.finished)}
