"""The device that a command runs on, and what of PyTorch's compilers can be used on it."""

from collections.abc import Sequence

import torch

from expertgrid.ablations.cli.terminal import console
from expertgrid.model.fast.execution import ExecutionOptions, ExecutionPlan
from expertgrid.model.system.errors import unknown


def device(name: str) -> torch.device:
    """The device that --device names. Raises InputError for one that this machine does not have."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    devices = ["cpu", *(["cuda"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]) * torch.cuda.is_available()]
    devices += ["mps"] * torch.backends.mps.is_available()
    if name not in devices:
        raise unknown("device", name, ["auto", *devices])
    return torch.device(name)


def usable(execution: ExecutionOptions, chosen: Sequence[ExecutionPlan], device: torch.device) -> ExecutionOptions:
    """`execution` without what some of the trainings would use and the device does not have; a notice says why."""
    execution, without = execution.usable(chosen, device)
    for text in without:
        console.print(f"trained without {text}", soft_wrap=True)
    return execution
