"""Recipes: that they are what the reports say, against PyTorch's own optimisers and schedules."""

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from timm.data.auto_augment import AugMixAugment, AutoAugment, RandAugment
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR, StepLR

from ablations.study import changed_recipe
from ablations.training.data import ImageData
from ablations.training.loader import Loader
from ablations.training.policies import random_state_kept, transformed
from ablations.training.recipe import RECIPES, Recipe, recipe
from model.errors import InputError
from model.presets import PRESETS
from model.registry import build

STEPS = 5


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))


def rates(one: Recipe) -> list[float]:
    """The learning rate of each step."""
    optimizer = one.optimizer(net())
    scheduler = one.scheduler(optimizer, STEPS)
    found = []
    for step in range(one.epochs * STEPS):
        found.append(optimizer.param_groups[0]["lr"])
        if scheduler is not None:
            scheduler.step_update(step + 1)
    return found


def reference_rates(one: Recipe, schedule: type, *arguments: float) -> list[float]:
    """The same from PyTorch's schedule, stepped once an epoch."""
    optimizer = torch.optim.SGD(net().parameters(), lr=one.lr)
    scheduler = schedule(optimizer, *arguments)
    found = []
    for _ in range(one.epochs):
        found += [optimizer.param_groups[0]["lr"]] * STEPS
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("name", ["two_block", "segmented"])
def test_step_schedule_is_pytorchs(name):
    one = RECIPES[name]
    assert rates(one) == pytest.approx(reference_rates(one, StepLR, int(one.decay_epochs), one.decay_rate))


@pytest.mark.parametrize("name", ["eight_block", "macro_residual"])
def test_cosine_schedule_is_pytorchs_at_each_epochs_start(name):
    one = RECIPES[name]
    expected = reference_rates(one, CosineAnnealingLR, one.epochs)
    assert rates(one)[::STEPS] == pytest.approx(expected[::STEPS], abs=1e-8)


def test_fast_rises_and_falls_to_zero():
    found = rates(RECIPES["fast"])
    peak = found.index(max(found))
    assert found[0] == 0
    assert found[:peak] == sorted(found[:peak])
    assert found[peak:] == sorted(found[peak:], reverse=True)
    assert found[-1] < 0.02 * max(found)


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
    optimizer = RECIPES[name].optimizer(network)
    assert type(optimizer) is kind
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(lr, decay)]
    assert len(optimizer.param_groups[0]["params"]) == len(list(network.parameters()))


def test_weight_decay_is_kept_off_norms_and_biases():
    groups = RECIPES["fast"].optimizer(net()).param_groups
    decayed = {group["weight_decay"]: [tuple(p.shape) for p in group["params"]] for group in groups}
    assert decayed == {0.0: [(2,), (2,), (2,)], 0.05: [(2, 2)]}


def test_augment_does_what_the_recipe_says(digits):
    pixels_BHWC = digits.train.pixels_BHWC[:50]
    mean_C, std_C = torch.tensor(digits.mean), torch.tensor(digits.std)
    plain = {"hflip": 0.0, "crop_padding": 0, "cutout": 0}

    def augmented(**fields) -> torch.Tensor:
        one = Recipe(**{**dict(RECIPES["fast"]), **plain, **fields})
        return one.augment(pixels_BHWC, mean_C, std_C, torch.Generator().manual_seed(0))

    expected = (pixels_BHWC.permute(0, 3, 1, 2) / 255 - digits.mean[0]) / digits.std[0]
    torch.testing.assert_close(augmented(), expected)
    torch.testing.assert_close(augmented(hflip=1.0), expected.flip(3))
    assert (augmented(cutout=4) == 0).any((1, 2, 3)).all()
    assert not torch.equal(augmented(crop_padding=2), expected)


def test_images_are_small_in_the_first_epochs(digits):
    one = changed_recipe("fast", {"epochs": 5, "small_size": 24})
    assert [one.image_size(epoch, (32, 48)) for epoch in range(5)] == [(24, 36)] * 2 + [(32, 48)] * 3
    one = changed_recipe("fast", {"epochs": 4, "small_size": 6, "small_share": 0.25})
    loader = Loader(one, digits, seed=0)
    assert [next(loader.epoch(epoch)).x_BCHW.shape[2:] for epoch in range(4)] == [(6, 6)] + [(8, 8)] * 3
    assert {changed_recipe("fast", {}).image_size(epoch, (8, 8)) for epoch in range(16)} == {(8, 8)}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("epochs", 0, "greater than 0"),
        ("lr", -1, "greater than 0"),
        ("hflip", 1.5, "less than or equal to 1"),
        ("opt", "adamm", "did you mean 'adam'"),
        ("sched", "cosin", "'cosine'"),
        ("warmup", 0.1, "warmup needs a sched"),
        ("warmup_epochs", 0.9, "not permitted"),
        ("momentum", 1.0, "less than 1"),
        ("opt", "adahessian", "second order"),
        ("decay_epochs", 30.0, "decay_epochs needs sched 'step'"),
        ("decay_rate", 0.1, "decay_rate needs sched 'step'"),
        ("translate", 2, "crop_padding and translate"),
        ("small_share", 0.5, "small_share needs small_size"),
        ("remode", "rand", "remode needs reprob"),
        ("recount", 1, "recount needs reprob"),
        ("mixup_prob", 1.0, "mixup_prob needs mixup or cutmix"),
        ("mixup_switch_prob", 0.5, "mixup_switch_prob needs mixup and cutmix"),
        ("color_jitter", [0.1, 0.2], "three or four"),
        ("color_jitter", [0.1, 0.2, 0.3, 0.6], "hue up to 0.5"),
        ("auto_augment", "rand-m9-mstdinf", "'mstdinf' is no part"),
        ("auto_augment", "rand-m9-m5", "m is given twice"),
        ("auto_augment", "rand-m9.5", "does not build"),
        ("auto_augment", "rnad-m9", "accepted: rand, augmix"),
        ("auto_augment", "augmix-n3", "'n3' is no part"),
    ],
)
def test_wrong_values_are_refused(field, value, message):
    with pytest.raises(ValidationError, match=message):
        Recipe(**{**dict(RECIPES["mixed_kernel"]), field: value})


def test_unknown_recipe():
    with pytest.raises(InputError, match="unknown recipe 'fats'; did you mean 'fast'?"):
        recipe("fats")


@pytest.mark.parametrize("warmup", [None, 0.2, 0.5])
def test_one_cycle_is_pytorchs_with_zero_at_its_end(warmup):
    fields = {**dict(RECIPES["fast"]), "sched": "onecycle", "warmup": warmup}
    one = Recipe(**fields)
    optimizer = torch.optim.SGD(net().parameters(), lr=one.lr)
    total = one.epochs * STEPS
    rise = 0.3 if warmup is None else warmup
    schedule = OneCycleLR(optimizer, one.lr, total, pct_start=rise, final_div_factor=float("inf"), cycle_momentum=False)
    expected = []
    for step in range(total):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step < total - 1:
            schedule.step()
    assert rates(one) == pytest.approx(expected, abs=1e-12)
    assert rates(one)[-1] == 0


@pytest.mark.parametrize("opt", ["sgd", "momentum", "adam", "adamw"])
def test_fused_optimisers_step_as_the_plain_ones(opt):
    one = Recipe(epochs=1, batch_size=2, opt=opt, lr=0.1, weight_decay=0.01)
    weights = []
    for fused in (True, False):
        torch.manual_seed(0)
        module = nn.Linear(3, 3)
        optimizer = one.optimizer(module)
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
    optimizer = Recipe(epochs=1, batch_size=2, opt=opt, lr=0.1, weight_decay=0.1).optimizer(module)
    module(torch.ones(2, 3)).square().sum().backward()
    optimizer.step()
    changed = [not torch.equal(old, new) for old, new in zip(before, module.parameters())]
    assert changed == [False, False, True, True]


def test_a_change_drops_what_it_leaves_idle_and_refuses_what_is_given():
    assert changed_recipe("two_block", {"sched": "cosine"}).decay_epochs is None
    assert changed_recipe("fast", {"recipe.weight_decay": 0.0}).filter_bias_and_bn is False
    with pytest.raises(InputError, match="recipe: decay_epochs needs sched 'step'"):
        changed_recipe("two_block", {"sched": "cosine", "decay_epochs": 30})
    with pytest.raises(InputError, match="recipe.momentum: optimiser 'adamw' has none"):
        changed_recipe("fast", {"momentum": 0.5})
    with pytest.raises(InputError, match="unknown field of the recipe 'experts'"):
        changed_recipe("fast", {"experts": 2})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 5000}, "recipe.batch_size: 5000, and digits has 1293 images"),
        ({"crop_padding": 8}, "recipe.crop_padding: 8 is too large for the 8x8 images of digits; at most 7"),
        ({"crop_padding": 0, "translate": 8}, "recipe.translate: 8 is too large"),
        ({"cutout": 9}, "recipe.cutout: 9 is too large"),
        ({"small_size": 8}, "recipe.small_size: 8 is too large"),
        ({"color_jitter": [0.1, 0.1, 0.1, 0.2]}, "one channel, and no hue"),
    ],
)
def test_recipes_that_do_not_fit_the_data(changes, message, digits):
    with pytest.raises(InputError, match=message):
        changed_recipe("fast", changes).check_fits(digits)


def test_pil_needs_uint8_of_one_or_three_channels(digits):
    one = changed_recipe("fast", {"auto_augment": "rand-m9"})
    one.check_fits(digits)
    one.check_fits(ImageData.random(200, 32, 32))
    two = replace(digits.train, pixels_BHWC=digits.train.pixels_BHWC.repeat(1, 1, 1, 2))
    with pytest.raises(InputError, match="recipe.auto_augment: needs uint8 images of 1 or 3 channels"):
        one.check_fits(replace(digits, train=two))


@pytest.mark.parametrize(
    ("policy", "kind"),
    [
        ("rand-m9-mstd0.5-inc1", RandAugment),
        ("rand-m7-n3-p0.3-tweights", RandAugment),
        ("augmix-m5-w4-d2", AugMixAugment),
        ("original-mstd0.5", AutoAugment),
        ("3a", AutoAugment),
    ],
)
def test_policies_are_timms(policy, kind, digits):
    one = changed_recipe("fast", {"auto_augment": policy})
    assert [type(step) for step in one.pil_transform(digits).transforms] == [kind]
    one.check_fits(digits)
    jittered = {"auto_augment": policy, "color_jitter": 0.3}
    if policy == "3a":
        assert changed_recipe("fast", jittered).color_jitter == (0.3, 0.3, 0.3)
    else:
        with pytest.raises(InputError, match="no effect in timm"):
            changed_recipe("fast", jittered)


def test_average_follows_the_weights_with_timms_warm_up():
    module = net()
    average = Recipe(**{**dict(RECIPES["fast"]), "ema_decay": 0.9}).average(module)
    kept = module[0].weight.detach().clone()
    for step in range(1, 6):
        with torch.no_grad():
            module[0].weight += 1
        average.update(module, step)
        decay = min(0.9, 1 - step ** (-2 / 3)) if step > 1 else 0.0
        kept = decay * kept + (1 - decay) * module[0].weight.detach()
    torch.testing.assert_close(average.module[0].weight, kept)


@pytest.mark.parametrize("policy", ["rand-m10-inc1-n3-p1", "rand-m10-n3-p1", "augmix-m10", "v0", "original", "3a"])
def test_policies_at_their_strongest_take_every_image(policy):
    data = ImageData.random(100, 32, 32)
    transform = changed_recipe("fast", {"auto_augment": policy, "batch_size": 50}).pil_transform(data)
    with random_state_kept():
        shapes = {transformed(transform, x.numpy(), (i,)).shape for i, x in enumerate(data.train.pixels_BHWC)}
    assert shapes == {(32, 32, 3)}
