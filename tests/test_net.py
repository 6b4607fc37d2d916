"""The networks, against timm's layers, plain convolutions, and what the definition says."""

import pytest
import torch
from pydantic import ValidationError
from timm.layers import CondConv2d
from torch import nn

from model.net import Block, Conv, Dropout, ExpertNet, GateConfig, HeadConfig, ModelConfig, Pool, Residual
from model.presets import PRESETS, build

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


@pytest.mark.parametrize("gate", [GateConfig(), MLP, GateConfig(kind="mlp", hidden=(5, 7)), GateConfig(kind="uniform")])
def test_gate_is_a_distribution_for_each_image(gate):
    block = ExpertNet(only(Block(channels=8, kernels=(3,) * 4, gate=gate))).layers[0]
    gate_BK = block.gate(torch.randn(16, 6, 8, 8))
    torch.testing.assert_close(gate_BK.sum(1), torch.ones(16))
    assert gate_BK.shape == (16, 4)
    assert (gate_BK >= 0).all()
    assert (gate_BK.std(0).max() > 0) == (gate.kind != "uniform")


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
    net(torch.randn(8, 3, 32, 32)).logsumexp(1).sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize("name", PRESETS)
def test_output_size_is_that_of_the_network(name):
    for height, width in ((32, 32), (40, 24)):
        features = build(PRESETS[name]).eval().forward_features(torch.randn(1, 3, height, width))
        assert PRESETS[name].output_size(height, width) == features.shape[2:]


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
        (lambda: Dropout(p=1), "less than 1"),
        (lambda: Pool(op="min"), "'max' or 'avg'"),
        (lambda: Residual(layers=()), "at least 1"),
        (lambda: Residual(layers=(Conv(channels=8, padding=0),)), "padding"),
        (lambda: ModelConfig(layers=()), "at least 1"),
        (lambda: only(Conv(channels=8), head=HeadConfig(pool="")), "num_classes must be 0"),
    ],
)
def test_impossible_networks_are_refused(wrong, message):
    with pytest.raises(ValidationError, match=message):
        wrong()


def test_images_that_are_too_small_are_refused():
    with pytest.raises(ValueError, match="conv layer gets 1x1 pixels and leaves none"):
        PRESETS["macro_residual"].output_size(8, 8)


def test_config_is_frozen_and_hashable():
    config = PRESETS["two_block"]
    with pytest.raises(ValidationError, match="frozen"):
        config.num_classes = 3
    assert len({config, config.change(), config.change(num_classes=3)}) == 2
