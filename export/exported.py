"""The files that were exported to a folder: what they are of, and whether their certificates belong to them."""

from dataclasses import dataclass
from pathlib import Path

from expertgrid.export.certificate import Certificate, certificate_problem
from expertgrid.export.describe import Description, describe, read_onnx
from expertgrid.export.metadata import Metadata, is_expertgrid_file, read_metadata
from expertgrid.model.system.errors import InputError


@dataclass(frozen=True)
class Exported:
    """An ONNX file of a trial, with the certificate beside it, which it passed."""

    file: Path
    description: Description
    metadata: Metadata
    certificate: Certificate

    @property
    def certificate_file(self) -> Path:
        return self.file.with_suffix(".certificate.json")

    @property
    def trial(self) -> str:
        return self.metadata.trained.trial

    @property
    def is_the_network(self) -> bool:
        """Whether it computes what was trained: in fp32, with all experts."""
        return self.metadata.precision == "fp32" and self.metadata.pruned is None


def exported_files(folder: Path) -> list[Exported]:
    """The certified files in a folder: first those that compute what was trained, then by name.

    Files that expertgrid did not write and files that were rejected are left out. Raises InputError for a damaged file,
    and for one that its certificate is not of.
    """
    found = []
    for file in sorted(folder.glob("*.onnx")):
        model = read_onnx(file)
        description = describe(model, file.name)
        if file.name.endswith(".rejected.onnx") or not is_expertgrid_file(description.metadata):
            continue
        if problem := certificate_problem(model, file):
            raise InputError(f"{file}: {problem}; export it again")
        metadata = read_metadata(description.metadata, str(file))
        certificate = Certificate.model_validate_json(file.with_suffix(".certificate.json").read_bytes())
        found.append(Exported(file, description, metadata, certificate))
    return sorted(found, key=lambda exported: not exported.is_the_network)
