"""Each batched operation against Pillow's, as timm and torchvision call it: the same image, the same argument."""

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment as timms
from torchvision.transforms.functional import adjust_hue

from expertgrid.model.training.operations import COLOUR, GEOMETRIC, blended

FILL = (120, 7, 250)

# How timm calls Pillow, and arguments over the whole range that its policies draw from.
COLOURS = {
    "brightness": (timms.brightness, np.linspace(0, 2.9, 30).tolist()),
    "contrast": (timms.contrast, np.linspace(0, 2.9, 30).tolist()),
    "color": (timms.color, np.linspace(0, 2.9, 30).tolist()),
    "sharpness": (timms.sharpness, np.linspace(0, 2.9, 30).tolist()),
    "hue": (adjust_hue, np.linspace(-0.5, 0.5, 41).tolist()),
    "invert": (lambda image, _: timms.invert(image), [0]),
    "posterize": (lambda image, bits: timms.posterize(image, int(bits)), range(1, 10)),
    "solarize": (timms.solarize, [0, 1, 100, 128, 255, 256]),
    "solarize_add": (lambda image, add: timms.solarize_add(image, int(add)), [0, 1, 50, 110, 128]),
    "autocontrast": (lambda image, _: timms.auto_contrast(image), [0]),
    "equalize": (lambda image, _: timms.equalize(image), [0]),
    "gaussian_blur": (timms.gaussian_blur, np.linspace(0.1, 2, 39).tolist()),
}
GEOMETRY = {
    "shear_x": (timms.shear_x, np.linspace(-0.9, 0.9, 25).tolist()),
    "shear_y": (timms.shear_y, np.linspace(-0.9, 0.9, 25).tolist()),
    "translate_x": (timms.translate_x_rel, [*np.linspace(-0.45, 0.45, 19).tolist(), -2.0, 2.0]),
    "translate_y": (timms.translate_y_rel, [*np.linspace(-0.45, 0.45, 19).tolist(), -2.0, 2.0]),
    "rotate": (timms.rotate, [*np.linspace(-30, 30, 25).tolist(), -180, -90, 90, 180, 359.9, 3000]),
}
INTERPOLATION = {False: Image.Resampling.BILINEAR, True: Image.Resampling.BICUBIC}


def images(channels: int, height: int, width: int) -> np.ndarray:
    """Noise, a slope, few levels near each other or far apart, one colour, black, white, and two levels."""
    random = np.random.default_rng(0)
    noise = random.integers(0, 256, (3, height, width, channels))
    slope = np.linspace(0, 255, height)[:, None, None] * np.linspace(0.2, 1, width)[:, None] * [1, 0.7, 0.3][:channels]
    dark = 40 + noise[0] % 7
    flat = np.broadcast_to([90, 30, 200][:channels], noise[0].shape)
    two = np.where(noise[1] > 200, 255, 0)
    return np.stack([*noise, slope, dark, noise[2] & 0xE0, flat, 0 * flat, 0 * flat + 255, two]).astype(np.uint8)


def pils(function, pixels_HWC: np.ndarray, *arguments, **options) -> np.ndarray:
    image = Image.fromarray(pixels_HWC[..., 0] if pixels_HWC.shape[2] == 1 else pixels_HWC)
    return np.asarray(function(image, *arguments, **options)).reshape(pixels_HWC.shape)


SHAPES = [(3, 32, 32), (3, 13, 20), (1, 8, 8), (1, 32, 24)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", COLOUR)
def test_colours_are_pillows(name, shape):
    function, values = COLOURS[name]
    if name == "hue" and shape[0] == 1:
        pytest.skip("grey images have no hue, and recipes that ask for it are refused")
    for pixels_HWC in images(*shape):
        pixels_BHWC = torch.from_numpy(np.stack([pixels_HWC] * len(values)))
        before = pixels_BHWC.clone()
        found_BHWC = COLOUR[name](pixels_BHWC, torch.tensor(values, dtype=torch.float64))
        assert found_BHWC.dtype == torch.uint8
        assert torch.equal(pixels_BHWC, before)
        for value, found_HWC in zip(values, found_BHWC.numpy()):
            np.testing.assert_array_equal(found_HWC, pils(function, pixels_HWC, value), f"{name} {value}")


@pytest.mark.parametrize("cubic", INTERPOLATION)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", GEOMETRIC)
def test_geometry_is_pillows(name, shape, cubic):
    function, values = GEOMETRY[name]
    fill = FILL[: shape[0]]
    options = {"resample": INTERPOLATION[cubic], "fillcolor": fill}
    for pixels_HWC in images(*shape):
        pixels_BHWC = torch.from_numpy(np.stack([pixels_HWC] * len(values)))
        before = pixels_BHWC.clone()
        value_B, fill_C = torch.tensor(values, dtype=torch.float64), torch.tensor(fill, dtype=torch.uint8)
        found_BHWC = GEOMETRIC[name](pixels_BHWC, value_B, fill_C, cubic)
        assert found_BHWC.dtype == torch.uint8
        assert torch.equal(pixels_BHWC, before)
        for value, found_HWC in zip(values, found_BHWC.numpy()):
            np.testing.assert_array_equal(found_HWC, pils(function, pixels_HWC, value, **options), f"{name} {value}")


def test_arguments_are_of_each_image():
    """A batch in which each image has its own argument is the images one by one."""
    x_BHWC = torch.from_numpy(images(3, 32, 32))
    fill_C = torch.tensor(FILL, dtype=torch.uint8)
    for name, operation in COLOUR.items():
        value_B = torch.from_numpy(np.resize(COLOURS[name][1], len(x_BHWC)).astype(float))
        alone = [operation(x_BHWC[i : i + 1], value_B[i : i + 1]) for i in range(len(x_BHWC))]
        assert torch.equal(operation(x_BHWC, value_B), torch.cat(alone)), name
    for name, operation in GEOMETRIC.items():
        value_B = torch.from_numpy(np.resize(GEOMETRY[name][1], len(x_BHWC)).astype(float))
        alone = [operation(x_BHWC[i : i + 1], value_B[i : i + 1], fill_C, True) for i in range(len(x_BHWC))]
        assert torch.equal(operation(x_BHWC, value_B, fill_C, True), torch.cat(alone)), name


def test_a_posterize_that_keeps_no_bit_is_black():
    """timm's masks say so. Pillow refuses it since its version 12."""
    x_BHWC = torch.from_numpy(images(3, 8, 8))
    assert not COLOUR["posterize"](x_BHWC, torch.full((len(x_BHWC),), 0.0, dtype=torch.float64)).any()
    assert not COLOUR["posterize"](x_BHWC, torch.full((len(x_BHWC),), -4.0, dtype=torch.float64)).any()


@pytest.mark.parametrize("share", [-0.5, 0, 0.3, 1, 1.7])
def test_blending_is_pillows(share):
    first, second = images(3, 8, 8)[:2]
    found = blended(*(torch.from_numpy(x)[None] for x in (first, second)), torch.tensor([share]))
    wanted = Image.blend(*map(Image.fromarray, (first, second)), share)
    np.testing.assert_array_equal(found[0].numpy(), np.asarray(wanted))
