"""What runs a network: all compute the same, and what is missing is an error."""

import sys

import numpy as np
import openvino
import pytest
import torch
from small import TRAINED, two_block
from torch._dynamo.utils import counters

from expertgrid.bench.engines import ENGINES, USUAL, _compiled_net, engines
from expertgrid.bench.latency import random_images
from expertgrid.model.system.errors import InputError


@pytest.fixture(scope="module")
def model() -> bytes:
    return two_block()


def test_engines_run_the_same_network(model):
    """PyTorch's weights are fresh, so only shapes and input handling can be compared."""
    openers, metadata = engines(model, "model", "cpu", ENGINES)  # its own is ONNX Runtime, once
    images = random_images(model, 5)
    assert (images.shape, images.dtype) == ((5, 8, 8, 3), np.uint8)
    assert list(openers) == [
        "onnxruntime cpu", "pytorch eager cpu", "pytorch eager bf16 cpu", "pytorch compiled cpu",
        "pytorch compiled bf16 cpu", "openvino cpu", "openvino-bf16 cpu",
    ]  # fmt: skip
    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        with pytest.raises(InputError, match="this processor does not compute in bfloat16"):
            openers.pop("openvino-bf16 cpu")()
    logits_BN = {name: opener()(images) for name, opener in openers.items()}
    assert {found.shape for found in logits_BN.values()} == {(5, 10)}
    np.testing.assert_allclose(logits_BN["openvino cpu"], logits_BN["onnxruntime cpu"], atol=1e-4)
    if "openvino-bf16 cpu" in logits_BN:
        np.testing.assert_allclose(logits_BN["openvino-bf16 cpu"], logits_BN["onnxruntime cpu"], atol=0.1)
    assert metadata.trained == TRAINED
    assert len(engines(model, "model", "cpu")[0]) == len(USUAL)
    with pytest.raises(InputError, match="unknown engine 'openvno'; did you mean 'openvino'"):
        engines(model, "model", "cpu", ["openvno"])


def test_each_batch_size_is_compiled(model, monkeypatch):
    """PyTorch would run what passes its limit eagerly, and a log alone would say so."""
    _compiled_net.cache_clear()
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 1)
    run = engines(model, "model", "cpu", ["compiled"])[0]["pytorch compiled cpu"]()
    before = counters["stats"]["unique_graphs"]
    for batch in (1, 2, 3):
        run(random_images(model, batch))
    assert counters["stats"]["unique_graphs"] == before + 3


def test_an_engine_that_is_not_here_is_an_error(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(InputError, match="provider 'openvino': is not installed"):
        engines(model, "model", "cpu", ["openvino"])
    monkeypatch.setattr("expertgrid.bench.engines.why_unavailable", lambda device: "there is no C++ compiler (g++)")
    with pytest.raises(InputError, match="engine 'compiled': there is no C"):
        engines(model, "model", "cpu", ["compiled"])
