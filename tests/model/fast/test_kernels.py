"""The Triton kernels against the plain modules in float64.

Without a GPU they run in Triton's interpreter (see conftest), which is NumPy. On one `pytest -m gpu` runs them, too.
"""

import copy
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn

from expertgrid.ablations.study.study import Study
from expertgrid.model.config import Block, Conv, GateConfig, ModelConfig, Residual, TimmModel, Whiten
from expertgrid.model.fast.compiled import unfused
from expertgrid.model.fast.execution import ExecutionOptions
from expertgrid.model.fast.settings import full_fp32, set_for_training
from expertgrid.model.net import ExpertNet, Gate
from expertgrid.model.presets import PRESETS
from expertgrid.model.registry import build
from expertgrid.model.training import loop
from expertgrid.model.training.data import Images
from expertgrid.model.training.loop import start, train
from expertgrid.model.training.prepare import prepare
from expertgrid.model.training.splits import Splits
from expertgrid.model.variants import vary

kernels = pytest.importorskip("expertgrid.model.fast.kernels", reason="there is no Triton", exc_type=ImportError)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] * (DEVICE == "cuda")


@pytest.fixture(autouse=True)
def in_full_fp32():
    """On a GPU convolutions are in TF32 unless they are told not to, which is further off than a kernel may be."""
    with full_fp32():
        yield


PARTS = {
    "three experts": (Block(channels=8), (4, 6, 6)),
    "stride, and sizes that fill no tile": (Block(channels=24, kernels=(5, 5), stride=2), (3, 9, 7)),
    "more channels than a tile has columns": (Block(channels=200, kernels=(1, 1)), (2, 5, 5)),
    "several tiles an image": (Block(channels=64, kernels=(1,) * 4), (2, 16, 16)),
    "one image of one pixel more than a tile": (Block(channels=128, kernels=(1, 1)), (1, 11, 3)),
    "uniform gate": (Block(channels=8, gate=GateConfig(kind="uniform")), (2, 4, 4)),
    "mlp gate": (Block(channels=8, gate=GateConfig(kind="mlp", reduction=2)), (2, 4, 4)),
    "one expert": (Block(channels=8, kernels=(3,)), (2, 4, 4)),
    "conv": (Conv(channels=12, padding=0), (3, 6, 5)),
    "pooled conv": (Conv(channels=12, pool=2), (3, 7, 6)),
    "norm after the mix": (Block(channels=24, norm_act="mix"), (3, 6, 5)),
    "two kernel sizes": (Block(channels=8, kernels=(5, 5, 3), norm_act="mix"), (3, 6, 5)),
}


def with_kernels(net: nn.Module) -> nn.Module:
    fused = copy.deepcopy(net)
    kernels.fuse(fused)
    return fused


def step(net: nn.Module, x_BCHW: torch.Tensor, weights_BCHW: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output, all gradients and all statistics after one training pass."""
    x_BCHW = x_BCHW.clone().requires_grad_()
    output_BCHW = net.train()(x_BCHW)
    (output_BCHW * weights_BCHW).sum().backward()
    values = {"output": output_BCHW.detach(), "input's gradient": x_BCHW.grad, **dict(net.named_buffers())}
    return values | {name: parameter.grad for name, parameter in net.named_parameters()}


def in_parts(layer: Block | Conv, shape: tuple[int, int, int]) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A net of one layer whose norms are not at their start, its input, and weights of its output."""
    images, height, width = shape
    torch.manual_seed(0)
    net = ExpertNet(ModelConfig(in_chans=3, layers=(layer,))).layers.to(DEVICE)
    for parameter in net.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 0.5)
    x_BCHW = torch.randn(images, 3, height, width, device=DEVICE).contiguous(memory_format=torch.channels_last) + 0.5
    return net, x_BCHW, torch.randn_like(copy.deepcopy(net)(x_BCHW))


@pytest.mark.parametrize("name", PARTS)
def test_kernels_compute_what_the_plain_modules_do(name):
    net, x_BCHW, weights_BCHW = in_parts(*PARTS[name])
    fused = with_kernels(net)
    assert type(fused[0]) in (kernels.FusedBlock, kernels.FusedConv)
    fused_values = step(fused, x_BCHW, weights_BCHW)
    expected = step(net.double(), x_BCHW.double(), weights_BCHW.double())
    assert fused_values.keys() == expected.keys()
    for what, value in expected.items():
        assert (fused_values[what] - value).double().norm() <= 1e-4 * value.double().norm() + 1e-6, what


GATES = {
    "linear": (GateConfig(), 24),
    "more inputs than a program has columns": (GateConfig(temperature=0.5), 150),
    "one hidden layer": (GateConfig(kind="mlp", hidden=(24,), temperature=2.0), 20),
    "more hidden units than a program has rows": (GateConfig(kind="mlp", hidden=(20,)), 150),
    "several hidden layers, the last in the kernel": (GateConfig(kind="mlp", hidden=(30, 20)), 10),
    "hidden layers that are too large": (GateConfig(kind="mlp", hidden=(140, 140)), 6),
    "shuffled": (GateConfig(shuffled=True), 24),
    "frozen": (GateConfig(kind="mlp", hidden=(9,), frozen=True), 24),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", GATES)
def test_the_kernel_of_a_gate_computes_what_the_gate_does(name, dtype):
    """From the same features, which the plain gate has from the same sum: so tolerances are those of float32."""
    config, channels = GATES[name]
    torch.manual_seed(0)
    gate = Gate(config, channels, experts=3).to(DEVICE)
    with torch.no_grad():
        for value in gate.state_dict().values():
            value.mul_(3)
    x_BCHW = torch.randn(33, channels, 3, 5, device=DEVICE).to(dtype).contiguous(memory_format=torch.channels_last)
    weights_BK = torch.randn(33, 3, device=DEVICE)
    results = []
    for form in ("kernel", "plain"):
        x_BCHW = x_BCHW.detach().clone().requires_grad_()
        gate.zero_grad()
        if form == "kernel":
            gate_BK = kernels._gate_weights(gate, x_BCHW)
        else:
            gate_BK = gate.double().routed(x_BCHW.sum((2, 3)).double() / 15)
        (gate_BK * weights_BK).sum().backward()
        results.append([gate_BK.detach(), x_BCHW.grad, *[p.grad.clone() for p in gate.parameters()]])
    in_kernel, expected = results
    assert in_kernel[0].dtype == torch.float32
    assert len(in_kernel) == 2 + len(list(gate.parameters()))
    for a, b in zip(in_kernel, expected):
        rounding = 2**-7 if a.dtype == torch.bfloat16 else 1e-4
        assert (a - b).double().norm() <= rounding * b.double().norm()


def test_gates_take_few_launches(monkeypatch):
    """One kernel after the pooling, and backwards one and one more for each layer; none where nothing is learned."""
    launches = []
    for name in ("_gate", "_gate_gradient", "_layer_gradient"):
        monkeypatch.setattr(kernels, name, Counted(getattr(kernels, name), name, launches))
    for config, expected in (
        (GateConfig(kind="mlp", hidden=(8,)), {"_gate": 1, "_gate_gradient": 1, "_layer_gradient": 2}),
        (GateConfig(), {"_gate": 1, "_gate_gradient": 1, "_layer_gradient": 1}),
        (GateConfig(frozen=True), {"_gate": 1, "_gate_gradient": 1}),
    ):
        launches.clear()
        x_BCHW = torch.randn(4, 6, 3, 3, device=DEVICE, requires_grad=True)
        kernels._gate_weights(Gate(config, 6, experts=2).to(DEVICE), x_BCHW).square().sum().backward()
        assert Counter(launches) == expected


class Counted:
    """A kernel that notes its launches."""

    def __init__(self, kernel, name: str, launches: list[str]):
        self.kernel, self.name, self.launches = kernel, name, launches

    def __getitem__(self, grid):
        self.launches.append(self.name)
        return self.kernel[grid]


def test_statistics_of_many_tiles_and_of_many_steps_in_a_tile(monkeypatch):
    layer, shape = Block(channels=8), (2, 9, 7)
    for tile, programs in ((32, 10**6), (32, 3)):
        monkeypatch.setattr(kernels, "TILE", tile)
        monkeypatch.setattr(kernels, "MOST_PROGRAMS", programs)
        net, x_BCHW, weights_BCHW = in_parts(layer, shape)
        fused_values = step(with_kernels(net), x_BCHW, weights_BCHW)
        for what, value in step(net.double(), x_BCHW.double(), weights_BCHW.double()).items():
            assert (fused_values[what] - value).double().norm() <= 1e-4 * value.double().norm() + 1e-6, what


@pytest.mark.parametrize(
    ("precision", "share"), [("bf16", 5e-3), pytest.param("tf32", 1e-3, marks=pytest.mark.gpu)], ids=["bf16", "tf32"]
)
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (Block(channels=16, kernels=(1, 1, 1)), (4, 16, 16)),
        pytest.param(Block(channels=64), (16, 32, 32), marks=pytest.mark.gpu),
        pytest.param(Block(channels=64, kernels=(5, 5, 3), norm_act="mix"), (16, 32, 32), marks=pytest.mark.gpu),
        pytest.param(Conv(channels=64), (16, 32, 32), marks=pytest.mark.gpu),
    ],
    ids=["one pixel", "three experts", "norm after the mix", "conv"],
)
def test_kernels_are_as_near_to_float64_as_the_plain_modules(layer, shape, precision, share):
    net, x_BCHW, weights_BCHW = in_parts(layer, shape)
    plain, fused = copy.deepcopy(net), with_kernels(net)
    if precision == "tf32":
        set_for_training()
    with torch.autocast(DEVICE, torch.bfloat16, enabled=precision == "bf16"):
        by_kernels, by_modules = step(fused, x_BCHW, weights_BCHW), step(plain, x_BCHW, weights_BCHW)
    assert by_kernels["output"].dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
    for what, value in step(net.double(), x_BCHW.double(), weights_BCHW.double()).items():
        error, plain_error = ((values[what] - value).double().norm() for values in (by_kernels, by_modules))
        assert error <= 2 * plain_error + share * value.double().norm(), what


@pytest.mark.parametrize(
    ("preset", "width"),
    [
        pytest.param("two_block", 0.0625, marks=pytest.mark.nightly),  # half a minute in the interpreter
        pytest.param("eight_block", 1.0, marks=pytest.mark.gpu),
    ],
)
def test_a_training_with_kernels_and_graphs_has_the_losses_of_a_plain_one(preset, width, digits, monkeypatch):
    """Six steps in float32, with graphs on CUDA."""
    monkeypatch.setattr(loop, "set_for_training", lambda: None)  # it would allow TF32
    few = replace(digits, train=Images(digits.train.pixels_BHWC[:96], digits.train.labels_B[:96]))
    settings = {"width": width, "recipe.batch_size": 16, "recipe.epochs": 1, "recipe.amp": "off"}
    study = Study(name="test", question="?", seeds=1, base={"model": preset}, set=settings)
    trial, splits = study.cells(digits)[0].trials[0], Splits.undivided(few, torch.device(DEVICE))
    losses = []
    for features in ("off", "on"):
        options = ExecutionOptions(kernels=features, compile="off", graphs=features if DEVICE == "cuda" else "off")
        training = start(trial, splits)
        assert prepare(trial, splits, training, options, steps=6).plan.kernels == (features == "on")
        losses.append(next(train(trial, splits, training)).train_loss)
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_a_variance_far_below_the_mean_is_not_lost():
    """Where statistics are the sum of squares less the square of the mean, this one would be gone."""
    y_BFHW = 1000 + 0.1 * torch.randn(2, 16, 24, 24, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    affine_2F = torch.tensor([[1.0], [0.0]], device=DEVICE).repeat(1, 16)
    _, mean_F, variance_F = kernels.NormActMix.apply(y_BFHW, None, affine_2F, 1e-5)
    expected = torch.var_mean(y_BFHW.double(), (0, 2, 3))
    torch.testing.assert_close(variance_F.double(), expected[0], rtol=1e-3, atol=0)
    torch.testing.assert_close(mean_F.double(), expected[1], rtol=1e-6, atol=0)


def test_a_nan_is_not_hidden():
    net, x_BCHW, _ = in_parts(*PARTS["three experts"])
    x_BCHW[0, 0, 0, 0] = float("nan")
    assert with_kernels(net).train()(x_BCHW).isnan().any()


def test_evaluation_names_and_weights_are_as_before():
    net = build(vary(PRESETS["macro_residual"], "width", 0.0625)).to(DEVICE).eval()
    fused = with_kernels(net)
    assert list(fused.state_dict()) == list(net.state_dict())
    x_BCHW = torch.randn(2, 3, 32, 32, device=DEVICE)
    assert torch.equal(fused.eval()(x_BCHW), net(x_BCHW))
    assert kernels.use_kernels(build(TimmModel(timm="test_resnet.r160_in1k")), [x_BCHW], False) == 0
    before = copy.deepcopy(net.state_dict())
    assert kernels.use_kernels(net, [x_BCHW], False) > 0
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("name", PRESETS)
def test_the_parts_that_have_kernels_are_those_that_are_said_to(name):
    config = PRESETS[name]
    with torch.device("meta"):
        fused = with_kernels(build(config))
    fused_blocks = sum(isinstance(part, kernels.FusedBlock) for part in fused.modules())
    assert fused_blocks == sum(map(kernels.has_kernels, config.blocks()))
    assert fused_blocks == len(list(config.blocks())), "all presets train with kernels"
    assert not any(unfused(fused))


def test_what_has_no_kernels_stays_as_it_is():
    sizes = Block(channels=8, kernels=(3, 1)), Block(channels=8, kernels=(5, 3, 1), norm_act="mix")
    bare = Block(channels=8, norm_act="none"), Conv(channels=8, norm_act=False)
    net = build(ModelConfig(layers=(Whiten(), *sizes, Residual(layers=bare))))
    assert kernels.use_kernels(net, [torch.randn(2, 3, 12, 12)], False) == 0
    assert len(list(unfused(net))) == 4, "the blocks and the convolution are left to the compiler"
