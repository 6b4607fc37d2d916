"""Parts of a training that a user's module registers, for recipes to name. Imports no torch.

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

WORDS = {"loss": "loss", "augment": "augmentation", "sched": "schedule", "opt": "optimiser"}  # by field of the recipe
SHIPPED = {  # timm has the optimisers
    "loss": ("cross_entropy",), "augment": ("",), "sched": ("none", "step", "cosine", "poly", "onecycle"),
}  # fmt: skip

PARTS: dict[str, dict[str, Callable]] = {kind: {} for kind in WORDS}
CODES: dict[str, str] = {}  # hashes of their sources, 12 hexadecimal digits, by kind and name in words


def _register(kind: str, function: Any, taken: Iterable[str] = ()) -> Any:
    name = function.__name__
    if name in (*taken, *SHIPPED.get(kind, ()), *PARTS[kind]) or not name.isidentifier():
        raise InputError(f"{WORDS[kind]} {name!r}: the name is taken, or is none; choose another")
    source = textwrap.dedent(inspect.getsource(function))
    CODES[f"{WORDS[kind]} {name}"] = hashlib.sha256(source.encode()).hexdigest()[:12]
    PARTS[kind][name] = function
    return function


# What the decorated functions take and give. The shares of the classes have smoothing and mixing in them.
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


def timm_name(opt: str) -> str:
    """An optimiser's name in timm's registry: there a `_` ends the name of a wrapper."""
    return opt.lower().replace("_", "-")


def part(kind: str, name: str, shipped: Iterable[str] = ()) -> Callable:
    """The part that is registered under a name. Raises InputError for another, and names those that ship, too."""
    if name not in PARTS[kind]:
        accepted = [name or '""' for name in (*SHIPPED.get(kind, shipped), *PARTS[kind])]
        raise InputError(f"recipe.{kind}: {unknown(WORDS[kind], name, accepted, '; --import MODULE registers others')}")
    return PARTS[kind][name]


def check_names(recipe: BaseModel) -> None:
    """Raises InputError where there is no such loss, augmentation or schedule."""
    for kind, shipped in SHIPPED.items():
        if getattr(recipe, kind) not in shipped:
            part(kind, getattr(recipe, kind))


def codes_of(recipe: BaseModel) -> dict[str, str]:
    """The code of the user's parts that a recipe names, by their kinds and names in words."""
    names = (f"{word} {getattr(recipe, kind)}" for kind, word in WORDS.items())
    return {name: CODES[name] for name in names if name in CODES}


def changed_parts(codes: Mapping[str, str]) -> list[str]:
    """The parts that are registered with other code than this."""
    return [name for name, code in codes.items() if CODES.get(name, code) != code]
