"""What a network costs."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from model.config import Network
from model.registry import build


def cost(config: Network, height: int, width: int) -> tuple[int, int]:
    """Parameters, and multiply-accumulates of one image's forward pass (of convolutions and matrix products)."""
    with torch.device("meta"), torch.no_grad():
        net = build(config).eval()
        with FlopCounterMode(display=False) as counter:
            net(torch.empty(1, config.in_chans, height, width))
    return sum(parameter.numel() for parameter in net.parameters()), counter.get_total_flops() // 2
