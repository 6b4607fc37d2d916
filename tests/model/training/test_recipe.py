"""Recipes: what is accepted, what fits the data, and what they do to images."""

import pytest
import torch
from pydantic import ValidationError

from expertgrid.ablations.study.changes import changed_recipe
from expertgrid.model.system.errors import InputError
from expertgrid.model.training.augment import augment
from expertgrid.model.training.loader import Loader
from expertgrid.model.training.recipe import RECIPES, Recipe


def test_augment_does_what_the_recipe_says(digits):
    pixels_BHWC = torch.from_numpy(digits.train.pixels_BHWC[:50])
    mean_C, std_C = torch.tensor(digits.mean), torch.tensor(digits.std)
    plain = {"hflip": 0.0, "crop_padding": 0, "cutout": 0}

    def augmented(**fields) -> torch.Tensor:
        recipe = Recipe(**{**dict(RECIPES["fast"]), **plain, **fields})
        return augment(recipe, pixels_BHWC, mean_C, std_C, torch.Generator().manual_seed(0))

    expected = (pixels_BHWC.permute(0, 3, 1, 2) / 255 - digits.mean[0]) / digits.std[0]
    torch.testing.assert_close(augmented(), expected)
    torch.testing.assert_close(augmented(hflip=1.0), expected.flip(3))
    assert (augmented(cutout=4) == 0).any((1, 2, 3)).all()
    assert not torch.equal(augmented(crop_padding=2), expected)


def test_images_are_small_in_the_first_epochs(digits_splits):
    recipe = changed_recipe("fast", {"epochs": 5, "small_size": 24})
    assert [recipe.image_size(epoch, (32, 48)) for epoch in range(5)] == [(24, 36)] * 2 + [(32, 48)] * 3
    recipe = changed_recipe("fast", {"epochs": 4, "small_size": 6, "small_share": 0.25})
    loader = Loader(recipe, digits_splits, seed=0)
    assert [next(loader.epoch(epoch)).x_BCHW.shape[2:] for epoch in range(4)] == [(6, 6)] + [(8, 8)] * 3
    assert {changed_recipe("fast", {}).image_size(epoch, (8, 8)) for epoch in range(16)} == {(8, 8)}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("epochs", 0, "greater than 0"),
        ("lr", -1, "greater than 0"),
        ("hflip", 1.5, "less than or equal to 1"),
        ("warmup", 0.1, "warmup needs a sched"),
        ("warmup_epochs", 0.9, "not permitted"),
        ("momentum", 1.0, "less than 1"),
        ("decay_epochs", 30.0, "decay_epochs needs sched 'step'"),
        ("decay_rate", 0.1, "decay_rate needs sched 'step'"),
        ("translate", 2, "crop_padding and translate"),
        ("scale", [0.5, 1.0], "crop_padding and scale"),
        ("scale", [0.5, 1.5], "up to 1 are needed, the smaller one first"),
        ("ratio", [1.3, 0.7], "up to 100 are needed, the smaller one first"),
        ("ratio", [0.7, 1.3], "ratio needs scale"),
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


def test_a_change_drops_what_it_leaves_idle_and_refuses_what_is_given():
    assert changed_recipe("two_block", {"sched": "cosine"}).decay_epochs is None
    assert changed_recipe("fast", {"recipe.weight_decay": 0.0}).filter_bias_and_bn is False
    with pytest.raises(InputError, match="recipe: decay_epochs needs sched 'step'"):
        changed_recipe("two_block", {"sched": "cosine", "decay_epochs": 30})
    with pytest.raises(InputError, match="unknown recipe 'fats'; did you mean 'fast'?"):
        changed_recipe("fats", {})
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
        changed_recipe("fast", changes).check_fits(digits, 1293)
