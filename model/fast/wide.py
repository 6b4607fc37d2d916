"""Expert blocks that train with the experts of one kernel size as one convolution of all their channels.

Their input is read once, and its gradients are summed within the convolution. Shapes: B images, K experts of C
channels, F = the channels of the experts that are side by side.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import Block
from model.net import ConvNormAct, ExpertBlock


def by_size(block: ExpertBlock) -> list[list[ConvNormAct]]:
    """The experts of each kernel size, in their order, which is by size."""
    kernels = block.config.kernels
    return [[part for part, kernel in zip(block.experts, kernels) if kernel == size] for size in dict.fromkeys(kernels)]


def side_by_side(x_BCHW: Tensor, parts: Sequence[ConvNormAct]) -> Tensor:
    """The convolutions of all parts, which have one kernel size and no bias, as one: (B, F, H, W)."""
    conv = parts[0].conv
    weight_FCkk = torch.cat([part.conv.weight for part in parts]) if len(parts) > 1 else conv.weight
    return F.conv2d(x_BCHW, weight_FCkk, None, conv.stride, conv.padding)


def joined(block: Block) -> bool:
    """Whether there is something in a block to put side by side: several experts of one size, without bias."""
    return len(set(block.kernels)) < len(block.kernels) and block.norm_act != "none"


class WideBlock(ExpertBlock):
    """An expert block that trains in this form; it is evaluated as any other, and its weights have the same names."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x_BCHW)
        maps_KBCHW: list[Tensor] = []
        for parts in by_size(self):
            y_BFHW = side_by_side(x_BCHW, parts)
            if self.config.norm_act == "expert":
                y_BFHW = _norm_act(y_BFHW, [part.norm for part in parts])
            maps_KBCHW += y_BFHW.chunk(len(parts), 1)
        gate_KB111 = self.gate(x_BCHW).T[:, :, None, None, None].to(maps_KBCHW[0].dtype)
        return self.norm_act(sum(gate_B111 * map_BCHW for gate_B111, map_BCHW in zip(gate_KB111, maps_KBCHW)))


def _norm_act(y_BFHW: Tensor, norms: Sequence[nn.BatchNorm2d]) -> Tensor:
    """All norms as one, and ReLU. Keeps their statistics."""
    names = "running_mean", "running_var", "weight", "bias"
    mean_F, variance_F, scale_F, shift_F = (torch.cat([getattr(norm, name) for norm in norms]) for name in names)
    first = norms[0]
    y_BFHW = F.batch_norm(y_BFHW, mean_F, variance_F, scale_F, shift_F, True, first.momentum, first.eps)
    with torch.no_grad():
        for norm, mean_C, variance_C in zip(norms, mean_F.chunk(len(norms)), variance_F.chunk(len(norms))):
            norm.running_mean.copy_(mean_C)
            norm.running_var.copy_(variance_C)
            norm.num_batches_tracked.add_(1)
    return torch.relu_(y_BFHW)
