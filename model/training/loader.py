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


def steps_per_epoch(recipe: Recipe, images: int) -> int:
    """The batches in an epoch of `images` images. An incomplete last batch is left out."""
    return images // recipe.batch_size


class Loader:
    """The batches of a trial, epoch by epoch."""

    number: int  # of the epoch
    order: tuple[Tensor, ...]  # the images of each batch (B)
    mirrored_N: Tensor | None  # whether an image is, where the recipe alternates

    def __init__(self, recipe: Recipe, splits: Splits, seed: int):
        self.recipe, self.splits, self.seed = recipe, splits, seed
        self.device = splits.device
        self.mean_C, self.std_C = (torch.tensor(values, device=self.device) for values in recipe.mean_std(splits.data))
        self.generator, self.mixing = torch.Generator(self.device), np.random.RandomState()
        self.class_weights_N: Tensor | None = None
        if "balanced" in (recipe.class_weights, recipe.sampler):
            self.counts_N = torch.bincount(splits.train.labels_B, minlength=len(splits.data.classes))
            self.there_P = self.counts_N.nonzero().flatten()  # the classes that have images
            self.by_class_B = splits.train.labels_B.argsort(stable=True)
            if recipe.class_weights == "balanced":
                self.class_weights_N = len(splits.train) / (len(self.there_P) * self.counts_N.clamp(min=1))
        self.images, self.policy = splits.train, None
        if recipe.auto_augment or recipe.color_jitter:
            if self.device.type == "mps":  # which has no float64
                self.images = self.images.to("cpu")
            mean, _ = recipe.mean_std(splits.data)
            size, device = splits.data.image_size, self.images.labels_B.device
            self.policy = Policy(recipe.auto_augment, recipe.color_jitter, mean, size, device)

    def state_dict(self) -> dict[str, Any]:
        """Where the random numbers are, between two batches."""
        mixing = self.mixing.get_state(legacy=False)
        mixing["state"]["key"] = mixing["state"]["key"].tolist()
        return {"generator": self.generator.get_state(), "mixing": mixing}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])
        mixing = state["mixing"]
        key = np.array(mixing["state"]["key"], dtype=np.uint32)
        self.mixing.set_state({**mixing, "state": {**mixing["state"], "key": key}})

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """The batches of an epoch, which counts from 0."""
        self.begin(epoch)
        return self.batches()

    def begin(self, epoch: int) -> None:
        """From now on `batches` gives those of this epoch."""
        recipe, images = self.recipe, len(self.splits.train)
        self.number = epoch
        self.generator.manual_seed(self.seed * recipe.epochs + epoch)
        self.mixing.seed([MIXING, self.seed, epoch])
        random: dict[str, Any] = {"device": self.device, "generator": self.generator}
        if recipe.sampler == "shuffled":
            order_B = torch.randperm(images, **random)
        else:  # a class, and one of its images
            class_B = self.there_P[torch.randint(len(self.there_P), (images,), **random)]
            within_B = (torch.rand(images, **random) * self.counts_N[class_B]).long()
            order_B = self.by_class_B[(self.counts_N.cumsum(0) - self.counts_N)[class_B] + within_B]
        self.order = order_B[: images // recipe.batch_size * recipe.batch_size].split(recipe.batch_size)
        self.mirrored_N = None
        if recipe.alternating_flip:
            same = torch.Generator(self.device).manual_seed(ALTERNATING << 32 | self.seed)
            self.mirrored_N = alternately_mirrored(images, recipe.hflip, epoch, same)

    def batches(self, done: int = 0) -> Iterator[Batch]:
        """The batches of the epoch after the first `done`. Its random numbers go on from where they are."""
        recipe, order, mirrored_N = self.recipe, self.order[done:], self.mirrored_N
        size = recipe.image_size(self.number, self.splits.data.image_size)
        for indices_B, pixels_BHWC in zip(order, self._pixels(order, done)):
            mirrored_B = None if mirrored_N is None else mirrored_N[indices_B]
            x_BCHW = augment(recipe, pixels_BHWC, self.mean_C, self.std_C, self.generator, mirrored_B, size)
            labels_B = targets = self.splits.train.labels_B[indices_B]
            if recipe.mixes:
                mix = draw_mix(recipe, self.mixing, *x_BCHW.shape[2:])
                x_BCHW = mix_images(x_BCHW, mix)
                targets = mix_labels(labels_B, len(self.splits.data.classes), mix)
                labels_B = labels_B if mix.share >= 0.5 else labels_B.flip(0)
            yield Batch(x_BCHW, labels_B, targets, indices_B)

    def _pixels(self, order: tuple[Tensor, ...], done: int) -> Iterator[Tensor]:
        """The pixels (B, H, W, C) of each batch after the policy. `done` is the number of the first batch."""
        if self.policy is None:
            yield from map(self.images.pixels, order)
            return
        height, width = self.splits.data.image_size
        together = max(1, PIXELS_TOGETHER // (height * width * self.recipe.batch_size))
        for first in range(0, len(order), together):
            part = order[first : first + together]
            seeds = ([POLICY, self.seed, self.number, done + first + i] for i in range(len(part)))
            streams = map(np.random.RandomState, seeds)
            drawn = Drawn.joined([self.policy.draw(random, self.recipe.batch_size) for random in streams])
            indices = torch.cat(part).to(self.images.labels_B.device)
            augmented = self.policy.apply(self.images.pixels(indices), drawn).to(self.device)
            yield from augmented.split(self.recipe.batch_size)
