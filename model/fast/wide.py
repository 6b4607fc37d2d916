"""Expert blocks that compute the experts of one kernel size as one wide convolution.

Its input is read once, and its input gradient is summed within the convolution. Shapes: B images, K experts of C
channels, F = the channels of all experts of one convolution.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expertgrid.model.config import Block
from expertgrid.model.net import ConvNormAct, ExpertBlock


def experts_by_kernel(block: ExpertBlock) -> list[list[ConvNormAct]]:
    """The experts of a block in groups of one kernel size, the largest first."""
    kernels, parts = block.config.kernels, block.typed_experts()
    return [[part for part, kernel in zip(parts, kernels) if kernel == size] for size in dict.fromkeys(kernels)]


def wide_conv(x_BCHW: Tensor, parts: Sequence[ConvNormAct]) -> Tensor:
    """The outputs (B, F, H, W) of several convolutions of one kernel size and without bias, computed as one."""
    conv = parts[0].conv
    weight_FCkk = torch.cat([part.conv.weight for part in parts]) if len(parts) > 1 else conv.weight
    return F.conv2d(x_BCHW, weight_FCkk, None, conv.stride, conv.padding)


def can_be_wide(block: Block) -> bool:
    """Whether a block has several experts of one kernel size, without bias: those are computed as one convolution."""
    return len(set(block.kernels)) < len(block.kernels) and block.norm_act != "none"


class WideBlock(ExpertBlock):
    """An expert block that trains with wide convolutions. Its evaluation and its weights' names are ExpertBlock's."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x_BCHW)
        assert self.gate is not None  # a block of several experts has one
        maps_KBCHW: list[Tensor] = []
        for parts in experts_by_kernel(self):
            y_BFHW = wide_conv(x_BCHW, parts)
            if self.config.norm_act == "expert":
                y_BFHW = _norm_act(y_BFHW, [part.norm for part in parts])
            maps_KBCHW += y_BFHW.chunk(len(parts), 1)
        gate_KB111 = self.gate(x_BCHW).T[:, :, None, None, None].to(maps_KBCHW[0].dtype)
        return self.norm_act(sum(gate_B111 * map_BCHW for gate_B111, map_BCHW in zip(gate_KB111, maps_KBCHW)))


def _norm_act(y_BFHW: Tensor, norms: Sequence[nn.BatchNorm2d]) -> Tensor:
    """Several batch norms as one, and ReLU. Updates the statistics of each."""
    names = "running_mean", "running_var", "weight", "bias"
    mean_F, variance_F, scale_F, shift_F = (torch.cat([getattr(norm, name) for norm in norms]) for name in names)
    first = norms[0]
    assert first.momentum is not None  # NormConfig has a number
    y_BFHW = F.batch_norm(y_BFHW, mean_F, variance_F, scale_F, shift_F, True, first.momentum, first.eps)
    with torch.no_grad():
        for norm, mean_C, variance_C in zip(norms, mean_F.chunk(len(norms)), variance_F.chunk(len(norms))):
            running_mean_C, running_variance_C, batches = tracked(norm)
            running_mean_C.copy_(mean_C)
            running_variance_C.copy_(variance_C)
            batches.add_(1)
    return torch.relu_(y_BFHW)


def tracked(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor, Tensor]:
    """The running mean (C) and variance (C) of a norm, and the number of batches that it has seen."""
    mean_C, variance_C, batches = norm.running_mean, norm.running_var, norm.num_batches_tracked
    assert mean_C is not None and variance_C is not None and batches is not None  # PyTorch's default is to track
    return mean_C, variance_C, batches
