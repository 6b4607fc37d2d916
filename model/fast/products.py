"""Mixed precision in which weight gradients of convolutions on small maps are matrix products, on CPUs.

There oneDNN's own are slow in bfloat16, and wrong where a map has fewer pixels than stride or padding: where a kernel
meets padding only, they are what was in the memory (torch 2.15, AVX-512). In fp32 its own are right, and the faster.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input
from torch.overrides import TorchFunctionMode

Pair = tuple[int, int]

# Pixels of the output times pixels of the kernel, up to which products are faster. On an AMD EPYC with bfloat16 in
# AVX-512 they took 0.06 to 0.9 of the library's time, for 128 to 2,048 channels and batches of 32 to 512.
SMALL = 144
LEAST = 1 << 15  # weights: with fewer of them, Python takes the time that is saved
# On CPUs with matrix units, for convolutions of so many channels, the library needs more time on larger maps too.
SMALL_AMX, CHANNELS_AMX = 576, 256


@contextmanager
def mixed_precision(device: torch.device, bfloat16: bool) -> Generator[None]:
    """Within, a network's forward pass for a training step runs in bfloat16 where `bfloat16` says so."""
    products = _Products() if bfloat16 and device.type == "cpu" else nullcontext()
    with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16), products:
        yield


class _Products(TorchFunctionMode):
    """All convolutions of a network, its own modules' and a user's functions, have the gradients of `_Convolution`."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is F.conv2d and torch.is_autocast_enabled("cpu"):
            func = _conv2d
        return func(*args, **(kwargs or {}))


def _conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """`F.conv2d` under autocast, with the names of its parameters."""
    strides, dilations = _pair(stride), _pair(dilation)
    if isinstance(padding, str):
        first, second = (d * (k - 1) * (padding == "same") for k, d in zip(weight.shape[2:], dilations))
        paddings = first // 2, second // 2
        even = first % 2 == second % 2 == 0
    else:
        paddings, even = _pair(padding), True
    numbers = strides, paddings, dilations
    usual = input.ndim == 4 and even and torch.float64 not in (input.dtype, weight.dtype)  # autocast leaves fp64
    if usual and weight.requires_grad and is_product(input.shape, weight.shape, *numbers):
        half = (None if tensor is None else tensor.bfloat16() for tensor in (input, weight, bias))
        return _Convolution.apply(*half, *numbers, groups)
    return F.conv2d(input, weight, bias, stride, padding, dilation, groups)


def _pair(value: int | Sequence[int]) -> Pair:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def is_product(x: torch.Size, weight: torch.Size, stride: Pair, padding: Pair, dilation: Pair) -> bool:
    """Whether the weight gradient of a convolution is a product, by the shapes of its input and its weight."""
    if weight[1] == 1:  # depthwise, or of grey images
        return False
    sides = list(zip(x[2:], weight[2:], stride, padding, dilation))
    if any(k > 1 and n < max(s, p) for n, k, s, p, _ in sides):  # where the library's is wrong
        return True
    height, width = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sides)
    amx = min(weight[:2]) >= CHANNELS_AMX and torch.cpu._is_amx_tile_supported()
    small = height * width * weight[2] * weight[3] <= (SMALL_AMX if amx else SMALL)
    return small and weight.numel() >= LEAST


class _Convolution(torch.autograd.Function):
    """A convolution whose weight gradient is its output's gradient times its input, which is moved by each tap."""

    @staticmethod
    def forward(ctx: Any, x_BCHW: Tensor, weight_OCkk: Tensor, bias_O: Tensor | None, *numbers: Any) -> Tensor:
        ctx.save_for_backward(x_BCHW, weight_OCkk)
        ctx.numbers = numbers
        return F.conv2d(x_BCHW, weight_OCkk, bias_O, *numbers)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (grad_BOhw,), (x_BCHW, weight_OCkk) = gradients, ctx.saved_tensors
        needs_x, _, needs_bias, *_ = ctx.needs_input_grad
        grad_x = conv2d_input(x_BCHW.shape, weight_OCkk, grad_BOhw, *ctx.numbers) if needs_x else None
        grad_bias = grad_BOhw.sum((0, 2, 3)) if needs_bias else None
        stride, (top, left), (down, right), groups = ctx.numbers
        kernel, (last_h, last_w) = weight_OCkk.shape[2:], ((n - 1) * s + 1 for n, s in zip(grad_BOhw.shape[2:], stride))
        x_BHWC = F.pad(x_BCHW.permute(0, 2, 3, 1), (0, 0, left, left, top, top))
        taps = [  # (B, h, w, C) each
            x_BHWC[:, i * down : i * down + last_h : stride[0], j * right : j * right + last_w : stride[1]]
            for i, j in product(*map(range, kernel))
        ]
        x_BhwTC = torch.stack(taps, 3) if len(taps) > 1 else taps[0].unsqueeze(3)
        x_PTGC = x_BhwTC.unflatten(-1, (groups, -1)).flatten(0, 2)  # P pixels, T taps, G groups
        grad_PGO = grad_BOhw.permute(0, 2, 3, 1).unflatten(-1, (groups, -1)).flatten(0, 2)
        if groups == 1:
            grad_OTC = (grad_PGO.flatten(1).T @ x_PTGC.flatten(1)).unflatten(1, (len(taps), -1))
        else:
            grad_OTC = torch.einsum("pgo,ptgc->gotc", grad_PGO, x_PTGC).flatten(0, 1)
        grad_weight = grad_OTC.unflatten(1, kernel).permute(0, 3, 1, 2)
        return grad_x, grad_weight, grad_bias, None, None, None, None
