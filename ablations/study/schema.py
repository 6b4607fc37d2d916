"""The JSON Schema of study files, by which editors complete and check them. Imports no torch."""

import json
from typing import Any

from expertgrid.ablations.study.changes import CHOICES
from expertgrid.ablations.study.study import Study
from expertgrid.model.presets import PRESETS
from expertgrid.model.training.data import SOURCES
from expertgrid.model.training.parts import SHIPPED
from expertgrid.model.training.recipe import RECIPES, Recipe
from expertgrid.model.variants import VARIANTS

TITLE = "A study of expertgrid"


def study_schema() -> str:
    """As JSON: the fields of `Study` and `Base`, with the names of presets, recipes, variants and a recipe's fields."""
    schema: dict[str, Any] = Study.model_json_schema() | {"title": TITLE}
    fields, base = schema["properties"], schema["$defs"]["Base"]["properties"]
    del fields["name"]
    schema["required"].remove("name")
    of_recipe = Recipe.model_json_schema()["properties"] | {"color_jitter": {}}  # a number, or several
    for name, known in SHIPPED.items():
        of_recipe[name]["anyOf"] = [{"enum": list(known)}, {"type": "string"}]
    values = dict.fromkeys(VARIANTS, {}) | of_recipe | {f"recipe.{name}": of for name, of in of_recipe.items()}
    levels = {name: {"type": "array", "items": of, "minItems": 1} for name, of in values.items()}
    choices = {name: {"type": "array", "items": {"type": "string"}, "minItems": 1} for name in CHOICES}
    tables = {"recipe": {"type": "object", "properties": of_recipe}, "model": {"type": "object"}}
    others = {"patternProperties": {r"^model\.": {}}, "additionalProperties": False}
    fields["set"] |= {"properties": values | tables} | others
    fields["factors"] |= {"properties": levels | choices} | others
    base["recipe"]["anyOf"] = [{"enum": list(RECIPES)}, {"type": "string", "pattern": r"\.toml$"}]
    for name, known in (("model", PRESETS), ("data", [source for source in SOURCES if source.islower()])):
        base[name]["anyOf"] = [{"enum": list(known)}, {"type": "string"}]
    return json.dumps(schema, indent=1)
