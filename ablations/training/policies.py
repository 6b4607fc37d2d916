"""timm's PIL augmentation: ColorJitter, and the policies of RandAugment, AutoAugment and AugMix.

They draw from the global random state of Python, NumPy and torch, which is seeded here for each image and put back.
"""

import random
import re
from collections.abc import Callable, Generator
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import (
    AugmentOp,
    AutoAugment,
    augment_and_mix_transform,
    auto_augment_transform,
    posterize,
    rand_augment_transform,
)
from torchvision.transforms import ColorJitter, Compose

from ablations.training.data import ImageData
from ablations.training.recipe import Recipe
from model.errors import InputError

Transform = Callable[[Image.Image], Image.Image]

# The parts of a policy string that timm reads. timm ignores most unknown parts silently.
SECTIONS = {
    "rand": ("m", "n", "p", "mstd", "mmax", "inc", "t"),
    "augmix": ("m", "w", "d", "b", "a", "mstd"),
    **dict.fromkeys(("v0", "v0r", "original", "originalr", "3a"), ("mstd",)),
}
RAND_SETS = ("tweights", "t3a", "t3aw")
DRAWS_TRIED = 20  # draws of a transform before training, to see that it takes the images


def check_policy(policy: str) -> None:
    """Raises ValueError where timm does not build the policy, or would ignore a part of it."""
    name, *sections = policy.split("-")
    if name not in SECTIONS:
        raise ValueError(f"no policy of timm starts with {name!r}; accepted: {', '.join(SECTIONS)}")
    keys = []
    for section in sections:
        number = re.fullmatch(r"([a-z]+)\d+(?:\.\d+)?", section)
        keys.append("t" if section in RAND_SETS else number[1] if number else section)
        if keys[-1] not in SECTIONS[name] or (keys[-1] == "t" and section not in RAND_SETS):
            parts = ", ".join(f"{key}NUMBER" for key in SECTIONS[name] if key != "t")
            sets = ", " + ", ".join(RAND_SETS) if name == "rand" else ""
            raise ValueError(f"{section!r} is no part of timm's {name} policies; accepted: {parts}{sets}")
        if keys.count(keys[-1]) > 1:
            raise ValueError(f"{keys[-1]} is given twice")
    try:
        _policy(policy, (0.5,) * 3, (32, 32))
    except (AssertionError, ValueError, KeyError) as error:
        raise ValueError(f"timm does not build the policy: {error or type(error).__name__}") from None


def pil_transform(recipe: Recipe, data: ImageData) -> Transform | None:
    """The PIL part of a recipe's augmentation: the policy, then the jitter. None where the recipe has neither.

    The policy has timm's parameters for images of this size.
    """
    mean, _ = recipe.mean_std(data)
    steps = [_policy(recipe.auto_augment, mean, data.image_size)] if recipe.auto_augment else []
    steps += [ColorJitter(*recipe.color_jitter)] if recipe.color_jitter else []
    return Compose(steps) if steps else None


def check_images(recipe: Recipe, data: ImageData) -> None:
    """Raises InputError where the recipe's PIL transform does not take the images of `data`."""
    field = "auto_augment" if recipe.auto_augment else "color_jitter"
    if data.channels not in (1, 3):
        raise InputError(
            f"recipe.{field}: needs images of 1 or 3 channels; those of {data.name} have {data.channels} channels"
        )
    if data.channels == 1 and len(recipe.color_jitter) == 4 and recipe.color_jitter[3]:
        raise InputError(f"recipe.color_jitter: the images of {data.name} have one channel, and no hue")
    try:
        transform = pil_transform(recipe, data)
        assert transform is not None  # the recipe has one of the two fields
        with random_state_kept():
            for draw in range(DRAWS_TRIED):
                transformed(transform, data.train.pixels_BHWC[0], (draw,))
    except Exception as error:  # PIL, NumPy and torchvision each raise their own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"recipe.{field}: does not work on the images of {data.name}: {reason}") from None


def _policy(policy: str, mean: tuple[float, ...], image_size: tuple[int, int]) -> Transform:
    """As `timm.data.transforms_imagenet_train` builds it."""
    fill = tuple(min(255, round(255 * value)) for value in mean)
    parameters = {"translate_const": int(min(image_size) * 0.45), "img_mean": fill}
    if policy.startswith("rand"):
        built = rand_augment_transform(policy, parameters)
    elif policy.startswith("augmix"):
        built = augment_and_mix_transform(policy, parameters | {"translate_pct": 0.3})
    else:
        built = auto_augment_transform(policy, parameters)
    for op in (op for ops in built.policy for op in ops) if isinstance(built, AutoAugment) else built.ops:
        if isinstance(op, AugmentOp) and op.aug_fn is posterize:
            op.aug_fn = _posterize
    return built


def _posterize(image: Image.Image, bits_to_keep: int, **parameters: object) -> Image.Image:
    """timm's posterize. Its strongest level keeps no bit: a black image, which newer versions of Pillow refuse."""
    return posterize(image, bits_to_keep, **parameters) if bits_to_keep else image.point(lambda _: 0)


def transformed(transform: Transform, pixels_HWC: np.ndarray, key: tuple[int, ...]) -> np.ndarray:
    """An image of one or three channels after the transform. Its random numbers follow from `key`: integers from 0."""
    python, numpy, torchs = map(int, np.random.SeedSequence(key).generate_state(3))
    random.seed(python)
    np.random.seed(numpy)
    torch.default_generator.manual_seed(torchs)
    image = Image.fromarray(pixels_HWC[..., 0] if pixels_HWC.shape[2] == 1 else pixels_HWC)
    return np.asarray(transform(image)).reshape(pixels_HWC.shape)


@contextmanager
def random_state_kept() -> Generator[None]:
    """Afterwards the global random state of Python, NumPy and torch is what it was before."""
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])
