"""From an image to what a network takes: its size, and its pixels as floats. One way, in training, export and use.

Shapes: B images, C channels, H x W pixels.
"""

import io
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, field_validator

if TYPE_CHECKING:
    from torch import Tensor  # data are read without torch

RESIZE = "shorter side to image_size, bicubic with antialiasing; then centre crop"  # what `fitted` does, in words
BICUBIC = Image.Resampling.BICUBIC  # of Pillow, which antialiases
MOST_PIXELS = 10**8  # of an image that is resized as a whole
LARGEST_IMAGE = 50_000_000  # pixels of an image file; a few kilobytes can say that they are billions
# Pillow's names of the formats that are read. It knows others, and gives EPS to a program that runs what is in it.
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")


class Trained(BaseModel):
    """What a network was trained on, and how an image becomes its input. It holds no path of the machine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    trial: str  # the trial's id
    model: str  # the preset or timm model that the config comes from
    data: str  # the name of the data set
    fingerprint: str  # of its pixels, labels and splits
    classes: tuple[str, ...]
    image_size: tuple[int, int]  # height, width
    resize: str = RESIZE  # how an image of another size is brought to `image_size`
    mean: tuple[float, ...]  # of pixels from 0 to 1, one for each channel
    std: tuple[float, ...]

    @field_validator("resize")
    @classmethod
    def _as_in_evaluation(cls, resize: str) -> str:
        if resize != RESIZE:
            raise ValueError(f"accepted: {RESIZE!r}")
        return resize


class TooManyPixels(ValueError):
    """An image file of more than LARGEST_IMAGE pixels."""


def opened(content: bytes) -> Image.Image:
    """An image from the content of a file, of which the header is read, and no pixel yet.

    Raises TooManyPixels, and what Pillow raises for content that is damaged or of no format of FORMATS.
    """
    too_many = f"more than {LARGEST_IMAGE:,} pixels, which is the limit"
    file = io.BytesIO(content)
    try:
        image = Image.open(file, formats=FORMATS)
    except Image.DecompressionBombError:
        raise TooManyPixels(too_many) from None
    if image.width * image.height > LARGEST_IMAGE:
        image.close()
        raise TooManyPixels(f"{image.width} x {image.height} are {too_many}")
    return image


def normalise(pixels_BCHW: "Tensor", mean_C: "Tensor", std_C: "Tensor") -> "Tensor":
    """uint8 pixels to floats: (pixel / 255 - mean) / std for each channel. Mean and std are of pixels from 0 to 1."""
    return (pixels_BCHW.float() / 255 - mean_C[:, None, None]) / std_C[:, None, None]


def normalised(pixels_BHWC: np.ndarray, trained: Trained) -> np.ndarray:
    """uint8 images (B, H, W, C) as a network trained so takes them, (B, C, H, W): `normalise` without torch."""
    mean_C, std_C = np.asarray(trained.mean, np.float32), np.asarray(trained.std, np.float32)
    return np.ascontiguousarray(((pixels_BHWC.astype(np.float32) / 255 - mean_C) / std_C).transpose(0, 3, 1, 2))


def fitted(image: Image.Image, height: int, width: int) -> Image.Image:
    """An image of any size with `height` x `width` pixels: its shorter side is resized, then the centre is cropped.

    Bicubic with antialiasing: the pixels are those of timm's evaluation transform with a crop_pct of 1.0. An image of
    the right size is returned as it is.
    """
    if image.size == (width, height):
        return image
    full_width, full_height = _covering(image.size, (width, height))
    left, top = round((full_width - width) / 2), round((full_height - height) / 2)
    right, bottom = left + width, top + height
    if full_width * full_height <= MOST_PIXELS:
        return image.resize((full_width, full_height), BICUBIC).crop((left, top, right, bottom))
    # A very long image would take gigabytes. Resizing only what the crop keeps rounds a little differently.
    x_scale, y_scale = image.width / full_width, image.height / full_height
    edges = min(right * x_scale, image.width), min(bottom * y_scale, image.height)
    return image.resize((width, height), BICUBIC, (left * x_scale, top * y_scale, *edges))


def _covering(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """The size (width, height) at which an image of `size` just covers `target`, its aspect ratio kept.

    The longer side is rounded as timm does it: down for a square, by torchvision, else to the nearest integer.
    """
    if target[0] == target[1]:
        shorter = min(size)
        return size[0] * target[0] // shorter, size[1] * target[0] // shorter
    ratio = min(size[0] / target[0], size[1] / target[1])
    return round(size[0] / ratio), round(size[1] / ratio)
