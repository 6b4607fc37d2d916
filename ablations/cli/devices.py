"""The device that a command runs on."""

import torch

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
