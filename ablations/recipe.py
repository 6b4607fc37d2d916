"""How a network is trained: optimiser, schedule, loss and augmentation as data, built with timm's factories.

`RECIPES` has the recipes of the five reports, under the names of their networks, and our own `fast`.
"""

from typing import Annotated, Literal, Self

import timm.optim
import timm.scheduler
import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from timm.scheduler.scheduler import Scheduler
from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from ablations.augment import cutout, hflip, normalise, padded_crop
from ablations.data import ImageData
from model.errors import unknown

Share = Annotated[float, Field(ge=0, le=1)]
Pixels = Annotated[int, Field(ge=0, le=512)]


class Recipe(BaseModel):
    """A training recipe. Names and meanings are timm's where timm has the same thing.

    Schedules are stepped after each optimiser step, so that a schedule in epochs is smooth. `amp` is where the forward
    pass runs in bfloat16: "auto" on devices that compute it natively, else "on" or "off".
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)

    epochs: int = Field(gt=0, le=10_000)
    batch_size: int = Field(gt=0, le=65_536)
    opt: str
    lr: float = Field(gt=0, le=100)
    weight_decay: float = Field(0.0, ge=0, le=10)
    filter_bias_and_bn: bool = False  # keep weight decay off biases and norms
    opt_betas: Annotated[tuple[Share, Share] | None, Field(strict=False)] = None  # the optimiser's own where not given
    sched: Literal["none", "step", "cosine", "poly"] = "none"  # poly: linear to zero
    decay_epochs: float = Field(30, gt=0)  # of sched step
    decay_rate: float = Field(0.1, gt=0, le=1)  # of sched step
    warmup: float = Field(0.0, ge=0, lt=1)  # share of all steps in which the rate rises from zero
    smoothing: float = Field(0.0, ge=0, lt=1)  # of the labels
    hflip: Share = 0.0
    crop_padding: Pixels = 0
    cutout: Pixels = 0  # side of the square; 0 is without
    normalise: Literal["data", "half"] = "data"  # by the train images' mean and std, or both 0.5
    amp: Literal["auto", "on", "off"] = "auto"

    @field_validator("opt")
    @classmethod
    def _timm_has_it(cls, opt: str) -> str:
        names = timm.optim.list_optimizers()
        if opt not in names:
            raise ValueError(str(unknown("optimiser", opt, names)))
        return opt

    @model_validator(mode="after")
    def _warmup_is_of_a_schedule(self) -> Self:
        if self.warmup and self.sched == "none":
            raise ValueError("warmup needs a sched other than 'none'")
        return self

    def mean_std(self, data: ImageData) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation, for each channel, that pixels from 0 to 1 are normalised with."""
        half = (0.5,) * data.channels
        return (half, half) if self.normalise == "half" else (data.mean, data.std)

    def optimizer(self, net: nn.Module) -> Optimizer:
        betas = {} if self.opt_betas is None else {"betas": self.opt_betas}
        return timm.optim.create_optimizer_v2(
            net,
            opt=self.opt,
            lr=self.lr,
            weight_decay=self.weight_decay,
            filter_bias_and_bn=self.filter_bias_and_bn,
            **betas,
        )

    def scheduler(self, optimizer: Optimizer, steps_per_epoch: int) -> Scheduler | None:
        """timm's scheduler, to be stepped with `step_update(steps done)`; None for a constant rate."""
        if self.sched == "none":
            return None
        scheduler, _ = timm.scheduler.create_scheduler_v2(
            optimizer,
            sched=self.sched,
            num_epochs=self.epochs,
            decay_epochs=self.decay_epochs,
            decay_rate=1.0 if self.sched == "poly" else self.decay_rate,
            warmup_epochs=self.warmup * self.epochs,
            warmup_lr=0.0,
            min_lr=0.0,
            step_on_epochs=False,
            updates_per_epoch=steps_per_epoch,
        )
        return scheduler

    def augment(self, pixels_BHWC: Tensor, mean_C: Tensor, std_C: Tensor, generator: Generator) -> Tensor:
        """A batch of uint8 pixels to what the network trains on: normalised floats (B, C, H, W), channels last."""
        x_BCHW = pixels_BHWC.permute(0, 3, 1, 2)
        if self.hflip:
            x_BCHW = hflip(x_BCHW, self.hflip, generator)
        if self.crop_padding:
            x_BCHW = padded_crop(x_BCHW, self.crop_padding, generator)
        x_BCHW = normalise(x_BCHW, mean_C, std_C)
        if self.cutout:
            x_BCHW = cutout(x_BCHW, self.cutout, generator)
        return x_BCHW.contiguous(memory_format=torch.channels_last)


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
}  # fmt: skip


def recipe(name: str) -> Recipe:
    """The recipe called `name`. Raises InputError for another name."""
    try:
        return RECIPES[name]
    except KeyError:
        raise unknown("recipe", name, RECIPES) from None
