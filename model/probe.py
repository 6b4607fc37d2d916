"""What a network that is not ours computes from fixed weights: it tells a change of its code. Imports no torch."""

from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from expertgrid.model.config import ModelConfig, Network

TOLERANCE = {"float64": 1e-6, "float32": 1e-3}  # of the largest number of a kind


class Probe(BaseModel):
    """Numbers of a network with fixed random weights on fixed random images, on a CPU; see `model.foreign.probe`.

    By kind: the outputs, and of each parameter and gradient the norm and a projection, in training and in evaluation.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    dtype: Literal["float64", "float32"]  # float32 where the network's code does not run in float64
    values: dict[str, list[float]]

    def difference(self, other: "Probe") -> str:
        """The first kind of numbers that differ, such as `outputs in training`; "" for the same code."""
        for kind in self.values | other.values:
            first, second = (np.array(probe.values.get(kind, ())) for probe in (self, other))
            largest = max(np.abs(first).max(initial=0), np.abs(second).max(initial=0))
            if first.shape != second.shape or np.abs(first - second).max(initial=0) > TOLERANCE[self.dtype] * largest:
                return kind
        return "" if self.dtype == other.dtype else "number format"


def probe_of(config: Network, size: tuple[int, int], of_timm: bool = False) -> Probe | None:
    """What a user's network, or one `of_timm`, computes now on images of height and width; None for another network.

    None also for one that no module has registered. Raises InputError where the network's code fails.
    """
    if isinstance(config, ModelConfig):
        return None
    from expertgrid.model.foreign import probe
    from expertgrid.model.registry import is_users

    return probe(config, size) if of_timm or is_users(config) else None
