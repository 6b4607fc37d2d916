"""torch.compile of a network for training: whole, or on CUDA what the fused kernels leave of it.

The names of the weights stay as they are. Evaluation, whose batches have other sizes, is eager: see
`model.training.loop.predict`.
"""

import copy
import os
import shutil
import statistics
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from expertgrid.model.fast.products import mixed_precision
from expertgrid.model.net import ConvNormAct, ExpertBlock, ExpertNet

LEAST_STEPS = 1000  # of a training that is measured: a shorter one would notice the steps of the measurement
COMPILER_S, LAYER_S = 16.0, 0.6  # to start the compiler, and to compile a layer that has weights
SHARE = 0.05  # of a training's time that compiling may take
FASTER = 1.05  # times as fast as eager ones compiled steps are at least, where they are chosen
ROUNDS = 5
DIFFERENCE = 0.1  # of the outputs' log-sum, relative, that the compiled network may have from the eager one

Change = Callable[[nn.Module], object]


def is_faster(net: nn.Module, change: Change, batches: Sequence[Tensor], bfloat16: bool, steps: int) -> bool:
    """Whether `change`, which compiles a network, makes a training of so many steps faster, as measured on copies.

    The network is compiled only where that takes a twentieth of an eager training, by an estimate of both. Then
    passes on the first batch are timed in turns. Raises RuntimeError where the compiled network computes otherwise.

    On two cores of an AMD EPYC (bfloat16, torch 2.15) compiled passes were 1.43 times as fast as eager ones for
    `two_block`, 1.14 for `eight_block`, 1.06 for `segmented`, 0.99 to 1.01 for `macro_residual`, `mixed_kernel` and
    `accuracy`, and 0.92 for `speed`. Blocks and convolutions that were compiled one by one gained less.
    """
    eager = copy.deepcopy(net).train()
    compile_s = COMPILER_S + LAYER_S * sum(bool(module._parameters) for module in net.modules())
    with _own_random(batches[0].device):
        for _ in range(2):  # the first pass is slower than the later ones
            if SHARE * steps * _pass(eager, batches[0], bfloat16)[0] < compile_s:
                return False
        compiled = copy.deepcopy(eager)
        change(compiled)
        outputs = [_pass(model, batches[0], bfloat16)[1] for model in (eager, compiled)]
        if not abs(outputs[1] - outputs[0]) <= DIFFERENCE * abs(outputs[0]):
            raise RuntimeError("its outputs have the log-sum {:.4g} when it is eager, {:.4g} compiled".format(*outputs))
        times = [[_pass(model, batches[0], bfloat16)[0] for model in (eager, compiled)] for _ in range(ROUNDS)]
    eager_s, compiled_s = map(statistics.median, zip(*times))
    return compiled_s * FASTER < eager_s


def why_unavailable(device: torch.device) -> str | None:
    """The reason why torch.compile cannot work on the device; None where no reason is found."""
    if device.type not in ("cpu", "cuda"):
        return f"networks are compiled on cpu and cuda only, not on {device.type}"
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


def compile_without_limit() -> None:
    """From now on PyTorch compiles one function as often as it is asked, or raises an error.

    By default it runs a function eagerly that it was asked to compile more than eight times, in a log's words only.
    Each batch size and each different block is one more compilation of the same function.
    """
    config = torch._dynamo.config  # ty: its options have no types, only first values
    config.recompile_limit = 1024  # ty: ignore[invalid-assignment]
    config.accumulated_recompile_limit = 8192  # ty: ignore[invalid-assignment]
    config.fail_on_recompile_limit_hit = True  # ty: ignore[invalid-assignment]


def compile_net(
    net: nn.Module, batches: Sequence[Tensor], bfloat16: bool, backend: str = "inductor", steps: int | None = None
) -> float:
    """Compiles `net` for training on batches (B, C, H, W) like these.

    With `steps`, the steps of the training, it does so only where `is_faster`. Returns the seconds that it took, 0
    where `net` stays as it is. If compilation fails, the error is raised and `net` is unchanged.

    Shapes are static: a training has one or two. On CUDA the parts of expert networks that have no fused kernels are
    compiled one by one, and have no CUDA graphs of their own: `model.fast.cuda_graphs` records the whole step.
    """
    started = time.perf_counter()
    in_parts = isinstance(net, ExpertNet) and batches[0].device.type == "cuda"
    if in_parts and not unfused(net):
        return 0.0
    compile_without_limit()

    def compile_all(net: nn.Module) -> None:
        for part in unfused(net) if in_parts else [net]:
            part.compile(dynamic=False, backend=backend)

    if steps is not None and not is_faster(net, compile_all, batches, bfloat16, steps):
        return 0.0
    apply_tested(net, compile_all, batches, bfloat16)
    return time.perf_counter() - started


def blocks_and_convs(net: nn.Module) -> Iterator[nn.Module]:
    """Expert blocks, and convolutions outside of them, whether they have fused kernels or not."""
    for child in net.children():
        if isinstance(child, ExpertBlock | ConvNormAct):
            yield child
        else:
            yield from blocks_and_convs(child)


def unfused(net: nn.Module) -> list[nn.Module]:
    """The blocks and convolutions of `net` that have no fused kernels."""
    return [part for part in blocks_and_convs(net) if type(part) in (ExpertBlock, ConvNormAct)]


def apply_tested(net: nn.Module, change: Change, batches: Sequence[Tensor], bfloat16: bool) -> float:
    """Applies `change` to `net`, after a test on a copy: a forward and a backward pass on each batch (B, C, H, W).

    Compilers work when code first runs. With the test, the first step of a training has nothing left to compile. The
    weights, batch statistics and random state of `net` do not change, and after an error `net` is as it was. Returns
    the seconds that it took.
    """
    started = time.perf_counter()
    trial = copy.deepcopy(net).train()
    change(trial)
    with _own_random(batches[0].device):
        for x_BCHW in batches:
            _pass(trial, x_BCHW, bfloat16)
    change(net)
    return time.perf_counter() - started


def _pass(net: nn.Module, x_BCHW: Tensor, bfloat16: bool) -> tuple[float, float]:
    """The seconds of a forward and a backward pass, and the mean log-sum-exp of the outputs."""
    device, started = x_BCHW.device, time.perf_counter()
    with mixed_precision(device, bfloat16):
        logits_BN = net(x_BCHW)
    mean = logits_BN.float().logsumexp(1).mean()
    mean.backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started, mean.item()


@contextmanager
def _own_random(device: torch.device) -> Generator[None]:
    """Random numbers that are drawn within are not missing afterwards."""
    devices = [torch.cuda.current_device() if device.index is None else device.index] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        yield
