"""Publishing: fused, lower and pruned models against PyTorch, in ONNX Runtime and in an engine of other origin."""

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
from expertgrid.export.certificate import BOUNDS, certificate_problem
from expertgrid.export.certify import Images, Reference, publish
from expertgrid.export.compare import BATCH
from expertgrid.export.fuse import REWRITES
from expertgrid.export.metadata import entries_of, with_entries
from expertgrid.export.prune import pruned
from expertgrid.export.to_onnx import GATES, LOGITS, PROBABILITIES, as_input, example, served
from expertgrid.model.checkpoint import Checkpoint, load
from expertgrid.model.config import TimmModel
from expertgrid.model.gates import recorded_gates
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
    train, validation, test = digits_splits.train, digits_splits.validation, digits_splits.test
    return Images(
        train.pixels_BHWC.numpy(),
        validation.pixels_BHWC.numpy(),
        validation.labels_B.numpy(),
        test.pixels_BHWC.numpy(),
        test.labels_B.numpy(),
    )


@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize("kind", ["uint8", "float"])
def test_every_precision_holds_its_bound(checkpoint, images, kind, precision):
    provider = "openvino" if precision == "bf16" else "cpu"
    if precision == "bf16" and "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this processor does not compute in bfloat16")
    published = publish(Reference(checkpoint, images, kind), precision, providers=[provider], runs_on=provider)
    certificate = published.certificate
    assert certificate.passed
    assert certificate.pytorch_accuracy > 0.9
    assert certificate.bound == BOUNDS[precision]
    metadata = entries_of(onnx.load_from_string(published.model))
    assert metadata["expertgrid.precision"] == precision
    assert len(metadata["expertgrid.certificate"]) == 64
    onnx.checker.check_model(onnx.load_from_string(published.model), full_check=True)


@pytest.mark.parametrize("fused", [True, False])
def test_another_engine_gives_the_same_logits(checkpoint, images, fused):
    model = publish(Reference(checkpoint, images, "uint8"), rewrites=tuple(REWRITES) if fused else ()).model
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(model), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    pixels_BHWC = images.test[:33]
    with torch.inference_mode():
        wanted_BN = served(checkpoint, "uint8")(torch.from_numpy(pixels_BHWC)).numpy()
    np.testing.assert_allclose(compiled([pixels_BHWC])[0], wanted_BN, atol=1e-3)


@pytest.mark.parametrize("fused", [True, False])
def test_probabilities_and_gates(checkpoint, images, fused):
    import onnxruntime

    model = publish(
        Reference(checkpoint, images, "uint8"),
        rewrites=tuple(REWRITES) if fused else (),
        outputs=(LOGITS, PROBABILITIES, GATES),
    ).model
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    assert names == ["logits", "probabilities", "gates.layers.1", "gates.layers.2"]
    pixels_BHWC = images.test[:20]
    logits_BN, probabilities_BN, *gates = session.run(None, {"images": pixels_BHWC})
    np.testing.assert_allclose(torch.from_numpy(logits_BN).softmax(1), probabilities_BN, atol=1e-6)
    net = served(checkpoint, "uint8")
    wanted = []
    for layer in net.net.layers[1:]:
        layer.gate.register_forward_hook(lambda _, __, gate_BK: wanted.append(gate_BK))
    with torch.inference_mode():
        net(torch.from_numpy(pixels_BHWC))
    for found_BK, wanted_BK in zip(gates, wanted, strict=True):
        np.testing.assert_allclose(found_BK, wanted_BK, atol=1e-5)


def test_pruning_says_what_it_costs(checkpoint, images):
    same, said = pruned(checkpoint, images.validation, images.validation_labels, 0.0)
    assert "pruned 0 experts (none)" in said
    assert same.config == checkpoint.config
    one_left, said = pruned(checkpoint, images.validation, images.validation_labels, 1.0)
    assert "pruned 4 experts" in said
    assert [len(block.kernels) for block in one_left.config.blocks()] == [1, 1]
    published = publish(Reference(one_left, images, "uint8"))
    assert published.certificate.passed
    x = example(one_left, "uint8", 3)
    assert served(one_left, "uint8")(x).shape == (3, 10)


def test_an_expert_that_one_image_needs_stays(checkpoint, images):
    """Also where that image is in none of the last batches."""
    net = checkpoint.network()
    with torch.inference_mode(), recorded_gates(net) as recorded:
        net(torch.from_numpy(as_input(images.validation, checkpoint, "float")))
    gates = {block: gate_BK for block, (gate_BK,) in recorded.items()}
    last = len(images.validation) % BATCH
    gap, block, expert, threshold = max(
        (gate_BK[:, k].max() - gate_BK[-last:, k].max(), block, k, (gate_BK[:, k].max() + gate_BK[-last:, k].max()) / 2)
        for block, gate_BK in gates.items()
        for k in range(gate_BK.shape[1])
    )
    assert gap > 0
    _, said = pruned(checkpoint, images.validation, images.validation_labels, float(threshold))
    assert f"{block}.experts.{expert}" not in said


def test_test_images_shape_no_model(checkpoint, images):
    """Calibration is on train images, and what stays in float is decided on validation images."""
    others = dataclasses.replace(images, test=255 - images.test, test_labels=(images.test_labels + 1) % 10)
    models = []
    for shown in (images, others):
        proto = onnx.load_from_string(publish(Reference(checkpoint, shown, "uint8"), "int8").model)
        del proto.metadata_props[:]
        models.append(proto.SerializeToString())
    assert models[0] == models[1]


def test_a_file_and_its_certificate_are_of_each_other(checkpoint, images, tmp_path):
    published, other = (
        publish(Reference(checkpoint, images, "uint8"), rewrites=tuple(REWRITES) if fused else ())
        for fused in (True, False)
    )
    file, beside = tmp_path / "model.onnx", tmp_path / "model.certificate.json"
    assert certificate_problem(published.model, file) == "model.onnx has no certificate"
    beside.write_bytes(published.certificate.to_bytes())
    assert certificate_problem(published.model, file) == ""
    assert (
        certificate_problem(other.model, file)
        == "model.onnx was certified by another certificate than model.certificate.json"
    )
    named = hashlib.sha256(published.certificate.to_bytes()).hexdigest()
    forged = with_entries(other.model, {"expertgrid.certificate": named})
    assert certificate_problem(forged, file) == "model.onnx is not the file that model.certificate.json is of"
    beside.write_text("{}")
    assert certificate_problem(published.model, file) == "model.certificate.json is damaged"


def test_networks_without_experts_are_not_pruned(checkpoint, images):
    config = TimmModel(timm="resnet10t", in_chans=1)
    plain = Checkpoint(config, checkpoint.trained, build(config).state_dict())
    with pytest.raises(InputError, match="--prune-gates: two_block has no experts"):
        pruned(plain, images.validation, images.validation_labels, 0.1)
