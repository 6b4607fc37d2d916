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
    """The operation `name` on images of the CPU, as many at a time as PyTorch has threads."""
    resample = Image.Resampling.BICUBIC if cubic else Image.Resampling.BILINEAR
    fill = tuple(fill_C.tolist())

    def done(pixels_HWC: np.ndarray, value: float) -> np.ndarray:
        image = Image.fromarray(pixels_HWC[..., 0] if pixels_HWC.shape[2] == 1 else pixels_HWC)
        return np.asarray(FUNCTIONS[name](image, value, resample=resample, fillcolor=fill)).reshape(pixels_HWC.shape)

    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        return torch.from_numpy(np.stack(list(threads.map(done, x_BHWC.numpy(), value_B.tolist()))))
