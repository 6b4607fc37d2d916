"""The files of measured pieces, and one file with all that travels from one machine to the next."""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from model.errors import InputError, invalid
from model.files import write_whole

HEAVY = (".safetensors", ".pt", ".onnx", ".npy", ".lock", ".lock.json")  # files that stay where they are


class Measured(BaseModel):
    """A step of a piece: what was measured, when and where (of the piece's environments)."""

    complete: bool
    finished: str
    seconds: float
    environment: int
    value: Any


class Piece(BaseModel):
    """A piece's file."""

    piece: str
    smoke: bool
    data: str  # the source's name, as a table calls it
    command: str
    done: bool = False
    environments: list[dict[str, Any]] = []
    steps: dict[str, Measured] = {}
    failed: dict[str, str] = {}  # the steps that failed, with their reasons; they are tried again after all others
    left_out: dict[str, str] = {}  # those that need what does not work on the device


def read_piece(file: Path) -> Piece | None:
    """A piece's file, None where there is no such file. Raises InputError for a damaged one."""
    try:
        return Piece.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise invalid(str(file), error, Piece.model_fields) from None


def write_piece(file: Path, piece: Piece) -> None:
    write_whole(file, piece.model_dump_json(indent=1).encode())


def keep(out: Path, file: Path) -> None:
    """Writes all results below `out` into one file, without weights and other large files."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz", compresslevel=1) as tar:
        for path in _light(out):
            tar.add(path, path.relative_to(out), recursive=False)
    write_whole(file, content.getvalue())


def _light(out: Path) -> Iterator[Path]:
    for path in sorted(out.rglob("*")):
        if path.is_file() and not path.name.endswith(HEAVY):
            yield path


def bring_back(file: Path, out: Path) -> None:
    """Unpacks what `keep` wrote, where there is such a file; what is in `out` already stays. Raises InputError."""
    if not file.exists():
        return
    try:
        with tarfile.open(file) as tar:
            for member in tar:
                if not (out / member.name).exists():
                    tar.extract(member, out, filter="data")
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise InputError(f"{file}: incomplete or damaged: {error}; give an older one, or none") from None
