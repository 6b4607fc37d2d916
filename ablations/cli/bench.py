"""Measuring latency and training speed."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from ablations.cli.devices import device
from ablations.cli.options import write_out
from ablations.cli.terminal import console, status
from ablations.results.rendering import Format, render
from bench import training
from bench.latency import measure, rows
from bench.training import measure_training
from model.fast.execution import ExecutionOptions
from model.files import write_whole


def bench(
    files: Sequence[Path],
    provider: str = "cpu",
    batches: Sequence[int] = (1, 8, 64),
    format: Format = "text",
    json: Path | None = None,
) -> int:
    """Prints the latency of ONNX files, and keeps the records of those in a study's export folder."""
    with status(f"measuring {', '.join(map(str, files))}"):
        records = measure(files, provider, batches)
    for file, record in zip(files, records):
        content = record.model_dump_json(indent=1).encode()
        study = file.resolve().parent.parent
        if record.trial and file.resolve().parent.name == "export" and (study / "study.toml").exists():
            write_whole(study / "bench" / f"{file.stem}-{provider}.json", content)
        if json is not None:
            write_out("--json", json, content)
    note = f"{record.device}, {record.threads} threads; images/s from the mean of all calls."
    first = [f"x first: against {files[0].name} in ONNX Runtime at the same batch size."] if len(files) > 1 else []
    print(render(rows(records), format, [note, *first]))
    return 0


def bench_train(
    preset: str,
    batch: int,
    steps: int | None,
    rounds: int,
    device_name: str,
    execution: ExecutionOptions,
    format: Format,
) -> int:
    """Prints the speed of a training beside the PyTorch baseline and beside bare steps on one batch."""
    on = device(device_name)
    with status(f"training {preset}"):
        speed = measure_training(preset, batch, steps, rounds, on, execution, partial(console.print, soft_wrap=True))
    if format == "json":
        print(speed.model_dump_json(indent=1))
        return 0
    print(render(training.rows(speed), format, training.notes(speed)))
    return 0
