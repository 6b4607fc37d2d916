"""The optimiser, the schedule and the average of weights that a recipe names, built with timm's factories."""

import inspect
import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import timm.optim
import timm.scheduler
import torch
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim import Optimizer

from expertgrid.model.registry import classifiers
from expertgrid.model.system.errors import InputError
from expertgrid.model.training.muon import StackedMuon
from expertgrid.model.training.parts import PARTS, SHIPPED, part, timm_name
from expertgrid.model.training.recipe import Recipe

FUSED_ON = ("cpu", "cuda")
ALL_BUT_HEAD = "all but head"
ONE_CYCLE_RISE = 0.3  # share of the steps, as in PyTorch
ONE_CYCLE_START = 1 / 25  # of the peak rate, as in PyTorch


def make_optimizer(recipe: Recipe, net: nn.Module) -> Optimizer:
    """timm's optimiser of the parameters that need gradients.

    PyTorch's fused implementation is used where the optimiser is one of PyTorch's that has it and the parameters
    are on a CPU or a CUDA device: it does the whole step in a kernel or two. On CUDA an optimiser that can be
    recorded in a graph counts its steps on the device, whether it is recorded or not. Muon takes weights of one shape
    together. With `layer_decay` the groups of the last layer, which have the whole rate, come first.
    """
    chosen: dict[str, Any] = {} if recipe.opt_betas is None else {"betas": recipe.opt_betas}
    kind = timm.optim.get_optimizer_class(timm_name(recipe.opt), bind_defaults=False)
    knows, device = inspect.signature(kind).parameters, next(net.parameters()).device.type
    if "fused" in knows and device in FUSED_ON:
        chosen["fused"] = True
    if "capturable" in knows and device == "cuda":
        chosen["capturable"] = True
    if recipe.layer_decay < 1:
        chosen["layer_decay"] = recipe.layer_decay
    optimizer = timm.optim.create_optimizer_v2(
        net,
        opt=timm_name(recipe.opt),
        lr=recipe.lr,
        weight_decay=recipe.weight_decay,
        momentum=0.9 if recipe.momentum is None else recipe.momentum,
        filter_bias_and_bn=recipe.filter_bias_and_bn,
        **chosen,
    )
    optimizer.param_groups.sort(key=lambda group: -group.get("lr_scale", 1.0))
    if type(optimizer) is timm.optim.Muon and optimizer.defaults["algo"] == "muon":
        optimizer.__class__ = StackedMuon
    return optimizer


def freeze(recipe: Recipe, net: nn.Module) -> list[nn.Module]:
    """Takes the gradients from the parameters that `recipe.freeze` names.

    Returns the modules that have only such parameters: in evaluation mode their norms keep their statistics. Raises
    InputError where it names no parameter, or all.
    """
    if recipe.freeze == "none":
        return []
    matcher = net.group_matcher() if hasattr(net, "group_matcher") else {}  # ty: ignore[not-callable]
    groups: dict[str, Any] = dict(matcher) if isinstance(matcher, dict) else {}
    groups[ALL_BUT_HEAD] = f"(?!{'|'.join(map(re.escape, classifiers(net)))})"
    given = groups.get(recipe.freeze) or recipe.freeze
    patterns = [given] if isinstance(given, str) else [pattern for pattern, _ in given]
    names = [name for name, _ in net.named_parameters()]
    try:
        frozen = [name for name in names if any(re.match(pattern, name) for pattern in patterns)]
    except re.error as error:
        raise InputError(f"recipe.freeze: {recipe.freeze!r} is no regular expression: {error}") from None
    if len(frozen) in (0, len(names)):
        raise InputError(
            f"recipe.freeze: {recipe.freeze!r} names {'all' if frozen else 'none'} of the {len(names)} parameters; "
            f"accepted: {', '.join(groups)}, or the beginning of names such as {names[0]}"
        )
    for name in frozen:
        net.get_parameter(name).requires_grad_(False)
    parts = ((module, [parameter.requires_grad for parameter in module.parameters()]) for module in net.modules())
    return [module for module, trained in parts if trained and not any(trained)]


def check_layers(recipe: Recipe, net: nn.Module) -> None:
    """Raises InputError where `freeze` or `layer_decay` have no effect on a network."""
    if recipe.layer_decay < 1 and len({group["lr_scale"] for group in make_optimizer(recipe, net).param_groups}) < 2:
        raise InputError("recipe.layer_decay: needs a network that has layers for timm, by its method group_matcher")
    freeze(recipe, net)


def make_scheduler(recipe: Recipe, optimizer: Optimizer, steps_per_epoch: int) -> Scheduler | None:
    """timm's scheduler, to be stepped with `step_update(steps done)`; None for a constant rate."""
    if recipe.sched == "none":
        for group in optimizer.param_groups:  # as timm's schedules do it
            group["lr"] *= group.get("lr_scale", 1.0)
        return None
    if recipe.sched == "onecycle" or recipe.sched not in SHIPPED["sched"]:
        rise = ONE_CYCLE_RISE if recipe.warmup is None else recipe.warmup
        factor = partial(one_cycle, rise=rise) if recipe.sched == "onecycle" else part("sched", recipe.sched)
        return Factors(optimizer, recipe.epochs * steps_per_epoch, factor)
    rate = 0.1 if recipe.decay_rate is None else recipe.decay_rate
    scheduler, _ = timm.scheduler.create_scheduler_v2(
        optimizer,
        sched=recipe.sched,
        num_epochs=recipe.epochs,
        # timm computes with fractions of an epoch, although it declares whole ones.
        decay_epochs=30 if recipe.decay_epochs is None else recipe.decay_epochs,
        decay_rate=1.0 if recipe.sched == "poly" else rate,
        warmup_epochs=(recipe.warmup or 0.0) * recipe.epochs,  # ty: ignore[invalid-argument-type]
        warmup_lr=0.0,
        min_lr=0.0,
        step_on_epochs=False,
        updates_per_epoch=steps_per_epoch,
    )
    return scheduler


def make_average(recipe: Recipe, net: nn.Module) -> ModelEmaV3 | None:
    """The moving average of a network's weights and statistics, None without `ema_decay`.

    Its decay rises to `ema_decay` by timm's warm-up: 1 - (steps done)^(-2/3).
    """
    return ModelEmaV3(net, decay=recipe.ema_decay, use_warmup=True) if recipe.ema_decay else None


def check_optimizer(recipe: Recipe) -> None:
    """Raises InputError where there is no such optimiser, and where it cannot be made from the recipe's values."""
    names = [str(name) for name in timm.optim.list_optimizers() if name not in map(timm_name, PARTS["opt"])]
    if recipe.opt not in names:
        part("opt", recipe.opt, names)
    if timm.optim.get_optimizer_info(timm_name(recipe.opt)).second_order:
        raise InputError(f"recipe.opt: {recipe.opt!r} needs gradients of second order, which training does not compute")
    try:
        optimizer = make_optimizer(recipe, torch.nn.Linear(1, 1))
    except (ValueError, TypeError, AssertionError, RuntimeError, ImportError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"recipe.opt: {recipe.opt!r} cannot be made here with this recipe: {reason}") from None
    for field, name in (("opt_betas", "betas"), ("momentum", "momentum")):
        if getattr(recipe, field) is not None and name not in optimizer.defaults:
            raise InputError(f"recipe.{field}: optimiser {recipe.opt!r} has none")


def one_cycle(step: int, steps: int, rise: float) -> float:
    """The factor of PyTorch's OneCycleLR (1708.07120), ending at zero.

    In `rise` of the steps it goes along a cosine from a 25th of the peak to the peak, then down to zero in the last
    step. Momentum stays as it is.
    """
    last, peak = steps - 1, rise * steps - 1
    if step <= peak:
        low, done = ONE_CYCLE_START, step / peak if peak else 1.0
    else:
        low, done = 0.0, 1 - (step - peak) / max(last - peak, 1e-9)
    return low + (1 - low) * (1 - math.cos(math.pi * done)) / 2


class Factors(Scheduler):
    """The rate times a function of the step, from 0, and the number of steps. It stays after the last step."""

    def __init__(self, optimizer: Optimizer, steps: int, factor: Callable[[int, int], float]):
        self.steps, self.factor = steps, factor
        super().__init__(optimizer, "lr", t_in_epochs=False)
        self.step_update(0)

    def _get_lr(self, t: int) -> list[float]:
        factor = self.factor(min(t, self.steps - 1), self.steps)
        return [factor * value for value in self.base_values]
