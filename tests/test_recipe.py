"""Recipes: that they are what the reports say, against PyTorch's own optimisers and schedules."""

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, StepLR

from ablations.recipe import RECIPES, Recipe, recipe
from model.errors import InputError
from model.presets import PRESETS, build

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


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("epochs", 0, "greater than 0"),
        ("lr", -1, "greater than 0"),
        ("hflip", 1.5, "less than or equal to 1"),
        ("opt", "adamm", "did you mean 'adam'"),
        ("sched", "cosin", "'cosine'"),
        ("warmup", 0.1, "warmup needs a sched"),
        ("momentum", 0.9, "not permitted"),
    ],
)
def test_wrong_values_are_refused(field, value, message):
    with pytest.raises(ValidationError, match=message):
        Recipe(**{**dict(RECIPES["mixed_kernel"]), field: value})


def test_unknown_recipe():
    with pytest.raises(InputError, match="unknown recipe 'fats'; did you mean 'fast'?"):
        recipe("fats")
