"""What a network that is not ours computes from fixed weights: it tells a change of its code.

Imports no torch until a network is run.
"""

import random
from functools import partial
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from expertgrid.model.config import ModelConfig, Network
from expertgrid.model.system.errors import InputError, reason_of

NETWORK = "network.json"  # a probe beside the checkpoint of a user's network
TOLERANCE = {"float64": 1e-6, "float32": 1e-3}  # of the largest number of a kind


class Probe(BaseModel):
    """Numbers of a network with fixed random weights on 4 fixed random images, on a CPU.

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
        return "" if self.dtype == other.dtype else "number formats"


def probe_of(config: Network, size: tuple[int, int], of_timm: bool = False) -> Probe | None:
    """What a user's network, or one `of_timm`, computes now on images of height and width; None for another network.

    None also for one that no module has registered. Raises InputError where the network's code fails.
    """
    if isinstance(config, ModelConfig):
        return None
    from expertgrid.model.registry import is_users

    if not of_timm and not is_users(config):
        return None
    try:
        return Probe(dtype="float64", values=_numbers(config, size, "float64"))
    except Exception:  # such as code that makes float32 tensors itself
        pass
    try:
        return Probe(dtype="float32", values=_numbers(config, size, "float32"))
    except Exception as error:  # a user's code may fail in any way
        raise InputError(f"model {config.timm}: cannot be trained: {reason_of(error)}") from error


def _numbers(config: Network, size: tuple[int, int], dtype: str) -> dict[str, list[float]]:
    """The numbers by kind. Weights are moved a little after they are read: a part that begins at zero would be mute."""
    import torch

    from expertgrid.model.registry import build

    values: dict[str, list[float]] = {}
    noise = partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=getattr(torch, dtype))

    def enter(kind: str, tensors: list[Any]) -> None:
        tensors = [torch.zeros(1) if tensor is None else tensor.detach() for tensor in tensors]
        numbers = [number for tensor in tensors for number in (tensor.norm(), (tensor * noise(tensor.shape)).sum())]
        values[kind] = torch.stack(numbers).nan_to_num(0, 0, 0).tolist()

    before, states = torch.get_default_dtype(), (random.getstate(), np.random.get_state())
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.enable_grad():
        torch.set_default_dtype(getattr(torch, dtype))
        try:
            for seed in (torch.default_generator.manual_seed, random.seed, np.random.seed):
                seed(0)
            net = build(config).to(getattr(torch, dtype))
            images_BCHW = noise(4, config.in_chans, *size)
            parameters = [parameter for _, parameter in sorted(net.named_parameters())]
            enter("first weights", parameters)
            with torch.no_grad():
                for parameter in parameters:
                    parameter += 0.02 * noise(parameter.shape)
            for training, when in ((True, "in training"), (False, "in evaluation")):
                net.zero_grad()
                outputs_BN = net.train(training)(images_BCHW)
                (outputs_BN * noise(outputs_BN.shape)).sum().backward()
                enter(f"outputs {when}", list(outputs_BN.T))
                enter(f"gradients {when}", [parameter.grad for parameter in parameters])
        finally:
            torch.set_default_dtype(before)
            random.setstate(states[0])
            np.random.set_state(states[1])
    return values
