"""What a device can do at most, measured: its rate of matrix products, and of copying memory."""

import time
from collections.abc import Callable

import torch
from pydantic import BaseModel

from model.machine import computes_bfloat16

MEASURE_S = 0.3
SIZES = {"cuda": 8192}  # of square matrices
SIZE = 2048
SMALL = 256
COPY_BYTES = {"cuda": 2**30}
SOME_BYTES = 2**27


class Peaks(BaseModel):
    """Rates of one device, each of the fastest of some calls: a disturbance makes calls slower, never faster.

    A multiply-accumulate counts as two operations, a copied byte as two: one read, one written.
    """

    bf16_flops: float  # operations a second
    fp32_flops: float
    copy_bytes_per_s: float


def measure_peaks(device: torch.device, measure_s: float = MEASURE_S, size: int | None = None) -> Peaks:
    """The peaks of `device`, in about three times `measure_s` seconds, of square matrices of that size.

    Those in bfloat16 are small where the device has no instructions for it: one of `SIZE` would take a minute.
    """
    usual = size or SIZES.get(device.type, SIZE)

    def flops(dtype: torch.dtype) -> float:
        side = usual if dtype == torch.float32 or computes_bfloat16(device) else min(usual, SMALL)
        a_NN, b_NN = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        out_NN = torch.empty_like(a_NN)
        return 2 * side**3 / fastest(lambda: torch.mm(a_NN, b_NN, out=out_NN), device, measure_s)

    size_bytes = COPY_BYTES.get(device.type, SOME_BYTES)
    source = torch.randint(256, (size_bytes,), dtype=torch.uint8, device=device)  # a GPU may compress zeros
    target = torch.zeros_like(source)
    copied = 2 * len(source) / fastest(lambda: target.copy_(source), device, measure_s)
    return Peaks(bf16_flops=flops(torch.bfloat16), fp32_flops=flops(torch.float32), copy_bytes_per_s=copied)


def fastest(run: Callable[[], object], device: torch.device, measure_s: float) -> float:
    """Seconds of the fastest of at least three calls, after one that is not counted."""
    run()
    times: list[float] = []
    while len(times) < 3 or sum(times) < measure_s:
        synchronise(device)
        started = time.perf_counter()
        run()
        synchronise(device)
        times.append(time.perf_counter() - started)
    return min(times)


def synchronise(device: torch.device) -> None:
    """Waits until all work queued on `device` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
