"""A network as a certified ONNX file: exported, lowered in precision, and compared with PyTorch on the test images."""

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from expertgrid.export.certificate import BOUNDS, Certificate, Tried
from expertgrid.export.compare import BATCH, compare, onnx_logits, pytorch_logits
from expertgrid.export.metadata import AS_IT_IS, CERTIFICATE, Input, Metadata, Options, Precision, with_entries
from expertgrid.export.precision import lowered
from expertgrid.export.rewrites import REWRITES
from expertgrid.export.session import open_session
from expertgrid.export.to_onnx import LOGITS, as_input, served, to_onnx
from expertgrid.model.checkpoint import Checkpoint
from expertgrid.model.system.files import write_together

CALIBRATION_IMAGES = 512
FOLDED = ("batch_norm", "constant_gate", "temperature")
REWRITE_SETS = {  # from which --tune chooses
    "none": (),
    "folded": FOLDED,
    "kernels": (*FOLDED, "one_kernel"),
    "convolutions": (*FOLDED, "one_kernel", "one_conv"),
    "all": tuple(REWRITES),
}
# Nowhere found slower than the graph as it was trained, so far on an AMD processor with AVX512. The others are, on one
# with AVX2.
DEFAULT_REWRITES = REWRITE_SETS["kernels"]
# Kernels that are mixed for each image are not constants, and would stay in float. Separate int8 convolutions were up
# to 1.6 times as fast as one convolution of all experts with a matrix product after it.
NOT_IN_INT8 = ("one_kernel", "one_conv", "matmul")


@dataclass(frozen=True)
class Images:
    """uint8 pixels (B, H, W, C) and labels (B,) of a network's data."""

    train: np.ndarray  # calibrates int8
    validation: np.ndarray  # decides what stays in float
    validation_labels: np.ndarray
    test: np.ndarray  # certifies
    test_labels: np.ndarray


class Reference:
    """A network in PyTorch, a data set in the form that its exported model takes, and its logits, computed once.

    `pruned` is the threshold of `export.prune.pruned`, where the network was pruned.
    """

    def __init__(self, checkpoint: Checkpoint, images: Images, kind: Input, pruned: float | None = None):
        self.checkpoint, self.images, self.kind, self.pruned = checkpoint, images, kind, pruned
        self.net = served(checkpoint, kind)

    def as_input(self, pixels_BHWC: np.ndarray) -> np.ndarray:
        return as_input(pixels_BHWC, self.checkpoint, self.kind)

    @cached_property
    def validation(self) -> tuple[np.ndarray, np.ndarray]:
        """The validation images, and PyTorch's logits (B, N)."""
        images = self.as_input(self.images.validation)
        return images, pytorch_logits(self.net, images)

    @cached_property
    def test(self) -> tuple[np.ndarray, np.ndarray]:
        """The test images, and PyTorch's logits (B, N)."""
        images = self.as_input(self.images.test)
        return images, pytorch_logits(self.net, images)


class UncertifiedModel(NamedTuple):
    """An ONNX model that was not compared with PyTorch yet."""

    model: bytes
    float_nodes: list[str]  # of a model of lower precision: the nodes that stay in float32


@dataclass(frozen=True)
class CertifiedModel:
    """An ONNX model, and how it compares with PyTorch."""

    model: bytes
    certificate: Certificate
    float_nodes: list[str]  # of a model of lower precision: the nodes that stay in float32

    def write(self, file: Path, card: str = "") -> Path:
        """Writes the model with its certificate and card beside it, and returns where the model is.

        That is `file`, or FILE.rejected.onnx for a model that did not pass. All are written, or none.
        """
        written = file if self.certificate.passed else file.with_suffix(".rejected.onnx")
        contents = {written.with_suffix(".certificate.json"): self.certificate.to_bytes(), written: self.model}
        write_together(contents | ({written.with_suffix(".md"): card.encode()} if card else {}))
        return written


def certified(
    made: UncertifiedModel,
    reference: Reference,
    precision: Precision = "fp32",
    providers: Sequence[str] = ("cpu",),
    runs_on: str = "cpu",
    tuning: Sequence[Tried] = (),
    options: Options = AS_IT_IS,
) -> CertifiedModel:
    """What `rewritten` made, with metadata and certificate, in memory.

    It is compared on all `providers`, and the file names `runs_on` as the one to run it, with `options`. The
    certificate has `tuning`. Raises InputError for a provider that is missing.
    """
    metadata = Metadata(
        input=reference.kind,
        config=reference.checkpoint.config,
        trained=reference.checkpoint.trained,
        precision=precision,
        provider=runs_on,
        options=options,
        pruned=reference.pruned,
    )
    model = with_entries(made.model, metadata.entries())
    images, pytorch_BN = reference.test
    labels_B = reference.images.test_labels
    certificate = compare(model, reference.net, images, labels_B, precision, providers, pytorch_BN, options)
    certificate = certificate.model_copy(update={"tuning": list(tuning)})
    digest = hashlib.sha256(certificate.to_bytes()).hexdigest()
    return CertifiedModel(with_entries(model, {CERTIFICATE: digest}), certificate, made.float_nodes)


def rewritten(
    reference: Reference,
    precision: Precision = "fp32",
    rewrites: Collection[str] = DEFAULT_REWRITES,
    outputs: Collection[str] = (LOGITS,),
) -> UncertifiedModel:
    """The ONNX model of a network in a precision, its graph rewritten for speed.

    What stays in float in a model of lower precision is decided on the validation images, so that the test images judge
    a model that they did not shape. Raises InputError for what cannot be exported, and PrecisionError where no choice
    of layers holds the bound.
    """
    chosen = [name for name in REWRITES if name in rewrites and (precision != "int8" or name not in NOT_IN_INT8)]
    model = to_onnx(reference.checkpoint, reference.kind, chosen, outputs)
    if precision in ("fp32", "bf16"):
        return UncertifiedModel(model, [])
    images, pytorch_BN = reference.validation
    labels_B = reference.images.validation_labels
    pytorch_accuracy = (pytorch_BN.argmax(1) == labels_B).mean()

    def holds(candidate: bytes) -> bool:
        logits_BN = onnx_logits(open_session(candidate, "cpu", "the exported model"), images, BATCH)
        accuracy = (logits_BN.argmax(1) == labels_B).mean()
        return bool(np.isfinite(logits_BN).all() and pytorch_accuracy - accuracy <= BOUNDS[precision].accuracy_loss)

    train = reference.images.train
    calibrating = np.random.default_rng(0).permutation(len(train))[:CALIBRATION_IMAGES]
    return UncertifiedModel(*lowered(model, precision, reference.as_input(train[calibrating]), holds))
