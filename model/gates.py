"""Reading the weights of a network's gates while images go through it.

Shapes: B images, K experts of a block.
"""

from collections.abc import Generator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from expertgrid.model.net import Gate


def gates(net: nn.Module) -> dict[str, Gate]:
    """The gates of a network, by the name of their block, in the network's order."""
    return {name.removesuffix(".gate"): part for name, part in net.named_modules() if isinstance(part, Gate)}


@contextmanager
def recorded(modules: Mapping[str, nn.Module]) -> Generator[dict[str, list[Tensor]]]:
    """Records, within the context, what each module gives for each batch, by its name: a gate the weights (B, K).

    The tensors are those of the forward pass: on its device, in its type, and with its gradients where it has them.
    """
    outputs: dict[str, list[Tensor]] = {name: [] for name in modules}

    def record(name: str):
        return lambda module, inputs, output: outputs[name].append(output)

    handles = [module.register_forward_hook(record(name)) for name, module in modules.items()]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
