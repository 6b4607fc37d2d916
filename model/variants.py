"""What an ablation changes: pure functions from a network to a network.

Each takes a `ModelConfig` and a level and returns the changed config. They map over all layers, so that each applies
to each preset; where a level is what the network has already, the result equals the input. `VARIANTS` lists them in
the order in which a study applies several.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from itertools import cycle, groupby, islice
from typing import Any

from pydantic import ValidationError

from model.config import Block, Conv, GateConfig, HeadConfig, Layer, ModelConfig, Residual
from model.cost import cost
from model.errors import InputError

GATES = {
    "linear": GateConfig(kind="linear"),
    "mlp": GateConfig(kind="mlp", reduction=4),
    "uniform": GateConfig(kind="uniform"),
    "constant": GateConfig(kind="constant"),
}

OWN_GATE = {"own": {}, "frozen": {"frozen": True}, "shuffled": {"shuffled": True}}
IMAGE = 32, 32  # pixels at which plain networks are made equal in multiply-accumulates


def _map_blocks(layers: tuple[Layer, ...], change: Callable[[Block], Block]) -> tuple[Layer, ...]:
    changed = []
    for layer in layers:
        if isinstance(layer, Block):
            layer = change(layer)
        elif isinstance(layer, Residual):
            layer = Residual(layers=_map_blocks(layer.layers, change))
        changed.append(layer)
    return tuple(changed)


def _change_blocks(config: ModelConfig, change: Callable[[Block], dict[str, Any]]) -> ModelConfig:
    return config.change(layers=_map_blocks(config.layers, lambda block: Block(**{**dict(block), **change(block)})))


def experts(config: ModelConfig, count: int) -> ModelConfig:
    """`count` experts in each block. Their kernel sizes are the block's own, taken in turn.

    A block that had one expert, and so no gate, gets a linear gate.
    """

    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= 64:
        raise ValueError("accepted: a whole number from 1 to 64")

    def change(block: Block) -> dict[str, Any]:
        if len(block.kernels) == count:
            return {}
        sizes = sorted(set(block.kernels), reverse=True)
        return {"kernels": tuple(islice(cycle(sizes), count)), "gate": block.gate or GATES["linear"]}

    return _change_blocks(config, change)


def kernel(config: ModelConfig, size: int | list[int]) -> ModelConfig:
    """Experts of one kernel size, or of several that the experts of a block take in turn."""
    sizes = [size] if isinstance(size, int) else size
    if not isinstance(sizes, list | tuple) or not sizes or not all(isinstance(one, int) for one in sizes):
        raise ValueError("accepted: an odd kernel size, or a list of some")
    return _change_blocks(config, lambda block: {"kernels": tuple(islice(cycle(sizes), len(block.kernels)))})


def gate(config: ModelConfig, kind: str | dict) -> ModelConfig:
    """Another gate: `linear`, `mlp` (one hidden layer, a reduction of 4), `uniform`, `constant`, or a `GateConfig`.

    A block whose gate is of the named kind keeps the one it has; blocks of one expert have none. `own` keeps all gates,
    and `frozen` and `shuffled` make these controls of them. A `GateConfig` is given as a table.
    """
    if not isinstance(kind, dict) and kind not in [*GATES, *OWN_GATE]:
        fields = "kind, hidden or reduction, temperature, frozen, shuffled"
        raise ValueError(f"accepted: {', '.join([*GATES, *OWN_GATE])}, or a table with {fields}")

    def change(block: Block) -> dict[str, Any]:
        if isinstance(kind, dict):
            return {"gate": GateConfig(**kind)}
        if kind in OWN_GATE:
            return {"gate": block.gate and GateConfig(**{**dict(block.gate), **OWN_GATE[kind]})}
        return {} if block.gate is None or block.gate.kind == kind else {"gate": GATES[kind]}

    return _change_blocks(config, change)


def plain(config: ModelConfig, equal: bool | str) -> ModelConfig:
    """The plain twin: one expert in each block, and a width at which the `params` or `macs` are those of `config`.

    `false` is the network itself. Multiply-accumulates are those of an image of 32x32 pixels.
    """
    if equal is False:
        return config
    if equal not in ("params", "macs"):
        raise ValueError("accepted: false, params, macs")
    return _plain(config, equal)


@lru_cache
def _plain(config: ModelConfig, equal: str) -> ModelConfig:
    wanted, one = cost(config, *IMAGE)[equal == "macs"], experts(config, 1)

    def off(factor: float) -> float:
        """How much more than `wanted` the network of one expert costs at this width; infinite where it is too wide."""
        try:
            return cost(width(one, factor), *IMAGE)[equal == "macs"] - wanted
        except ValidationError:
            return math.inf

    low, high = 0.5, 8.0
    while high - low > 0.001:
        middle = (low + high) / 2
        low, high = (middle, high) if off(middle) <= 0 else (low, middle)
    return width(one, min((low, high), key=lambda factor: abs(off(factor))))


def norm_act(config: ModelConfig, place: str) -> ModelConfig:
    """Batch norm and ReLU in each `expert`, after the `mix`, or `none`."""
    return _change_blocks(config, lambda block: {"norm_act": place})


def residual(config: ModelConfig, wanted: bool) -> ModelConfig:
    """With or without residual macro blocks.

    Without: every macro block is replaced by its layers. With: a network that has macro blocks is left as it is; in
    another, each two expert blocks that follow each other become a macro block.
    """
    if not isinstance(wanted, bool):
        raise ValueError("accepted: true, false")
    if not wanted:
        return config.change(layers=_opened(config.layers))
    if any(isinstance(layer, Residual) for layer in config.layers):
        return config
    layers: list[Layer] = []
    for is_block, run in groupby(config.layers, lambda layer: isinstance(layer, Block)):
        run = list(run)
        whole = len(run) // 2 * 2 if is_block else 0
        layers += [Residual(layers=tuple(run[i : i + 2])) for i in range(0, whole, 2)] + run[whole:]
    return config.change(layers=tuple(layers))


def _opened(layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    parts = (_opened(layer.layers) if isinstance(layer, Residual) else (layer,) for layer in layers)
    return tuple(layer for part in parts for layer in part)


def width(config: ModelConfig, factor: float) -> ModelConfig:
    """All channels, and the hidden sizes of gates and head, times `factor`, rounded."""

    def scaled(size: int) -> int:
        return max(1, round(size * factor))

    def change(layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
        wide = []
        for layer in layers:
            if isinstance(layer, Residual):
                layer = Residual(layers=change(layer.layers))
            elif isinstance(layer, Conv | Block):
                fields = {**dict(layer), "channels": scaled(layer.channels)}
                if isinstance(layer, Block) and layer.gate is not None:
                    fields["gate"] = GateConfig(
                        **{**dict(layer.gate), "hidden": tuple(scaled(size) for size in layer.gate.hidden)}
                    )
                layer = type(layer)(**fields)
            wide.append(layer)
        return tuple(wide)

    _positive(factor)
    head = HeadConfig(**{**dict(config.head), "hidden": tuple(scaled(size) for size in config.head.hidden)})
    return config.change(layers=change(config.layers), head=head)


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
            wanted = max(1, round(len(run) * factor))
            run = [layer, *[_repeatable(layer)] * (wanted - 1)]
        layers += run
    return config.change(layers=tuple(layers))


def _repeatable(layer: Layer) -> Layer:
    """`layer` as it follows itself: with stride 1."""
    if isinstance(layer, Residual):
        return Residual(layers=tuple(_repeatable(inner) for inner in layer.layers))
    return type(layer)(**{**dict(layer), "stride": 1})


def _positive(factor: float) -> None:
    if not isinstance(factor, int | float) or isinstance(factor, bool) or not 0 < factor <= 64:
        raise ValueError("accepted: a number above 0, up to 64")


VARIANTS: dict[str, Callable[[ModelConfig, Any], ModelConfig]] = {
    "depth": depth,  # first: it goes by which blocks are equal
    "experts": experts,
    "kernel": kernel,
    "plain": plain,  # before the gate, so that all gates of a network have one twin
    "gate": gate,
    "norm_act": norm_act,
    "residual": residual,
    "width": width,
}


def vary(config: ModelConfig, name: str, level: object) -> ModelConfig:
    """The variant `name` of `VARIANTS` at `level`. Raises InputError, naming both, for a level that it has not."""
    try:
        return VARIANTS[name](config, level)
    except ValidationError as error:
        first = error.errors()[0]
        reason = first["msg"].removeprefix("Value error, ")
    except (TypeError, ValueError) as error:
        reason = str(error)
    raise InputError(f"{name}: {level!r} is not accepted: {reason}") from None
