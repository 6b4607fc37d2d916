"""The files of measured pieces."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from model.errors import invalid


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


def read_piece(file: Path) -> Piece | None:
    """A piece's file, None where there is no such file. Raises InputError for a damaged one."""
    try:
        return Piece.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise invalid(str(file), error, Piece.model_fields) from None
