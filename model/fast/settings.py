"""PyTorch's settings of the whole process, in which networks train, are evaluated and are timed."""

from collections.abc import Generator
from contextlib import contextmanager

import torch

from expertgrid.model.fast.memory import keep_freed_memory


def set_for_training() -> None:
    """Convolutions in TF32 where they are not in bfloat16, cuDNN's fastest kernels, and freed memory that is kept.

    What is timed is timed in these settings too. Batches have one size or two, for which cuDNN times its kernels; which
    is the fastest differs from run to run, so it does not where PyTorch is to compute the same bits again.
    """
    _set_precision("tf32")
    torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()
    keep_freed_memory()


def _set_precision(precision: str) -> None:
    """Sets the precision of fp32 convolutions on CUDA, "tf32" or "ieee". Matrix products are always in full fp32.

    These networks spend their time in convolutions. With TF32 matrix products torch.compile would fail, because it
    still reads the settings by PyTorch's older names.
    """
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    # PyTorch declares no types for these two.
    torch.backends.cudnn.conv.fp32_precision = precision  # ty: ignore[missing-attribute]
    torch.backends.cudnn.rnn.fp32_precision = precision  # ty: ignore[missing-attribute]  # PyTorch's older name for both needs equal values


@contextmanager
def full_fp32() -> Generator[None]:
    """Within, convolutions are in full fp32; afterwards in TF32 again."""
    _set_precision("ieee")
    try:
        yield
    finally:
        _set_precision("tf32")


@contextmanager
def untuned() -> Generator[None]:
    """Within, cuDNN chooses kernels by rule. Timing them takes seconds, more than evaluation would gain."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
