"""Study files: TOML, by a path or by the name of a study that ships with the package."""

import os.path
import tomllib
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from expertgrid.ablations.study.changes import named_recipe
from expertgrid.ablations.study.study import Base, Study
from expertgrid.model.system.errors import InputError, invalid, unknown, wrong_file

SHIPPED = Path(__file__).parents[1] / "studies"
LARGEST_FILE = 1_000_000  # bytes of a study file


def shipped_studies() -> list[str]:
    return sorted(path.stem for path in SHIPPED.glob("*.toml"))


def load_study(name: str) -> Study:
    """Reads a shipped study by name, or any other by the path of its TOML file. Raises InputError for a wrong one.

    Recipes that are called by files, beside that file, are read, and are then part of the study.
    """
    path = SHIPPED / f"{name}.toml" if name in shipped_studies() else Path(name)
    if os.path.isdir(path):  # False, other than Path.is_dir, also where a name is too long for a file
        raise InputError(f"study {name}: is a directory; the path of a TOML file is needed")
    if not os.path.isfile(path):
        raise unknown("study", name, shipped_studies(), ", or the path of a TOML file")
    study = read_study(path)
    for name in {study.base.recipe, *map(str, study.factors.get("recipe", []))} - study.recipes.keys():
        if name.endswith(".toml"):
            study.recipes[name] = _fields(_text(path.parent / name), path.parent / name)
            named_recipe(name, study.recipes)
    return study


def read_study(path: Path) -> Study:
    """The study in a TOML file, named as the file is. Raises InputError."""
    return parse_study(_text(path), path)


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise wrong_file(path, f"has {path.stat().st_size:,} bytes; a study file has at most {LARGEST_FILE:,}")
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise wrong_file(path, f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise wrong_file(path, f"not TOML: {error}") from None


def parse_study(text: str, path: Path) -> Study:
    """A study from TOML. `path` names it, and is what errors name. Raises InputError."""
    accepted, fields = sorted(set(Study.model_fields) - {"name"}), _fields(text, path)
    if "name" in fields:
        raise wrong_file(path, unknown("field", "name", accepted))
    try:
        return Study(name=path.stem, **fields)
    except ValidationError as error:
        within_base = error.errors()[0]["loc"][:1] == ("base",)
        raise wrong_file(path, invalid("", error, Base.model_fields if within_base else accepted)) from None


def _fields(text: str, path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: a number of thousands of digits, too
        raise wrong_file(path, f"not TOML: {error}") from None
