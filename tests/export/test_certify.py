"""Certified files: rewritten, lower and pruned models against PyTorch, in ONNX Runtime and in another engine."""

import dataclasses
import hashlib

import numpy as np
import onnx
import openvino
import pytest
import torch

from expertgrid.ablations.engines.local import run_local
from expertgrid.ablations.records.directory import StudyDirectory
from expertgrid.ablations.study.study import Study
from expertgrid.export.certificate import BOUNDS, read_certificate
from expertgrid.export.certify import CertifiedModel, Images, Reference, certified, rewritten
from expertgrid.export.metadata import entries_of, with_entries
from expertgrid.export.prune import pruned
from expertgrid.export.rewrites import REWRITES
from expertgrid.export.session import open_session
from expertgrid.export.to_onnx import GATES, LOGITS, PROBABILITIES, served
from expertgrid.model.checkpoint import Checkpoint, load
from expertgrid.model.config import TimmModel
from expertgrid.model.gates import gates, recorded
from expertgrid.model.registry import build
from expertgrid.model.system.errors import InputError
from expertgrid.model.training.splits import Splits

RECIPE = {"epochs": 4, "batch_size": 32, "lr": 0.005, "hflip": 0.0, "crop_padding": 1}


@pytest.fixture(scope="module")
def checkpoint(digits, resident_digits, tmp_path_factory) -> Checkpoint:
    """A network of three experts that has learned the digits."""
    settings = {"experts": 3, "width": 0.5, **{f"recipe.{field}": value for field, value in RECIPE.items()}}
    (cell,) = Study(name="one", question="?", seeds=1, set=settings).cells(digits)
    directory = StudyDirectory(tmp_path_factory.mktemp("one"))
    list(run_local([cell.trials[0]], resident_digits, directory))
    return load(directory.checkpoint(cell.trials[0].id))


@pytest.fixture(scope="module")
def images(digits_splits: Splits) -> Images:
    return Images(**digits_splits.arrays())


@pytest.fixture(scope="module")
def with_all_outputs(checkpoint, images) -> dict[bool, CertifiedModel]:
    """The network's file with all outputs, with all rewrites and with none."""
    reference, outputs = Reference(checkpoint, images, "uint8"), (LOGITS, PROBABILITIES, GATES)
    return {
        all_: certified(rewritten(reference, rewrites=tuple(REWRITES) if all_ else (), outputs=outputs), reference)
        for all_ in (True, False)
    }


@pytest.mark.parametrize(
    ("kind", "precision"), [*(("uint8", precision) for precision in BOUNDS), ("float", "fp32"), ("float", "int8")]
)
def test_every_precision_holds_its_bound(checkpoint, images, kind, precision):
    provider = "openvino" if precision == "bf16" else "cpu"
    if precision == "bf16" and "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this processor does not compute in bfloat16")
    reference = Reference(checkpoint, images, kind)
    model = certified(rewritten(reference, precision), reference, precision, [provider], provider)
    assert model.certificate.passed
    assert model.certificate.pytorch_accuracy > 0.9
    assert model.certificate.bound == BOUNDS[precision]
    metadata = entries_of(onnx.load_from_string(model.model))
    assert metadata["expertgrid.precision"] == precision
    assert len(metadata["expertgrid.certificate"]) == 64
    onnx.checker.check_model(onnx.load_from_string(model.model), full_check=True)


@pytest.mark.parametrize("rewrites", [True, False])
def test_outputs_in_two_engines(checkpoint, images, with_all_outputs, rewrites):
    """Logits in OpenVINO too; probabilities, and the weights of each gate."""
    model = with_all_outputs[rewrites].model
    session = open_session(model, "cpu", "model")
    names = [output.name for output in session.get_outputs()]
    assert names == ["logits", "probabilities", "gates.layers.1", "gates.layers.2"]
    pixels_BHWC = images.test[:33]
    logits_BN, probabilities_BN, *gates_BK = session.run(None, {"images": pixels_BHWC})
    np.testing.assert_allclose(torch.from_numpy(logits_BN).softmax(1), probabilities_BN, atol=1e-6)
    net = served(checkpoint, "uint8")
    with torch.inference_mode(), recorded(gates(net)) as weights:
        expected_BN = net(torch.from_numpy(pixels_BHWC)).numpy()
    for gate_BK, (expected_BK,) in zip(gates_BK, weights.values(), strict=True):
        np.testing.assert_allclose(gate_BK, expected_BK, atol=1e-5)
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(model), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    np.testing.assert_allclose(compiled([pixels_BHWC])[0], expected_BN, atol=1e-3)


def test_pruning_says_what_it_costs(checkpoint, images):
    same, said = pruned(checkpoint, images.validation, images.validation_labels, 0.0)
    assert "pruned 0 experts (none)" in said
    assert same.config == checkpoint.config
    one_left, said = pruned(checkpoint, images.validation, images.validation_labels, 1.0)
    assert "pruned 4 experts" in said
    assert [len(block.kernels) for block in one_left.config.blocks()] == [1, 1]
    reference = Reference(one_left, images, "uint8")
    assert certified(rewritten(reference), reference).certificate.passed


def test_test_images_shape_no_model(checkpoint, images):
    """Calibration is on train images, and what stays in float is decided on validation images."""
    without = dataclasses.replace(images, test=None, test_labels=None)
    assert rewritten(Reference(checkpoint, without, "uint8"), "int8").model


def test_a_file_and_its_certificate_are_of_each_other(with_all_outputs, tmp_path):
    model, other = with_all_outputs[True], with_all_outputs[False]
    file, beside = tmp_path / "model.onnx", tmp_path / "model.certificate.json"

    def check_refused(content: bytes, message: str) -> None:
        with pytest.raises(InputError) as error:
            read_certificate(content, file)
        assert str(error.value) == f"{file}: {message}; export it again"

    check_refused(model.model, "has no certificate")
    beside.write_bytes(model.certificate.to_bytes())
    assert read_certificate(model.model, file) == model.certificate
    check_refused(other.model, "was certified by another certificate than model.certificate.json")
    digest = hashlib.sha256(model.certificate.to_bytes()).hexdigest()
    forged = with_entries(other.model, {"expertgrid.certificate": digest})
    check_refused(forged, "is not the file that model.certificate.json is of")
    beside.write_text("{}")
    check_refused(model.model, "its certificate model.certificate.json is damaged")


def test_networks_without_experts_are_not_pruned(checkpoint, images):
    config = TimmModel(timm="resnet10t", in_chans=1)
    plain = Checkpoint(config, checkpoint.trained, build(config).state_dict())
    with pytest.raises(InputError, match="--prune-gates: two_block has no experts"):
        pruned(plain, images.validation, images.validation_labels, 0.1)
