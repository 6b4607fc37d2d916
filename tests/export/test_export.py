"""Export: ONNX Runtime and the certificate agree with PyTorch, and a wrong model is caught."""

import json
import re

import numpy as np
import onnx
import onnx.reference
import pytest
import torch
from small_networks import trained, weights, with_weights

from expertgrid.export import compare
from expertgrid.export.certificate import BOUNDS, Agreement, Certificate
from expertgrid.export.metadata import Metadata, entries_of, read_metadata
from expertgrid.export.session import open_session
from expertgrid.export.to_onnx import example, served, to_onnx
from expertgrid.model.checkpoint import Checkpoint
from expertgrid.model.config import Block, Conv, Dropout, GateConfig, HeadConfig, ModelConfig, Pool, Residual, TimmModel
from expertgrid.model.registry import build
from expertgrid.model.system.errors import InputError

TRAINED = trained(model="small", data="digits", classes=("a", "b", "c"), image_size=(8, 10))
EVERYTHING = ModelConfig(
    num_classes=3,
    layers=(
        Conv(channels=4),
        Block(channels=6, kernels=(5, 3, 1), gate=GateConfig(kind="mlp", reduction=2, temperature=2.0)),
        Residual(layers=(Block(channels=8, norm_act="mix", stride=2), Block(channels=8, norm_act="none"))),
        *(Pool(op="avg"), Dropout(p=0.1)),
        Block(channels=8, gate=GateConfig(kind="uniform")),
        Block(channels=8, gate=GateConfig(kind="constant")),
        Block(channels=8, kernels=(3,)),
        Pool(),
    ),
    head=HeadConfig(hidden=(12,), dropout=0.2),
)


def trained_a_little(config) -> Checkpoint:
    """A checkpoint whose batch norms have seen images, so that they do something."""
    torch.manual_seed(0)
    net = build(config)
    for _ in range(3):
        net(torch.randn(16, 3, 8, 10) * 2 + 1)
    return Checkpoint(config, TRAINED, net.state_dict())


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return trained_a_little(EVERYTHING)


@pytest.fixture(scope="module", params=["uint8", "float"])
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def models(checkpoint) -> dict[str, bytes]:
    """The checkpoint's file of each kind."""
    return {kind: to_onnx(checkpoint, kind) for kind in ("uint8", "float")}


@pytest.fixture(scope="module")
def model(models, kind) -> bytes:
    return models[kind]


def labels(count: int) -> np.ndarray:
    return np.arange(count) % 3


def test_onnx_runtime_agrees_at_each_batch_size(checkpoint, kind, model):
    certificate = compare.compare(model, served(checkpoint, kind), example(checkpoint, kind, 150).numpy(), labels(150))
    assert certificate.passed
    assert [agreement.batch for agreement in certificate.agreements] == [64, 1, 2, 7]
    assert {agreement.images for agreement in certificate.agreements} == {150}
    assert max(agreement.largest_difference for agreement in certificate.agreements) < 1e-5
    assert "fp32 agrees with PyTorch on 150 test images at batch sizes 64, 1, 2, 7, on cpu" in str(certificate)


def test_the_reference_implementation_of_onnx_agrees(checkpoint, kind, model):
    images = example(checkpoint, kind, 3)
    (logits_BN,) = onnx.reference.ReferenceEvaluator(onnx.load_from_string(model)).run(None, {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits_BN), served(checkpoint, kind)(images), rtol=1e-4, atol=1e-5)


def test_uint8_input_is_the_normalised_float_input(checkpoint, models):
    pixels_BHWC = example(checkpoint, "uint8", 5)
    mean, std = (torch.tensor(values)[:, None, None] for values in (TRAINED.mean, TRAINED.std))
    floats_BCHW = (pixels_BHWC.permute(0, 3, 1, 2) / 255 - mean) / std
    sessions = [open_session(models[kind], "cpu", "model") for kind in ("uint8", "float")]
    logits = [s.run(None, {"images": x.numpy()})[0] for s, x in zip(sessions, (pixels_BHWC, floats_BCHW))]
    np.testing.assert_allclose(*logits, rtol=1e-4, atol=1e-5)


def test_interface_of_the_file(kind, model):
    session = open_session(model, "cpu", "model")
    (given,), (made,) = session.get_inputs(), session.get_outputs()
    shape, dtype = {"uint8": ([8, 10, 3], "tensor(uint8)"), "float": ([3, 8, 10], "tensor(float)")}[kind]
    assert (given.name, given.type, given.shape[1:]) == ("images", dtype, shape)
    assert (made.name, made.shape[1:]) == ("logits", [3])
    assert given.shape[0] == made.shape[0] == "batch"


def test_nodes_name_their_modules_and_no_path_of_this_machine(model):
    keys = {prop.key for node in onnx.load_from_string(model).graph.node for prop in node.metadata_props}
    assert keys == {"pkg.torch.onnx.name_scopes"}
    assert b".py" not in model


def test_metadata(kind, model):
    """What other programs read is JSON or text; what is read back is what was written."""
    found = entries_of(onnx.load_from_string(model))
    assert json.loads(found["classes"]) == ["a", "b", "c"]
    assert json.loads(found["mean"]) == [0.4, 0.5, 0.6]
    assert json.loads(found["std"]) == [0.2, 0.3, 0.4]
    assert [found[key] for key in ("preset", "trial", "data", "expertgrid.input")] == ["small", "abc", "digits", kind]
    assert "bicubic" in found["resize"] and "centre crop" in found["resize"]
    assert ModelConfig.model_validate_json(found["expertgrid.config"]) == EVERYTHING
    assert read_metadata(found, "model") == Metadata(input=kind, config=EVERYTHING, trained=TRAINED)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"classes": None}, "other.onnx: its metadata has no 'classes'"),
        ({"expertgrid.input": None}, "other.onnx: its metadata has no 'expertgrid.input'"),
        ({"expertgrid.config": "{}"}, "other.onnx: metadata expertgrid.config: config.layers: is missing"),
        ({"expertgrid.input": "uint4"}, "other.onnx: metadata expertgrid.input: found 'uint4'; accepted: uint8, float"),
        ({"mean": "[0.5"}, "other.onnx: metadata mean: not JSON"),
        ({"image_size": "[8]"}, "other.onnx: metadata.image_size.1: is missing"),
        ({"expertgrid.precision": "fp4"}, "metadata.precision: 'fp32', 'fp16', 'int8' or 'bf16' is needed"),
        ({"expertgrid.options": '{"threads": 0}'}, "other.onnx: metadata.threads: 1 or more is needed"),
        ({"expertgrid.options": "[1"}, "other.onnx: metadata"),
    ],
)
def test_metadata_that_is_not_ours_or_damaged(model, entries, message):
    changed = entries_of(onnx.load_from_string(model)) | entries
    with pytest.raises(InputError, match=re.escape(message)) as error:
        read_metadata({key: value for key, value in changed.items() if value is not None}, "other.onnx")
    assert "\n" not in str(error.value)


def test_a_timm_model_is_exported():
    checkpoint = trained_a_little(TimmModel(timm="resnet10t", num_classes=3))
    model = to_onnx(checkpoint, "uint8")
    images = example(checkpoint, "uint8", 20).numpy()
    assert compare.compare(model, served(checkpoint, "uint8"), images, labels(20)).passed


@pytest.mark.parametrize(
    ("weight", "layer"),
    [("head.classifier.weight", "the head"), ("layers.2.layers.1.experts.0.conv.weight", "layers.2")],
)
def test_another_networks_model_fails_its_certificate(checkpoint, kind, model, weight, layer):
    """The first layer that diverges is named: those before it agree."""
    other = trained_a_little(EVERYTHING)
    other.weights[weight][0] += 0.5
    images = example(checkpoint, kind, 64).numpy()
    certificate = compare.compare(model, served(other, kind), images, labels(64))
    assert (certificate.passed, certificate.first_divergence) == (False, layer)
    assert all(agreement.largest_difference > 1e-4 for agreement in certificate.agreements)
    assert f"fp32 DOES NOT agree (from {layer} on)" in str(certificate)


@pytest.mark.parametrize(
    ("change", "precision", "passed"),
    [(2e-5, "fp32", True), (2e-4, "fp32", False), (np.nan, "fp32", False), (np.inf, "fp16", False)],
)
def test_the_bound_is_applied(checkpoint, models, change, precision, passed):
    bias = weights(models["uint8"], "head.classifier.bias")
    bias[:1] += np.float32(change)
    model = with_weights(models["uint8"], head__classifier__bias=bias)
    images = example(checkpoint, "uint8", 8).numpy()
    all_first_B = np.zeros(8, int)  # the class that an infinite logit takes each image for
    certificate = compare.compare(model, served(checkpoint, "uint8"), images, all_first_B, precision)
    assert certificate.passed == passed
    assert Certificate.model_validate_json(certificate.to_bytes()).agreements == certificate.agreements


def test_lower_precision_may_lose_half_a_point():
    def held(precision: str, pytorch: float, difference: float = 3.0, sampled: bool = False, p: float = 1.0) -> bool:
        counts = {"batch": 1, "images": 1000, "argmax_flips": [1, 2], "mean_difference": 0.1, "mcnemar_p": p}
        accuracies = {"accuracy": 0.9, "pytorch_accuracy": pytorch, "largest_difference": difference}
        return Agreement(provider="cpu", sampled=sampled, **counts, **accuracies).within(BOUNDS[precision])

    for precision in ("fp16", "int8"):
        assert held(precision, 0.904)
        assert not held(precision, 0.906)
        assert not held(precision, 0.9, np.inf)
        assert held(precision, 0.906, sampled=True, p=0.2)  # six images of 1,000, by chance
        assert not held(precision, 0.95, sampled=True, p=1e-6)
        assert not held(precision, 0.9, np.inf, sampled=True)
    assert not held("fp32", 0.9)
    assert not held("fp32", 0.9, sampled=True)


def test_other_batch_sizes_run_on_a_sample(checkpoint, models, monkeypatch):
    """Flips are counted by image, and have the numbers of the images in the whole test split."""
    monkeypatch.setattr(compare, "SAMPLE", 10)
    net = served(checkpoint, "uint8")
    images = example(checkpoint, "uint8", 35)
    model = with_weights(models["uint8"], head__classifier__bias=np.array([0.0, 0.0, 100.0]))
    whole, *sampled = compare.compare(model, net, images.numpy(), labels(35)).agreements
    expected = (net(images).argmax(1) != 2).nonzero().flatten().tolist()
    assert (whole.images, whole.sampled, whole.argmax_flips, whole.accuracy) == (35, False, expected, 11 / 35)
    assert [agreement.batch for agreement in sampled] == [1, 2, 7]
    for agreement in sampled:
        assert (agreement.images, agreement.sampled) == (12, True)
        assert agreement.argmax_flips == [image for image in expected if image % 3 == 0]
    text = str(compare.compare(models["uint8"], net, images.numpy(), labels(35)))
    assert "35 test images at batch size 64 (and on 12 of them at 1, 2, 7), on cpu" in text


def test_providers_that_are_not_there(model):
    with pytest.raises(InputError, match="unknown provider 'cud'; did you mean 'cuda'?"):
        open_session(model, "cud", "model")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="provider 'cuda'"):
            open_session(model, "cuda", "model")
    with pytest.raises(InputError, match="broken.onnx: ONNX Runtime does not load it"):
        open_session(model[:100], "cpu", "broken.onnx")


def test_a_network_whose_logits_depend_on_the_batch_is_not_exported():
    shuffled = ModelConfig(num_classes=3, layers=(Block(channels=4, gate=GateConfig(shuffled=True)),))
    with pytest.raises(InputError, match="small: its gates are shuffled, so that an image's logits depend on others"):
        to_onnx(trained_a_little(shuffled), "float")
