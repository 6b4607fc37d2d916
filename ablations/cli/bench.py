"""Measuring latency and training speed."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ablations.cli.devices import device
from ablations.cli.options import write_out
from ablations.cli.sources import read_data
from ablations.cli.terminal import console, status
from ablations.records import StudyDirectory
from ablations.results.rendering import Format, render
from ablations.results.rows import read_results
from bench import training
from bench.cells import measure_cells
from bench.engines import USUAL
from bench.latency import check_comparable, measure, notes, read_latency, rows, with_baseline, with_first
from bench.training import measure_training
from model.fast.execution import ExecutionOptions
from model.files import write_whole


@dataclass(frozen=True)
class Against:
    """What a file's speed is compared with, and what ends in failure."""

    baseline: Path | None = None  # a record of an earlier run
    across_machines: bool = False
    fail_if_slower: float | None = None  # percent


def bench(
    files: Sequence[Path],
    provider: str = "cpu",
    batches: Sequence[int] = (1, 8, 64),
    format: Format = "text",
    json: Path | None = None,
    engines: Sequence[str] = USUAL,
    measure_s: float = 1.0,
    against: Against = Against(),
) -> int:
    """Prints the latency of ONNX files, and keeps the records of those in a study's export folder.

    1 where a file is slower than it may be.
    """
    baseline = read_latency(against.baseline) if against.baseline else None
    with status(f"measuring {', '.join(map(str, files))}"):
        records = measure(files, provider, batches, measure_s, engines)
    if baseline and against.baseline and not against.across_machines:
        check_comparable(baseline, records[0], against.baseline)
    for file, record in zip(files, records):
        content = record.model_dump_json(indent=1).encode()
        study = file.resolve().parent.parent
        if record.trial and file.resolve().parent.name == "export" and (study / "study.toml").exists():
            write_whole(study / "bench" / f"{file.stem}-{provider}.json", content)
        if json is not None:
            write_out("--json", json, content)
    found = with_first(records)
    table = rows(records, found)
    if baseline:
        found += with_baseline(records[0], baseline, str(against.baseline))
    print(render(table, format, notes(records)))
    if format == "text" and found:
        print("\n" + "\n".join(map(str, found)), flush=True)
    if against.fail_if_slower is None:
        return 0
    slower = [one for one in found if one.slower_percent() > against.fail_if_slower]
    for one in slower:
        console.print(
            f"slower by {one.slower_percent():.1f}%, more than {against.fail_if_slower:g}%: {one.file} against "
            f"{one.other}, batch {one.batch}, {one.engine}", style="red", soft_wrap=True,
        )  # fmt: skip
    return int(bool(slower))


def bench_study(
    path: Path,
    data: str | None,
    data_dir: Path | None,
    steps: int | None,
    rounds: int,
    device_name: str,
    execution: ExecutionOptions,
    format: Format,
) -> int:
    """Measures the training speed of each cell of a study, keeps it in its directory, and prints it."""
    directory, on = StudyDirectory(path), device(device_name)
    execution.check(on)
    plan = directory.plan
    images = read_data(data or plan.source, data_dir, plan.image_size)
    with directory.held(), status(f"training the cells of {path}"):
        rates = measure_cells(directory, images, on, execution, steps, rounds, partial(console.print, soft_wrap=True))
        directory.write_training_rates(rates)
    rows: list[dict[str, object]] = [
        {"cell": row.name, "train images/s": row.alone, "slowest": min(found), "fastest": max(found)}
        for row in read_results(directory).rows
        for found in (rates.rounds[trial] for trial in row.trials.values() if trial in rates.rounds)
    ]
    print(render(rows, format, [f"{rates}. Medians of {rounds} rounds, in turns."]))
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
