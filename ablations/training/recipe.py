"""How a network is trained: optimiser, schedule, loss and augmentation as data, built with timm's factories.

`RECIPES` has the recipes of the five reports, under the names of their networks, and our own.
"""

import inspect
import math
from collections.abc import Callable, Collection
from typing import Annotated, Literal, Self

import numpy as np
import timm.optim
import timm.scheduler
import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from ablations.training.augment import (
    Mix,
    cutout,
    hflip,
    mirror,
    padded_crop,
    random_erasing,
    scaled_down,
    translate,
)
from ablations.training.data import ImageData
from ablations.training.policies import (
    WITH_JITTER,
    Transform,
    check_policy,
    pil_transform,
    random_state_kept,
    transformed,
)
from model.errors import InputError, unknown
from model.pixels import normalise

Share = Annotated[float, Field(ge=0, le=1)]
Pixels = Annotated[int, Field(ge=0, le=512)]
Alpha = Annotated[float, Field(ge=0, le=100)]

FUSED_ON = ("cpu", "cuda")
ONE_CYCLE_RISE = 0.3  # share of the steps, as in PyTorch
ONE_CYCLE_START = 1 / 25  # of the peak rate, as in PyTorch
TRIED = 20  # draws of a PIL transform before training, to see that it takes the images

# Fields that change something only beside others: what they need in words, and whether a recipe's fields have it.
NEEDS: dict[str, tuple[str, Callable[[dict], bool]]] = {
    "decay_epochs": ("sched 'step'", lambda fields: fields["sched"] == "step"),
    "decay_rate": ("sched 'step'", lambda fields: fields["sched"] == "step"),
    "warmup": ("a sched other than 'none'", lambda fields: fields["sched"] != "none"),
    "filter_bias_and_bn": ("weight_decay", lambda fields: bool(fields["weight_decay"])),
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
    of the fields from `auto_augment` on; the first two are PIL's, and run in worker processes.
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
    sched: Literal["none", "step", "cosine", "poly", "onecycle"] = "none"  # poly: linear to zero
    decay_epochs: float | None = Field(None, gt=0)  # of sched step; 30 where not given
    decay_rate: float | None = Field(None, gt=0, le=1)  # of sched step; 0.1 where not given
    warmup: float | None = Field(None, ge=0, lt=1)  # share of all steps in which the rate rises; onecycle: 0.3, else 0
    ema_decay: float = Field(0.0, ge=0, lt=1)  # of the moving average of weights, which then is the network; 0: without
    smoothing: float = Field(0.0, ge=0, lt=1)  # of the labels
    auto_augment: str = ""  # rand-..., augmix-... (without splits), or a policy of AutoAugment; "" is without
    color_jitter: tuple[float, ...] = ()  # brightness, contrast, saturation, and hue; a number: the first three
    hflip: Share = 0.0
    alternating_flip: bool = False  # hflip decides in the first epoch; then each image is flipped in every other one
    crop_padding: Pixels = 0  # a random crop of the image padded with zeros
    translate: Pixels = 0  # a random shift by up to so many pixels, with reflection at the border
    normalise: Literal["data", "half"] = "data"  # by the train images' mean and std, or both 0.5
    cutout: Pixels = 0  # side of the square; 0 is without
    reprob: Share = 0.0  # random erasing
    remode: Literal["const", "rand", "pixel"] | None = None  # pixel where not given, as in timm's train.py
    recount: int | None = Field(None, ge=1, le=100)  # 1 where not given
    small_size: Pixels = 0  # shorter side that images are scaled down to in the first epochs; 0: in none
    small_share: float | None = Field(None, gt=0, le=1)  # of the epochs that are so; 0.5 where not given
    mixup: Alpha = 0.0
    cutmix: Alpha = 0.0
    mixup_prob: Share | None = None  # of mixing a batch; 1 where not given
    mixup_switch_prob: Share | None = None  # of CutMix where there are both; 0.5 where not given
    amp: Literal["auto", "on", "off"] = "auto"
    tta: Literal["none", "flip"] = "none"  # measured beside the plain accuracy, which it does not change

    @field_validator("opt")
    @classmethod
    def _timm_has_it(cls, opt: str) -> str:
        names = timm.optim.list_optimizers()
        if opt not in names:
            raise ValueError(str(unknown("optimiser", opt, names)))
        if timm.optim.get_optimizer_info(opt).second_order:
            raise ValueError("needs gradients of second order, which the training loop does not compute")
        return opt

    @field_validator("auto_augment")
    @classmethod
    def _timm_builds_it(cls, policy: str) -> str:
        if policy:
            check_policy(policy)
        return policy

    @field_validator("color_jitter", mode="before")
    @classmethod
    def _three_or_four(cls, given: object) -> object:
        if isinstance(given, int | float) and not isinstance(given, bool):
            given = (given,) * 3
        if not isinstance(given, list | tuple):
            return given
        values = tuple(given)
        if values and len(values) not in (3, 4):
            raise ValueError("one number is needed, or three or four: brightness, contrast, saturation, hue")
        numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
        if numbers and (any(not 0 <= value <= 10 for value in values) or any(value > 0.5 for value in values[3:])):
            raise ValueError("numbers from 0 to 10 are needed, and a hue up to 0.5")
        return values if not numbers or any(values) else ()

    @model_validator(mode="after")
    def _nothing_is_idle(self) -> Self:
        fields = dict(self)
        for name, (needs, has) in NEEDS.items():
            if fields[name] and not has(fields):
                raise ValueError(f"{name} needs {needs}")
        if self.crop_padding and self.translate:
            raise ValueError("crop_padding and translate both shift the image: one of them must be 0")
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

    def check_fits(self, data: ImageData) -> None:
        """Raises InputError where the data are too few, too small, or not of the kind that the recipe needs."""
        side, images = min(data.image_size), len(data.train)
        if self.batch_size > images:
            raise InputError(f"recipe.batch_size: {self.batch_size}, and {data.name} has {images} images to train on")
        limits = {"crop_padding": side - 1, "translate": side - 1, "cutout": side, "small_size": side - 1}
        for field, most in limits.items():
            if getattr(self, field) > most:
                size = "x".join(map(str, data.image_size))
                raise InputError(
                    f"recipe.{field}: {getattr(self, field)} is too large for the {size} images of {data.name}; "
                    f"at most {most}"
                )
        if self.auto_augment or self.color_jitter:
            self._check_pil(data)

    def _check_pil(self, data: ImageData) -> None:
        field = "auto_augment" if self.auto_augment else "color_jitter"
        pixels_BHWC = data.train.pixels_BHWC
        if pixels_BHWC.dtype != torch.uint8 or data.channels not in (1, 3):
            found = f"{data.channels} channels of {str(pixels_BHWC.dtype).removeprefix('torch.')}"
            raise InputError(
                f"recipe.{field}: needs uint8 images of 1 or 3 channels; those of {data.name} have {found}"
            )
        if data.channels == 1 and len(self.color_jitter) == 4 and self.color_jitter[3]:
            raise InputError(f"recipe.color_jitter: the images of {data.name} have one channel, and no hue")
        image = pixels_BHWC[0].cpu().numpy()
        try:
            transform = self.pil_transform(data)
            with random_state_kept():
                for draw in range(TRIED):
                    transformed(transform, image, (draw,))
        except Exception as error:  # PIL, NumPy and torchvision each raise their own
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"recipe.{field}: does not work on the images of {data.name}: {reason}") from None

    @property
    def mixes(self) -> bool:
        """Whether batches are mixed with themselves."""
        return self.mixup > 0 or self.cutmix > 0

    def image_size(self, epoch: int, full: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the images that the network sees in an epoch (from 0), of those that are `full` size."""
        share = 0.5 if self.small_share is None else self.small_share
        if not self.small_size or epoch >= round(share * self.epochs):
            return full
        return tuple(round(side * self.small_size / min(full)) for side in full)

    def mean_std(self, data: ImageData) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation, for each channel, that pixels from 0 to 1 are normalised with."""
        half = (0.5,) * data.channels
        return (half, half) if self.normalise == "half" else (data.mean, data.std)

    def optimizer(self, net: nn.Module) -> Optimizer:
        """timm's optimiser of the parameters that need gradients.

        PyTorch's fused implementation is used where the optimiser is one of PyTorch's that has it and the parameters
        are on a CPU or a CUDA device: it does the whole step in a kernel or two. On CUDA an optimiser that can be
        recorded in a graph counts its steps on the device, whether it is recorded or not.
        """
        chosen = {} if self.opt_betas is None else {"betas": self.opt_betas}
        kind = timm.optim.get_optimizer_class(self.opt, bind_defaults=False)
        knows, device = inspect.signature(kind).parameters, next(net.parameters()).device.type
        if "fused" in knows and device in FUSED_ON:
            chosen["fused"] = True
        if "capturable" in knows and device == "cuda":
            chosen["capturable"] = True
        return timm.optim.create_optimizer_v2(
            net,
            opt=self.opt,
            lr=self.lr,
            weight_decay=self.weight_decay,
            momentum=0.9 if self.momentum is None else self.momentum,
            filter_bias_and_bn=self.filter_bias_and_bn,
            **chosen,
        )

    def scheduler(self, optimizer: Optimizer, steps_per_epoch: int) -> Scheduler | None:
        """timm's scheduler, to be stepped with `step_update(steps done)`; None for a constant rate."""
        if self.sched == "none":
            return None
        if self.sched == "onecycle":
            rise = ONE_CYCLE_RISE if self.warmup is None else self.warmup
            return OneCycle(optimizer, self.epochs * steps_per_epoch, rise)
        rate = 0.1 if self.decay_rate is None else self.decay_rate
        scheduler, _ = timm.scheduler.create_scheduler_v2(
            optimizer,
            sched=self.sched,
            num_epochs=self.epochs,
            decay_epochs=30 if self.decay_epochs is None else self.decay_epochs,
            decay_rate=1.0 if self.sched == "poly" else rate,
            warmup_epochs=(self.warmup or 0.0) * self.epochs,
            warmup_lr=0.0,
            min_lr=0.0,
            step_on_epochs=False,
            updates_per_epoch=steps_per_epoch,
        )
        return scheduler

    def average(self, net: nn.Module) -> ModelEmaV3 | None:
        """The moving average of a network's weights and statistics, None without `ema_decay`.

        Its decay rises to `ema_decay` by timm's warm-up: 1 - (steps done)^(-2/3).
        """
        return ModelEmaV3(net, decay=self.ema_decay, use_warmup=True) if self.ema_decay else None

    def pil_transform(self, data: ImageData) -> Transform | None:
        """What is done to each image with PIL, None where that is nothing."""
        return pil_transform(self.color_jitter, self.auto_augment, self.mean_std(data)[0], data.image_size)

    def augment(
        self,
        pixels_BHWC: Tensor,
        mean_C: Tensor,
        std_C: Tensor,
        generator: Generator,
        mirrored_B: Tensor | None = None,
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        """A batch of uint8 pixels to what the network trains on: normalised floats (B, C, H, W), channels last.

        `mirrored_B` says which images are mirrored where `alternating_flip` has decided that. `size` is the height and
        width of what comes out, those of the pixels where not given.
        """
        x_BCHW = pixels_BHWC.permute(0, 3, 1, 2)
        if mirrored_B is not None:
            x_BCHW = mirror(x_BCHW, mirrored_B)
        elif self.hflip:
            x_BCHW = hflip(x_BCHW, self.hflip, generator)
        if self.crop_padding:
            x_BCHW = padded_crop(x_BCHW, self.crop_padding, generator)
        if self.translate:
            x_BCHW = translate(x_BCHW, self.translate, generator)
        x_BCHW = normalise(x_BCHW, mean_C, std_C)
        if self.cutout:
            x_BCHW = cutout(x_BCHW, self.cutout, generator)
        if self.reprob:
            x_BCHW = random_erasing(x_BCHW, self.reprob, self.remode or "pixel", self.recount or 1, generator)
        if size is not None and size != x_BCHW.shape[2:]:
            x_BCHW = scaled_down(x_BCHW, size)
        return x_BCHW.contiguous(memory_format=torch.channels_last)

    def draw_mix(self, random: np.random.RandomState, height: int, width: int) -> Mix:
        """How a batch is mixed by mixup or CutMix."""
        prob = 1.0 if self.mixup_prob is None else self.mixup_prob
        switch_prob = 0.5 if self.mixup_switch_prob is None else self.mixup_switch_prob
        return Mix.draw(random, height, width, self.mixup, self.cutmix, prob, switch_prob)


class OneCycle(Scheduler):
    """The rate of PyTorch's OneCycleLR (1708.07120), ending at zero, as a function of the steps done.

    In `rise` of the steps it goes along a cosine from a 25th of the peak to the peak, then down to zero in the last
    step. Momentum stays as it is.
    """

    def __init__(self, optimizer: Optimizer, steps: int, rise: float):
        self.last, self.peak = steps - 1, rise * steps - 1
        super().__init__(optimizer, "lr", t_in_epochs=False)
        self.step_update(0)

    def _get_lr(self, t: int) -> list[float]:
        if t <= self.peak:
            low, done = ONE_CYCLE_START, t / self.peak if self.peak else 1.0
        else:
            low, done = 0.0, 1 - (min(t, self.last) - self.peak) / max(self.last - self.peak, 1e-9)
        share = low + (1 - low) * (1 - math.cos(math.pi * done)) / 2
        return [share * value for value in self.base_values]


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
}  # fmt: skip


def recipe(name: str) -> Recipe:
    """The recipe called `name`. Raises InputError for another name."""
    try:
        return RECIPES[name]
    except KeyError:
        raise unknown("recipe", name, RECIPES) from None
