"""What `python -m bench.gpu` measures: pieces, each of steps that can be done apart."""

import itertools
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime
import torch

from ablations.engines import Stopped, TrialFailed, TrialNote, by_seed, planned_steps, run_local
from ablations.records import StudyDirectory
from ablations.results.evidence import marginals, read_evidence
from ablations.results.rendering import Table, render
from ablations.results.rows import best_record, best_row, read_results
from ablations.results.tables import factor_levels, peek_table
from ablations.study import Base, Level, Study, load_study
from ablations.training.data import ImageData, load_data
from ablations.training.splits import ResidentData
from ablations.training.trial import Trial
from bench import latency, resident
from bench.latency import Latency
from bench.peaks import measure_peaks
from bench.step import measure_step
from bench.training import measure_training
from export.metadata import Precision
from export.precision import PrecisionError
from export.publish import Images, Published, Reference, publish
from model.checkpoint import load
from model.errors import InputError
from model.fast.execution import ExecutionOptions, ExecutionPlan
from model.presets import PRESETS

KEPT_CALLS = 200  # of each engine and batch size; the percentiles are of all
STEP_PRESET = "eight_block"
NETWORKS = ("speed", "accuracy")  # expertgrid's own
WAYS = {  # to take a training step; the last can do the most harm
    "eager": ExecutionPlan(),
    "graphs": ExecutionPlan(graphs=True),
    "compiled": ExecutionPlan(compile=True, graphs=True),
    "kernels": ExecutionPlan(kernels=True, graphs=True),
}


class TimeIsUp(Exception):
    """The piece's minutes are over."""


def matched_baselines(network: str) -> list[str]:
    """The presets that are a network's matched baselines, of equal parameters or of equal cost: NETWORK_..."""
    return [name for name in PRESETS if name.startswith(f"{network}_")]


def without_baselines() -> tuple[str, ...]:
    """All presets but the matched baselines, the one whose step is measured first."""
    matched = {name for network in NETWORKS for name in matched_baselines(network)}
    return (STEP_PRESET, *(name for name in PRESETS if name != STEP_PRESET and name not in matched))


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    presets: tuple[str, ...] = without_baselines()
    training: Mapping[str, Any] = field(default_factory=lambda: {"batch": 128, "steps": 100, "rounds": 5})
    stepped: tuple[str, ...] = (STEP_PRESET, "speed")  # whose step is measured: norms in the experts, after the mix
    step: Mapping[str, Any] = field(default_factory=lambda: {"batch": 128})
    execution: ExecutionOptions = ExecutionOptions()  # of trainings
    rounds: int = 5  # of the peaks
    peak_s: float = 1.0
    settings: Mapping[str, Level] = field(default_factory=dict)  # of each study
    networks: tuple[str, ...] = NETWORKS
    baselines: bool = True  # the matched baselines are trained too
    seeds: int = 5
    card: str | Study = "card"
    card_seeds: tuple[int, ...] = (3, 5)
    card_factors: tuple[str, ...] = ("experts", "residual", "gate", "cutout")
    references: str | Study = "references"
    reference_seeds: tuple[int, ...] = (1, 3)
    spread: str | Study = "spread"
    spread_seeds: int = 3
    served: tuple[str, ...] = (STEP_PRESET, *NETWORKS)  # whose latency is measured
    precisions: tuple[Precision, ...] = ("fp32", "fp16")
    batches: tuple[int, ...] = (1, 8, 64, 512, 2048)
    largest_on_cpu: int = 512
    measure_s: float = 1.0


SMOKE = Size(
    presets=("two_block",),
    training={"batch": 2, "steps": 1, "rounds": 1},
    stepped=(STEP_PRESET,),
    step={"batch": 2, "size": 8, "width": 0.0625, "steps": 1, "rounds": 1},
    execution=ExecutionOptions(compile="off"),
    rounds=1,
    peak_s=0.01,
    settings={"width": 0.0625, "recipe.epochs": 1, "recipe.batch_size": 16},
    networks=("speed",),
    baselines=False,
    seeds=2,
    card=Study(name="card", question="One expert or two?", base=Base(model="two_block"), factors={"experts": [1, 2]}),
    card_seeds=(2,),
    card_factors=("experts",),
    references=Study(
        name="references",
        question="What do two references reach?",
        factors={"reference": ["two_block", "segmented"]},
        reported={"two_block": "80.68 (last epoch)", "segmented": "91.07"},
    ),
    reference_seeds=(1,),
    spread=Study(
        name="spread",
        question="What is an expert worth?",
        base=Base(model="two_block"),
        design="one_at_a_time",
        factors={"experts": [1]},
    ),
    spread_seeds=2,
    served=(STEP_PRESET,),
    precisions=("fp32",),
    batches=(1, 2),
    measure_s=0.01,
)


@dataclass
class Bench:
    """Where and how large the pieces are measured, and until when the present piece may go on."""

    place: Path  # OUT/DEVICE-DATE
    device: torch.device
    data: str
    smoke: bool
    size: Size
    until: float = 0.0  # of time.monotonic

    @property
    def work(self) -> Path:
        return self.place / "work"


@dataclass(frozen=True)
class Measurement:
    """What a step measured, as JSON has it, and whether that is all of it."""

    value: Any
    complete: bool = True


Step = Callable[[], Measurement]


def peaks(bench: Bench) -> dict[str, Step]:
    """What the device can do at most."""

    def rounds() -> Measurement:
        found = [measure_peaks(bench.device, bench.size.peak_s) for _ in range(bench.size.rounds)]
        return Measurement([rates.model_dump() for rates in found])

    return {"peaks": rounds}


def train_speed(bench: Bench) -> dict[str, Step]:
    """A step of two networks in each way that it can be taken: its losses, its kernels, its floor; then all presets.

    The presets are trained beside the PyTorch baseline.
    """
    size, device = bench.size, bench.device

    def training(preset: str) -> Measurement:
        speed = measure_training(preset, device=device, execution=size.execution, notice=notice, **size.training)
        return Measurement(speed.model_dump(mode="json"))

    def step(preset: str, means: ExecutionPlan) -> Measurement:
        return Measurement(measure_step(preset, device, means, **size.step).model_dump(mode="json"))

    ways = WAYS if device.type == "cuda" else {"eager": ExecutionPlan()}
    steps: dict[str, Step] = {
        f"step-{preset}-{name}": partial(step, preset, means) for preset in size.stepped for name, means in ways.items()
    }
    return steps | {preset: partial(training, preset) for preset in size.presets}


def fast(bench: Bench) -> dict[str, Step]:
    """expertgrid's own networks by their own recipes, exported; then their matched baselines."""
    size = bench.size
    steps: dict[str, Step] = {}

    def study(name: str, models: Sequence[str]) -> Study:
        return Study(
            name=name,
            question="What do a few seconds of training reach, and do experts earn their cost in them?",
            base=Base(model=name, recipe=name),
            set={"recipe.tta": "flip"},
            factors={"model": list(models)},
        )

    for name in size.networks:
        steps[name] = partial(train, bench, name, study(name, [name]), size.seeds)
        steps |= exports(bench, name)
    for name in size.networks if size.baselines else ():
        beside = f"{name}-baselines"
        steps[beside] = partial(train, bench, beside, study(name, matched_baselines(name)), size.seeds)
    return steps


def card(bench: Bench) -> dict[str, Step]:
    """The study `card`, with a few seeds, then with more."""
    size = bench.size
    by = {size.card_seeds[-1]: size.card_factors}  # the effect of each factor, once all seeds are there
    return {
        f"{seeds}-seeds": partial(train, bench, "card", size.card, seeds, by.get(seeds, ()))
        for seeds in size.card_seeds
    }


def references(bench: Bench) -> dict[str, Step]:
    """The reports' networks at full length, each with its own recipe; and where their spread comes from."""
    size = bench.size
    steps: dict[str, Step] = {
        f"{seeds}-seeds": partial(train, bench, "references", size.references, seeds) for seeds in size.reference_seeds
    }
    spread = partial(train, bench, "spread", size.spread, size.spread_seeds, peek=True)
    first, *others = steps
    return {first: steps[first], "spread": spread, **{name: steps[name] for name in others}}


def inference(bench: Bench) -> dict[str, Step]:
    """The latency of a network of the reports and of what `fast` exported, from the host's memory and the device's.

    The first is trained for one epoch only: its speed does not depend on its weights.
    """
    size = bench.size
    steps: dict[str, Step] = {}
    providers = [*["cuda"] * (bench.device.type == "cuda"), "cpu"]

    def from_host(file: Path, provider: str) -> Measurement:
        check_there(file)
        largest = size.largest_on_cpu if provider == "cpu" else max(size.batches)
        batches = [batch for batch in size.batches if batch <= largest]
        (record,) = latency.measure([file], provider, batches, size.measure_s)
        return Measurement({**record.model_dump(mode="json"), "latencies": list(map(some_calls, record.latencies))})

    def on_device(file: Path) -> Measurement:
        check_there(file)
        latencies, missing = resident.measure_resident(file, bench.device, list(size.batches), size.measure_s)
        not_measured = [engine.model_dump(mode="json") for engine in missing]
        return Measurement({"latencies": list(map(some_calls, latencies)), "missing": not_measured})

    brief = Study(
        name=STEP_PRESET,
        question="How fast does it answer?",
        base=Base(model=STEP_PRESET, recipe="fast"),
        set={"recipe.epochs": 1},
        factors={"model": [STEP_PRESET]},
    )
    steps[STEP_PRESET] = partial(train, bench, STEP_PRESET, brief, 1)
    steps |= exports(bench, STEP_PRESET)
    for name, provider, precision in itertools.product(size.served, providers, size.precisions):
        what, file = f"{name}-{precision}-{provider}", exported(bench, name, precision)
        if provider == bench.device.type:
            steps[f"{what}-device"] = partial(on_device, file)
        steps[f"{what}-host"] = partial(from_host, file, provider)
    return steps


PIECES: dict[str, Callable[[Bench], dict[str, Step]]] = {
    "peaks": peaks,
    "train-speed": train_speed,
    "fast": fast,
    "card": card,
    "inference": inference,
    "references": references,
}
WORK = {  # the folders of each in `work`
    "fast": tuple(folder for name in NETWORKS for folder in (name, f"{name}-baselines")),
    "inference": (STEP_PRESET,),
    "card": ("card",),
    "references": ("references", "spread"),
}


def notice(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def check_there(file: Path) -> None:
    """Raises InputError where an exported file is not there."""
    if not file.exists():
        raise InputError(
            f"{file.name} is not in {file.parent}: it was rejected, or made elsewhere; --pieces fast,inference --again "
            "makes it here"
        )


def some_calls(latency: Latency) -> dict[str, Any]:
    """A latency with some of its calls, evenly spaced, where there are many."""
    every = -(-len(latency.calls_ms) // KEPT_CALLS)
    kept = latency.calls_ms[::every]
    return {**latency.model_dump(mode="json"), "calls_ms": kept, "blocks": latency.blocks if every == 1 else []}


def train(
    bench: Bench, name: str, study: str | Study, seeds: int, by: Sequence[str] = (), peek: bool = False
) -> Measurement:
    """Trains a study, or goes on with it; what it has, and whether all its trials ended.

    Once all trials ended, the value has the effects of the factors `by` and, with `peek`, what picking the best epoch
    would claim.
    """
    directory = StudyDirectory(bench.work / name)
    if (directory.path / "study.toml").exists():  # it may have grown beyond this step
        seeds = max(seeds, directory.study.seeds)
    asked = load_study(study) if isinstance(study, str) else study
    asked = asked.change(seeds, bench.data, bench.size.settings)
    images = load_data(bench.data)
    cells = asked.cells(images)
    with directory.written(asked, images, cells):
        train_pending(bench, directory, images, [trial for cell in cells for trial in cell.trials])
    value = trained(directory)
    ended = all(len(cell["records"]) + len(cell["failed"]) == cell["planned"] for cell in value["cells"])
    if ended and value["failures"] and not any(cell["records"] for cell in value["cells"]):
        raise InputError(f"every trial of {name} failed, the first by: {next(iter(value['failures'].values()))}")
    if ended and by and not value["failures"]:
        value["effects"] = {factor: effects(directory, factor) for factor in by}
    if ended and peek:
        value["peek"] = as_json(peek_table(directory, read_results(directory)))
    return Measurement(value, ended)


def train_pending(bench: Bench, directory: StudyDirectory, images: ImageData, trials: list[Trial]) -> None:
    """Trains the trials that have no record, until the time is up."""
    trials = by_seed(trials)
    pending = [trial for trial in trials if directory.record(trial.id) is None and not directory.adopt(trial.id)]
    chosen = [
        bench.size.execution.plan(trial.model, planned_steps(trial, images.trained_on(trial.hold_out)), bench.device)
        for trial in pending
    ]
    execution, without = bench.size.execution.usable(chosen, bench.device)
    for text in without:
        notice(f"trained without {text}")
    resident = ResidentData(images, bench.device)
    events = run_local(
        pending, resident, directory, execution=execution, stop=lambda step: time.monotonic() >= bench.until
    )
    with suppress(Stopped):  # at the step where the time was up; the next call goes on from there
        for event in events:
            if isinstance(event, TrialNote):
                notice(event.text)
            elif isinstance(event, TrialFailed):
                notice(f"trial {event.trial.id} failed: {event.reason}")


def trained(directory: StudyDirectory) -> dict[str, Any]:
    """The cells of a study directory with the records of their trials."""
    failures: dict[str, str] = {}
    cells: list[dict[str, Any]] = []
    for cell in directory.plan.cells:
        records = [record for trial in cell.trials if (record := directory.record(trial))]
        done = {record.trial for record in records}
        failed = {
            trial: failure.error
            for trial in cell.trials
            if trial not in done and (failure := directory.failure(trial)) is not None
        }
        failures |= failed
        cells.append(
            {
                "model": cell.model_name,
                "levels": cell.levels,
                "planned": len(cell.trials),
                "failed": sorted(failed),
                "records": [record.model_dump(mode="json", exclude={"environment"}) for record in records],
            }
        )
    return {"cells": cells, "failures": failures, "reported": directory.study.reported}


def effects(directory: StudyDirectory, factor: str) -> list[dict[str, Any]]:
    """The table of a factor's levels."""
    evidence = read_evidence(directory)
    return as_json(factor_levels(evidence, marginals(evidence, [factor])))


def as_json(table: Table) -> list[dict[str, Any]]:
    """A table of the results as its JSON has it."""
    return json.loads(render(table.rows, "json"))


def exported(bench: Bench, name: str, precision: Precision) -> Path:
    return bench.work / "export" / f"{name}{'' if precision == 'fp32' else f'-{precision}'}.onnx"


def exports(bench: Bench, name: str) -> dict[str, Step]:
    return {
        f"export-{name}-{precision}": partial(export, bench, name, precision) for precision in bench.size.precisions
    }


def export(bench: Bench, name: str, precision: Precision) -> Measurement:
    """Exports the best trial of a study, certified on CUDA too where ONNX Runtime has it; the certificate.

    A file that CUDA does not run, or that does not pass there, is certified on the CPU, and `not_on_cuda` says why.
    """
    directory, file = StudyDirectory(bench.work / name), exported(bench, name, precision)
    row = best_row(read_results(directory).rows)
    if row is None:
        raise InputError(f"{name}: no trial of this study is finished")
    trial = best_record(row).trial
    data, config = load_data(bench.data), directory.config(trial)
    if config is None:
        raise InputError(f"{directory.trial(trial)}: there is no config.json")
    splits = ResidentData(data, torch.device("cpu")).splits(config.hold_out, config.seed)
    reference = Reference(load(directory.checkpoint(trial)), Images(**splits.arrays()), "uint8")

    def certified_on(*providers: str) -> dict[str, Any]:
        for kept in (file, file.with_suffix(".rejected.onnx")):
            kept.unlink(missing_ok=True)
        directory.enter_test_read(trial, "export", len(data.test))
        try:
            published: Published = publish(reference, precision, providers=providers)
        except PrecisionError as error:
            raise InputError(f"{name} was not exported in {precision}: {error}") from error
        written = published.write(file)
        certificate = published.certificate.model_dump(mode="json")
        return {"file": written.name, "bytes": written.stat().st_size, "certificate": certificate}

    if bench.device.type != "cuda" or "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return Measurement(certified_on("cpu") | {"not_on_cuda": "ONNX Runtime has no CUDA here"})
    try:
        found = certified_on("cpu", "cuda")
    except InputError as error:
        return Measurement(certified_on("cpu") | {"not_on_cuda": str(error)})
    if not found["certificate"]["passed"]:
        rejected = {"not_on_cuda": "did not pass", "rejected": found["certificate"]}
        return Measurement(certified_on("cpu") | rejected)
    return Measurement(found)
