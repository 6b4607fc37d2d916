"""Reading the weights of a network's gates while images go through it.

Shapes: B images, K experts of a block.
"""

from collections.abc import Generator
from contextlib import contextmanager

from torch import Tensor, nn

from expertgrid.model.net import Gate


def gates(net: nn.Module) -> dict[str, Gate]:
    """The gates of a network, by the name of their block, in the network's order."""
    return {name.removesuffix(".gate"): part for name, part in net.named_modules() if isinstance(part, Gate)}


@contextmanager
def recorded_gates(net: nn.Module) -> Generator[dict[str, list[Tensor]]]:
    """Records, within the context, the weights (B, K) that each gate gives to each batch, by the name of its block.

    The tensors are those of the forward pass: on its device, in its type, and with its gradients where it has them.
    """
    weights: dict[str, list[Tensor]] = {block: [] for block in gates(net)}

    def record(block: str):
        return lambda gate, inputs, gate_BK: weights[block].append(gate_BK)

    handles = [gate.register_forward_hook(record(block)) for block, gate in gates(net).items()]
    try:
        yield weights
    finally:
        for handle in handles:
            handle.remove()
