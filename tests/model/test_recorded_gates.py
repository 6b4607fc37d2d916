"""The recorded weights of gates, against the gates themselves."""

import pytest
import torch

from expertgrid.model.config import Block, Conv, GateConfig, ModelConfig
from expertgrid.model.gates import gates, recorded
from expertgrid.model.net import ExpertNet

CONFIG = ModelConfig(
    num_classes=3,
    layers=(Conv(channels=4), Block(channels=6), Block(channels=6, kernels=(3,)), Block(channels=6, kernels=(3, 1))),
)


def test_weights_are_recorded_by_block_and_batch():
    torch.manual_seed(0)
    net = ExpertNet(CONFIG).eval()
    first, second = torch.randn(5, 3, 8, 8), torch.randn(2, 3, 8, 8)
    with torch.no_grad(), recorded(gates(net)) as weights:
        net(first)
        net(second)
        expected = net.layers[1].gate(net.layers[0](first))
    assert list(weights) == list(gates(net)) == ["layers.1", "layers.3"]  # one expert has no gate
    assert [tuple(gate_BK.shape) for gate_BK in weights["layers.3"]] == [(5, 2), (2, 2)]
    torch.testing.assert_close(weights["layers.1"][0], expected)


def test_nothing_is_recorded_outside_of_the_context():
    net = ExpertNet(CONFIG.change(layers=(Block(channels=4, gate=GateConfig(kind="uniform")),)))
    with pytest.raises(RuntimeError), recorded(gates(net)) as weights:
        net(torch.randn(1, 5, 8, 8))
    assert weights == {"layers.0": []}
    assert not any(module._forward_hooks for module in net.modules())
