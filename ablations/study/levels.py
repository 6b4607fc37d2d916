"""The levels of a factor: what a value in a study file may be, and how it is shown."""

import json
import math
from typing import Annotated

from pydantic import BeforeValidator

BASE = None  # the level of a factor that a cell leaves as it is in the base
DEEPEST_LEVEL = 10  # lists and tables in one another, in a level
LARGEST_NUMBER = 2**63 - 1


def _is_json(value: object, depth: int = 0) -> bool:
    """Whether a level can be written: JSON with finite numbers, of which none is huge."""
    if depth > DEEPEST_LEVEL:
        return False
    if isinstance(value, list):
        return all(_is_json(inner, depth + 1) for inner in value)
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_json(inner, depth + 1) for key, inner in value.items())
    if isinstance(value, int):
        return abs(value) <= LARGEST_NUMBER
    return value is None or isinstance(value, str) or (isinstance(value, float) and math.isfinite(value))


def _level(value: object) -> object:
    if not _is_json(value):
        raise ValueError(
            "a finite number, text, true, false, a list or a table is needed, whole numbers of 64 bits, and at most "
            f"{DEEPEST_LEVEL} lists and tables in one another"
        )
    return value


Level = Annotated[bool | int | float | str | list | dict | None, BeforeValidator(_level)]


def level_name(level: Level) -> str:
    """A level as tables show it and as a TOML file has it."""
    return "base" if level is BASE else level if isinstance(level, str) else json.dumps(level)
