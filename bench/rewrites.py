"""What the rewrites of `export` do to the latency of each preset, in ONNX Runtime on this CPU.

    python -m bench.rewrites --out rewrites.json

For each preset the graphs of all sets of rewrites take turns with the graph as it was trained. `export` applies by
default what is at least as fast everywhere; `export --tune` measures the network that it is given.
"""

import sys
from collections.abc import Sequence
from functools import partial
from typing import Annotated

import numpy as np
import typer
from pydantic import BaseModel

from bench import command
from bench.host import watched
from bench.kept import BATCHES, Batches, Out, Presets, Record
from bench.latency import open_file
from bench.timing import Ratio, compare, take_turns
from bench.untrained import SIZE, untrained_checkpoint
from export.publish import REWRITE_SETS
from export.to_onnx import to_onnx
from model.presets import PRESETS, network

PLAIN = "none"  # of REWRITE_SETS


class Rewritten(BaseModel):
    """A set of rewrites of one preset at one batch size."""

    preset: str
    rewrites: list[str]  # names of sets that give the same graph
    batch: int
    ms: float  # median
    ratio: Ratio  # how many times as fast as the graph as it was trained


class RewritesRecord(Record):
    """What was measured on one machine."""

    found: list[Rewritten]


def graphs(preset: str) -> dict[tuple[str, ...], bytes]:
    """The different ONNX models of a preset with random weights, each by the sets of rewrites that give it."""
    checkpoint = untrained_checkpoint(preset, network(preset))
    names: dict[bytes, list[str]] = {}
    for name, rewrites in REWRITE_SETS.items():
        names.setdefault(to_onnx(checkpoint, "uint8", rewrites), []).append(name)
    return {tuple(sets): model for model, sets in names.items()}


def measure(
    models: dict[tuple[str, ...], bytes], preset: str, batch: int, measure_s: float, openings: int
) -> list[Rewritten]:
    """Times a preset's graphs at a batch size, about `measure_s` seconds of each."""
    images = np.random.default_rng(0).integers(256, size=(batch, SIZE, SIZE, 3), dtype=np.uint8)
    times = take_turns({sets: partial(open_file, model, images) for sets, model in models.items()}, measure_s, openings)
    (plain,) = (taken for sets, taken in times.items() if PLAIN in sets)
    return [
        Rewritten(
            preset=preset,
            rewrites=list(sets),
            batch=batch,
            ms=float(np.median(taken.calls_ms)),
            ratio=Ratio(1.0, 1.0, 1.0) if taken is plain else compare(plain, taken),
        )
        for sets, taken in times.items()
    ]


def rows(found: Sequence[Rewritten]) -> list[dict[str, object]]:
    """A row for each graph, with its ratio at each batch size."""
    table: dict[tuple[str, str], dict[str, object]] = {}
    for one in found:
        name = ", ".join(one.rewrites)
        row = table.setdefault((one.preset, name), {"network": one.preset, "rewrites": name})
        row[f"batch {one.batch}"] = "1" if PLAIN in one.rewrites else f"{one.ratio.value:.2f} {one.ratio.word}"
    return list(table.values())


def rewrites_command(
    presets: Presets = None,
    batch: Batches = None,
    seconds: Annotated[float, typer.Option(min=0, help="Of each graph at each batch size.")] = 1.0,
    openings: Annotated[int, typer.Option(min=2, help="How often each graph is opened.")] = 5,
    out: Out = None,
) -> int:
    """Time each preset's rewritten graphs against the graph as it was trained."""
    with watched(cuda=False) as host:
        record = RewritesRecord(host=host, found=[])
        for preset in presets or list(PRESETS):
            models = graphs(preset)
            for size in batch or BATCHES:
                found = measure(models, preset, size, seconds, openings)
                record.found += found
                record.keep(out, *rows(found))
    record.show(rows(record.found), "How many times as fast as the graph as it was trained.", out)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 the input is wrong."""
    return command.run(rewrites_command, arguments)


if __name__ == "__main__":
    sys.exit(main())
