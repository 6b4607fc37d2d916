"""One training step: whether it is right, its kernels, and the floor under its time.

    python -m bench.step eight_block --kernels --graphs

Beside its time is the floor of `bench.floor`: what the device's data sheet leaves for the fewest operations and bytes.
"""

import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Literal

import torch
import typer
from pydantic import BaseModel
from tabulate import tabulate
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile

from ablations.training.step import training_step
from bench import command
from bench.floor import Floor, config_of, floor, rates_of
from bench.training import bare_round, recipe_of
from model.config import ModelConfig
from model.errors import InputError
from model.fast.compiled import compile_blocks
from model.fast.cuda_graphs import Recorder
from model.fast.execution import ExecutionOptions, ExecutionPlan
from model.fast.settings import full_fp32, set_for_training
from model.machine import device_name, torch_device
from model.registry import build
from model.variants import vary

KERNELS = 25  # that are kept, the longest first
TOLERANCE = 1e-3  # of losses that should be the same but for rounding


class Kernel(BaseModel):
    """The time that a kernel takes in a step."""

    name: str
    launches: float  # a step
    us: float  # a step, on the device
    share: float  # of the time of all kernels


class StepProfile(BaseModel):
    """A training step on a batch that is ready, by kernel. On a CPU its operators stand for the kernels."""

    batch: int
    steps: int  # in a round, and profiled
    means: str  # of the step: kernels, compiler, graphs
    step_ms: list[float]  # mean of each round, without the profiler
    busy_ms: float  # of a step, sum of all kernels
    launches: float  # a step, of all kernels
    kernels: list[Kernel]


class Agreement(BaseModel):
    """The losses of the same steps in float32: eager, and with kernels, compiler or graphs."""

    means: str
    eager: list[float]
    found: list[float]
    largest: float  # difference, as a share of the eager loss


def agreement(
    config: ModelConfig, batch: int, size: int, device: torch.device, means: ExecutionPlan, steps: int
) -> Agreement:
    """Trains eagerly and with `means`, from the same weights on the same batches, in full float32.

    Raises ValueError where the losses differ by more than `TOLERANCE`.
    """
    set_for_training()
    with full_fp32():
        eager, found = (_losses(config, batch, size, device, used, steps) for used in (ExecutionPlan(), means))
    largest = torch.tensor([abs(a - b) / abs(a) for a, b in zip(eager, found)]).max().item()
    if not largest <= TOLERANCE:  # also for NaN
        raise ValueError(f"with {means} the losses of the same steps differ by {largest:.2g} of themselves: {found}")
    return Agreement(means=str(means), eager=eager, found=found, largest=largest)


def _losses(
    config: ModelConfig, batch: int, size: int, device: torch.device, means: ExecutionPlan, steps: int
) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    net = build(config).to(device).to(memory_format=torch.channels_last).train()
    shape = steps, batch, config.in_chans, size, size
    x_SBCHW = torch.randn(shape, generator=generator).to(device)
    y_B = torch.arange(batch, device=device) % config.num_classes
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, fused=True)
    batches = [x_BCHW.contiguous(memory_format=torch.channels_last) for x_BCHW in x_SBCHW]
    step = prepared(net, optimizer, batches[0], means, bfloat16=False)
    return [step(x_BCHW, y_B, y_B)[0].item() for x_BCHW in batches]


def prepared(
    net: nn.Module, optimizer: Optimizer, x_BCHW: Tensor, means: ExecutionPlan, bfloat16: bool, smoothing: float = 0.0
) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]:
    """The training step with `means`. Raises what kernels or compiler raise where they do not work."""
    if means.kernels:
        from model.fast.kernels import use_kernels  # Triton is not everywhere

        use_kernels(net, [x_BCHW], bfloat16)
    if means.compile:
        compile_blocks(net, [x_BCHW], bfloat16)
    step = training_step(net, optimizer, bfloat16, smoothing)
    return partial(Recorder(optimizer, x_BCHW.device, strict=True), step) if means.graphs else step


def profile_step(
    config: ModelConfig,
    batch: int,
    size: int,
    device: torch.device,
    means: ExecutionPlan,
    steps: int,
    rounds: int,
    smoothing: float = 0.0,
) -> StepProfile:
    """Times and profiles training steps on one random batch of `size` x `size` images.

    They are in AdamW, bfloat16 and channels last, with label `smoothing`. Raises what kernels, compiler or graphs raise
    where they do not work.
    """
    set_for_training()
    torch.manual_seed(0)
    net = build(config).to(device).to(memory_format=torch.channels_last).train()
    x_BCHW = torch.randn(batch, config.in_chans, size, size, device=device).contiguous(
        memory_format=torch.channels_last
    )
    y_B = torch.arange(batch, device=device) % config.num_classes
    on_cuda = device.type == "cuda"
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True, capturable=on_cuda)
    step = prepared(net, optimizer, x_BCHW, means, True, smoothing)

    def a_round() -> float:
        return 1000 * bare_round(lambda: step(x_BCHW, y_B, y_B), steps, device) / steps

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
    longest = sorted(found, key=lambda kernel: -kernel[2])[:KERNELS]
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
    floor_ms: float | None = None  # by the device's data sheet; None for a device whose sheet is not in bench.floor
    agreement: Agreement


def measure_step(
    preset: str,
    device: torch.device,
    means: ExecutionPlan,
    batch: int = 128,
    size: int = 32,
    width: float = 1.0,
    steps: int = 20,
    rounds: int = 5,
    agreeing: int = 10,
) -> MeasuredStep:
    """Measures the step of a preset, with all channels times `width`, on `batch` images of `size` x `size` pixels.

    It is timed in `rounds` rounds of `steps` steps, and the losses of `agreeing` steps are compared with eager ones.
    Raises InputError where the step cannot be taken so, or its losses are wrong.
    """
    ExecutionOptions.requiring(means).check(device)
    config, smoothing = vary(config_of(preset, size), "width", width), recipe_of(preset).smoothing
    try:
        agreed = agreement(config, batch, size, device, means, agreeing)
        profiled = profile_step(config, batch, size, device, means, steps, rounds, smoothing)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"{preset}, {means}: {str(error).splitlines()[0]}") from error
    least, rates = floor(config, batch, size, size), rates_of(device_name(device))
    floor_ms = None if rates is None else 1000 * least.seconds(rates)
    return MeasuredStep(**dict(profiled), model=preset, floor=least, floor_ms=floor_ms, agreement=agreed)


def step_command(
    preset: Annotated[str, typer.Argument(help="A network.")],
    kernels: Annotated[bool, typer.Option("--kernels", help="With fused Triton kernels.")] = False,
    compile: Annotated[bool, typer.Option("--compile", help="With torch.compile.")] = False,
    graphs: Annotated[bool, typer.Option("--graphs", help="As CUDA graphs.")] = False,
    device: Annotated[str, typer.Option(help="auto (CUDA if there is one), cpu, cuda, cuda:N.")] = "auto",
    batch: Annotated[int, typer.Option(min=1, help="Images in a batch.")] = 128,
    size: Annotated[int, typer.Option(min=1, help="Height and width in pixels.")] = 32,
    width: Annotated[float, typer.Option(min=0.001, help="All channels times this.")] = 1.0,
    steps: Annotated[int, typer.Option(min=1, help="Steps in a round.")] = 20,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds.")] = 5,
    agreeing: Annotated[int, typer.Option(min=1, help="Steps compared with eager ones.")] = 10,
    format: Annotated[Literal["text", "json"], typer.Option(help="text or json.")] = "text",
) -> int:
    """Measure one training step of a network, by kernel."""
    means = ExecutionPlan(kernels=kernels, compile=compile, graphs=graphs)
    found = measure_step(preset, torch_device(device), means, batch, size, width, steps, rounds, agreeing)
    if format == "json":
        print(found.model_dump_json(indent=1))
        return 0
    median_ms = statistics.median(found.step_ms)
    share = ""
    if found.floor_ms is not None:
        share = f", {found.floor_ms:.3f} ms by the data sheet: {found.floor_ms / median_ms:.1%} of the step"
    print(
        f"{found.model}, batch {found.batch}, bf16, {found.means}: {median_ms:.3f} ms a step, "
        f"kernels for {found.busy_ms:.3f} ms of it, {found.launches:.0f} launches.\n"
        f"At the least {found.floor.flops / 1e9:,.1f} GFLOP and {found.floor.bytes / 1e9:,.3f} GB{share}. Losses "
        f"differ from those of eager steps, both in float32, by {found.agreement.largest:.1e} at most.\n"
    )
    rows = [(k.name[:60], round(k.launches, 1), round(k.us, 1), f"{k.share:.1%}") for k in found.kernels]
    print(tabulate(rows, headers=("kernel", "launches a step", "us a step", "share"), disable_numparse=True))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 the input is wrong or the step is."""
    return command.run(step_command, arguments)


if __name__ == "__main__":
    sys.exit(main())
