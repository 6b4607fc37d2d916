"""timm's policies (RandAugment, AutoAugment, AugMix) and torchvision's ColorJitter, for whole batches on a device.

timm reads the policy string. What happens to each image is drawn on the CPU, for a whole batch at once, with timm's
distributions. Then each operation is computed for all images that it was drawn for. So its number of images is known
without waiting for the device. Shapes: B images, H x W pixels, C channels, K chains of operations for each image (1, or
the width of an AugMix), N = B x K, L operations in a chain, S operations to choose from, J kinds of jitter.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.random import RandomState
from timm.data.auto_augment import (
    AugmentOp,
    AugMixAugment,
    AutoAugment,
    RandAugment,
    augment_and_mix_transform,
    auto_augment_transform,
    rand_augment_transform,
)
from torch import Tensor

from expertgrid.model.system.errors import InputError, reason_of
from expertgrid.model.training.data import ImageData
from expertgrid.model.training.operations import COLOUR, GEOMETRIC, blended
from expertgrid.model.training.pillow import done_by_pillow

# The parts of a policy string that timm reads. timm ignores most unknown parts silently.
SECTIONS = {
    "rand": ("m", "n", "p", "mstd", "mmax", "inc", "t"),
    "augmix": ("m", "w", "d", "b", "a", "mstd"),
    **dict.fromkeys(("v0", "v0r", "original", "originalr", "3a"), ("mstd",)),
}
RAND_SETS = ("tweights", "t3a", "t3aw")
DRAWS_TRIED = 20  # draws of a policy before training, to see that it takes the images
LARGEST_BATCHED = 64 * 64  # pixels of an image: larger ones are faster with Pillow on a CPU, as measured
LARGEST_LEVEL = 10  # of a magnitude, where a policy does not say another
DEPTHS = (1, 2, 3)  # of an AugMix that does not say its depth

JITTERED = (("brightness", 1, 0), ("contrast", 1, 0), ("color", 1, 0), ("hue", 0, -0.5))  # around what; at least what

ENHANCED = ("Color", "Contrast", "Brightness", "Sharpness")
NOTHING = "nothing"
OPERATIONS = [NOTHING, *COLOUR, *(name for name in GEOMETRIC for _ in range(2))]  # bilinear, then bicubic
NUMBERS = {name: OPERATIONS.index(name) for name in OPERATIONS}

Argument = Callable[[np.ndarray, np.ndarray], np.ndarray]  # of the levels, and a number from 0 to 1 for each


def _signed(largest: float) -> Argument:
    return lambda level, uniform: np.where(uniform > 0.5, -1, 1) * (level / LARGEST_LEVEL * largest)


def _whole(level: np.ndarray, scale: int) -> np.ndarray:
    return np.trunc(level / LARGEST_LEVEL * scale)


def _clamped(level: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.clip(low + (high - low) * (level / LARGEST_LEVEL), low, high)


def _arguments(translated: float) -> dict[str, tuple[str, Argument]]:
    """For each of timm's operations ours, and its argument. `translated` is the largest translation, of a side."""
    changed = _signed(0.9)
    return {
        **{name: (name.lower(), lambda level, _: level) for name in ("AutoContrast", "Equalize", "Invert")},
        **{name: (name.lower(), lambda level, _: level / LARGEST_LEVEL * 1.8 + 0.1) for name in ENHANCED},
        **{
            f"{name}Increasing": (name.lower(), lambda level, uniform: np.maximum(0.1, 1 + changed(level, uniform)))
            for name in ENHANCED
        },
        "Rotate": ("rotate", _signed(30)),
        "Posterize": ("posterize", lambda level, _: _whole(level, 4)),
        "PosterizeIncreasing": ("posterize", lambda level, _: 4 - _whole(level, 4)),
        "PosterizeOriginal": ("posterize", lambda level, _: 4 + _whole(level, 4)),
        "Solarize": ("solarize", lambda level, _: np.minimum(256, _whole(level, 256))),
        "SolarizeIncreasing": ("solarize", lambda level, _: 256 - np.minimum(256, _whole(level, 256))),
        "SolarizeAdd": ("solarize_add", lambda level, _: np.minimum(128, _whole(level, 110))),
        "ShearX": ("shear_x", _signed(0.3)),
        "ShearY": ("shear_y", _signed(0.3)),
        "TranslateXRel": ("translate_x", _signed(translated)),
        "TranslateYRel": ("translate_y", _signed(translated)),
        "Desaturate": ("color", lambda level, _: 1 - _clamped(level, 0.5, 1)),
        "GaussianBlur": ("gaussian_blur", lambda level, _: _clamped(level, 0.1, 2)),
        "GaussianBlurRand": ("gaussian_blur", lambda level, uniform: 0.1 + (2 * _clamped(level, 0, 1) - 0.1) * uniform),
    }


class Drawn(NamedTuple):
    """What happens to the images of a batch."""

    operations_NL: np.ndarray  # their places in OPERATIONS
    values_NL: np.ndarray  # their arguments, float64
    shares_BK: np.ndarray | None = None  # float32: how the chains of an image are mixed, of an AugMix
    strength_B: np.ndarray | None = None  # float32: of the mixture in the image

    @classmethod
    def joined(cls, draws: "Sequence[Drawn]") -> "Drawn":
        """The draws of several batches as those of one."""
        return cls(*(np.concatenate(parts) for parts in zip(*draws) if parts[0] is not None))


class _Operations:
    """The operations that a policy chooses from, and how their arguments are drawn."""

    def __init__(self, operations: Sequence[AugmentOp]):
        first = operations[0]
        parameters: dict[str, Any] = first.hparams
        self.std: float = parameters.get("magnitude_std", 0)
        self.largest = first.magnitude_max or LARGEST_LEVEL
        self.prob_S = np.array([operation.prob for operation in operations], float)
        self.magnitude_S = np.array([operation.magnitude for operation in operations], float)
        names = sorted({operation.name for operation in operations})
        self.name_S = np.array([names.index(operation.name) for operation in operations])
        arguments = _arguments(parameters.get("translate_pct", 0.45))
        self.arguments = [arguments[name] for name in names]

    def draw(self, random: RandomState, chosen_NL: np.ndarray) -> Drawn:
        """Draws whether each of the chosen operations is done, and how. -1 is a place without one."""
        shape = chosen_NL.shape
        done_NL = (chosen_NL >= 0) & (random.random_sample(shape) <= self.prob_S[chosen_NL])
        level_NL = self.magnitude_S[chosen_NL]
        if self.std == np.inf:
            level_NL = random.random_sample(shape) * level_NL
        elif self.std > 0:
            level_NL = random.normal(level_NL, self.std)
        level_NL = np.clip(level_NL, 0, self.largest)
        uniform_NL, cubic_NL = random.random_sample(shape), random.random_sample(shape) < 0.5
        name_NL = np.where(done_NL, self.name_S[chosen_NL], -1)
        operations_NL, values_NL = np.zeros(shape, np.int16), np.zeros(shape)
        for i, (operation, argument) in enumerate(self.arguments):
            places = name_NL == i
            operations_NL[places] = NUMBERS[operation] + (cubic_NL[places] if operation in GEOMETRIC else 0)
            values_NL[places] = argument(level_NL[places], uniform_NL[places])
        return Drawn(operations_NL, values_NL)


class Policy:
    """A recipe's `auto_augment`, then its `color_jitter`, on a device.

    `mean` is that with which the images are normalised, from 0 to 1: what a geometric operation leaves open is filled
    with it. `image_size` is height and width.
    """

    def __init__(
        self,
        auto_augment: str,
        color_jitter: Sequence[float],
        mean: Sequence[float],
        image_size: tuple[int, int],
        device: torch.device,
    ):
        height, width = image_size
        self.device, self.with_pillow = device, device.type == "cpu" and height * width > LARGEST_BATCHED
        self.fill_C = torch.tensor([min(255, round(255 * value)) for value in mean], dtype=torch.uint8, device=device)
        self.timms = _timms(auto_augment) if auto_augment else None
        if self.timms is not None:
            self.operations = _Operations(_flat(self.timms))
        ranges = [
            (NUMBERS[name], max(lowest, middle - most), middle + most)
            for (name, middle, lowest), most in zip(JITTERED, color_jitter)
            if most
        ]
        self.jitter_J, self.low_J, self.high_J = np.array(ranges).reshape(-1, 3).T

    def draw(self, random: RandomState, images: int) -> Drawn:
        """Draws what happens to each image of a batch of `images`."""
        if isinstance(self.timms, AugMixAugment):
            shares_BK, strength_B = _mixture(self.timms, random, images)
            drawn = self.operations.draw(random, _chosen(self.timms, random, images * self.timms.width))
            return drawn._replace(shares_BK=shares_BK, strength_B=strength_B)
        jittered = self._jittered(random, images)
        if self.timms is None:
            return jittered
        drawn = self.operations.draw(random, _chosen(self.timms, random, images))
        return Drawn(*(np.concatenate(pair, 1) for pair in zip(drawn[:2], jittered[:2])))

    def _jittered(self, random: RandomState, images: int) -> Drawn:
        order_BJ = random.random_sample((images, len(self.jitter_J))).argsort(1)
        values_BJ = self.low_J + (self.high_J - self.low_J) * random.random_sample(order_BJ.shape)
        return Drawn(self.jitter_J.astype(np.int16)[order_BJ], np.take_along_axis(values_BJ, order_BJ, 1))

    def apply(self, pixels_BHWC: Tensor, drawn: Drawn) -> Tensor:
        """The images after what was drawn for them. Does not change `pixels_BHWC`, and does not wait for the device."""
        x_NHWC = pixels_BHWC
        if drawn.shares_BK is not None:
            x_NHWC = pixels_BHWC[:, None].expand(-1, drawn.shares_BK.shape[1], -1, -1, -1).flatten(0, 1)
        # Before each step the images are sorted by what is done to them next.
        order_N = np.arange(len(x_NHWC))
        for operations_N, values_N in zip(drawn.operations_NL.T, drawn.values_NL.T):
            sorting_N = operations_N[order_N].argsort(kind="stable")
            order_N = order_N[sorting_N]
            x_NHWC = x_NHWC.index_select(0, self._on_device(sorting_N))
            counts = np.bincount(operations_N, minlength=len(OPERATIONS)).tolist()
            parts = zip(OPERATIONS, x_NHWC.split(counts), self._on_device(values_N[order_N]).split(counts))
            x_NHWC = torch.cat([self._done(number, *part) for number, part in enumerate(parts) if counts[number]])
        x_NHWC = x_NHWC.index_select(0, self._on_device(order_N.argsort()))
        if drawn.shares_BK is None or drawn.strength_B is None:
            return x_NHWC
        shares_BK, strength_B = self._on_device(drawn.shares_BK), self._on_device(drawn.strength_B)
        return self._mixed(pixels_BHWC, x_NHWC.unflatten(0, shares_BK.shape), shares_BK, strength_B)

    def _on_device(self, values: np.ndarray) -> Tensor:
        """The values on the device. From pinned memory they are copied without waiting."""
        tensor = torch.from_numpy(values)
        return (tensor.pin_memory() if self.device.type == "cuda" else tensor).to(self.device, non_blocking=True)

    def _done(self, number: int, name: str, x_BHWC: Tensor, value_B: Tensor) -> Tensor:
        if name == NOTHING:
            return x_BHWC
        if self.with_pillow:
            return done_by_pillow(name, x_BHWC, value_B, self.fill_C, number != NUMBERS[name])
        if name in GEOMETRIC:
            return GEOMETRIC[name](x_BHWC, value_B, self.fill_C, number != NUMBERS[name])
        return COLOUR[name](x_BHWC, value_B)

    def _mixed(self, x_BHWC: Tensor, chains_BKHWC: Tensor, shares_BK: Tensor, strength_B: Tensor) -> Tensor:
        """An AugMix of images and their chains: the chains are mixed, then blended with the images."""
        assert isinstance(self.timms, AugMixAugment)
        pairs = zip(chains_BKHWC.unbind(1), shares_BK.unbind(1))
        if self.timms.blended:
            for chain_BHWC, share_B in pairs:
                x_BHWC = blended(x_BHWC, chain_BHWC, share_B)
            return x_BHWC
        mixed_BHWC = torch.zeros_like(x_BHWC, dtype=torch.float32)
        for chain_BHWC, share_B in pairs:
            mixed_BHWC += chain_BHWC.float() * share_B[:, None, None, None]
        return blended(x_BHWC, mixed_BHWC.clamp_(0, 255).to(torch.uint8), strength_B)


def _chosen(timms: RandAugment | AutoAugment | AugMixAugment, random: RandomState, chains: int) -> np.ndarray:
    """The operations (N, L) of each chain, as places in `_flat(timms)`; -1 where a chain is shorter than others."""
    if isinstance(timms, AutoAugment):
        lengths = [len(part) for part in timms.policy]
        first_P = np.cumsum([0, *lengths[:-1]])
        place_PL = first_P[:, None] + np.arange(max(lengths))
        place_PL[np.arange(max(lengths)) >= np.array(lengths)[:, None]] = -1
        return place_PL[random.randint(len(lengths), size=chains)]
    if isinstance(timms, AugMixAugment):
        depth_N = np.full(chains, timms.depth) if timms.depth > 0 else random.choice(DEPTHS, chains)
        place_NL = random.randint(len(timms.ops), size=(chains, timms.depth if timms.depth > 0 else max(DEPTHS)))
        place_NL[np.arange(place_NL.shape[1]) >= depth_N[:, None]] = -1
        return place_NL
    if timms.choice_weights is None:
        return random.randint(len(timms.ops), size=(chains, timms.num_layers))
    if timms.num_layers > len(timms.ops):
        raise ValueError(f"{timms.num_layers} operations are chosen, each at most once, and there are {len(timms.ops)}")
    # The first of exponential variables, each with its weight as its rate, is of an operation with this probability.
    arrival_NS = random.standard_exponential((chains, len(timms.ops))) / timms.choice_weights
    return arrival_NS.argsort(1)[:, : timms.num_layers]


def _mixture(timms: AugMixAugment, random: RandomState, images: int) -> tuple[np.ndarray, np.ndarray]:
    """How an AugMix mixes the chains (B, K) of each image, and the mixture with the image (B)."""
    shares_BK = random.dirichlet([timms.alpha] * timms.width, images).astype(np.float32)
    strength_B = random.beta(timms.alpha, timms.alpha, images).astype(np.float32)
    if timms.blended:  # one chain after the other, each into what those before it have made
        left_B = np.float32(1)
        shares_BK *= strength_B[:, None]
        for k in reversed(range(timms.width)):
            shares_BK[:, k] /= left_B
            left_B = left_B * (1 - shares_BK[:, k])
    return shares_BK, strength_B


def _flat(timms: RandAugment | AutoAugment | AugMixAugment) -> list[AugmentOp]:
    """The operations that a policy chooses from."""
    return [op for part in timms.policy for op in part] if isinstance(timms, AutoAugment) else timms.ops


def _timms(policy: str) -> RandAugment | AutoAugment | AugMixAugment:
    """As `timm.data.transforms_imagenet_train` builds it, but for the fill and the interpolation."""
    if policy.startswith("rand"):
        return rand_augment_transform(policy)
    if policy.startswith("augmix"):
        return augment_and_mix_transform(policy, {"translate_pct": 0.3})
    return auto_augment_transform(policy)


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
        timms = _timms(policy)
    except (AssertionError, ValueError, KeyError) as error:
        raise ValueError(f"timm does not build the policy: {error or type(error).__name__}") from None
    if isinstance(timms, AugMixAugment) and timms.width == 0:
        raise ValueError("w0 leaves no chain of operations to mix")
    if new := {op.name for op in _flat(timms)} - set(_arguments(0)):
        raise ValueError(
            f"has operations that this version of timm has added, and there is none of ours: {sorted(new)}"
        )


def check_images(auto_augment: str, color_jitter: Sequence[float], data: ImageData) -> None:
    """Raises InputError where the policy does not take the images of `data`."""
    field = "auto_augment" if auto_augment else "color_jitter"
    if data.channels not in (1, 3):
        raise InputError(
            f"recipe.{field}: needs images of 1 or 3 channels; those of {data.name} have {data.channels} channels"
        )
    if data.channels == 1 and len(color_jitter) == 4 and color_jitter[3]:
        raise InputError(f"recipe.color_jitter: the images of {data.name} have one channel, and no hue")
    try:
        Policy(auto_augment, color_jitter, data.mean, data.image_size, torch.device("cpu")).draw(
            RandomState(0), DRAWS_TRIED
        )
    except (ValueError, MemoryError, OverflowError) as error:  # of NumPy's random numbers
        raise InputError(f"recipe.{field}: nothing can be drawn from it: {reason_of(error)}") from None
