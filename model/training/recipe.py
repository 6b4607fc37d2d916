"""How a network is trained, as data: optimiser, schedule, loss and augmentation. Imports no torch.

`RECIPES` has the recipes of the five reports, under the names of their networks, and our own. `training.optimise` makes
the optimiser and the schedule, `training.augment` and `training.policies` augment the images.
"""

from collections.abc import Callable, Collection
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from expertgrid.model.system.errors import InputError, unknown
from expertgrid.model.training.data import ImageData
from expertgrid.model.training.parts import SHIPPED

Share = Annotated[float, Field(ge=0, le=1)]
Pixels = Annotated[int, Field(ge=0, le=512)]
Alpha = Annotated[float, Field(ge=0, le=100)]
Range = Annotated[tuple[float, ...], Field(strict=False)]  # the smallest and the largest number, or nothing
Mean = Annotated[tuple[Share, ...], Field(strict=False)]  # of pixels from 0 to 1, for each channel
Std = Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], Field(strict=False)]

WITH_JITTER = "3a"  # the policy of AutoAugment beside which timm uses color_jitter

# Fields that change something only beside others: what they need in words, and whether a recipe's fields have it.
NEEDS: dict[str, tuple[str, Callable[[dict], bool]]] = {
    "decay_epochs": ("sched 'step'", lambda fields: fields["sched"] == "step"),
    "decay_rate": ("sched 'step'", lambda fields: fields["sched"] == "step"),
    "warmup": ("a sched of ours other than 'none'", lambda fields: fields["sched"] in SHIPPED["sched"][1:]),
    "filter_bias_and_bn": ("weight_decay", lambda fields: bool(fields["weight_decay"])),
    "ratio": ("scale", lambda fields: bool(fields["scale"])),
    "alternating_flip": ("hflip, the share that is flipped at first", lambda fields: bool(fields["hflip"])),
    "remode": ("reprob", lambda fields: bool(fields["reprob"])),
    "recount": ("reprob", lambda fields: bool(fields["reprob"])),
    "small_share": ("small_size", lambda fields: bool(fields["small_size"])),
    "mixup_prob": ("mixup or cutmix", lambda fields: bool(fields["mixup"] or fields["cutmix"])),
    "mixup_switch_prob": ("mixup and cutmix", lambda fields: bool(fields["mixup"] and fields["cutmix"])),
}


class Recipe(BaseModel):
    """A training recipe. Names and meanings are timm's where timm has the same thing.

    Schedules are stepped after each optimiser step, so that a schedule in epochs is smooth. `amp` is where the forward
    pass runs in bfloat16: "auto" on devices that compute it natively, else "on" or "off". Augmentation is in the order
    of the fields from `auto_augment` on. The names of an optimiser, a schedule, a loss and an augmentation may be those
    of parts that a user's module registers: they are looked up when a study is planned, and not when it is read.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)

    epochs: int = Field(gt=0, le=10_000)
    batch_size: int = Field(gt=0, le=65_536)
    opt: str
    lr: float = Field(gt=0, le=100)
    weight_decay: float = Field(0.0, ge=0, le=10)
    filter_bias_and_bn: bool = False  # keep weight decay off biases and norms
    opt_betas: Annotated[tuple[Share, Share] | None, Field(strict=False)] = None  # the optimiser's own where not given
    momentum: float | None = Field(None, ge=0, lt=1)  # 0.9 where not given, of optimisers that have it
    layer_decay: float = Field(1.0, gt=0, le=1)  # of the rate, from each layer to the one before it; 1 is without
    freeze: str = "none"  # "all but head", a group of timm's (stem, blocks), or a pattern that begins parameters' names
    sched: str = "none"  # step, cosine, poly (linear to zero), onecycle, or a user's
    decay_epochs: float | None = Field(None, gt=0)  # of sched step; 30 where not given
    decay_rate: float | None = Field(None, gt=0, le=1)  # of sched step; 0.1 where not given
    warmup: float | None = Field(None, ge=0, lt=1)  # share of all steps in which the rate rises; onecycle: 0.3, else 0
    ema_decay: float = Field(0.0, ge=0, lt=1)  # of the moving average of weights, which then is the network; 0: without
    clip_grad: float = Field(0.0, ge=0)  # the largest norm of all gradients together; 0: any
    loss: str = "cross_entropy"  # or a user's
    smoothing: float = Field(0.0, ge=0, lt=1)  # of the labels
    class_weights: Literal["none", "balanced"] = "none"  # of the loss; balanced: by one over a class's train images
    sampler: Literal["shuffled", "balanced"] = "shuffled"  # balanced: each class as often, an image several times
    auto_augment: str = ""  # rand-..., augmix-... (without splits), or a policy of AutoAugment; "" is without
    color_jitter: tuple[float, ...] = ()  # brightness, contrast, saturation, and hue; a number: the first three
    hflip: Share = 0.0
    alternating_flip: bool = False  # hflip decides in the first epoch; then each image is flipped in every other one
    vflip: Share = 0.0
    scale: Range = ()  # of the area of a random part of the image, which is resized to all of it; empty: no such part
    ratio: Range = ()  # width / height of that part; 3/4 to 4/3 where not given
    crop_padding: Pixels = 0  # a random crop of the image padded with zeros
    translate: Pixels = 0  # a random shift by up to so many pixels, with reflection at the border
    # By the train images' mean and std, which weights to start from replace where a study does not set it; both 0.5.
    normalise: Literal["data", "half"] | Annotated[tuple[Mean, Std], Field(strict=False)] = "data"
    cutout: Pixels = 0  # side of the square; 0 is without
    reprob: Share = 0.0  # random erasing
    remode: Literal["const", "rand", "pixel"] | None = None  # pixel where not given, as in timm's train.py
    recount: int | None = Field(None, ge=1, le=100)  # 1 where not given
    augment: str = ""  # a user's augmentation of normalised images; "" is without
    small_size: Pixels = 0  # shorter side that images are scaled down to in the first epochs; 0: in none
    small_share: float | None = Field(None, gt=0, le=1)  # of the epochs that are so; 0.5 where not given
    mixup: Alpha = 0.0
    cutmix: Alpha = 0.0
    mixup_prob: Share | None = None  # of mixing a batch; 1 where not given
    mixup_switch_prob: Share | None = None  # of CutMix where there are both; 0.5 where not given
    amp: Literal["auto", "on", "off"] = "auto"
    tta: Literal["none", "flip"] = "none"  # measured beside the plain accuracy, which it does not change

    @field_validator("auto_augment")
    @classmethod
    def _timm_builds_it(cls, policy: str) -> str:
        if policy:
            from expertgrid.model.training.policies import check_policy  # which imports torch and timm

            check_policy(policy)
        return policy

    @field_validator("color_jitter", mode="before")
    @classmethod
    def _three_or_four(cls, jitter: Any) -> tuple:
        numbers = jitter if isinstance(jitter, list | tuple) else (jitter,) * 3
        are_numbers = all(isinstance(number, int | float) and not isinstance(number, bool) for number in numbers)
        if not are_numbers or len(numbers) not in (0, 3, 4):
            raise ValueError("one number is needed, or three or four: brightness, contrast, saturation, hue")
        if any(not 0 <= number <= 10 for number in numbers) or any(number > 0.5 for number in numbers[3:]):
            raise ValueError("numbers from 0 to 10 are needed, and a hue up to 0.5")
        return tuple(numbers) if any(numbers) else ()

    @field_validator("scale", "ratio")
    @classmethod
    def _two_numbers(cls, range_: tuple[float, ...], info: ValidationInfo) -> tuple[float, ...]:
        most = 1.0 if info.field_name == "scale" else 100.0
        if range_ and not (len(range_) == 2 and 0 < range_[0] <= range_[1] <= most):
            raise ValueError(f"two numbers above 0 and up to {most:g} are needed, the smaller one first, or none")
        return range_

    @model_validator(mode="after")
    def _nothing_is_idle(self) -> Self:
        fields = dict(self)
        for name, (needs, has) in NEEDS.items():
            if fields[name] and not has(fields):
                raise ValueError(f"{name} needs {needs}")
        shifts = [name for name in ("crop_padding", "translate", "scale") if getattr(self, name)]
        if len(shifts) > 1:
            raise ValueError(f"{' and '.join(shifts)} each take a part of the image: only one of them may be set")
        if self.color_jitter and self.auto_augment and WITH_JITTER not in self.auto_augment:
            raise ValueError(f"color_jitter has no effect in timm beside auto_augment {self.auto_augment!r}")
        if self.mixes and self.batch_size % 2:
            raise ValueError("mixup and cutmix mix pairs of images: batch_size must be even")
        if self.mixes and self.mixup_prob == 0:
            raise ValueError("mixup_prob 0 leaves mixup and cutmix without effect")
        return self

    @staticmethod
    def without_idle(fields: dict, given: Collection[str]) -> dict:
        """Fields of a recipe that was changed, without those that the change has left without effect.

        A base with `decay_epochs` of a step schedule can so be given another schedule. Fields in `given` stay, and are
        refused where they do nothing.
        """
        idle = [name for name, (_, has) in NEEDS.items() if name not in given and not has(fields)]
        return fields | {name: Recipe.model_fields[name].default for name in idle}

    def check_fits(self, data: ImageData, images: int) -> None:
        """Raises InputError where the data are too few, too small, or not of the kind that the recipe needs.

        `images` is the number of images that a seed trains on.
        """
        side = min(data.image_size)
        if self.batch_size > images:
            raise InputError(f"recipe.batch_size: {self.batch_size}, and {data.name} has {images} images to train on")
        limits = {"crop_padding": side - 1, "translate": side - 1, "cutout": side, "small_size": side - 1}
        for field, most in limits.items():
            if getattr(self, field) > most:
                images_of = f"{'x'.join(map(str, data.image_size))} images of {data.name}"
                raise InputError(
                    f"recipe.{field}: {getattr(self, field)} is too large for the {images_of}; at most {most}"
                )
        if not isinstance(self.normalise, str) and {len(values) for values in self.normalise} != {data.channels}:
            raise InputError(f"recipe.normalise: {self.normalise}, and {data.name} has {data.channels} channels")
        if self.auto_augment or self.color_jitter:
            from expertgrid.model.training.policies import check_images

            check_images(self.auto_augment, self.color_jitter, data)

    @property
    def mixes(self) -> bool:
        """Whether batches are mixed with themselves."""
        return self.mixup > 0 or self.cutmix > 0

    def image_size(self, epoch: int, full: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the images that the network sees in an epoch (from 0), of those that are `full` size."""
        share = 0.5 if self.small_share is None else self.small_share
        if not self.small_size or epoch >= round(share * self.epochs):
            return full
        height, width = (round(side * self.small_size / min(full)) for side in full)
        return height, width

    def image_sizes(self, full: tuple[int, int]) -> set[tuple[int, int]]:
        """The sizes that images have in a training: one, or two where the first epochs have smaller ones."""
        return {self.image_size(epoch, full) for epoch in (0, self.epochs - 1)}

    def mean_std(self, data: ImageData) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation, for each channel, that pixels from 0 to 1 are normalised with."""
        half = (0.5,) * data.channels
        if self.normalise == "half":
            return half, half
        return (data.mean, data.std) if self.normalise == "data" else self.normalise


RECIPES: dict[str, Recipe] = {
    # unstated: flip with probability 0.5, crop with padding 4
    "two_block": Recipe(
        epochs=100, batch_size=128, opt="adam", lr=1e-3, sched="step", decay_epochs=20, decay_rate=0.5,
        hflip=0.5, crop_padding=4,
    ),
    # unstated: batch size, flip with probability 0.5, crop with padding 4
    "eight_block": Recipe(
        epochs=100, batch_size=128, opt="adamw", lr=3e-4, weight_decay=1e-3, sched="cosine", hflip=0.5, crop_padding=4,
    ),
    "segmented": Recipe(
        epochs=50, batch_size=64, opt="adam", lr=1e-3, weight_decay=1e-4, sched="step", decay_epochs=30, decay_rate=0.1,
        hflip=0.5, crop_padding=4, cutout=16, normalise="half",
    ),
    # unstated: epochs (the best was the 62nd), batch size, schedule, flip with probability 0.5, padding of 4
    "macro_residual": Recipe(
        epochs=70, batch_size=128, opt="adamw", lr=1e-3, weight_decay=0.02, sched="cosine", hflip=0.5, crop_padding=4,
    ),
    # unstated: schedule (constant here), augmentation (flip and crop here)
    "mixed_kernel": Recipe(
        epochs=60, batch_size=64, opt="adam", lr=2e-3, weight_decay=1e-5, opt_betas=(0.9, 0.999), hflip=0.5,
        crop_padding=4,
    ),
    # Ours: few epochs, a short warm-up, then linear to zero.
    "fast": Recipe(
        epochs=16, batch_size=128, opt="adamw", lr=3e-3, weight_decay=0.05, filter_bias_and_bn=True, sched="poly",
        warmup=0.125, smoothing=0.1, hflip=0.5, crop_padding=4,
    ),
    # Ours, for images of 32 pixels: `fast` in half of its operations. Muon works on whole layers in each step, so
    # the batches are large.
    "fast_muon": Recipe(
        epochs=10, batch_size=500, opt="muon", lr=0.03, weight_decay=0.2, filter_bias_and_bn=True, sched="poly",
        warmup=0.125, smoothing=0.1, hflip=0.5, crop_padding=4, small_size=24,
    ),
    # Ours, for the networks of these names: Muon, and the flips, shifts and smoothing of cifar10-airbench.
    "speed": Recipe(
        epochs=19, batch_size=1000, opt="muon", lr=0.03, weight_decay=0.4, filter_bias_and_bn=True, sched="poly",
        warmup=0.1, ema_decay=0.97, smoothing=0.2, hflip=0.5, alternating_flip=True, translate=3, cutout=6,
        small_size=24,
    ),
    "accuracy": Recipe(
        epochs=40, batch_size=500, opt="muon", lr=0.03, weight_decay=0.1, filter_bias_and_bn=True, sched="poly",
        warmup=0.1, smoothing=0.2, hflip=0.5, alternating_flip=True, translate=4, cutout=12,
    ),
    # Ours, for weights to start from: AdamW, cosine and layer decay, as BEiT (2106.08254) and ConvNeXt (2201.03545) are
    # fine-tuned, with timm's default decay. A sixth of the rate of `fast`, and half its epochs.
    "finetune": Recipe(
        epochs=8, batch_size=128, opt="adamw", lr=5e-4, weight_decay=0.05, filter_bias_and_bn=True, layer_decay=0.75,
        sched="cosine", warmup=0.125, smoothing=0.1, hflip=0.5, crop_padding=4,
    ),
}  # fmt: skip


def recipe(name: str) -> Recipe:
    """The recipe called `name`. Raises InputError for another name."""
    try:
        return RECIPES[name]
    except KeyError:
        raise unknown("recipe", name, RECIPES) from None
