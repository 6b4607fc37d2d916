"""Checks that the numbers of a study follow from the files beside them."""

import json
import math
import re
import statistics
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np

from expertgrid.ablations.records.directory import StudyDirectory
from expertgrid.ablations.records.plan import RULES
from expertgrid.ablations.records.predictions import Predictions
from expertgrid.ablations.records.record import SPLITS, Record
from expertgrid.ablations.results.evidence import read_evidence
from expertgrid.ablations.results.rows import newest
from expertgrid.ablations.results.tables.study import study_tables
from expertgrid.ablations.study.cells import CONTROL_SEEDS
from expertgrid.model.checkpoint import load
from expertgrid.model.config import Network
from expertgrid.model.cost import cost
from expertgrid.model.probe import probe_of
from expertgrid.model.system.errors import InputError
from expertgrid.model.system.text import SCHEMA, rows_by_key
from expertgrid.model.training.metrics import METRICS
from expertgrid.model.training.trial import Trial

NUMBERS = re.compile(r'<script type="application/json" id="numbers">(.*?)</script>', re.DOTALL)


def verify_study(directory: StudyDirectory) -> "Check":
    """Recomputes a study's numbers. Raises InputError for a directory that is not a study directory."""
    check = Check()
    plan = directory.read_plan()
    labels: dict[tuple[int, bytes], str] = {}
    fingerprints: dict[str, str] = {}
    without = not_run = 0
    probed = cache(probe_of)
    has_weights = any(directory.path.glob("trials/*/model.safetensors"))
    seeds = {trial: seed for cell in plan.cells for trial, seed in plan.seeds_of(cell).items()}
    for trial_id, seed in seeds.items():
        with check.of(f"trial {trial_id}"):
            record, trial = directory.record(trial_id), directory.config(trial_id)
            if record is None:
                continue
            check.equal("trial in record.json", record.trial, trial_id)
            check.equal("seed", record.seed, seed)
            check.true("there is no config.json", trial is not None)
            check.epochs(directory, record, trial)
            if trial is not None:
                check.equal("hash of config.json", trial.id, trial_id)
                check.equal("seed in config.json", trial.seed, seed)
                fingerprints.setdefault(trial.fingerprint, trial_id)
            network = directory.network(trial_id)
            now = probed(trial.model, plan.pixels) if network and trial and plan.pixels else None
            if network and now:
                difference = network.difference(now)
                check.true(f"the network has other {difference} now", not difference)
            not_run += network is not None and now is None
            if network and now is None:
                pass  # it cannot be built
            elif has_weights:
                check.checkpoint(directory, record, trial)
            elif trial is not None and plan.pixels is not None:
                check.cost(record, trial.model, plan.pixels)
            predictions = directory.predictions(trial_id)
            without += predictions is None
            if predictions is not None:
                check.predictions(record, predictions, trial)
                block = seed % CONTROL_SEEDS if plan.hold_out.kind == "rotating" else 0
                images = predictions.validation_labels.tobytes() + predictions.test_labels.tobytes()
                labels.setdefault((block, images), trial_id)
    for block in {block for block, _ in labels}:
        trials = [trial for (other, _), trial in labels.items() if other == block]
        check.true(f"trials of one hold-out have different labels: {', '.join(trials)}", len(trials) < 2)
    trials = list(fingerprints.values())
    check.true(f"trials have different data: {', '.join(trials)}", len(trials) < 2)
    with check.of("ledger.jsonl"):
        check.ledger(directory, list(seeds))
    with check.of("report.html"):
        check.report(directory)
    if without:
        check.skipped.append(f"{without} trials kept no predictions: their accuracies were not recomputed")
    if not_run:
        check.skipped.append(f"{not_run} trials: their networks were not run, as no --import MODULE registers them")
    if not has_weights:
        check.skipped.append("No trial keeps its weights: they were not compared with config.json")
    return check


class Check:
    """Counts the checks and collects the problems, each with its place."""

    def __init__(self) -> None:
        self.checked, self.place = 0, ""
        self.problems: list[str] = []  # numbers and files that do not fit the others
        self.skipped: list[str] = []  # what could not be checked, and why

    @contextmanager
    def of(self, place: str) -> Generator[None]:
        """Problems that are found within get this place. A damaged file is such a problem; the check goes on."""
        self.place = place
        try:
            yield
        except InputError as error:
            self.problems.append(f"{place}: {error}")
        self.place = ""

    def true(self, problem: str, fits: bool) -> None:
        self.checked += 1
        if not fits:
            self.problems.append(f"{self.place}: {problem}" if self.place else problem)

    def equal(self, what: str, written: object, computed: object) -> None:
        floats = isinstance(written, float) and isinstance(computed, float)
        near = floats and math.isclose(written, computed, rel_tol=1e-6)
        self.true(f"{what} is {written}, but {computed} follows from the rest", near or written == computed)

    def epochs(self, directory: StudyDirectory, record: Record, trial: Trial | None) -> None:
        epochs = directory.epochs(record.trial)
        self.equal("epochs", record.epochs, len(epochs))
        if trial is not None:
            self.equal("epochs", record.epochs, trial.recipe.epochs)
        self.equal("numbers in epochs.jsonl", [epoch.epoch for epoch in epochs], list(range(1, len(epochs) + 1)))
        if epochs:
            rates = [epoch.images_per_s for epoch in (epochs[1:] or epochs)]
            self.equal("images_per_s", record.images_per_s, statistics.median(rates))
            self.equal("train_seconds", record.train_seconds, float(sum(epoch.train_seconds for epoch in epochs)))

    def checkpoint(self, directory: StudyDirectory, record: Record, trial: Trial | None) -> None:
        checkpoint = load(directory.checkpoint(record.trial))
        self.equal("trial in model.safetensors", checkpoint.trained.trial, record.trial)
        if trial is not None:
            self.true("model.safetensors has another network than config.json", checkpoint.config == trial.model)
        self.cost(record, checkpoint.config, checkpoint.trained.image_size)

    def cost(self, record: Record, network: Network, pixels: tuple[int, int]) -> None:
        parameters, macs = cost(network, *pixels)
        self.equal("parameters", record.parameters, parameters)
        self.equal("macs", record.macs, macs)

    def predictions(self, record: Record, predictions: Predictions, trial: Trial | None) -> None:
        for split in SPLITS:
            labels_B = getattr(predictions, f"{split}_labels")
            self.equal(f"{split}_images", getattr(record, f"{split}_images"), len(labels_B))
            for suffix in ("", "_flip"):
                predicted_B, name = getattr(predictions, split + suffix), f"{split}_accuracy{suffix}"
                share = None if predicted_B is None else float(np.mean(predicted_B == labels_B))
                self.equal(name, getattr(record, name), share)
            metrics = getattr(record, f"{split}_metrics") if trial else {}
            names = [name for name in metrics if name in METRICS]
            for name, value in (predictions.measured(split, trial.model.num_classes, names) if trial else {}).items():
                self.equal(f"{name} of {split}", metrics[name], value)

    def ledger(self, directory: StudyDirectory, trials: list[str]) -> None:
        reads = directory.test_reads()
        training = {read.trial: read for read in reads if read.reader == "training"}
        for trial in trials:
            record = directory.record(trial) if (directory.trial(trial) / "record.json").exists() else None
            if record is not None:
                self.true(f"has no read of the test split by the training of {trial}", trial in training)
                if trial in training:
                    self.equal(f"images in the read of {trial}", training[trial].images, record.test_images)
        exports = sum(read.reader == "export" for read in reads)
        certificates = len(list((directory.path / "export").glob("*.certificate.json")))
        self.true(f"has {exports} reads by exports, of which there are {certificates}", exports >= certificates)

    def report(self, directory: StudyDirectory) -> None:
        file = directory.path / "report.html"
        if not file.exists():
            return
        numbers = NUMBERS.search(file.read_text(encoding="utf-8", errors="replace"))
        if numbers is None:
            self.skipped.append("report.html embeds no numbers, and was not compared")
            return
        try:
            embedded = json.loads(numbers[1])
            written, tables = embedded.get("newest", ""), embedded["tables"]
        except (ValueError, TypeError, KeyError, AttributeError):
            raise InputError("the numbers embedded in it have no tables") from None
        evidence = read_evidence(directory, embedded.get("metric"))
        newest_time = newest(directory, evidence.results)
        if written < newest_time or (embedded.get("schema"), embedded.get("rules")) != (SCHEMA, RULES):
            self.skipped.append(
                f"report.html is older than the study, or than version {RULES} of the rules, and was not compared; "
                "`expertgrid report` renews it"
            )
            return
        self.equal("time of the newest measurement", written, newest_time)
        fresh = rows_by_key(study_tables(directory, evidence))
        self.equal("tables", sorted(tables), sorted(fresh))
        for key in sorted(tables.keys() & fresh.keys()):
            self.equal(f"number of rows of {key}", len(tables[key]), len(fresh[key]))
            for place, (row, again) in enumerate(zip(tables[key], fresh[key]), 1):
                for title, value in _leaves(again):
                    self.equal(f"{title} in row {place} of {key}", dict(_leaves(row)).get(title), value)


def _leaves(row: dict[str, object], path: str = "") -> Iterator[tuple[str, object]]:
    for title, value in row.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{path}{title} ")
        else:
            yield f"{path}{title}", value
