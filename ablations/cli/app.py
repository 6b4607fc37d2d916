"""The commands and their options. Each imports what it does inside, so that help appears at once.

What can be checked without PyTorch is checked before it is imported.
"""

import io
import os
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer import Argument, Option
from typer.core import TyperCommand, TyperGroup

from expertgrid.ablations.cli import options
from expertgrid.model.system.errors import InputError

LONGEST_LINE = 100  # characters of a command's first sentence in the list of commands
LONGEST_LIST = 6  # options of a command whose help has them in one list
PANELS = {  # parts of a longer list of options, by the names of their parameters
    "Study": "data data_dir seeds first_seed set_ until max_seeds modules adopt extend",
    "Machine": "device compile kernels graphs deterministic isolate jobs timing engine address gpus_per_trial "
    "cpus_per_trial provider",
    "Failures": "trial_timeout fail_fast",
    "Exported file": "input precision outputs fuse prune_gates",
    "Measurement": "tune batch image_size steps rounds seconds profile front peers peer",
    "Comparison": "fail_if_slower baseline across_machines",
    "Output": "out format json notes rows track to dry_run",
}


class Command(TyperCommand):
    """Help that shows a long list of options in PANELS. An option of none of them is among the last."""

    def format_options(self, ctx: Any, formatter: Any) -> None:  # of click's classes, which Typer may keep for itself
        panels: dict[str, list[Any]] = {title: [] for title in ("Arguments", *PANELS, "Options")}
        params = self.get_params(ctx)
        is_long = sum(param.param_type_name == "option" for param in params) > LONGEST_LIST
        for param in params:
            title = next((title for title in PANELS if is_long and param.name in PANELS[title].split()), "Options")
            panels["Arguments" if param.param_type_name == "argument" else title].append(param.get_help_record(ctx))
        for title in filter(panels.get, panels):
            with formatter.section(title):
                formatter.write_dl(panels[title])


class Grouped(TyperGroup):
    """Help that lists the commands under the titles that `rich_help_panel` gives them."""

    def get_params(self, ctx: Any) -> list[Any]:
        """With defaults that are bools already: for any other, Typer imports pydantic to make it one."""
        params = super().get_params(ctx)
        for param in params:
            param.default = False
        return params

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        panels: dict[str | None, list[tuple[str, str]]] = {}
        for name in self.list_commands(ctx):
            command = self.get_command(ctx, name)
            assert isinstance(command, TyperCommand)  # this app has no groups of commands
            panels.setdefault(command.rich_help_panel, []).append((name, command.get_short_help_str(LONGEST_LINE)))
        for title, rows in panels.items():
            with formatter.section(title):
                formatter.write_dl(rows)


app = typer.Typer(
    cls=Grouped,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
TRAIN, RESULTS, NETWORKS, SPEED, LISTS = "Train", "Read results", "Use a trained network", "Measure speed", "Look up"

Format = Annotated[Literal["text", "github", "latex", "csv", "json"], Option(help="Format of the table.")]
Switch = Literal["auto", "on", "off"]
Data = Annotated[str | None, Option(metavar="SOURCE", help="Read the images from this source, if they were moved.")]
DataDir = Annotated[
    Path | None,
    Option(metavar="DIR", help="Folder that has torchvision's CIFAR-10 or CIFAR-100. Nothing is downloaded."),
]
Device = Annotated[
    str, Option(help=f"{options.DEVICES}. auto takes CUDA where there is any.", callback=options.device_word)
]
Compile = Annotated[Switch, Option(help="Use torch.compile. auto: where the training is long enough to gain from it.")]
Kernels = Annotated[Switch, Option(help="Use fused Triton kernels. auto: on CUDA.")]
Graphs = Annotated[Switch, Option(help="Record training steps as CUDA graphs. auto: on CUDA.")]
Set = Annotated[
    list[str] | None, Option("--set", metavar="PATH=VALUE", help="Change a value, as in recipe.epochs=4. Repeatable.")
]
IMPORT = "Import your module that registers networks, or parts of a training. Repeatable."
Import = Annotated[
    list[str] | None, Option("--import", metavar="MODULE|FILE.py", help=IMPORT, callback=options.module_names)
]
Metric = Annotated[
    str | None, Option(metavar="NAME[:MARGIN]", help="Read it by another metric: auroc, or cross_entropy:0.01.")
]
TRACKER = "NAME[:URI]"
TRACKERS = f"{', '.join(options.TRACKERS)}. Repeatable"
StudyDir = Annotated[Path, Argument(metavar="DIR", help="Study directory.", callback=options.study_directory)]
DamagedDir = Annotated[Path, Argument(metavar="DIR", help="Study directory.", callback=options.study_remains)]
OnnxFile = Annotated[Path, Argument(metavar="FILE.onnx", help="ONNX file.", callback=options.readable)]


def _completed(kind: Literal["studies", "recipes", "cells"]) -> Callable[[Any, str], list[str]]:
    """What completes a word in the shell."""

    def names(ctx: Any, incomplete: str) -> list[str]:
        from expertgrid.ablations.cli.lists import names

        # directories are in `args` where an option has no value yet
        return [name for name in names(kind, ctx.params.get("directories") or ctx.args) if name.startswith(incomplete)]

    return names


@contextmanager
def _starting(modules: Sequence[str] | None = None, text: str = "starting: loading PyTorch") -> Generator[None]:
    """For the imports of a command, which take seconds: says so on a terminal. Then the user's modules are imported."""
    from expertgrid.ablations.cli.sources import import_modules
    from expertgrid.ablations.cli.terminal import status

    with status(text):
        yield
    import_modules(modules or [])


def _version(wanted: bool) -> None:
    if wanted:
        import expertgrid

        print(f"expertgrid {expertgrid.__version__}")
        raise typer.Exit


@app.callback()
def expertgrid(
    version: bool = Option(False, "--version", help="Show the version.", callback=_version, is_eager=True),
) -> None:
    """Ablations of soft-expert CNNs: train a study, read its table, export and time its best network."""


@app.command(cls=Command, rich_help_panel=TRAIN)
def run(
    study: str | None = Argument(None, help="Shipped study, or your TOML file.", autocompletion=_completed("studies")),
    data: str | None = Option(None, metavar="SOURCE", help="Data source, instead of the study's."),
    data_dir: DataDir = None,
    seeds: int | None = Option(None, metavar="N", help="Number of seeds, instead of the study's."),
    first_seed: int | None = Option(None, metavar="N", min=0, help="First seed. Unused seeds make a fresh study."),
    set_: Set = None,
    out: Path | None = Option(None, metavar="DIR", help="Study directory. Default: runs/STUDY."),
    device: Device = "auto",
    compile: Compile = "auto",
    kernels: Kernels = "auto",
    graphs: Graphs = "auto",
    until: Literal["decided"] | None = Option(None, help="Race: add seeds while a verdict is open. Needs --max-seeds."),
    max_seeds: int | None = Option(None, metavar="N", help="Number of seeds at which a race ends."),
    modules: Import = None,
    adopt: bool = Option(True, help="Take over finished trials from the studies beside this one."),
    extend: bool = Option(False, "--extend", help="Add levels or baselines after results. Exploratory from there on."),
    trial_timeout: float | None = Option(None, min=1, metavar="S", help="Fail a trial that runs longer than this."),
    deterministic: bool = Option(False, "--deterministic", help="Train bit for bit the same on a GPU too. Slower."),
    fail_fast: bool = Option(False, "--fail-fast", help="Stop at the first trial that fails."),
    isolate: bool = Option(True, envvar="EXPERTGRID_ISOLATE", help="Train in processes: a crash fails one trial only."),
    jobs: str = Option("auto", metavar="N|auto", help="Trials at once. auto: by the cores of a CPU, 1 on each GPU."),
    engine: Literal["local", "ray"] = Option("local", help="Train on this machine, or on a Ray cluster."),
    address: str | None = Option(None, metavar="auto|HOST:PORT", help="Ray cluster. auto: RAY_ADDRESS, or a new one."),
    gpus_per_trial: float | None = Option(None, min=0, max=1, metavar="SHARE", help="GPU share of a trial on Ray."),
    cpus_per_trial: int | None = Option(None, min=1, metavar="N", help="CPUs for a trial on Ray. Default: 1."),
    timing: bool = Option(True, help="Time each cell alone at the end, after trials that were trained at once."),
    track: list[str] | None = Option(None, metavar=TRACKER, help=f"Show it in {TRACKERS}.", callback=options.trackers),
    dry_run: bool = Option(False, "--dry-run", help="Show the trials and their costs. Nothing is trained."),
) -> int:
    """Train a study and print its tables.

    The same command continues a study that was stopped. Without STUDY, the study `quickstart` is trained, its best
    network is exported and timed, and a report is written. A race begins with the study's seeds.
    """
    settings = options.settings(set_ or [])
    options.refuse(
        (trial_timeout is not None and not isolate, f"--trial-timeout: {options.NOT_ISOLATED}"),
        (jobs not in ("auto", "1") and not isolate, f"--jobs {jobs}: {options.NOT_ISOLATED}"),
    )
    at_once = None if jobs == "auto" else options.whole("--jobs", jobs, most=256)
    of_ray = {"--address": address, "--gpus-per-trial": gpus_per_trial, "--cpus-per-trial": cpus_per_trial}
    options.check_engine(engine, of_ray, {"--jobs": at_once, "--no-isolate": None if isolate else "given"})
    with _starting(text="starting"):
        from expertgrid.ablations.cli import plan, sources
    sources.import_modules(modules or [])  # first: it registers variants, which the study may name
    name = "quickstart" if study is None else study
    request = plan.read_request(name, seeds, first_seed, data, settings, out, until, max_seeds, extend)
    after_s = 0.0 if study else sum(plan.QUICKSTART.values())
    if dry_run:
        from expertgrid.ablations.engines.isolation import Setup, device_of, jobs_for
        from expertgrid.model.fast.execution import ExecutionOptions

        planned, begin = plan.plan_run(request, data_dir), partial(sources.import_modules, modules or [])
        execution, many = ExecutionOptions(kernels, compile, graphs), at_once or jobs_for(device)
        setup = Setup(planned.data, device_of(device), Path(), begin, execution, deterministic, at_once=many)
        print(plan.plan_table(planned, setup if engine == "local" else None, timing, after_s))
        return 0
    with ExitStack() as resources:
        trainer = None
        if engine == "ray":
            with _starting(text="starting Ray"):
                from expertgrid.ablations.engines.ray import ray_engine

                needs = cpus_per_trial or 1, gpus_per_trial
                trainer = resources.enter_context(ray_engine(address or "auto", *needs, device, modules or []))
        elif isolate:
            from expertgrid.ablations.engines.isolation import isolated, jobs_for

            trainer = resources.enter_context(isolated(at_once or jobs_for(device), device))  # imports PyTorch beside
        with _starting():
            from expertgrid.ablations.cli.run import How, say_failures, show_study, train_study
            from expertgrid.model.fast.execution import ExecutionOptions
        execution = ExecutionOptions(kernels, compile, graphs)
        how = How(
            device, execution, adopt, fail_fast, trial_timeout, modules or [], deterministic, trainer, track or [],
            timing,
        )  # fmt: skip
        failed = train_study(request, data_dir, how, after_s)
        if study is None and not failed:
            from expertgrid.ablations.cli.quickstart import quickstart

            return quickstart(request.directory, data_dir, how.track)
        show_study(request.directory)
        return say_failures(request.directory, failed)


@app.command(cls=Command, rich_help_panel=TRAIN)
def new(
    file: Path = Argument(metavar="FILE.toml", help="File to write.", callback=options.file_named("FILE", ".toml")),
    model: str = Option("two_block", help="Preset, or timm model."),
    recipe: str = Option("fast", help="Recipe, as `list recipes` names it.", autocompletion=_completed("recipes")),
    data: str = Option("digits", metavar="SOURCE", help="Data source."),
    image_size: int | None = Option(None, min=1, metavar="N", help="Bring all images to N x N pixels."),
    modules: Import = None,
) -> int:
    """Write a study file with comments, to be changed in an editor.

    Beside it lies study.schema.json, by which editors complete and check it.
    """
    with _starting(modules, "starting"):
        from expertgrid.ablations.cli.new import new
    return new(file, {"model": model, "recipe": recipe, "data": data, "image_size": image_size}, modules or [])


@app.command(cls=Command, rich_help_panel=TRAIN)
def rerun(
    directory: StudyDir,
    trial: str = Argument(metavar="ID", help="Trial, as the table and the ledger name it."),
    data: Data = None,
    data_dir: DataDir = None,
    device: Device = "auto",
    modules: Import = None,
    format: Format = "text",
) -> int:
    """Train one trial again, and compare it with its record.

    The record stays as it is. The ledger gets a line, because the test split is read once more.
    """
    with _starting(text="starting"):
        from expertgrid.ablations.cli.rerun import rerun
    return rerun(directory, trial, data, data_dir, device, modules or [], format)


@app.command(cls=Command, rich_help_panel=RESULTS)
def table(
    directories: list[Path] = Argument(metavar="DIR...", help="Study directories.", callback=options.study_directory),
    format: Literal["text", "github", "latex", "csv", "json", "parquet"] = Option(
        "text", help="Format. csv: all tables in one, by its column `table`, or those of --rows. parquet: of --rows."
    ),
    by: str | None = Option(None, metavar="FACTOR[,FACTOR]", help="Show one row per level of these factors."),
    contrast: tuple[str, str] | None = Option(
        None, metavar="A B", help="Compare two cells in detail.", autocompletion=_completed("cells")
    ),
    peek: bool = Option(False, "--peek", help="Show what the best epoch and seed would claim."),
    metric: Metric = None,
    notes: bool = Option(False, "--notes", help="Show all notes, not just three below each table."),
    methods: bool = Option(False, "--methods", help="Print the paragraph for a paper instead: what was done."),
    rows: Literal["trials", "cells", "effects", "epochs", "predictions"] | None = Option(
        None, help="Show these as one table for other programs, as `expertgrid.open` gives them."
    ),
    out: Path | None = Option(None, metavar="FILE", help="File to write, of --rows."),
) -> int:
    """Print the table of one study or several."""
    others = len(directories) > 1 or by or contrast or peek or notes or methods
    options.refuse(
        (format == "parquet" and not (rows and out), "--format parquet: needs --rows and --out FILE"),
        (out and not rows, "--out: is for --rows"),
        (rows and others, "--rows: is for one study, without --by, --contrast, --peek, --notes and --methods"),
        (methods and (by or contrast or peek or format != "text"), "--methods: is text, in place of all tables"),
    )
    with _starting(text="starting"):
        from expertgrid.ablations.cli import results
    if rows or format == "parquet":
        return results.rows(directories[0], str(rows), format, out, metric)
    if methods:
        return results.methods(directories, metric)
    return results.table(directories, format, by, contrast, peek, notes, metric)


@app.command(cls=Command, rich_help_panel=RESULTS)
def judge(
    file: Path = Argument(metavar="SCORES.csv", help="Columns: factors, seed, score.", callback=options.readable),
    margin: float = Option(metavar="X", help="The difference that matters, in the unit of the scores."),
    lower_is_better: bool = Option(False, "--lower-is-better", help="A lower score is better, as of a loss."),
    format: Format = "text",
    notes: bool = Option(False, "--notes", help="Show all notes, not just three below each table."),
) -> int:
    """Print the verdicts on scores that were made elsewhere."""
    with _starting(text="starting"):
        from expertgrid.ablations.cli import results
    return results.judge(file, margin, lower_is_better, format, notes)


@app.command(cls=Command, rich_help_panel=RESULTS)
def report(
    directories: list[Path] = Argument(
        metavar="DIR [DIR]", help="Study directory, or two to show side by side.", callback=options.study_directory
    ),
    out: Path | None = Option(None, help="HTML file, or folder of the figures. Default: in DIR."),
    format: Literal["html", "pdf-figures", "png-figures"] = Option("html", help="One page, or figures for a paper."),
    metric: Metric = None,
    data: Data = None,
    data_dir: DataDir = None,
    modules: Import = None,
) -> int:
    """Write an HTML report, or its figures.

    The page needs no other file. The best network is run on the validation images; the test split is not read. Two
    studies with the same factors and data, such as one before and after a change, are shown side by side.
    """
    several = len(directories) > 1
    options.refuse(
        (len(directories) > 2, f"{len(directories)} studies: a report is of one, or of two side by side"),
        (several and (out is None or format != "html" or data_dir), "two studies: need --out FILE.html, and no images"),
    )
    with _starting(modules):
        from expertgrid.ablations.cli.results import report
    return report(directories, out, format, data, data_dir, metric)


@app.command(cls=Command, rich_help_panel=RESULTS)
def track(
    directory: StudyDir,
    to: list[str] = Option(metavar=TRACKER, help=f"Tracker to show it in: {TRACKERS}.", callback=options.trackers),
    data: Data = None,
    data_dir: DataDir = None,
    modules: Import = None,
) -> int:
    """Show a study in TensorBoard, MLflow or Weights & Biases.

    A tracker gets all trials, as from `run --track`, and the exported files. It keeps them in DIR/tensorboard,
    DIR/mlflow or DIR/wandb; `mlflow:URI` is a server or another store. The images are read for the contact sheets.
    """
    with _starting(modules):
        from expertgrid.ablations.cli.track import track
    return track(directory, to, data, data_dir)


@app.command(cls=Command, rich_help_panel=RESULTS)
def verify(directory: StudyDir, modules: Import = None) -> int:
    """Recompute a study's numbers from its records and compare.

    Accuracies, costs and ids are computed again from the predictions, networks and configs of the trials, and each one
    that differs is named. `expertgrid check` says in seconds whether files are missing or damaged.
    """
    with _starting(modules):
        from expertgrid.ablations.cli.results import verify
    return verify(directory)


@app.command(cls=Command, rich_help_panel=RESULTS)
def check(
    directory: DamagedDir,
    repair: bool = Option(False, "--repair", help="Move damaged trials to DIR/damaged."),
    data: Annotated[str | None, Option(metavar="SOURCE", help="Compare this source with the study's images.")] = None,
    data_dir: DataDir = None,
    modules: Import = None,
) -> int:
    """Find missing and damaged files of a study.

    Each such file gets a line: what is wrong, and what to do. After --repair the command that trained the study trains
    just the trials that were moved. Nothing is deleted. `expertgrid verify` recomputes the numbers in the files.
    """
    with _starting(modules, "starting"):
        from expertgrid.ablations.cli.files import check
    return check(directory, repair, data, data_dir)


@app.command(cls=Command, rich_help_panel=RESULTS)
def retire(directory: StudyDir, modules: Import = None) -> int:
    """Move trials of a network whose code was changed to DIR/retired.

    The network that is imported now computes something else than the one that they trained. The next run trains just
    these trials again. Nothing is deleted, and the ledger keeps their reads of the test split.
    """
    with _starting(modules):
        from expertgrid.ablations.cli.files import retire
    return retire(directory)


@app.command(cls=Command, rich_help_panel=RESULTS)
def clean(
    directory: Path | None = Argument(None, metavar="DIR", help="Study directory.", callback=options.study_directory),
    yes: bool = Option(False, "--yes", help="Remove the files without asking."),
    trials: bool = Option(False, "--trials", help="Remove trials that the study does not plan any more, too."),
    cache: bool = Option(
        False, "--cache", help="Instead of a study's files, remove the decoded images of all sources."
    ),
) -> int:
    """Remove files of a study that nothing needs any more.

    They are listed first, with sizes: what crashes left, the states of finished trainings, and what `check --repair`
    moved away. Records, weights, exports and the states of unfinished trainings stay.
    """
    options.refuse(((directory is None) != cache or (cache and trials), "needs a study directory, or --cache alone"))
    with _starting(text="starting"):
        from expertgrid.ablations.cli.files import clean
    return clean(directory, yes, trials)


@app.command(cls=Command, rich_help_panel=NETWORKS)
def export(
    source: Path = Argument(
        metavar="DIR|CHECKPOINT", help="Study directory, or a model.safetensors.", callback=options.study_or_checkpoint
    ),
    input: Literal["uint8", "float"] = Option(
        "uint8", help="Type of the input. uint8: pixels, B x H x W x C. float: normalised, B x C x H x W."
    ),
    precision: Literal["fp32", "fp16", "int8", "bf16", "all"] = Option(
        "fp32", help="Precision. all: one file each in fp32, fp16 and int8. bf16: with --provider openvino."
    ),
    outputs: str = Option("logits", metavar="NAME[,NAME]", help=f"Outputs: {', '.join(options.OUTPUTS)}."),
    fuse: bool = Option(True, help="Rewrite the graph so that it runs faster."),
    prune_gates: float | None = Option(
        None, min=0, max=1, metavar="WEIGHT", help="Drop experts whose gate never gets above this. Outputs change."
    ),
    provider: str = Option("cpu", metavar="NAME[,NAME]", help=f"Certify on: {', '.join(options.PROVIDERS)}."),
    tune: bool = Option(False, "--tune", help="Time formats and engines, and take the fastest certified file."),
    batch: int | None = Option(None, min=1, max=options.LARGEST_BATCH, metavar="N", help="For --tune. Default: 1."),
    out: Path | None = Option(
        None, metavar="FILE.onnx", help="Default: in DIR/export.", callback=options.file_named("--out", ".onnx", False)
    ),
    data: Data = None,
    data_dir: DataDir = None,
    modules: Import = None,
) -> int:
    """Write the best network as an ONNX file with a certificate.

    ONNX Runtime must agree with PyTorch on every test image. A study's network is the best trial, on validation, of its
    best cell. The certificate and a model card are written beside the file.
    """
    names = options.words("output", outputs, options.OUTPUTS)
    providers = options.words("provider", provider, options.PROVIDERS)
    one_format = precision == "fp32" and fuse and len(providers) == 1
    needs_openvino, on_openvino = precision == "bf16", providers == ["openvino"]
    options.refuse(
        (tune and not one_format, "--tune: chooses precision and rewrites itself, for one provider: cpu or cuda"),
        (batch is not None and not tune, "--batch: is for --tune; other files run at any batch size"),
        (needs_openvino != on_openvino, "--precision bf16: is computed by OpenVINO alone; add --provider openvino"),
    )
    with _starting(modules):
        from expertgrid.ablations.cli.export import export
    tuned_for = batch or 1 if tune else None
    return export(source, input, precision, names, fuse, prune_gates, providers, tuned_for, out, data, data_dir)


@app.command(cls=Command, rich_help_panel=NETWORKS)
def publish(
    directory: StudyDir,
    target: str = Argument(metavar="FOLDER|hf-hub:OWNER/NAME", help="New folder, or repository of the Hub."),
    private: bool = Option(False, "--private", help="Make the repository private."),
    data: Data = None,
    data_dir: DataDir = None,
    modules: Import = None,
) -> int:
    """Publish the best network as a folder or a Hub repository that timm loads.

    It has the layout of the Hugging Face Hub: model card, weights and config for `timm.create_model`, ONNX files
    with certificates. A study without an exported file is exported first, which reads the test split once. The upload
    takes the token of `hf auth login`.
    """
    if options.hub_repository(target) is None and private:
        raise InputError("--private: is for hf-hub:OWNER/NAME; a folder is not uploaded")
    with _starting(modules):
        from expertgrid.ablations.cli.hub import publish
    return publish(directory, target, private, data, data_dir)


@app.command(cls=Command, rich_help_panel=NETWORKS)
def predict(
    file: OnnxFile,
    images: list[Path] = Argument(metavar="IMAGE...", help="Image files of any size.", callback=options.readable),
    top: int = Option(3, min=1, metavar="N", help="Number of classes to show for each image."),
    provider: Literal["cpu", "cuda", "tensorrt", "openvino"] | None = Option(None, help="Engine. Default: as tuned."),
    format: Format = "text",
) -> int:
    """Classify images with an exported network."""
    with _starting(text="starting"):
        from expertgrid.export.describe import read_onnx
        from expertgrid.export.predict import predict
        from expertgrid.model.system.text import render
    rows: list[dict[str, object]] = [
        {"image": str(prediction.path), "class": name, "probability": probability}
        for prediction in predict(read_onnx(file), str(file), images, provider)
        for name, probability in prediction.classes[:top]
    ]
    print(render(rows, format))
    return 0


@app.command("show-model", cls=Command, rich_help_panel=NETWORKS)
def show_model(file: OnnxFile) -> int:
    """Describe an ONNX file: input, outputs, operators, size and metadata.

    Netron (netron.app) opens the file and draws its graph.
    """
    with _starting():
        from expertgrid.export.describe import describe, read_onnx
    print(describe(read_onnx(file), str(file)))
    return 0


@app.command(cls=Command, rich_help_panel=SPEED)
def bench(
    files: list[Path] = Argument(
        metavar="FILE.onnx...|DIR", help="ONNX files, or a study directory.", callback=options.files_or_study
    ),
    provider: Literal["cpu", "cuda", "tensorrt"] = Option("cpu", help="Execution provider of ONNX Runtime."),
    batch: str | None = Option(None, metavar="N[,N]", help="Batch sizes. Default: 1,8,64."),
    format: Format = "text",
    json: Path | None = Option(
        None, metavar="FILE.json", help="Write one file's record.", callback=options.file_named("--json", ".json")
    ),
    engine: str | None = Option(
        None, metavar="E[,E]", help=f"Engines: {', '.join(options.ENGINES)}. Default: own; for files own,eager."
    ),
    seconds: float = Option(1, min=0.01, max=3600, metavar="S", help="Time for each engine and batch size."),
    fail_if_slower: str | None = Option(None, metavar="P%", help="Exit with 1 where a file is slower by more."),
    baseline: Path | None = Option(
        None, metavar="FILE.json", help="Compare one file with a record of --json.", callback=options.readable
    ),
    across_machines: bool = Option(False, "--across-machines", help="Let --baseline be of another machine or version."),
    front: bool = Option(False, "--front", help="Time all cells of a study briefly, and the Pareto front in full."),
    peers: bool = Option(False, "--peers", help="Time untrained timm networks of similar size, too."),
    isolate: bool = Option(False, "--isolate", help="Run each engine in its own process, and show its memory."),
    modules: Import = None,
) -> int:
    """Measure the latency of ONNX files, or of a study's cells.

    All engines get the same inputs, and all files take turns. A second file is faster or slower than the first only
    where the 98% interval says so. The record of a file in a study's export folder is kept in the study's bench folder,
    and its table shows it.

    For a study directory, a network of each cell is exported and timed. Its tables then show latency beside accuracy,
    and which cells are on the Pareto front.
    """
    study, alone = files[0] if files[0].is_dir() else None, len(files) == 1 and baseline is None
    batches = options.batches(batch or "1,8,64")
    engines = options.words("engine", engine or ("own" if study else "own,eager"), options.ENGINES)
    slower = options.percent("--fail-if-slower", fail_if_slower)
    single = {"--json": json, "--baseline": baseline, "--peers": peers}
    for_one_file = ", ".join(option for option, value in single.items() if value)
    cells = f"; the records of a study's cells are kept in {study}/bench" if study else ""
    options.refuse(
        (for_one_file and (study or len(files) > 1), f"{for_one_file}: is for one file{cells}"),
        (slower is not None and peers, "--fail-if-slower: does not go with --peers, which are other networks"),
        (slower is not None and alone, "--fail-if-slower: a second file or --baseline FILE.json is needed"),
        (across_machines and baseline is None, "--across-machines: is for --baseline FILE.json"),
        (front and study is None, "--front: is for a study directory"),
    )
    with _starting(modules):
        from expertgrid.ablations.cli.bench import bench, bench_cells
        from expertgrid.ablations.cli.sources import import_modules
    isolated = partial(import_modules, modules or []) if isolate else None
    if study:
        return bench_cells(study, provider, batches, format, engines, seconds, front, isolated)
    limits = baseline, across_machines, slower
    return bench(files, provider, batches, format, json, engines, seconds, *limits, isolated, peers)


@app.command("bench-train", cls=Command, rich_help_panel=SPEED)
def bench_train(
    preset: str = Argument("eight_block", metavar="MODEL|DIR", help="Preset, timm model, or study directory."),
    set_: Set = None,
    batch: int | None = Option(None, min=2, max=4096, metavar="N", help="Batch size. Default: 128."),
    image_size: int | None = Option(None, min=1, max=1024, metavar="N", help="Height and width. Default: 32."),
    steps: int | None = Option(None, min=1, max=1000, metavar="N", help="In a round. Default: 100 on CUDA, else 2."),
    rounds: int = Option(5, min=1, max=1000, metavar="N", help="Rounds in which each way takes its turn."),
    profile: bool = Option(False, "--profile", help="Show where the time of a model's training steps goes instead."),
    peer: Path | None = Option(None, metavar="DIR", help="Check-out of timm's repository: its train.py takes turns."),
    device: Device = "auto",
    compile: Compile = "auto",
    kernels: Kernels = "auto",
    graphs: Graphs = "auto",
    data: Data = None,
    data_dir: DataDir = None,
    modules: Import = None,
    format: Format = "text",
) -> int:
    """Measure the speed of training, beside a PyTorch baseline.

    The training loop, bare steps on one batch and PyTorch baselines take turns: fp32 and eager, and with channels last
    in bf16, compiled (not with --compile off), or both. The fastest of them is what is compared with. A preset is
    trained by the recipe of its name, another network by `fast`; --set changes the network and the recipe. `auto`
    decides as for a whole training on 45,000 images.

    --profile trains some steps of that recipe, at its batch size, and shows the longest operators, or kernels on CUDA.

    For a study directory, all cells take turns. Its tables then show these speeds instead of those of the trainings.
    """
    of_study, settings = Path(preset).is_dir(), options.settings(set_ or [])
    if of_study:
        options.study_directory(Path(preset))
    options.refuse(
        (settings and of_study, "--set: is for a model; a study directory was given"),
        ({"batch_size", "recipe.batch_size"} & settings.keys(), "--set batch_size: --batch sets it"),
        (batch is not None and of_study, "--batch: a study's recipes have the batch sizes"),
        (image_size is not None and of_study, "--image-size: a study's data has the size of its images"),
        (profile and of_study, "--profile: is for a model; a study directory was given"),
        ((data or data_dir) and not of_study, "--data: is for a study directory; a model is trained on random images"),
        (peer and (of_study or profile), "--peer: is for the speed of a model"),
    )
    if profile:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # PyTorch's profiler reads it once, and logs on stderr
    with _starting(modules):
        from expertgrid.ablations.cli.bench import bench_study, bench_train
        from expertgrid.model.fast.execution import ExecutionOptions
    execution = ExecutionOptions(kernels, compile, graphs)
    if of_study:
        return bench_study(Path(preset), data, data_dir, steps, rounds, device, execution, format)
    return bench_train(
        preset, settings, batch, image_size or 32, steps, rounds, device, execution, profile, peer, format
    )


@app.command("list", cls=Command, rich_help_panel=LISTS)
def list_(
    what: Literal["models", "recipes", "studies", "data"] = Argument(help="Kind of thing to list."),
    modules: Import = None,
    format: Format = "text",
) -> int:
    """List the models, recipes, studies or data sources that exist."""
    if modules and what != "models":
        raise InputError(f"--import {modules[0]}: is for the list of models; {what} were asked for")
    with _starting(modules, "starting"):
        from expertgrid.ablations.cli.lists import list_
    return list_(what, [options.module_and_folder(text)[0] for text in modules or []], format)


@app.command(cls=Command, rich_help_panel=LISTS)
def schema(modules: Import = None) -> None:
    """Print the JSON Schema of study files."""
    with _starting(modules, "starting"):
        from expertgrid.ablations.study.schema import study_schema
    print(study_schema())


@app.command("show-augment", cls=Command, rich_help_panel=LISTS)
def show_augment(
    recipe: str = Argument(help="Recipe, as `expertgrid list recipes` names it.", autocompletion=_completed("recipes")),
    out: Path = Option(metavar="FILE.png", help="Picture to write.", callback=options.file_named("--out", ".png")),
    data: str = Option("digits", metavar="SOURCE", help="Data source."),
    data_dir: DataDir = None,
    set_: Set = None,
    modules: Import = None,
    seed: int = Option(0, min=0, max=2**31, metavar="N", help="Seed that chooses the images and their changes."),
    images: int = Option(8, min=1, max=options.MOST_IMAGES, metavar="N", help="Number of images to show."),
) -> int:
    """Draw what a recipe's augmentation does to images.

    Train images are shown as the network gets them in several epochs, each beside its original.
    """
    settings = options.settings(set_ or [])
    with _starting(modules):
        from expertgrid.ablations.cli.sources import read_data
        from expertgrid.ablations.study.changes import changed_recipe
        from expertgrid.model.system.files import write_whole
        from expertgrid.model.training.contact_sheet import contact_sheet
    options.check_can_be_written("--out", out)
    changed, read = changed_recipe(recipe, settings), read_data(data, data_dir)
    changed.check_fits(read, len(read.train))
    picture = io.BytesIO()
    contact_sheet(changed, read, seed, images).save(picture, "PNG")
    write_whole(out, picture.getvalue())
    print(out)
    return 0
