"""Whether a network takes images of some size."""

from expertgrid.model.config import ModelConfig, Network
from expertgrid.model.system.errors import InputError


def check_fit(name: str, config: Network, channels: int, size: tuple[int, int], data: str) -> None:
    """Raises InputError where the network does not take images of `data` that have `size` (height, width)."""
    height, width = size
    try:
        if isinstance(config, ModelConfig):
            config.output_size(height, width)
        else:
            import torch

            from expertgrid.model.registry import build

            with torch.device("meta"):
                build(config).eval()(torch.empty(1, channels, height, width))
    except (ValueError, RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"model {name} does not take the {height}x{width} images of {data}: {reason}") from None
