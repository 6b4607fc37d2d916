"""Fixtures: data, a study of seconds, and the command line as a user calls it."""

import faulthandler
import json
import os
import shutil
import signal
import sys
import tempfile

os.environ["EXPERTGRID_CACHE"] = tempfile.mkdtemp(prefix="expertgrid-tests-")  # removed at the end

if "PYTEST_XDIST_WORKER" in os.environ:  # each core has a worker of its own
    os.environ["OMP_NUM_THREADS"] = "1"

os.environ["EXPERTGRID_ISOLATE"] = "0"  # trials are trained in the tests' own process, but for the tests of isolation

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels then run on the CPU; to be set before Triton is imported

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from expertgrid.ablations.cli import entry as cli
from expertgrid.ablations.records.directory import StudyDirectory
from expertgrid.ablations.records.predictions import Predictions
from expertgrid.ablations.records.record import Environment, Failure, Record
from expertgrid.ablations.speed import sampling
from expertgrid.ablations.study.study_file import parse_study
from expertgrid.bench import timing
from expertgrid.bench.record import Latency, LatencyRecord
from expertgrid.model.checkpoint import Checkpoint, Trained
from expertgrid.model.registry import build
from expertgrid.model.system.files import write_whole
from expertgrid.model.training.data import ImageData, load_data
from expertgrid.model.training.holdout import HoldOut
from expertgrid.model.training.splits import ResidentData, Splits
from expertgrid.model.training.trial import Epoch

REPOSITORY = Path(__file__).parent.parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CIFAR10_JPEG = REPOSITORY.parent / "shared" / "data" / "cifar10-jpeg"

TINY_STUDY = """
question = "Two experts or one?"
seeds = 2
[base]
model = "two_block"
recipe = "fast"
data = "digits"
[set]
width = 0.0625
"recipe.epochs" = 2
[factors]
experts = [1, 2]
gate = ["linear", "mlp"]
"""


@dataclass
class Outcome:
    """What a command left: its exit status, what it printed, and the lines of complaint among it."""

    status: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """The one line that says what is wrong."""
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.err
        assert "Traceback" not in self.err
        return lines[0]


@pytest.hookimpl(trylast=True)
def pytest_configure(config):
    """Commands that tests start take Ctrl-C, and a worker of xdist that crashes says where.

    It says so in a file, which .ci/run prints: what it writes on stderr is lost.
    """
    config.add_cleanup(partial(shutil.rmtree, os.environ["EXPERTGRID_CACHE"], ignore_errors=True))
    # Processes that a shell starts in the background ignore it, and so would the commands that tests start.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if worker := os.environ.get("PYTEST_XDIST_WORKER"):
        place = config.rootpath / ".pytest_cache"
        place.mkdir(exist_ok=True)
        faulthandler.enable((place / f"crash-{worker}.txt").open("w"))


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="there is no CUDA device"))


@pytest.fixture(autouse=True)
def brief_timing(monkeypatch):
    """Tests read no speeds, so they do not wait until speeds are steady and threads at rest."""
    monkeypatch.setattr(sampling, "LIMIT_S", 0.0)
    brief = {"LONGEST_WARM_UP_S": 0.05, "LONGEST_REST_S": 0.0, "OPENINGS": 7, "BLOCK_S": 0.002, "CHUNK_S": 0.002}
    for name, value in brief.items():
        monkeypatch.setattr(timing, name, value)


@pytest.fixture
def expertgrid(monkeypatch, capsys):
    """Runs the command line in this process."""

    def call(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["expertgrid", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        captured = capsys.readouterr()
        return Outcome(int(exit.value.code or 0), captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def digits() -> ImageData:
    return load_data("digits")


@pytest.fixture(scope="session")
def resident_digits(digits) -> ResidentData:
    """The digits on the CPU, as engines take them."""
    return ResidentData(digits, torch.device("cpu"))


@pytest.fixture(scope="session")
def digits_splits(resident_digits) -> Splits:
    """What seed 0 trains on, holds out and is tested on."""
    return resident_digits.splits(HoldOut(), seed=0)


@pytest.fixture
def tiny_study(tmp_path, monkeypatch) -> Path:
    """A study file in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.toml"
    path.write_text(TINY_STUDY)
    return path


@pytest.fixture(scope="session")
def trained_study(tmp_path_factory) -> Iterator[Path]:
    """The directory of the tiny study, trained by the command line, once for all workers of pytest-xdist.

    Tests must leave it as it is, because all of them read the same files. At the end of the session that is checked.
    """
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # then each worker has a folder of its own in the base folder
        shared = shared.parent
    study = shared / "trained" / "runs" / "tiny"
    with FileLock(shared / "trained.lock"):
        if not (shared / "trained" / "done").exists():
            _train_tiny_study(shared / "trained")
    before = snapshot(study)
    yield study
    assert snapshot(study) == before, "a test changed the trained study, which all tests share"


def _train_tiny_study(place: Path) -> None:
    """Trains the tiny study in the folder `place`, and leaves a file called `done` there once it is whole."""
    place.mkdir(exist_ok=True)
    (place / "tiny.toml").write_text(TINY_STUDY)
    before, argv = Path.cwd(), sys.argv
    os.chdir(place)
    sys.argv = ["expertgrid", "run", "tiny.toml", "--device", "cpu"]
    try:
        with pytest.raises(SystemExit) as exit:
            cli.main()
    finally:
        os.chdir(before)
        sys.argv = argv
    assert not exit.value.code
    (place / "done").touch()


@pytest.fixture(scope="session")
def finished(tmp_path_factory, digits) -> Path:
    return finished_study(tmp_path_factory.mktemp("finished") / "tiny", digits).path


@pytest.fixture
def study(finished, tmp_path) -> StudyDirectory:
    """A finished study whose files a test may change."""
    return StudyDirectory(shutil.copytree(finished, tmp_path / "runs" / "tiny"))


@pytest.fixture
def trial(study) -> str:
    """The id of one of its trials."""
    return study.read_plan().cells[-1].trials[1]


@pytest.fixture(scope="session")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: uv sync --group dev")
    with sync_api.sync_playwright() as playwright:
        own = Path(playwright.chromium.executable_path)
        executable = next(filter(None, map(shutil.which, BROWSERS)), str(own) if own.exists() else None)
        if executable is None:
            pytest.skip("no Chromium on this machine: apt-get install chromium, or playwright install chromium")
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
        chromium = playwright.chromium.launch(executable_path=executable, args=flags)
        yield chromium
        chromium.close()


def write_study(
    place: Path, text: str, data: ImageData, accuracies: Callable[[dict, int], tuple[float, float] | str | None]
) -> StudyDirectory:
    """A study's directory without any training: `accuracies` gives validation and test accuracy in percent.

    By the levels of a cell and the seed; the kind of a failure for a trial that failed, None for one that is missing.
    """
    study = parse_study(text, place.with_suffix(".toml"))
    directory, cells = StudyDirectory(place), study.cells(data)
    with directory.written(study, data, cells):
        for cell in cells:
            for trial in cell.trials:
                result = accuracies(cell.levels, trial.seed)
                if isinstance(result, str):
                    failure = Failure(kind=result, error="the loss is nan", traceback="", time="")
                    directory.write_failure(trial.id, failure)
                elif result is not None:
                    write_whole(directory.trial(trial.id) / "record.json", written_record(trial, *result).encode())
                    directory.write_config(trial)
    return directory


def finished_study(place: Path, data: ImageData) -> StudyDirectory:
    """The tiny study, as if it had been trained: every file is there and whole, and the numbers mean nothing."""
    study = parse_study(TINY_STUDY, place.with_suffix(".toml"))
    directory, cells = StudyDirectory(place), study.cells(data)
    with directory.written(study, data, cells):
        for trial in {trial.id: trial for cell in cells for trial in cell.trials}.values():
            directory.write_config(trial)
            written_epochs(directory, trial.id, [40.0, 50.0])
            directory.enter_test_read(trial.id, "training", len(data.test))
            trained = Trained(
                trial=trial.id, model=trial.model_name, data=data.name, fingerprint=data.fingerprint,
                classes=data.classes, image_size=data.image_size, mean=data.mean, std=data.std,
            )  # fmt: skip
            checkpoint = Checkpoint(trial.model, trained, build(trial.model).state_dict()).to_bytes()
            predictions = Predictions(*(np.arange(360) % 10,) * 4)
            record = Record.model_validate_json(written_record(trial, 50.0, 50.0))
            directory.finish(trial.id, record, checkpoint, predictions)
    return directory


def written_record(trial, validation: float, test: float, parameters: int = 1, macs: int = 1, epochs: int = 2) -> str:
    record = Record(
        trial=trial.id, seed=trial.seed, epochs=epochs, parameters=parameters, macs=macs, images_per_s=1.0,
        train_seconds=1.0, validation_accuracy=validation / 100, validation_loss=1.0, validation_images=10**9,
        test_accuracy=test / 100, test_loss=1.0, test_images=10**9, bfloat16=False,
        finished="2026-01-01T00:00:00+00:00",
        environment=Environment(device="cpu", threads=1, python="", versions={"torch": "2"}),
    )  # fmt: skip
    return record.model_dump_json()


def change_json(file: Path, **fields: object) -> None:
    """Gives these fields of a JSON file other values."""
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def written_epochs(directory: StudyDirectory, trial: str, accuracies: list[float]) -> None:
    """Adds a trial's curve of validation accuracies in percent."""
    lines = [
        Epoch(
            epoch=number, lr=0.1, train_loss=1.0, train_accuracy=0.5, validation_loss=1.0,
            validation_accuracy=accuracy / 100, images_per_s=1.0, train_seconds=0.5, validation_seconds=0.1,
        ).model_dump_json()
        for number, accuracy in enumerate(accuracies, 1)
    ]  # fmt: skip
    with (directory.trial(trial) / "epochs.jsonl").open("a") as file:
        file.write("\n".join([*lines, ""]))


def write_latency(
    study: Path, trial: str, p50_ms: float, finished: str = "2026-01-01", cells: int = 1,
    interval_ms: tuple[float, float] | None = None, precision: str = "fp32", pruned: bool = False,
) -> None:  # fmt: skip
    """Writes a latency record of a trial's file, which calls of so many milliseconds give."""
    times = timing.Times([timing.Block(opening, [p50_ms]) for opening in range(6)])
    latency = Latency.of("onnxruntime cpu", "onnxruntime", 1, times)
    if interval_ms:
        latency.intervals_ms = {"p50": interval_ms}
    record = LatencyRecord(
        file=f"{trial}.onnx", sha256="", trial=trial, model="", precision=precision, pruned=pruned, provider="cpu",
        device="cpu", threads=2, versions={}, finished=finished, cells=cells, latencies=[latency],
    )  # fmt: skip
    write_whole(study / "bench" / f"{trial}-{finished}.json", record.model_dump_json().encode())


def snapshot(place: Path) -> dict[str, bytes]:
    """All files below a directory, with their content."""
    return {str(path.relative_to(place)): path.read_bytes() for path in sorted(place.rglob("*")) if path.is_file()}
