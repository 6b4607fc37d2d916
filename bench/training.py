"""Training throughput: what the training loop adds to the forward pass, the backward pass and the optimiser's step."""

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from pydantic import BaseModel
from torch import Tensor, nn
from torch.optim import Optimizer


class TrainingSpeed(BaseModel):
    """Images a second of the training loop and of the bare loop, each the median of `rounds`, and their raw seconds."""

    model: str
    device: str
    batch: int
    steps: int  # in a round
    rounds: int
    images_per_s: float
    bare_images_per_s: float
    overhead_percent: float  # median over the rounds of loop / bare - 1
    loop_s: list[float]
    bare_s: list[float]


def bare_round(net: nn.Module, optimizer: Optimizer, x_BCHW: Tensor, y_B: Tensor, steps: int, bfloat16: bool) -> float:
    """Seconds of `steps` times forward, backward and step on one batch that is ready on the device."""
    _synchronise(x_BCHW.device)
    started = time.perf_counter()
    for _ in range(steps):
        with torch.autocast(x_BCHW.device.type, torch.bfloat16, enabled=bfloat16):
            loss = F.cross_entropy(net(x_BCHW), y_B)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    _synchronise(x_BCHW.device)
    return time.perf_counter() - started


def compare(
    model: str, device: str, batch: int, steps: int, rounds: int, loop: Callable[[], float], bare: Callable[[], float]
) -> TrainingSpeed:
    """Lets `loop` and `bare` take turns, one round of `steps` each, after a warm-up of each that is not counted.

    Both return the seconds that their round took.
    """
    loop(), bare()
    loop_s, bare_s = [], []
    for i in range(rounds):
        for run, times in ((loop, loop_s), (bare, bare_s))[:: 1 if i % 2 else -1]:
            times.append(run())
    images = batch * steps
    return TrainingSpeed(
        model=model,
        device=device,
        batch=batch,
        steps=steps,
        rounds=rounds,
        images_per_s=images / statistics.median(loop_s),
        bare_images_per_s=images / statistics.median(bare_s),
        overhead_percent=100 * (statistics.median(a / b for a, b in zip(loop_s, bare_s)) - 1),
        loop_s=loop_s,
        bare_s=bare_s,
    )


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
