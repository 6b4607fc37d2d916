"""What an ablation changes: pure functions from a network to a network.

Each takes a `ModelConfig` and a level and returns the changed config. They map over all layers, so that each applies
to each preset; where a level is what the network has already, the result equals the input. `VARIANTS` lists them in
the order in which a study applies several.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from itertools import cycle, groupby, islice, product
from types import FunctionType
from typing import Any

from pydantic import ValidationError

from expertgrid.model.config import WIDEST, Block, Conv, GateConfig, Layer, ModelConfig, Network, Residual, TimmModel
from expertgrid.model.cost import cost
from expertgrid.model.system.errors import InputError, invalid, reason_of

GATES = {
    "linear": GateConfig(kind="linear"),
    "mlp": GateConfig(kind="mlp", reduction=4),
    "uniform": GateConfig(kind="uniform"),
    "constant": GateConfig(kind="constant"),
}

OWN_GATE = {"own": {}, "frozen": {"frozen": True}, "shuffled": {"shuffled": True}}
IMAGE = 32, 32  # pixels of the image on which matched baselines are equal in multiply-accumulates
STEP = 8  # widths of matched baselines are multiples of it: other widths are slow on every device
MATCHED = ("params", "macs")
MOST_DIFFERENCE = 0.03  # of a matched baseline in which equal widths stay equal


def experts(config: ModelConfig, count: int) -> ModelConfig:
    """`count` experts in each block. Their kernel sizes are the block's own, taken in turn.

    A block that had one expert, and so no gate, gets a linear gate.
    """
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= 64:
        raise ValueError("a whole number from 1 to 64 is needed")

    def change(block: Block) -> Block:
        if len(block.kernels) == count:
            return block
        sizes = sorted(set(block.kernels), reverse=True)
        return block.change(kernels=tuple(islice(cycle(sizes), count)), gate=block.gate or GATES["linear"])

    return config.map_blocks(change)


def kernel(config: ModelConfig, size: int | list[int]) -> ModelConfig:
    """Experts of one kernel size, or of several that the experts of a block take in turn."""
    sizes = [size] if isinstance(size, int) else size
    if not isinstance(sizes, list | tuple) or not sizes or not all(isinstance(size, int) for size in sizes):
        raise ValueError("an odd kernel size is needed, or a list of some")
    return config.map_blocks(lambda block: block.change(kernels=tuple(islice(cycle(sizes), len(block.kernels)))))


def gate(config: ModelConfig, kind: str | dict) -> ModelConfig:
    """Another gate: `linear`, `mlp` (one hidden layer, a reduction of 4), `uniform`, `constant`, or a `GateConfig`.

    A block whose gate is of the named kind keeps the one it has; blocks of one expert have none. `own` keeps all gates,
    and `frozen` and `shuffled` make these controls of them. A `GateConfig` is given as a table.
    """
    if not isinstance(kind, dict) and kind not in [*GATES, *OWN_GATE]:
        fields = "kind, hidden or reduction, temperature, frozen, shuffled"
        raise ValueError(f"{', '.join([*GATES, *OWN_GATE])}, or a table with {fields} is needed")

    def change(block: Block) -> Block:
        if isinstance(kind, dict):
            return block.change(gate=GateConfig(**kind))
        if block.gate is None or block.gate.kind == kind:
            return block
        return block.change(gate=block.gate.change(**OWN_GATE[kind]) if kind in OWN_GATE else GATES[kind])

    return config.map_blocks(change)


def matched(config: ModelConfig, equal: bool | str) -> ModelConfig:
    """The matched baseline: one expert in each block, as wide as it takes to have the `params` or `macs` of `config`.

    `false` is the network itself. Multiply-accumulates are those of an image of 32x32 pixels. All widths (channels, and
    the head's hidden sizes) are multiples of 8, and widths that are equal in `config` stay equal. Where this leaves a
    difference of over 3%, as in narrow networks, the last layers are 8 channels wider than the first ones. What remains
    is the `matched_difference`.
    """
    if equal is False:
        return config
    if equal not in MATCHED:
        raise ValueError(f"false, {', '.join(MATCHED)} is needed")
    return _matched(config, equal)


def matched_difference(config: ModelConfig, equal: str) -> float:
    """By which share the matched baseline has more `params` or `macs` than `config`: 0.02 is 2% more, -0.02 2% less."""
    i = MATCHED.index(equal)
    return cost(matched(config, equal), *IMAGE)[i] / cost(config, *IMAGE)[i] - 1


@lru_cache
def _matched(config: ModelConfig, equal: str) -> ModelConfig:
    i = MATCHED.index(equal)
    target, narrow = cost(config, *IMAGE)[i], experts(config, 1)
    widths = sorted(_widths(narrow))

    def difference(baseline: ModelConfig) -> float:
        return cost(baseline, *IMAGE)[i] - target

    low, high = 0.25, 16.0  # factors of the width: the first is too narrow, the other too wide
    while high - low > 0.001:
        middle = (low + high) / 2
        too_wide = max(widths) * middle + STEP > WIDEST or difference(width(narrow, middle)) > 0
        low, high = (low, middle) if too_wide else (middle, high)
    below = {size: max(1, math.floor(size * low / STEP)) * STEP for size in widths}
    choices = product(*((size, size + STEP) for size in below.values()))
    baselines = [_with_widths(narrow, dict(zip(below, choice)).__getitem__) for choice in choices]
    best = min(baselines, key=lambda baseline: abs(difference(baseline)))
    if abs(difference(best)) > MOST_DIFFERENCE * target:
        first, last = baselines[0], baselines[-1]  # all widths below, and all above
        steps = (last.change(layers=first.layers[:n] + last.layers[n:]) for n in range(len(narrow.layers)))
        best = min([best, *steps], key=lambda baseline: abs(difference(baseline)))
    return best


def norm_act(config: ModelConfig, place: str) -> ModelConfig:
    """Batch norm and ReLU in each `expert`, after the `mix`, or `none`."""
    return config.map_blocks(lambda block: block.change(norm_act=place))


def residual(config: ModelConfig, enabled: bool) -> ModelConfig:
    """With or without residual macro blocks.

    Without: every macro block is replaced by its layers. With: a network that has macro blocks is left as it is; in
    another, each two expert blocks that follow each other become a macro block.
    """
    if not isinstance(enabled, bool):
        raise ValueError("true or false is needed")
    if not enabled:
        return config.change(layers=_opened(config.layers))
    if any(isinstance(layer, Residual) for layer in config.layers):
        return config
    layers: list[Layer] = []
    for _, run in groupby(config.layers, lambda layer: isinstance(layer, Block)):
        same = list(run)
        blocks = [layer for layer in same if isinstance(layer, Block)]  # all of the run, or none
        whole = len(blocks) // 2 * 2
        layers += [Residual(layers=tuple(blocks[i : i + 2])) for i in range(0, whole, 2)]
        layers += same[whole:]
    return config.change(layers=tuple(layers))


def _opened(layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    parts = (_opened(layer.layers) if isinstance(layer, Residual) else (layer,) for layer in layers)
    return tuple(layer for part in parts for layer in part)


def width(config: ModelConfig, factor: float) -> ModelConfig:
    """All channels, and the hidden sizes of gates and head, times `factor`, rounded."""
    _positive(factor)
    return _with_widths(config, lambda size: max(1, round(size * factor)))


def _with_widths(config: ModelConfig, scaled: Callable[[int], int]) -> ModelConfig:
    """`config` with each number of channels, and each hidden size of a gate or the head, replaced by `scaled` of it."""

    def change(layer: Layer) -> Layer:
        match layer:
            case Residual():
                return layer.change(layers=tuple(map(change, layer.layers)))
            case Conv():
                return layer.change(channels=scaled(layer.channels))
            case Block():
                gate = layer.gate and layer.gate.change(hidden=tuple(map(scaled, layer.gate.hidden)))
                return layer.change(channels=scaled(layer.channels), gate=gate)
            case _:
                return layer

    head = config.head.change(hidden=tuple(map(scaled, config.head.hidden)))
    return config.change(layers=tuple(map(change, config.layers)), head=head)


def _widths(config: ModelConfig) -> set[int]:
    """The different widths in a network: what `_with_widths` asks for."""
    widths: set[int] = set()
    _with_widths(config, lambda size: widths.add(size) or size)
    return widths


def depth(config: ModelConfig, factor: float) -> ModelConfig:
    """Each run of equal expert blocks or macro blocks `factor` times as long, rounded, at least one.

    A block that changes channels or stride stays, and what is added after it keeps both. Blocks inside a macro block
    are left as they are: the macro block is what is repeated.
    """
    _positive(factor)
    layers: list[Layer] = []
    for layer, run in groupby(config.layers):
        run = list(run)
        if isinstance(layer, Block | Residual):
            length = max(1, round(len(run) * factor))
            run = [layer, *[_repeatable(layer)] * (length - 1)]
        layers += run
    return config.change(layers=tuple(layers))


def _repeatable(layer: Layer) -> Layer:
    """`layer` as it follows itself: with stride 1."""
    if isinstance(layer, Residual):
        return layer.change(layers=tuple(map(_repeatable, layer.layers)))
    return layer.change(stride=1)


def _positive(factor: float) -> None:
    if not isinstance(factor, int | float) or isinstance(factor, bool) or not 0 < factor <= 64:
        raise ValueError("a number above 0, up to 64, is needed")


VARIANTS: dict[str, Callable[[Any, Any], Network]] = {
    "depth": depth,  # first: it goes by which blocks are equal
    "experts": experts,
    "kernel": kernel,
    "norm_act": norm_act,
    "residual": residual,
    "width": width,
    "matched": matched,  # after what changes the cost; before the gate: all gates of a network have one baseline
    "gate": gate,
}


SHIPPED = tuple(VARIANTS)


def register_variant(function: FunctionType) -> FunctionType:
    """Makes a function a factor of studies, under its own name; for modules of `--import`.

    It gets a config (`ModelConfig` of our networks, `TimmModel` of others) and a level, and returns the changed config.
    It comes after the shipped ones. Raises InputError for a name that is taken.
    """
    from expertgrid.model.training.recipe import Recipe  # which imports numpy

    name = function.__name__
    if name in VARIANTS or name in Recipe.model_fields or name in ("model", "recipe", "reference"):
        raise InputError(f"variant {name}: the name is taken, by another variant or a field of the recipe")
    VARIANTS[name] = function
    return function


def vary(config: Network, name: str, level: object) -> Network:
    """The variant `name` of `VARIANTS` at `level`. Raises InputError, naming both, for a level that it has not."""
    if name in SHIPPED and not isinstance(config, ModelConfig):
        raise InputError(f"factor {name} does not apply to timm model {config.timm!r}; `baselines` takes such models")
    try:
        changed = VARIANTS[name](config, level)
        if isinstance(changed, ModelConfig | TimmModel):
            return changed
        reason = f"it gives a {type(changed).__name__}, and a config is needed"
    except ValidationError as error:
        reason = str(invalid("", error))
    except Exception as error:
        reason = str(error) if isinstance(error, TypeError | ValueError) else reason_of(error)
    raise InputError(f"{name}: {level!r} is not accepted: {reason}") from None
