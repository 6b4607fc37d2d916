"""Reads the JSON files of a study directory. A damaged file is an error that says what to do."""

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from expertgrid.model.system.errors import InputError, invalid

SUMS = "SHA256SUMS"
TRAINING = "training.json"

AnyRecord = TypeVar("AnyRecord", bound=BaseModel)


def read_record(kind: type[AnyRecord], file: Path) -> AnyRecord | None:
    """The record in a JSON file of a study directory, None where there is no file.

    Raises InputError for a damaged file: which file, what is wrong, and what to do.
    """
    try:
        return kind.model_validate_json(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from None
    except ValidationError as error:
        raise damaged(file, invalid(str(file), error, kind.model_fields)) from None


def damaged(file: Path, error: InputError) -> InputError:
    """The error for a damaged file of a study directory: what is wrong, and what to do."""
    if file.name == SUMS and file.parent.parent.name != "trials":
        remedy = "run the study again"
    elif file.parent.parent.name == "trials":
        remedy = f"delete {file.parent} and run the study again: this trial is then trained again"
    elif file.name == TRAINING:
        remedy = "delete it and run expertgrid bench-train again"
    elif file.parent.name == "bench":
        remedy = "delete it and run expertgrid bench again"
    elif file.name == "ledger.jsonl":
        remedy = "delete the damaged line"
    else:
        remedy = "delete it and run the study again"
    return InputError(f"{error}; the file is damaged: {remedy}")
