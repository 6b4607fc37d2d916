"""Augmentations, against torchvision on the same draws and against their definitions."""

import pytest
import torch
import torchvision.transforms.v2.functional as TF

from ablations.augment import cutout, hflip, normalise, padded_crop


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def x_BCHW() -> torch.Tensor:
    return torch.randint(1, 256, (64, 3, 10, 12), dtype=torch.uint8, generator=generator())


def test_hflip_mirrors_some_images(x_BCHW):
    flipped = hflip(x_BCHW, 0.5, generator())
    mirrored = [torch.equal(y, TF.horizontal_flip(x)) for x, y in zip(x_BCHW, flipped)]
    same = [torch.equal(y, x) for x, y in zip(x_BCHW, flipped)]
    assert all(m != s for m, s in zip(mirrored, same))
    assert 20 <= sum(mirrored) <= 44
    assert torch.equal(hflip(x_BCHW, 1.0, generator()), TF.horizontal_flip(x_BCHW))
    assert torch.equal(hflip(x_BCHW, 0.0, generator()), x_BCHW)


def test_padded_crop_is_one_of_all_crops(x_BCHW):
    cropped = padded_crop(x_BCHW, 2, generator())
    padded = TF.pad(x_BCHW, [2])
    places = [
        [(top, left) for top in range(5) for left in range(5) if torch.equal(y, TF.crop(x, top, left, 10, 12))]
        for x, y in zip(padded, cropped)
    ]
    assert all(len(found) == 1 for found in places)
    assert {top for ((top, _),) in places} == {left for ((_, left),) in places} == set(range(5))


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


def test_normalise_is_torchvisions(x_BCHW):
    mean, std = (0.1, 0.5, 0.9), (0.2, 0.3, 0.4)
    expected = TF.normalize(TF.to_dtype(x_BCHW, torch.float32, scale=True), mean, std)
    torch.testing.assert_close(normalise(x_BCHW, torch.tensor(mean), torch.tensor(std)), expected)


@pytest.mark.parametrize(
    "augment", [lambda x, g: hflip(x, 0.5, g), lambda x, g: padded_crop(x, 2, g), lambda x, g: cutout(x, 4, g)]
)
def test_same_generator_same_images_and_the_input_is_left_alone(augment, x_BCHW):
    before, global_state = x_BCHW.clone(), torch.get_rng_state()
    first, second, other = (augment(x_BCHW, generator(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(x_BCHW, before)
    assert first.dtype == torch.uint8
    assert torch.equal(torch.get_rng_state(), global_state)
