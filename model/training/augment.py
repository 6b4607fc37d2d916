"""Augmentation as batch arithmetic: pure functions of a batch and a `torch.Generator`, on the batch's device.

Each draws from `generator`, which is on the same device, and does not change its input. Nothing waits for the device:
random numbers that decide a shape (the box of a CutMix) are drawn on the CPU. Shapes: B images, C channels, H x W
pixels, N classes.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from expertgrid.model.pixels import normalise
from expertgrid.model.training.parts import part
from expertgrid.model.training.recipe import Recipe

ERASED_AREA = (0.02, 1 / 3)  # of an image by random erasing, as in timm
ERASED_ASPECT = 0.3  # height / width of what is erased: from this to its inverse
CROP_RATIO = (3 / 4, 4 / 3)  # width / height of a resized crop, as in torchvision and timm
ATTEMPTS = 10  # to draw a box that fits into the image


def flip(x_BCHW: Tensor, p: float, generator: Generator, dim: int = 3) -> Tensor:
    """Each image mirrored with probability `p`: left to right, or top to bottom where `dim` is 2."""
    return mirror(x_BCHW, torch.rand(len(x_BCHW), device=x_BCHW.device, generator=generator) < p, dim)


def mirror(x_BCHW: Tensor, mirrored_B: Tensor, dim: int = 3) -> Tensor:
    """The images for which `mirrored_B` is true, mirrored along a dimension, among the others."""
    return torch.where(mirrored_B[:, None, None, None], x_BCHW.flip(dim), x_BCHW)


def alternately_mirrored(images: int, p: float, epoch: int, generator: Generator) -> Tensor:
    """Which of `images` are mirrored in an epoch (from 0): each at random in the first, then in turns (2404.00498).

    `generator` must be in the same state in each epoch. In any two epochs after each other an image is seen both ways.
    """
    first_B = torch.rand(images, device=generator.device, generator=generator) < p
    return first_B ^ bool(epoch % 2)


def translate(x_BCHW: Tensor, pixels: int, generator: Generator) -> Tensor:
    """Each image shifted by up to `pixels` in both directions, filled with its reflection at the border.

    `pixels` is less than height and width.
    """
    batch, _, height, width = x_BCHW.shape
    device = x_BCHW.device
    down_B, right_B = torch.randint(-pixels, pixels + 1, (2, batch, 1, 1), device=device, generator=generator)
    rows_BH1 = _reflected(torch.arange(height, device=device)[:, None] - down_B, height)
    columns_B1W = _reflected(torch.arange(width, device=device) - right_B, width)
    return _pixels_at(x_BCHW, rows_BH1, columns_B1W)


def _pixels_at(x_BCHW: Tensor, rows_BH1: Tensor, columns_B1W: Tensor) -> Tensor:
    """The pixels of each image at its own rows and columns."""
    images_B11 = torch.arange(len(x_BCHW), device=x_BCHW.device)[:, None, None]
    return x_BCHW.permute(0, 2, 3, 1)[images_B11, rows_BH1, columns_B1W].permute(0, 3, 1, 2)


def _reflected(places: Tensor, size: int) -> Tensor:
    """Indices outside of 0 to `size` - 1 reflected at the first and the last pixel."""
    return (size - 1) - ((size - 1) - places.abs()).abs()


def padded_crop(x_BCHW: Tensor, padding: int, generator: Generator) -> Tensor:
    """Each image padded with zeros on all sides and cropped to its old size at a random place."""
    batch, _, height, width = x_BCHW.shape
    device = x_BCHW.device
    top_B, left_B = torch.randint(2 * padding + 1, (2, batch, 1, 1), device=device, generator=generator)
    rows_BH1 = top_B + torch.arange(height, device=device)[:, None]
    columns_B1W = left_B + torch.arange(width, device=device)
    return _pixels_at(F.pad(x_BCHW, (padding,) * 4), rows_BH1, columns_B1W)


def resized_crop(x_BCHW: Tensor, scale: tuple[float, ...], ratio: tuple[float, ...], generator: Generator) -> Tensor:
    """A random part of each image of uint8, resized to the old size: `RandomResizedCrop` as batch arithmetic.

    The part has a share in `scale` of the image's area, and a width / height in `ratio`. Where ten draws do not fit it
    is the largest one in the centre with such a ratio, as in torchvision. Resized bilinearly. (1409.4842)
    """
    batch, _, height, width = x_BCHW.shape
    uniform = _uniform(x_BCHW, generator)
    area_BA = (scale[0] + (scale[1] - scale[0]) * uniform(batch, ATTEMPTS)) * height * width
    low, high = map(math.log, ratio)
    root_BA = torch.exp(-0.5 * (low + (high - low) * uniform(batch, ATTEMPTS)))
    *box, fits_B = _first_that_fits(area_BA, root_BA, height, width, uniform, whole=True)
    whole_h, whole_w = min(height, round(width / ratio[0])), min(width, round(height * ratio[1]))
    centre = (height - whole_h) // 2, (width - whole_w) // 2, whole_h, whole_w
    top_B1, left_B1, h_B1, w_B1 = (torch.where(fits_B[:, None], drawn, other) for drawn, other in zip(box, centre))
    y_BH = _centres(top_B1, h_B1, height) * (2 / max(1, height - 1)) - 1  # from -1 to 1, from pixel to pixel
    x_BW = _centres(left_B1, w_B1, width) * (2 / max(1, width - 1)) - 1
    grid_BHW2 = torch.stack(torch.broadcast_tensors(x_BW[:, None], y_BH[:, :, None]), dim=3)
    return F.grid_sample(x_BCHW.float(), grid_BHW2, align_corners=True).round().to(x_BCHW.dtype)


def _centres(first_B1: Tensor, side_B1: Tensor, size: int) -> Tensor:
    """Where `size` pixels take their values that share `side_B1` pixels from `first_B1` on, never outside of these."""
    places_N = (torch.arange(size, device=first_B1.device) + 0.5) / size
    return first_B1 + torch.minimum((places_N * side_B1 - 0.5).clamp(min=0), side_B1 - 1)


def _uniform(x_BCHW: Tensor, generator: Generator) -> Callable[..., Tensor]:
    """A function that draws numbers from 0 to 1, of a shape."""
    return lambda *shape: torch.rand(shape, device=x_BCHW.device, generator=generator)


def _first_that_fits(
    area_BA: Tensor, root_BA: Tensor, height: int, width: int, uniform: Callable[..., Tensor], whole: bool = False
) -> tuple[Tensor, ...]:
    """For each image the first box that is less high and wide than the image, at a random place in it.

    Boxes have areas, and roots of height / width. Where `whole`, a box is a pixel at least, and may be as high or wide
    as the image. Returns top, left, height and width (B, 1), and whether one fits (B,).
    """
    sides = (area_BA.sqrt() * root_BA).round(), (area_BA.sqrt() / root_BA).round()
    h_BA, w_BA = (side_BA.clamp(min=int(whole)) for side_BA in sides)
    fits_BA = (h_BA < height + whole) & (w_BA < width + whole)
    first_B1 = fits_BA.int().argmax(1, keepdim=True)
    h_B1, w_B1 = h_BA.gather(1, first_B1), w_BA.gather(1, first_B1)
    top_B1 = (uniform(len(h_B1), 1) * (height - h_B1 + 1)).floor()
    left_B1 = (uniform(len(h_B1), 1) * (width - w_B1 + 1)).floor()
    return top_B1, left_B1, h_B1, w_B1, fits_BA.any(1)


def cutout(x_BCHW: Tensor, size: int, generator: Generator) -> Tensor:
    """A square of `size` pixels set to zero in each image, its centre anywhere in the image (Cutout, 1708.04552).

    Zero is the mean colour of a normalised image. At the border less than the whole square is inside.
    """
    batch, _, height, width = x_BCHW.shape
    top_B1, left_B1 = (
        torch.randint(side, (batch, 1), device=x_BCHW.device, generator=generator) - size // 2
        for side in (height, width)
    )
    return x_BCHW.masked_fill(_boxes(x_BCHW, top_B1, left_B1, size, size), 0)


def _boxes(x_BCHW: Tensor, top_B1: Tensor, left_B1: Tensor, height_B1: Tensor | int, width_B1: Tensor | int) -> Tensor:
    """The pixels (B, 1, H, W) in one box for each image."""
    rows_H, columns_W = (torch.arange(side, device=x_BCHW.device) for side in x_BCHW.shape[2:])
    in_rows_BH = (rows_H >= top_B1) & (rows_H < top_B1 + height_B1)
    in_columns_BW = (columns_W >= left_B1) & (columns_W < left_B1 + width_B1)
    return (in_rows_BH[:, :, None] & in_columns_BW[:, None, :])[:, None]


def random_erasing(
    x_BCHW: Tensor, p: float, mode: Literal["const", "rand", "pixel"], count: int, generator: Generator
) -> Tensor:
    """Rectangles of normalised images erased with probability `p`: timm's `RandomErasing` as batch arithmetic.

    An image that is chosen loses 1 to `count` rectangles, which share the area between them. They become zero
    ("const"), one normal colour each ("rand") or normal noise ("pixel"). (1708.04896)
    """
    batch, channels, height, width = x_BCHW.shape
    device, uniform = x_BCHW.device, _uniform(x_BCHW, generator)
    chosen_B = uniform(batch) < p
    count_B = torch.randint(1, count + 1, (batch,), device=device, generator=generator)
    low, high = ERASED_AREA
    for i in range(count):
        area_BA = (low + (high - low) * uniform(batch, ATTEMPTS)) * height * width / count_B[:, None]
        root_BA = torch.exp((0.5 - uniform(batch, ATTEMPTS)) * -math.log(ERASED_ASPECT))
        *box, fits_B = _first_that_fits(area_BA, root_BA, height, width, uniform)
        erased_B = chosen_B & (i < count_B) & fits_B
        hole_B1HW = _boxes(x_BCHW, *box) & erased_B[:, None, None, None]
        if mode == "const":
            x_BCHW = x_BCHW.masked_fill(hole_B1HW, 0)
        else:
            shape = (batch, channels, height, width) if mode == "pixel" else (batch, channels, 1, 1)
            noise = torch.randn(shape, device=device, dtype=x_BCHW.dtype, generator=generator)
            x_BCHW = torch.where(hole_B1HW, noise, x_BCHW)
    return x_BCHW


class Mix(NamedTuple):
    """How a batch is mixed with the same batch in reverse order."""

    share: float  # weight of each image in its own place; 1: no mixing
    box: tuple[int, int, int, int] | None = None  # of CutMix: first row, row after the last, the same of columns


def draw_mix(recipe: Recipe, random: np.random.RandomState, height: int, width: int) -> Mix:
    """How a batch is mixed by mixup or CutMix: one draw as timm's `Mixup` makes it, in the same order."""
    if random.rand() >= (1.0 if recipe.mixup_prob is None else recipe.mixup_prob):
        return Mix(1.0)
    switch_prob = 0.5 if recipe.mixup_switch_prob is None else recipe.mixup_switch_prob
    use_cutmix = random.rand() < switch_prob if recipe.mixup and recipe.cutmix else recipe.cutmix > 0
    alpha = recipe.cutmix if use_cutmix else recipe.mixup
    share = float(random.beta(alpha, alpha))
    if not use_cutmix or share == 1:
        return Mix(share)
    cut_h, cut_w = (int(side * np.sqrt(1 - share)) for side in (height, width))
    y, x = int(random.randint(0, height)), int(random.randint(0, width))
    top, bottom = (min(max(place, 0), height) for place in (y - cut_h // 2, y + (cut_h + 1) // 2))
    left, right = (min(max(place, 0), width) for place in (x - cut_w // 2, x + (cut_w + 1) // 2))
    return Mix(1 - (bottom - top) * (right - left) / (height * width), (top, bottom, left, right))


def mix_images(x_BCHW: Tensor, mix: Mix) -> Tensor:
    """Mixup (1710.09412), or CutMix (1905.04899) where the mix has a box, of a batch and its reverse."""
    if mix.box is None:
        return x_BCHW if mix.share == 1 else x_BCHW * mix.share + x_BCHW.flip(0) * (1 - mix.share)
    top, bottom, left, right = mix.box
    mixed_BCHW = x_BCHW.clone()
    mixed_BCHW[:, :, top:bottom, left:right] = x_BCHW[:, :, top:bottom, left:right].flip(0)
    return mixed_BCHW


def mix_labels(labels_B: Tensor, classes: int, mix: Mix) -> Tensor:
    """The shares (B, N) of the classes in the mixed images."""
    one_hot_BN = torch.zeros(len(labels_B), classes, device=labels_B.device).scatter_(1, labels_B[:, None], 1.0)
    return one_hot_BN * mix.share + one_hot_BN.flip(0) * (1 - mix.share)


def augment(
    recipe: Recipe,
    pixels_BHWC: Tensor,
    mean_C: Tensor,
    std_C: Tensor,
    generator: Generator,
    mirrored_B: Tensor | None = None,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """A batch of uint8 pixels, augmented as the recipe says: normalised floats (B, C, H, W), channels last.

    `mirrored_B` says which images are mirrored, where `alternating_flip` has decided that. `size` is the height and
    width of the result; without it they stay.
    """
    x_BCHW = pixels_BHWC.permute(0, 3, 1, 2)
    if mirrored_B is not None:
        x_BCHW = mirror(x_BCHW, mirrored_B)
    elif recipe.hflip:
        x_BCHW = flip(x_BCHW, recipe.hflip, generator)
    if recipe.vflip:
        x_BCHW = flip(x_BCHW, recipe.vflip, generator, dim=2)
    if recipe.scale:
        x_BCHW = resized_crop(x_BCHW, recipe.scale, recipe.ratio or CROP_RATIO, generator)
    if recipe.crop_padding:
        x_BCHW = padded_crop(x_BCHW, recipe.crop_padding, generator)
    if recipe.translate:
        x_BCHW = translate(x_BCHW, recipe.translate, generator)
    x_BCHW = normalise(x_BCHW, mean_C, std_C)
    if recipe.cutout:
        x_BCHW = cutout(x_BCHW, recipe.cutout, generator)
    if recipe.reprob:
        x_BCHW = random_erasing(x_BCHW, recipe.reprob, recipe.remode or "pixel", recipe.recount or 1, generator)
    if recipe.augment:
        x_BCHW = part("augment", recipe.augment)(x_BCHW, generator)
    if size is not None and size != x_BCHW.shape[2:]:
        x_BCHW = F.interpolate(x_BCHW, size, mode="bilinear", antialias=True)
    return x_BCHW.contiguous(memory_format=torch.channels_last)
