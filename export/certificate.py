"""The proof that an exported model is the network that was trained: both run on every test image.

Shapes: B images, N classes.
"""

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import onnx
import onnxruntime
import torch
from pydantic import BaseModel
from torch import nn

from export.session import open_session
from export.to_onnx import INPUT, OUTPUT

BATCHES = (1, 2, 7, 64)
FP32_BOUND = 1e-4


class Agreement(BaseModel):
    """How one batch size of ONNX Runtime compares with PyTorch over all images."""

    batch: int
    largest_difference: float  # of two logits
    mean_difference: float
    argmax_flips: list[int]  # the images, by their number in the test split
    accuracy: float  # of ONNX Runtime


class Certificate(BaseModel):
    """What was compared, how far the two are apart, and the bound that was applied."""

    passed: bool
    bound: float  # on the difference of two logits; argmax flips must be none
    provider: str
    images: int
    pytorch_accuracy: float
    agreements: list[Agreement]
    sha256: str  # of the ONNX file
    opset: int
    versions: dict[str, str]

    def __str__(self) -> str:
        worst = max(self.agreements, key=lambda agreement: agreement.largest_difference)
        flips = sum(len(agreement.argmax_flips) for agreement in self.agreements)
        sizes = ", ".join(str(agreement.batch) for agreement in self.agreements)
        verdict = "equal to PyTorch" if self.passed else "NOT equal to PyTorch"
        return (
            f"{verdict} on {self.images:,} test images at batch sizes {sizes} ({self.provider}): largest logit "
            f"difference {worst.largest_difference:.1e} (bound {self.bound:.0e}), {flips} argmax flips"
        )


def certify(
    model: bytes,
    net: nn.Module,
    images: np.ndarray,
    labels_B: np.ndarray,
    provider: str = "cpu",
    batches: Sequence[int] = BATCHES,
    bound: float = FP32_BOUND,
) -> Certificate:
    """Runs `model` in ONNX Runtime, and `net` in PyTorch, on all `images`, in the form that both take.

    PyTorch computes in fp32 on the CPU. Raises InputError where the provider is not there.
    """
    session = open_session(model, provider, "the exported model")
    with torch.inference_mode():
        pytorch_BN = np.concatenate([net(torch.from_numpy(part)).numpy() for part in _batches(images, 64)])
    agreements = []
    for batch in batches:
        onnx_BN = np.concatenate([session.run([OUTPUT], {INPUT: part})[0] for part in _batches(images, batch)])
        agreements.append(_compare(batch, onnx_BN, pytorch_BN, labels_B))
    opsets = {opset.domain: opset.version for opset in onnx.load_from_string(model).opset_import}
    return Certificate(
        passed=all(a.largest_difference <= bound and not a.argmax_flips for a in agreements),
        bound=bound,
        provider=provider,
        images=len(images),
        pytorch_accuracy=float((pytorch_BN.argmax(1) == labels_B).mean()),
        agreements=agreements,
        sha256=hashlib.sha256(model).hexdigest(),
        opset=opsets[""],
        versions={"torch": torch.__version__, "onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__},
    )


def _batches(images: np.ndarray, batch: int) -> Iterator[np.ndarray]:
    return (images[i : i + batch] for i in range(0, len(images), batch))


def _compare(batch: int, onnx_BN: np.ndarray, pytorch_BN: np.ndarray, labels_B: np.ndarray) -> Agreement:
    difference_BN = np.abs(onnx_BN.astype(np.float64) - pytorch_BN)
    classes_B = onnx_BN.argmax(1)
    return Agreement(
        batch=batch,
        largest_difference=float(np.nan_to_num(difference_BN, nan=np.inf).max()),
        mean_difference=float(difference_BN.mean()),
        argmax_flips=np.flatnonzero(classes_B != pytorch_BN.argmax(1)).tolist(),
        accuracy=float((classes_B == labels_B).mean()),
    )
