"""Lower precision: near the float network on both inputs, and float32 where a network needs it."""

import numpy as np
import onnx
import onnx.reference
import pytest
import torch
from sklearn.datasets import load_digits
from small_networks import trained, weights, with_weights
from torch.nn import functional

from expertgrid.export.precision import PrecisionError, Reduction, lowered
from expertgrid.export.session import open_session
from expertgrid.export.to_onnx import to_onnx
from expertgrid.model.checkpoint import Checkpoint
from expertgrid.model.config import Block, Conv, GateConfig, HeadConfig, ModelConfig, Pool, Residual
from expertgrid.model.registry import build

TRAINED = trained(classes=tuple("0123456789"), image_size=(8, 8), mean=(0.3,), std=(0.4,))
WIDE = ModelConfig(
    in_chans=1,
    layers=(
        Conv(channels=64),
        Block(channels=128, gate=GateConfig(kind="mlp", reduction=4)),
        Pool(),
        Residual(layers=(Block(channels=128, kernels=(3, 1), norm_act="mix"),)),
    ),
    head=HeadConfig(hidden=(128,)),
)


@pytest.fixture(scope="module", autouse=True)
def nothing_is_written_here(tmp_path_factory):
    """Every test runs in an empty directory, which is empty at the end."""
    directory = tmp_path_factory.mktemp("here")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        yield
    assert not list(directory.iterdir())


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels (B, 8, 8, 1) uint8 and labels (B,)."""
    found = load_digits()
    pixels_BHWC = torch.from_numpy(found.images * 255 / 16).round().to(torch.uint8)[..., None]
    return pixels_BHWC, torch.from_numpy(found.target).long()


def normalised(pixels_BHWC: torch.Tensor) -> torch.Tensor:
    return (pixels_BHWC.permute(0, 3, 1, 2) / 255 - TRAINED.mean[0]) / TRAINED.std[0]


@pytest.fixture(scope="module")
def checkpoint(digits) -> Checkpoint:
    """Trained for 36 steps."""
    torch.manual_seed(0)
    net = build(WIDE)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    for part in torch.randperm(1200).split(64)[:18] * 2:
        loss = functional.cross_entropy(net(normalised(digits[0][part])), digits[1][part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return Checkpoint(WIDE, TRAINED, net.state_dict())


@pytest.fixture(scope="module", params=["uint8", "float"])
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def images(digits, kind) -> np.ndarray:
    """In the form of the model's input; the network was trained on the first 1,200."""
    return (digits[0] if kind == "uint8" else normalised(digits[0])).numpy()


@pytest.fixture(scope="module")
def model(checkpoint, kind) -> bytes:
    return to_onnx(checkpoint, kind)


@pytest.fixture(scope="module", params=["fp16", "int8"])
def precision(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def reduced(model, images, precision) -> bytes:
    return Reduction(model, precision, images[:128]).model()


def logits(model: bytes, images: np.ndarray) -> np.ndarray:
    return open_session(model, "cpu", "model").run(["logits"], {"images": images})[0]


def in_float16(model: bytes, images: np.ndarray) -> np.ndarray:
    """The logits where float16 is computed in float16, which ONNX Runtime does not do on a CPU."""
    evaluator = onnx.reference.ReferenceEvaluator(onnx.load_from_string(model))
    with np.errstate(over="ignore", invalid="ignore"):
        return evaluator.run(None, {"images": images})[0]


def noise(model: bytes, reduced: bytes, images: np.ndarray) -> float:
    """The root mean square error of the logits, relative to them; infinite for what is not a number."""
    wanted_BN = logits(model, images)
    error = np.sqrt(((logits(reduced, images) - wanted_BN) ** 2).mean() / (wanted_BN**2).mean())
    return float(np.nan_to_num(error, nan=np.inf))


def names(model: bytes, *kinds: str) -> list[str]:
    return [node.name for node in onnx.load_from_string(model).graph.node if node.op_type in kinds]


def test_a_smaller_file_has_nearly_the_logits(model, reduced, precision, images, digits):
    held_out = images[1200:]
    assert noise(model, reduced, held_out) < {"fp16": 2e-3, "int8": 0.05}[precision]
    agreement = (logits(model, held_out).argmax(1) == logits(reduced, held_out).argmax(1)).mean()
    assert agreement >= {"fp16": 0.998, "int8": 0.98}[precision]
    assert (logits(model, held_out).argmax(1) == digits[1][1200:].numpy()).mean() > 0.8, "the network has learnt"
    assert len(reduced) <= {"fp16": 0.52, "int8": 0.30}[precision] * len(model)


def test_interface_and_metadata_stay(model, reduced, images):
    for batch in (1, 2, 7):
        assert logits(reduced, images[:batch]).shape == (batch, 10)
        np.testing.assert_allclose(logits(reduced, images[:batch]), logits(reduced, images[:7])[:batch], atol=0.02)
    before, after = onnx.load_from_string(model), onnx.load_from_string(reduced)
    assert list(after.metadata_props) == list(before.metadata_props)
    assert list(after.graph.input) == list(before.graph.input)
    assert list(after.graph.output) == list(before.graph.output)


def test_the_file_is_valid_and_its_weights_have_the_lower_type(model, reduced, precision):
    proto = onnx.load_from_string(reduced)
    onnx.checker.check_model(proto, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True)
    typed = {value.name for value in (*inferred.graph.value_info, *inferred.graph.output)}
    assert {output for node in proto.graph.node for output in node.output} <= typed
    assert set(names(model, "Conv", "Gemm", "Mul")) == set(names(reduced, "Conv", "Gemm", "Mul"))
    kind = {"fp16": onnx.TensorProto.FLOAT16, "int8": onnx.TensorProto.INT8}[precision]
    assert {weight.data_type for weight in proto.graph.initializer if np.prod(weight.dims) > 1000} == {kind}


def test_named_nodes_stay_in_float(model, images, precision):
    """With all of them in float32 nothing is lost; with one, its weights stay as they are."""
    (first, *_) = names(model, "Conv")
    reduction = Reduction(model, precision, images[:32])
    for keep in ([first], [node.name for node in onnx.load_from_string(model).graph.node]):
        kept = reduction.model(keep)
        conv = next(node for node in onnx.load_from_string(kept).graph.node if node.name == first)
        weight = next(one for one in onnx.load_from_string(kept).graph.initializer if one.name == conv.input[1])
        assert weight.data_type == onnx.TensorProto.FLOAT
    np.testing.assert_allclose(logits(kept, images[:20]), logits(model, images[:20]), rtol=1e-5, atol=1e-5)


def test_nothing_is_kept_without_need(model, reduced, images, precision):
    assert lowered(model, precision, images[:128], lambda _: True) == (reduced, [])


@pytest.fixture(scope="module")
def plain() -> bytes:
    """Three convolutions and a linear layer; the batch norms have seen images."""
    torch.manual_seed(0)
    config = ModelConfig(in_chans=1, layers=tuple(Conv(channels=8) for _ in range(3)))
    net = build(config)
    for _ in range(50):
        net(torch.randn(16, 1, 8, 8))
    return to_onnx(Checkpoint(config, TRAINED, net.state_dict()), "float")


def scaled(model: bytes, scale_C: np.ndarray) -> bytes:
    """A model with other channels between its second and third convolution: the third takes the factors back."""
    second, third = (weights(model, f"layers.{i}.conv.weight") for i in (1, 2))
    changed = {"weight": second * scale_C[:, None, None, None]}
    changed["weight_bias"] = weights(model, "layers.1.conv.weight_bias") * scale_C
    changed = {f"layers__1__conv__{name}": values for name, values in changed.items()}
    return with_weights(model, **changed, layers__2__conv__weight=third / scale_C[:, None, None])


@pytest.mark.parametrize(
    ("precision", "factors", "bound"), [("fp16", [1e6] * 8, 0.01), ("int8", [3000.0] + [1.0] * 7, 0.05)]
)
def test_what_a_precision_cannot_hold_stays_in_float32(plain, digits, precision, factors, bound):
    """Values beyond float16; or one channel of 3,000 times the others, so that 8 bits leave these nothing."""
    images, model = normalised(digits[0][:64]).numpy(), scaled(plain, np.array(factors))
    assert noise(plain, model, images) < 1e-5
    assert noise(plain, Reduction(plain, precision, images).model(), images) < bound
    reduction, tried = Reduction(model, precision, images), []
    if precision == "fp16":
        assert not np.isfinite(in_float16(reduction.model(), images[:8])).all()
    else:
        assert noise(model, reduction.model(), images) > 0.2

    def check(reduced: bytes) -> bool:
        tried.append(reduced)
        return noise(model, reduced, images) < bound

    repaired, in_float = lowered(model, precision, images, check)
    assert [name for name in in_float if name in names(model, "Conv")] == names(model, "Conv")[1:]
    assert not set(in_float) & set(names(model, "Gemm"))
    assert tried[-1] == repaired == reduction.model(in_float)
    if precision == "fp16":
        assert len(tried) == 1
        np.testing.assert_allclose(in_float16(repaired, images[:8]), logits(plain, images[:8]), rtol=0.02, atol=0.02)


def test_more_is_kept_in_growing_steps(plain, digits, precision):
    calls = []

    def never(reduced: bytes) -> bool:
        calls.append(reduced)
        return False

    with pytest.raises(PrecisionError, match=f"{precision}: the check fails even with all .* nodes in float32"):
        lowered(plain, precision, normalised(digits[0][:16]).numpy(), never)
    assert len(calls) == 4  # none, 1, 2 and all 4 groups: three convolutions and the linear layer
    types = [{held.name: held.data_type for held in onnx.load_from_string(call).graph.initializer} for call in calls]
    float32 = onnx.TensorProto.FLOAT
    in_float = [{name for name in held if held[name] == float32 and name.endswith("weight")} for held in types]
    assert [len(weights) for weights in in_float] == [0, 1, 2, 4]
    assert in_float[1] < in_float[2] < in_float[3]
