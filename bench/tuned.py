"""How much faster the tuned and the untuned file of each preset are than PyTorch on this CPU.

    python -m bench.tuned --out tuned.json

For each preset and batch size `expertgrid export --tune` chooses a file; that file, the untuned one, PyTorch eager in
fp32 and PyTorch compiled in bfloat16 then take turns. Weights are random, so the accuracy of int8 and bfloat16 is not
judged here.
"""

import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Annotated

import numpy as np
import typer
from pydantic import BaseModel

from bench import command
from bench.engines import engines
from bench.host import watched
from bench.kept import BATCHES, Batches, Out, Presets, Record
from bench.latency import open_engine, random_images
from bench.timing import Ratio, compare, take_turns
from bench.tune import tune
from bench.untrained import SIZE, untrained_checkpoint
from export.certificate import Tried
from export.publish import Images, Reference, publish
from model.presets import PRESETS, network

IMAGES = 128  # random ones, on which the files are certified
TUNED, UNTUNED, EAGER, COMPILED = "tuned", "untuned", "eager", "compiled-bf16"


class Found(BaseModel):
    """One preset at one batch size."""

    preset: str
    batch: int
    chosen: Tried
    ms: dict[str, float]  # medians
    over_eager: dict[str, Ratio]  # how many times as fast as PyTorch eager
    over_compiled: Ratio  # the tuned file, against PyTorch compiled in bfloat16


class TunedRecord(Record):
    """What was measured on one machine."""

    found: list[Found]


def reference(preset: str) -> Reference:
    """The preset with random weights and images. The labels are of no class, so no accuracy is lost."""
    checkpoint = untrained_checkpoint(preset, network(preset))
    config = checkpoint.config
    rng = np.random.default_rng(0)
    pixels = rng.integers(256, size=(IMAGES, SIZE, SIZE, config.in_chans), dtype=np.uint8)
    no_class = np.full(IMAGES, config.num_classes)
    return Reference(checkpoint, Images(pixels, pixels, no_class, pixels, no_class), "uint8")


def measure(preset: str, batches: Sequence[int], measure_s: float, openings: int) -> Iterator[Found]:
    """Tunes a preset for each batch size, and times the ways in turns, about `measure_s` seconds of each."""
    of_preset = reference(preset)
    untuned = publish(of_preset).model
    for batch in batches:
        published = tune(of_preset, batch=batch)
        (chosen,) = (one for one in published.certificate.tuning if one.outcome == "chosen")
        (own,) = engines(published.model, TUNED, "cpu", ["own"])[0].values()
        words = {UNTUNED: "onnxruntime", EAGER: EAGER, COMPILED: COMPILED}
        ways = dict(zip(words, engines(untuned, UNTUNED, "cpu", list(words.values()))[0].values()))
        images = random_images(untuned, batch)
        times = take_turns(
            {name: partial(open_engine, engine, images) for name, engine in ({TUNED: own} | ways).items()},
            measure_s,
            openings,
        )
        yield Found(
            preset=preset,
            batch=batch,
            chosen=chosen,
            ms={name: float(np.median(taken.calls_ms)) for name, taken in times.items()},
            over_eager={name: compare(times[EAGER], times[name]) for name in (TUNED, UNTUNED, COMPILED)},
            over_compiled=compare(times[COMPILED], times[TUNED]),
        )


def row(found: Found) -> dict[str, object]:
    """The row of a preset at a batch size."""
    return {
        "network": found.preset,
        "batch": found.batch,
        **{f"{name} ms": f"{ms:.3g}" for name, ms in found.ms.items()},
        **{f"{name} / eager": f"{ratio.value:.2f}" for name, ratio in found.over_eager.items()},
        "tuned / compiled-bf16": f"{found.over_compiled.value:.2f}",
        "chosen": str(found.chosen),
    }


def tuned_command(
    presets: Presets = None,
    batch: Batches = None,
    seconds: Annotated[float, typer.Option(min=0, help="Of each way at each batch size.")] = 1.0,
    openings: Annotated[int, typer.Option(min=2, help="How often each way is opened.")] = 5,
    out: Out = None,
) -> int:
    """Time each preset's tuned and untuned file beside PyTorch."""
    with watched(cuda=False) as host:
        record = TunedRecord(host=host, found=[])
        for preset in presets or list(PRESETS):
            for found in measure(preset, batch or BATCHES, seconds, openings):
                record.found.append(found)
                record.keep(out, row(found))
    record.show([row(found) for found in record.found], "a / b: how many times as fast a is as b.", out)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 the input is wrong."""
    return command.run(tuned_command, arguments)


if __name__ == "__main__":
    sys.exit(main())
