"""One training step: forwards, backwards, and the optimiser's step. The loop and the benchmarks take this one."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from expertgrid.model.fast.products import mixed_precision
from expertgrid.model.training.parts import SHIPPED, part
from expertgrid.model.training.recipe import Recipe

Step = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def training_step(
    net: nn.Module, optimizer: Optimizer, bfloat16: bool, recipe: Recipe, weights_N: Tensor | None = None
) -> Step:
    """A function that trains `net` on one batch and returns its loss, and how many of its images were right.

    It takes images (B, C, H, W), targets and labels (B,). Targets are classes (B,) or their shares (B, N), as mixed
    images have them. The forward pass and the loss are in bfloat16 where `bfloat16` says so, or the loss in fp32 where
    it is a user's, or each class counts as much as `weights_N` says. Nothing waits for the device, and what is returned
    stays there; a CUDA graph can record it.
    """

    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def step(x_BCHW: Tensor, targets: Tensor, labels_B: Tensor) -> tuple[Tensor, Tensor]:
        optimizer.zero_grad(set_to_none=True)
        with mixed_precision(x_BCHW.device, bfloat16):
            logits_BN = net(x_BCHW)
            loss = loss_of(recipe, logits_BN, targets, weights_N)
        loss.backward()
        if recipe.clip_grad:
            nn.utils.clip_grad_norm_(parameters, recipe.clip_grad)
        optimizer.step()
        return loss.detach(), (logits_BN.detach().argmax(1) == labels_B).sum()

    return step


def loss_of(recipe: Recipe, logits_BN: Tensor, targets: Tensor, weights_N: Tensor | None) -> Tensor:
    """The recipe's loss: a user's gets the shares of the classes, with label smoothing in them, and images' weights."""
    if recipe.loss in SHIPPED["loss"]:
        weighed_BN = logits_BN if weights_N is None else logits_BN.float()
        return F.cross_entropy(weighed_BN, targets, weights_N, label_smoothing=recipe.smoothing)
    classes = logits_BN.shape[1]
    shares_BN = targets if targets.ndim == 2 else F.one_hot(targets, classes).float()
    weights_B = (shares_BN * (1 if weights_N is None else weights_N)).sum(1)
    shares_BN = shares_BN * (1 - recipe.smoothing) + recipe.smoothing / classes
    return part("loss", recipe.loss)(logits_BN.float(), shares_BN, weights_B)
