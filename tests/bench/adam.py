"""An optimiser that a process of its own can import quickly: unlike the test's file, this one imports torch only."""

import torch


def adam(net: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(net.parameters(), fused=True)
