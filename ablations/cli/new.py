"""A study file to begin with, and the schema of study files."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from expertgrid.ablations.cli.options import write_out
from expertgrid.ablations.cli.sources import read_data
from expertgrid.ablations.study.schema import TITLE, study_schema
from expertgrid.ablations.study.study_file import parse_study
from expertgrid.model.config import ModelConfig
from expertgrid.model.presets import network
from expertgrid.model.system.errors import InputError
from expertgrid.model.training.data import ImageData, split_share
from expertgrid.model.training.recipe import recipe

SCHEMA = "study.schema.json"
CIFAR = {"cifar10": 10, "cifar100": 100}  # classes: they are not downloaded for this
TEXT = """\
#:schema ./{schema}
# expertgrid run {command} --dry-run shows the cells, their cost, and what differences this study can see.
question = {question}
design = "factorial"  # all combinations; or "one_at_a_time": the base, and one change each
seeds = 5  # trainings of each cell, each of which holds out another tenth of the train images
margin = 0.5  # points of accuracy: cells that are surely nearer are the same

[base]
{base}
[set]  # changes to the base: fields of the recipe, and variants of the network
"recipe.epochs" = {epochs}

[factors]  # what is varied: fields of the recipe, and variants of the network
{factors}"""


def new(file: Path, base: dict[str, Any], modules: Sequence[str]) -> int:
    """Writes a study of this base, once it is sure that its parts go together. Raises InputError."""
    schema_file, name, training = file.with_name(SCHEMA), base["model"], recipe(base["recipe"])
    if file.exists():
        raise InputError(f"{file}: is there already; give another name")
    if schema_file.exists() and f'"title": "{TITLE}"' not in schema_file.read_text():
        raise InputError(f"{schema_file}: is no schema of expertgrid's; move it, or write {file.name} elsewhere")
    levels: dict[str, list] = {"experts": [1, 2]} if isinstance(network(name), ModelConfig) else {}
    levels["hflip"] = [0.0, 0.5]
    text = TEXT.format(
        schema=SCHEMA,
        command=" ".join([file.name, *(f"--import {module}" for module in modules)]),
        question=json.dumps(
            f"What is the effect of {' and '.join(levels)} on {name}, trained on {base['data']}?", ensure_ascii=False
        ),
        base="".join(f"{field} = {json.dumps(value, ensure_ascii=False)}\n" for field, value in base.items() if value),
        epochs=training.epochs,
        factors="".join(f"{factor} = {json.dumps(of)}\n" for factor, of in levels.items()),
    )
    parse_study(text, file).cells(_images(base["data"], base["image_size"]))
    for path, content in ((schema_file, schema_text()), (file, text)):
        write_out("FILE", path, content.encode())
        print(path)
    return 0


def schema_text() -> str:
    return json.dumps(study_schema(), indent=1)


def _images(source: str, image_size: int | None) -> ImageData:
    """The images of a source; in place of CIFAR's, random ones of their form."""
    classes = CIFAR.get(split_share(source)[0])
    if classes is None:
        return read_data(source, None, image_size)
    return replace(ImageData.random(5_000, image_size or 32, image_size or 32, classes), source=source, name=source)
