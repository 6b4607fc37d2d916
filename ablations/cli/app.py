"""The commands and their options. Each imports what it does inside, so that help appears at once.

What can be checked without PyTorch is checked before it is imported.
"""

import os
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand, TyperGroup

from expertgrid.ablations.cli import options
from expertgrid.model.system.errors import InputError


class Grouped(TyperGroup):
    """Help that lists the commands under the titles that `rich_help_panel` gives them.

    Contexts are of click's class, which some versions of Typer keep for themselves.
    """

    def get_help_option(self, ctx: Any) -> Any:
        """With a default that is a bool already: for any other, Typer imports pydantic to make it one."""
        option = super().get_help_option(ctx)
        if option is not None:
            option.default = False
        return option

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        panels: dict[str | None, list[tuple[str, str]]] = {}
        for name in self.list_commands(ctx):
            command = self.get_command(ctx, name)
            assert isinstance(command, TyperCommand)  # this app has no groups of commands
            panels.setdefault(command.rich_help_panel, []).append((name, command.get_short_help_str()))
        for title, rows in panels.items():
            with formatter.section(title):
                formatter.write_dl(rows)


app = typer.Typer(
    cls=Grouped,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
TRAIN, RESULTS, NETWORKS, SPEED, LISTS = "Train", "Read results", "Use a trained network", "Measure speed", "Look up"

Format = Annotated[Literal["text", "github", "latex", "csv", "json"], typer.Option(help="Format of the table.")]
Switch = Literal["auto", "on", "off"]
Provider = Annotated[
    Literal["cpu", "cuda", "tensorrt"],
    typer.Option(help="ONNX Runtime's provider. One that does not start is an error."),
]
DataDir = Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of torchvision's CIFAR. No download.")]
DataHere = Annotated[str | None, typer.Option(metavar="SOURCE", help="Data source, if the images were moved.")]
Device = Annotated[
    str, typer.Option(help=f"{options.DEVICES}. auto takes CUDA if there is any.", callback=options.device_word)
]
Compile = Annotated[Switch, typer.Option(help="torch.compile. auto: for long trainings only.")]
Kernels = Annotated[Switch, typer.Option(help="Fused Triton kernels. auto: on CUDA.")]
Graphs = Annotated[Switch, typer.Option(help="Steps as CUDA graphs. auto: on CUDA.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Change a value. Repeatable.")]
Import = Annotated[
    list[str] | None,
    typer.Option(
        "--import",
        metavar="MODULE",
        help="Python module that registers timm models. Repeatable.",
        callback=options.module_names,
    ),
]
TRACKER = "NAME[:URI]"
TRACKERS = f"{', '.join(options.TRACKERS)}. Repeatable"
StudyDir = Annotated[Path, typer.Argument(metavar="DIR", help="Study directory.", callback=options.study_directory)]
DamagedDir = Annotated[Path, typer.Argument(metavar="DIR", help="Study directory.", callback=options.study_remains)]
OnnxFile = Annotated[Path, typer.Argument(metavar="FILE.onnx", help="ONNX file.", callback=options.readable)]


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"expertgrid {version('expertgrid')}")
        except PackageNotFoundError:
            raise InputError("--version: expertgrid is not installed; it runs from a folder of source code") from None
        raise typer.Exit


@app.callback()
def expertgrid(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Ablations of soft-expert CNNs: train a study, read its table, export and time its best network."""


@app.command(rich_help_panel=TRAIN)
def run(
    study: Annotated[str | None, typer.Argument(help="Shipped study, or path of a TOML file.")] = None,
    data: Annotated[str | None, typer.Option(metavar="SOURCE", help="Data source, instead of the study's.")] = None,
    data_dir: DataDir = None,
    seeds: Annotated[int | None, typer.Option(metavar="N", help="Number of seeds, instead of the study's.")] = None,
    first_seed: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="First seed. New seeds make a fresh study.")
    ] = None,
    set_: Set = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Study directory. Default: runs/STUDY.")] = None,
    device: Device = "auto",
    compile: Compile = "auto",
    kernels: Kernels = "auto",
    graphs: Graphs = "auto",
    until: Annotated[
        Literal["decided"] | None,
        typer.Option(help="Race: more seeds for undecided contrasts. Needs --max-seeds."),
    ] = None,
    max_seeds: Annotated[int | None, typer.Option(metavar="N", help="Last seed of a race.")] = None,
    modules: Import = None,
    adopt: Annotated[bool, typer.Option(help="Take over finished trials of neighbours.")] = True,
    trial_timeout: Annotated[
        float | None, typer.Option(min=1, metavar="SECONDS", help="Time for a trial, after which it has failed.")
    ] = None,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="Same bits again on a GPU too. Slower.")
    ] = False,
    fail_fast: Annotated[bool, typer.Option("--fail-fast", help="Stop at the first trial that fails.")] = False,
    isolate: Annotated[
        bool,
        typer.Option(envvar="EXPERTGRID_ISOLATE", help="Train in a process apart. Its crash ends one trial."),
    ] = True,
    jobs: Annotated[
        str, typer.Option(metavar="N|auto", help="Trials at once. auto: by the cores of a CPU, 1 on a GPU.")
    ] = "auto",
    engine: Annotated[Literal["local", "ray"], typer.Option(help="Where trials are trained.")] = "local",
    address: Annotated[
        str | None, typer.Option(metavar="auto|HOST:PORT", help="Ray's cluster. auto: joined, or embedded here.")
    ] = None,
    gpus_per_trial: Annotated[
        float | None, typer.Option(min=0, max=1, metavar="SHARE", help="GPU of a trial of Ray, such as 0.25.")
    ] = None,
    cpus_per_trial: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="CPUs of a trial of Ray. Default: 1.")
    ] = None,
    track: Annotated[
        list[str] | None,
        typer.Option(metavar=TRACKER, help=f"Show it there, too: {TRACKERS}.", callback=options.trackers),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the trials only. Nothing is written.")] = False,
) -> int:
    """Train a study and print its table.

    The same command continues a study that was stopped. Without STUDY, the study `quickstart` is trained, and its best
    network is exported and timed, and a report is written. A race begins with the study's seeds.
    """
    settings = options.settings(set_ or [])
    from expertgrid.ablations.cli.terminal import starting, status

    with status("starting"):
        from expertgrid.ablations.cli import plan, sources
    if trial_timeout is not None and not isolate:
        raise InputError(f"--trial-timeout {trial_timeout:g}: needs a process apart; it does not go with --no-isolate")
    if jobs not in ("auto", "1") and not isolate:
        raise InputError(f"--jobs {jobs}: needs processes apart; it does not go with --no-isolate")
    wanted = None if jobs == "auto" else options.whole("--jobs", jobs, most=256)
    of_ray = {"--address": address, "--gpus-per-trial": gpus_per_trial, "--cpus-per-trial": cpus_per_trial}
    options.check_engine(engine, of_ray, {"--jobs": wanted, "--no-isolate": None if isolate else "given"})
    asked = plan.ask(study or "quickstart", seeds, first_seed, data, settings, out, until, max_seeds)
    sources.import_modules(modules or [])
    if dry_run:
        print(plan.plan_table(plan.plan(asked, data_dir)))
        return 0
    with ExitStack() as resources:
        if engine == "ray":
            with status("starting Ray"):
                from expertgrid.ablations.engines.ray import ray_engine

                needs = cpus_per_trial or 1, gpus_per_trial
                trainer = resources.enter_context(ray_engine(address or "auto", *needs, device, modules or []))
        elif isolate:
            from expertgrid.ablations.engines.isolation import isolated, jobs_for

            trainer = resources.enter_context(isolated(wanted or jobs_for(device), device))  # imports PyTorch beside
        else:
            trainer = None
        with starting():
            from expertgrid.ablations.cli.run import How, train_and_show
            from expertgrid.model.fast.execution import ExecutionOptions
        execution = ExecutionOptions(kernels, compile, graphs)
        how = How(
            device, execution, adopt, fail_fast, trial_timeout, modules or [], deterministic, trainer, track or []
        )
        if study is not None:
            return train_and_show(asked, data_dir, how)
        with starting():
            from expertgrid.ablations.cli.quickstart import quickstart
        return quickstart(asked, data_dir, how)


@app.command(rich_help_panel=TRAIN)
def rerun(
    directory: StudyDir,
    trial: Annotated[str, typer.Argument(metavar="ID", help="Trial, as table and ledger name it.")],
    data: DataHere = None,
    data_dir: DataDir = None,
    device: Device = "auto",
    modules: Import = None,
    format: Format = "text",
) -> int:
    """Train one trial again and compare.

    The record stays as it is. The ledger gets a line, because the test split is read once more.
    """
    from expertgrid.ablations.cli.terminal import status

    with status("starting"):
        from expertgrid.ablations.cli.rerun import rerun
    return rerun(directory, trial, data, data_dir, device, modules or [], format)


@app.command(rich_help_panel=RESULTS)
def table(
    directories: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="Study directories.", callback=options.study_directory)
    ],
    format: Format = "text",
    by: Annotated[
        str | None, typer.Option(metavar="FACTOR[,FACTOR]", help="One row a level: its mean and effect.")
    ] = None,
    contrast: Annotated[tuple[str, str] | None, typer.Option(metavar="A B", help="Compare two cells in full.")] = None,
    peek: Annotated[bool, typer.Option("--peek", help="What the best epoch and seed would claim.")] = False,
) -> int:
    """Print the table of one study or several."""
    from expertgrid.ablations.cli.terminal import status

    with status("starting"):
        from expertgrid.ablations.cli import results
    return results.table(directories, format, by, contrast, peek)


@app.command(rich_help_panel=RESULTS)
def report(
    directory: StudyDir,
    out: Annotated[Path | None, typer.Option(help="HTML file, or directory of the figures.")] = None,
    format: Annotated[
        Literal["html", "pdf-figures", "png-figures"], typer.Option(help="One page, or figures for a paper.")
    ] = "html",
    data_dir: DataDir = None,
    modules: Import = None,
) -> int:
    """Write an HTML report, or its figures.

    The page needs no other file. The best network is run on the validation images; the test split is not read.
    """
    from expertgrid.ablations.cli.terminal import starting

    with starting():
        from expertgrid.ablations.cli.results import report
        from expertgrid.ablations.cli.sources import import_modules
    import_modules(modules or [])
    return report(directory, out, format, data_dir)


@app.command(rich_help_panel=RESULTS)
def track(
    directory: StudyDir,
    to: Annotated[list[str], typer.Option(metavar=TRACKER, help=f"Tracker: {TRACKERS}.", callback=options.trackers)],
    data: DataHere = None,
    data_dir: DataDir = None,
) -> int:
    """Show a study in trackers.

    All its trials, as `run --track` shows them while they are trained, and its exported files. A tracker keeps what it
    gets in DIR/tensorboard, DIR/mlflow or DIR/wandb; `mlflow:URI` is a server or another store. The images are read for
    the contact sheets.
    """
    from expertgrid.ablations.cli.terminal import starting

    with starting():
        from expertgrid.ablations.cli.track import track
    return track(directory, to, data, data_dir)


@app.command(rich_help_panel=RESULTS)
def verify(directory: StudyDir, modules: Import = None) -> int:
    """Check a study's numbers and exported files.

    They are computed again from what is kept beside them. Each that differs is named.
    """
    from expertgrid.ablations.cli.terminal import starting

    with starting():
        from expertgrid.ablations.cli.results import verify
        from expertgrid.ablations.cli.sources import import_modules
    import_modules(modules or [])
    return verify(directory)


@app.command(rich_help_panel=RESULTS)
def check(
    directory: DamagedDir,
    repair: Annotated[bool, typer.Option("--repair", help="Move damaged trials to DIR/damaged.")] = False,
) -> int:
    """Check that all files are there and whole.

    Each file that is missing or damaged gets a line: what is wrong, and what to do. After --repair the command that
    trained the study trains just the trials that were moved. Nothing is deleted.
    """
    from expertgrid.ablations.cli.terminal import status

    with status("starting"):
        from expertgrid.ablations.cli.files import check
    return check(directory, repair)


@app.command(rich_help_panel=RESULTS)
def clean(
    directory: StudyDir,
    yes: Annotated[bool, typer.Option("--yes", help="Remove without asking.")] = False,
    trials: Annotated[bool, typer.Option("--trials", help="Trials that are not planned, too.")] = False,
) -> int:
    """Remove what nothing needs any more.

    The list is shown first, with sizes: what crashes left, the states of trainings that are finished, and what
    `check --repair` moved away. Records, weights, exports and the states of unfinished trainings stay.
    """
    from expertgrid.ablations.cli.terminal import status

    with status("starting"):
        from expertgrid.ablations.cli.files import clean
    return clean(directory, yes, trials)


@app.command(rich_help_panel=NETWORKS)
def export(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="DIR|CHECKPOINT",
            help="Study directory, or model.safetensors.",
            callback=options.study_or_checkpoint,
        ),
    ],
    input: Annotated[
        Literal["uint8", "float"],
        typer.Option(help="Type of the input. uint8: pixels, B x H x W x C. float: normalised, B x C x H x W."),
    ] = "uint8",
    precision: Annotated[
        Literal["fp32", "fp16", "int8", "bf16", "all"],
        typer.Option(help="Precision. all: fp32, fp16 and int8, one file for each. bf16: for --provider openvino."),
    ] = "fp32",
    outputs: Annotated[
        str, typer.Option(metavar="NAME[,NAME]", help=f"Outputs: {', '.join(options.OUTPUTS)}.")
    ] = "logits",
    fuse: Annotated[bool, typer.Option(help="Rewrite the graph for speed.")] = True,
    prune_gates: Annotated[
        float | None,
        typer.Option(min=0, max=1, metavar="WEIGHT", help="Drop experts below this weight. Outputs change."),
    ] = None,
    provider: Annotated[
        str, typer.Option(metavar="NAME[,NAME]", help=f"Certify on: {', '.join(options.PROVIDERS)}.")
    ] = "cpu",
    tune: Annotated[bool, typer.Option("--tune", help="Take the fastest certified file and engine.")] = False,
    batch: Annotated[
        int | None,
        typer.Option(min=1, max=options.LARGEST_BATCH, metavar="N", help="With --tune: for this batch size."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.onnx",
            help="ONNX file to write. Default: in the study's export folder.",
            callback=options.file_named("--out", ".onnx", parent_exists=False),
        ),
    ] = None,
    data: DataHere = None,
    data_dir: DataDir = None,
    modules: Import = None,
) -> int:
    """Write a certified ONNX file.

    ONNX Runtime must agree with PyTorch on every test image. Of a study, the best trial on validation of the best cell
    is taken. The certificate and a model card are written beside the file.
    """
    wanted = options.words("output", outputs, options.OUTPUTS)
    providers = options.words("provider", provider, options.PROVIDERS)
    if tune and (precision != "fp32" or not fuse or len(providers) > 1):
        raise InputError("--tune: chooses precision and rewrites itself, for one provider: cpu or cuda")
    if batch is not None and not tune:
        raise InputError("--batch: is for --tune; other files run at any batch size")
    if (precision == "bf16") != (providers == ["openvino"]) and "bf16" in (precision, *providers):
        raise InputError("--precision bf16: is computed by OpenVINO alone; add --provider openvino")
    from expertgrid.ablations.cli.terminal import starting

    with starting():
        from expertgrid.ablations.cli.export import export
        from expertgrid.ablations.cli.sources import import_modules
    import_modules(modules or [])
    tuned_for = batch or 1 if tune else None
    return export(source, input, precision, wanted, fuse, prune_gates, providers, tuned_for, out, data, data_dir)


@app.command(rich_help_panel=NETWORKS)
def publish(
    directory: StudyDir,
    target: Annotated[
        str, typer.Argument(metavar="FOLDER|hf-hub:OWNER/NAME", help="New folder, or repository of the Hub.")
    ],
    private: Annotated[bool, typer.Option("--private", help="Make a private repository.")] = False,
    data: DataHere = None,
    data_dir: DataDir = None,
    modules: Import = None,
) -> int:
    """Publish the best network for timm.

    A folder in the layout of the Hugging Face Hub: model card, weights and config for `timm.create_model`, ONNX files
    with certificates. A study without an exported file is exported first, which reads the test split once. The upload
    takes the token of `hf auth login`.
    """
    if options.hub_repository(target) is None and private:
        raise InputError("--private: is for hf-hub:OWNER/NAME; a folder is not uploaded")
    from expertgrid.ablations.cli.terminal import starting

    with starting():
        from expertgrid.ablations.cli.hub import publish
        from expertgrid.ablations.cli.sources import import_modules
    import_modules(modules or [])
    return publish(directory, target, private, data, data_dir)


@app.command(rich_help_panel=NETWORKS)
def predict(
    file: OnnxFile,
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGE...", help="Image files of any size.", callback=options.readable)
    ],
    top: Annotated[int, typer.Option(min=1, metavar="N", help="Number of classes to show.")] = 3,
    provider: Annotated[
        Literal["cpu", "cuda", "tensorrt", "openvino"] | None,
        typer.Option(help="Default: what the file was tuned for."),
    ] = None,
    format: Format = "text",
) -> int:
    """Classify images with an exported network."""
    from expertgrid.ablations.cli.terminal import starting

    with starting():
        from expertgrid.ablations.cli.export import predict
    return predict(file, images, top, provider, format)


@app.command("show-model", rich_help_panel=NETWORKS)
def show_model(
    file: OnnxFile,
) -> int:
    """Describe an ONNX file.

    Its input, outputs, operators, size, multiply-accumulates and metadata. Netron (netron.app) opens the file and draws
    its graph.
    """
    from expertgrid.ablations.cli.terminal import starting

    with starting():
        from expertgrid.ablations.cli.export import show_model
    return show_model(file)


@app.command(rich_help_panel=SPEED)
def bench(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE.onnx...|DIR", help="ONNX files, or a study directory.", callback=options.files_or_study
        ),
    ],
    provider: Provider = "cpu",
    batch: Annotated[str | None, typer.Option(metavar="N[,N]", help="Batch sizes. Default: 1,8,64.")] = None,
    format: Format = "text",
    json: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json",
            help="Write the record with all times. For one file.",
            callback=options.file_named("--json", ".json"),
        ),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            metavar="E[,E]",
            help=f"Engines: {', '.join(options.ENGINES)}. Default: own,eager; own for studies and scenarios.",
        ),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.01, max=3600, metavar="S", help="Time of each engine and batch.")] = 1,
    fail_if_slower: Annotated[
        str | None,
        typer.Option(metavar="P%", help="Exit status 1 where a file is slower by P%."),
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json",
            help="Compare with an earlier record of --json. For one file.",
            callback=options.readable,
        ),
    ] = None,
    across_machines: Annotated[
        bool, typer.Option("--across-machines", help="With --baseline: also of another machine or version.")
    ] = False,
    front: Annotated[
        bool, typer.Option("--front", help="For a study: the front only. All cells are timed briefly first.")
    ] = False,
    peers: Annotated[
        bool, typer.Option("--peers", help="Time untrained networks of timm, too. Of like size, for the same images.")
    ] = False,
    scenario: Annotated[
        Literal["single-stream", "multi-stream", "offline", "server"] | None,
        typer.Option(help="A scenario of MLPerf. Needs the extra loadgen."),
    ] = None,
    bound_ms: Annotated[
        float | None, typer.Option(min=0.001, metavar="MS", help="Bound of the server's p99. Default: 10.")
    ] = None,
    isolate: Annotated[
        bool, typer.Option("--isolate", help="A process for each engine. Shows its peak memory.")
    ] = False,
    modules: Import = None,
) -> int:
    """Measure the latency of ONNX files.

    All engines get the same inputs, and all files take turns. A second file is faster or slower than the first only
    where the 98% interval says so. The record of a file in a study's export folder is kept in the study's bench folder,
    and its table shows it.

    For a study directory, a network of each cell is exported and timed. Its tables then show latency beside accuracy,
    and which cells are on the Pareto front.

    A scenario loads each file as MLPerf does: single images or 8 in a stream, all at once, or at random as a server
    gets them, where the highest rate is searched. Each of its runs takes --seconds or longer.
    """
    study = files[0] if files[0].is_dir() else None
    if scenario is not None:
        others = {"--batch": batch, "--json": json, "--baseline": baseline, "--fail-if-slower": fail_if_slower}
        given = [name for name, value in others.items() if value is not None]
        given += [name for name, value in {"--front": front, "--isolate": isolate, "--peers": peers}.items() if value]
        if given:
            raise InputError(f"{given[0]}: does not go with --scenario {scenario}")
        if study:
            raise InputError(f"--scenario {scenario}: is for ONNX files; {study} is a study directory")
    if bound_ms is not None and scenario != "server":
        raise InputError("--bound-ms: is for --scenario server")
    batches = options.batches(batch or "1,8,64")
    engines = options.words("engine", engine or ("own" if study or scenario else "own,eager"), options.ENGINES)
    slower = options.percent("--fail-if-slower", fail_if_slower)
    for option, value in (("--json", json), ("--baseline", baseline)):
        if value is not None and len(files) > 1:
            raise InputError(f"{option} {value}: takes the record of one file; {len(files)} files were given")
    if slower is not None and len(files) == 1 and baseline is None:
        raise InputError("--fail-if-slower: a second file or --baseline FILE.json is needed to compare with")
    if across_machines and baseline is None:
        raise InputError("--across-machines: is for --baseline FILE.json")
    if peers and (study or len(files) > 1):
        raise InputError("--peers: is for one file")
    if peers and slower is not None:
        raise InputError("--fail-if-slower: does not go with --peers, which are other networks")
    if front and study is None:
        raise InputError("--front: is for a study directory")
    if study and (json is not None or baseline is not None):
        option = "--json" if json is not None else "--baseline"
        raise InputError(f"{option}: is for one file; the records of a study's cells are kept in {study / 'bench'}")
    from expertgrid.ablations.cli.terminal import starting

    with starting():
        from expertgrid.ablations.cli.bench import Against, bench, bench_cells, bench_scenario
        from expertgrid.ablations.cli.sources import import_modules
    import_modules(modules or [])
    if scenario is not None:
        return bench_scenario(files, scenario, provider, engines, seconds, bound_ms or 10.0, format)
    isolated = partial(import_modules, modules or []) if isolate else None
    if study:
        return bench_cells(study, provider, batches, format, engines, seconds, front, isolated)
    against = Against(baseline, across_machines, slower)
    return bench(files, provider, batches, format, json, engines, seconds, against, isolated, peers)


@app.command("bench-train", rich_help_panel=SPEED)
def bench_train(
    preset: Annotated[
        str, typer.Argument(metavar="MODEL|DIR", help="Preset, timm model or study directory.")
    ] = "eight_block",
    batch: Annotated[
        int | None, typer.Option(min=2, max=4096, metavar="N", help="Images in a batch. Default: 128.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, max=1000, metavar="N", help="Steps in a round. Default: 2; 100 on CUDA.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, max=1000, metavar="N", help="Rounds of each way.")] = 5,
    profile: Annotated[bool, typer.Option("--profile", help="Show where the time of a step goes instead.")] = False,
    device: Device = "auto",
    compile: Compile = "auto",
    kernels: Kernels = "auto",
    graphs: Graphs = "auto",
    data: DataHere = None,
    data_dir: DataDir = None,
    modules: Import = None,
    format: Format = "text",
) -> int:
    """Measure the speed of training.

    Three ways take turns: the training loop, a PyTorch baseline, and bare steps on one batch. A preset is trained by
    the recipe of its name, another network by `fast`. `auto` decides as for a whole training on 45,000 images.

    --profile trains some steps of that recipe, at its batch size, and shows the longest operators, or kernels on CUDA.

    For a study directory, all cells take turns. Its tables then show these speeds instead of those of the trainings.
    """
    of_study = Path(preset).is_dir()
    if of_study:
        options.study_directory(Path(preset))
    if batch is not None and of_study:
        raise InputError("--batch: a study's recipes have the batch sizes")
    if profile and of_study:
        raise InputError("--profile: is for a model; a study directory was given")
    if profile:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # PyTorch's profiler reads it once, and logs on stderr
    if not of_study and (data is not None or data_dir is not None):
        raise InputError("--data: is for a study directory; a model is trained on random images")
    from expertgrid.ablations.cli.terminal import starting

    with starting():
        from expertgrid.ablations.cli.bench import bench_study, bench_train
        from expertgrid.ablations.cli.sources import import_modules
        from expertgrid.model.fast.execution import ExecutionOptions
    import_modules(modules or [])
    execution = ExecutionOptions(kernels, compile, graphs)
    if of_study:
        return bench_study(Path(preset), data, data_dir, steps, rounds, device, execution, format)
    return bench_train(preset, batch, steps, rounds, device, execution, profile, format)


@app.command("list", rich_help_panel=LISTS)
def list_(
    what: Annotated[Literal["models", "recipes", "studies", "data"], typer.Argument(help="What to list.")],
    modules: Import = None,
    format: Format = "text",
) -> int:
    """List models, recipes, studies or data."""
    if modules and what != "models":
        raise InputError(f"--import {modules[0]}: is for the list of models; {what} were asked for")
    from expertgrid.ablations.cli.terminal import status

    with status("starting"):
        from expertgrid.ablations.cli.lists import list_
        from expertgrid.ablations.cli.sources import import_modules
    import_modules(modules or [])
    return list_(what, modules or [], format)


@app.command("show-augment", rich_help_panel=LISTS)
def show_augment(
    recipe: Annotated[str, typer.Argument(help="Recipe.")],
    out: Annotated[
        Path,
        typer.Option(metavar="FILE.png", help="Picture to write.", callback=options.file_named("--out", ".png")),
    ],
    data: Annotated[str, typer.Option(metavar="SOURCE", help="Data source.")] = "digits",
    data_dir: DataDir = None,
    set_: Set = None,
    seed: Annotated[int, typer.Option(min=0, max=2**31, metavar="N", help="Seed of the images and changes.")] = 0,
    images: Annotated[int, typer.Option(min=1, max=options.MOST_IMAGES, metavar="N", help="Number of images.")] = 8,
) -> int:
    """Draw what a recipe does to images.

    Train images are shown as the network gets them in several epochs, each beside its original.
    """
    settings = options.settings(set_ or [])
    from expertgrid.ablations.cli.terminal import starting

    with starting():
        from expertgrid.ablations.cli.augment import show_augment
    return show_augment(recipe, out, data, data_dir, settings, seed, images)
