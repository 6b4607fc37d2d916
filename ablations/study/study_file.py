"""Study files: TOML, by a path or by the name of a study that ships with the package."""

import os.path
import tomllib
from glob import escape, glob
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from expertgrid.ablations.study.changes import named_recipe
from expertgrid.ablations.study.study import Study
from expertgrid.model.system.errors import InputError, invalid, unknown, wrong_file
from expertgrid.model.system.files import read_whole

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
        files = glob(f"{escape(str(path.parent))}/*.toml")  # none, other than Path.glob, where a name is too long
        raise unknown("study", name, [*shipped_studies(), *files], ", or the path of a TOML file")
    study = read_study(path)
    for name in {study.base.recipe, *map(str, study.factors.get("recipe", []))} - study.recipes.keys():
        if name.endswith(".toml"):
            file = path.parent / name
            study.recipes[name] = _fields(read_whole(file, LARGEST_FILE), file)
            named_recipe(name, study.recipes)
    return study


def read_study(path: Path, was_run: bool = False) -> Study:
    """The study in a TOML file, named as the file is, or one that `was_run`. Raises InputError."""
    return parse_study(read_whole(path, LARGEST_FILE), path, was_run)


def parse_study(content: bytes | str, path: Path, was_run: bool = False) -> Study:
    """A study from TOML. `path` names it, and is what errors name. Raises InputError."""
    accepted, fields = {name: of for name, of in Study.model_fields.items() if name != "name"}, _fields(content, path)
    if "name" in fields:
        raise wrong_file(path, unknown("field", "name", accepted))
    try:
        return Study.model_validate({"name": path.stem, **fields}, context="run" if was_run else None)
    except ValidationError as error:
        raise wrong_file(path, invalid("", error, accepted)) from None


def _fields(content: bytes | str, path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(content if isinstance(content, str) else content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # ValueError: no UTF-8, or a number of thousands of digits, too
        raise wrong_file(path, f"not TOML: {error}") from None
