"""The steps of `python -m bench.gpu`, in the order of their worth, so that a cut costs least."""

import itertools
import json
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ablations.engines import planned_steps, run_local
from ablations.events import Stopped, TrialFailed, TrialNote, by_seed
from ablations.records import StudyDirectory
from ablations.results.evidence import marginals, read_evidence
from ablations.results.rendering import Table, render
from ablations.results.rows import best_record, best_row, read_results
from ablations.results.tables import factor_levels, peek_table
from ablations.study import Base, Study
from ablations.training.splits import ResidentData
from ablations.training.trial import Trial
from bench.gpu import at_once, check
from bench.gpu.decoded import load_decoded
from bench.gpu.plan import Bench, Measurement, Step, Trainings, matched_baselines
from bench.peaks import measure_peaks
from bench.step import measure_step
from bench.training import measure_training
from bench.untrained import untrained_checkpoint
from export.metadata import Precision
from model.errors import InputError
from model.fast.execution import ExecutionPlan
from model.files import write_whole
from model.presets import PRESETS
from model.variants import vary

KEPT_CALLS = 200  # of each engine and batch size; the percentiles are of all
SLICE_S = 120.0  # of a training; then its state is saved
WAYS = {  # to take a training step
    "kernels": ExecutionPlan(kernels=True, graphs=True),
    "eager": ExecutionPlan(),
    "graphs": ExecutionPlan(graphs=True),
    "compiled": ExecutionPlan(compile=True, graphs=True),
}
MINUTES = {"check": 1.0, "peaks": 0.5, "train-speed": 4.5, "fast": 5.0, "card": 12.0, "references": 3.0}


def steps(bench: Bench) -> list[Step]:
    """All steps in the order of their worth: those of 25 minutes first, then what the next loans are for."""
    size = bench.size
    card = [
        _training("card", f"{seeds}-seeds", Trainings("card", size.card, seeds, by=by))
        for seeds, by in zip(size.card_seeds, [*[()] * (len(size.card_seeds) - 1), size.card_factors])
    ]
    references = [
        _training("references", f"{seeds}-seeds", Trainings("references", size.references, seeds))
        for seeds in size.reference_seeds
    ]
    # the first epoch records the graphs, and the second has the speed
    brief = Trainings("references-speed", size.references, 1, settings={"recipe.epochs": 2})
    spread = Trainings("spread", size.spread, size.spread_seeds, peek=True)
    return [
        *check.steps(bench),
        Step("peaks", "peaks", 60, peaks, expected_s=20),
        *speed_of_steps(bench, ("kernels", "eager", "graphs")),
        *own_networks(bench, first=True),
        card[0],
        _training("references", "speed", brief),
        *speed_of_trainings(bench),
        *at_once.steps(bench),
        *speed_of_steps(bench, ("compiled",)),
        *inference(bench),
        *own_networks(bench, first=False),
        *card[1:],
        references[0],
        _training("references", "spread", spread),
        *references[1:],
    ]


def measure(bench: Bench, piece: str, name: str) -> Measurement:
    """What the step of this piece and name measures."""
    return next(step for step in steps(bench) if (step.piece, step.name) == (piece, name)).measure(bench)


def _training(piece: str, name: str, trainings: Trainings) -> Step:
    return Step(piece, name, SLICE_S, partial(train, trainings=trainings), trainings=trainings, expected_s=0, start_s=4)


def peaks(bench: Bench) -> Measurement:
    """What the device can do at most."""
    found = [measure_peaks(bench.device, **bench.size.peaks) for _ in range(bench.size.rounds)]
    return Measurement([rates.model_dump() for rates in found])


def speed_of_steps(bench: Bench, ways: Sequence[str]) -> list[Step]:
    """A step of two networks in some of the `WAYS`, those of a CPU there: its losses, its kernels, its floor."""
    size = bench.size
    ways = ways if bench.device.type == "cuda" else [name for name in ways if name == "eager"]

    def step(bench: Bench, preset: str, means: ExecutionPlan) -> Measurement:
        return Measurement(measure_step(preset, bench.device, means, **size.step).model_dump(mode="json"))

    return [
        Step(
            "train-speed",
            f"step-{preset}-{name}",
            180 if WAYS[name].compile else 60,
            partial(step, preset=preset, means=WAYS[name]),
            tuple(feature for feature in ("kernels", "graphs") if getattr(WAYS[name], feature)),
            expected_s=60 if WAYS[name].compile else 8,
        )
        for name in ways
        for preset in size.stepped
    ]


def speed_of_trainings(bench: Bench) -> list[Step]:
    """All presets, trained beside the PyTorch baseline."""

    def training(bench: Bench, preset: str) -> Measurement:
        size = bench.size
        speed = measure_training(preset, device=bench.device, execution=bench.execution, notice=notice, **size.training)
        return Measurement(speed.model_dump(mode="json"))

    return [
        Step("train-speed", preset, 90, partial(training, preset=preset), expected_s=25)
        for preset in bench.size.presets
    ]


def own_networks(bench: Bench, first: bool) -> list[Step]:
    """expertgrid's own networks by their own recipes: with their first seeds; or with more, and matched baselines."""
    size = bench.size

    def study(name: str, models: Sequence[str]) -> Study:
        return Study(
            name=name,
            question="What do a few seconds of training reach, and do experts earn their cost in them?",
            base=Base(model=name, recipe=name),
            set={"recipe.tta": "flip"},
            factors={"model": list(models)},
        )

    def networks(seeds: int, name: str) -> Step:
        return _training("fast", f"{name}-{seeds}", Trainings(name, study(name, [name]), seeds, serves=True))

    if first:
        return [networks(seeds, name) for name, seeds in size.networks.items()]
    more = [networks(size.seeds, name) for name, seeds in size.networks.items() if size.seeds > seeds]
    return more + [
        _training("fast", beside, Trainings(beside, study(name, matched_baselines(name)), size.seeds))
        for name in (size.networks if size.baselines else ())
        for beside in (f"{name}-baselines",)
    ]


def inference(bench: Bench) -> list[Step]:
    """The latency of networks as exported files, from the device's memory and the host's.

    The networks are untrained: their speed does not depend on their weights.
    """
    providers = [*["cuda"] * (bench.device.type == "cuda"), "cpu"]

    def from_host(bench: Bench, name: str, precision: Precision, provider: str) -> Measurement:
        from bench import latency, resident  # ONNX Runtime is needed here alone
        from export.session import check_provider

        try:
            check_provider(provider)
        except InputError as error:  # of every network alike
            missing = resident.NotMeasured(engine=f"onnxruntime {provider}", batch=1, reason=str(error))
            return Measurement({"latencies": [], "missing": [missing.model_dump(mode="json")]})
        file = untrained_file(bench, name, precision)
        largest = bench.size.largest_on_cpu if provider == "cpu" else max(bench.size.batches)
        batches = [batch for batch in bench.size.batches if batch <= largest]
        (record,) = latency.measure([file], provider, batches, bench.size.measure_s)
        return Measurement({**record.model_dump(mode="json"), "latencies": list(map(some_calls, record.latencies))})

    def on_device(bench: Bench, name: str, precision: Precision, provider: str) -> Measurement:
        from bench import resident

        file = untrained_file(bench, name, precision)
        latencies, missing = resident.measure_resident(
            file, bench.device, list(bench.size.batches), bench.size.measure_s
        )
        not_measured = [engine.model_dump(mode="json") for engine in missing]
        return Measurement({"latencies": list(map(some_calls, latencies)), "missing": not_measured})

    found = []
    for name, provider, precision in itertools.product(bench.size.served, providers, bench.size.precisions):
        asked = {"name": name, "precision": precision, "provider": provider}
        what = f"{name}-{precision}-{provider}"
        if provider == bench.device.type:
            found.append(Step("inference", f"{what}-device", 120, partial(on_device, **asked), expected_s=30))
        found.append(Step("inference", f"{what}-host", 120, partial(from_host, **asked), expected_s=20))
    return found


PIECES = ("check", "peaks", "train-speed", "fast", "card", "references", "inference")


def notice(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def some_calls(latency: Any) -> dict[str, Any]:
    """A `bench.latency.Latency` with some of its calls, evenly spaced, where there are many."""
    every = -(-len(latency.calls_ms) // KEPT_CALLS)
    kept = latency.calls_ms[::every]
    return {**latency.model_dump(mode="json"), "calls_ms": kept, "blocks": latency.blocks if every == 1 else []}


@cache
def resident(source: str, folder: Path, device: torch.device) -> ResidentData:
    """The data on the device, which the trainings of a process share."""
    return ResidentData(load_decoded(source, folder), device)


def train(bench: Bench, trainings: Trainings) -> Measurement:
    """Trains the next trial of a study, or goes on with it; what the study has, and whether all its trials ended.

    Once all trials ended, the value has the effects of the factors `by` and, with `peek`, what picking the best epoch
    would claim.
    """
    directory, seeds = StudyDirectory(bench.work / trainings.name), trainings.seeds
    if (directory.path / "study.toml").exists():  # it may have grown beyond this step
        seeds = max(seeds, directory.study.seeds)
    asked = trainings.asked(bench, seeds)
    data = resident(bench.data, bench.work / "decoded", bench.device)
    cells = asked.cells(data.data)
    with directory.written(asked, data.data, cells):
        train_next(bench, directory, data, [trial for cell in cells for trial in cell.trials])
    value = trained(directory)
    ended = all(len(cell["records"]) + len(cell["failed"]) == cell["planned"] for cell in value["cells"])
    if ended and value["failures"] and not any(cell["records"] for cell in value["cells"]):
        raise InputError(
            f"every trial of {trainings.name} failed, the first by: {next(iter(value['failures'].values()))}"
        )
    if ended and trainings.by and not value["failures"]:
        value["effects"] = {factor: effects(directory, factor) for factor in trainings.by}
    if ended and trainings.peek:
        value["peek"] = as_json(peek_table(directory, read_results(directory)))
    if ended and trainings.serves:
        keep_best(directory, weights_of(bench.place, trainings.name))
    return Measurement(value, ended)


def train_next(bench: Bench, directory: StudyDirectory, data: ResidentData, trials: list[Trial]) -> None:
    """Trains the first trial that did not end before, until the time is up."""
    pending = [
        trial
        for trial in by_seed(trials)
        if directory.record(trial.id) is None and directory.failure(trial.id) is None and not directory.adopt(trial.id)
    ][:1]
    chosen = [
        bench.execution.plan(trial.model, planned_steps(trial, data.data.trained_on(trial.hold_out)), bench.device)
        for trial in pending
    ]
    execution, without = bench.execution.usable(chosen, bench.device)
    for text in without:
        notice(f"trained without {text}")
    events = run_local(pending, data, directory, execution=execution, stop=lambda step: time.monotonic() >= bench.until)
    with suppress(Stopped):  # at the step where the time was up; the next call goes on from there
        for event in events:
            if isinstance(event, TrialNote):
                notice(event.text)
            elif isinstance(event, TrialFailed):
                notice(f"trial {event.trial.id} failed: {event.reason}")


def weights_of(place: Path, name: str) -> Path:
    """Where the best checkpoint of a network is kept for `certify`."""
    return place / "work" / "weights" / f"{name}.safetensors"


def keep_best(directory: StudyDirectory, file: Path) -> None:
    """Copies the checkpoint of a study's best trial, unless that was trained on a machine that is gone."""
    row = best_row(read_results(directory).rows)
    if row is not None and (checkpoint := directory.checkpoint(best_record(row).trial)).exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(checkpoint, file)


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


def untrained_file(bench: Bench, name: str, precision: Precision) -> Path:
    """An exported network whose weights are random, made where it is not there."""
    from export.publish import Images, Reference, publish

    file = bench.work / "untrained" / f"{name}-{precision}.onnx"
    if file.exists():
        return file
    config = vary(PRESETS[name], "width", bench.size.settings.get("width", 1.0))
    pixels_BHWC = np.random.default_rng(0).integers(256, size=(32, 32, 32, config.in_chans), dtype=np.uint8)
    labels_B = np.full(len(pixels_BHWC), -1)  # no class: it is not asked how right the network is
    images = Images(pixels_BHWC, pixels_BHWC, labels_B, pixels_BHWC, labels_B)
    checkpoint = untrained_checkpoint(name, config)
    write_whole(file, publish(Reference(checkpoint, images, "uint8"), precision).model)
    return file
