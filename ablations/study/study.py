"""A study: a question, a base, and the factors to vary; resolved into cells and trials.

Studies are TOML files; those in `studies/` ship with the package. A trial is one training run: what it is is wholly in
its model config, recipe, data fingerprint and seed, and its id is a hash of these.
"""

import itertools
import json
import math
import os.path
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from expertgrid.ablations.study.cells import CellName, find_cell, groups
from expertgrid.model.config import ModelConfig, Network
from expertgrid.model.fit import check_fit
from expertgrid.model.presets import network
from expertgrid.model.system.errors import InputError, invalid, unknown
from expertgrid.model.training.data import LARGEST_SIDE, ImageData
from expertgrid.model.training.holdout import HoldOut, Kind
from expertgrid.model.training.recipe import RECIPES, Recipe, recipe
from expertgrid.model.training.trial import Trial
from expertgrid.model.variants import VARIANTS, vary

SHIPPED = Path(__file__).parents[1] / "studies"
CHOICES = ("model", "recipe", "reference")  # factors that choose what the others change
BASE = None  # the level of a factor that a cell leaves as it is in the base
CONTROL_SEEDS = 1_000_000  # by so many the seeds of the control cell are higher than those of the others

LARGEST_FILE = 1_000_000  # bytes of a study file
MOST_TRIALS = 10_000  # of a study
DEEPEST_LEVEL = 10  # lists and tables in one another, in a level
LARGEST_NUMBER = 2**63 - 1


def _is_json(value: object, depth: int = 0) -> bool:
    """Whether a level can be kept: JSON with finite numbers, of which none is huge."""
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


def _number(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("a number is needed")
    return value


def _folder_name(name: str) -> str:
    if name in ("", ".", "..") or set(name) & set("/\\") or not name.isprintable():
        raise ValueError("cannot be the name of a study: a folder is called so")
    return name


def _listed(levels: object) -> object:
    if isinstance(levels, list) and any(level in levels[:i] for i, level in enumerate(levels)):
        raise ValueError("a level is given twice")
    return levels


class Base(BaseModel):
    """What the factors vary: a preset or timm model, a recipe, and a data source.

    `image_size` brings all images to so many pixels in height and width. `hold_out` says whether each seed holds out
    its own part of the train images, or all the same.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = "two_block"
    recipe: str = "fast"
    data: str = "digits"
    image_size: int | None = Field(None, ge=1, le=LARGEST_SIDE, strict=True)
    hold_out: Kind = "rotating"


class Study(BaseModel):
    """A study as its file says it.

    `factors` and `set` are keyed by a variant of `model.variants.VARIANTS` (`experts`), a field of the recipe
    (`cutout`), or a dotted path (`recipe.lr`, `model.head.dropout`); factors may also be `model`, `recipe`, or
    `reference`, a network together with its own recipe. `baselines` are further cells: networks as they are, trained by
    the base's recipe with its changes. `margin` is the difference that matters, in points of accuracy: cells that are
    surely nearer are the same. `contrasts` are pairs of cells that are to be compared, declared before anything is
    trained, by their names or levels (`experts=2`). `control` adds the first cell once more, trained from other seeds
    on the same hold-outs: whatever else a study finds, these two should come out the same. The seeds are `first_seed`
    and those that follow. `reported` is what the source of a level claims, shown beside its cell.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: Annotated[str, AfterValidator(_folder_name)] = Field(exclude=True)
    question: str
    design: Literal["factorial", "one_at_a_time"] = "factorial"
    seeds: int = Field(3, ge=1, le=1000, strict=True)
    margin: Annotated[float, BeforeValidator(_number)] = Field(0.5, gt=0, le=100)
    base: Base = Base()
    set: dict[str, Level] = {}
    factors: dict[str, Annotated[list[Level], BeforeValidator(_listed), Field(min_length=1)]] = {}
    baselines: list[str] = []
    reported: dict[str, str] = {}
    first_seed: int = Field(0, ge=0, lt=CONTROL_SEEDS, strict=True)
    control: bool = Field(False, strict=True)
    contrasts: list[tuple[str, str]] = []

    def change(
        self,
        seeds: int | None = None,
        data: str | None = None,
        settings: Mapping[str, Level] = MappingProxyType({}),
        first_seed: int | None = None,
    ) -> "Study":
        """This study with what the command line gives in its place. Raises InputError for what does not fit it."""
        settings = {_dotted(path) or path: value for path, value in settings.items()}
        fields: dict[str, Any] = {**dict(self), "set": {**self.set, **settings}}
        fields |= {} if seeds is None else {"seeds": seeds}
        fields |= {} if first_seed is None else {"first_seed": first_seed}
        fields |= {} if data is None else {"base": {**dict(self.base), "data": data}}
        try:
            study = Study(**fields)
        except ValidationError as error:
            raise invalid(f"study {self.name}", error, Study.model_fields) from None
        _check_names(study, f"study {self.name}")
        return study

    def apart_from(self, older: "Study") -> str:
        """In which field this is not `older` with, at most, more levels and seeds; "" where its trials are among ours.

        Names the first such field, and what it is there and here.
        """
        fields = [
            {
                "design": one.design,
                "margin": one.margin,
                "first_seed": one.first_seed,
                "control": one.control,
                "contrasts": one.contrasts,
            }
            | {f"base.{name}": value for name, value in one.base}
            | {f"set.{name}": value for name, value in one.set.items()}
            for one in (older, self)
        ]
        for name in {**fields[0], **fields[1]}:
            there, here = (json.dumps(given[name]) if name in given else "not given" for given in fields)
            if there != here:
                return f"{name} is {there} there, and {here} here"
        if self.factors.keys() != older.factors.keys():
            there, here = (", ".join(study.factors) or "none" for study in (older, self))
            return f"its factors are {there}, and here {here}"
        for name, levels in older.factors.items():
            if lacking := [level for level in levels if level not in self.factors[name]]:
                return f"its factor {name} has the level {level_name(lacking[0])} too"
        if lacking := [name for name in older.baselines if name not in self.baselines]:
            return f"it has the baseline {lacking[0]} too"
        return f"it has {older.seeds} seeds, and here {self.seeds}" if older.seeds > self.seeds else ""

    def settings(self) -> list[dict[str, Level]]:
        """The level of each factor in each cell of the design."""
        if self.design == "factorial":
            return [dict(zip(self.factors, levels)) for levels in itertools.product(*self.factors.values())]
        base = dict.fromkeys(self.factors, BASE)
        return [base, *({**base, name: level} for name, levels in self.factors.items() for level in levels)]

    def cells(self, data: ImageData) -> list["Cell"]:
        """All cells; those without levels, baselines and the control, come last.

        Raises InputError for what does not exist, is out of range or does not fit.
        """
        hold_out, cells = data.hold_out(self.base.hold_out), []
        for levels in self.settings():
            reference = levels.get("reference")
            model, recipe_name = (
                _name(kind, next(level for level in (levels.get(kind), reference, base) if level is not BASE))
                for kind, base in (("model", self.base.model), ("recipe", self.base.recipe))
            )
            cells.append(self._cell(data, hold_out, levels, model, recipe_name, self.set))
        training = {name: value for name, value in self.set.items() if name.startswith("recipe.")}
        cells += [self._cell(data, hold_out, {}, name, self.base.recipe, training) for name in self.baselines]
        if self.control:
            cells.append(_control(cells[0]))
        self._check_contrasts(cells)
        return cells

    def names(self, cells: Sequence["Cell"]) -> list[CellName]:
        return [
            CellName(
                cell.model_name,
                {name: level_name(level) for name, level in cell.levels.items()},
                cell.trials[0].id,
                cell.control,
            )
            for cell in cells
        ]

    @property
    def combined_levels(self) -> dict[str, int]:
        """The number of levels of each factor, where the design combines all of them; else nothing."""
        return {name: len(of) for name, of in self.factors.items()} if self.design == "factorial" else {}

    def _check_contrasts(self, cells: Sequence["Cell"]) -> None:
        networks, seen = groups(self.names(cells), self.combined_levels), {}
        for pair in self.contrasts:
            try:
                places = frozenset(find_cell(networks, text) for text in pair)
            except InputError as error:
                raise InputError(f"study {self.name}: contrasts: {error}") from None
            if len(places) == 1:
                raise InputError(f"study {self.name}: contrasts: {pair[0]!r} and {pair[1]!r} are the same cell")
            if places in seen:
                first, second = seen[places]
                raise InputError(
                    f"study {self.name}: contrasts: {pair[0]!r} and {pair[1]!r} are declared twice, first as "
                    f"{first!r} and {second!r}"
                )
            seen[places] = pair

    def _cell(
        self,
        data: ImageData,
        hold_out: HoldOut,
        levels: dict[str, Level],
        model: str,
        recipe_name: str,
        settings: dict[str, Level],
    ) -> "Cell":
        fields = {"in_chans": data.channels, "num_classes": len(data.classes)}
        named = network(model)
        config = named.change(**fields) if isinstance(named, ModelConfig) else named.model_copy(update=fields)
        factors = {name: level for name, level in levels.items() if name not in CHOICES and level is not BASE}
        parts = _changed(*_changed(config, recipe(recipe_name), settings), factors)
        _check_optimizer(parts[1])
        parts[1].check_fits(data, data.trained_on(hold_out))
        for size in dict.fromkeys((data.image_size, parts[1].image_size(0, data.image_size))):
            check_fit(model, parts[0], data.channels, size, data.name)
        trials = tuple(
            Trial(
                model_name=model,
                model=parts[0],
                recipe=parts[1],
                source=data.source,
                fingerprint=data.fingerprint,
                hold_out=hold_out,
                seed=seed,
            )
            for seed in range(self.first_seed, self.first_seed + self.seeds)
        )
        return Cell(model, levels, trials)


@dataclass(frozen=True)
class Cell:
    """One combination of levels, and its trials: one for each seed. Baselines and the control have no levels."""

    model_name: str
    levels: dict[str, Level]
    trials: tuple[Trial, ...]
    control: bool = False


def _name(kind: str, level: Level) -> str:
    if not isinstance(level, str):
        raise InputError(f"factor {kind}: level {level!r} is not a name")
    return level


def _control(base: Cell) -> Cell:
    """The base once more: trained from other seeds, on the same hold-outs."""
    hold_out = base.trials[0].hold_out.model_copy(update={"offset": CONTROL_SEEDS})
    trials = []
    for trial in base.trials:
        fields: dict[str, Any] = {name: getattr(trial, name) for name in Trial.model_fields}
        fields |= {"seed": trial.seed + CONTROL_SEEDS, "hold_out": hold_out}
        trials.append(Trial(**fields))
    return Cell(base.model_name, {}, tuple(trials), control=True)


def shipped_studies() -> list[str]:
    return sorted(path.stem for path in SHIPPED.glob("*.toml"))


def load_study(name: str) -> Study:
    """Reads a shipped study by name, or any other by the path of its TOML file. Raises InputError for a wrong one."""
    path = SHIPPED / f"{name}.toml" if name in shipped_studies() else Path(name)
    if os.path.isdir(path):  # False, other than Path.is_dir, also where a name is too long for a file
        raise InputError(f"study {name}: is a directory; the path of a TOML file is needed")
    if not os.path.isfile(path):
        raise unknown("study", name, shipped_studies(), ", or the path of a TOML file")
    return read_study(path)


def read_study(path: Path) -> Study:
    """The study in a TOML file, named as the file is."""
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise InputError(f"{path}: has {path.stat().st_size:,} bytes; a study file has at most {LARGEST_FILE:,}")
        return parse_study(path.read_text(encoding="utf-8-sig"), path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not TOML: {error}") from None


def parse_study(text: str, path: Path) -> Study:
    """A study from TOML. `path` names it, and is what errors name."""
    accepted = sorted(set(Study.model_fields) - {"name"})
    try:
        fields = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: a number of thousands of digits, too
        raise InputError(f"{path}: not TOML: {error}") from None
    try:
        if "name" in fields:
            raise unknown(f"field of {path}:", "name", accepted)
        if isinstance(fields.get("set"), dict):
            fields["set"] = _with_dotted_keys(fields["set"], str(path))
        study = Study(name=path.stem, **fields)
    except ValidationError as error:
        within_base = error.errors()[0]["loc"][0] == "base"
        raise invalid(str(path), error, Base.model_fields if within_base else accepted) from None
    _check_names(study, str(path))
    return study


def _with_dotted_keys(settings: dict[str, Level], where: str) -> dict[str, Level]:
    """Settings keyed by dotted paths and variants, whichever way they were written."""
    pairs: list[tuple[str, Level]] = []
    for name, value in settings.items():
        if name in ("model", "recipe") and isinstance(value, dict):  # recipe.lr = 0.1, without quotes, is a table
            pairs += [(f"{name}.{field}", inner) for field, inner in value.items()]
        else:
            pairs.append((_dotted(name) or name, value))
    for name, count in Counter(name for name, _ in pairs).items():
        if count > 1:
            raise InputError(f"{where}: {name} is set twice")
    return dict(pairs)


def _check_names(study: Study, where: str) -> None:
    """Raises InputError for names that are nothing, for those that would change the same thing twice, and for a study
    of too many trials.
    """
    counts = [len(levels) for levels in study.factors.values()]
    cells = math.prod(counts) if study.design == "factorial" else 1 + sum(counts)
    trials = study.seeds * (cells + len(study.baselines) + study.control)
    if trials > MOST_TRIALS:
        raise InputError(f"{where}: asks for {trials:,} trials; at most {MOST_TRIALS:,}")
    for name in itertools.chain(study.set, study.factors):
        if name in study.set and name in ("model", "recipe"):
            raise InputError(f"{where}: {name} is set in [base], or is a factor")
        if _dotted(name) == "" or (name in study.set and name in CHOICES):
            accepted = [*VARIANTS, *Recipe.model_fields, *(() if name in study.set else CHOICES)]
            raise unknown(f"name in {where}:", name, accepted, ", recipe.FIELD, model.FIELD")
    factors = [_dotted(name) for name in study.factors]
    for name, dotted in zip(study.factors, factors):
        if dotted in study.set:
            raise InputError(f"{where}: {name} is a factor, with levels {study.factors[name]}, and is set as well")
        if factors.count(dotted) > 1:
            raise InputError(f"{where}: {name} is given twice among the factors")
    if "reference" in study.factors and {"model", "recipe"} & study.factors.keys():
        raise InputError(f"{where}: factor reference is a model and a recipe; neither can be a factor beside it")
    levels = {level_name(level) for levels in study.factors.values() for level in levels}
    if study.reported and not levels:
        raise InputError(f"{where}: reported is of levels, and the study has no factors")
    if wrong := study.reported.keys() - levels:
        raise unknown(f"level in {where}, reported:", sorted(wrong)[0], sorted(levels))


def level_name(level: Level) -> str:
    """A level as tables show it and as a TOML file has it."""
    return "base" if level is BASE else level if isinstance(level, str) else json.dumps(level)


def _dotted(name: str) -> str:
    """The dotted path that a name stands for; a variant stands for itself, a name that is nothing for ''."""
    if name in VARIANTS or name in CHOICES or "." in name:
        return name
    return f"recipe.{name}" if name in Recipe.model_fields else ""


def _changed(config: Network, recipe: Recipe, changes: Mapping[str, Level]) -> tuple[Network, Recipe]:
    """Network and recipe with variants applied, in the order of `VARIANTS`, and then dotted paths set together."""
    for name in VARIANTS:
        if name in changes:
            if not isinstance(config, ModelConfig):
                raise InputError(
                    f"factor {name} does not apply to timm model {config.timm!r}; `baselines` takes such models"
                )
            config = vary(config, name, changes[name])
    paths: dict[str, dict[str, Level]] = {"model": {}, "recipe": {}}
    for name in (name for name in changes if name not in VARIANTS):
        root, _, path = _dotted(name).partition(".")
        if root not in paths:
            raise unknown("path", name, [*VARIANTS, *Recipe.model_fields], ", recipe.FIELD, model.FIELD")
        if root == "model" and path in ("in_chans", "num_classes"):
            raise InputError(f"{name} follows from the data and cannot be set")
        paths[root][path] = changes[name]
    return _with_paths(config, "model", paths["model"]), _with_paths(recipe, "recipe", paths["recipe"])


def _with_paths(spec: BaseModel, root: str, changes: dict[str, Level]) -> Any:
    """`spec` with the values at dotted paths replaced, and validated again."""
    if not changes:
        return spec
    fields = spec.model_dump(mode="json")
    for path, value in changes.items():
        place: Any = fields  # an object or a list of the JSON
        at = root
        *parents, last = path.split(".")
        for part in parents:
            place, at = place[_key(place, at, part)], f"{at}.{part}"
        place[_key(place, at, last)] = value
    if isinstance(spec, Recipe):
        fields = Recipe.without_idle(fields, given=changes)
    try:
        return type(spec).model_validate(fields)
    except ValidationError as error:
        raise invalid(root, error, type(spec).model_fields) from None


def changed_recipe(name: str, settings: Mapping[str, Level]) -> Recipe:
    """The recipe called `name` with fields set, by their names or dotted paths. Raises InputError."""
    dotted = {_dotted(path) or path: value for path, value in settings.items()}
    for path in dotted:
        if not path.startswith("recipe."):
            raise unknown("field of the recipe", path, Recipe.model_fields)
    changed = _with_paths(
        recipe(name), "recipe", {path.removeprefix("recipe."): value for path, value in dotted.items()}
    )
    _check_optimizer(changed)
    return changed


def _key(place: object, at: str, part: str) -> str | int:
    """The key that a part of a dotted path stands for in `place`, which is at the path `at`."""
    if not isinstance(place, list | dict):
        raise InputError(f"{at} has no fields; found {at}.{part}")
    keys = {str(i): i for i in range(len(place))} if isinstance(place, list) else {key: key for key in place}
    if part not in keys:
        raise unknown(f"field of {at}:", part, keys)
    return keys[part]


def _check_optimizer(recipe: Recipe) -> None:
    """Raises InputError where the optimiser cannot be made from the recipe's values.

    An optimiser with the settings of a shipped recipe can be made, which a test sees to. Any other optimiser
    is tried, and that imports torch.
    """
    if _optimizer_settings(recipe) in map(_optimizer_settings, RECIPES.values()):
        return
    from expertgrid.model.training.optimise import check_optimizer

    check_optimizer(recipe)


def _optimizer_settings(recipe: Recipe) -> tuple[str, tuple[float, float] | None, float | None]:
    """What an optimiser can refuse: its name, betas and momentum. No optimiser refuses another value of a recipe."""
    return recipe.opt, recipe.opt_betas, recipe.momentum
