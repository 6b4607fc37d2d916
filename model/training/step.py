"""One training step: forwards, backwards, and the optimiser's step. The loop and the benchmarks take this one."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from expertgrid.model.training.parts import part
from expertgrid.model.training.recipe import Recipe

Step = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
Loss = Callable[[Tensor, Tensor], Tensor]


def make_loss(recipe: Recipe) -> Loss:
    """The loss of logits (B, N) and targets, which are classes (B,) or their shares (B, N)."""
    if recipe.loss == "cross_entropy":
        return partial(F.cross_entropy, label_smoothing=recipe.smoothing)
    own = part("loss", recipe.loss)

    def loss(logits_BN: Tensor, targets: Tensor) -> Tensor:
        classes = logits_BN.shape[1]
        shares_BN = targets if targets.ndim == 2 else F.one_hot(targets, classes)
        shares_BN = shares_BN * (1 - recipe.smoothing) + recipe.smoothing / classes
        return own(logits_BN.float(), shares_BN, torch.ones_like(shares_BN[:, 0]))

    return loss


def training_step(net: nn.Module, optimizer: Optimizer, bfloat16: bool, loss_of: Loss = F.cross_entropy) -> Step:
    """A function that trains `net` on one batch and returns its loss, and how many of its images were right.

    It takes images (B, C, H, W), targets and labels (B,). Targets are classes (B,) or their shares (B, N), as mixed
    images have them. The forward pass and the loss are in bfloat16 where `bfloat16`
    says so. Nothing waits for the device, and what is returned stays there; a CUDA graph can record it.
    """

    def step(x_BCHW: Tensor, targets: Tensor, labels_B: Tensor) -> tuple[Tensor, Tensor]:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(x_BCHW.device.type, torch.bfloat16, enabled=bfloat16):
            logits_BN = net(x_BCHW)
            loss = loss_of(logits_BN, targets)
        loss.backward()
        optimizer.step()
        return loss.detach(), (logits_BN.detach().argmax(1) == labels_B).sum()

    return step
