"""The floor of a step on paper: against counts by hand, and PyTorch's own count of operations."""

import json
from collections import Counter

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton", reason="there is no Triton")
from bench import floor
from model.config import Block, Conv, GateConfig, ModelConfig
from model.presets import PRESETS
from model.registry import build

BATCH, SIZE, CHANNELS, EXPERTS = 512, 32, 32, 3
H100 = floor.DEVICES["h100"]


def stack(blocks: int, **fields) -> ModelConfig:
    block = Block(channels=CHANNELS, kernels=(3,) * EXPERTS, gate=GateConfig(kind="mlp", reduction=4), **fields)
    return ModelConfig(layers=(Conv(channels=CHANNELS), *[block] * blocks))


def maps_of_a_block(fused: bool, **fields) -> float:
    """What one more block reads and writes, in maps of (B, C, H, W) in bfloat16."""
    more, fewer = (
        sum(part.bytes for part in floor.passes(stack(blocks, **fields), BATCH, SIZE, fused)) for blocks in (3, 2)
    )
    return (more - fewer) / (floor.BFLOAT16 * BATCH * CHANNELS * SIZE**2)


def test_operators_of_a_block_by_hand():
    conv, norm, relu = 2, 3, 2  # forwards: reads and writes; a norm reads twice; in place
    mix = 2 * EXPERTS + 3 * (EXPERTS - 1)
    backwards = (3 + 1) + 2 + 3 + 5 + 4  # product and sum for the gate, product for the map, ReLU, norm, two convs
    sums = 3 * (EXPERTS - 1) + 2  # of the input's gradients; that of the gate has no map
    pooling = 1
    expected = EXPERTS * (conv + norm + relu + backwards) + mix + sums + pooling
    assert maps_of_a_block(fused=False) == pytest.approx(expected, rel=0.03)  # and gate, weights and statistics


@pytest.mark.parametrize("norm_act", ["expert", "mix"])
def test_kernels_of_a_block_by_hand(norm_act):
    wide, k = 1 + EXPERTS, EXPERTS
    expected = wide + 2 * wide + 1 + 2  # the convolution, its two gradients, the gate's pooling and its gradient
    if norm_act == "expert":
        expected += k + wide + wide + (2 * k + 1)  # statistics, mix; sums, gradient
    else:
        expected += wide + (2 * k + 1) + 1 + 2 + 2 + 3  # the sum and its gradient; and these four, of one map
    assert maps_of_a_block(fused=True, norm_act=norm_act) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("name", ["eight_block", "mixed_kernel", "accuracy"])
def test_operations_are_pytorchs(name):
    config = PRESETS[name]
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        build(config).train()(torch.empty(BATCH, 3, 32, 32)).sum().backward()
    for fused in (False, True):
        assert sum(part.flops for part in floor.passes(config, BATCH, 32, fused)) == pytest.approx(
            counter.get_total_flops(), rel=1e-3
        )
    assert floor.floor(config, BATCH, 32, 32).flops == counter.get_total_flops()


def test_each_fusion_saves_what_it_leaves_out():
    found = floor.ways(stack(3), BATCH, SIZE, "adamw")
    sizes = [sum(part.bytes for part in parts) for parts in found.values()]
    assert sizes == sorted(sizes, reverse=True)
    map_bytes = floor.BFLOAT16 * BATCH * CHANNELS * SIZE**2
    operators, acts, kernels, pooled, gathered, _ = sizes
    assert operators - acts == pytest.approx((2 + 3) * (3 * EXPERTS + 1) * map_bytes, rel=0.01)
    assert kernels - pooled == pytest.approx(3 * (1 + 2) * map_bytes, rel=0.01)
    assert pooled - gathered == pytest.approx((3 * EXPERTS + 1) * map_bytes, rel=0.01)
    assert Counter(part.name for part in found["kernels"])["_tile_statistics"] == 4
    assert found["least"][-1] == floor.optimiser(build(stack(3)), "adamw")


def test_a_pass_takes_the_longer_of_its_two_times():
    busy = floor.Pass(name="matrix product", flops=989 * 10**9, bytes=1)
    moving = floor.Pass(name="copy", flops=1, bytes=335 * 10**7)
    assert [part.seconds(H100) for part in (busy, moving)] == pytest.approx([1e-3, 1e-3])
    (row,) = floor.rows({"both": [busy, moving]}, H100)
    assert (row["at least ms"], row["of the bf16 peak %"]) == ("2.000", "50.0")


def test_muon_has_products_and_one_moment():
    net = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3, bias=False), torch.nn.BatchNorm2d(8))
    adam, muon = floor.optimiser(net, "adamw"), floor.optimiser(net, "muon")
    assert (adam.flops, adam.bytes) == (0, 32 * (288 + 16))
    assert muon.flops == 5 * (4 * 8 * 8 * 36 + 2 * 8**3)
    assert muon.bytes == 32 * 16 + 20 * 288 + 5 * 2 * (3 * 288 + 4 * 64)


def test_devices_are_known_by_pytorchs_names():
    assert floor.rates_of("NVIDIA H100 80GB HBM3").bytes_per_s == 3.35e12
    assert floor.rates_of("NVIDIA H200").bytes_per_s == 4.8e12
    for other in ("NVIDIA H100 PCIe", "NVIDIA A100-SXM4-80GB", "cpu (AMD EPYC 9654)"):
        assert floor.rates_of(other) is None


def test_the_command(capsys):
    assert floor.main(["two_block", "--batch", "4", "--size", "8", "--device", "h200", "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["operators", "norm+act", "kernels", "+pool", "+statistics", "least"]
    assert floor.main(["two_block", "--batch", "4", "--size", "8"]) == 0
    assert "on H100 80GB HBM3 by its data sheet: 989 TFLOP/s, 3.35 TB/s" in capsys.readouterr().out
    for wrong, reason in (
        (("speed", "--size", "4"), "leaves none"),
        (("resnet18",), "unknown preset 'resnet18'"),
        (("two_block", "--device", "a100"), "Invalid value for '--device'"),
    ):
        assert floor.main(wrong) == 2
        complaint = capsys.readouterr().err
        assert complaint.startswith("error: ")
        assert reason in complaint
        assert complaint.count("\n") == 1
