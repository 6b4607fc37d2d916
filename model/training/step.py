"""One training step: forwards, backwards, and the optimiser's step. The loop and the benchmarks take this one."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

Step = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def training_step(
    net: nn.Module, optimizer: Optimizer, bfloat16: bool, smoothing: float = 0.0, weights_N: Tensor | None = None
) -> Step:
    """A function that trains `net` on one batch and returns its loss, and how many of its images were right.

    It takes images (B, C, H, W), targets and labels (B,). Targets are classes (B,) or their shares (B, N), as mixed
    images have them. `smoothing` is that of the labels. The forward pass and the loss are in bfloat16 where `bfloat16`
    says so, or the loss in fp32 where each class counts as much as `weights_N` says. Nothing waits for the device, and
    what is returned stays there; a CUDA graph can record it.
    """

    def step(x_BCHW: Tensor, targets: Tensor, labels_B: Tensor) -> tuple[Tensor, Tensor]:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(x_BCHW.device.type, torch.bfloat16, enabled=bfloat16):
            logits_BN = net(x_BCHW)
            weighed_BN = logits_BN if weights_N is None else logits_BN.float()
            loss = F.cross_entropy(weighed_BN, targets, weights_N, label_smoothing=smoothing)
        loss.backward()
        optimizer.step()
        return loss.detach(), (logits_BN.detach().argmax(1) == labels_B).sum()

    return step
