"""Compilation by block: each expert block and convolution of a network is compiled where it stands.

What is compiled is a part that repeats, not the whole network: equal blocks are compiled once, whichever network of a
study they are in, and the names of the weights stay as they were. What is between the blocks (pooling, dropout, sums,
the head) stays eager, and so does evaluation, whose batches have other sizes: see `ablations.training.loop.predict`.
"""

import copy
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from model.config import Block
from model.fast.wide import WideBlock, joined
from model.net import ConvNormAct, ExpertBlock

# Seconds: of compiling one block and what it needs, of starting the compiler, and saved at each step by each block.
# On CPUs with matrix units: for 64 channels and batches of 128 images of 32x32 pixels.
COSTS = {"cuda": (12.0, 20.0, 0.0003), "amx": (2.0, 16.0, 0.01)}


def device_kind(device: torch.device) -> str:
    """The type of the device, or "amx" for a CPU with matrix units."""
    return "amx" if device.type == "cpu" and torch.cpu._is_amx_tile_supported() else device.type


def earns(blocks: Sequence[Block], steps: int, kind: str) -> bool:
    """Whether compiling the blocks of a network saves more time in `steps` training steps than it takes.

    On CUDA and on CPUs with matrix units (AMX): where steps x blocks x seconds saved is more than the seconds of
    compiling the blocks that differ, by the numbers in `COSTS`. On AMX these were measured: 18 s to compile
    `eight_block` and 24 s for `segmented`, whose blocks differ; each block of theirs, `two_block` and `macro_residual`
    saved 0.04, 0.01, 0.04 and 0.003 s at each step. Blocks with no experts to put side by side do not count there:
    `speed`, which has only such, was slower compiled, at 0.77 of its eager speed.

    On CUDA they are estimates that are meant to err towards eager. On other CPUs never: with bfloat16 in AVX-512,
    blocks compiled as they were before (their experts apart) took 0.88 to 0.94 of the time of eager ones, which
    trainings of minutes did not earn back; blocks of today's form were not measured there.
    """
    if kind == "amx":
        blocks = [block for block in blocks if joined(block)]
    if kind not in COSTS or not blocks:
        return False
    a_block, start, saved = COSTS[kind]
    return steps * len(blocks) * saved > start + a_block * len(set(blocks))


def missing(device: torch.device) -> str | None:
    """What keeps torch.compile from working on the device, None where nothing that can be seen does."""
    if device.type not in ("cpu", "cuda"):
        return f"blocks are compiled on cpu and cuda only, not on {device.type}"
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            return "there is no Triton for this GPU"
        if not any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))):
            return "there is no C compiler, which Triton needs"
        return None
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except RuntimeError:
        return f"there is no C++ compiler ({os.environ.get('CXX', 'g++')})"
    return None


def blocks(net: nn.Module) -> Iterator[nn.Module]:
    """The parts that are compiled: expert blocks, and convolutions outside of them, unless kernels have them.

    A network of timm has none.
    """
    for child in net.children():
        if type(child) in (ExpertBlock, WideBlock, ConvNormAct):
            yield child
        elif not isinstance(child, ExpertBlock | ConvNormAct):
            yield from blocks(child)


def compile_blocks(net: nn.Module, batches: Sequence[Tensor], bfloat16: bool, backend: str = "inductor") -> float:
    """Compiles the blocks of `net` for training on batches (B, C, H, W) like these; returns the seconds that it took.

    They train in the form of `model.fast.wide`, of which the compiler makes more (`python -m bench.experts`: chunk).
    If compiling fails the error is raised and `net` is as it was. Sizes are static: a training has one or two. On CUDA
    this is the default mode, without CUDA graphs of each block's own: `model.fast.cuda_graphs` records the whole step.
    """
    parts = list(blocks(net))
    if not parts:
        return 0.0
    # A limit is there to stop functions that are compiled without end. Here each different block is one, and past the
    # limit they would run eagerly without a word.
    torch._dynamo.config.recompile_limit = 1024
    torch._dynamo.config.accumulated_recompile_limit = 8192

    def compile_all(net: nn.Module) -> None:
        for part in blocks(net):
            if isinstance(part, ExpertBlock) and joined(part.config):
                part.__class__ = WideBlock
            part.compile(dynamic=False, backend=backend)

    return tried(net, compile_all, batches, bfloat16)


def tried(net: nn.Module, change: Callable[[nn.Module], object], batches: Sequence[Tensor], bfloat16: bool) -> float:
    """Changes a copy of `net`, which then runs forwards and backwards on each batch, and then `net`.

    Returns the seconds that it took.

    Compilers work when code first runs. So weights, batch statistics and random state of `net` are not touched, the
    first step of a training has nothing left to compile, and after an error `net` is as it was.
    """
    device = batches[0].device
    started = time.perf_counter()
    trial = copy.deepcopy(net).train()
    change(trial)
    devices = [torch.cuda.current_device() if device.index is None else device.index] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        for x_BCHW in batches:
            with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
                logits_BN = trial(x_BCHW)
            logits_BN.float().logsumexp(1).mean().backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    change(net)
    return time.perf_counter() - started
