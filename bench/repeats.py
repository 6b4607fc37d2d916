"""How often the verdicts of `expertgrid bench` are right on this machine.

    python -m bench.repeats speed --out repeats.json

A preset's file takes turns with itself, and with a file that has one operator more, whose cost is 5%. This is repeated.
Of the file against itself "can't tell" is right, and of the other "slower".
"""

import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated

import numpy as np
import onnx
import typer
from onnx import TensorProto, helper, numpy_helper
from pydantic import BaseModel

from bench import command
from bench.host import watched
from bench.kept import Out, Record
from bench.latency import open_file, random_images
from bench.timing import Call, Ratio, compare, take_turns
from bench.untrained import untrained_checkpoint
from export.publish import DEFAULT_REWRITES
from export.to_onnx import INPUT, LOGITS, to_onnx
from model.presets import network

SHARE = 0.05  # of the file's time, that the operator costs
COLUMNS = 512  # of the operator whose cost is measured first
CALIBRATION_S = 5.0  # of each file, then
SAME, SLOWER = "the same file", "5% slower"
RIGHT = {SAME: "can't tell", SLOWER: "slower"}


class Repeat(BaseModel):
    """What one run said of a file."""

    other: str
    ratio: Ratio
    word: str
    seconds: float  # of the run


class RepeatsRecord(Record):
    """What was measured on one machine."""

    preset: str
    batch: int
    columns: int  # of the operator that was added
    repeats: list[Repeat]


def with_matmul(model: bytes, columns: int) -> bytes:
    """The model with a matrix product of the flattened pixels with a matrix of `columns` columns.

    The mean of the product is added to the logits, so that it must be computed; it is near 0.
    """
    proto = onnx.load_from_string(model)
    graph = proto.graph
    shape = [dim.dim_value for dim in graph.input[0].type.tensor_type.shape.dim[1:]]
    weights = np.random.default_rng(0).standard_normal((int(np.prod(shape)), columns), dtype=np.float32) * 1e-12
    for node in graph.node:
        node.output[:] = ["added.to" if name == LOGITS else name for name in node.output]
    graph.initializer.extend(
        [numpy_helper.from_array(weights, "added.matrix"), numpy_helper.from_array(np.array([1]), "added.axes")]
    )
    graph.node.extend(
        [
            helper.make_node("Cast", [INPUT], ["added.pixels"], to=TensorProto.FLOAT),
            helper.make_node("Flatten", ["added.pixels"], ["added.flat"]),
            helper.make_node("MatMul", ["added.flat", "added.matrix"], ["added.product"]),
            helper.make_node("ReduceMean", ["added.product", "added.axes"], ["added.mean"]),
            helper.make_node("Add", ["added.to", "added.mean"], [LOGITS]),
        ]
    )
    return proto.SerializeToString()


def columns_for(share: float, model: bytes, images: np.ndarray) -> int:
    """The columns with which `with_matmul` costs that share of the model's time."""
    candidates = {count: partial(open_file, with_matmul(model, count), images) for count in (8, COLUMNS)}
    times = take_turns({0: partial(open_file, model, images), **candidates}, CALIBRATION_S)
    least, more = (1 / compare(times[0], times[count]).value - 1 for count in candidates)
    return max(1, round(8 + (share - least) * (COLUMNS - 8) / (more - least)))


def measure(candidates: Mapping[str, Callable[[], Call]], measure_s: float, openings: int | None) -> list[Repeat]:
    """What one run says of the two other files."""
    begun = time.perf_counter()
    times = take_turns(candidates, measure_s, openings)
    seconds = time.perf_counter() - begun
    ratios = {other: compare(times["first"], times[other]) for other in RIGHT}
    return [Repeat(other=other, ratio=ratio, word=ratio.word, seconds=seconds) for other, ratio in ratios.items()]


def rows(record: RepeatsRecord) -> list[dict[str, object]]:
    """A row for each of the two files."""
    table: list[dict[str, object]] = []
    for other, right in RIGHT.items():
        found = [repeat for repeat in record.repeats if repeat.other == other]
        words = Counter(repeat.word for repeat in found)
        logs = np.log([repeat.ratio.value for repeat in found])
        table.append(
            {
                "against": other,
                **{word: words[word] for word in ("faster", "can't tell", "slower")},
                "right": f"{words[right]} of {len(found)}",
                "mean ratio": f"{np.exp(logs.mean()):.4f}",
                "spread %": f"{100 * logs.std(ddof=1):.2f}" if len(logs) > 1 else "",
                "longest s": f"{max(repeat.seconds for repeat in found):.1f}",
            }
        )
    return table


def repeats_command(
    preset: Annotated[str, typer.Argument(help="A network.")] = "speed",
    batch: Annotated[int, typer.Option(min=1, help="Batch size.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Runs.")] = 100,
    seconds: Annotated[float, typer.Option(min=0, help="Of each file in a run.")] = 1.0,
    openings: Annotated[int | None, typer.Option(min=2, help="How often each file is opened in a run.")] = None,
    out: Out = None,
) -> int:
    """Count how often a file is rightly not told from itself, and a slower one is found."""
    model = to_onnx(untrained_checkpoint(preset, network(preset)), "uint8", DEFAULT_REWRITES)
    images = random_images(model, batch)
    with watched(cuda=False) as host:
        columns = columns_for(SHARE, model, images)
        models = {"first": model, SAME: model, SLOWER: with_matmul(model, columns)}
        candidates = {name: partial(open_file, made, images) for name, made in models.items()}
        record = RepeatsRecord(host=host, preset=preset, batch=batch, columns=columns, repeats=[])
        for number in range(1, repeats + 1):
            found = measure(candidates, seconds, openings)
            record.repeats += found
            record.keep(out, {"repeat": number, **{repeat.other: repeat.word for repeat in found}})
    record.show(rows(record), "ratio: how many times as fast as the first file.", out)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 the input is wrong."""
    return command.run(repeats_command, arguments)


if __name__ == "__main__":
    sys.exit(main())
