"""The files that were exported to a folder: what they are of, and whether their certificates belong to them."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from expertgrid.export.certificate import Certificate, read_certificate
from expertgrid.export.describe import Description, describe, read_onnx
from expertgrid.export.metadata import Metadata, is_expertgrid_file, read_metadata
from expertgrid.model.system.errors import InputError


@dataclass(frozen=True)
class ExportedFile:
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


def exported_files(folder: Path) -> list[ExportedFile]:
    """The certified files in a folder: first those that compute what was trained, then by name.

    Files that expertgrid did not write and files that were rejected are left out. Raises InputError for a damaged file,
    and for one that its certificate is not of.
    """
    files = []
    for file in sorted(folder.glob("*.onnx")):
        model = read_onnx(file)
        description = describe(model, file.name)
        if is_expertgrid_file(description.metadata) and (certificate := read_certificate(model, file)).passed:
            files.append(ExportedFile(file, description, read_metadata(description.metadata, str(file)), certificate))
    return sorted(files, key=lambda exported: not exported.is_the_network)


def export_problems(folder: Path) -> Iterator[tuple[Path, str]]:
    """Each ONNX file in a folder, and each certificate without one, with what is wrong; "" where nothing is."""
    for file in sorted(folder.glob("*.onnx")):
        try:
            read_certificate(read_onnx(file), file)
            yield file, ""
        except InputError as error:
            yield file, error.problem
    for file in sorted(folder.glob("*.certificate.json")):
        if not file.with_name(file.name.replace(".certificate.json", ".onnx")).exists():
            yield file, "its ONNX file is missing"
