"""One training step: whether it is right, its kernels, and the floor under its time.

    python -m bench.step eight_block --kernels --graphs

The floor is the fewest operations and bytes that a step of a network needs, whoever writes the kernels. Operations are
those of the convolutions and matrix products, forwards and backwards, without the gradient of the images. Bytes are
counted in bfloat16, as if each block were four passes over memory, because batch statistics part what could be one:
forwards the convolutions (reads the input, writes the experts' outputs, gathers statistics), then norm, activation and
mix (reads these, writes the block's output); backwards the sums of the norm's gradient (reads the experts' outputs and
the output's gradient), then all gradients (reads both again and the input, writes that of the input). A norm after the
mix needs one mixed map in place of the K outputs, and a block without norm none. Weights, their gradients and the two
moments of AdamW are read and written once each in float32. Pooling, head and loss count as fused into their neighbours.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial

import torch
from pydantic import BaseModel
from tabulate import tabulate
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from bench.training import bare_round, bare_step
from model.config import ModelConfig
from model.errors import InputError, unknown
from model.fast.compiled import blocks, compile_blocks
from model.fast.cuda_graphs import Recorder
from model.fast.execution import WORDS, Execution, Means
from model.fast.memory import keep_freed_memory
from model.net import ExpertBlock
from model.presets import PRESETS, network
from model.registry import build
from model.variants import vary

BFLOAT16, FLOAT32 = 2, 4  # bytes
KERNELS = 25  # that are kept, the longest first
TOLERANCE = 1e-3  # of losses that should be the same but for rounding


class Floor(BaseModel):
    """The fewest operations (a multiply-accumulate is two) and bytes that a training step needs."""

    flops: int
    bytes: int


class Kernel(BaseModel):
    """What one kernel takes of a step."""

    name: str
    launches: float  # a step
    us: float  # a step, on the device
    share: float  # of the time of all kernels


class StepProfile(BaseModel):
    """A step of the bare loop, by kernel. On a CPU its operators stand for the kernels."""

    batch: int
    steps: int  # in a round, and profiled
    means: str  # of the step: kernels, compiler, graphs
    step_ms: list[float]  # mean of each round, without the profiler
    busy_ms: float  # of a step, sum of all kernels
    launches: float  # a step, of all kernels
    kernels: list[Kernel]


def floor(config: ModelConfig, batch: int, height: int, width: int) -> Floor:
    """The floor under a step on `batch` images, from the config alone."""
    elements = 0

    def count(part: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal elements
        x, out, held = inputs[0].numel(), output.numel(), output.numel()
        if isinstance(part, ExpertBlock):
            in_experts = hasattr(part.experts[0], "norm")
            held *= len(part.experts) if in_experts else not isinstance(part.norm_act, nn.Identity)
        else:
            held *= hasattr(part, "norm")
        gradient = x if inputs[0].requires_grad else 0
        if held:
            elements += (x + held) + (held + out) + (held + out) + (held + out + x + gradient)
        else:
            elements += (x + out) + (out + x + gradient)

    with torch.device("meta"):
        net = build(config).train()
        for part in blocks(net):
            part.register_forward_hook(count)
        with FlopCounterMode(display=False) as counter:
            net(torch.empty(batch, config.in_chans, height, width)).sum().backward()
    trained = sum(parameter.numel() for parameter in net.parameters() if parameter.requires_grad)
    return Floor(flops=counter.get_total_flops(), bytes=BFLOAT16 * elements + 2 * 4 * FLOAT32 * trained)


class Agreement(BaseModel):
    """The losses of the same steps in float32, taken in two ways."""

    means: str
    plain: list[float]
    found: list[float]
    largest: float  # difference, as a share of the plain loss


def agreement(config: ModelConfig, batch: int, size: int, device: torch.device, means: Means, steps: int) -> Agreement:
    """Trains plainly and with `means`, from the same weights on the same batches, in full float32.

    Raises ValueError where the losses differ by more than `TOLERANCE`.
    """
    allowed = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    try:
        plain, found = (_losses(config, batch, size, device, one, steps) for one in (Means(), means))
    finally:
        torch.backends.cudnn.conv.fp32_precision = allowed
    largest = torch.tensor([abs(a - b) / abs(a) for a, b in zip(plain, found)]).max().item()
    if not largest <= TOLERANCE:  # which a NaN is not either
        raise ValueError(f"with {means} the losses of the same steps differ by {largest:.2g} of themselves: {found}")
    return Agreement(means=str(means), plain=plain, found=found, largest=largest)


def _losses(config: ModelConfig, batch: int, size: int, device: torch.device, means: Means, steps: int) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    net = build(config).to(device, memory_format=torch.channels_last).train()
    shape = steps, batch, config.in_chans, size, size
    x_SBCHW = torch.randn(shape, generator=generator).to(device)
    y_B = torch.arange(batch, device=device) % config.num_classes
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, fused=True)
    batches = [x_BCHW.contiguous(memory_format=torch.channels_last) for x_BCHW in x_SBCHW]
    step = _prepared(net, optimizer, batches[0], means, False)
    return [step(x_BCHW, y_B)[0].item() for x_BCHW in batches]


def _prepared(
    net: nn.Module, optimizer: Optimizer, x_BCHW: Tensor, means: Means, bfloat16: bool
) -> Callable[[Tensor, Tensor], tuple[Tensor, ...]]:
    """A bare step that uses `means`. Raises what kernels or compiler raise where they do not work."""
    if means.kernels:
        from model.fast.kernels import use_kernels  # Triton is not everywhere

        use_kernels(net, [x_BCHW], bfloat16)
    if means.compile:
        compile_blocks(net, [x_BCHW], bfloat16)
    step = bare_step(net, optimizer, bfloat16)
    return partial(Recorder(optimizer, x_BCHW.device, strict=True), step) if means.graphs else step


def profile_step(
    config: ModelConfig, batch: int, size: int, device: torch.device, means: Means, steps: int, rounds: int
) -> StepProfile:
    """Times and profiles bare steps (AdamW, bfloat16, channels last) on one random batch of `size` x `size` images.

    Raises what kernels, compiler or graphs raise where they do not work.
    """
    keep_freed_memory()  # as training does
    torch.manual_seed(0)
    net = build(config).to(device, memory_format=torch.channels_last).train()
    x_BCHW = torch.randn(batch, config.in_chans, size, size, device=device).contiguous(
        memory_format=torch.channels_last
    )
    y_B = torch.arange(batch, device=device) % config.num_classes
    on_cuda = device.type == "cuda"
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True, capturable=on_cuda)
    step = _prepared(net, optimizer, x_BCHW, means, True)

    def a_round() -> float:
        return 1000 * bare_round(lambda: step(x_BCHW, y_B), steps, device) / steps

    a_round()
    step_ms = [a_round() for _ in range(rounds)]
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_cuda]) as profiled:
        a_round()
    kind = DeviceType.CUDA if on_cuda else DeviceType.CPU
    found = [
        (event.key, event.count, event.self_device_time_total if on_cuda else event.self_cpu_time_total)
        for event in profiled.key_averages()
        if event.device_type == kind and not event.is_user_annotation
    ]
    total = sum(us for _, _, us in found) or 1.0
    longest = sorted(found, key=lambda one: -one[2])[:KERNELS]
    return StepProfile(
        batch=batch,
        steps=steps,
        means=str(means),
        step_ms=step_ms,
        busy_ms=total / steps / 1000,
        launches=sum(launches for _, launches, _ in found) / steps,
        kernels=[
            Kernel(name=name, launches=launches / steps, us=us / steps, share=us / total)
            for name, launches, us in longest
        ],
    )


class MeasuredStep(StepProfile):
    """All that is asked about the step of a network."""

    model: str
    floor: Floor
    agreement: Agreement


def measure_step(asked: argparse.Namespace, device: torch.device, means: Means) -> MeasuredStep:
    """What the command line asks. Raises InputError where the step cannot be taken so, or its losses are wrong."""
    config = network(asked.preset)
    if not isinstance(config, ModelConfig):
        raise unknown("preset", asked.preset, PRESETS)
    config = vary(config, "width", asked.width)
    try:
        config.output_size(asked.size, asked.size)
        agreed = agreement(config, asked.batch, asked.size, device, means, asked.agreeing)
        profiled = profile_step(config, asked.batch, asked.size, device, means, asked.steps, asked.rounds)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"{asked.preset}, {means}: {str(error).splitlines()[0]}") from error
    least = floor(config, asked.batch, asked.size, asked.size)
    return MeasuredStep(**dict(profiled), model=asked.preset, floor=least, agreement=agreed)


def main() -> int:
    """Exit status: 0 done, 2 the input is wrong or the step is."""
    parser = argparse.ArgumentParser(prog="python -m bench.step", description=__doc__.splitlines()[0])
    parser.add_argument("preset")
    for name in WORDS:
        parser.add_argument(f"--{name}", action="store_true", help=f"with {WORDS[name]}")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, default=32, help="height and width in pixels")
    parser.add_argument("--width", type=float, default=1.0, help="all channels times this")
    parser.add_argument("--steps", type=int, default=20, help="in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--agreeing", type=int, default=10, help="steps whose losses are compared with plain ones")
    parser.add_argument("--format", choices=("text", "json"), default="text")
    asked = parser.parse_args()
    if min(asked.batch, asked.size, asked.steps, asked.rounds, asked.agreeing) < 1:
        parser.error("sizes and counts are from 1")
    execution = Execution(**{name: "on" if getattr(asked, name) else "off" for name in WORDS})
    try:
        device = torch.device(asked.device)
        execution.check(device)
        found = measure_step(asked, device, Means(**{name: getattr(asked, name) for name in WORDS}))
    except (InputError, RuntimeError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if asked.format == "json":
        print(found.model_dump_json(indent=1))
        return 0
    print(
        f"{found.model}, batch {found.batch}, bf16, {found.means}: {statistics.median(found.step_ms):.3f} ms a step, "
        f"kernels for {found.busy_ms:.3f} ms of it, {found.launches:.0f} launches.\n"
        f"At the least {found.floor.flops / 1e9:,.1f} GFLOP and {found.floor.bytes / 1e9:,.3f} GB. Losses differ from "
        f"those of plain steps, both in float32, by {found.agreement.largest:.1e} at most.\n"
    )
    rows = [(one.name[:60], round(one.launches, 1), round(one.us, 1), f"{one.share:.1%}") for one in found.kernels]
    print(tabulate(rows, headers=("kernel", "launches a step", "us a step", "share"), disable_numparse=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
