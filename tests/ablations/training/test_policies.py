"""timm's PIL augmentation: that it is timm's, and which images it takes."""

from dataclasses import replace

import pytest
from timm.data.auto_augment import AugMixAugment, AutoAugment, RandAugment

from ablations.study import changed_recipe
from ablations.training.data import ImageData
from ablations.training.policies import pil_transform, random_state_kept, transformed
from model.errors import InputError


def test_pil_needs_one_or_three_channels(digits):
    recipe = changed_recipe("fast", {"auto_augment": "rand-m9"})
    recipe.check_fits(digits, 1293)
    recipe.check_fits(ImageData.random(200, 32, 32), 180)
    two = replace(digits.train, pixels_BHWC=digits.train.pixels_BHWC.repeat(2, axis=3))
    with pytest.raises(InputError, match="recipe.auto_augment: needs images of 1 or 3 channels; those of"):
        recipe.check_fits(replace(digits, train=two), 1293)


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
    recipe = changed_recipe("fast", {"auto_augment": policy})
    assert [type(step) for step in pil_transform(recipe, digits).transforms] == [kind]
    recipe.check_fits(digits, 1293)
    jittered = {"auto_augment": policy, "color_jitter": 0.3}
    if policy == "3a":
        assert changed_recipe("fast", jittered).color_jitter == (0.3, 0.3, 0.3)
    else:
        with pytest.raises(InputError, match="no effect in timm"):
            changed_recipe("fast", jittered)


@pytest.mark.parametrize("policy", ["rand-m10-inc1-n3-p1", "rand-m10-n3-p1", "augmix-m10", "v0", "original", "3a"])
def test_policies_at_their_strongest_take_every_image(policy):
    data = ImageData.random(100, 32, 32)
    transform = pil_transform(changed_recipe("fast", {"auto_augment": policy}), data)
    with random_state_kept():
        shapes = {transformed(transform, pixels_HWC, (i,)).shape for i, pixels_HWC in enumerate(data.train.pixels_BHWC)}
    assert shapes == {(32, 32, 3)}
