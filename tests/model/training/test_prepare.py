import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from expertgrid.ablations.study.study import Study
from expertgrid.model.system.machine import computes_bfloat16
from expertgrid.model.training.prepare import _wrong_in_bfloat16

CPU = torch.device("cpu")
CONVOLUTIONS = [*((kernel, stride, 1) for kernel in (1, 3, 5, 7) for stride in (1, 2)), (5, 1, 128), (3, 2, 128)]


@pytest.fixture(scope="module")
def trial(digits):
    return Study(name="test", question="?", seeds=1).cells(digits)[0].trials[0]


@pytest.mark.skipif(not computes_bfloat16(CPU), reason="the processor has no bfloat16")
@pytest.mark.parametrize(("kernel", "stride", "groups"), CONVOLUTIONS)
@pytest.mark.parametrize("pixels", [1, 2, 4])
def test_gradients_in_bfloat16_are_right_where_a_network_keeps_it(trial, digits_splits, kernel, stride, groups, pixels):
    first = nn.Sequential(nn.AdaptiveAvgPool2d(pixels), nn.Conv2d(1, 128, 1))
    conv = nn.Conv2d(128, 128, kernel, stride, kernel // 2, groups=groups, bias=False)
    if _wrong_in_bfloat16(trial, digits_splits, nn.Sequential(first, conv)):
        assert groups == 1 and pixels < max(stride, kernel // 2)
        return
    x_BCHW = torch.randn(16, 128, pixels, pixels).contiguous(memory_format=torch.channels_last)
    y_BCHW = conv(x_BCHW)
    noise_BCHW = torch.randn_like(y_BCHW)
    y_BCHW.backward(noise_BCHW)
    exact, conv.weight.grad = copy.deepcopy(conv.weight.grad), None
    for _ in range(3):
        rests = [torch.full((numbers,), torch.nan) for numbers in (300, 4000, 70_000, 300_000, 1_000_000) * 3]
        del rests  # what is not written stays in the memory
        weight = conv.weight.detach().bfloat16().contiguous(memory_format=torch.channels_last).requires_grad_()
        F.conv2d(x_BCHW.bfloat16(), weight, None, stride, kernel // 2, 1, groups).backward(noise_BCHW.bfloat16())
        torch.testing.assert_close(weight.grad.float(), exact, atol=0.03 * exact.abs().max().item(), rtol=0)


def test_a_network_of_small_maps_is_trained_in_fp32(trial, digits_splits):
    net = nn.Sequential(nn.Conv2d(1, 8, 8), nn.Conv2d(8, 8, 3, 2, 1))
    reason = "the gradients of 3x3 convolutions on maps of 1x1 pixels"
    assert _wrong_in_bfloat16(trial, digits_splits, net) == reason
    assert _wrong_in_bfloat16(trial, digits_splits, nn.Sequential(nn.Conv2d(1, 8, 8), nn.Conv2d(8, 8, 3, 1, 1))) == ""
