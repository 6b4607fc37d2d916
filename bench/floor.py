"""The least time that a training step takes on paper, and which fusion of its kernels would move it.

    python -m bench.floor eight_block --batch 128 --device h100

A step is a list of passes over memory. A pass takes what its operations take at the device's rate, or its bytes at its
bandwidth, whichever is longer; and one pass follows the other. The rates are those of the data sheet. Steps are in
bfloat16, and each way to take them is a list of passes of its own:

    operators    PyTorch's operators as `model.net` has them: each reads its inputs and writes its outputs once
    norm+act     the same with ReLU as a part of the batch norm before it
    kernels      the fused kernels: norm, ReLU and mix are two passes forwards and two backwards
    +pool        and the gate's pooling is a part of the kernel that writes its input, backwards of one that reads it
    +statistics  and the statistics of a norm are gathered by the convolution before it
    least        four passes a block, as batch statistics separate them: what no kernels could do in less

Operators and kernels are counted as they are called, on tensors without values. A batch norm reads its inputs twice:
for its statistics, and to use them. A convolution backwards is two passes: for its input and for its weights.

The four passes are: forwards the convolutions (they read the input, write the experts' outputs and gather statistics),
then norm, activation and mix (read these, write the block's output); backwards the sums of the norm's gradient (read
the experts' outputs and the output's gradient), then all gradients (read both again and the input, write that of the
input). A norm after the mix needs one mixed map in place of the K outputs, and a block without norm none. Pooling, head
and loss count as fused into their neighbours. The gradient of the images is not needed.

The optimiser reads and writes weights, gradients and the two moments of Adam once each in float32. Muon has one moment
for a matrix, and the products of its iteration.
"""

import sys
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
import typer
from pydantic import BaseModel
from tabulate import tabulate
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from ablations.training.recipe import RECIPES
from bench import command
from model.config import ModelConfig
from model.errors import InputError, unknown
from model.fast.compiled import blocks
from model.net import ExpertBlock
from model.presets import PRESETS, network
from model.registry import build

aten = torch.ops.aten

BFLOAT16, FLOAT32 = 2, 4  # bytes
WRITES_ONLY = (aten.copy_, aten.fill_, aten.zero_)  # in-place operators that do not read what they write
ALLOCATIONS = (aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided)
NORMS = (aten.native_batch_norm, aten.native_batch_norm_backward)
ACTS = (aten.relu, aten.relu_, aten.threshold_backward)
POOL, POOL_GRADIENT, STATISTICS, OPTIMISER = "gate's pooling", "its gradient added", "_tile_statistics", "optimiser"
MUON_ITERATIONS = 5


class Rates(BaseModel, frozen=True):
    """What a data sheet says of a device."""

    name: str  # what PyTorch's name of it ends with
    flops: float  # in bfloat16, a second
    bytes_per_s: float


DEVICES = {
    "h100": Rates(name="H100 80GB HBM3", flops=989e12, bytes_per_s=3.35e12),
    "h200": Rates(name="H200", flops=989e12, bytes_per_s=4.8e12),
}


def rates_of(device_name: str) -> Rates | None:
    """The rates of a device by the name that PyTorch has for it; None for another device."""
    return next((rates for rates in DEVICES.values() if device_name.endswith(rates.name)), None)


class Pass(BaseModel, frozen=True):
    """One kernel: its operations (a multiply-accumulate is two), and the bytes that it reads and writes."""

    name: str
    flops: int
    bytes: int

    def seconds(self, rates: Rates) -> float:
        return max(self.flops / rates.flops, self.bytes / rates.bytes_per_s)


class Floor(BaseModel):
    """The fewest operations and bytes that a training step needs, whoever writes the kernels."""

    flops: int
    bytes: int

    def seconds(self, rates: Rates) -> float:
        """As if all operations were done while the bytes are moved."""
        return max(self.flops / rates.flops, self.bytes / rates.bytes_per_s)


def floor(config: ModelConfig, batch: int, height: int, width: int) -> Floor:
    """The floor under a step with Adam on `batch` images, from the config alone."""
    with torch.device("meta"):
        net = build(config).train()
        with FlopCounterMode(display=False) as counter:
            least = _least(net, torch.empty(batch, config.in_chans, height, width))
    return Floor(flops=counter.get_total_flops(), bytes=sum(part.bytes for part in [*least, optimiser(net, "adam")]))


def _least(net: nn.Module, x_BCHW: Tensor) -> list[Pass]:
    """The four passes of each part of a network, or the two of one without norm. Takes a step."""
    found: list[Pass] = []

    def see(part: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x, out, held = inputs[0].numel(), output.numel(), output.numel()
        convs = part.typed_experts() if isinstance(part, ExpertBlock) else [part]
        if isinstance(part, ExpertBlock):
            in_experts = hasattr(part.experts[0], "norm")
            held *= len(part.experts) if in_experts else not isinstance(part.norm_act, nn.Identity)
        else:
            held *= hasattr(part, "norm")
        gradient = x if inputs[0].requires_grad else 0
        flops = sum(_conv_flops(conv.conv, inputs[0]) for conv in convs)
        backwards = flops * (2 if gradient else 1)
        elements = [(x + held, flops), (held + out, 0), (held + out, 0), (held + out + x + gradient, backwards)]
        if not held:
            elements = [(x + out, flops), (out + x + gradient, backwards)]
        name = type(part).__name__
        found.extend(Pass(name=name, flops=flops, bytes=BFLOAT16 * count) for count, flops in elements)

    handles = [part.register_forward_hook(see) for part in blocks(net)]
    net(x_BCHW).sum().backward()
    for handle in handles:
        handle.remove()
    return found


def _conv_flops(conv: nn.Conv2d, x_BCHW: Tensor) -> int:
    """The operations of a convolution forwards."""
    (kernel, _), (stride, _), padding = conv.kernel_size, conv.stride, conv.padding[0]
    assert isinstance(padding, int)  # not the name of a rule
    size = [(pixels + 2 * padding - kernel) // stride + 1 for pixels in x_BCHW.shape[2:]]
    return 2 * len(x_BCHW) * size[0] * size[1] * conv.weight.numel()


def optimiser(net: nn.Module, name: str) -> Pass:
    """The step of an optimiser of timm: Muon's where it has its name, else Adam's."""
    flops = total = 0
    for parameter in net.parameters():
        rows, columns = parameter.shape[0], parameter.numel() // max(1, parameter.shape[0])
        if name == "muon" and parameter.ndim > 1:
            small, large = sorted((rows, columns))
            flops += MUON_ITERATIONS * (4 * small**2 * large + 2 * small**3)
            total += 5 * FLOAT32 * parameter.numel()  # reads weight, gradient and moment, writes weight and moment
            total += MUON_ITERATIONS * BFLOAT16 * (3 * small * large + 4 * small**2)  # of three products
        else:
            total += 2 * 4 * FLOAT32 * parameter.numel()
    return Pass(name=OPTIMISER, flops=flops, bytes=total)


class _Counted(TorchDispatchMode):
    """The passes of all operators that run."""

    def __init__(self):
        super().__init__()
        self.passes: list[Pass] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        operator = func.overloadpacket
        if func.namespace != "aten" or operator in ALLOCATIONS:  # other namespaces have questions to a tensor
            return result
        read, written, aliased = [], [], False
        for argument, value in zip(func._schema.arguments, args):
            tensors = [x for x in (value if isinstance(value, list | tuple) else [value]) if isinstance(x, Tensor)]
            changed = argument.alias_info is not None and argument.alias_info.is_write
            aliased |= argument.alias_info is not None and not changed
            written += tensors * changed
            read += tensors * (not changed or operator not in WRITES_ONLY)
        if aliased:  # a view
            return result
        if not written:
            made = result if isinstance(result, list | tuple) else [result]
            written = [x for x in made if isinstance(x, Tensor)]
        flops = flop_registry[operator](*args, **kwargs, out_val=result) if operator in flop_registry else 0
        if operator is aten.convolution_backward:
            self._convolution_backward(args, result, flops)
            return result
        name = operator.__name__
        if operator is aten.sum and read[0].ndim == 4 and list(args[1]) == [2, 3]:
            name = POOL
        if operator in (aten.add, aten.add_) and any(x.ndim == 4 and x.stride()[2:] == (0, 0) for x in read):
            name = POOL_GRADIENT
        size = sum(map(_bytes, read)) * (2 if operator in NORMS else 1) + sum(map(_bytes, written))
        self.passes.append(Pass(name=name, flops=flops, bytes=size))
        return result

    def _convolution_backward(self, args: Any, result: Any, flops: int) -> None:
        dout, x, weight = args[:3]
        made = [(dx, kept) for dx, kept in zip(result[:2], (weight, x)) if dx is not None]
        self.passes += [
            Pass(name="convolution_backward", flops=flops // len(made), bytes=_bytes(dout) + _bytes(kept) + _bytes(dx))
            for dx, kept in made
        ]

    def start(self, kernel: str, tensors: Sequence[Tensor]) -> None:
        """Counts the start of a fused kernel, which reads or writes each of its tensors once."""
        self.passes.append(Pass(name=kernel, flops=0, bytes=sum(map(_bytes, tensors))))


def _bytes(x: Tensor) -> int:
    """What is in memory of a tensor: of one that is expanded, no copies."""
    count = 1
    for size, stride in zip(x.shape, x.stride()):
        count *= size if stride else 1
    return count * x.element_size() if x.numel() else 0


def passes(config: ModelConfig, batch: int, size: int, fused: bool) -> list[Pass]:
    """The passes of a training step's operators, without the optimiser's; with the fused kernels if `fused`."""
    counted = _Counted()
    with FakeTensorMode():
        net = build(config).train()
        x_BCHW = torch.empty(batch, config.in_chans, size, size).contiguous(memory_format=torch.channels_last)
        y_B = torch.zeros(batch, dtype=torch.int64)

        def take() -> None:
            with counted:
                with torch.autocast("cpu", torch.bfloat16):
                    loss = nn.functional.cross_entropy(net(x_BCHW), y_B)
                loss.backward()

        if fused:
            from bench.kernels import seen  # Triton is not everywhere
            from model.fast.kernels import fuse

            fuse(net)
            with seen(
                lambda kernel, given: counted.start(kernel, [x for x in given.values() if isinstance(x, Tensor)])
            ):
                take()
        else:
            take()
    return counted.passes


def ways(config: ModelConfig, batch: int, size: int, opt: str) -> dict[str, list[Pass]]:
    """The passes of each way to take a step, from the most to the fewest."""
    with torch.device("meta"):
        net = build(config).train()
        least = _least(net, torch.empty(batch, config.in_chans, size, size))
    operators, kernels = (passes(config, batch, size, fused) for fused in (False, True))
    acts = {operator.__name__ for operator in ACTS}
    found = {
        "operators": operators,
        "norm+act": _without(operators, acts),
        "kernels": kernels,
        "+pool": _without(kernels, {POOL, POOL_GRADIENT}),
        "+statistics": _without(kernels, {POOL, POOL_GRADIENT, STATISTICS}),
        "least": least,
    }
    return {name: [*parts, optimiser(net, opt)] for name, parts in found.items()}


def _without(passes: list[Pass], names: set[str]) -> list[Pass]:
    return [part for part in passes if part.name not in names]


def rows(ways: dict[str, list[Pass]], rates: Rates) -> list[dict[str, object]]:
    """The ways as a table. A share of the peak is that of the operations of all in the least time of the way."""
    found: list[dict[str, object]] = []
    for name, parts in ways.items():
        flops, total = sum(part.flops for part in parts), sum(part.bytes for part in parts)
        seconds = sum(part.seconds(rates) for part in parts)
        found.append(
            {
                "way": name,
                "passes": len(parts),
                "GFLOP": f"{flops / 1e9:,.1f}",
                "GB": f"{total / 1e9:,.3f}",
                "at least ms": f"{1000 * seconds:.3f}",
                "of the bf16 peak %": f"{100 * flops / rates.flops / seconds:.1f}",
            }
        )
    return found


def config_of(preset: str, size: int) -> ModelConfig:
    """The network of a preset. Raises InputError for another name, and where it takes no images of that size."""
    config = network(preset)
    if not isinstance(config, ModelConfig):
        raise unknown("preset", preset, PRESETS)
    try:
        config.output_size(size, size)
    except ValueError as error:
        raise InputError(f"{preset}: {error}") from error
    return config


def floor_command(
    preset: Annotated[str, typer.Argument(help="A network.")],
    device: Annotated[Literal["h100", "h200"], typer.Option(help="The GPU: h100 (SXM) or h200.")] = "h100",
    batch: Annotated[int, typer.Option(min=1, help="Images in a batch.")] = 128,
    size: Annotated[int, typer.Option(min=1, help="Height and width in pixels.")] = 32,
    format: Annotated[Literal["text", "json"], typer.Option(help="text or json.")] = "text",
) -> int:
    """The least time of a training step on paper, by what is fused."""
    config, rates = config_of(preset, size), DEVICES[device]
    recipe = RECIPES.get(preset.removeprefix("expertnet_"), RECIPES["fast"])
    try:
        found = ways(config, batch, size, recipe.opt)
    except ImportError as error:
        raise InputError(f"the fused kernels cannot be counted here: {error}") from error
    if format == "json":
        lines = [f' "{name}": [{", ".join(part.model_dump_json() for part in parts)}]' for name, parts in found.items()]
        print("{\n" + ",\n".join(lines) + "\n}")
        return 0
    print(
        f"{preset}, batch {batch} of {size}x{size}, bf16, {recipe.opt}, on {rates.name} by its data sheet: "
        f"{rates.flops / 1e12:,.0f} TFLOP/s, {rates.bytes_per_s / 1e12:.2f} TB/s\n"
    )
    print(tabulate(rows(found, rates), headers="keys", disable_numparse=True))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 the input is wrong."""
    return command.run(floor_command, arguments)


if __name__ == "__main__":
    sys.exit(main())
