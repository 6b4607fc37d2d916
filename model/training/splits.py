"""The splits of a trial on the device that trains it.

Shapes: B images, H x W pixels, C channels.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from expertgrid.model.system.errors import InputError, reason_of
from expertgrid.model.training.data import ImageData, Images
from expertgrid.model.training.holdout import HoldOut


@dataclass(frozen=True)
class Split:
    """Some of the X images of a source and their class numbers, on one device. Splits share the source's pixels."""

    source_XHWC: Tensor  # uint8
    indices_B: Tensor  # of the images in the source
    labels_B: Tensor  # int64

    def __len__(self) -> int:
        return len(self.labels_B)

    @classmethod
    def of(cls, images: Images, device: torch.device) -> "Split":
        """All images."""
        indices_B = torch.arange(len(images), device=device)
        pixels_BHWC, labels_B = map(torch.from_numpy, (images.pixels_BHWC, images.labels_B))
        return cls(pixels_BHWC.to(device), indices_B, labels_B.to(device))

    def to(self, device: torch.device | str) -> "Split":
        return Split(self.source_XHWC.to(device), self.indices_B.to(device), self.labels_B.to(device))

    def part(self, places: Tensor) -> "Split":
        return Split(self.source_XHWC, self.indices_B[places], self.labels_B[places])

    def pixels(self, places: Tensor | slice = slice(None)) -> Tensor:
        """A copy of the images (B, H, W, C) at some places of the split; of all of them, if none are given."""
        return self.source_XHWC[self.indices_B[places]]


@dataclass(frozen=True)
class Splits:
    """What one seed trains on, what it holds out, and the test images."""

    data: ImageData
    train: Split
    validation: Split
    test: Split

    @property
    def device(self) -> torch.device:
        return self.train.labels_B.device

    def arrays(self) -> dict[str, np.ndarray]:
        """Pixels and labels on the CPU, as the export takes them (`export.certify.Images`)."""
        return {
            "train": self.train.pixels().cpu().numpy(),
            "validation": self.validation.pixels().cpu().numpy(),
            "validation_labels": self.validation.labels_B.cpu().numpy(),
            "test": self.test.pixels().cpu().numpy(),
            "test_labels": self.test.labels_B.cpu().numpy(),
        }

    @classmethod
    def undivided(cls, data: ImageData, device: torch.device) -> "Splits":
        """All train images to train on, to measure speed. The test images stand for the validation images."""
        test = Split.of(data.test, device)
        return cls(data, Split.of(data.train, device), test, test)


class ResidentData:
    """A source whose images are on a device, from which each seed takes its splits.

    Raises InputError where the device has too little memory for them.
    """

    def __init__(self, data: ImageData, device: torch.device):
        self.data, self.device = data, device
        try:
            self.train, self.test = Split.of(data.train, device), Split.of(data.test, device)
        except torch.OutOfMemoryError as error:
            text = f"its images do not fit into the memory of {device}; image_size = N in [base] makes them smaller"
            raise InputError(f"data source {data.source!r}: {text}: {reason_of(error)}") from None

    def splits(self, hold_out: HoldOut, seed: int) -> Splits:
        """The splits of a seed. Train and validation images keep the order of the source."""
        labels_B = self.data.train.labels_B
        held_out = hold_out.held_out(labels_B, self.data.fingerprint, seed)
        trained_on = np.setdiff1d(np.arange(len(labels_B)), held_out, assume_unique=True)
        places = (torch.from_numpy(indices).to(self.device) for indices in (trained_on, held_out))
        return Splits(self.data, *map(self.train.part, places), self.test)
