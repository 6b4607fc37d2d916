"""The variants: each on each preset, what it changes and what it leaves."""

from itertools import product

import pytest
import torch
from torch import nn

from expertgrid.model.config import Block, Conv, GateConfig, ModelConfig, Residual
from expertgrid.model.cost import cost
from expertgrid.model.presets import PRESETS
from expertgrid.model.registry import build
from expertgrid.model.system.errors import InputError
from expertgrid.model.variants import MATCHED, matched_difference, vary


@pytest.fixture(params=PRESETS)
def config(request) -> ModelConfig:
    return PRESETS[request.param]


def test_experts(config):
    for count in (1, 2, 5):
        blocks = list(vary(config, "experts", count).blocks())
        assert {len(block.kernels) for block in blocks} == {count}
        assert all((block.gate is None) == (count == 1) for block in blocks)
    single = vary(config, "experts", 1)
    assert {vary(single, "gate", gate) for gate in ("linear", "mlp", "uniform")} == {single}


def test_kernels_are_taken_in_turn(config):
    for sizes, expected in (([3, 5], (5, 3, 3)), ([5, 3], (5, 5, 3))):
        blocks = vary(vary(config, "experts", 3), "kernel", sizes).blocks()
        assert {block.kernels for block in blocks} == {expected}
    assert {block.kernels for block in vary(PRESETS["mixed_kernel"], "experts", 3).blocks()} == {(5, 5, 3)}


def test_own_level_changes_nothing(config):
    block = next(config.blocks())
    assert vary(config, "experts", len(block.kernels)) == config
    assert block.gate is None or vary(config, "gate", block.gate.kind) == config
    assert vary(config, "norm_act", block.norm_act) == config
    assert vary(config, "width", 1) == vary(config, "depth", 1) == config


@pytest.mark.parametrize("equal", MATCHED)
@pytest.mark.parametrize("factor", [1, 0.25])
def test_matched_baselines_cost_the_same(config, factor, equal):
    config = vary(config, "width", factor)
    baseline = vary(config, "matched", equal)
    assert {len(block.kernels) for block in baseline.blocks()} == {1}
    ours, target = (cost(network, 32, 32)[MATCHED.index(equal)] for network in (baseline, config))
    assert ours == pytest.approx(target, rel=0.03)
    assert matched_difference(config, equal) == pytest.approx((ours - target) / target, abs=1e-12)
    assert vary(baseline, "gate", "frozen") == baseline


def test_widths_of_matched_baselines_are_multiples_of_8(config):
    for factor, equal in product((1, 0.3), MATCHED):
        with torch.device("meta"):
            net = build(vary(vary(config, "width", factor), "matched", equal))
        sizes = [module.out_channels for module in net.modules() if isinstance(module, nn.Conv2d)]
        sizes += [module.out_features for module in net.head.hidden if isinstance(module, nn.Linear)]
        assert sizes
        assert {size % 8 for size in sizes} == {0}


def test_only_narrow_baselines_have_unequal_widths():
    for preset in ("two_block", "eight_block"):
        assert len({layer.channels for layer in vary(PRESETS[preset], "matched", "params").layers}) == 1
    narrow = vary(vary(PRESETS["eight_block"], "width", 0.25), "matched", "params")
    assert [layer.channels for layer in narrow.layers] == [24] * 5 + [32] * 4
    assert abs(matched_difference(vary(PRESETS["eight_block"], "width", 0.25), "params")) < 0.01


def test_a_network_that_cannot_be_wide_enough_shows_its_difference():
    config = ModelConfig(layers=(Block(channels=4000, kernels=(3,) * 64),))
    (layer,) = vary(config, "matched", "params").layers
    assert layer.channels <= 4096
    assert matched_difference(config, "params") < -0.9


def test_controls_leave_the_kind_of_gate(config):
    for control in ("frozen", "shuffled"):
        before, after = config.blocks(), vary(config, "gate", control).blocks()
        for own, changed in zip(before, after, strict=True):
            assert changed.gate == (own.gate and own.gate.change(**{control: True}))


def test_residual_pairs_blocks_and_leaves_what_is_there():
    layers = vary(PRESETS["eight_block"], "residual", True).layers
    assert [type(layer) for layer in layers] == [Conv] + [Residual] * 4
    assert vary(PRESETS["macro_residual"], "residual", True) == PRESETS["macro_residual"]
    three = ModelConfig(layers=(Block(channels=8),) * 3)
    assert [type(layer) for layer in vary(three, "residual", True).layers] == [Residual, Block]


def test_residual_leaves_no_macro_block_and_all_blocks(config):
    opened = vary(config, "residual", False)
    assert not [layer for layer in opened.layers if isinstance(layer, Residual)]
    assert list(opened.blocks()) == list(config.blocks())


def test_gate_sizes():
    hidden = {block.gate.hidden for block in vary(PRESETS["macro_residual"], "gate", "mlp").blocks()}
    assert hidden == {(8,), (16,), (32,), (64,), (96,)}  # a quarter of 3, 64, 128, 256 and 384 channels, at least 8


def test_width_scales_channels_and_hidden_sizes():
    wide = vary(PRESETS["two_block"], "width", 2)
    assert [layer.channels for layer in wide.layers] == [128] * 3
    assert [block.gate.hidden for block in wide.blocks()] == [(32,)] * 2
    assert vary(PRESETS["macro_residual"], "width", 0.5).head.hidden == (64,)


def test_depth_repeats_without_stride():
    config = ModelConfig(layers=(Block(channels=8, stride=2), Block(channels=16), Block(channels=16)))
    deep = vary(config, "depth", 2)
    assert [(block.channels, block.stride) for block in deep.blocks()] == [(8, 2), (8, 1)] + [(16, 1)] * 4
    assert len(list(vary(PRESETS["eight_block"], "depth", 0.375).blocks())) == 3
    assert build(deep)(torch.randn(2, 3, 16, 16)).shape == (2, 10)


def test_temperature_survives_another_variant():
    gate = GateConfig(temperature=4.0)
    changed = vary(ModelConfig(layers=(Block(channels=8, gate=gate),)), "experts", 2)
    assert [block.gate for block in changed.blocks()] == [gate]


@pytest.mark.parametrize(
    ("name", "level", "accepted"),
    [
        ("experts", 0, "1 to 64"),
        ("experts", 65, "1 to 64"),
        ("experts", 2.5, "1 to 64"),
        ("experts", True, "1 to 64"),
        ("kernel", 4, "odd"),
        ("kernel", [], "size"),
        ("kernel", "3", "size"),
        ("gate", "lin", "linear, mlp, uniform"),
        ("gate", 1, "linear, mlp, uniform"),
        ("gate", {"kind": "mlp"}, "hidden sizes"),
        ("matched", True, "false, params, macs"),
        ("matched", "flops", "false, params, macs"),
        ("norm_act", "both", "'expert', 'mix' or 'none'"),
        ("residual", 1, "true or false"),
        ("width", 0, "above 0"),
        ("width", "2", "above 0"),
        ("depth", -1, "above 0"),
    ],
)
def test_wrong_levels_are_refused_by_name(name, level, accepted):
    with pytest.raises(InputError) as error:
        vary(PRESETS["two_block"], name, level)
    assert str(error.value).startswith(f"{name}: {level!r} is not accepted: ")
    assert accepted in str(error.value)
