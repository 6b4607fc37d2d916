"""The fastest file: what is tried, what is taken, and that what is taken is what was timed."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import REPOSITORY
from PIL import Image
from small import CONFIG, TRAINED

from expertgrid.bench import tune as tuning
from expertgrid.bench.engines import engines
from expertgrid.bench.timing import Block, Times
from expertgrid.bench.tune import Way, rows, tune
from expertgrid.export.certificate import BOUNDS, Bound
from expertgrid.export.certify import Images, Reference, UncertifiedModel, rewritten
from expertgrid.export.metadata import Options, entries_of, read_metadata
from expertgrid.export.predict import predict
from expertgrid.export.session import session_options
from expertgrid.export.to_onnx import LOGITS, to_onnx
from expertgrid.model.checkpoint import Checkpoint
from expertgrid.model.registry import build
from expertgrid.model.system.errors import InputError


@pytest.fixture(scope="module")
def reference() -> Reference:
    rng = np.random.default_rng(0)
    checkpoint = Checkpoint(CONFIG, TRAINED, build(CONFIG).state_dict())
    pixels = {name: rng.integers(256, size=(24, 8, 8, 3), dtype=np.uint8) for name in ("train", "validation", "test")}
    labels = rng.integers(10, size=24)
    return Reference(checkpoint, Images(**pixels, validation_labels=labels, test_labels=labels), "uint8")


@pytest.fixture(scope="module")
def models(reference) -> tuple[dict[Way, UncertifiedModel], dict[Way, str]]:
    return tuning._models(reference, "cpu", (LOGITS,))


@pytest.fixture
def made(models, monkeypatch) -> None:
    """The models are made once for all tests, and PyTorch has two threads, so that one is fewer."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(tuning, "_models", lambda *given: tuple(map(dict, models)))


def fastest(monkeypatch, *ways: Way) -> None:
    """Each way takes as long as its place in `ways`, or longer."""

    def take_turns(candidates, measure_s, openings):
        return {way: Times([Block(0, [1.0 + ways.index(way) if way in ways else 50.0] * 9)] * 2) for way in candidates}

    monkeypatch.setattr(tuning, "take_turns", take_turns)


def test_the_fastest_is_taken_and_the_others_are_named(reference, made, monkeypatch):
    monkeypatch.setattr(tuning, "EFFORT", (0.02, 2))
    read = []
    published = tune(reference, batch=2, before_each_certificate=lambda: read.append(1))
    tried = published.certificate.tuning
    timed = [row for row in tried if row.p50_ms is not None]
    uncertified = [row.outcome for row in tried if row.outcome.startswith("not certified")]
    assert [row.outcome for row in timed][: len(read) - 1] == uncertified
    (chosen,) = (row for row in tried if row.outcome == "chosen")
    finalists, times = len([row for row in tried if row.options]) + tuning.FINALISTS, [row.p50_ms for row in timed]
    assert chosen.p50_ms == next(row.p50_ms for row in tried if row.outcome in ("chosen", "slower"))
    assert sum(later < sooner for sooner, later in zip(times, times[1:])) <= 1  # finalists, then the others
    assert times[:finalists] == sorted(times[:finalists])
    assert {(row.provider, row.precision) for row in tried} == set(tuning.ENGINES["cpu"])
    assert published.certificate.passed
    assert published.certificate.agreements[0].provider == chosen.provider
    assert [row["outcome"] for row in rows(tried)] == [row.outcome for row in tried]


@pytest.mark.parametrize(
    ("chosen", "title"),
    [
        (Way("none", "fp32", "openvino"), "openvino cpu"),
        (Way("none", "fp32", "openvino", Options(threads=1)), "openvino cpu (1 thread)"),
        (Way("none", "fp32", "cpu", Options(threads=1, layout="NCHW")), "onnxruntime cpu (1 thread, NCHW)"),
    ],
)
def test_the_file_runs_as_was_chosen(reference, made, monkeypatch, tmp_path, chosen, title):
    fastest(monkeypatch, chosen, replace(chosen, options=Options()))
    published = tune(reference)
    metadata = read_metadata(entries_of(onnx.load_from_string(published.model)), "model")
    assert (metadata.provider, metadata.precision, metadata.options) == (chosen.provider, "fp32", chosen.options)
    assert {agreement.provider for agreement in published.certificate.agreements} == {chosen.provider}
    first = json.loads(published.certificate.to_bytes())["tuning"][0]
    assert (first["outcome"], first["options"]) == ("chosen", str(chosen.options))
    assert list(engines(published.model, "model", "cpu")[0]) == [title, "pytorch eager cpu"]
    image = tmp_path / "image.png"
    Image.fromarray(reference.images.test[0]).save(image)
    opened = []
    monkeypatch.setattr(
        "expertgrid.export.predict.open_any",
        lambda *given, options: opened.append((given[1], options)) or tuning.open_any(*given, options=options),
    )
    by_file = predict(published.model, "model", [image])
    assert opened == [(chosen.provider, chosen.options)]
    on_cpu = predict(published.model, "model", [image], "cpu")
    assert dict(by_file[0].classes) == pytest.approx(dict(on_cpu[0].classes), abs=1e-4)


def test_options_are_tried_of_the_fastest_alone(reference, made, monkeypatch):
    fastest(monkeypatch, Way("none", "fp32", "cpu"), Way("folded", "fp32", "cpu"), Way("none", "fp32", "openvino"))
    rows = tune(reference).certificate.tuning
    with_options = {(row.rewrites, row.precision, row.provider) for row in rows if row.options}
    assert with_options == {("none", "fp32", "cpu"), ("folded", "fp32", "cpu"), ("none", "fp32", "openvino")}
    options = tuning.variants("cpu")
    assert len({str(option) for option in options}) == len(options) == 6


def test_onnx_runtime_takes_the_options(reference, tmp_path):
    """Its optimised graph, which it writes, has no blocked channels in NCHW."""
    model = rewritten(reference, "fp32", ()).model
    is_blocked = {}
    for layout in (None, "NCHW"):
        options = session_options(Options(layout=layout, spinning=False, threads=1))
        options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
        onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        nodes = onnx.load(tmp_path / "optimised.onnx").graph.node
        is_blocked[layout] = "com.microsoft.nchwc" in {node.domain for node in nodes}
        assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
        assert options.intra_op_num_threads == 1
    assert is_blocked == {None: True, "NCHW": False}


def test_a_file_that_misses_its_bound_is_not_taken(reference, models, made, monkeypatch):
    fastest(monkeypatch, Way("folded", "int8", "cpu"), Way("none", "fp32", "cpu"))
    monkeypatch.setitem(BOUNDS, "int8", Bound(logit_difference=0.0, argmax_flips=0, accuracy_loss=1.0))
    published = tune(reference)
    first, second = published.certificate.tuning[:2]
    assert (first.precision, first.outcome[:13], second.outcome) == ("int8", "not certified", "chosen")
    for precision in ("fp32", "int8", "bf16"):
        monkeypatch.setitem(BOUNDS, precision, Bound(logit_difference=-1.0, argmax_flips=None, accuracy_loss=1.0))
    two = {way: models[0][way] for way in (Way("folded", "int8", "cpu"), Way("none", "fp32", "cpu"))}
    monkeypatch.setattr(tuning, "_models", lambda *given: (two, {}))
    with pytest.raises(InputError, match="--tune: no file is certified; the fastest: not certified: int8 DOES NOT"):
        tune(reference)


def test_an_engine_that_is_not_here_is_named(reference, monkeypatch):
    def none() -> None:
        raise InputError("provider 'openvino': is not installed")

    monkeypatch.setattr(tuning, "check_openvino", none)
    monkeypatch.setattr(tuning, "rewritten", lambda *given: UncertifiedModel(b"", []))
    models, left_out = tuning._models(reference, "cpu", (LOGITS,))
    assert {way.provider for way in models} == {"cpu"}
    assert {way.provider for way in left_out} == {"openvino"}
    assert set(left_out.values()) == {"provider 'openvino': is not installed"}
    with pytest.raises(InputError, match="--tune: chooses among the engines of --provider cpu or cuda, found 'openv"):
        tune(reference, "openvino")


def test_bfloat16_is_refused_where_the_processor_has_none(reference, monkeypatch):
    from expertgrid.export.openvino import OpenVinoSession

    openvino = pytest.importorskip("openvino")
    model = to_onnx(reference.checkpoint, "uint8")
    if "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        images = reference.as_input(reference.images.test)
        (logits_BN,) = OpenVinoSession(model, "model", "bf16").run(["logits"], {"images": images})
        (plain_BN,) = OpenVinoSession(model, "model").run(["logits"], {"images": images})
        assert 0 < np.abs(logits_BN - plain_BN).max() < 0.1
    else:
        with pytest.raises(InputError, match="precision 'bf16': this processor does not compute in bfloat16"):
            OpenVinoSession(model, "model", "bf16")
    with pytest.raises(InputError, match="model: OpenVINO does not load it"):
        OpenVinoSession(model[:100], "model")


def test_a_signal_after_two_sessions_of_openvino_does_no_harm(reference, tmp_path):
    """Freed in the order in which they were opened; in a process of its own, which a signal would end."""
    pytest.importorskip("openvino")
    (tmp_path / "model.onnx").write_bytes(rewritten(reference, "fp32", ()).model)
    code = """
import faulthandler, os, pathlib, signal
from expertgrid.export.openvino import OpenVinoSession
faulthandler.enable()
signal.signal(signal.SIGUSR1, lambda *given: print("handled"))
model = pathlib.Path("model.onnx").read_bytes()
first, second = OpenVinoSession(model, "first"), OpenVinoSession(model, "second")
del first
del second
os.kill(os.getpid(), signal.SIGUSR1)
"""
    paths = {"PYTHONPATH": str(REPOSITORY / "src")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | paths, capture_output=True)
    assert (done.returncode, done.stdout) == (0, b"handled\n"), done.stderr
