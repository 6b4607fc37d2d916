"""Sizes and values of pixels, against timm and torchvision."""

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data import create_transform
from torchvision.transforms import CenterCrop, InterpolationMode, Resize

from expertgrid.model import pixels
from expertgrid.model.pixels import fitted, normalise


def test_normalise_is_torchvisions():
    pixels_BCHW = torch.randint(256, (4, 3, 5, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = (0.1, 0.5, 0.9), (0.2, 0.3, 0.4)
    expected = TF.normalize(TF.to_dtype(pixels_BCHW, torch.float32, scale=True), mean, std)
    torch.testing.assert_close(normalise(pixels_BCHW, torch.tensor(mean), torch.tensor(std)), expected)


SIZES = [(32, 32), (100, 61), (61, 100), (500, 333), (33, 32), (9, 7), (1, 1), (1, 40), (40, 1), (640, 479)]


def noise(width: int, height: int, mode: str) -> Image.Image:
    """Random pixels: the hardest to resize alike."""
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    return Image.fromarray(np.random.default_rng(width).integers(256, size=shape, dtype=np.uint8))


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("wanted", [(32, 32), (6, 8), (17, 5)], ids=str)
def test_an_image_is_fitted_as_timms_evaluation_does(wanted, mode):
    height, width = wanted
    timms = create_transform((3, height, width), interpolation="bicubic", crop_pct=1.0, normalize=False)
    for size in SIZES:
        image = noise(*size, mode)
        expected_HWC = timms(image).permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(
            np.asarray(fitted(image, height, width)).reshape(expected_HWC.shape), expected_HWC
        )


def test_a_very_long_image_is_not_resized_as_a_whole(monkeypatch):
    """What is computed of it is what the crop keeps, but for rounding."""
    whole = [np.asarray(fitted(noise(*size, "RGB"), 17, 20)).astype(int) for size in SIZES]
    monkeypatch.setattr(pixels, "MOST_PIXELS", 0)
    for size, expected_HWC in zip(SIZES, whole):
        assert np.abs(np.asarray(fitted(noise(*size, "RGB"), 17, 20)) - expected_HWC).max() <= 2
    assert (np.asarray(fitted(Image.new("L", (1_000_000, 1), 7), 64, 64)) == 7).all()  # it would have 4e9 pixels


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 80), st.integers(1, 80), st.integers(1, 40))
def test_any_image_at_any_size_is_torchvisions(width, height, size):
    """torchvision pads an image with zeros where it is smaller than the crop; after Resize none is."""
    image = noise(width, height, "RGB")
    expected = CenterCrop(size)(Resize(size, InterpolationMode.BICUBIC)(image))
    assert (np.asarray(fitted(image, size, size)) == np.asarray(expected)).all()
