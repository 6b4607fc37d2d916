"""Parts of a user's own, against the ones of PyTorch and timm that they repeat."""

import own_parts
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from expertgrid.ablations.study.changes import changed_recipe
from expertgrid.model.system.errors import InputError
from expertgrid.model.training import parts
from expertgrid.model.training.augment import augment
from expertgrid.model.training.loader import Loader
from expertgrid.model.training.optimise import make_optimizer, make_scheduler
from expertgrid.model.training.recipe import RECIPES
from expertgrid.model.training.step import loss_of


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_a_loss_gets_what_pytorchs_cross_entropy_gets(smoothing):
    logits_BN, labels_B = torch.randn(6, 4, dtype=torch.bfloat16), torch.tensor([0, 3, 1, 1, 2, 0])
    recipe = changed_recipe("fast", {"loss": "my_cross_entropy", "smoothing": smoothing})
    for targets in (labels_B, torch.rand(6, 4).softmax(1)):
        expected = F.cross_entropy(logits_BN.float(), targets, label_smoothing=smoothing)
        torch.testing.assert_close(loss_of(recipe, logits_BN, targets, None), expected)
    weights_N = torch.tensor([0.5, 1.0, 2.0, 4.0])
    each_B = F.cross_entropy(logits_BN.float(), labels_B, reduction="none", label_smoothing=smoothing)
    weighed = loss_of(recipe, logits_BN, labels_B, weights_N)
    torch.testing.assert_close(weighed, (each_B * weights_N[labels_B]).mean())


def test_a_schedule_is_a_factor_of_the_rate_at_each_step():
    recipe, net = changed_recipe("fast", {"sched": "my_cosine", "epochs": 2}), nn.Linear(2, 2)
    assert recipe.warmup is None, "a base's warm-up, which would do nothing, is dropped"
    scheduler, rates = make_scheduler(recipe, optimizer := make_optimizer(recipe, net), 3), []
    other = torch.optim.SGD(net.parameters(), recipe.lr)
    reference = CosineAnnealingLR(other, T_max=6)
    for step in range(1, 7):
        rates.append((optimizer.param_groups[0]["lr"], other.param_groups[0]["lr"]))
        scheduler.step_update(step)
        other.step(), reference.step()
    assert [own for own, _ in rates] == pytest.approx([pytorchs for _, pytorchs in rates])
    assert optimizer.param_groups[0]["lr"] == rates[-1][0], "after the last step it stays"


def test_an_optimiser_is_made_as_timms_are():
    changes = {"opt": "My_SGD", "lr": 0.1, "momentum": 0.5, "weight_decay": 0.1, "filter_bias_and_bn": True}
    nets = [nn.Linear(3, 2), nn.Linear(3, 2)]
    nets[1].load_state_dict(nets[0].state_dict())
    own, timms = (make_optimizer(changed_recipe("fast", changes | {"opt": opt}), net)
                  for opt, net in zip(("My_SGD", "momentum"), nets))  # fmt: skip
    assert type(own) is own_parts.My_SGD
    for optimizer, net in ((own, nets[0]), (timms, nets[1])):
        for _ in range(3):
            optimizer.zero_grad()
            net(torch.ones(1, 3)).square().sum().backward()
            optimizer.step()
    assert [group["weight_decay"] for group in own.param_groups] == [0, 0.1]
    torch.testing.assert_close(list(nets[0].parameters()), list(nets[1].parameters()))
    with pytest.raises(InputError, match="recipe.opt_betas: optimiser 'My_SGD' has none"):
        changed_recipe("fast", {"opt": "My_SGD", "opt_betas": [0.9, 0.9]})


def test_an_augmentation_draws_from_the_loaders_generator(digits_splits):
    recipe = changed_recipe("fast", {"augment": "my_hflip", "hflip": 0.0, "crop_padding": 0})
    first, again = (next(Loader(recipe, digits_splits, seed=1).epoch(0)).x_BCHW for _ in range(2))
    torch.testing.assert_close(first, again)
    pixels_BHWC, mean_C, std_C = digits_splits.train.pixels(slice(64)), torch.tensor([0.1]), torch.tensor([0.2])
    ours = recipe.model_copy(update={"augment": "", "hflip": 0.5})
    both = (augment(r, pixels_BHWC, mean_C, std_C, torch.Generator().manual_seed(0)) for r in (recipe, ours))
    torch.testing.assert_close(*both)


def test_a_name_is_taken_once():
    def my_hflip(x_BCHW, generator):
        return x_BCHW

    for register, part, name in (
        (parts.register_augmentation, my_hflip, "my_hflip"),
        (parts.register_loss, F.cross_entropy, "cross_entropy"),
        (parts.register_schedule, lambda step, steps: 1.0, "<lambda>"),
        (parts.register_optimizer, torch.optim.SGD, "SGD"),
        (parts.register_optimizer, type("MY_sgd", (torch.optim.SGD,), {}), "MY_sgd"),
    ):
        with pytest.raises(InputError, match=f"'{name}': the name is taken, or is none; choose another"):
            register(part)
    assert "my_hflip" in parts.PARTS["augment"]
    assert RECIPES["fast"].loss not in parts.PARTS["loss"]
