"""Muon with one Newton-Schulz iteration for all weights of one shape.

timm's Muon takes the weights one after another, each in some twenty kernels that are too small for a GPU. Here the
updates of one shape are stacked: N matrices of m rows and n columns.
"""

from collections import defaultdict
from typing import Any

import torch
from timm.optim.muon import _COEFFICIENTS, Muon, get_lr_scale, resolve_ns_coefficients, zeropower_via_newtonschulz
from torch import Tensor


class StackedMuon(Muon):
    """timm's Muon, with its options and its state, from which it can go on and which can go on from it.

    Only weights are stacked for which timm has decided that they are Muon's, in their first step. The others, and
    those in their first step, take timm's step.
    """

    @torch.no_grad()
    def step(self) -> None:  # ty: ignore[incompatible-method-override]  # no closure, which nobody here has
        together: dict[Tensor, Tensor] = {}  # weights, and their gradients
        for group in self.param_groups:
            shapes: defaultdict[torch.Size, dict[Tensor, Tensor]] = defaultdict(dict)
            for weight in group["params"]:
                if weight.grad is not None and self.state[weight].get("use_muon"):
                    shapes[weight.shape][weight] = weight.grad
            for gradients in shapes.values():
                self._step_together(list(gradients), list(gradients.values()), group)
                together |= gradients
        try:
            for weight in together:
                weight.grad = None  # so that timm's step leaves it as it is
            super().step()
        finally:
            for weight, gradient in together.items():
                weight.grad = gradient

    def _step_together(self, weights: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> None:
        """The step of weights of one shape. The learning rate may be a number or a tensor."""
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        updates = [self.state[weight]["momentum_buffer"] for weight in weights]
        torch._foreach_lerp_(updates, gradients, 1 - group["momentum"])
        if group["nesterov"]:
            updates = list(torch._foreach_lerp(gradients, updates, group["momentum"]))
        stacked_Nmn = zeropower_via_newtonschulz(
            torch.stack([in_memory_order(update).flatten(1) for update in updates]),
            group["ns_steps"],
            resolve_ns_coefficients(group["ns_coefficients"], _COEFFICIENTS),
            eps=group["eps"],
            safety_factor=group["safety_factor"],
            scale_eps=group["scale_eps"],
        )
        scale = get_lr_scale(stacked_Nmn[0].shape, group["adjust_lr_fn"])
        changes = (stacked_Nmn.float() * (-group["lr"] * scale)).unbind()
        rows = [in_memory_order(weight) for weight in weights]
        torch._foreach_add_(rows, [change_mn.view(row.shape) for row, change_mn in zip(rows, changes)])


def in_memory_order(weight: Tensor) -> Tensor:
    """A view of a convolution's weights (O, C, k, k) as (O, k, k, C): in channels-last its rows are matrices.

    The iteration commutes with permutations of the columns, so their order is free. A linear layer's weights stay.
    """
    return weight.permute(0, 2, 3, 1) if weight.ndim == 4 else weight
