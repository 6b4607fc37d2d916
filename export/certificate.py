"""The certificate of an exported model: how it compares with the network that was trained, and which file it is of."""

import hashlib
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from expertgrid.export.metadata import Precision, without_certificate
from expertgrid.model.system.errors import wrong_file
from expertgrid.model.system.files import MissingFile, read_whole

AGAIN = "export it again"
CHANCE = 0.01  # McNemar's p-value, below which a loss of accuracy on a sample of images is not by chance


class Bound(BaseModel):
    """What a model may differ by from PyTorch's fp32; None is not bounded."""

    logit_difference: float | None  # the largest, of two logits
    argmax_flips: int | None
    accuracy_loss: float | None  # as a share of the images


HALF_A_POINT = Bound(logit_difference=None, argmax_flips=None, accuracy_loss=0.005)
BOUNDS = {
    "fp32": Bound(logit_difference=1e-4, argmax_flips=0, accuracy_loss=None),
    **dict.fromkeys(("fp16", "int8", "bf16"), HALF_A_POINT),
}


class Agreement(BaseModel):
    """How one batch size of ONNX Runtime on one provider compares with PyTorch on the same images."""

    model_config = ConfigDict(ser_json_inf_nan="constants")

    provider: str
    batch: int
    images: int
    sampled: bool  # not all of them
    largest_difference: float  # of two logits
    mean_difference: float
    argmax_flips: list[int]  # the images, by their number in the test split
    accuracy: float  # of ONNX Runtime
    pytorch_accuracy: float
    mcnemar_p: float  # of both being right equally often, exact

    def within(self, bound: Bound) -> bool:
        """Whether the bound is held. On a sample, a larger loss of accuracy counts only if it is not by chance."""
        by_chance = self.sampled and self.mcnemar_p >= CHANCE
        limits = (
            (self.largest_difference, bound.logit_difference),
            (len(self.argmax_flips), bound.argmax_flips),
            (self.pytorch_accuracy - self.accuracy, None if by_chance else bound.accuracy_loss),
        )
        return np.isfinite(self.largest_difference) and all(most is None or value <= most for value, most in limits)


class Tried(BaseModel):
    """A way to serve the network that was timed for `expertgrid export --tune`."""

    rewrites: str  # a name of `export.certify.REWRITE_SETS`
    precision: Precision
    provider: str
    options: str = ""  # of the engine; "" for its own way
    batch: int
    p50_ms: float | None = None
    interval_ms: tuple[float, float] | None = None
    outcome: str  # "chosen", "slower", or why it was not taken

    def __str__(self) -> str:
        return " ".join(filter(None, [self.provider, self.precision, self.rewrites, self.options]))


class Certificate(BaseModel):
    """What was compared, how far the two are apart, and the bound that was applied."""

    passed: bool
    precision: Precision
    bound: Bound
    images: int  # of the test split
    pytorch_accuracy: float  # on all of them
    agreements: Annotated[list[Agreement], Field(min_length=1)]
    first_divergence: str  # the first layer whose output differs, where the bound was missed
    sha256: str  # of the ONNX file before the certificate's own hash was put into it
    opset: int
    versions: dict[str, str]
    tuning: list[Tried] = []  # what was timed, and what became of it

    def to_bytes(self) -> bytes:
        """The content of its file."""
        return self.model_dump_json(indent=1).encode()

    def __str__(self) -> str:
        worst = max(self.agreements, key=lambda agreement: agreement.largest_difference)
        flips = max(len(agreement.argmax_flips) for agreement in self.agreements)
        whole = {str(agreement.batch): agreement for agreement in self.agreements if not agreement.sampled}
        sampled = {str(agreement.batch): agreement for agreement in self.agreements if agreement.sampled}
        sizes = f"at batch size{'s' * (len(whole) > 1)} {', '.join(whole)}"
        if sampled:
            sizes += f" (and on {next(iter(sampled.values())).images:,} of them at {', '.join(sampled)})"
        providers = ", ".join(dict.fromkeys(agreement.provider for agreement in self.agreements))
        lowest = min((whole or sampled).values(), key=lambda agreement: agreement.accuracy)
        verdict = "agrees" if self.passed else f"DOES NOT agree (from {self.first_divergence} on)"
        return (
            f"{self.precision} {verdict} with PyTorch on {self.images:,} test images {sizes}, "
            f"on {providers}: largest logit difference {worst.largest_difference:.1e}, at most {flips} argmax flips, "
            f"accuracy {100 * lowest.accuracy:.2f}% against {100 * self.pytorch_accuracy:.2f}%, "
            f"McNemar p {lowest.mcnemar_p:.2g}"
        )


def read_certificate(model: bytes, file: Path) -> Certificate:
    """The certificate beside an exported file, whose content is `model`.

    The file names the SHA-256 of its certificate, and the certificate that of the file, as it was before that name was
    entered. Raises InputError where the certificate is missing or damaged, and where the two do not belong together.
    """
    beside = file.with_suffix(".certificate.json")
    try:
        content = read_whole(beside)
        certificate = Certificate.model_validate_json(content)
    except MissingFile:
        raise wrong_file(file, "has no certificate", AGAIN) from None
    except ValidationError:
        raise wrong_file(file, f"its certificate {beside.name} is damaged", AGAIN) from None
    certified, digest = without_certificate(model)
    if digest != hashlib.sha256(content).hexdigest():
        raise wrong_file(file, f"was certified by another certificate than {beside.name}", AGAIN)
    if hashlib.sha256(certified).hexdigest() != certificate.sha256:
        raise wrong_file(file, f"is not the file that {beside.name} is of", AGAIN)
    return certificate
