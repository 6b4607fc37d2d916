"""Options of `pytest bench`: which file, provider and batch sizes are measured."""

from pathlib import Path

import pytest
import torch

from bench.engines import engines
from export.graph import read_onnx
from export.session import ORT_PROVIDERS, check_provider
from export.to_onnx import to_onnx
from model.checkpoint import Checkpoint, Trained
from model.presets import network
from model.registry import build


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("expertgrid")
    group.addoption("--onnx", type=Path, help="ONNX file to measure; without it, an untrained network is exported")
    group.addoption("--preset", default="two_block", help="the network to export where --onnx is not given")
    group.addoption("--provider", default="cpu", choices=list(ORT_PROVIDERS), help="of ONNX Runtime")
    group.addoption("--batch", default="1,8,64", help="batch sizes, separated by commas")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "batch" in metafunc.fixturenames:
        metafunc.parametrize("batch", [int(size) for size in metafunc.config.getoption("batch").split(",")])


@pytest.fixture(scope="session")
def onnx_model(pytestconfig: pytest.Config) -> bytes:
    """The content of the ONNX file under measurement."""
    check_provider(pytestconfig.getoption("provider"))
    if path := pytestconfig.getoption("onnx"):
        return read_onnx(path)
    name = pytestconfig.getoption("preset")
    config = network(name)
    torch.manual_seed(0)
    classes = tuple(str(i) for i in range(config.num_classes))
    half = (0.5,) * config.in_chans
    trained = Trained(
        trial="untrained",
        model=name,
        data="none",
        fingerprint="0123abcd",
        classes=classes,
        image_size=(32, 32),
        mean=half,
        std=half,
    )
    return to_onnx(Checkpoint(config, trained, build(config).state_dict()), "uint8")


@pytest.fixture(scope="session")
def runs(onnx_model: bytes, pytestconfig: pytest.Config) -> dict:
    """The engines that can run it, opened, by name."""
    openers, _ = engines(onnx_model, "the model", pytestconfig.getoption("provider"))
    return {name: opener() for name, opener in openers.items()}
