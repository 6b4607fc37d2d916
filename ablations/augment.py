"""Augmentation as batch arithmetic: pure functions of a batch and a `torch.Generator`, on the batch's device.

Each draws from `generator`, which is on the same device, and leaves its input as it was. Shapes: B images, C channels,
H x W pixels.
"""

import torch
import torch.nn.functional as F
from torch import Generator, Tensor


def hflip(x_BCHW: Tensor, p: float, generator: Generator) -> Tensor:
    """Each image mirrored left to right with probability `p`."""
    flipped_B = torch.rand(len(x_BCHW), device=x_BCHW.device, generator=generator) < p
    return torch.where(flipped_B[:, None, None, None], x_BCHW.flip(3), x_BCHW)


def padded_crop(x_BCHW: Tensor, padding: int, generator: Generator) -> Tensor:
    """Each image padded with zeros on all sides and cropped to its old size at a random place."""
    batch, _, height, width = x_BCHW.shape
    device = x_BCHW.device
    top_B, left_B = torch.randint(2 * padding + 1, (2, batch, 1, 1), device=device, generator=generator)
    rows_BH1 = top_B + torch.arange(height, device=device)[:, None]
    columns_B1W = left_B + torch.arange(width, device=device)
    padded_BHWC = F.pad(x_BCHW, (padding,) * 4).permute(0, 2, 3, 1)
    images_B11 = torch.arange(batch, device=device)[:, None, None]
    return padded_BHWC[images_B11, rows_BH1, columns_B1W].permute(0, 3, 1, 2)


def cutout(x_BCHW: Tensor, size: int, generator: Generator) -> Tensor:
    """A square of `size` pixels set to zero in each image, its centre anywhere in the image (Cutout, 1708.04552).

    Zero is the mean colour of a normalised image. At the border less than the whole square is inside.
    """
    batch, _, height, width = x_BCHW.shape
    device = x_BCHW.device
    y_B1 = torch.randint(height, (batch, 1), device=device, generator=generator) - size // 2
    x_B1 = torch.randint(width, (batch, 1), device=device, generator=generator) - size // 2
    rows_H, columns_W = torch.arange(height, device=device), torch.arange(width, device=device)
    in_rows_BH = (rows_H >= y_B1) & (rows_H < y_B1 + size)
    in_columns_BW = (columns_W >= x_B1) & (columns_W < x_B1 + size)
    return x_BCHW.masked_fill((in_rows_BH[:, :, None] & in_columns_BW[:, None, :])[:, None], 0)


def normalise(pixels_BCHW: Tensor, mean_C: Tensor, std_C: Tensor) -> Tensor:
    """uint8 pixels to floats: (pixel / 255 - mean) / std for each channel. Mean and std are of pixels from 0 to 1."""
    return (pixels_BCHW.float() / 255 - mean_C[:, None, None]) / std_C[:, None, None]
