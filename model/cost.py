"""What a network costs: its parameters, and the multiply-accumulates of one image; and which images it takes.

Parameters are the values that training changes. Fixed values are buffers and do not count: the filters of a whitening
stem, the weights of norms without scale, frozen gates. What `recipe.freeze` keeps fixed in a training does count.

Multiply-accumulates are those of convolutions and linear layers, as PyTorch's `FlopCounterMode` counts them (two
operations each). The cost of a `ModelConfig` is worked out from the config alone, without torch.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from expertgrid.model.config import Block, Conv, GateConfig, Layer, ModelConfig, Network, NormConfig, Residual, Whiten
from expertgrid.model.system.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn

Size = tuple[int, int]  # height and width
Cost = tuple[int, int]  # parameters and multiply-accumulates


def cost(config: Network, height: int, width: int) -> Cost:
    """Parameters, and multiply-accumulates of the forward pass of one image of `height` x `width` pixels.

    Raises ValueError where a layer is left no pixel. A model of timm is built and counted.
    """
    if not isinstance(config, ModelConfig):
        import torch  # here, so that our own networks need no torch

        from expertgrid.model.registry import build, for_shapes

        with for_shapes(config):
            return counted(build(config), torch.zeros(1, config.in_chans, height, width))
    config.output_size(height, width)  # raises ValueError for images that are too small
    costs, channels, _ = _sequence(config.layers, config.in_chans, (height, width), config.norm)
    hidden = config.head.hidden if config.head.pool else ()
    return _sum([*costs, _linear((channels, *hidden, *([config.num_classes] if config.num_classes else [])))])


def _sequence(layers: Iterable[Layer], channels: int, size: Size, norm: NormConfig) -> tuple[list[Cost], int, Size]:
    """The costs of layers one after the other, and the channels and the size after them."""
    costs = []
    for layer in layers:
        costs.append(_layer(layer, channels, size, norm))
        channels, size = layer.out_channels(channels), _after(layer, size)
    return costs, channels, size


def _sum(costs: Iterable[Cost]) -> Cost:
    parameters, macs = zip(*costs)
    return sum(parameters), sum(macs)


def _after(layer: Layer, size: Size) -> Size:
    return layer.out_pixels(size[0]), layer.out_pixels(size[1])


def _conv(in_chs: int, out_chs: int, kernel: int, out: Size, bias: bool) -> Cost:
    weights = in_chs * out_chs * kernel**2
    return weights + bias * out_chs, weights * out[0] * out[1]


def _linear(sizes: tuple[int, ...]) -> Cost:
    """Linear layers with bias, from the first of `sizes` to the last."""
    weights = sum(a * b for a, b in zip(sizes, sizes[1:]))
    return weights + sum(sizes[1:]), weights


def _norm(channels: int, norm: NormConfig) -> Cost:
    return channels * (1 + norm.scale), 0


def _layer(layer: Layer, in_chs: int, size: Size, norm: NormConfig) -> Cost:
    match layer:
        case Whiten():
            out_chs = layer.out_channels(in_chs)
            _, macs = _conv(in_chs, out_chs, layer.kernel, _after(layer, size), bias=True)
            return out_chs, macs  # of the stem only the bias is trained
        case Conv():
            out = layer.conv_pixels(size[0]), layer.conv_pixels(size[1])
            conv = _conv(in_chs, layer.channels, layer.kernel, out, bias=not layer.norm_act)
            return _sum([conv, _norm(layer.channels, norm)]) if layer.norm_act else conv
        case Block():
            out, bias = _after(layer, size), layer.norm_act == "none"
            norms = {"expert": len(layer.kernels), "mix": 1, "none": 0}[layer.norm_act]
            experts = [_conv(in_chs, layer.channels, kernel, out, bias) for kernel in layer.kernels]
            gate = _gate(layer.gate, in_chs, len(layer.kernels))
            return _sum([*experts, *[_norm(layer.channels, norm)] * norms, gate])
        case Residual():
            costs, channels, out = _sequence(layer.layers, in_chs, size, norm)
            return _sum([*costs, *[_conv(in_chs, channels, 1, out, bias=True)] * layer.has_projection(in_chs)])
        case _:
            return 0, 0  # pooling, dropout


def _gate(gate: GateConfig | None, in_chs: int, experts: int) -> Cost:
    if gate is None or gate.kind == "uniform":
        return 0, 0
    if gate.kind == "constant":
        return experts, 0
    parameters, macs = _linear((in_chs, *gate.hidden, experts))
    return (0 if gate.frozen else parameters), macs


def check_image_size(model: str, config: Network, size: Size, data: str) -> None:
    """Raises InputError where the network, which errors call `model`, does not take the images of `data` at a size."""
    try:
        cost(config, *size)
    except (ValueError, RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"model {model} does not take the {size[0]}x{size[1]} images of {data}: {reason}") from None


def counted(net: "nn.Module", image_1CHW: "Tensor") -> Cost:
    """Parameters that are trained, and multiply-accumulates of the forward pass of an image in evaluation mode."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net.eval()(image_1CHW)
    parameters = sum(parameter.numel() for parameter in net.parameters() if parameter.requires_grad)
    return parameters, counter.get_total_flops() // 2
