"""Each batched operation against Pillow's, as timm and torchvision call it: the same image, the same argument."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from expertgrid.model.training.operations import COLOUR, GEOMETRIC, blended
from expertgrid.model.training.pillow import FUNCTIONS

FILL = (120, 7, 250)
VALUES = {  # arguments over the whole range that timm's policies draw from
    **dict.fromkeys(("brightness", "contrast", "color", "sharpness"), np.linspace(0, 2.9, 30).tolist()),
    "hue": np.linspace(-0.5, 0.5, 41).tolist(),
    **dict.fromkeys(("invert", "autocontrast", "equalize"), [0]),
    "posterize": range(1, 10),
    "solarize": [0, 1, 100, 128, 255, 256],
    "solarize_add": [0, 1, 50, 110, 128],
    "gaussian_blur": np.linspace(0.1, 2, 39).tolist(),
    **dict.fromkeys(("shear_x", "shear_y"), np.linspace(-0.9, 0.9, 25).tolist()),
    **dict.fromkeys(("translate_x", "translate_y"), [*np.linspace(-0.45, 0.45, 19).tolist(), -2.0, 2.0]),
    "rotate": [*np.linspace(-30, 30, 25).tolist(), -180, -90, 90, 180, 359.9, 3000],
}


def images(channels: int, height: int, width: int) -> np.ndarray:
    """Noise, a slope, few levels near each other or far apart, one colour, black, white, and two levels."""
    random = np.random.default_rng(0)
    noise = random.integers(0, 256, (3, height, width, channels))
    slope = np.linspace(0, 255, height)[:, None, None] * np.linspace(0.2, 1, width)[:, None] * [1, 0.7, 0.3][:channels]
    dark = 40 + noise[0] % 7
    flat = np.broadcast_to([90, 30, 200][:channels], noise[0].shape)
    two = np.where(noise[1] > 200, 255, 0)
    return np.stack([*noise, slope, dark, noise[2] & 0xE0, flat, 0 * flat, 0 * flat + 255, two]).astype(np.uint8)


def batched(name: str, x_BHWC: Tensor, values, cubic: bool) -> Tensor:
    value_B = torch.tensor(values, dtype=torch.float64)
    if name in COLOUR:
        return COLOUR[name](x_BHWC, value_B)
    return GEOMETRIC[name](x_BHWC, value_B, torch.tensor(FILL[: x_BHWC.shape[3]], dtype=torch.uint8), cubic)


def pils(name: str, pixels_HWC: np.ndarray, value: float, cubic: bool) -> np.ndarray:
    image = Image.fromarray(pixels_HWC[..., 0] if pixels_HWC.shape[2] == 1 else pixels_HWC)
    resample = Image.Resampling.BICUBIC if cubic else Image.Resampling.BILINEAR
    result = FUNCTIONS[name](image, value, resample=resample, fillcolor=FILL[: pixels_HWC.shape[2]])
    return np.asarray(result).reshape(pixels_HWC.shape)


CASES = [(name, cubic) for name in VALUES for cubic in ((False, True) if name in GEOMETRIC else (False,))]


@pytest.mark.parametrize("shape", [(3, 32, 32), (3, 13, 20), (1, 8, 8), (1, 32, 24)])
@pytest.mark.parametrize(("name", "cubic"), CASES)
def test_operations_are_pillows(name, cubic, shape):
    if name == "hue" and shape[0] == 1:
        pytest.skip("grey images have no hue, and recipes that ask for it are refused")
    values = VALUES[name]
    for pixels_HWC in images(*shape):
        pixels_BHWC = torch.from_numpy(np.stack([pixels_HWC] * len(values)))
        before = pixels_BHWC.clone()
        changed_BHWC = batched(name, pixels_BHWC, values, cubic)
        assert changed_BHWC.dtype == torch.uint8
        assert torch.equal(pixels_BHWC, before)
        for value, changed_HWC in zip(values, changed_BHWC.numpy()):
            np.testing.assert_array_equal(changed_HWC, pils(name, pixels_HWC, value, cubic), f"{name} {value}")


def test_arguments_are_of_each_image():
    """A batch in which each image has its own argument is the images one by one."""
    assert {*COLOUR, *GEOMETRIC} == set(VALUES)
    x_BHWC = torch.from_numpy(images(3, 32, 32))
    for name in VALUES:
        values = np.resize(VALUES[name], len(x_BHWC)).astype(float)
        alone = [batched(name, x_BHWC[i : i + 1], values[i : i + 1], True) for i in range(len(x_BHWC))]
        assert torch.equal(batched(name, x_BHWC, values, True), torch.cat(alone)), name


def test_a_posterize_that_keeps_no_bit_is_black():
    """timm's masks say so. Pillow refuses it since its version 12."""
    x_BHWC = torch.from_numpy(images(3, 8, 8))
    for bits in (0.0, -4.0):
        assert not batched("posterize", x_BHWC, [bits] * len(x_BHWC), cubic=False).any()


@pytest.mark.parametrize("share", [-0.5, 0, 0.3, 1, 1.7])
def test_blending_is_pillows(share):
    first, second = images(3, 8, 8)[:2]
    found = blended(*(torch.from_numpy(x)[None] for x in (first, second)), torch.tensor([share]))
    wanted = Image.blend(*map(Image.fromarray, (first, second)), share)
    np.testing.assert_array_equal(found[0].numpy(), np.asarray(wanted))
