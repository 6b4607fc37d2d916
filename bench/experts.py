"""The forms that an expert block's computation can take, timed against each other: `python -m bench.experts`.

    loop    one expert after another, added up as they come: what `model.net.ExpertBlock` does
    stack   all experts' outputs stacked, weighted and summed, as a textbook has it
    chunk   one convolution and one batch norm of K x C channels; their chunks weighted and added up: `model.fast.wide`
    sum     the same, reshaped to (B, K, C, H, W), weighted and summed over K
    einsum  the same as one contraction over K
    fused   one convolution; then norm, activation and mix as one expression of its output and its statistics, which
            the compiler makes one pass over memory

Each is timed eager and compiled, forwards and backwards, in turns, and has first to give the outputs and the gradients
of the loop. On the CPUs measured (bfloat16 in AVX-512, and in the matrix units of AMX) no other eager form beat the
loop: a wide convolution does not make up for the memory that K outputs held at a time take. Compiled, the chunks were
the fastest, 1.4 times as fast as the eager loop: the form in which blocks are compiled.
On GPUs, not measured yet, the fused form is the one with the fewest passes over memory once it is compiled.
"""

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Literal, cast

import torch
import torch.nn.functional as F
import typer
from pydantic import BaseModel
from tabulate import tabulate
from torch import Tensor, nn

from bench import command
from bench.baseline import TextbookBlock
from bench.peaks import synchronise
from bench.training import in_turns
from model.config import Block, GateConfig, ModelConfig
from model.fast.compiled import compile_without_limit
from model.fast.settings import set_for_training
from model.fast.wide import WideBlock
from model.machine import torch_device
from model.net import ConvNormAct, ExpertBlock, ExpertNet

TOLERANCE = 1e-3  # of the largest value: float32 in another order of summing
COMPILERS = ("eager", "compiled")


class ReshapedBlock(nn.Module):
    """A block in one of the last three forms, in training mode: one convolution of K x C channels, and its gate.

    Its weights are copies of the block's. (B, C, H, W) to the same.
    """

    def __init__(self, block: ExpertBlock, form: str):
        super().__init__()
        assert block.gate is not None  # a block of several experts has one
        self.gate, self.count, self.form = block.gate, len(block.experts), form
        self.eps = block.typed_experts()[0].norm.eps
        self.weight, self.scale_F, self.shift_F = (
            nn.Parameter(torch.cat([part(expert).detach() for expert in block.typed_experts()]))
            for part in (lambda e: e.conv.weight, lambda e: e.norm.weight, lambda e: e.norm.bias)
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        gate_BK = self.gate(x_BCHW)
        wide_BFHW = F.conv2d(x_BCHW, self.weight, padding=self.weight.shape[2] // 2)  # F = K x C
        if self.form == "fused":
            return self.fused(wide_BFHW, gate_BK)
        wide_BFHW = F.batch_norm(wide_BFHW, None, None, self.scale_F, self.shift_F, training=True, eps=self.eps)
        wide_BFHW = torch.relu_(wide_BFHW)
        experts_BKCHW = wide_BFHW.unflatten(1, (self.count, -1))
        if self.form == "einsum":
            return torch.einsum("bk,bkchw->bchw", gate_BK.to(experts_BKCHW.dtype), experts_BKCHW)
        return (gate_BK[:, :, None, None, None] * experts_BKCHW).sum(1)

    def fused(self, wide_BFHW: Tensor, gate_BK: Tensor) -> Tensor:
        variance_F, mean_F = torch.var_mean(wide_BFHW.float(), (0, 2, 3), correction=0)
        slope_F = self.scale_F * torch.rsqrt(variance_F + self.eps)
        offset_F = self.shift_F - mean_F * slope_F
        act_BFHW = torch.relu(wide_BFHW * slope_F[:, None, None] + offset_F[:, None, None])
        parts_BKCHW = act_BFHW.unflatten(1, (self.count, -1))
        return (gate_BK[:, :, None, None, None] * parts_BKCHW).sum(1)

    def like_the_loop(self) -> list[Tensor]:
        """The gradients of all experts, then those of the gate."""
        return [gradient(p) for p in (self.weight, self.scale_F, self.shift_F, *self.gate.parameters())]


Form = ExpertBlock | TextbookBlock | ReshapedBlock
FORMS = ("loop", "stack", "chunk", "sum", "einsum", "fused")


def build_form(form: str, experts: int, channels: int) -> Form:
    """A block in one of `FORMS`; all have the same weights."""
    config = Block(channels=channels, kernels=(3,) * experts, gate=GateConfig(kind="mlp", reduction=8))
    torch.manual_seed(0)
    block = ExpertNet(ModelConfig(in_chans=channels, layers=(config,))).layers[0]
    assert isinstance(block, ExpertBlock)  # as the config says
    if form == "chunk":
        block.__class__ = WideBlock
    if form in ("loop", "chunk"):
        return block
    return TextbookBlock(block) if form == "stack" else ReshapedBlock(block, form)


def gradient(leaf: Tensor) -> Tensor:
    """The gradient of a tensor that a backward pass has reached."""
    assert leaf.grad is not None, "a weight or an input has no part in the output"
    return leaf.grad


def gradients(block: Form) -> list[Tensor]:
    """The gradients of a block in any form, the experts' joined: weights, scales, shifts; then the gate's."""
    if isinstance(block, ReshapedBlock):
        return block.like_the_loop()
    assert block.gate is not None  # a block of several experts has one
    experts = [cast(ConvNormAct, expert) for expert in block.experts]  # nn.ModuleList does not keep their type
    parts = [[gradient(p) for p in (e.conv.weight, e.norm.weight, e.norm.bias)] for e in experts]
    return [*map(torch.cat, zip(*parts)), *map(gradient, block.gate.parameters())]


def difference(found: Form, loop: Form, x_BCHW: Tensor) -> float:
    """The largest difference from the loop of output, input's gradient and weights' gradients, in float32.

    Each is a share of the largest value of the tensor that it is in.
    """
    results = []
    for block in (found, loop):
        block.zero_grad()
        input_BCHW = x_BCHW.detach().clone().requires_grad_()
        output_BCHW = block(input_BCHW)
        output_BCHW.square().mean().backward()
        results.append([output_BCHW.detach(), gradient(input_BCHW), *gradients(block)])
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(*results))


class FormSpeed(BaseModel):
    """One form, eager or compiled."""

    form: str
    how: str
    difference: float  # of the eager form from the loop, in float32
    first_s: float  # of the first call, which compiles
    median_ms: float
    x_loop: float  # median over the rounds of the eager loop's time over this form's
    rounds_ms: list[float]


def measure(
    device: torch.device, batch: int, channels: int, experts: int, size: int, rounds: int, hows: tuple[str, ...]
) -> list[FormSpeed]:
    """Times all forms on one random batch, channels last, under autocast to bfloat16.

    The batch is in bfloat16 too, as is what a block gives to the next block.

    Raises ValueError where a form does not compute what the loop does.
    """
    set_for_training()
    compile_without_limit()
    generator = torch.Generator().manual_seed(0)
    x_BCHW = torch.randn(batch, channels, size, size, generator=generator).to(device)
    few_BCHW = x_BCHW[:4].cpu()
    x_BCHW = x_BCHW.bfloat16().contiguous(memory_format=torch.channels_last).requires_grad_()
    ways: dict[tuple[str, str], Callable[[], float]] = {}
    differences, firsts = {}, {}
    for form in FORMS:
        block = build_form(form, experts, channels)
        differences[form] = difference(block, build_form("loop", experts, channels), few_BCHW)  # where fp32 is fp32
        block.to(device).to(memory_format=torch.channels_last)
        if differences[form] > TOLERANCE:
            raise ValueError(f"the form {form!r} differs from the loop by {differences[form]:.2g}")
        for how in hows:
            run = torch.compile(block, dynamic=False) if how == "compiled" else block
            ways[form, how] = _step(run, block, x_BCHW)
            firsts[form, how] = ways[form, how]()
    seconds = in_turns(ways, rounds)
    return [
        FormSpeed(
            form=form,
            how=how,
            difference=differences[form],
            first_s=firsts[form, how],
            median_ms=1000 * statistics.median(times),
            x_loop=statistics.median(a / b for a, b in zip(seconds["loop", "eager"], times)),
            rounds_ms=[1000 * time for time in times],
        )
        for (form, how), times in seconds.items()
    ]


def _step(run: Callable[[Tensor], Tensor], block: nn.Module, x_BCHW: Tensor) -> Callable[[], float]:
    """A function that goes forwards and backwards once and returns the seconds."""
    device = x_BCHW.device

    def step() -> float:
        block.zero_grad()
        x_BCHW.grad = None
        synchronise(device)
        started = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16):
            output_BCHW = run(x_BCHW)
        output_BCHW.backward(torch.ones_like(output_BCHW))
        synchronise(device)
        return time.perf_counter() - started

    return step


def experts_command(
    device: Annotated[str, typer.Option(help="auto (CUDA if there is one), cpu, cuda, cuda:N.")] = "auto",
    batch: Annotated[int, typer.Option(min=1, help="Images in a batch.")] = 32,
    channels: Annotated[int, typer.Option(min=1, help="Channels of the block.")] = 64,
    experts: Annotated[int, typer.Option(min=2, help="Experts of the block.")] = 3,
    size: Annotated[int, typer.Option(min=1, help="Height and width in pixels.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds.")] = 5,
    eager: Annotated[bool, typer.Option("--eager", help="Without the compiled forms.")] = False,
    format: Annotated[Literal["text", "json"], typer.Option(help="text or json.")] = "text",
) -> int:
    """Time the forms of an expert block."""
    hows = COMPILERS[:1] if eager else COMPILERS
    speeds = measure(torch_device(device), batch, channels, experts, size, rounds, hows)
    if format == "json":
        print("[" + ",\n".join(speed.model_dump_json() for speed in speeds) + "]")
        return 0
    print(f"{experts} experts of {channels} channels, batch {batch} of {size}x{size}, bf16\n")
    rows = [
        (speed.form, speed.how, f"{speed.median_ms:.2f}", f"{speed.x_loop:.2f}", f"{speed.first_s:.1f}",
         f"{speed.difference:.1e}")
        for speed in speeds
    ]  # fmt: skip
    titles = ("form", "how", "ms", "x loop", "first s", "difference")
    print(tabulate(rows, headers=titles, disable_numparse=True))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 the input is wrong."""
    return command.run(experts_command, arguments)


if __name__ == "__main__":
    sys.exit(main())
