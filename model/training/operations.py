"""The image operations of timm's policies and of ColorJitter, for a batch in which each image has its own argument.

Each is a pure function of uint8 pixels (B, H, W, C) of one or three channels and of `value_B`, an argument in float64
for each image. The result is Pillow's, bit for bit: where Pillow computes in float or double, so do these, in the same
order and with the same rounding. (On CUDA some cosines differ in their last bit.) Nothing waits for the device. Shapes:
B images, H x W pixels, C channels.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Operation = Callable[[Tensor, Tensor], Tensor]

GREY = (19595, 38470, 7471)  # shares of red, green and blue in the luma, of 65536
BLUR_PASSES = 3  # of a box, which together are nearly a Gaussian
BLUR_REACH = 2  # pixels on each side of a box; enough for a standard deviation of 2
BLUR_ONE = 1 << 24  # the weights of a box are integers; this is their sum


def _divided(x: Tensor | float, y: Tensor | float) -> Tensor:
    """x / y. PyTorch multiplies with the inverse where one of them is a number, which rounds otherwise."""
    tensor = x if isinstance(x, Tensor) else y
    assert isinstance(tensor, Tensor)
    x, y = (value if isinstance(value, Tensor) else tensor.new_full((), value) for value in (x, y))
    return x / y


def _for_pixels(value_B: Tensor) -> Tensor:
    return value_B[:, None, None, None]


def blended(first_BHWC: Tensor, second_BHWC: Tensor, share_B: Tensor) -> Tensor:
    """The first images and `share_B` of the way to the second, or beyond them."""
    first_BHWC = first_BHWC.float()
    way_BHWC = (second_BHWC.float() - first_BHWC).mul_(_for_pixels(share_B.float()))
    return way_BHWC.add_(first_BHWC).clamp_(0, 255).to(torch.uint8)


def grey(x_BHWC: Tensor) -> Tensor:
    """The luma (B, H, W, 1) of the images."""
    if x_BHWC.shape[3] == 1:
        return x_BHWC
    red_BHW, green_BHW, blue_BHW = (x_BHWC[..., c].int() * share for c, share in enumerate(GREY))
    luma_BHW = red_BHW + green_BHW + blue_BHW + (1 << 15)
    return (luma_BHW >> 16).to(torch.uint8)[..., None]


def brightness(x_BHWC: Tensor, value_B: Tensor) -> Tensor:
    return (x_BHWC * _for_pixels(value_B.float())).clamp_(max=255).to(torch.uint8)


def contrast(x_BHWC: Tensor, value_B: Tensor) -> Tensor:
    grey_BN = grey(x_BHWC).flatten(1)
    pixels = grey_BN.shape[1]
    mean_B = (2 * grey_BN.sum(1) + pixels).div(2 * pixels, rounding_mode="floor")
    return blended(_for_pixels(mean_B), x_BHWC, value_B)


def color(x_BHWC: Tensor, value_B: Tensor) -> Tensor:
    return x_BHWC if x_BHWC.shape[3] == 1 else blended(grey(x_BHWC), x_BHWC, value_B)


def sharpness(x_BHWC: Tensor, value_B: Tensor) -> Tensor:
    """Away from, or towards, the image smoothed over 3 x 3 pixels. Pixels at the border stay."""
    inner_BHWC, x16_BHWC = x_BHWC[:, 1:-1, 1:-1], x_BHWC.short()
    rows_BHWC = x16_BHWC[:, :-2] + x16_BHWC[:, 1:-1] + x16_BHWC[:, 2:]
    around_BHWC = rows_BHWC[:, :, :-2] + rows_BHWC[:, :, 1:-1] + rows_BHWC[:, :, 2:]
    smooth_BHWC = ((around_BHWC + 4 * x16_BHWC[:, 1:-1, 1:-1]).float() / 13 + 0.5).floor_()
    sharp_BHWC = x_BHWC.clone()
    sharp_BHWC[:, 1:-1, 1:-1] = blended(smooth_BHWC, inner_BHWC, value_B)
    return sharp_BHWC


def hue(x_BHWC: Tensor, value_B: Tensor) -> Tensor:
    """The hue turned by `value_B` of a full turn: Pillow's HSV images, whose hue has 255 steps."""
    large_BHW, small_BHW = x_BHWC.amax(3), x_BHWC.amin(3)
    range_BHW = (large_BHW - small_BHW).float()
    grey_BHW = range_BHW == 0
    range_BHW = range_BHW.masked_fill(grey_BHW, 1)
    red_BHW, green_BHW, blue_BHW = (((large_BHW - x_BHWC[..., c]).float() / range_BHW).double() for c in range(3))
    is_red_BHW, is_green_BHW = x_BHWC[..., 0] == large_BHW, x_BHWC[..., 1] == large_BHW
    other_BHW = torch.where(is_green_BHW, 2 + red_BHW - blue_BHW, 4 + green_BHW - red_BHW)
    angle_BHW = torch.where(is_red_BHW, blue_BHW - green_BHW, other_BHW).float().double()
    angle_BHW = ((_divided(angle_BHW, 6) + 1) % 1).float().double().masked_fill(grey_BHW, 0)
    step_BHW = (angle_BHW * 255).to(torch.uint8)
    step_BHW += (value_B * 255).to(torch.int32).to(torch.uint8)[:, None, None]

    saturation_BHW = (range_BHW / large_BHW.clamp(min=1)).double() * 255
    saturation_BHW = saturation_BHW.to(torch.uint8).masked_fill(grey_BHW, 0).double()
    share_BHW = _divided(saturation_BHW, 255).float().double()
    sixths_BHW = _divided(step_BHW.double() * 6, 255)
    sector_BHW = sixths_BHW.floor()
    past_BHW = (sixths_BHW - sector_BHW).float().double()
    value_BHW = large_BHW.double()
    low_BHW = (value_BHW * (1 - share_BHW) + 0.5).floor_()
    falling_BHW = (value_BHW * (1 - (share_BHW * past_BHW).float().double()) + 0.5).floor_()
    rising_BHW = (value_BHW * (1 - share_BHW * (1 - past_BHW)) + 0.5).floor_()
    channels = []
    for turned in (0, 2, 4):  # sixths of the circle by which red, green and blue are apart
        place_BHW = (sector_BHW - turned) % 6
        channel_BHW = torch.where(place_BHW == 1, falling_BHW, value_BHW)
        channel_BHW = torch.where(place_BHW == 4, rising_BHW, channel_BHW)
        channels.append(torch.where((place_BHW == 2) | (place_BHW == 3), low_BHW, channel_BHW))
    return torch.stack(channels, 3).to(torch.uint8)


def invert(x_BHWC: Tensor, value_B: Tensor) -> Tensor:
    return ~x_BHWC


def posterize(x_BHWC: Tensor, value_B: Tensor) -> Tensor:
    """The upper `value_B` bits of each pixel. Where it keeps none, the image is black."""
    mask_B = 256 - 2 ** (8 - value_B.clamp(0, 8))
    return x_BHWC & _for_pixels(mask_B.to(torch.uint8))


def solarize(x_BHWC: Tensor, value_B: Tensor) -> Tensor:
    return torch.where(x_BHWC < _for_pixels(value_B.short()), x_BHWC, ~x_BHWC)


def solarize_add(x_BHWC: Tensor, value_B: Tensor) -> Tensor:
    """`value_B`, up to 128, added to the pixels below 128."""
    return torch.where(x_BHWC < 128, x_BHWC + _for_pixels(value_B.to(torch.uint8)), x_BHWC)


def autocontrast(x_BHWC: Tensor, value_B: Tensor) -> Tensor:
    """Each channel stretched, so that it has 0 and 255."""
    low_B11C, high_B11C = x_BHWC.amin((1, 2), keepdim=True).double(), x_BHWC.amax((1, 2), keepdim=True).double()
    scale_B11C = _divided(255, high_B11C - low_B11C)
    stretched_BHWC = (x_BHWC * scale_B11C).add_(-low_B11C * scale_B11C).clamp_(0, 255).to(torch.uint8)
    return torch.where(high_B11C > low_B11C, stretched_BHWC, x_BHWC)


def equalize(x_BHWC: Tensor, value_B: Tensor) -> Tensor:
    """The levels of each channel spread, so that about equally many pixels are in each part of the range."""
    images, height, width, channels = x_BHWC.shape
    series = torch.arange(images * channels, device=x_BHWC.device).view(images, 1, 1, channels)
    place_N = (x_BHWC + 256 * series).flatten()
    counts_N = torch.zeros(images * channels * 256, dtype=torch.int32, device=x_BHWC.device)
    counts_N.scatter_add_(0, place_N, torch.ones_like(place_N, dtype=torch.int32))
    counts_SL = counts_N.view(-1, 256).long()  # a series is a channel of an image, L are the levels
    below_SL = counts_SL.cumsum(1) - counts_SL
    largest_S1 = x_BHWC.amax((1, 2)).flatten()[:, None].long()
    step_S1 = below_SL.gather(1, largest_S1).div(255, rounding_mode="floor")
    spread_SL = (below_SL + step_S1 // 2).div(step_S1.clamp(min=1), rounding_mode="floor").clamp(max=255)
    levels_L = torch.arange(256, device=x_BHWC.device)
    table_SL = torch.where(step_S1 > 0, spread_SL, levels_L).to(torch.uint8)
    return table_SL.flatten()[place_N].view_as(x_BHWC)


def gaussian_blur(x_BHWC: Tensor, value_B: Tensor) -> Tensor:
    """Blurred by `value_B` pixels, a standard deviation up to 2: three boxes in each direction, as Pillow does it."""
    variance_B = _divided(value_B.float() ** 2, BLUR_PASSES)
    length_B = (12 * variance_B.double() + 1).sqrt().float()
    whole_B = ((length_B.double() - 1) / 2).floor().float()
    part_B = (2 * whole_B + 1) * (whole_B * (whole_B + 1) - 3 * variance_B)
    part_B = part_B / (6 * (variance_B - (whole_B + 1) * (whole_B + 1)))
    radius_B = whole_B + part_B
    reach_B = radius_B.int()
    inner_B = _divided(BLUR_ONE, radius_B * 2 + 1).int()
    outer_B = (BLUR_ONE - (reach_B * 2 + 1) * inner_B) // 2
    weights = [
        _for_pixels(torch.where(reach_B >= away, inner_B, torch.where(reach_B + 1 == away, outer_B, 0)))
        for away in range(BLUR_REACH + 1)
    ]
    for axis in (2, 1):
        size = x_BHWC.shape[axis]
        places = torch.arange(-BLUR_REACH, size + BLUR_REACH, device=x_BHWC.device).clamp_(0, size - 1)
        for _ in range(BLUR_PASSES):
            wide = x_BHWC.index_select(axis, places).int()
            taps = [wide.narrow(axis, start, size) for start in range(2 * BLUR_REACH + 1)]
            total_BHWC = taps[BLUR_REACH] * weights[0] + (1 << 23)
            for away in range(1, BLUR_REACH + 1):
                total_BHWC += (taps[BLUR_REACH - away] + taps[BLUR_REACH + away]) * weights[away]
            x_BHWC = (total_BHWC >> 24).to(torch.uint8)  # sums of 32 bits; what is above 31 is cut off here
    return x_BHWC


def shear_x(x_BHWC: Tensor, value_B: Tensor, fill_C: Tensor, cubic: bool) -> Tensor:
    x_W, y_H = _centres(x_BHWC)
    return _along_rows(x_BHWC, x_W + value_B[:, None, None] * y_H[:, None], fill_C, cubic)


def translate_x(x_BHWC: Tensor, value_B: Tensor, fill_C: Tensor, cubic: bool) -> Tensor:
    """Shifted by `value_B` of the width."""
    x_W, y_H = _centres(x_BHWC)
    place_B1W = x_W + value_B[:, None, None] * x_BHWC.shape[2]
    return _along_rows(x_BHWC, place_B1W.expand(-1, len(y_H), -1), fill_C, cubic)


def shear_y(x_BHWC: Tensor, value_B: Tensor, fill_C: Tensor, cubic: bool) -> Tensor:
    return shear_x(x_BHWC.transpose(1, 2), value_B, fill_C, cubic).transpose(1, 2)


def translate_y(x_BHWC: Tensor, value_B: Tensor, fill_C: Tensor, cubic: bool) -> Tensor:
    return translate_x(x_BHWC.transpose(1, 2), value_B, fill_C, cubic).transpose(1, 2)


def rotate(x_BHWC: Tensor, value_B: Tensor, fill_C: Tensor, cubic: bool) -> Tensor:
    """Turned counter-clockwise by `value_B` degrees around the centre."""
    _, height, width, _ = x_BHWC.shape
    angle_B = -(value_B % 360) * (math.pi / 180)
    cos_B11, sin_B11 = (part(angle_B).round(decimals=15)[:, None, None] for part in (torch.cos, torch.sin))
    middle_x, middle_y = width / 2, height / 2
    x_W, y_H = _centres(x_BHWC)
    y_H1 = y_H[:, None]
    x_BHW = cos_B11 * x_W + sin_B11 * y_H1 + (-cos_B11 * middle_x - sin_B11 * middle_y + middle_x)
    y_BHW = -sin_B11 * x_W + cos_B11 * y_H1 + (sin_B11 * middle_x - cos_B11 * middle_y + middle_y)
    inside_BHW = (x_BHW >= 0) & (x_BHW < width) & (y_BHW >= 0) & (y_BHW < height)
    row_BHW, down_BHW = _split(y_BHW)
    first_B11 = _first_pixels(x_BHWC)[:, :1]
    lines_BHW = [(row_BHW + down).clamp_(0, height - 1).mul_(width).add_(first_B11) for down in _taps(cubic)]
    return _resampled(x_BHWC, lines_BHW, x_BHW, down_BHW, inside_BHW, fill_C, cubic)


def _centres(x_BHWC: Tensor) -> tuple[Tensor, Tensor]:
    """Where the centres of the columns and rows are."""
    _, height, width, _ = x_BHWC.shape
    x_W, y_H = (torch.arange(size, device=x_BHWC.device, dtype=torch.float64) + 0.5 for size in (width, height))
    return x_W, y_H


def _first_pixels(x_BHWC: Tensor) -> Tensor:
    """The number (B, H, 1) of each row's first pixel, among the pixels of all images."""
    images, height, width, _ = x_BHWC.shape
    rows = torch.arange(0, images * height * width, width, dtype=torch.int32, device=x_BHWC.device)
    return rows.view(images, height, 1)


def _along_rows(x_BHWC: Tensor, place_BHW: Tensor, fill_C: Tensor, cubic: bool) -> Tensor:
    """Each pixel from another place of its row, between two pixels or among four."""
    inside_BHW = (place_BHW >= 0) & (place_BHW < x_BHWC.shape[2])
    return _resampled(x_BHWC, [_first_pixels(x_BHWC)], place_BHW, None, inside_BHW, fill_C, cubic)


def _resampled(
    x_BHWC: Tensor,
    lines_BHW: list[Tensor],
    place_BHW: Tensor,
    down_BHW: Tensor | None,
    inside_BHW: Tensor,
    fill_C: Tensor,
    cubic: bool,
) -> Tensor:
    """Each pixel from a place in a line of pixels, or between such places in several lines.

    A line is the number of its first pixel. All channels of a pixel are fetched at once: a pixel is one number.
    """
    width, channels = x_BHWC.shape[2:]
    if channels == 3:
        x_BHWC, fill_C = (F.pad(colours, (0, 1)) for colours in (x_BHWC, fill_C))
    number = torch.int32 if channels == 3 else torch.uint8
    pixels_N = x_BHWC.contiguous().view(number).flatten()
    column_BHW, right_BHW = _split(place_BHW)
    columns_BHW = [(column_BHW + right).clamp_(0, width - 1) for right in _taps(cubic)]

    def at(number_BHW: Tensor) -> Tensor:
        return pixels_N.index_select(0, number_BHW.flatten()).view(torch.uint8).view_as(x_BHWC).short()

    def of_colours(share_BHW: Tensor) -> Tensor:
        return share_BHW[..., None].expand(x_BHWC.shape).contiguous()

    right_BHWC = of_colours(right_BHW)
    values = [_between([at(line + column) for column in columns_BHW], right_BHWC) for line in lines_BHW]
    value_BHWC = values[0] if down_BHW is None else _between(values, of_colours(down_BHW))
    moved_BHWC = value_BHWC.clamp_(0, 255).to(torch.uint8)
    filled_BHW1 = torch.where(inside_BHW[..., None], moved_BHWC.view(number), fill_C.view(number))
    return filled_BHW1.view(torch.uint8)[..., :channels]


def _taps(cubic: bool) -> range:
    return range(-1, 3) if cubic else range(2)


def _split(place_BHW: Tensor) -> tuple[Tensor, Tensor]:
    """The pixel whose centre is at or before a place, and how far the place is from it."""
    place_BHW = place_BHW - 0.5
    before_BHW = place_BHW.floor()
    return before_BHW.int(), place_BHW - before_BHW


def _between(points: list[Tensor], share: Tensor) -> Tensor:
    """Between the first and the second of two points, or the second and the third of four, in float64."""
    if len(points) == 2:
        first, second = points
        return (second - first).double().mul_(share).add_(first.double())
    first, second, third, fourth = points
    value = (second - first - third + fourth).double().mul_(share)
    value.add_(((first - second) * 2 + third - fourth).double()).mul_(share)
    return value.add_((third - first).double()).mul_(share).add_(second.double())


COLOUR: dict[str, Operation] = {
    operation.__name__: operation
    for operation in (
        brightness, contrast, color, sharpness, hue, invert, posterize, solarize, solarize_add, autocontrast, equalize,
        gaussian_blur,
    )
}  # fmt: skip
GEOMETRIC: dict[str, Callable[[Tensor, Tensor, Tensor, bool], Tensor]] = {
    operation.__name__: operation for operation in (shear_x, shear_y, translate_x, translate_y, rotate)
}
