"""The command line. Results go to stdout, progress and notices to stderr.

Exit status: 0 done, 1 some trial or certificate failed, 2 the input is wrong.
"""

import dataclasses
import json
import os
import signal
import sys
import tempfile
import tomllib
from collections.abc import Collection
from functools import partial
from pathlib import Path
from threading import Event
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import torch
import typer

from ablations import racing
from ablations.__main__ import INTERRUPTED
from ablations.engines import TrialFailed, by_architecture, planned_steps, run_local
from ablations.progress import StudyProgress, console, status
from ablations.records import Race, StudyDirectory, read_record
from ablations.rerun import finished_trial, train_again
from ablations.results import evidence, tables
from ablations.results import report as reports
from ablations.results.findings import find
from ablations.results.plots import accuracy_plot
from ablations.results.tables import render
from ablations.study import Cell, Level, Study, changed_recipe, level_name, load_study, shipped_studies
from ablations.training.contact_sheet import MOST_IMAGES, contact_sheet
from ablations.training.data import SOURCES, ImageData, load_data
from ablations.training.recipe import RECIPES
from ablations.training.splits import ResidentData
from ablations.training.trial import Trial
from ablations.verify import check_study
from model.cost import cost
from model.errors import InputError, unknown
from model.fast.execution import Execution, Means
from model.files import write_whole
from model.presets import PRESETS

if TYPE_CHECKING:
    from export.publish import Published
    from model.checkpoint import Checkpoint

stopped = Event()  # by the user

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
Compile = Annotated[
    str, typer.Option(help="torch.compile: auto (where a training is long enough to earn it), on or off.")
]
Kernels = Annotated[str, typer.Option(help="Triton kernels of ours: auto (on CUDA), on or off.")]
Graphs = Annotated[str, typer.Option(help="Steps as CUDA graphs: auto (on CUDA), on or off.")]


def main() -> None:
    """Runs the command line; input that is wrong is one line on stderr and exit status 2."""
    if sys.stdout is None:  # it was closed
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    sys.stdout.reconfigure(errors="replace")  # a terminal without the sign ± still gets its table
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop)
    try:
        status = app(sys.argv[1:] or ["--help"], standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:  # who read the output has gone, and there is nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except (typer.Abort, KeyboardInterrupt):
        status = INTERRUPTED
    except InputError as error:
        status = _complain(str(error), 2)
    except typer.BadParameter.__mro__[2] as error:  # click's ClickException, wherever typer keeps it
        status = _complain(error.format_message(), 2)
    except OSError as error:
        status = _complain(str(error), 1)
    if status == INTERRUPTED:
        goes_on = sys.argv[1:2] == ["run"]
        _complain("stopped; what was finished is kept" + ", and the same command goes on from there" * goes_on, status)
    sys.exit(status)


def _stop(signum: int, frame: FrameType | None) -> None:
    """What Ctrl-C does. Python drops an exception that it meets while it finalises an object, but not the event."""
    stopped.set()
    raise KeyboardInterrupt


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
    compile: Compile = "auto",
    kernels: Kernels = "auto",
    graphs: Graphs = "auto",
    until: Annotated[
        str | None, typer.Option(help="decided: a race, seeds are added to contrasts that are undecided.")
    ] = None,
    max_seeds: Annotated[int | None, typer.Option(help="The last seed of a race.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the trials, train nothing, write nothing.")] = False,
) -> int:
    """Train a study and print its table; an interrupted one goes on from where it was.

    Without STUDY: the study `quickstart`, and then export, certificate and latency of its best network, and the report.
    A race begins with the study's seeds.
    """
    asked = load_study("quickstart" if study is None else study).change(seeds, data, dict(map(_setting, set_ or [])))
    on = _device(device)
    execution = Execution(kernels, compile, graphs)
    execution.check(on)
    racing.check_options(until, max_seeds, asked)
    images = _read(asked.base.data, data_dir, asked.base.image_size)
    cells = asked.change(seeds=max_seeds).cells(images)
    directory = StudyDirectory(out or Path("runs") / asked.name)
    directory.check_holds(asked)
    begun = directory.race
    if begun and until is None:
        raise InputError(f"--out {directory.path}: holds a race; go on with --until decided --max-seeds {begun.last}")
    race = None
    if max_seeds is not None:
        trials = {trial.id for cell in cells for trial in cell.trials}
        seen = sum(any(directory.path.parent.glob(f"*/trials/{trial}/record.json")) for trial in trials)
        race = racing.begun(cells, asked, max_seeds, seen)
        if begun:
            racing.check_same(begun, race)
            race = begun
    if dry_run:
        print(_plan_table(asked, cells, images, directory, race))
        return 0
    hold_out = images.hold_out(asked.base.hold_out)
    console.print(f"{asked.question}\n{images.in_words(hold_out)}", soft_wrap=True)
    resident = ResidentData(images, on)
    counts = {cell.trials[0].id: asked.seeds for cell in cells}
    if begun:
        counts |= {cell.trials[0]: max(len(cell.trials), asked.seeds) for cell in directory.plan.cells}
    with directory.written(asked, images, racing.at(cells, counts), race):
        failed = _train(racing.at(cells, counts), resident, directory, execution)
        while race:
            rows = evidence.study_rows(directory)
            wanted = racing.next_look(rows, race, counts)
            console.print(racing.said(rows, race, wanted, counts), soft_wrap=True)
            if wanted == counts:
                break
            counts = wanted
            directory.write_plan(asked, images, racing.at(cells, counts), race)
            failed |= _train(racing.at(cells, counts), resident, directory, execution)
    status = 1 if failed else 0
    if study is None and not failed:
        status = export(directory.path, data_dir=data_dir)
        if status == 0:
            bench([directory.path / "export" / "model-uint8.onnx"])
        print()
    _show(directory)
    if study is None and status == 0:
        status = report(directory.path, data_dir=data_dir)
    return status


def _show(directory: StudyDirectory) -> None:
    """The study's question and table on stdout, and its picture in its directory."""
    rows = evidence.study_rows(directory)
    judgements = evidence.judge(rows, directory.study.margin, directory.plan.race)
    picture = directory.path / "accuracy.svg"
    write_whole(picture, accuracy_plot(directory.study.question, rows))
    print(f"{directory.study.question}\n")
    notes = tables.notes(directory, directory.plan, rows, judgements)
    print(render(tables.columns(rows, judgements), "text", notes))
    print(f"Picture: {picture}", flush=True)


def _train(cells: list[Cell], data: ResidentData, directory: StudyDirectory, execution: Execution) -> bool:
    """Trains what is not there yet; whether some trial failed."""
    trials = by_architecture([trial for cell in cells for trial in cell.trials])
    pending = [t for t in trials if directory.record(t.id) is None and not directory.adopt(t.id)]
    done_before = len(trials) - len(pending)
    console.print(f"{len(trials)} trials, {done_before} of them done before; {directory.path}", soft_wrap=True)
    device = data.device
    chosen = [
        execution.chosen(trial.model, planned_steps(trial, data.data.trained_on(trial.hold_out)), device)
        for trial in pending
    ]
    execution = _that_can_be(execution, chosen, device)
    progress = StudyProgress(cells, pending, data.data.image_size, done_before)
    failed = False
    with progress.live():
        for event in run_local(pending, data, directory, execution=execution):
            progress.show(event)
            failed |= isinstance(event, TrialFailed)
            if stopped.is_set():
                raise KeyboardInterrupt
    return failed


def _plan_table(study: Study, cells: list[Cell], data: ImageData, directory: StudyDirectory, race: Race | None) -> str:
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
        f"Data: {data.in_words(cells[0].trials[0].hold_out)}.",
        f"{len(different)} different trials in {directory.path}; nothing was trained or written.",
    ]
    if race:
        done = sum(directory.record(trial) is not None for trial in different)
        first = {trial.id for cell in cells for trial in cell.trials[: race.first]}
        notes.append(
            f"A race: {len(first)} of them at least, for the first look at {race.first} seeds, and at most all "
            f"{len(different)}, should every contrast go on to seed {race.last}; {done} are done."
        )
    return f"{study.question}\n\n{render(rows, 'text', notes)}"


def _read(source: str, data_dir: Path | None, image_size: int | None = None) -> ImageData:
    with status(f"reading {source}"):
        return load_data(source, data_dir, image_size)


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


def _that_can_be(execution: Execution, chosen: list[Means], device: torch.device) -> Execution:
    """What was asked for without what was chosen and cannot be used on the device, of which a notice says why."""
    execution, without = execution.usable(chosen, device)
    for text in without:
        console.print(f"trained without {text}", soft_wrap=True)
    return execution


@app.command()
def table(
    directories: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Study directories.")],
    format: Format = "text",
    by: Annotated[
        str | None, typer.Option(metavar="FACTOR[,FACTOR]", help="A row for each level: its mean and its effect.")
    ] = None,
    contrast: Annotated[
        tuple[str, str] | None, typer.Option(metavar="A B", help="Two cells: one test, in full.")
    ] = None,
    peek: Annotated[bool, typer.Option("--peek", help="What picking the best epoch and seed would claim.")] = False,
) -> int:
    """Print the table of one study, or of several together."""
    tables.check_format(format)
    if sum((by is not None, contrast is not None, peek)) > 1:
        raise InputError("--by, --contrast and --peek are different tables; give one of them")
    studies = [StudyDirectory(path) for path in directories]
    if contrast is not None:
        if len(studies) > 1:
            raise InputError(f"--contrast compares cells of one study; {len(studies)} were given")
        _show_contrast(studies[0], *contrast, format)
        return 0
    by_study = [evidence.study_rows(one) for one in studies]
    rows = [row for rows in by_study for row in rows]
    if by is not None:
        marginals = [evidence.marginals(one, by.split(",")) for one in studies]
        shown = [
            ({"study": evidence.study_name(one)} if len(studies) > 1 else {}) | row
            for one, found in zip(studies, marginals)
            for row in tables.marginal_columns(found)
        ]
        notes = _of_each(studies, [tables.marginal_notes(*both) for both in zip(studies, marginals)])
    elif peek:
        peeks = [evidence.peek(one, row) for one, found in zip(studies, by_study) for row in found]
        shown, notes = tables.peek_columns(rows, peeks), tables.PEEK_NOTES
    else:
        judged = [evidence.judge(found, one.study.margin, one.plan.race) for one, found in zip(studies, by_study)]
        shown = tables.columns(rows, [judgement for one in judged for judgement in one])
        three = zip(studies, by_study, judged)
        notes = _of_each(studies, [tables.notes(one, one.plan, found, verdicts) for one, found, verdicts in three])
    print(render(shown, format, notes))
    return 0


def _of_each(studies: list[StudyDirectory], notes: list[list[str]]) -> list[str]:
    """The notes of all studies, with their names where there are several."""
    return [
        (f"{evidence.study_name(one)}: " if len(studies) > 1 else "") + note
        for one, lines in zip(studies, notes)
        for note in lines
    ]


def _show_contrast(directory: StudyDirectory, first: str, second: str, format: tables.Format) -> None:
    rows = evidence.study_rows(directory)
    a, b = evidence.find_row(rows, first), evidence.find_row(rows, second)
    if a is b:
        raise InputError(f"--contrast: {first!r} and {second!r} are one cell")
    found = evidence.compare(directory, rows, a, b)
    splits, seeds = tables.comparison_columns(found)
    notes = tables.comparison_notes(found, directory.study.margin)
    names = {"A": evidence.row_name(a), "B": evidence.row_name(b)}
    if not seeds:
        raise InputError(f"--contrast: neither {names['A']} nor {names['B']} has a finished trial")
    if format == "json":
        tests, by_seed = (json.loads(render(table, "json")) for table in (splits, seeds))
        verdict = dataclasses.asdict(found.judgement)
        print(json.dumps({**names, "verdict": verdict, "splits": tests, "seeds": by_seed, "notes": notes}, indent=1))
    elif format == "csv":
        print(render(seeds, "csv"))
    else:
        titles = [("% " if format == "latex" else "") + f"{letter}: {name}" for letter, name in names.items()]
        print("\n".join([*titles, "", render(splits, format), "", render(seeds, format, notes)]))


@app.command("report")
def report(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A study directory.")],
    out: Annotated[Path | None, typer.Option(help="DIR/report.html, or the directory of the figures.")] = None,
    format: Annotated[str, typer.Option(help="html, pdf-figures, png-figures.")] = "html",
    data_dir: DataDir = None,
) -> int:
    """Write all that a study shows as one HTML file that needs nothing else, or its figures for a paper.

    The best network is run on the validation images; the test split is not read.
    """
    if format not in reports.FORMATS:
        raise unknown("format", format, reports.FORMATS)
    as_html = format == "html"
    out = out or directory / ("report.html" if as_html else "figures")
    if as_html and (out.suffix != ".html" or out.is_dir()):
        raise InputError(f"--out {out}: the name of an .html file is needed")
    if not as_html and out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: the name of a directory is needed, for {format}")
    with status("reading the study, and what its best network does on the validation images"):
        found = find(StudyDirectory(directory), data_dir)
    with status("drawing"):
        files = (
            {out: reports.html(found).encode()}
            if as_html
            else {
                out / name: content for name, content in reports.figures(found, format.removesuffix("-figures")).items()
            }
        )
    for file, content in files.items():
        _write_out("--out", file, content)
        print(file)
    return 0


def _write_out(option: str, file: Path, content: bytes) -> None:
    """Writes a file that `option` named. Raises InputError where it cannot be written."""
    try:
        write_whole(file, content)
    except OSError as error:
        raise InputError(f"{option} {file}: cannot be written: {error.strerror}") from None


@app.command()
def rerun(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A study directory.")],
    trial: Annotated[str, typer.Argument(metavar="ID", help="A trial of it, as the table and the ledger name them.")],
    data: Annotated[str | None, typer.Option(help="Source of the images, where it is no longer where it was.")] = None,
    data_dir: DataDir = None,
    device: Device = "auto",
    format: Format = "text",
) -> int:
    """Train one trial again, beside its record, and say whether it comes out the same.

    The record stays as it is. That the test split was read once more is entered in the ledger.
    """
    tables.check_format(format)
    on = _device(device)
    study = StudyDirectory(directory)
    asked, record = finished_trial(study, trial)
    images = _read(data or asked.source, data_dir, study.plan.image_size)
    with status(f"training trial {trial} again"):
        found = train_again(study, asked, record, ResidentData(images, on))
    if found.compared:
        rows = [dataclasses.asdict(one) for one in found.compared]
        if format != "json":
            rows = [row | {"same": "yes" if row["same"] else "no"} for row in rows]
        print(render(rows, format, [found.verdict]))
    else:
        print(found.verdict)
    return 0 if found.same else 1


@app.command()
def verify(directory: Annotated[Path, typer.Argument(metavar="DIR", help="A study directory.")]) -> int:
    """Recompute a study's numbers from what is kept beside them, and name each that does not fit."""
    from export.certificate import certificate_problem
    from export.graph import read_onnx

    found = check_study(StudyDirectory(directory))
    files = sorted((directory / "export").glob("*.onnx"))
    problems = list(found.problems)
    for file in files:
        try:
            problem = certificate_problem(read_onnx(file), file)
        except InputError as error:
            problem = str(error)
        problems += [f"export: {problem}"] if problem else []
    for line in [*problems, *found.skipped]:
        print(line)
    print(f"{directory}: {found.checked + len(files)} checks, {len(problems)} do not fit")
    return 1 if problems else 0


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
    from export.prune import pruned
    from export.publish import Images, Reference, publish
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
    beside = path.absolute().parents[2:3]
    ledger = directory or next((StudyDirectory(one) for one in beside if (one / "study.toml").exists()), None)
    name = f"model-{input}{'' if prune_gates is None else '-pruned'}.onnx"
    file = out or (directory.path / "export" if directory else path.parent) / name
    if file.is_dir() or file.suffix != ".onnx":
        raise InputError(f"--out {file}: the name of an .onnx file is needed")
    _check_room(file)
    checkpoint, trial = load(path), read_record(Trial, path.parent / "config.json")
    plan = ledger.plan if ledger else None
    source_of_data = data or (plan.source if plan else checkpoint.trained.data)
    read = _read(source_of_data, data_dir, plan.image_size if plan else None)
    found = read.classes, read.image_size, read.channels
    if found != (checkpoint.trained.classes, checkpoint.trained.image_size, checkpoint.config.in_chans):
        raise InputError(f"--data {read.source}: {read.name} has other classes or image sizes than {path} has")
    if trial is not None and read.fingerprint != trial.fingerprint:
        raise InputError(f"--data {read.source}: {read.name} has other images than {path} was trained on")
    hold_out, seed = (trial.hold_out, trial.seed) if trial else (read.hold_out(), 0)
    splits = ResidentData(read, torch.device("cpu")).splits(hold_out, seed)
    images = Images(**splits.arrays())
    if prune_gates is not None:
        checkpoint, said = pruned(checkpoint, images.validation, images.validation_labels, prune_gates)
        print(said)
    reference = Reference(checkpoint, images, input, prune_gates)
    passed = True
    for one in precisions:
        if ledger:
            ledger.enter_test_read(checkpoint.trained.trial, "export", len(read.test))
        try:
            with status(f"exporting {one}, and comparing with PyTorch on the test images"):
                published = publish(reference, one, fuse, wanted, providers)
        except PrecisionError as error:
            passed = False
            print(f"{one}: not exported: {error}")
            continue
        name = file if one == "fp32" else file.with_stem(f"{file.stem}-{one}")
        rows = evidence.study_rows(directory) if directory and prune_gates is None else []
        passed &= _write(published, name, checkpoint, read, trial, rows)
    return 0 if passed else 1


def _check_room(file: Path) -> None:
    """Raises InputError where a file cannot be written, before the work of making it."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        raise InputError(f"--out {file}: cannot be written: {error.strerror}") from None


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
    trial: Trial | None,
    rows: list[evidence.Row],
) -> bool:
    """Writes an exported model with its certificate and card; one that failed under another name. Whether it passed.

    `trial` is what was trained, where that is known, and `rows` are those among which the card finds it.
    """
    from export.card import card
    from export.graph import describe

    certificate, trained = published.certificate, checkpoint.trained
    if certificate.passed:
        row = [row for row in rows if any(record.trial == trained.trial for record in row.records)]
        text = card(
            describe(published.model, file.name),
            certificate,
            data_name=data.name,
            network=checkpoint.config.model_dump(mode="json"),
            data={"Images": data.in_words(data.hold_out())},
            recipe=trial.recipe.model_dump(mode="json") if trial else {},
            table_row=[(title, tables.shown(value)) for one in tables.columns(row) for title, value in one.items()],
        )
        write_whole(file.with_suffix(".md"), text.encode())
    kept = published.write(file)
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
    from export.graph import read_onnx
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
    from export.graph import describe, read_onnx
    from export.picture import draw

    if picture is not None and (picture.suffix != ".svg" or not picture.absolute().parent.is_dir()):
        raise InputError(f"--picture {picture}: the name of an .svg file in a directory that exists is needed")
    model = read_onnx(file)
    print(describe(model, str(file)))
    if picture is not None:
        _write_out("--picture", picture, draw(model, str(file)))
    return 0


def _best_checkpoint(directory: StudyDirectory) -> Path:
    row = evidence.best_row(evidence.study_rows(directory))
    if row is None:
        raise InputError(f"{directory.path}: no trial of this study is finished")
    return directory.checkpoint(evidence.best_record(row).trial)


@app.command("bench")
def bench(
    files: Annotated[list[Path], typer.Argument(metavar="FILE.onnx...", help="ONNX files, of any origin.")],
    provider: Annotated[str, typer.Option(help="cpu, cuda or tensorrt: it is used, or it is an error.")] = "cpu",
    batch: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "1,8,64",
    format: Format = "text",
    json: Annotated[Path | None, typer.Option(help="File for the whole record, with the time of each call.")] = None,
) -> int:
    """Measure latency in ONNX Runtime, next to PyTorch eager on the same inputs; several files take turns.

    The record of a file in a study's export folder is kept in its bench folder, where the study's table finds it.
    """
    from bench.latency import measure, rows

    tables.check_format(format)
    batches = _batches(batch)
    if json is not None and len(files) > 1:
        raise InputError(f"--json {json}: takes the record of one file; {len(files)} files were given")
    if json is not None and (json.suffix != ".json" or json.is_dir() or not json.absolute().parent.is_dir()):
        raise InputError(f"--json {json}: the name of a .json file in a directory that exists is needed")
    with status(f"measuring {', '.join(map(str, files))}"):
        records = measure(files, provider, batches)
    for file, record in zip(files, records):
        content = record.model_dump_json(indent=1).encode()
        study = file.resolve().parent.parent
        if record.trial and file.resolve().parent.name == "export" and (study / "study.toml").exists():
            write_whole(study / "bench" / f"{file.stem}-{provider}.json", content)
        if json is not None:
            _write_out("--json", json, content)
    note = f"{record.device}, {record.threads} threads; images/s from the mean of all calls."
    first = [f"x first: against {files[0].name} in ONNX Runtime at the same batch size."] if len(files) > 1 else []
    print(render(rows(records), format, [note, *first]))
    return 0


def _batches(text: str) -> list[int]:
    try:
        batches = [int(size) for size in text.split(",")]
    except ValueError:
        batches = [0]
    if min(batches) < 1 or max(batches) > 65_536:
        raise InputError(f"--batch {text!r}: whole numbers from 1 to 65536 are needed, separated by commas")
    return batches


@app.command("show-augment")
def show_augment(
    recipe: Annotated[str, typer.Argument(help="A recipe.")],
    out: Annotated[Path, typer.Option(help="The picture, a .png file.")],
    data: Annotated[str, typer.Option(help="Data source.")] = "digits",
    data_dir: DataDir = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="A change.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**31, help="Of all that is random, and of the images.")] = 0,
    images: Annotated[int, typer.Option(min=1, max=MOST_IMAGES, help="Number of images.")] = 8,
) -> int:
    """Draw train images as a recipe's epochs give them to the network, each beside its original."""
    if out.suffix != ".png" or out.is_dir() or not out.absolute().parent.is_dir():
        raise InputError(f"--out {out}: the name of a .png file in a directory that exists is needed")
    changed = changed_recipe(recipe, dict(map(_setting, set_ or [])))
    read = _read(data, data_dir)
    changed.check_fits(read, len(read.train))
    content = contact_sheet(changed, read, seed, images)
    _write_out("--out", out, content)
    print(out)
    return 0


@app.command("bench-train")
def bench_train(
    preset: Annotated[str, typer.Argument(help="A network; its report's recipe is used, or `fast`.")] = "eight_block",
    batch: Annotated[int, typer.Option(min=2, max=4096, help="Images in a batch.")] = 128,
    steps: Annotated[int | None, typer.Option(min=1, max=1000, help="Steps in a round; 2, or 100 on CUDA.")] = None,
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="Rounds of each, taken in turns.")] = 5,
    device: Device = "auto",
    compile: Compile = "auto",
    kernels: Kernels = "auto",
    graphs: Graphs = "auto",
    format: Format = "text",
) -> int:
    """Measure training, next to a PyTorch baseline of the same network and to bare steps on one batch.

    What is `auto` is decided as for a whole training by the recipe on 45,000 images.
    """
    from bench.training import measure_training, notes, rows

    tables.check_format(format)
    on, execution = _device(device), Execution(kernels, compile, graphs)
    with status(f"training {preset}"):
        notice = partial(console.print, soft_wrap=True)
        speed = measure_training(preset, batch, steps, rounds, on, execution, notice)
    if format == "json":
        print(speed.model_dump_json(indent=1))
        return 0
    print(render(rows(speed), format, notes(speed)))
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
