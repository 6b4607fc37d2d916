"""Options of `pytest tests/benchmarks`: which files, provider and batch sizes are measured."""

import os
from functools import cache
from pathlib import Path

import pytest

from expertgrid.bench.engines import Engine, engines
from expertgrid.export.describe import read_onnx
from expertgrid.export.metadata import Metadata
from expertgrid.export.session import ORT_PROVIDERS, check_provider
from expertgrid.export.to_onnx import to_onnx
from expertgrid.model.checkpoint import Checkpoint, Trained
from expertgrid.model.presets import network
from expertgrid.model.registry import build
from expertgrid.model.system.errors import InputError

STUDY = "EXPERTGRID_STUDY"  # the environment variable that names a study directory


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("expertgrid")
    group.addoption("--onnx", type=Path, help="ONNX file to measure; without it, an untrained network is exported")
    group.addoption("--study", type=Path, help=f"study directory: all files that it published; or {STUDY}")
    group.addoption("--preset", default="two_block", help="the network to export where no file is given")
    group.addoption("--provider", default="cpu", choices=list(ORT_PROVIDERS), help="of ONNX Runtime")
    group.addoption("--batch", default="1,8,64", help="batch sizes, separated by commas")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "batch" in metafunc.fixturenames:
        metafunc.parametrize("batch", [int(size) for size in metafunc.config.getoption("batch").split(",")])
    if "file" in metafunc.fixturenames:
        files = _files(metafunc.config)
        metafunc.parametrize("file", files, ids=[file.stem if file else "untrained" for file in files])


def _files(config: pytest.Config) -> list[Path | None]:
    """None stands for an untrained network. Raises UsageError for a directory without a published file."""
    onnx, study = config.getoption("onnx"), config.getoption("study")
    if onnx and study:
        raise pytest.UsageError("--onnx and --study: give one of them")
    study = study or os.environ.get(STUDY)
    if onnx or not study:
        return [onnx]
    files = [file for file in sorted(Path(study, "export").glob("*.onnx")) if not file.stem.endswith(".rejected")]
    if not files:
        raise pytest.UsageError(f"{study}: no published file in its export folder: `expertgrid export {study}` first")
    return list(files)


@pytest.fixture
def onnx_model(file: Path | None, pytestconfig: pytest.Config) -> bytes:
    """The content of the ONNX file under measurement."""
    return _read(file, pytestconfig.getoption("preset"))


@pytest.fixture
def opened(file: Path | None, pytestconfig: pytest.Config) -> tuple[dict[str, Engine], Metadata | None]:
    """The engines that can run the file, by name, and what it says of itself."""
    return _engines(file, pytestconfig.getoption("preset"), pytestconfig.getoption("provider"))


@cache
def _engines(file: Path | None, preset: str, provider: str) -> tuple[dict[str, Engine], Metadata | None]:
    try:
        check_provider(provider)
        return engines(_read(file, preset), str(file or preset), provider)
    except InputError as error:
        raise pytest.UsageError(str(error)) from None


@cache
def _read(file: Path | None, preset: str) -> bytes:
    if file:
        return read_onnx(file)
    config = network(preset)
    classes, half = tuple(map(str, range(config.num_classes))), (0.5,) * config.in_chans
    trained = Trained(
        trial="untrained", model=preset, data="none", fingerprint="", classes=classes, image_size=(32, 32),
        mean=half, std=half,
    )  # fmt: skip
    return to_onnx(Checkpoint(config, trained, build(config).state_dict()), "uint8")
