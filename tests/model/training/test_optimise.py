"""Optimisers, schedules and averages: against PyTorch's own, and that they are what the reports say."""

import re
from collections.abc import Callable
from functools import partial

import pytest
import timm.optim
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR, StepLR

from expertgrid.ablations.study.changes import changed_recipe
from expertgrid.model.presets import PRESETS
from expertgrid.model.registry import build
from expertgrid.model.system.errors import InputError
from expertgrid.model.training.optimise import check_optimizer, freeze, make_average, make_optimizer, make_scheduler
from expertgrid.model.training.recipe import RECIPES, Recipe

STEPS = 5


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))


def learning_rates(recipe: Recipe) -> list[float]:
    """The learning rate of each step."""
    optimizer = make_optimizer(recipe, net())
    scheduler = make_scheduler(recipe, optimizer, STEPS)
    each_step = []
    for step in range(recipe.epochs * STEPS):
        each_step.append(optimizer.param_groups[0]["lr"])
        if scheduler is not None:
            scheduler.step_update(step + 1)
    return each_step


def reference(recipe: Recipe, schedule: Callable, every: int = STEPS) -> list[float]:
    """The same from PyTorch's schedule, which takes a step of its own after every so many."""
    optimizer = torch.optim.SGD(net().parameters(), lr=recipe.lr)
    scheduler, steps, each_step = schedule(optimizer), recipe.epochs * STEPS, []
    for step in range(1, steps + 1):
        each_step.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step % every == 0 and step < steps:
            scheduler.step()
    return each_step


@pytest.mark.parametrize("name", ["two_block", "segmented", "eight_block", "macro_residual"])
def test_step_and_cosine_schedules_are_pytorchs_at_each_epochs_start(name):
    recipe = RECIPES[name]
    if recipe.sched == "step":
        expected = reference(recipe, partial(StepLR, step_size=int(recipe.decay_epochs), gamma=recipe.decay_rate))
        assert learning_rates(recipe) == pytest.approx(expected)
    else:
        expected = reference(recipe, partial(CosineAnnealingLR, T_max=recipe.epochs))
        assert learning_rates(recipe)[::STEPS] == pytest.approx(expected[::STEPS], abs=1e-8)


def test_fast_rises_and_falls_to_zero():
    rates = learning_rates(RECIPES["fast"])
    peak = rates.index(max(rates))
    assert rates[0] == 0
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] < 0.02 * max(rates)


@pytest.mark.parametrize(
    ("name", "kind", "lr", "decay"),
    [
        ("two_block", torch.optim.Adam, 1e-3, 0),
        ("eight_block", torch.optim.AdamW, 3e-4, 1e-3),
        ("segmented", torch.optim.Adam, 1e-3, 1e-4),
        ("macro_residual", torch.optim.AdamW, 1e-3, 0.02),
        ("mixed_kernel", torch.optim.Adam, 2e-3, 1e-5),
    ],
)
def test_optimisers_are_the_reports(name, kind, lr, decay):
    network = build(PRESETS[name])
    optimizer = make_optimizer(RECIPES[name], network)
    assert type(optimizer) is kind
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(lr, decay)]
    assert len(optimizer.param_groups[0]["params"]) == len(list(network.parameters()))


def test_weight_decay_is_kept_off_norms_and_biases():
    groups = make_optimizer(RECIPES["fast"], net()).param_groups
    decayed = {group["weight_decay"]: [tuple(p.shape) for p in group["params"]] for group in groups}
    assert decayed == {0.0: [(2,), (2,), (2,)], 0.05: [(2, 2)]}


@pytest.mark.parametrize("warmup", [None, 0.2, 0.5])
def test_one_cycle_is_pytorchs_with_zero_at_its_end(warmup):
    recipe = Recipe(**{**dict(RECIPES["fast"]), "sched": "onecycle", "warmup": warmup})
    fields = {"pct_start": 0.3 if warmup is None else warmup, "final_div_factor": float("inf"), "cycle_momentum": False}
    schedule = partial(OneCycleLR, max_lr=recipe.lr, total_steps=recipe.epochs * STEPS, **fields)
    rates = learning_rates(recipe)
    assert rates == pytest.approx(reference(recipe, schedule, every=1), abs=1e-12)
    assert rates[-1] == 0


@pytest.mark.parametrize("opt", ["sgd", "momentum", "adam", "adamw"])
def test_fused_optimisers_step_as_the_plain_ones(opt):
    recipe = Recipe(epochs=1, batch_size=2, opt=opt, lr=0.1, weight_decay=0.01)
    weights = []
    for fused in (True, False):
        torch.manual_seed(0)
        module = nn.Linear(3, 3)
        optimizer = make_optimizer(recipe, module)
        assert optimizer.defaults["fused"] is True
        for group in optimizer.param_groups:
            group["fused"] = fused
        for _ in range(3):
            module(torch.ones(2, 3)).square().sum().backward()
            optimizer.step()
        weights.append(module.weight)
    torch.testing.assert_close(*weights)


@pytest.mark.parametrize("opt", ["lion", "muon", "adamp", "lamb", "rmsprop"])
def test_other_optimisers_of_timm_leave_frozen_parameters_alone(opt):
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    module[0].requires_grad_(False)
    before = [parameter.clone() for parameter in module.parameters()]
    optimizer = make_optimizer(Recipe(epochs=1, batch_size=2, opt=opt, lr=0.1, weight_decay=0.1), module)
    module(torch.ones(2, 3)).square().sum().backward()
    optimizer.step()
    changed = [not torch.equal(old, new) for old, new in zip(before, module.parameters())]
    assert changed == [False, False, True, True]


def test_average_follows_the_weights_with_timms_warm_up():
    module = net()
    average = make_average(Recipe(**{**dict(RECIPES["fast"]), "ema_decay": 0.9}), module)
    expected = module[0].weight.detach().clone()
    for step in range(1, 6):
        with torch.no_grad():
            module[0].weight += 1
        average.update(module, step)
        decay = min(0.9, 1 - step ** (-2 / 3)) if step > 1 else 0.0
        expected = decay * expected + (1 - decay) * module[0].weight.detach()
    torch.testing.assert_close(average.module[0].weight, expected)


def test_the_optimisers_that_are_accepted_without_importing_torch_can_be_made():
    for recipe in RECIPES.values():
        check_optimizer(recipe)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"opt": "sgd", "opt_betas": [0.9, 0.9]}, "recipe.opt_betas: optimiser 'sgd' has none"),
        ({"opt": "adamm"}, "recipe.opt: unknown name 'adamm'; did you mean 'adam'?"),
        ({"opt": "adahessian"}, "recipe.opt: 'adahessian' needs gradients of second order"),
        ({"sched": "cosin"}, "recipe.sched: unknown name 'cosin'; did you mean 'cosine'? Accepted: none, step, "),
        ({"loss": "crossentropy"}, "recipe.loss: unknown name 'crossentropy'; did you mean 'cross_entropy'?"),
        ({"augment": "mine"}, "recipe.augment: unknown name 'mine'. Accepted: \"\""),
        ({"momentum": 0.5}, "recipe.momentum: optimiser 'adamw' has none"),
        ({"opt_betas": [1.0, 1.0]}, "recipe.opt: 'adamw' cannot be made here with this recipe: Invalid beta"),
    ],
)
def test_optimisers_that_cannot_be_made_are_one_line(changes, message):
    with pytest.raises(InputError) as error:
        changed_recipe("fast", changes)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_an_optimiser_of_no_shipped_recipe_is_tried(monkeypatch):
    """So that one whose package is not installed is an error of the study, not of each of its trials."""

    def missing(*arguments, **options):
        raise ImportError("bitsandbytes is not there\nand more")

    monkeypatch.setattr(timm.optim, "create_optimizer_v2", missing)
    assert changed_recipe("fast", {"lr": 0.5}).opt == "adamw"
    with pytest.raises(InputError, match="recipe.opt: 'lion' cannot be made here with .*: bitsandbytes is not there$"):
        changed_recipe("fast", {"opt": "lion"})


@pytest.mark.parametrize("sched", ["none", "cosine", "onecycle"])
def test_layer_decay_is_timms(sched):
    """The rate of each parameter before and after a step, against timm's groups; the head has the whole rate."""
    recipe = RECIPES["finetune"].model_copy(update={"sched": sched, "warmup": None})
    whole = recipe.model_copy(update={"layer_decay": 1.0})
    network = build(PRESETS["speed"])
    groups = timm.optim.param_groups_layer_decay(network, layer_decay=0.75, weight_decay=0.05)
    scales = {parameter: group["lr_scale"] for group in groups for parameter in group["params"]}
    assert min(scales.values()) < 0.2 < max(scales.values()) == 1
    optimizers = [make_optimizer(recipe, network), make_optimizer(whole, network)]
    schedulers = [make_scheduler(recipe, optimizer, STEPS) for optimizer in optimizers]
    for step in range(STEPS + 1):
        for scheduler in filter(None, schedulers):
            scheduler.step_update(step)
        rate = optimizers[1].param_groups[0]["lr"]
        assert optimizers[0].param_groups[0]["lr"] == rate
        rates = {parameter: group["lr"] for group in optimizers[0].param_groups for parameter in group["params"]}
        assert rates == pytest.approx({parameter: rate * scale for parameter, scale in scales.items()})


@pytest.mark.parametrize(
    ("pattern", "trained"),
    [
        ("all but head", "fc"),
        ("stem", "layer|fc"),  # timm's group
        (r"(conv1|bn1|layer[123]\.)", "layer4|fc"),
    ],
)
def test_frozen_parameters_are_not_trained(pattern, trained):
    network = timm.create_model("test_resnet", num_classes=3, zero_init_last=False)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    recipe = RECIPES["finetune"].model_copy(update={"freeze": pattern, "opt": "sgd", "weight_decay": 0.1})
    frozen, optimizer = freeze(recipe, network), make_optimizer(recipe, network)
    network.train()
    for part in frozen:
        part.eval()
    network(torch.rand(4, 3, 96, 96)).square().sum().backward()
    optimizer.step()
    changed = {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if re.match(trained, name)}  # statistics of norms among them


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"freeze": "conv9"}, "'conv9' names none of the 24 parameters; accepted: stem, blocks, all but head, or the"),
        ({"freeze": "."}, "'.' names all of the 24 parameters"),
        ({"freeze": "("}, "'(' is no regular expression"),
        ({"layer_decay": 0.0}, "greater than 0"),
    ],
)
def test_freezing_that_does_nothing_is_refused(change, problem):
    with pytest.raises((InputError, ValueError), match=re.escape(problem)):
        freeze(Recipe.model_validate(dict(RECIPES["finetune"]) | change), build(PRESETS["speed"]))
