"""Parts of a training that a user's module registers, for recipes and studies to name. Imports no torch.

A part is called as its function or class is. Records have the hash of its own source: code that it calls is not seen.
"""

import hashlib
import inspect
import textwrap
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from pydantic import BaseModel

from expertgrid.model.system.errors import InputError, unknown
from expertgrid.model.training.metrics import METRICS, Metric

SHIPPED = {  # by the field of the recipe; timm has the optimisers
    "loss": ("cross_entropy",), "augment": ("",), "sched": ("none", "step", "cosine", "poly", "onecycle"),
}  # fmt: skip
PARTS: dict[str, dict[str, Callable]] = {kind: {} for kind in (*SHIPPED, "opt", "metric")}
CODES: dict[str, str] = {}  # by kind and name: the hash of the source, 12 hexadecimal digits


def _register(kind: str, function: Any, taken: Iterable[str] = ()) -> Any:
    name = function.__name__
    if name in (*taken, *SHIPPED.get(kind, ()), *PARTS[kind]) or not name.isidentifier():
        raise InputError(f"{kind} {name!r}: the name is taken, or is none; choose another")
    source = textwrap.dedent(inspect.getsource(function))
    CODES[f"{kind} {name}"] = hashlib.sha256(source.encode()).hexdigest()[:12]
    PARTS[kind][name] = function
    return function


# Decorators, with what the functions take and give. The shares of the classes have smoothing and mixing in them.
register_loss = partial(_register, "loss")  # logits (B, N), shares (B, N) and weights of images (B); a scalar
register_augmentation = partial(_register, "augment")  # normalised images (B, C, H, W), torch.Generator; new images
register_schedule = partial(_register, "sched")  # the step, from 0, and the number of steps; a factor of the rate


def register_optimizer(function: Any) -> Any:
    """Of a class like those of `torch.optim`, which takes lr and weight_decay, or a function that makes one."""
    import timm.optim._optim_factory as timm  # the registry has no public name

    name, takes = timm_name(function.__name__), inspect.signature(function).parameters
    _register("opt", function, [function.__name__] * (name in timm.list_optimizers()))
    info = timm.OptimInfo(name, function, "", "eps" in takes, "momentum" in takes, "betas" in takes)
    timm.default_registry.register(info)
    return function


def register_metric(higher_is_better: bool = True) -> Callable[[Any], Any]:
    """Of a function of numpy arrays, classes (B,) and log-probabilities (B, N), to a number."""

    def register(function: Any) -> Any:
        _register("metric", function, METRICS)
        METRICS[function.__name__] = Metric(function, higher_is_better, unit="plain")
        return function

    return register


def timm_name(opt: str) -> str:
    """An optimiser's name in timm's registry: there a `_` ends the name of a wrapper."""
    return opt.lower().replace("_", "-")


def part(kind: str, name: str, shipped: Iterable[str] = ()) -> Callable:
    """The part that is registered under a name. Raises InputError for another, and names those that ship, too."""
    if name in PARTS[kind]:
        return PARTS[kind][name]
    accepted = [name or '""' for name in (*SHIPPED.get(kind, shipped), *PARTS[kind])]
    raise InputError(f"recipe.{kind}: {unknown('name', name, accepted, '; --import MODULE registers others')}")


def check_names(recipe: BaseModel) -> None:
    """Raises InputError where there is no such loss, augmentation or schedule."""
    for kind, shipped in SHIPPED.items():
        if getattr(recipe, kind) not in shipped:
            part(kind, getattr(recipe, kind))


def codes_of(recipe: BaseModel) -> dict[str, str]:
    """The code of the parts that a training by a recipe uses, by kind and name; all metrics are used."""
    used = (f"{kind} {name}" for kind, names in PARTS.items() for name in names if getattr(recipe, kind, name) == name)
    return {name: CODES[name] for name in used}


def changed_parts(codes: Mapping[str, str], now: Mapping[str, str] = CODES) -> list[str]:
    """The parts that have other code `now`, or as they are registered."""
    return [name for name, code in codes.items() if now.get(name, code) != code]
