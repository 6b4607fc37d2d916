"""The batches that a network trains on, epoch by epoch.

Images stay on their device, where each batch is gathered and augmented. All random numbers follow from the trial's
seed, the epoch and the batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from expertgrid.model.training.augment import alternately_mirrored, augment, draw_mix, mix_images, mix_labels
from expertgrid.model.training.policies import Drawn, Policy
from expertgrid.model.training.recipe import Recipe
from expertgrid.model.training.splits import Splits

ALTERNATING, MIXING, POLICY = 1, 2, 3  # streams of random numbers beside that of the epoch's generator
PIXELS_TOGETHER = 1 << 20  # of the batches that a policy takes together: its operations have some images each


@dataclass(frozen=True)
class Batch:
    """The input of a training step. Under mixup or CutMix `labels_B` are the classes with the larger share."""

    x_BCHW: Tensor  # normalised floats, channels last
    labels_B: Tensor
    targets: Tensor  # classes (B), or their shares (B, N) where images are mixed
    indices_B: Tensor  # of the images in the train split


def batches(recipe: Recipe, images: int) -> tuple[int, int]:
    """The images in a batch, and the batches in an epoch of `images` images. An incomplete last batch is left out."""
    return recipe.batch_size, images // recipe.batch_size


class Loader:
    """The batches of a trial."""

    def __init__(self, recipe: Recipe, splits: Splits, seed: int):
        self.recipe, self.splits, self.seed = recipe, splits, seed
        self.device = splits.device
        self.mean_C, self.std_C = (torch.tensor(values, device=self.device) for values in recipe.mean_std(splits.data))
        self.generator, self.mixing = torch.Generator(self.device), np.random.RandomState()
        self.pixels_BHWC, self.policy = splits.train.pixels_BHWC, None
        if recipe.auto_augment or recipe.color_jitter:
            if self.device.type == "mps":  # which has no float64
                self.pixels_BHWC = self.pixels_BHWC.cpu()
            mean, _ = recipe.mean_std(splits.data)
            size, device = splits.data.image_size, self.pixels_BHWC.device
            self.policy = Policy(recipe.auto_augment, recipe.color_jitter, mean, size, device)

    def state_dict(self) -> dict[str, Any]:
        """Where the random numbers are, between two batches."""
        mixing = self.mixing.get_state(legacy=False)
        mixing["state"]["key"] = mixing["state"]["key"].tolist()
        return {"generator": self.generator.get_state(), "mixing": mixing}

    def _load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])
        mixing = state["mixing"]
        key = np.array(mixing["state"]["key"], dtype=np.uint32)
        self.mixing.set_state({**mixing, "state": {**mixing["state"], "key": key}})

    def epoch(self, epoch: int, done: int = 0, state: dict[str, Any] | None = None) -> Iterator[Batch]:
        """The batches of an epoch, which counts from 0.

        After an interruption: those that follow the first `done`, after which `state` was the loader's `state_dict`.
        """
        recipe, train = self.recipe, self.splits.train
        generator = self.generator.manual_seed(self.seed * recipe.epochs + epoch)
        mixing = self.mixing
        mixing.seed([MIXING, self.seed, epoch])
        order = torch.randperm(len(train), device=self.device, generator=generator)
        batch, steps = batches(recipe, len(train))
        chosen = order[: batch * steps].split(batch)[done:]
        size = recipe.image_size(epoch, self.splits.data.image_size)
        mirrored_N = None
        if recipe.alternating_flip:
            same = torch.Generator(self.device).manual_seed(ALTERNATING << 32 | self.seed)
            mirrored_N = alternately_mirrored(len(train), recipe.hflip, epoch, same)
        if state is not None:
            self._load_state_dict(state)
        for indices_B, pixels_BHWC in zip(chosen, self._pixels(chosen, epoch, done)):
            mirrored_B = None if mirrored_N is None else mirrored_N[indices_B]
            x_BCHW = augment(recipe, pixels_BHWC, self.mean_C, self.std_C, generator, mirrored_B, size)
            labels_B = targets = train.labels_B[indices_B]
            if recipe.mixes:
                mix = draw_mix(recipe, mixing, *x_BCHW.shape[2:])
                x_BCHW = mix_images(x_BCHW, mix)
                targets = mix_labels(labels_B, len(self.splits.data.classes), mix)
                labels_B = labels_B if mix.share >= 0.5 else labels_B.flip(0)
            yield Batch(x_BCHW, labels_B, targets, indices_B)

    def _pixels(self, chosen: tuple[Tensor, ...], epoch: int, done: int) -> Iterator[Tensor]:
        """The pixels (B, H, W, C) of each batch after the policy. `done` is the number of the first batch."""
        if self.policy is None:
            yield from (self.pixels_BHWC[indices_B] for indices_B in chosen)
            return
        height, width = self.splits.data.image_size
        together = max(1, PIXELS_TOGETHER // (height * width * self.recipe.batch_size))
        for first in range(0, len(chosen), together):
            part = chosen[first : first + together]
            streams = (np.random.RandomState([POLICY, self.seed, epoch, done + first + i]) for i in range(len(part)))
            drawn = Drawn.joined([self.policy.draw(random, self.recipe.batch_size) for random in streams])
            indices = torch.cat(part).to(self.pixels_BHWC.device)
            augmented = self.policy.apply(self.pixels_BHWC[indices], drawn).to(self.device)
            yield from augmented.split(self.recipe.batch_size)
