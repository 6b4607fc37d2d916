"""The operations of `training.operations` by Pillow, one image after the other: the same pixels.

On a CPU this is faster for large images. Shapes: B images, H x W pixels, C channels.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment as timms
from torch import Tensor
from torchvision.transforms.functional import adjust_hue

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "brightness": timms.brightness,
    "contrast": timms.contrast,
    "color": timms.color,
    "sharpness": timms.sharpness,
    "hue": lambda image, turn, **_: adjust_hue(image, turn),
    "invert": lambda image, _, **__: timms.invert(image),
    "posterize": lambda image, bits, **_: timms.posterize(image, int(bits)) if bits >= 1 else image.point(lambda _: 0),
    "solarize": timms.solarize,
    "solarize_add": lambda image, add, **_: timms.solarize_add(image, int(add)),
    "autocontrast": lambda image, _, **__: timms.auto_contrast(image),
    "equalize": lambda image, _, **__: timms.equalize(image),
    "gaussian_blur": timms.gaussian_blur,
    "shear_x": timms.shear_x,
    "shear_y": timms.shear_y,
    "translate_x": timms.translate_x_rel,
    "translate_y": timms.translate_y_rel,
    "rotate": timms.rotate,
}


def done_by_pillow(name: str, x_BHWC: Tensor, value_B: Tensor, fill_C: Tensor, cubic: bool) -> Tensor:
    """The operation `name` on images of the CPU, with as many threads as PyTorch has."""
    resample = Image.Resampling.BICUBIC if cubic else Image.Resampling.BILINEAR
    fill, values, together = tuple(fill_C.tolist()), value_B.tolist(), torch.get_num_threads()
    images = x_BHWC[..., 0].numpy() if x_BHWC.shape[3] == 1 else x_BHWC.numpy()
    results = np.empty_like(images)

    def work(first: int) -> None:
        for i in range(first, len(images), together):
            image = Image.fromarray(images[i])
            results[i] = FUNCTIONS[name](image, values[i], resample=resample, fillcolor=fill)

    with ThreadPoolExecutor(together) as threads:
        list(threads.map(work, range(together)))  # raises what a thread has raised
    return torch.from_numpy(results).view_as(x_BHWC)
