"""What of PyTorch's compilers can be used on a device."""

from collections.abc import Sequence

import torch

from expertgrid.ablations.cli.terminal import console
from expertgrid.model.fast.execution import ExecutionOptions, ExecutionPlan


def usable(execution: ExecutionOptions, chosen: Sequence[ExecutionPlan], device: torch.device) -> ExecutionOptions:
    """`execution` without what some of the trainings would use and the device does not have; a notice says why."""
    execution, without = execution.usable(chosen, device)
    for text in without:
        console.print(f"trained without {text}", soft_wrap=True)
    return execution
