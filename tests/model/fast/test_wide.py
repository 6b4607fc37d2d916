"""Experts side by side: the same numbers as apart, and which blocks can be wide."""

import copy

import pytest
import torch
from torch import nn

from expertgrid.model.config import Block, GateConfig, ModelConfig
from expertgrid.model.fast.compiled import compile_blocks
from expertgrid.model.fast.wide import WideBlock, can_be_wide
from expertgrid.model.net import ExpertNet
from expertgrid.model.presets import PRESETS
from expertgrid.model.registry import build
from expertgrid.model.variants import vary

BLOCKS = {
    "three experts": Block(channels=6),
    "stride": Block(channels=6, kernels=(5, 5), stride=2),
    "two of each size": Block(channels=6, kernels=(3, 3, 1, 1)),
    "norm after the mix": Block(channels=6, norm_act="mix"),
    "two sizes and norm after the mix": Block(channels=6, kernels=(5, 5, 3), norm_act="mix"),
    "uniform gate": Block(channels=6, gate=GateConfig(kind="uniform")),
}


def step(block: nn.Module, x_BCHW: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output, gradients and statistics after one training pass."""
    x_BCHW = x_BCHW.clone().requires_grad_()
    output_BCHW = block.train()(x_BCHW)
    output_BCHW.sin().sum().backward()
    values = {"output": output_BCHW.detach(), "input's gradient": x_BCHW.grad, **dict(block.named_buffers())}
    return values | {name: parameter.grad for name, parameter in block.named_parameters()}


@pytest.mark.parametrize("name", BLOCKS)
def test_wide_blocks_compute_what_blocks_do(name):
    torch.manual_seed(0)
    block = ExpertNet(ModelConfig(layers=(BLOCKS[name],))).layers[0].double()
    for parameter in block.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 0.5)
    wide, x_BCHW = copy.deepcopy(block), torch.randn(4, 3, 7, 5, dtype=torch.float64)
    assert can_be_wide(wide.config)
    wide.__class__ = WideBlock
    wide_values, expected = step(wide, x_BCHW), step(block, x_BCHW)
    assert list(wide.state_dict()) == list(block.state_dict())
    for what, value in expected.items():
        assert torch.allclose(wide_values[what].double(), value.double(), rtol=1e-9, atol=1e-9), what
    torch.testing.assert_close(wide.eval()(x_BCHW), block.eval()(x_BCHW))


@pytest.mark.parametrize("fields", [{"kernels": (3,)}, {"kernels": (3, 1)}, {"norm_act": "none"}])
def test_what_has_nothing_to_join_is_left(fields):
    assert not can_be_wide(Block(channels=4, **fields))


@pytest.mark.parametrize(("name", "count"), [("mixed_kernel", 7), ("eight_block", 8), ("speed", 0)])
def test_compiled_networks_are_wide_where_they_can_be(name, count):
    net = build(vary(PRESETS[name], "width", 0.0625))
    compile_blocks(net, [torch.randn(2, 3, 32, 32)], False, backend=lambda graph, inputs: graph)
    torch._dynamo.reset()
    assert sum(isinstance(part, WideBlock) for part in net.modules()) == count


@pytest.mark.parametrize("name", ["three experts", "two sizes and norm after the mix"])
def test_wide_blocks_are_compiled_in_one_piece(name):
    """In pieces they took three times as long."""
    block = ExpertNet(ModelConfig(layers=(BLOCKS[name],))).layers[0]
    block.__class__ = WideBlock
    torch.compile(block, backend="eager", fullgraph=True)(torch.randn(2, 3, 7, 5))
    torch._dynamo.reset()
