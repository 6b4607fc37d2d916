"""The cost of a network, worked out from its config, against PyTorch's counters on the network itself."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from expertgrid.model.config import (
    Block,
    Conv,
    GateConfig,
    HeadConfig,
    ModelConfig,
    Network,
    Residual,
    TimmModel,
    Whiten,
)
from expertgrid.model.cost import cost
from expertgrid.model.presets import PRESETS
from expertgrid.model.registry import build
from expertgrid.model.variants import VARIANTS, vary

LEVELS = {
    "depth": [0.5],
    "experts": [1, 3],
    "kernel": [[3, 5]],
    "norm_act": ["mix", "none"],
    "residual": [True, False],
    "width": [0.3],
    "matched": ["params", "macs"],
    "gate": ["mlp", "uniform", "constant", "frozen"],
}


def counted(config: Network, height: int, width: int) -> tuple[int, int]:
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        net = build(config).eval()
        net(torch.empty(1, config.in_chans, height, width))
    return sum(parameter.numel() for parameter in net.parameters()), counter.get_total_flops() // 2


@pytest.mark.parametrize("name", PRESETS)
def test_cost_of_presets_is_what_pytorch_counts(name):
    assert cost(PRESETS[name], 41, 26) == counted(PRESETS[name], 41, 26)


def test_all_variants_are_counted():
    assert LEVELS.keys() == VARIANTS.keys()


@pytest.mark.parametrize("name", ["eight_block", "segmented", "macro_residual", "mixed_kernel", "speed"])
def test_cost_of_variants_is_what_pytorch_counts(name):
    config = vary(PRESETS[name], "depth", 0.25)
    for variant, levels in LEVELS.items():
        for level in levels:
            changed = vary(config, variant, level)
            assert cost(changed, 32, 32) == counted(changed, 32, 32), (variant, level)


ODD = {
    "strides and pooling": (
        Conv(channels=7, kernel=5, stride=3, padding=0, pool=2, norm_act=False),
        Residual(layers=(Block(channels=7, stride=2), Conv(channels=7, kernel=1, stride=2))),
    ),
    "nested macro blocks": (Residual(layers=(Residual(layers=(Conv(channels=3),)), Block(channels=5))),),
    "stem of three pixels": (Whiten(kernel=3), Conv(channels=8)),
    "two hidden layers": (Block(channels=8, gate=GateConfig(kind="mlp", hidden=(5, 9))),),
}


@pytest.mark.parametrize("layers", ODD.values(), ids=ODD)
@pytest.mark.parametrize("head", [HeadConfig(hidden=(6, 4)), HeadConfig(pool="")], ids=["hidden", "no head"])
def test_cost_of_other_layers(layers, head):
    config = ModelConfig(layers=layers, head=head, num_classes=10 if head.pool else 0)
    assert cost(config, 35, 39) == counted(config, 35, 39)


def test_timm_models_are_counted():
    config = TimmModel(timm="resnet18", num_classes=10)
    assert cost(config, 32, 32) == counted(config, 32, 32)
    assert cost(config, 32, 32)[0] == 11_181_642  # 11,689,512 of the paper's network, with 10 classes in place of 1000
