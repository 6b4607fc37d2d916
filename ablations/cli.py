"""The command line. Results go to stdout, progress and notices to stderr.

Exit status: 0 done, 1 some trial or certificate failed, 2 the input is wrong.
"""

import sys
import tomllib
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer

from ablations import tables
from ablations.data import SOURCES, ImageData, load_data
from ablations.engines import TrialFailed, by_architecture, cost, run_local
from ablations.plots import accuracy_plot
from ablations.progress import StudyProgress, console, status
from ablations.recipe import RECIPES, Recipe
from ablations.records import StudyDirectory, write_whole
from ablations.study import Cell, Level, Study, Trial, check_fit, level_name, load_study, shipped_studies
from ablations.tables import render
from ablations.train import start, train, uses_bfloat16
from model.errors import InputError, unknown
from model.presets import PRESETS, network

if TYPE_CHECKING:
    from export.publish import Published
    from model.checkpoint import Checkpoint

INTERRUPTED = 130  # as shells have it for Ctrl-C

app = typer.Typer(
    help="Ablations of soft-expert CNNs: run a study, read its table, export and time its best network.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

DataDir = Annotated[Path | None, typer.Option(help="Where torchvision's copy of CIFAR is, instead of a download.")]
Format = Annotated[str, typer.Option("--format", help=", ".join(tables.FORMATS))]
Device = Annotated[str, typer.Option(help="auto (CUDA where there is one), cpu, cuda, cuda:N or mps.")]


def main() -> None:
    """Runs the command line; input that is wrong is one line on stderr and exit status 2."""
    sys.stdout.reconfigure(errors="replace")  # a terminal without the sign ± still gets its table
    try:
        status = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except (typer.Abort, KeyboardInterrupt):
        status = INTERRUPTED
    except InputError as error:
        status = _complain(str(error), 2)
    except typer.BadParameter.__mro__[2] as error:  # click's ClickException, wherever typer keeps it
        status = _complain(error.format_message(), 2)
    except OSError as error:
        status = _complain(str(error), 1)
    if status == INTERRUPTED:
        _complain("stopped; what was finished is kept, and the same command goes on from there", status)
    sys.exit(status)


def _complain(message: str, status: int) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return status


@app.command()
def run(
    study: Annotated[str | None, typer.Argument(help="A shipped study, or the path of a TOML file.")] = None,
    data: Annotated[str | None, typer.Option(help="Data source, in place of the study's.")] = None,
    data_dir: DataDir = None,
    seeds: Annotated[int | None, typer.Option(help="Number of seeds, in place of the study's.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="A change to the base.")] = None,
    out: Annotated[Path | None, typer.Option(help="Study directory; runs/STUDY where not given.")] = None,
    device: Device = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the trials, train nothing, write nothing.")] = False,
) -> int:
    """Train a study and print its table; an interrupted one goes on from where it was.

    Without STUDY: the study `quickstart`, and then export, certificate and latency of its best network.
    """
    asked = load_study(study or "quickstart").change(seeds, data, dict(map(_setting, set_ or [])))
    on = _device(device)
    directory = StudyDirectory(out or Path("runs") / asked.name)
    directory.check_holds(asked)
    images = _read(asked.base.data, data_dir)
    cells = asked.cells(images)
    if dry_run:
        print(_plan_table(asked, cells, images, directory))
        return 0
    console.print(f"{asked.question}\n{images}", soft_wrap=True)
    with directory.written(asked, images, cells):
        failed = _train(cells, images.to(on), directory)
    status = 1 if failed else 0
    if study is None and not failed:
        status = export(directory.path, data_dir=data_dir)
        if status == 0:
            bench([directory.path / "export" / "model-uint8.onnx"])
        print()
    _show(directory)
    return status


def _show(directory: StudyDirectory) -> None:
    """The study's question and table on stdout, and its picture in its directory."""
    rows = tables.study_rows(directory)
    picture = directory.path / "accuracy.svg"
    write_whole(picture, accuracy_plot(directory.study.question, rows))
    print(f"{directory.study.question}\n")
    print(render(tables.columns(rows), "text", tables.notes(directory, directory.plan, rows)))
    print(f"Picture: {picture}", flush=True)


def _train(cells: list[Cell], data: ImageData, directory: StudyDirectory) -> bool:
    """Trains what is not there yet; whether some trial failed."""
    trials = by_architecture([trial for cell in cells for trial in cell.trials])
    pending = [t for t in trials if directory.record(t.id) is None and not directory.adopt(t.id)]
    done_before = len(trials) - len(pending)
    console.print(f"{len(trials)} trials, {done_before} of them done before; {directory.path}", soft_wrap=True)
    progress = StudyProgress(cells, pending, data.image_size, done_before)
    failed = False
    with progress.live():
        for event in run_local(pending, data, directory):
            progress.show(event)
            failed |= isinstance(event, TrialFailed)
    return failed


def _plan_table(study: Study, cells: list[Cell], data: ImageData, directory: StudyDirectory) -> str:
    rows = []
    for cell in cells:
        parameters, macs = cost(cell.trials[0].model, *data.image_size)
        done = sum(directory.record(trial.id) is not None for trial in cell.trials)
        recipe = cell.trials[0].recipe
        levels = {name: level_name(level) for name, level in cell.levels.items()}
        row = {"model": cell.model_name, **levels, "first trial": cell.trials[0].id, "seeds": len(cell.trials)}
        rows.append(row | {"done": done, "epochs": recipe.epochs, "params": parameters, "MACs": macs})
    different = {trial.id for cell in cells for trial in cell.trials}
    notes = [
        f"Data: {data}.",
        f"{len(different)} different trials in {directory.path}; nothing was trained or written.",
    ]
    return f"{study.question}\n\n{render(rows, 'text', notes)}"


def _read(source: str, data_dir: Path | None) -> ImageData:
    with status(f"reading {source}"):
        return load_data(source, data_dir)


def _setting(text: str) -> tuple[str, Level]:
    path, equals, value = text.partition("=")
    if not equals or not path:
        raise InputError(f"--set {text!r}: PATH=VALUE is needed, as in recipe.epochs=1")
    try:
        return path, tomllib.loads(f"value = {value}")["value"]
    except (ValueError, RecursionError):
        return path, value  # a plain word needs no quotes


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    there = ["cpu", *(["cuda"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]) * torch.cuda.is_available()]
    there += ["mps"] * torch.backends.mps.is_available()
    if name not in there:
        raise unknown("device", name, ["auto", *there])
    return torch.device(name)


@app.command()
def table(
    directories: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Study directories.")],
    format: Format = "text",
    by: Annotated[str | None, typer.Option(help="A factor: a row for each of its levels, over all others.")] = None,
) -> int:
    """Print the table of one study, or of several together."""
    tables.check_format(format)
    studies = [StudyDirectory(path) for path in directories]
    if by is not None:
        rows = [
            ({"study": tables.study_name(one)} if len(studies) > 1 else {}) | row
            for one in studies
            for row in tables.marginal_rows(one, by)
        ]
        print(render(rows, format, ["Means over the cells of each level, for each seed; ± as in the whole table."]))
        return 0
    by_study = [tables.study_rows(one) for one in studies]
    notes = [
        (f"{tables.study_name(one)}: " if len(studies) > 1 else "") + note
        for one, rows in zip(studies, by_study)
        for note in tables.notes(one, one.plan, rows)
    ]
    print(render(tables.columns([row for rows in by_study for row in rows]), format, notes))
    return 0


@app.command("export")
def export(
    source: Annotated[Path, typer.Argument(metavar="DIR|CHECKPOINT", help="A study directory, or model.safetensors.")],
    input: Annotated[
        str, typer.Option(help="uint8 (raw pixels, B x H x W x C) or float (normalised, B x C x H x W).")
    ] = "uint8",
    precision: Annotated[str, typer.Option(help="fp32, fp16, int8, or all: a file of each.")] = "fp32",
    outputs: Annotated[str, typer.Option(help="logits, with probabilities and gates where they are named.")] = "logits",
    fuse: Annotated[bool, typer.Option(help="Rewrite for speed, or export the graph as trained.")] = True,
    prune_gates: Annotated[
        float | None, typer.Option(min=0, max=1, help="Drop experts that stay under this weight: another function.")
    ] = None,
    provider: Annotated[str, typer.Option(help="Providers to certify on, separated by commas.")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="The ONNX file; a study's is in its export folder.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Source of the test images, where it is no longer where it was.")
    ] = None,
    data_dir: DataDir = None,
) -> int:
    """Write a network as ONNX, once ONNX Runtime agreed with PyTorch on every test image.

    Of a study: the trial that is best on the validation split, of the cell that is. Beside the file: its certificate,
    and a model card.
    """
    from export.certificate import BOUNDS
    from export.precision import PrecisionError
    from export.publish import Images, pruned, publish
    from export.session import check_provider
    from export.to_onnx import OUTPUTS
    from model.checkpoint import load

    precisions = _chosen("precision", list(BOUNDS) if precision == "all" else [precision], BOUNDS)
    wanted = _chosen("output", outputs.split(","), OUTPUTS)
    providers = provider.split(",")
    _chosen("input", [input], ("uint8", "float"))
    for name in providers:
        check_provider(name)
    directory = StudyDirectory(source) if source.is_dir() else None
    path = _best_checkpoint(directory) if directory else source
    file = out or (directory.path / "export" if directory else path.parent) / f"model-{input}.onnx"
    if file.is_dir() or file.suffix != ".onnx":
        raise InputError(f"--out {file}: the name of an .onnx file is needed")
    checkpoint = load(path)
    read = _read(data or checkpoint.trained.data, data_dir)
    found = read.classes, read.image_size, read.channels
    if found != (checkpoint.trained.classes, checkpoint.trained.image_size, checkpoint.config.in_chans):
        raise InputError(f"--data {read.source}: {read} are not what {path} was trained on")
    images = Images(
        train=read.train.pixels_BHWC.numpy(),
        validation=read.validation.pixels_BHWC.numpy(),
        validation_labels=read.validation.labels_B.numpy(),
        test=read.test.pixels_BHWC.numpy(),
        test_labels=read.test.labels_B.numpy(),
    )
    if prune_gates is not None:
        checkpoint, said = pruned(checkpoint, images, prune_gates)
        print(said)
    passed = True
    for one in precisions:
        if directory:
            directory.enter_test_read(checkpoint.trained.trial, "export", len(read.test))
        try:
            with status(f"exporting {one}, and comparing with PyTorch on the test images"):
                published = publish(checkpoint, images, input, one, fuse, wanted, providers)
        except PrecisionError as error:
            passed = False
            print(f"{one}: not exported: {error}")
            continue
        name = file if one == "fp32" else file.with_stem(f"{file.stem}-{one}")
        rows = tables.study_rows(directory) if directory and prune_gates is None else []
        passed &= _write(published, name, checkpoint, read, path, rows)
    return 0 if passed else 1


def _chosen(what: str, found: list[str], accepted: Collection[str]) -> list[str]:
    for name in found:
        if name not in accepted:
            raise unknown(what, name, accepted, ", all" if what == "precision" else "")
    return found


def _write(
    published: "Published",
    file: Path,
    checkpoint: "Checkpoint",
    data: ImageData,
    source: Path,
    rows: list[tables.Row],
) -> bool:
    """Writes an exported model with its certificate and card; one that failed under another name. Whether it passed.

    `source` is the checkpoint's file, and `rows` are those among which the card finds that of the trial.
    """
    from export.card import card
    from export.graph import describe

    certificate, trained = published.certificate, checkpoint.trained
    kept = file if certificate.passed else file.with_suffix(".rejected.onnx")
    write_whole(kept.with_suffix(".certificate.json"), certificate.to_bytes())
    if certificate.passed:
        row = [row for row in rows if any(record.trial == trained.trial for record in row.records)]
        config = source.parent / "config.json"
        trial = Trial.model_validate_json(config.read_bytes()) if config.exists() else None
        text = card(
            describe(published.model, file.name),
            certificate,
            data_name=data.name,
            network=checkpoint.config.model_dump(mode="json"),
            data={"Images": str(data)},
            recipe=trial.recipe.model_dump(mode="json") if trial else {},
            table_row=[(title, tables.shown(value)) for one in tables.columns(row) for title, value in one.items()],
        )
        write_whole(file.with_suffix(".md"), text.encode())
    write_whole(kept, published.model)
    floats = f"; {len(published.kept_in_float)} nodes stay in float" if published.kept_in_float else ""
    size = f"{len(published.model):,} bytes"
    print(f"{kept}: {trained.model}, trial {trained.trial}, {size}{floats}, {certificate}", flush=True)
    return certificate.passed


@app.command("predict")
def predict(
    file: Annotated[Path, typer.Argument(metavar="FILE.onnx", help="A file that `export` wrote.")],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files of any size.")],
    top: Annotated[int, typer.Option(min=1, help="How many classes to show for each image.")] = 3,
    provider: Annotated[str, typer.Option(help="cpu, cuda or tensorrt: it is used, or it is an error.")] = "cpu",
    format: Format = "text",
) -> int:
    """Show what an exported network takes images for, with its probabilities."""
    from bench.latency import read_onnx
    from export.predict import predict

    tables.check_format(format)
    predictions = predict(read_onnx(file), str(file), images, provider)
    rows = [
        {"image": str(one.path), "class": name, "probability": probability}
        for one in predictions
        for name, probability in one.classes[:top]
    ]
    print(render(rows, format))
    return 0


@app.command("show-model")
def show_model(
    file: Annotated[Path, typer.Argument(metavar="FILE.onnx", help="An ONNX file, of any origin.")],
    picture: Annotated[Path | None, typer.Option(help="File for a picture of the graph, as SVG.")] = None,
) -> int:
    """Show an ONNX file's input, output, operators, size, MACs and metadata."""
    from bench.latency import read_onnx
    from export.graph import describe, draw

    if picture is not None and (picture.suffix != ".svg" or not picture.absolute().parent.is_dir()):
        raise InputError(f"--picture {picture}: the name of an .svg file in a directory that exists is needed")
    model = read_onnx(file)
    print(describe(model, str(file)))
    if picture is not None:
        write_whole(picture, draw(model, str(file)))
    return 0


def _best_checkpoint(directory: StudyDirectory) -> Path:
    row = tables.best_row(tables.study_rows(directory))
    if row is None:
        raise InputError(f"{directory.path}: no trial of this study is finished")
    return directory.checkpoint(tables.best_record(row).trial)


@app.command("bench")
def bench(
    files: Annotated[list[Path], typer.Argument(metavar="FILE.onnx...", help="ONNX files, of any origin.")],
    provider: Annotated[str, typer.Option(help="cpu, cuda or tensorrt: it is used, or it is an error.")] = "cpu",
    batch: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "1,8,64",
    format: Format = "text",
    json: Annotated[Path | None, typer.Option(help="File for the whole record, with the time of each call.")] = None,
) -> int:
    """Measure latency in ONNX Runtime, next to PyTorch eager on the same inputs.

    The record of a file in a study's export folder is kept in its bench folder, where the study's table finds it.
    """
    from bench.latency import measure, read_onnx, rows
    from export.session import check_provider

    tables.check_format(format)
    batches = _batches(batch)
    if json is not None and len(files) > 1:
        raise InputError(f"--json {json}: takes the record of one file; {len(files)} files were given")
    if json is not None and (json.suffix != ".json" or json.is_dir() or not json.absolute().parent.is_dir()):
        raise InputError(f"--json {json}: the name of a .json file in a directory that exists is needed")
    check_provider(provider)
    for file in files:
        read_onnx(file)
    shown = []
    for file in files:
        with status(f"measuring {file}"):
            record = measure(file, provider, batches)
        content = record.model_dump_json(indent=1).encode()
        study = file.resolve().parent.parent
        if record.trial and file.resolve().parent.name == "export" and (study / "study.toml").exists():
            write_whole(study / "bench" / f"{file.stem}-{provider}.json", content)
        if json is not None:
            write_whole(json, content)
        shown += rows(record)
    print(render(shown, format, [f"{record.device}, {record.threads} threads; images/s from the mean of all calls."]))
    return 0


def _batches(text: str) -> list[int]:
    try:
        batches = [int(size) for size in text.split(",")]
    except ValueError:
        batches = [0]
    if min(batches) < 1 or max(batches) > 65_536:
        raise InputError(f"--batch {text!r}: whole numbers from 1 to 65536 are needed, separated by commas")
    return batches


@app.command("bench-train")
def bench_train(
    preset: Annotated[str, typer.Argument(help="A network; its report's recipe is used, or `fast`.")] = "eight_block",
    batch: Annotated[int, typer.Option(min=2, max=4096, help="Images in a batch.")] = 128,
    steps: Annotated[int, typer.Option(min=1, max=100, help="Steps in a round.")] = 4,
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="Rounds of each, taken in turns.")] = 7,
    device: Device = "auto",
    format: Format = "text",
) -> int:
    """Measure what the training loop adds to bare forward, backward and optimiser steps."""
    from bench.training import bare_round, compare

    tables.check_format(format)
    on = _device(device)
    recipe = RECIPES.get(preset, RECIPES["fast"])
    recipe = Recipe(**{**dict(recipe), "batch_size": batch, "epochs": rounds + 1})
    images = ImageData.random(train=batch * steps, height=32, width=32).to(on)
    config = network(preset)
    check_fit(preset, config, images)
    trial = Trial(model_name=preset, model=config, recipe=recipe, source="random", fingerprint="random", seed=0)
    training, bare = start(trial, images), start(trial, images)
    mean_C, std_C = (torch.tensor(values, device=on) for values in recipe.mean_std(images))
    x_BCHW = recipe.augment(images.train.pixels_BHWC[:batch], mean_C, std_C, torch.Generator(on))
    y_B = images.train.labels_B[:batch]
    amp = uses_bfloat16(recipe, on)
    epochs = train(trial, images, training)
    speed = compare(
        preset, str(on), batch, steps, rounds,
        loop=lambda: next(epochs).train_seconds,
        bare=lambda: bare_round(bare.net.train(), bare.optimizer, x_BCHW, y_B, steps, amp),
    )  # fmt: skip
    if format == "json":
        print(speed.model_dump_json(indent=1))
        return 0
    row = {
        "model": preset,
        "batch": batch,
        "loop images/s": speed.images_per_s,
        "bare images/s": speed.bare_images_per_s,
        "overhead %": speed.overhead_percent,
    }
    print(render([row], format, [f"{on}, {torch.get_num_threads()} threads, {'bf16' if amp else 'fp32'}."]))
    return 0


@app.command("list")
def list_(
    what: Annotated[str, typer.Argument(help="models, recipes, studies or data")],
    format: Format = "text",
) -> int:
    """Show the networks, recipes, studies or data sources that there are."""
    tables.check_format(format)
    lists = {"models": _models, "recipes": _recipes, "studies": _studies, "data": _sources}
    if what not in lists:
        raise unknown("list", what, lists)
    print(render(lists[what](), format))
    return 0


def _models() -> list[dict[str, object]]:
    rows = []
    for name, config in PRESETS.items():
        parameters, macs = cost(config, 32, 32)
        counts = sorted({len(block.kernels) for block in config.blocks()})
        gates = sorted({block.gate.kind for block in config.blocks() if block.gate})
        row = {
            "model": name,
            "blocks": len(list(config.blocks())),
            "K": ", ".join(map(str, counts)),
            "gate": ", ".join(gates),
        }
        rows.append(row | {"params": parameters, "MACs at 32x32": macs})
    return rows


def _recipes() -> list[dict[str, object]]:
    fields = ("epochs", "batch_size", "opt", "lr", "weight_decay", "sched", "hflip", "crop_padding", "cutout")
    return [{"recipe": name} | {field: str(getattr(one, field)) for field in fields} for name, one in RECIPES.items()]


def _studies() -> list[dict[str, object]]:
    studies = [load_study(name) for name in shipped_studies()]
    return [
        {"study": s.name, "data": s.base.data, "cells": len(s.settings()), "seeds": s.seeds, "question": s.question}
        for s in studies
    ]


def _sources() -> list[dict[str, object]]:
    return [{"data": source, "what": what} for source, what in SOURCES.items()]
