"""Augmentations, against torchvision on the same draws and against their definitions."""

import itertools
import random

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.loss import SoftTargetCrossEntropy
from torchvision.transforms.v2 import RandomResizedCrop

from expertgrid.model.training.augment import (
    alternately_mirrored,
    augment,
    cutout,
    draw_mix,
    flip,
    mirror,
    mix_images,
    mix_labels,
    padded_crop,
    random_erasing,
    resized_crop,
    translate,
)
from expertgrid.model.training.recipe import RECIPES


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def x_BCHW() -> torch.Tensor:
    return torch.randint(1, 256, (64, 3, 10, 12), dtype=torch.uint8, generator=generator())


def test_hflip_mirrors_some_images(x_BCHW):
    flipped = flip(x_BCHW, 0.5, generator())
    mirrored = [torch.equal(y, TF.horizontal_flip(x)) for x, y in zip(x_BCHW, flipped)]
    same = [torch.equal(y, x) for x, y in zip(x_BCHW, flipped)]
    assert all(m != s for m, s in zip(mirrored, same))
    assert 20 <= sum(mirrored) <= 44
    assert torch.equal(flip(x_BCHW, 1.0, generator()), TF.horizontal_flip(x_BCHW))
    assert torch.equal(flip(x_BCHW, 0.0, generator()), x_BCHW)
    assert torch.equal(flip(x_BCHW, 1.0, generator(), dim=2), TF.vertical_flip(x_BCHW))


@pytest.mark.parametrize(("shift", "border"), [(padded_crop, "constant"), (translate, "reflect")])
def test_a_shift_is_one_of_all_crops_of_the_padded_image(x_BCHW, shift, border):
    shifted = shift(x_BCHW, 2, generator())
    padded = TF.pad(x_BCHW, [2], padding_mode=border)
    places = [
        [(top, left) for top in range(5) for left in range(5) if torch.equal(y, TF.crop(x, top, left, 10, 12))]
        for x, y in zip(padded, shifted)
    ]
    assert all(len(equal) == 1 for equal in places)
    assert {top for ((top, _),) in places} == {left for ((_, left),) in places} == set(range(5))
    assert shift(x_BCHW, 9, generator()).shape == x_BCHW.shape


def test_a_resized_crop_is_torchvisions_of_a_box_with_the_same_statistics():
    """Each result is that of one of all boxes of its image; these are distributed as torchvision draws them."""
    scale, ratio = (0.2, 0.9), (3 / 4, 4 / 3)
    x_BCHW = torch.randint(256, (300, 1, 10, 12), dtype=torch.uint8, generator=generator())
    found = resized_crop(x_BCHW, scale, ratio, generator())
    box_B4 = torch.full((300, 4), -1)
    for h, w in itertools.product(range(1, 11), range(1, 13)):
        for top, left in itertools.product(range(11 - h), range(13 - w)):
            wanted = TF.resized_crop(x_BCHW, top, left, h, w, [10, 12], antialias=False)
            equal_B = (wanted.int() - found.int()).abs().amax((1, 2, 3)) <= 1  # its rounding is another one
            box_B4[equal_B] = torch.tensor([top, left, h, w])
    assert (box_B4 >= 0).all()
    random_crop = RandomResizedCrop([10, 12], scale, ratio)
    torch.manual_seed(0)
    drawn = [list(random_crop.make_params([x_BCHW]).values()) for _ in range(3000)]
    theirs_N4 = torch.tensor(drawn)
    torch.testing.assert_close(box_B4.double().mean(0), theirs_N4.double().mean(0), atol=0.35, rtol=0)
    torch.testing.assert_close(box_B4.double().std(0), theirs_N4.double().std(0), atol=0.35, rtol=0)


def test_where_no_box_fits_the_crop_is_torchvisions_in_the_centre(x_BCHW):
    for ratio in ((3.0, 4.0), (0.1, 0.2)):
        params = RandomResizedCrop([10, 12], (1.0, 1.0), ratio).make_params([x_BCHW])
        wanted = TF.resized_crop(x_BCHW, *params.values(), [10, 12], antialias=False)
        found = resized_crop(x_BCHW, (1.0, 1.0), ratio, generator())
        torch.testing.assert_close(found.int(), wanted.int(), atol=1, rtol=0)


def test_alternating_flip_is_random_once_and_then_takes_turns(x_BCHW):
    epochs = [alternately_mirrored(1000, 0.5, epoch, generator()) for epoch in range(4)]
    assert 400 <= epochs[0].sum() <= 600
    assert torch.equal(epochs[1], ~epochs[0])
    assert torch.equal(epochs[2], epochs[0])
    assert torch.equal(epochs[3], epochs[1])
    mirrored = mirror(x_BCHW, epochs[0][:64])
    for x, y, flipped in zip(x_BCHW, mirrored, epochs[0]):
        assert torch.equal(y, TF.horizontal_flip(x) if flipped else x)


@pytest.mark.parametrize(("alphas", "prob"), [((0.8, 0.0), 1.0), ((0.0, 1.0), 1.0), ((0.4, 1.0), 0.7)])
def test_mixing_is_timms(alphas, prob):
    """The same images, targets and loss from the same random numbers, and the input stays as it was."""
    fields = {"mixup": alphas[0], "cutmix": alphas[1], "mixup_prob": prob, "mixup_switch_prob": 0.3}
    recipe = RECIPES["fast"].model_copy(update=fields)
    theirs = Mixup(*alphas, prob=prob, switch_prob=0.3, label_smoothing=0.1, num_classes=7)
    x_BCHW = torch.randn(6, 3, 10, 12, generator=generator())
    before, labels_B, logits_BN = x_BCHW.clone(), torch.arange(6), torch.randn(6, 7, generator=generator())
    drawn = np.random.RandomState(5)
    np.random.seed(5)
    kinds = set()
    for _ in range(30):
        mix = draw_mix(recipe, drawn, 10, 12)
        kinds.add((mix.share == 1, mix.box is None))
        expected_x, expected_BN = theirs(x_BCHW.clone(), labels_B)
        torch.testing.assert_close(mix_images(x_BCHW, mix), expected_x)
        targets_BN = mix_labels(labels_B, 7, mix)
        torch.testing.assert_close(0.9 * targets_BN + 0.1 / 7, expected_BN)
        loss = torch.nn.functional.cross_entropy(logits_BN, targets_BN, label_smoothing=0.1)
        torch.testing.assert_close(loss, SoftTargetCrossEntropy()(logits_BN, expected_BN))
    assert torch.equal(x_BCHW, before)
    assert len(kinds) == 1 + (alphas[0] > 0 and alphas[1] > 0) + (prob < 1)


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
@pytest.mark.parametrize("count", [1, 3])
def test_random_erasing_has_timms_statistics(mode, count):
    ones = torch.ones(4000, 2, 16, 20)
    ours = random_erasing(ones, 0.6, mode, count, generator())
    random.seed(0)
    torch.manual_seed(0)
    theirs = RandomErasing(0.6, mode=mode, max_count=count, device="cpu")(ones.clone())
    assert (ones == 1).all()

    def statistics(x_BCHW: torch.Tensor) -> torch.Tensor:
        holes_BHW = (x_BCHW != 1).any(1).float()
        area_B = holes_BHW.mean((1, 2))
        erased = x_BCHW[x_BCHW != 1]
        place = holes_BHW.mean(0)
        tall = holes_BHW.any(2).float().mean()
        values = [(area_B > 0).float().mean(), area_B.mean(), area_B.std(), erased.mean(), erased.std(), tall]
        return torch.stack([*values, place[0, 0], place[8, 10]])

    torch.testing.assert_close(statistics(ours), statistics(theirs), atol=0.03, rtol=0.05)
    erased = ours[(ours != 1).any(1).flatten(1).any(1)][0]
    different = len(erased[0][erased[0] != 1].unique())
    assert different == 1 if mode == "const" else different <= count if mode == "rand" else different > count


def test_scaling_down_is_pils(x_BCHW):
    plain, (mean_C, std_C) = RECIPES["fast"].model_copy(update={"hflip": 0.0, "crop_padding": 0}), torch.zeros(2, 3)
    pixels_BHWC = x_BCHW.permute(0, 2, 3, 1)
    scaled = augment(plain, pixels_BHWC, mean_C, std_C + 1 / 255, generator(), size=(7, 9))
    for image_CHW, found_CHW in zip(x_BCHW[:5], scaled):
        for channel_HW, found_HW in zip(image_CHW, found_CHW):
            wanted = Image.fromarray(channel_HW.numpy().astype(np.float32)).resize((9, 7), Image.Resampling.BILINEAR)
            np.testing.assert_allclose(found_HW, np.asarray(wanted), atol=1e-3)


@pytest.mark.parametrize("size", [1, 4, 5, 30])
def test_cutout_is_one_square_with_its_centre_inside(size):
    x_BCHW = torch.ones(200, 2, 10, 12)
    holes_BHW = cutout(x_BCHW, size, generator())[:, 0] == 0
    assert torch.equal(cutout(x_BCHW, size, generator())[:, 1] == 0, holes_BHW)
    for hole_HW in holes_BHW:
        rows, columns = hole_HW.any(1).nonzero().flatten(), hole_HW.any(0).nonzero().flatten()
        assert hole_HW.sum() == len(rows) * len(columns)
        assert (rows.diff() == 1).all()
        assert (columns.diff() == 1).all()
        assert size // 2 <= len(rows) <= size or len(rows) == 10
    if size <= 5:
        assert max(hole.sum() for hole in holes_BHW) == size**2


@pytest.mark.parametrize(
    "augment",
    [
        lambda x, g: flip(x, 0.5, g),
        lambda x, g: padded_crop(x, 2, g),
        lambda x, g: translate(x, 2, g),
        lambda x, g: resized_crop(x, (0.3, 1.0), (0.5, 2.0), g),
        lambda x, g: cutout(x, 4, g),
        lambda x, g: random_erasing(x, 0.5, "const", 2, g),
    ],
)
def test_same_generator_same_images_and_the_input_is_left_alone(augment, x_BCHW):
    before, global_state = x_BCHW.clone(), torch.get_rng_state()
    first, second, other = (augment(x_BCHW, generator(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(x_BCHW, before)
    assert first.dtype == torch.uint8
    assert torch.equal(torch.get_rng_state(), global_state)
