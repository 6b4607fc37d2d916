"""The source of a module that registers small networks with timm, each of which has a fault in training."""

from collections.abc import Mapping

SOURCE = """
import ctypes, multiprocessing, os, signal, time
import torch
from timm.models import register_model

FAULTS = {faults!r}

class Network(torch.nn.Module):
    def __init__(self, fault, in_chans, num_classes):
        super().__init__()
        self.head, self.fault = torch.nn.Linear(in_chans, num_classes), fault

    def forward(self, x):
        if self.training and len(x) > 8:  # not where a network is looked at before the training
            exec(self.fault)
        return self.head(x.mean((2, 3)))

def network(fault):
    return lambda pretrained=False, in_chans=3, num_classes=10, **_: Network(fault, in_chans, num_classes)

for name, fault in FAULTS.items():
    function = network(fault)
    function.__name__, function.__module__ = name, __name__
    register_model(function)
"""


def networks_with_faults(faults: Mapping[str, str]) -> str:
    """`faults` has the statement that each network, by its name in timm, runs on each batch of a training."""
    return SOURCE.format(faults=dict(faults))
