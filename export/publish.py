"""Publishing a network: export, lower the precision, certify, and only then write the file under its name."""

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx
import torch
from pydantic import ValidationError
from torch import Tensor

from export.certificate import BOUNDS, PYTORCH_BATCH, Certificate, Precision, certify, onnx_logits, pytorch_logits
from export.fuse import REWRITES, gate_weights, prune_gates
from export.precision import lowered
from export.session import open_session
from export.to_onnx import LOGITS, Input, as_input, served, to_onnx
from model.checkpoint import Checkpoint
from model.errors import InputError
from model.net import ExpertNet

CALIBRATION_IMAGES = 512
CERTIFICATE = "expertgrid.certificate"  # the SHA-256 of its file, in the model's metadata
# Kernels that are mixed for each image are no constants, and would stay in float; and int8 convolutions apart were up
# to 1.6 times as fast as one of all experts with a matrix product after it.
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

    `pruned` is the threshold of `pruned`, where the network is what that left.
    """

    def __init__(self, checkpoint: Checkpoint, images: Images, kind: Input, pruned: float | None = None):
        self.checkpoint, self.images, self.kind, self.pruned = checkpoint, images, kind, pruned
        self.net = served(checkpoint, kind)

    def as_input(self, pixels_BHWC: np.ndarray) -> np.ndarray:
        return as_input(pixels_BHWC, self.checkpoint, self.kind)

    @cached_property
    def validation(self) -> tuple[np.ndarray, np.ndarray]:
        """The validation images, and PyTorch's logits (B, N)."""
        validation = self.as_input(self.images.validation)
        return validation, pytorch_logits(self.net, validation)

    @cached_property
    def test(self) -> tuple[np.ndarray, np.ndarray]:
        """The test images, and PyTorch's logits (B, N)."""
        test = self.as_input(self.images.test)
        return test, pytorch_logits(self.net, test)


@dataclass(frozen=True)
class Published:
    """An exported file, and how it compares with PyTorch."""

    model: bytes
    certificate: Certificate
    kept_in_float: list[str]  # nodes of a model of lower precision


def publish(
    reference: Reference,
    precision: Precision = "fp32",
    fused: bool = True,
    outputs: Collection[str] = (LOGITS,),
    providers: Sequence[str] = ("cpu",),
) -> Published:
    """The ONNX model of a network with its certificate, in memory.

    What stays in float in a model of lower precision is decided on the validation images, so that the test images judge
    a model that they did not shape. Raises InputError for what cannot be exported, and PrecisionError where no choice
    of layers holds the bound.
    """
    rewrites = REWRITES if precision != "int8" else [name for name in REWRITES if name not in NOT_IN_INT8]
    model, kept = to_onnx(reference.checkpoint, reference.kind, rewrites if fused else (), outputs), []
    if precision != "fp32":
        model, kept = _lowered(model, reference, precision)
    pruned = {} if reference.pruned is None else {"expertgrid.pruned": f"{reference.pruned:g}"}
    model = with_metadata(model, {"expertgrid.precision": precision, **pruned})
    test, pytorch_BN = reference.test
    labels_B = reference.images.test_labels
    certificate = certify(model, reference.net, test, labels_B, precision, providers, pytorch_BN=pytorch_BN)
    about = {CERTIFICATE: hashlib.sha256(certificate.to_bytes()).hexdigest()}
    return Published(with_metadata(model, about), certificate, kept)


def _lowered(model: bytes, reference: Reference, precision: Precision) -> tuple[bytes, list[str]]:
    validation, pytorch_BN = reference.validation
    labels_B = reference.images.validation_labels
    wanted = (pytorch_BN.argmax(1) == labels_B).mean()

    def holds(candidate: bytes) -> bool:
        logits_BN = onnx_logits(open_session(candidate, "cpu", "the exported model"), validation, PYTORCH_BATCH)
        accuracy = (logits_BN.argmax(1) == labels_B).mean()
        return bool(np.isfinite(logits_BN).all() and wanted - accuracy <= BOUNDS[precision].accuracy_loss)

    rng = np.random.default_rng(0)
    train = reference.images.train
    chosen = rng.permutation(len(train))[:CALIBRATION_IMAGES]
    return lowered(model, precision, reference.as_input(train[chosen]), holds)


def with_metadata(model: bytes, about: dict[str, str]) -> bytes:
    """The model with more metadata; what it has stays."""
    proto = onnx.load_from_string(model)
    onnx.helper.set_model_props(proto, {prop.key: prop.value for prop in proto.metadata_props} | about)
    return proto.SerializeToString()


def unfit(model: bytes, file: Path) -> str:
    """What keeps an exported file and the certificate beside it from being of each other; "" where nothing does."""
    beside = file.with_suffix(".certificate.json")
    try:
        content = beside.read_bytes()
        certificate = Certificate.model_validate_json(content)
    except FileNotFoundError:
        return f"{file.name} has no certificate"
    except ValidationError:
        return f"{beside.name} is damaged"
    proto = onnx.load_from_string(model)
    named = {prop.key: prop.value for prop in proto.metadata_props}
    if named.pop(CERTIFICATE, "") != hashlib.sha256(content).hexdigest():
        return f"{file.name} was certified by another certificate than {beside.name}"
    del proto.metadata_props[:]
    onnx.helper.set_model_props(proto, named)
    if hashlib.sha256(proto.SerializeToString()).hexdigest() != certificate.sha256:
        return f"{file.name} is not the file that {beside.name} is of"
    return ""


def pruned(checkpoint: Checkpoint, images: Images, threshold: float) -> tuple[Checkpoint, str]:
    """The checkpoint without experts whose weight is under `threshold` on every validation image, and what it cost.

    This changes the function. What it says: the experts that were dropped, and the validation accuracy before and
    after, in percent. Raises InputError for a network that has no experts.
    """
    before = checkpoint.network()
    if not isinstance(before, ExpertNet):
        raise InputError(f"--prune-gates: {checkpoint.trained.model} has no experts")
    validation = as_input(images.validation, checkpoint, "float")
    largest: dict[str, Tensor] = {}
    for i in range(0, len(validation), PYTORCH_BATCH):
        for block, gate_BK in gate_weights(before, torch.from_numpy(validation[i : i + PYTORCH_BATCH])).items():
            seen_K = gate_BK.max(0).values
            largest[block] = torch.maximum(largest.get(block, seen_K), seen_K)
    after, dropped = prune_gates(before, largest, threshold)
    accuracies = [
        100 * (pytorch_logits(net, validation).argmax(1) == images.validation_labels).mean() for net in (before, after)
    ]
    return (
        Checkpoint(after.config, checkpoint.trained, after.state_dict()),
        f"pruned {len(dropped)} experts ({', '.join(dropped) or 'none'}): validation accuracy {accuracies[0]:.2f}% "
        f"before, {accuracies[1]:.2f}% after",
    )
