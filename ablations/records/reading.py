"""Reads the JSON files of a study directory. A damaged file is an error that says what to do."""

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from expertgrid.model.system.errors import InputError, invalid, wrong_file
from expertgrid.model.system.files import MissingFile, read_whole
from expertgrid.model.training.trial import Trial

RUN_AGAIN = "delete it and run the study again"

AnyRecord = TypeVar("AnyRecord", bound=BaseModel)


def read_record(kind: type[AnyRecord], file: Path, remedy: str = RUN_AGAIN) -> AnyRecord | None:
    """The record in a JSON file, None where there is no file.

    Raises InputError for a damaged file: which file, what is wrong, and what to do, which is `remedy`.
    """
    try:
        return kind.model_validate_json(read_whole(file))
    except MissingFile:
        return None
    except ValidationError as error:
        raise damaged(file, invalid("", error, kind.model_fields), remedy) from None


def read_config(trial: Path) -> Trial | None:
    """What the trial in this folder is, None where it was never begun. Raises InputError for a damaged config.json."""
    return read_record(Trial, trial / "config.json", train_again(trial))


def damaged(file: Path, problem: object, remedy: str) -> InputError:
    """The error for a damaged file of a study directory."""
    return wrong_file(file, str(problem), f"the file is damaged: {remedy}")


def train_again(trial: Path) -> str:
    """What to do about a damaged file of a trial; `trial` is its folder."""
    return f"delete {trial} and run the study again: this trial is then trained again"
