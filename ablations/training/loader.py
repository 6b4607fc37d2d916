"""The batches that a network trains on, epoch by epoch.

Images stay on their device, where each batch is gathered and augmented. Only where a recipe has `color_jitter` or
`auto_augment`, which timm computes with PIL image by image, worker processes do that part and feed the device. All
random numbers follow from the trial's seed, the epoch and the image's index; the number of workers changes nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ablations.training.augment import alternately_mirrored, augment, draw_mix, mix_images, mix_labels
from ablations.training.policies import Transform, pil_transform, random_state_kept, transformed
from ablations.training.recipe import Recipe
from ablations.training.splits import Splits
from model.machine import usable_cores

MOST_WORKERS = 16
ALTERNATING, MIXING = 1, 2  # streams of random numbers beside that of the epoch's generator


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
    """The batches of a trial.

    `workers` is the number of processes for the PIL part: 0 does it in this process, None takes all usable cores but
    one, at most MOST_WORKERS.
    """

    def __init__(self, recipe: Recipe, splits: Splits, seed: int, workers: int | None = None):
        self.recipe, self.splits, self.seed = recipe, splits, seed
        self.device = splits.device
        self.mean_C, self.std_C = (torch.tensor(values, device=self.device) for values in recipe.mean_std(splits.data))
        self.generator, self.mixing = torch.Generator(self.device), np.random.RandomState()
        self.pil, self.keys = None, _Keys()
        if (transform := pil_transform(recipe, splits.data)) is not None:
            workers = min(MOST_WORKERS, max(1, usable_cores() - 1)) if workers is None else workers
            pixels_BHWC = splits.train.pixels_BHWC.cpu()
            images = _PilImages(pixels_BHWC, transform, seed)
            self.pil = _pil_loader(images, self.keys, workers, self.device.type == "cuda")

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
        for indices_B, pixels_BHWC in zip(chosen, self._pixels(chosen, epoch)):
            mirrored_B = None if mirrored_N is None else mirrored_N[indices_B]
            x_BCHW = augment(recipe, pixels_BHWC, self.mean_C, self.std_C, generator, mirrored_B, size)
            labels_B = targets = train.labels_B[indices_B]
            if recipe.mixes:
                mix = draw_mix(recipe, mixing, *x_BCHW.shape[2:])
                x_BCHW = mix_images(x_BCHW, mix)
                targets = mix_labels(labels_B, len(self.splits.data.classes), mix)
                labels_B = labels_B if mix.share >= 0.5 else labels_B.flip(0)
            yield Batch(x_BCHW, labels_B, targets, indices_B)

    def _pixels(self, chosen: tuple[Tensor, ...], epoch: int) -> Iterator[Tensor]:
        """The pixels (B, H, W, C) of each batch, on the device, once the PIL part is done."""
        if self.pil is None:
            return (self.splits.train.pixels_BHWC[indices_B] for indices_B in chosen)
        self.keys.keys = [(epoch, indices_B) for indices_B in torch.stack(chosen).tolist()] if chosen else []
        return (pixels_BHWC.to(self.device, non_blocking=True) for pixels_BHWC in self.pil)


class _Keys(Sampler):
    """The batches of the next epoch: for each, the epoch's number and the indices of its images."""

    keys: list[tuple[int, list[int]]] = []

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        return iter(self.keys)

    def __len__(self) -> int:
        return len(self.keys)


class _PilImages(Dataset):
    """Train images after a PIL transform. A batch is one item, so that a worker makes it whole."""

    def __init__(self, pixels_BHWC: Tensor, transform: Transform, seed: int):
        self.pixels_BHWC, self.transform, self.seed = pixels_BHWC, transform, seed

    def __getitem__(self, index: tuple[int, list[int]]) -> Tensor:
        epoch, indices = index
        pixels_BHWC = self.pixels_BHWC.numpy()
        with random_state_kept():
            done = [transformed(self.transform, pixels_BHWC[i], (self.seed, epoch, i)) for i in indices]
        return torch.from_numpy(np.stack(done))


def _pil_loader(images: _PilImages, keys: _Keys, workers: int, pin_memory: bool) -> DataLoader:
    # Without a generator of its own it would draw from the global one, which dropout uses.
    prefetching: dict[str, Any] = {"persistent_workers": True, "prefetch_factor": 4} if workers else {}
    return DataLoader(
        images,
        batch_size=None,
        sampler=keys,
        num_workers=workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),
        **prefetching,
    )
