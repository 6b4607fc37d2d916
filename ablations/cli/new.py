"""A study file to begin with."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jinja2 import Template

from expertgrid.ablations.cli.sources import read_data
from expertgrid.ablations.study.schema import TITLE, study_schema
from expertgrid.ablations.study.study_file import parse_study
from expertgrid.model.config import ModelConfig
from expertgrid.model.presets import network
from expertgrid.model.system.errors import InputError
from expertgrid.model.system.files import write_whole
from expertgrid.model.training.data import ImageData, split_share
from expertgrid.model.training.recipe import recipe

SCHEMA = "study.schema.json"
CIFAR = {"cifar10": 10, "cifar100": 100}  # classes: they are not downloaded for this


def new(file: Path, base: dict[str, Any], modules: Sequence[str]) -> int:
    """Writes a study of this base, once it is sure that its parts go together. Raises InputError."""
    schema_file, source, side = file.with_name(SCHEMA), base["data"], base["image_size"]
    if file.exists():
        raise InputError(f"{file}: is there already; give another name")
    if schema_file.exists() and TITLE not in schema_file.read_text():
        raise InputError(f"{schema_file}: is no schema of expertgrid's; move it, or write {file.name} elsewhere")
    factors: dict[str, list] = {"experts": [1, 2]} if isinstance(network(base["model"]), ModelConfig) else {}
    factors["hflip"] = [0.0, 0.5]
    command = " ".join([file.name, *(f"--import {module}" for module in modules)])
    text = Template(Path(__file__).with_name("new.toml.j2").read_text()).render(
        schema=SCHEMA, command=command, base=base, epochs=recipe(base["recipe"]).epochs, factors=factors
    )
    if classes := CIFAR.get(split_share(source)[0]):
        images = replace(ImageData.random(5_000, side or 32, side or 32, classes), source=source, name=source)
    else:
        images = read_data(source, None, side)
    parse_study(text, file).cells(images)
    for path, content in ((schema_file, study_schema()), (file, text)):
        write_whole(path, content.encode())
        print(path)
    return 0
