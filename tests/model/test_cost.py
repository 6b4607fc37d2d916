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
    "experts": [1, 2, 5],
    "kernel": [1, 5, [3, 5]],
    "gate": [
        *("linear", "mlp", "uniform", "constant", "own", "frozen", "shuffled"),
        *({"kind": "linear", "frozen": True}, {"kind": "linear", "shuffled": True}),
        {"kind": "mlp", "hidden": [6, 6], "temperature": 2.0},
    ],
    "matched": [False, "params", "macs"],
    "norm_act": ["expert", "mix", "none"],
    "residual": [True, False],
    "width": [0.3, 1.5],
    "depth": [0.5, 2],
}
CASES = [(name, level) for name, levels in LEVELS.items() for level in levels]


def counted(config: Network, height: int, width: int) -> tuple[int, int]:
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        net = build(config).eval()
        logits_BN = net(torch.empty(1, config.in_chans, height, width))
    assert logits_BN.shape == (1, config.num_classes) or not config.num_classes
    return sum(parameter.numel() for parameter in net.parameters()), counter.get_total_flops() // 2


@pytest.mark.parametrize("config", [*PRESETS.values(), TimmModel(timm="resnet18", num_classes=10)])
def test_cost_of_networks_is_what_pytorch_counts(config):
    assert cost(config, 41, 26) == counted(config, 41, 26)


def test_all_variants_are_tried():
    assert LEVELS.keys() == VARIANTS.keys()


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("name", "level"), CASES)
def test_each_variant_applies_to_each_preset_and_costs_what_pytorch_counts(preset, name, level):
    changed = vary(PRESETS[preset], name, level)
    assert cost(changed, 32, 32) == counted(changed, 32, 32)
    assert vary(changed, name, level) == changed or name in ("width", "depth")


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


def test_parameters_of_a_timm_model_are_those_of_its_paper():
    """With 10 classes in place of 1000: 11,689,512 in the paper."""
    assert cost(TimmModel(timm="resnet18", num_classes=10), 32, 32)[0] == 11_181_642
