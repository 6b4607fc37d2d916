"""What a device can do at most, measured: matrix products, a network's own convolutions, and copies of memory."""

import copy
from collections.abc import Callable, Collection
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import BaseModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from expertgrid.model.system.machine import computes_bfloat16
from expertgrid.model.training.loop import seconds

MEASURE_S = 0.3
SIZES = {"cuda": 8192}  # of square matrices
SIZE = 2048
SMALL = 256
COPY_BYTES = {"cuda": 2**30}
SOME_BYTES = 2**27
LARGEST = 4  # convolutions of a network that are timed


class Peaks(BaseModel):
    """Rates of one device, each of the fastest of some calls: a disturbance makes calls slower, never faster.

    A multiply-accumulate counts as two operations, a copied byte as two: one read, one written.
    """

    bf16_flops: float  # operations a second
    fp32_flops: float
    copy_bytes_per_s: float

    def best(self, other: "Peaks") -> "Peaks":
        """The better rates of two measurements."""
        return Peaks(**{name: max(rate, getattr(other, name)) for name, rate in self})


class Convolution(NamedTuple):
    """A convolution's shapes: its input's (B, C, H, W), its weight's (F, C / groups, k, k), and what it computes."""

    x: tuple[int, ...]
    weight: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    groups: int
    operations: int  # of one call


@torch.no_grad()
def largest_convolutions(net: nn.Module, shape: tuple[int, ...]) -> list[Convolution]:
    """The LARGEST convolutions of a network on a batch of this shape (B, C, H, W), without computing them."""
    convolutions: set[Convolution] = set()

    class Noting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.convolution.default:
                x_BCHW, weight_FCkk, _, stride, padding, _, _, _, groups = args
                operations = 2 * out.numel() * weight_FCkk[0].numel()
                shapes = tuple(x_BCHW.shape), tuple(weight_FCkk.shape)
                convolutions.add(Convolution(*shapes, tuple(stride), tuple(padding), groups, operations))
            return out

    with Noting():
        copy.deepcopy(net).to("meta")(torch.empty(shape, device="meta"))
    return sorted(convolutions, key=lambda conv: conv.operations)[-LARGEST:]


def measure_peaks(
    device: torch.device,
    measure_s: float = MEASURE_S,
    size: int | None = None,
    convolutions: Collection[Convolution] = (),
) -> Peaks:
    """The peaks of `device`: the best of square matrices of that size and of `convolutions`.

    Takes about `measure_s` seconds for each of them in each type. Matrices in bfloat16 are small where the device has
    no instructions for it: one of `SIZE` would take a minute. Convolutions are left out there.
    """
    usual = size or SIZES.get(device.type, SIZE)

    def flops(dtype: torch.dtype) -> float:
        slow = dtype == torch.bfloat16 and not computes_bfloat16(device)
        side = min(usual, SMALL) if slow else usual
        a_NN, b_NN = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        out_NN = torch.empty_like(a_NN)
        matrices = 2 * side**3 / fastest(lambda: torch.mm(a_NN, b_NN, out=out_NN), device, measure_s)
        return max([matrices, *(_rate(conv, device, dtype, measure_s) for conv in convolutions if not slow)])

    size_bytes = COPY_BYTES.get(device.type, SOME_BYTES)
    source = torch.randint(256, (size_bytes,), dtype=torch.uint8, device=device)  # a GPU may compress zeros
    target = torch.zeros_like(source)
    copied = 2 * len(source) / fastest(lambda: target.copy_(source), device, measure_s)
    return Peaks(bf16_flops=flops(torch.bfloat16), fp32_flops=flops(torch.float32), copy_bytes_per_s=copied)


@torch.no_grad()
def _rate(conv: Convolution, device: torch.device, dtype: torch.dtype, measure_s: float) -> float:
    """Operations a second of a convolution, with its channels last."""

    def random(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, device=device).to(dtype, memory_format=torch.channels_last)

    x_BCHW, weight_FCkk = random(conv.x), random(conv.weight)
    run = partial(F.conv2d, x_BCHW, weight_FCkk, None, conv.stride, conv.padding, groups=conv.groups)
    return conv.operations / fastest(run, device, measure_s)


def fastest(run: Callable[[], object], device: torch.device, measure_s: float) -> float:
    """Seconds of the fastest of at least three calls, after one that is not counted."""
    run()
    times: list[float] = []
    while len(times) < 3 or sum(times) < measure_s:
        started = seconds(device)
        run()
        times.append(seconds(device) - started)
    return min(times)
