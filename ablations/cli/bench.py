"""Measuring latency and training speed."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from expertgrid.ablations.cli.options import check_can_be_written
from expertgrid.ablations.cli.sources import read_data
from expertgrid.ablations.cli.terminal import notice, status
from expertgrid.ablations.records.directory import StudyDirectory
from expertgrid.ablations.results.rows import read_results
from expertgrid.ablations.speed.latency import by_cell, measure_latencies
from expertgrid.ablations.speed.training import measure_cells
from expertgrid.ablations.study.changes import changed, check_parts
from expertgrid.ablations.study.levels import Level, level_name
from expertgrid.bench import training
from expertgrid.bench.engines import PYTORCH, USUAL
from expertgrid.bench.isolated import Begin
from expertgrid.bench.latency import check_comparable, measure, notes, rows, with_baseline, with_first
from expertgrid.bench.peers import peers_of
from expertgrid.bench.profile import profile_training
from expertgrid.bench.record import read_latency
from expertgrid.bench.training import measure_training, recipe_of
from expertgrid.export.describe import describe, read_onnx
from expertgrid.model.fast.execution import ExecutionOptions
from expertgrid.model.presets import network
from expertgrid.model.system.files import write_whole
from expertgrid.model.system.machine import torch_device
from expertgrid.model.system.text import Format, render

PEERS_NOTE = (
    "Peers: untrained networks of timm for the same images and classes, in fp32, RepVGG in its deployed form. Their "
    "accuracy is unknown. Parameters and MACs are those in the files."
)


def bench(
    files: Sequence[Path],
    provider: str = "cpu",
    batches: Sequence[int] = (1, 8, 64),
    format: Format = "text",
    json: Path | None = None,
    engines: Sequence[str] = USUAL,
    measure_s: float = 1.0,
    baseline_file: Path | None = None,  # the record of an earlier run
    across_machines: bool = False,
    fail_if_slower: float | None = None,  # percent
    isolated: Begin | None = None,
    with_peers: bool = False,
    openings: int | None = None,
) -> int:
    """Prints the latency of ONNX files, and keeps the records of those in a study's export folder.

    1 where a file is slower than it may be.
    """
    baseline = read_latency(baseline_file) if baseline_file else None
    if json is not None:
        check_can_be_written("--json", json)
    with status(f"measuring {', '.join(map(str, files))}"), TemporaryDirectory() as place:
        peers = _write_peers(files[0], Path(place)) if with_peers else []
        measured = [*files, *peers]
        records = measure(measured, provider, batches, measure_s, engines, openings, isolated=isolated)
        costs = {path.name: describe(read_onnx(path), path.name) for path in measured} if with_peers else {}
    if baseline and baseline_file and not across_machines:
        check_comparable(baseline, records[0], baseline_file)
    for file, record in zip(files, records):
        timed = {latency.kind for latency in record.latencies}
        if left_out := [kind for kind in engines if kind in PYTORCH and kind not in timed]:
            notice(f"{file}: not timed in {', '.join(left_out)}: it does not say which network it is")
    comparisons = with_first(records)
    table = rows(records, comparisons)
    if costs:
        sizes = {file: {"params": about.parameters, "MACs": about.macs} for file, about in costs.items()}
        table = [{"file": row["file"]} | sizes[str(row["file"])] | row for row in table]
    if baseline:
        comparisons += with_baseline(records[0], baseline, str(baseline_file))
    print(render(table, format, notes(records) + ([PEERS_NOTE] if with_peers else [])))
    if format == "text" and comparisons:
        print("\n" + "\n".join(map(str, comparisons)), flush=True)
    for file, record in zip(files, records):
        content = record.model_dump_json(indent=1).encode()
        study = file.resolve().parent.parent
        if record.trial and file.resolve().parent.name == "export" and (study / "study.toml").exists():
            write_whole(study / "bench" / f"{file.stem}-{provider}.json", content)
        if json is not None:
            write_whole(json, content)
    if fail_if_slower is None:
        return 0
    too_slow = [other for other in comparisons if other.slower_percent() > fail_if_slower]
    for slower in too_slow:
        notice(
            f"slower by {slower.slower_percent():.1f}%, more than {fail_if_slower:g}%: {slower.file} against "
            f"{slower.other}, batch {slower.batch}, {slower.engine}", style="red",
        )  # fmt: skip
    return int(bool(too_slow))


def _write_peers(file: Path, place: Path) -> list[Path]:
    """Names those that cannot be exported on stderr."""
    models, failed = peers_of(file)
    for name, reason in failed.items():
        notice(f"{name}: left out: {reason}")
    for name, model in models.items():
        (place / f"{name}.onnx").write_bytes(model)
    return [place / f"{name}.onnx" for name in models]


def bench_cells(
    path: Path,
    provider: str,
    batches: Sequence[int],
    format: Format,
    engines: Sequence[str],
    measure_s: float,
    front_only: bool,
    isolated: Begin | None,
) -> int:
    """Prints the latency of each cell of a study, and keeps it in its directory; 1 where a cell is not exported."""
    directory = StudyDirectory(path)
    with directory.held():
        with status(f"exporting and timing the cells of {path}"):
            timed = measure_latencies(directory, provider, batches, measure_s, engines, front_only, isolated)
        for what, names in (
            ("have no weights, only records, and were not timed", timed.without_weights),
            ("are not on the front, and were timed briefly", timed.off_front),
        ):
            if names:
                notice(f"{len(names)} of the cells {what}: {'; '.join(names)}")
        for name, reason in timed.not_exported.items():
            notice(f"{name}: not exported: {reason}", style="red")
        new = {row.name: record for row, record in zip(timed.rows, timed.records)}
        results = [replace(row, latency=new.get(row.name, row.latency)) for row in read_results(directory).rows]
        table = by_cell(rows(timed.records, with_first(timed.records)), timed, results)
        print(render(table, format, notes(timed.records)), flush=True)  # first: the disk may be full
        for record in timed.records:
            content = record.model_dump_json(indent=1).encode()
            write_whole(path / "bench" / f"{record.trial}-{record.provider}.json", content)
    return int(bool(timed.not_exported))


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
    directory, device = StudyDirectory(path), torch_device(device_name)
    execution.check(device)
    plan = directory.read_plan()
    images = read_data(data or plan.source, data_dir, plan.image_size)
    with directory.held(), status(f"training the cells of {path}"):
        rates = measure_cells(directory, images, device, execution, steps, rounds, notice)
        rows: list[dict[str, object]] = [
            {"cell": row.name, "train images/s": rates.images_per_s[trial], "slowest": min(took), "fastest": max(took)}
            for row in read_results(directory).rows
            for trial, took in rates.rounds.items()
            if trial in row.trials.values()
        ]
        print(render(rows, format, [f"{rates}. Medians of {rounds} rounds, in turns."]), flush=True)
        directory.write_training_rates(rates)
    return 0


def bench_train(
    preset: str,
    settings: Mapping[str, Level],
    batch: int | None,
    image_size: int,
    steps: int | None,
    rounds: int,
    device_name: str,
    execution: ExecutionOptions,
    with_profile: bool,
    peer: Path | None,
    format: Format,
) -> int:
    """Prints the speed of a training beside the PyTorch baseline and beside bare steps, or the profile of a step."""
    device = torch_device(device_name)
    config, recipe = changed(network(preset), recipe_of(preset), settings)
    check_parts(recipe)
    name = ", ".join([preset, *(f"{path}={level_name(value)}" for path, value in settings.items())])
    if with_profile:
        with status(f"profiling {name}"):
            table, lines = profile_training(name, config, recipe, batch, image_size, steps, device, execution, notice)
        print(render(table, format, lines))
        return 0
    with status(f"training {name}"):
        where = image_size, steps, rounds, device, execution, notice, peer
        speed = measure_training(name, config, recipe, batch or 128, *where)
    if format == "json":
        print(speed.model_dump_json(indent=1))
        return 0
    print(render(training.rows(speed), format, training.notes(speed)))
    return 0
