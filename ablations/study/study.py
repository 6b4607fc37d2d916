"""A study: a question, a base, and the factors to vary; resolved into cells and trials.

A trial is one training run: what it is is wholly in its model config, recipe, data fingerprint and seed, and its id is
a hash of these.
"""

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from expertgrid.ablations.study import changes
from expertgrid.ablations.study.cells import CONTROL_SEEDS, Cell, control_cell, find_cell, groups
from expertgrid.ablations.study.levels import BASE, Level, level_name
from expertgrid.model.config import ModelConfig, Network, TimmModel
from expertgrid.model.cost import check_image_size
from expertgrid.model.presets import network
from expertgrid.model.system.errors import LONGEST_VALUE, InputError, all_of, collected, invalid, unknown
from expertgrid.model.training.data import LARGEST_SIDE, ImageData
from expertgrid.model.training.holdout import HoldOut, Kind
from expertgrid.model.training.metrics import check_defined, scale
from expertgrid.model.training.trial import NO_WEIGHTS, Trial

if TYPE_CHECKING:
    from expertgrid.model.weights import Initial

MOST_TRIALS = 10_000  # of a study


def _number(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("a number is needed")
    return value


def _folder_name(name: str) -> str:
    if name in ("", ".", "..") or set(name) & set("/\\") or not name.isprintable():
        raise ValueError("cannot be the name of a study: a folder is called so")
    return name


def _each_once(levels: object) -> object:
    if isinstance(levels, list) and (twice := [level for i, level in enumerate(levels) if level in levels[:i]]):
        raise ValueError(f"{str(twice[0])[:LONGEST_VALUE]} is given twice")
    return levels


Levels = Annotated[list[Level], BeforeValidator(_each_once), Field(min_length=1)]


class Base(BaseModel):
    """What the factors vary: a preset or timm model, a recipe, a data source, and the weights to start from.

    `image_size` brings all images to so many pixels in height and width. `hold_out` says whether each seed holds out
    its own part of the train images, or all the same.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = "two_block"
    recipe: str = "fast"
    data: str = "digits"
    image_size: int | None = Field(None, ge=1, le=LARGEST_SIDE, strict=True)
    hold_out: Kind = "rotating"
    weights: str = NO_WEIGHTS


class Study(BaseModel):
    """A study as its file says it.

    `factors` and `set` are keyed by a variant of `model.variants.VARIANTS` (`experts`), a field of the recipe
    (`cutout`), or a dotted path (`recipe.lr`, `model.head.dropout`); factors may also be `model`, `recipe`, `weights`,
    or `reference`, a network together with its own recipe. `baselines` are further cells: networks as they are, trained
    by the base's recipe with its changes. `metric` is one of `model.training.metrics.METRICS`: all verdicts are by it.
    `margin` is the difference that matters, in points, or as the metric counts: cells that are surely nearer are the
    same. `contrasts` are pairs of cells that are to be compared, declared before anything is
    trained, by their names or levels (`experts=2`). `control` adds the first cell once more, trained from other seeds
    on the same hold-outs: whatever else a study finds, these two should come out the same. The seeds are `first_seed`
    and those that follow; without a number of them, a directory that is there keeps its own. `reported` is what the
    source of a level claims, shown beside its cell. `recipes` has the user's own, by their names or files.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: Annotated[str, AfterValidator(_folder_name)] = Field(exclude=True)
    question: str
    design: Literal["factorial", "one_at_a_time"] = "factorial"
    seeds: int = Field(5, ge=1, le=1000, strict=True)
    metric: str = "accuracy"
    margin: Annotated[float, BeforeValidator(_number)] = Field(0.5, gt=0, le=100)
    base: Base = Base()
    set: Annotated[dict[str, Level], BeforeValidator(changes.quoted), AfterValidator(changes.known)] = {}
    factors: Annotated[dict[str, Levels], BeforeValidator(changes.quoted), AfterValidator(changes.known)] = {}
    baselines: Annotated[list[str], BeforeValidator(_each_once)] = []
    reported: dict[str, str] = {}
    first_seed: int = Field(0, ge=0, lt=CONTROL_SEEDS, strict=True)
    control: bool = Field(False, strict=True)
    contrasts: list[tuple[str, str]] = []
    recipes: dict[str, dict[str, Level]] = {}

    @model_validator(mode="after")
    def check_names(self) -> "Study":
        """Refuses names that would change the same thing twice, and too many trials."""
        counts = [len(levels) for levels in self.factors.values()]
        cells = math.prod(counts) if self.design == "factorial" else 1 + sum(counts)  # a memory may not hold them
        trials = self.seeds * (cells + len(self.baselines) + self.control)
        if trials > MOST_TRIALS:
            raise ValueError(f"asks for {trials:,} trials; at most {MOST_TRIALS:,}")
        for name, levels in self.factors.items():
            if (changes.dotted(name) or name) in self.set:
                raise ValueError(f"{name} is a factor, with levels {levels}, and is set as well")
        if "reference" in self.factors and {"model", "recipe"} & self.factors.keys():
            raise ValueError("factor reference is a model and a recipe; neither can be a factor beside it")
        levels = {level_name(level) for levels in self.factors.values() for level in levels}
        if self.reported and not levels:
            raise ValueError("reported is of levels, and the study has no factors")
        if wrong := self.reported.keys() - levels:
            raise unknown("level in reported:", sorted(wrong)[0], sorted(levels))
        if "margin" not in self.model_fields_set and not scale(self.metric).points:
            raise ValueError(f"metric {self.metric!r} needs a margin: which difference in it matters")
        return self

    def change(
        self,
        seeds: int | None = None,
        data: str | None = None,
        settings: Mapping[str, Level] = MappingProxyType({}),
        first_seed: int | None = None,
    ) -> "Study":
        """This study with what the command line gives in its place. Raises InputError for what does not fit it."""
        given, settings = settings, {changes.dotted(path) or path: value for path, value in settings.items()}
        if len(settings) < len(given):
            raise InputError(f"--set: one field is set twice: {', '.join(given)}")
        base = None if data is None else self.base.model_dump(exclude_unset=True) | {"data": data}
        new = {"seeds": seeds, "first_seed": first_seed, "base": base, "set": {**self.set, **settings}}
        try:
            return Study.model_validate(dict(self) | {name: value for name, value in new.items() if value is not None})
        except ValidationError as error:
            raise invalid(f"study {self.name}", error, Study.model_fields) from None

    def apart_from(self, older: "Study") -> str:
        """In which field this is not `older` with, at most, more levels and seeds; "" where its trials are among ours.

        Names the first such field, and what it is there and here.
        """
        before, after = older._fixed(), self._fixed()
        for name in before | after:
            old, new = (fields.get(name, "not given") for fields in (before, after))
            if old != new:
                return f"{name} is {old} there, and {new} here"
        if self.factors.keys() != older.factors.keys():
            old, new = (", ".join(study.factors) or "none" for study in (older, self))
            return f"its factors are {old}, and here {new}"
        if more := older.more_than(self):
            return f"it has {more}"
        return f"it has {older.seeds} seeds, and here {self.seeds}" if older.seeds > self.seeds else ""

    def more_than(self, other: "Study") -> str:
        """Which levels or baselines this has and `other`, a study of the same factors, has not; "" for none."""
        pairs = {f"levels of {name}": (levels, other.factors[name]) for name, levels in self.factors.items()}
        for what, (ours, others) in ({"baselines": (self.baselines, other.baselines)} | pairs).items():
            if more := [level_name(level) for level in ours if level not in others]:
                return f"more {what}: {', '.join(more)}"
        return ""

    def _fixed(self) -> dict[str, str]:
        """What stays as it is where a study gets more levels or seeds: JSON by field."""
        names = ("design", "metric", "margin", "first_seed", "control", "contrasts", "recipes")
        fields: dict[str, object] = {name: getattr(self, name) for name in names}
        fields |= {f"base.{name}": value for name, value in self.base}
        fields |= {f"set.{name}": value for name, value in self.set.items()}
        return {name: json.dumps(value) for name, value in fields.items()}

    def unknown_choices(self) -> list[InputError]:
        """The errors for models and recipes that do not exist, whatever the data are."""
        levels_of, errors, named_recipe = self.factors.get, [], partial(changes.named_recipe, own=self.recipes)
        models = self.base.model, *self.baselines, *levels_of("model", ()), *levels_of("reference", ())
        recipes = [(named_recipe, name) for name in (self.base.recipe, *levels_of("recipe", ()))]
        for look_up, name in [*((network, name) for name in models), *recipes]:
            if isinstance(name, str):  # any other is an error of its cell
                with collected(errors):
                    look_up(name)
        return errors

    def settings(self) -> list[dict[str, Level]]:
        """The level of each factor in each cell of the design.

        `factorial` combines all levels of all factors. `one_at_a_time` has the base, and a cell for each level of each
        factor, in which the other factors are as in the base.
        """
        if self.design == "factorial":
            return [dict(zip(self.factors, levels)) for levels in itertools.product(*self.factors.values())]
        base = dict.fromkeys(self.factors, BASE)
        return [base, *({**base, name: level} for name, levels in self.factors.items() for level in levels)]

    def cells(self, data: ImageData, files: dict[str, bytes] | None = None) -> list[Cell]:
        """All cells; those without levels, baselines and the control, come last.

        The files of the weights that they start from are entered in `files`, by fingerprint. Raises InputError for
        what does not exist, is out of range or does not fit.
        """
        hold_out, cells, errors = data.hold_out(self.base.hold_out), [], list[InputError]()
        read = cache(partial(_read_weights, data, {} if files is None else files))

        @cache  # for this call: a user's code may change before the next
        def describe(network: TimmModel) -> TimmModel:
            from expertgrid.model.foreign import described

            return described(network, data.image_size, data.name)

        for levels in self.settings():
            reference = levels.get("reference")
            chosen = (
                _name(kind, next(level for level in (levels.get(kind), other, base) if level is not BASE))
                for kind, other, base in (
                    ("model", reference, self.base.model),
                    ("recipe", reference, self.base.recipe),
                    ("weights", BASE, self.base.weights),
                )
            )
            with collected(errors):
                cells.append(self._cell(data, hold_out, levels, *chosen, self.set, describe, read))
        training = {name: value for name, value in self.set.items() if name.startswith("recipe.")}
        same = self.base.recipe, self.base.weights, training, describe, read
        for name in self.baselines:
            with collected(errors):
                cells.append(self._cell(data, hold_out, {}, name, *same))
        if errors:
            raise all_of(errors)
        if self.control:
            cells.append(control_cell(cells[0]))
        self._check_contrasts(cells)
        self._check_metric(data, hold_out)
        return cells

    @property
    def combined_levels(self) -> dict[str, int]:
        """The number of levels of each factor, where the design combines all of them; else nothing."""
        return {name: len(of) for name, of in self.factors.items()} if self.design == "factorial" else {}

    def _check_metric(self, data: ImageData, hold_out: HoldOut) -> None:
        labels_B, splits = data.train.labels_B, {"the test split": data.test.labels_B}
        if scale(self.metric).name not in ("accuracy", "cross_entropy"):  # which are defined on any images
            few = np.bincount(labels_B).min() < hold_out.parts
            for seed in range(self.first_seed, self.first_seed + (min(self.seeds, hold_out.parts) if few else 1)):
                splits[f"the hold-out of seed {seed}"] = labels_B[hold_out.held_out(labels_B, data.fingerprint, seed)]
            check_defined(self.metric, splits, data.classes)

    def _check_contrasts(self, cells: Sequence[Cell]) -> None:
        networks, seen = groups([cell.planned for cell in cells], self.combined_levels), {}
        for pair in self.contrasts:
            try:
                places = frozenset(find_cell(networks, text) for text in pair)
                if len(places) == 1:
                    raise InputError(f"{pair[0]!r} and {pair[1]!r} are the same cell")
                if seen.setdefault(places, pair) is not pair:
                    first = " and ".join(map(repr, seen[places]))
                    raise InputError(f"{pair[0]!r} and {pair[1]!r} are declared twice, first as {first}")
            except InputError as error:
                raise InputError(f"study {self.name}: contrasts: {error}") from None

    def _cell(
        self,
        data: ImageData,
        hold_out: HoldOut,
        levels: dict[str, Level],
        model: str,
        recipe_name: str,
        weights: str,
        settings: dict[str, Level],
        describe: Callable[[TimmModel], TimmModel],
        read: "Callable[[str, Network], Initial]",
    ) -> Cell:
        fields = {"in_chans": data.channels, "num_classes": len(data.classes)}
        named = network(model)
        config = named.change(**fields) if isinstance(named, ModelConfig) else named.model_copy(update=fields)
        factors = {name: level for name, level in levels.items() if name not in changes.CHOICES and level is not BASE}
        config, training = changes.changed(config, changes.named_recipe(recipe_name, self.recipes), settings)
        config, training = changes.changed(config, training, factors)
        changes.check_parts(training)
        training.check_fits(data, data.trained_on(hold_out))
        sizes = {data.image_size, training.image_size(0, data.image_size)}
        if isinstance(config, TimmModel):
            config = describe(config)
            sizes.remove(data.image_size)
        for size in sizes:
            check_image_size(model, config, size, data.name)
        changes.check_layers(training, config)
        initial = None if weights == NO_WEIGHTS else read(weights, config)
        own = initial and initial.normalisation
        is_given = "recipe.normalise" in map(changes.dotted, [*settings, *factors])
        if own and len(own[0]) == data.channels and not is_given:
            training = training.model_copy(update={"normalise": own} if training.normalise == "data" else {})
        alike: dict[str, Any] = {"model_name": model, "model": config, "recipe": training, "hold_out": hold_out}
        alike |= {"source": data.source, "fingerprint": data.fingerprint, "weights": initial and initial.weights}
        seeds = range(self.first_seed, self.first_seed + self.seeds)
        return Cell(model, levels, tuple(Trial(**alike, seed=seed) for seed in seeds))


def _read_weights(data: ImageData, files: dict[str, bytes], source: str, config: Network) -> "Initial":
    from expertgrid.model.weights import read_weights

    initial = read_weights(source, config, data.classes)
    files[initial.weights.fingerprint] = initial.file
    return initial


def _name(kind: str, level: Level) -> str:
    if not isinstance(level, str):
        raise InputError(f"factor {kind}: level {level!r} is not a name")
    return level
