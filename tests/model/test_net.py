"""The networks, against timm's layers, plain convolutions, and what the definition says."""

import pytest
import torch
from pydantic import ValidationError
from timm.layers import CondConv2d
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from expertgrid.model.config import (
    Block,
    Conv,
    Dropout,
    GateConfig,
    HeadConfig,
    ModelConfig,
    NormConfig,
    Pool,
    Residual,
    Whiten,
)
from expertgrid.model.cost import check_image_size
from expertgrid.model.net import ExpertNet, pixel_mean
from expertgrid.model.presets import PRESETS
from expertgrid.model.registry import build
from expertgrid.model.system.errors import InputError
from expertgrid.model.variants import vary

MLP = GateConfig(kind="mlp", reduction=4)


def only(*layers, **fields) -> ModelConfig:
    return ModelConfig(in_chans=6, layers=layers, **fields)


@pytest.mark.parametrize("experts", [2, 3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_experts_without_norm_and_activation_equal_condconv(experts, stride, kernel):
    torch.manual_seed(experts)
    gate = GateConfig(temperature=0.3)
    config = only(Block(channels=10, kernels=(kernel,) * experts, stride=stride, norm_act="none", gate=gate))
    block = ExpertNet(config).layers[0]
    for expert in block.experts:
        nn.init.normal_(expert.conv.bias)
    reference = CondConv2d(6, 10, kernel, stride, kernel // 2, bias=True, num_experts=experts)
    with torch.no_grad():
        reference.weight.copy_(torch.stack([expert.conv.weight.flatten() for expert in block.experts]))
        reference.bias.copy_(torch.stack([expert.conv.bias for expert in block.experts]))
    x_BCHW = torch.randn(4, 6, 8, 8)
    torch.testing.assert_close(block(x_BCHW), reference(x_BCHW, block.gate(x_BCHW)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm_act", ["expert", "mix"])
def test_one_expert_is_a_plain_conv_network(norm_act):
    config = only(Block(channels=8, kernels=(3,), norm_act=norm_act), Block(channels=8, kernels=(5,), stride=2))
    net = ExpertNet(config)
    plain = nn.Sequential(
        *(nn.Conv2d(6, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 5, 2, 2, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)),
    )
    plain.load_state_dict(dict(zip(plain.state_dict(), net.state_dict().values(), strict=True)))
    x_BCHW = torch.randn(4, 6, 9, 9)
    torch.testing.assert_close(net(x_BCHW), plain(x_BCHW))


FIXED = GateConfig(kind="uniform"), GateConfig(kind="constant")
SIZED = MLP, GateConfig(kind="mlp", hidden=(5, 7))


@pytest.mark.parametrize("gate", [GateConfig(), *SIZED, *FIXED, GateConfig(shuffled=True), GateConfig(frozen=True)])
def test_gate_is_a_distribution_for_each_image(gate):
    """A uniform one is not rounded to bfloat16."""
    block = ExpertNet(only(Block(channels=8, gate=gate))).layers[0]
    gate_BK = block.gate(torch.randn(16, 6, 8, 8))
    torch.testing.assert_close(gate_BK.sum(1), torch.ones(16))
    assert gate_BK.shape == (16, 3)
    assert (gate_BK >= 0).all()
    if gate.kind == "uniform":
        assert torch.equal(block.gate(torch.zeros(2, 6, 4, 4, dtype=torch.bfloat16)), torch.full((2, 3), 1 / 3))
    assert (gate_BK.std(0).max() > 0) == (gate not in FIXED)


class OtherLayouts(TorchDispatchMode):
    """The operators that write a map (B, C, H, W) which is not channels-last."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, list | tuple) else [result]:
            if isinstance(x, torch.Tensor) and x.ndim == 4 and min(x.shape[1:]) > 1 and 0 not in x.stride():
                self.found += [str(function)] * (not x.is_contiguous(memory_format=torch.channels_last))
        return result


@pytest.mark.parametrize("bfloat16", [False, True])
def test_gradients_of_a_gated_block_are_channels_last(bfloat16):
    block = ExpertNet(only(Block(channels=8, gate=MLP))).layers[0].to(memory_format=torch.channels_last)
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    x_BCHW = torch.randn(4, 6, 5, 7, dtype=dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        output_BCHW = block(x_BCHW)
    with OtherLayouts() as layouts:
        output_BCHW.backward(torch.randn_like(output_BCHW))
    assert layouts.found == []
    assert x_BCHW.grad.is_contiguous(memory_format=torch.channels_last)


def test_under_the_autocast_of_cuda_features_stay_in_the_type_of_the_maps():
    """PyTorch would sum in float32 there, and then write the gradient of the map in bfloat16, not channels-last."""
    before = torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)  # torch.autocast would not, where there is no CUDA device
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        with FakeTensorMode():
            x_BCHW = torch.empty(2, 6, 4, 4, dtype=torch.bfloat16, device="cuda")
            assert x_BCHW.sum((2, 3)).dtype == torch.float32
            assert pixel_mean(x_BCHW, training=True).dtype == torch.bfloat16
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.set_autocast_dtype("cuda", before)


@pytest.mark.parametrize("size", [(4, 4), (5, 7)])
def test_features_are_the_mean_of_the_pixels(size):
    """In training from a sum, in evaluation as the mean that exporters know."""
    x_BCHW = torch.randn(3, 6, *size)
    expected_BC = x_BCHW.double().mean((2, 3)).float()
    for training in (True, False):
        torch.testing.assert_close(pixel_mean(x_BCHW, training), expected_BC)


def test_controls_of_a_gate():
    gates = {"own": GateConfig(), "shuffled": GateConfig(shuffled=True), "frozen": GateConfig(frozen=True)}
    gates = {name: ExpertNet(only(Block(channels=8, gate=gate))).layers[0].gate for name, gate in gates.items()}
    gates["shuffled"].load_state_dict(gates["own"].state_dict())
    x_BCHW = torch.randn(5, 6, 8, 8)
    torch.testing.assert_close(gates["shuffled"](x_BCHW)[1:], gates["own"](x_BCHW)[:-1])
    torch.testing.assert_close(gates["shuffled"](x_BCHW)[0], gates["own"](x_BCHW)[-1])
    weights = {"mlp.0.weight", "mlp.0.bias"}
    for name, gate in gates.items():
        learned, fixed = (weights, set()) if name != "frozen" else (set(), weights)
        assert {name for name, _ in gate.named_parameters()} == learned
        assert {name for name, _ in gate.named_buffers()} == fixed
        assert gate.state_dict().keys() == weights


def test_a_constant_gate_is_learned_and_the_same_for_all_images():
    gate = ExpertNet(only(Block(channels=8, gate=GateConfig(kind="constant", temperature=2)))).layers[0].gate
    with torch.no_grad():
        gate.logits_K.copy_(torch.tensor([0.0, 2.0, 4.0]))
    gate_BK = gate(torch.randn(4, 6, 8, 8))
    torch.testing.assert_close(gate_BK, torch.tensor([0.0, 1.0, 2.0]).softmax(0).expand(4, 3))
    assert gate.logits_K.requires_grad


def test_temperature_flattens_the_gate():
    x_BCHW = torch.randn(16, 6, 8, 8)

    def entropy(temperature: float) -> float:
        torch.manual_seed(0)
        gate = GateConfig(temperature=temperature)
        gate_BK = ExpertNet(only(Block(channels=8, gate=gate))).layers[0].gate(x_BCHW)
        return torch.special.entr(gate_BK).sum(1).mean().item()

    assert entropy(0.1) < entropy(1) < entropy(10) < torch.tensor(3.0).log().item()


def test_block_is_the_weighted_sum_of_its_experts():
    block = ExpertNet(only(Block(channels=8, kernels=(3, 5, 1)))).layers[0].eval()
    x_BCHW = torch.randn(4, 6, 8, 8)
    experts_BKCHW = torch.stack([expert(x_BCHW) for expert in block.experts], dim=1)
    expected = torch.einsum("bk,bkchw->bchw", block.gate(x_BCHW), experts_BKCHW)
    torch.testing.assert_close(block(x_BCHW), expected)


def test_norm_after_the_mix_sees_the_mix():
    block = ExpertNet(only(Block(channels=8, norm_act="mix"))).layers[0]
    out = block(torch.randn(64, 6, 8, 8))
    normalised = block.norm_act[0](torch.randn(64, 8, 8, 8))
    assert (out >= 0).all()
    assert abs(normalised.mean()) < 0.01
    assert not [name for name, _ in block.named_parameters() if name.endswith("conv.bias")]


@pytest.mark.parametrize(
    ("channels", "stride", "projected"), [((6, 6), 1, False), ((6, 8), 1, True), ((6, 6), 2, True)]
)
def test_macro_block_adds_its_input(channels, stride, projected):
    layers = tuple(Block(channels=c, stride=s) for c, s in zip(channels, (stride, 1)))
    macro = ExpertNet(only(Residual(layers=layers))).layers[0].eval()
    x_BCHW = torch.randn(4, 6, 8, 8)
    torch.testing.assert_close(macro(x_BCHW), macro.layers(x_BCHW) + macro.shortcut(x_BCHW))
    assert isinstance(macro.shortcut, nn.Conv2d) == projected
    if projected:
        assert macro.shortcut.kernel_size == (1, 1)
    else:
        torch.testing.assert_close(macro.shortcut(x_BCHW), x_BCHW)


@pytest.mark.parametrize("name", PRESETS)
def test_every_parameter_gets_a_gradient(name):
    torch.manual_seed(0)
    net = build(PRESETS[name])
    net(torch.randn(2, 3, 32, 32)).logsumexp(1).sum().backward()
    gradients = {name: parameter.grad for name, parameter in net.named_parameters()}
    assert [name for name, grad in gradients.items() if grad is None or not grad.abs().sum() > 0] == []


def test_fixed_values_are_buffers():
    net = build(vary(PRESETS["speed"], "gate", "frozen"))
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    fixed = {name for name, _ in net.named_buffers() if not name.endswith(statistics)}
    norms = {f"{name}.weight" for name, module in net.named_modules() if isinstance(module, nn.BatchNorm2d)}
    gates = {f"layers.{i}.gate.mlp.0.{value}" for i in (2, 4, 6) for value in ("weight", "bias")}
    assert len(norms) == 6
    assert fixed == norms | gates | {"layers.0.conv.weight"}
    assert fixed < net.state_dict().keys()


@pytest.mark.parametrize("name", PRESETS)
def test_output_size_is_that_of_the_network(name):
    for height, width in ((32, 32), (40, 24)):
        features = build(PRESETS[name]).eval().forward_features(torch.randn(1, 3, height, width))
        assert PRESETS[name].output_size(height, width) == features.shape[2:]


def test_whitening_stem_whitens():
    x_BCHW = torch.rand(64, 3, 16, 16).cumsum(3).cumsum(2)  # neighbours are alike, as in photographs
    x_BCHW = (x_BCHW - x_BCHW.mean()) / x_BCHW.std()
    net = ExpertNet(PRESETS["speed"].change(layers=(Whiten(kernel=3), Conv(channels=4))))
    net.fit_stem(x_BCHW)
    stem = net.layers[0]
    patches_PF = nn.functional.unfold(x_BCHW.double(), 3).transpose(1, 2).flatten(0, 1)
    whitened_PF = patches_PF @ stem.conv.weight[:27].flatten(1).double().T
    covariance_FF = whitened_PF.T @ whitened_PF / len(whitened_PF)
    eigenvalues_F = torch.linalg.eigvalsh(patches_PF.T @ patches_PF / len(patches_PF)).flip(0)
    torch.testing.assert_close(covariance_FF, (eigenvalues_F / (eigenvalues_F + 5e-4)).diag(), atol=1e-3, rtol=0)
    torch.testing.assert_close(stem.conv.weight[27:], -stem.conv.weight[:27])
    assert stem(x_BCHW).shape == (64, 54, 14, 14)


def test_a_network_without_whitening_stem_has_none_to_fit():
    net = ExpertNet(PRESETS["two_block"])
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    net.fit_stem(torch.randn(2, 3, 8, 8))
    torch.testing.assert_close(net.state_dict(), before)


def test_dirac_convolutions_start_as_the_identity():
    net = ExpertNet(only(Conv(channels=8, norm_act=False), Block(channels=9, norm_act="none"), init="dirac"))
    conv, block = net.layers
    x_BCHW = torch.randn(2, 6, 5, 5)
    torch.testing.assert_close(conv(x_BCHW)[:, :6], x_BCHW)
    y_BCHW = conv(x_BCHW)
    torch.testing.assert_close(block.experts[0](y_BCHW)[:, :8], y_BCHW)
    assert all((expert(y_BCHW)[:, :8] - y_BCHW).abs().max() > 0.1 for expert in block.experts[1:])


def test_pooled_conv_is_pooled_before_its_norm():
    layer = ExpertNet(only(Conv(channels=8, pool=2), norm=NormConfig(momentum=0.4))).layers[0]
    x_BCHW = torch.randn(32, 6, 9, 9)
    pooled_BCHW = nn.functional.max_pool2d(layer.conv(x_BCHW), 2)
    torch.testing.assert_close(layer(x_BCHW), layer.norm(pooled_BCHW).relu())
    assert layer(x_BCHW).shape == (32, 8, 4, 4)
    expected_C = 0.6**3 * 0 + (1 - 0.6**3) * pooled_BCHW.mean((0, 2, 3))  # three batches
    torch.testing.assert_close(layer.norm.running_mean, expected_C)


def test_scaled_head_scales_what_enters_the_classifier():
    heads = [ExpertNet(only(Conv(channels=8), head=HeadConfig(scale=scale))).head for scale in (1.0, 0.25)]
    heads[1].load_state_dict(heads[0].state_dict())
    x_BCHW = torch.randn(2, 8, 5, 5)
    bias_N = heads[0].classifier.bias
    torch.testing.assert_close(heads[1](x_BCHW) - bias_N, 0.25 * (heads[0](x_BCHW) - bias_N))


def test_same_networks_are_equal():
    assert Block(channels=8, kernels=(3, 5)) == Block(channels=8, kernels=(5, 3))
    assert Block(channels=8, kernels=(3,), gate=MLP, norm_act="mix") == Block(channels=8, kernels=(3,), gate=None)
    by_reduction, by_size = (GateConfig(kind="mlp", **size) for size in ({"reduction": 4}, {"hidden": (16,)}))
    assert only(Conv(channels=64), Block(channels=64, gate=by_reduction)) == only(
        Conv(channels=64, padding=1), Block(channels=64, gate=by_size)
    )
    assert Block(channels=8) != Block(channels=8, gate=MLP)
    assert Block(channels=8, norm_act="mix") != Block(channels=8)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: Block(channels=0), "greater than or equal to 1"),
        (lambda: Block(channels=8, kernels=()), "at least 1"),
        (lambda: Block(channels=8, kernels=(4, 3)), "odd"),
        (lambda: Block(channels=8, gate=None), "needs a gate"),
        (lambda: Block(channels=8, gates="linear"), "not permitted"),
        (lambda: GateConfig(kind="mlp"), "hidden sizes"),
        (lambda: GateConfig(kind="mlp", hidden=(4,), reduction=2), "not both"),
        (lambda: GateConfig(kind="linear", hidden=(4,)), "no hidden layers"),
        (lambda: GateConfig(kind="uniform", temperature=2), "no temperature"),
        (lambda: GateConfig(temperature=0), "greater than 0"),
        (lambda: GateConfig(kind="constant", frozen=True), "same for all images"),
        (lambda: GateConfig(kind="uniform", shuffled=True), "same for all images"),
        (lambda: Dropout(p=1), "less than 1"),
        (lambda: Pool(op="min"), "'max' or 'avg'"),
        (lambda: Residual(layers=()), "at least 1"),
        (lambda: Residual(layers=(Conv(channels=8, padding=0),)), "padding"),
        (lambda: Residual(layers=(Conv(channels=8, pool=2),)), "no pooling"),
        (lambda: ModelConfig(layers=()), "at least 1"),
        (lambda: only(Conv(channels=8), Whiten()), "only the first layer"),
        (lambda: NormConfig(momentum=0), "greater than 0"),
        (lambda: only(Conv(channels=8), head=HeadConfig(pool="")), "num_classes must be 0"),
    ],
)
def test_impossible_networks_are_refused(wrong, message):
    with pytest.raises(ValidationError, match=message):
        wrong()


def test_images_that_are_too_small_are_refused():
    for name, layer, size in (("macro_residual", "conv", 8), ("segmented", "pool", 2)):
        with pytest.raises(ValueError, match=f"its {layer} layer gets 1x1 pixels and leaves none"):
            PRESETS[name].output_size(size, size)
        with pytest.raises(InputError, match=f"model it does not take the {size}x{size} images of mine: its {layer}"):
            check_image_size("it", PRESETS[name], (size, size), "mine")


def test_config_is_frozen_and_hashable():
    config = PRESETS["two_block"]
    with pytest.raises(ValidationError, match="frozen"):
        config.num_classes = 3
    assert len({config, config.change(), config.change(num_classes=3)}) == 2
