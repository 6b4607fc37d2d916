"""Changes of a network and its recipe: by a variant, by a field of the recipe, or by a dotted path."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from expertgrid.ablations.study.levels import Level
from expertgrid.model.config import DECIDED_ELSEWHERE, Network, TimmModel
from expertgrid.model.system.errors import InputError, all_of, collected, invalid, unknown
from expertgrid.model.training.parts import check_names
from expertgrid.model.training.recipe import RECIPES, Recipe, recipe
from expertgrid.model.variants import VARIANTS, vary

CHOICES = ("model", "recipe", "reference", "weights")  # factors that choose what the others change


def dotted(name: str) -> str:
    """The dotted path that a name stands for; a variant stands for itself, a name that is nothing for ''."""
    if name in VARIANTS or name in CHOICES or "." in name:
        return name
    return f"recipe.{name}" if name in Recipe.model_fields else ""


def quoted(fields: object) -> object:
    """Settings or factors by dotted paths: recipe.lr = 0.1, without quotes, is a table in TOML."""
    if not isinstance(fields, dict):
        return fields
    tables = {name: fields[name] for name in ("model", "recipe") if isinstance(fields.get(name), dict)}
    pairs = [(name, value) for name, value in fields.items() if name not in tables]
    pairs += [(f"{name}.{field}", value) for name, table in tables.items() for field, value in table.items()]
    if twice := [name for name, count in Counter(dotted(name) or name for name, _ in pairs).items() if count > 1]:
        raise ValueError(f"{twice[0]} is given twice")
    return dict(pairs)


def known(fields: dict[str, Any], info: Any) -> dict[str, Any]:
    """Settings by dotted paths, or factors. Refuses names that are nothing, and values that no recipe can have.

    In a study that was run, which has the context "run", an unknown name is a variant of a module that is not here.
    """
    are_factors, was_run, errors = info.field_name == "factors", info.context == "run", []
    accepted = [*VARIANTS, *Recipe.model_fields, *(CHOICES if are_factors else ())]
    for name, levels in fields.items():
        root, _, field = dotted(name).partition(".")
        if name in CHOICES and not are_factors:
            errors.append(InputError(f"{name} is named in [base], or is a factor"))
        elif not root and not (was_run and name.isidentifier()):
            errors.append(unknown("name", name, accepted, ", recipe.FIELD, model.FIELD"))
        for level in (levels if are_factors else [levels]) if root == "recipe" and field and not was_run else ():
            with collected(errors):
                _check_field(field, level)
    if errors:
        raise all_of(errors)
    return fields if are_factors else {dotted(name) or name: value for name, value in fields.items()}


def _check_field(field: str, value: Level) -> None:
    """Raises InputError where a recipe has no such field, or never this value in it."""
    try:
        Recipe.model_validate(dict(RECIPES["fast"]) | {field: value})
    except ValidationError as error:
        if error.errors()[0]["loc"] and "." not in field:  # without a place it is about several fields
            raise invalid("recipe", error, Recipe.model_fields) from None


def changed(config: Network, recipe: Recipe, changes: Mapping[str, Level]) -> tuple[Network, Recipe]:
    """Network and recipe with variants applied, in the order of `VARIANTS`, and then dotted paths set together.

    Raises InputError for a change that does not exist, or does not apply.
    """
    for name in VARIANTS:
        if name in changes:
            config = vary(config, name, changes[name])
    paths: dict[str, dict[str, Level]] = {"model": {}, "recipe": {}}
    for name in (name for name in changes if name not in VARIANTS):
        root, _, path = dotted(name).partition(".")
        if root not in paths:
            raise unknown("path", name, [*VARIANTS, *Recipe.model_fields], ", recipe.FIELD, model.FIELD")
        if root == "model" and path in ("in_chans", "num_classes"):
            raise InputError(f"{name} cannot be set: {DECIDED_ELSEWHERE[path]}")
        paths[root][path] = changes[name]
    return _with_paths(config, "model", paths["model"]), _with_paths(recipe, "recipe", paths["recipe"])


def named_recipe(name: str, own: Mapping[str, Mapping[str, Level]]) -> Recipe:
    """A recipe of `own`, by all its fields or by changes of its `base`, or one that ships. Raises InputError."""
    if name not in own:
        return recipe(name)
    given = dict(own[name])
    base = dict(recipe(str(given.pop("base")))) if "base" in given else {}
    try:
        return Recipe.model_validate(Recipe.without_idle(base | given, given) if base else given)
    except ValidationError as error:
        raise invalid(f"recipe {name}", error, {"base": None, **Recipe.model_fields}) from None


def changed_recipe(name: str, settings: Mapping[str, Level]) -> Recipe:
    """The recipe called `name` with fields set, by their names or dotted paths. Raises InputError."""
    changes = {}
    for path, value in settings.items():
        root, _, field = dotted(path).partition(".")
        if root != "recipe" or not field:
            raise unknown("field of the recipe", path, Recipe.model_fields)
        changes[field] = value
    changed = _with_paths(recipe(name), "recipe", changes)
    check_parts(changed)
    return changed


def _with_paths(spec: BaseModel, root: str, changes: Mapping[str, Level]) -> Any:
    """`spec` with the values at dotted paths replaced, and validated again. Those of a timm model are its arguments."""
    if not changes:
        return spec
    fields = spec.model_dump(mode="json")
    of_timm = isinstance(spec, TimmModel)
    for path, value in changes.items():
        place: Any = fields["arguments"] if of_timm else fields  # an object or a list of the JSON
        at = root
        *parents, last = path.split(".")
        for part in parents:
            if of_timm and isinstance(place, dict):
                place.setdefault(part, {})
            place, at = place[_key(place, at, part)], f"{at}.{part}"
        if of_timm and isinstance(place, dict):
            place[last] = value
        else:
            place[_key(place, at, last)] = value
    if isinstance(spec, Recipe):
        fields = Recipe.without_idle(fields, given=changes)
    try:
        return type(spec).model_validate(fields)
    except ValidationError as error:
        raise invalid(root, error, type(spec).model_fields) from None


def _key(place: object, at: str, part: str) -> str | int:
    """The key that a part of a dotted path stands for in `place`, which is at the path `at`."""
    if not isinstance(place, list | dict):
        raise InputError(f"{at} has no fields; found {at}.{part}")
    keys = {str(i): i for i in range(len(place))} if isinstance(place, list) else {key: key for key in place}
    if part not in keys:
        raise unknown(f"field of {at}:", part, keys)
    return keys[part]


def check_parts(recipe: Recipe) -> None:
    """Raises InputError for a part that does not exist, and an optimiser that the recipe's values do not make.

    An optimiser with the settings of a shipped recipe can be made, which a test sees to. Any other optimiser
    is tried, and that imports torch. It can refuse its name, betas and momentum, and no other value of a recipe.
    """
    check_names(recipe)
    settings, *shipped = ((each.opt, each.opt_betas, each.momentum) for each in (recipe, *RECIPES.values()))
    if settings in shipped:
        return
    from expertgrid.model.training import optimise

    optimise.check_optimizer(recipe)


def check_layers(recipe: Recipe, config: Network) -> None:
    """Raises InputError where `freeze` or `layer_decay` have no effect on the network."""
    if recipe.freeze != "none" or recipe.layer_decay < 1:
        from expertgrid.model.registry import build, for_shapes
        from expertgrid.model.training import optimise

        with for_shapes(config):
            optimise.check_layers(recipe, build(config))
