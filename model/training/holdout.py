"""Which train images a seed holds out: they select and decide, and are not trained on.

`rotating`: seed s holds out part s of a partition of the train images, stratified by class and fixed by the data. All
cells of a seed share it, so a seed is a block. When the parts of one partition are used up, a further one follows.
Verdicts then speak of new images of the same kind. `fixed`: every seed holds out the first part, as other protocols do.
Verdicts then speak of these images only.
"""

import hashlib
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from expertgrid.model.system.errors import InputError

SHARE = 0.1  # where the source gives no other share
SMALLEST_SHARE, LARGEST_SHARE = 0.01, 0.5
FEW = 10  # validation images of a class

Kind = Literal["rotating", "fixed"]


class HoldOut(BaseModel):
    """How the train images of a source are split for a seed. A share of 0.1 makes 10 parts.

    `offset` is the seed that counts as the first, so that cells of other seeds can share their hold-outs.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind = "rotating"
    share: float = Field(SHARE, ge=SMALLEST_SHARE, le=LARGEST_SHARE)
    offset: int = Field(0, ge=0)

    @property
    def parts(self) -> int:
        """The parts of one partition."""
        return round(1 / self.share)

    def __str__(self) -> str:
        part = f"one of {self.parts} parts of the train images"
        return f"each seed its own, {part}" if self.kind == "rotating" else f"the same for all seeds, {part}"

    def check_fits(self, labels_B: np.ndarray, classes: tuple[str, ...], data: str) -> None:
        """Raises InputError where a class has not two images: one to train on, and one to hold out."""
        counts_N = np.bincount(labels_B, minlength=len(classes))
        if counts_N.min() < 2:
            name, count = classes[int(counts_N.argmin())], int(counts_N.min())
            raise InputError(f"hold-out of {data}: class {name!r} has {count} train images; at least 2 are needed")

    def few_images(self, labels_B: np.ndarray, classes: tuple[str, ...]) -> str:
        """What a seed's hold-out has of the smallest class, where that is few images; else ""."""
        counts_N = np.bincount(labels_B, minlength=len(classes))
        few, smallest = int((counts_N < FEW * self.parts).sum()), int(counts_N.min())
        low, high = smallest // self.parts, -(-smallest // self.parts)
        name, count = classes[int(counts_N.argmin())], f"{low}" if low == high else f"{low} to {high}"
        others = f" ({few} classes have fewer than {FEW})" if few > 1 else ""
        return f"class {name!r} has {count} validation images, which say little of it{others}" if few else ""

    def held_out(self, labels_B: np.ndarray, fingerprint: str, seed: int) -> np.ndarray:
        """The sorted indices of the images that `seed` holds out. `fingerprint` is the data's."""
        partition, part = divmod(seed - self.offset if self.kind == "rotating" else 0, self.parts)
        return np.flatnonzero(partition_of(labels_B, self.parts, fingerprint, partition) == part)

    def size(self, labels_B: np.ndarray, fingerprint: str) -> int:
        """The number of images in the first part. No other part has more; a part has one image fewer at most."""
        return len(self.held_out(labels_B, fingerprint, seed=self.offset))


def partition_of(labels_B: np.ndarray, parts: int, fingerprint: str, number: int) -> np.ndarray:
    """The part (B,) of each image in partition `number`, from 0.

    The images of each class are dealt to the parts in a random order, one class after the other: parts differ by one
    image in each class and by one image in all. The order follows from the arguments alone.
    """
    key = hashlib.sha256(f"{fingerprint} {parts} {number}".encode()).digest()
    rng = np.random.Generator(np.random.PCG64(int.from_bytes(key[:16], "little")))
    by_class = np.lexsort((rng.random(len(labels_B)), labels_B))
    part_B = np.empty(len(labels_B), dtype=np.int64)
    part_B[by_class] = np.arange(len(labels_B)) % parts
    return part_B
