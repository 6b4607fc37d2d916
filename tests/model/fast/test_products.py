import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from expertgrid.model.fast.products import is_product, mixed_precision
from expertgrid.model.system.machine import computes_bfloat16

CPU = torch.device("cpu")
needs_bfloat16 = pytest.mark.skipif(not computes_bfloat16(CPU), reason="the processor has no bfloat16")
NETWORKS = {  # of 128 channels
    **{f"{k}x{k}, stride {s}": nn.Conv2d(128, 128, k, s, k // 2) for k in (1, 3, 5, 7) for s in (1, 2)},
    "grouped": nn.Conv2d(128, 128, 5, 2, 2, groups=4, bias=False),
    "depthwise": nn.Conv2d(128, 128, 5, 1, 2, groups=128),
    "dilated": nn.Conv2d(128, 128, 3, padding=2, dilation=2),
    "same": nn.Conv2d(128, 128, 7, padding="same"),
    "one side": nn.Conv2d(128, 256, (1, 7), (2, 1), (0, 3)),
}


def gradients(net: nn.Module, x_BCHW, dtype) -> list[torch.Tensor]:
    """The output, and the gradients of the input and the weights."""
    net, x_BCHW = copy.deepcopy(net).to(dtype), x_BCHW.to(dtype).detach().requires_grad_()
    with mixed_precision(CPU, dtype == torch.float32):
        y_BCHW = net(x_BCHW)
    y_BCHW.backward(torch.randn(y_BCHW.shape, generator=torch.Generator().manual_seed(0)).to(y_BCHW.dtype))
    return [y_BCHW.detach(), x_BCHW.grad, *(weight.grad for weight in net.parameters())]


@needs_bfloat16
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("pixels", [1, 2, 4, 5])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_gradients_in_bfloat16_are_those_of_fp64(name, pixels, compiled):
    conv, x_BCHW = NETWORKS[name], torch.randn(4, 128, pixels, pixels).contiguous(memory_format=torch.channels_last)
    exact = gradients(conv, x_BCHW, torch.float64)
    net = copy.deepcopy(conv).to(memory_format=torch.channels_last)
    for _ in range(3):
        rests = [torch.full((numbers,), torch.nan) for numbers in (300, 4000, 70_000, 300_000, 1_000_000) * 3]
        del rests  # what is not written stays in the memory
        if compiled:
            net.compile(dynamic=False)
        for number, right in zip(gradients(net, x_BCHW, torch.float32), exact, strict=True):
            torch.testing.assert_close(number.double(), right, atol=0.03 * right.abs().max().item(), rtol=0)


@needs_bfloat16
def test_products_change_nothing_but_the_weight_gradient():
    conv, x_BCHW = nn.Conv2d(128, 128, 3, padding=1, bias=False), torch.randn(16, 128, 4, 4)
    calls = gradients(conv, x_BCHW, torch.float32)
    x_BCHW.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y_BCHW = conv(x_BCHW)
    y_BCHW.backward(torch.randn(y_BCHW.shape, generator=torch.Generator().manual_seed(0)).bfloat16())
    assert torch.equal(calls[0], y_BCHW) and torch.equal(calls[1], x_BCHW.grad)
    assert calls[2].dtype == conv.weight.dtype and not torch.equal(calls[2], conv.weight.grad)
    torch.testing.assert_close(calls[2], conv.weight.grad, atol=0.5, rtol=0.02)


def test_what_is_not_in_mixed_precision_stays_pytorchs():
    """Frozen weights, images without a batch, and a part that a network computes in fp32 or fp64 by itself."""
    conv, x_BCHW = nn.Conv2d(128, 128, 3, padding=1), torch.randn(2, 128, 4, 4)

    def products(x: torch.Tensor, enabled: bool = True) -> int:
        with mixed_precision(CPU, True), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            return "_Convolution" in str(conv(x).grad_fn)

    assert products(x_BCHW) and not products(x_BCHW[0]) and not products(x_BCHW, enabled=False)
    with mixed_precision(CPU, False):
        assert conv(x_BCHW).dtype == torch.float32 and "_Convolution" not in str(conv(x_BCHW).grad_fn)
    conv.double()
    assert not products(x_BCHW.double())
    conv.float().weight.requires_grad_(False)
    assert not products(x_BCHW)


@pytest.mark.parametrize(
    ("pixels", "shape", "numbers", "product"),
    [
        (4, (128, 128, 3, 3), ((1, 1), (1, 1), (1, 1)), True),
        (5, (128, 128, 3, 3), ((1, 1), (1, 1), (1, 1)), False),
        (4, (32, 32, 3, 3), ((1, 1), (1, 1), (1, 1)), False),  # few weights
        (1, (8, 8, 3, 3), ((2, 2), (1, 1), (1, 1)), True),  # the library's is wrong
        (12, (256, 128, 1, 1), ((1, 1), (0, 0), (1, 1)), True),
        (1, (512, 1, 3, 3), ((1, 1), (1, 1), (1, 1)), False),  # depthwise
    ],
)
def test_which_convolutions_have_products(pixels, shape, numbers, product):
    assert is_product(torch.Size((8, shape[1], pixels, pixels)), torch.Size(shape), *numbers) == product


def test_convolutions_within_other_functions():
    weight = torch.randn(128, 128, 3, 3, requires_grad=True)
    with mixed_precision(CPU, True):
        y_BCHW = F.conv2d(torch.randn(2, 128, 4, 4), weight / 2, stride=(1, 1), padding=(1, 1))
    assert "_Convolution" in str(y_BCHW.grad_fn)
