"""Parts as a user's module registers them: what PyTorch and timm have already, once more."""

import math

import torch

from expertgrid.model.training.parts import (
    register_augmentation,
    register_loss,
    register_optimizer,
    register_schedule,
)


@register_loss
def my_cross_entropy(logits_BN, shares_BN, weights_B):
    return -(weights_B * (shares_BN * logits_BN.log_softmax(1)).sum(1)).mean()


@register_loss
def my_squares(logits_BN, shares_BN, weights_B):
    return (logits_BN.softmax(1) - shares_BN).square().sum(1).mean()


@register_augmentation
def my_hflip(x_BCHW, generator):
    mirrored_B = torch.rand(len(x_BCHW), device=x_BCHW.device, generator=generator) < 0.5
    return torch.where(mirrored_B[:, None, None, None], x_BCHW.flip(3), x_BCHW)


@register_schedule
def my_cosine(step, steps):
    return (1 + math.cos(math.pi * step / steps)) / 2


@register_optimizer
class My_SGD(torch.optim.SGD):
    pass
