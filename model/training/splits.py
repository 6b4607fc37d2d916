"""The splits of a trial on the device that trains it.

Shapes: B images, H x W pixels, C channels.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from expertgrid.model.training.data import ImageData, Images
from expertgrid.model.training.holdout import HoldOut


@dataclass(frozen=True)
class Split:
    """Images and their class numbers, on one device."""

    pixels_BHWC: Tensor  # uint8
    labels_B: Tensor  # int64

    def __len__(self) -> int:
        return len(self.labels_B)

    @classmethod
    def of(cls, images: Images, device: torch.device) -> "Split":
        return cls(torch.from_numpy(images.pixels_BHWC).to(device), torch.from_numpy(images.labels_B).to(device))


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
            "train": self.train.pixels_BHWC.cpu().numpy(),
            "validation": self.validation.pixels_BHWC.cpu().numpy(),
            "validation_labels": self.validation.labels_B.cpu().numpy(),
            "test": self.test.pixels_BHWC.cpu().numpy(),
            "test_labels": self.test.labels_B.cpu().numpy(),
        }

    @classmethod
    def undivided(cls, data: ImageData, device: torch.device) -> "Splits":
        """All train images to train on, to measure speed. The test images stand for the validation images."""
        test = Split.of(data.test, device)
        return cls(data, Split.of(data.train, device), test, test)


class ResidentData:
    """A source whose images are on a device, from which each seed takes its splits."""

    def __init__(self, data: ImageData, device: torch.device):
        self.data, self.device = data, device
        self.train, self.test = Split.of(data.train, device), Split.of(data.test, device)

    def splits(self, hold_out: HoldOut, seed: int) -> Splits:
        """The splits of a seed. Train and validation images keep the order of the source."""
        labels_B = self.data.train.labels_B
        held_out = hold_out.held_out(labels_B, self.data.fingerprint, seed)
        trained_on = np.setdiff1d(np.arange(len(labels_B)), held_out, assume_unique=True)
        train, validation = (self._part(indices) for indices in (trained_on, held_out))
        return Splits(self.data, train, validation, self.test)

    def _part(self, indices: np.ndarray) -> Split:
        indices_B = torch.from_numpy(indices).to(self.device)
        return Split(self.train.pixels_BHWC[indices_B], self.train.labels_B[indices_B])
