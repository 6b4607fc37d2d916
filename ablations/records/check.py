"""Checks that all files of a study are there and whole. Imports no torch."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from expertgrid.ablations.records.directory import (
    OF_A_STUDY,
    OF_A_TRIAL,
    SUMS,
    TRAINING,
    StudyDirectory,
    TestRead,
    TrainingRates,
    changed_files,
    read_record,
)
from expertgrid.bench.record import LatencyRecord
from expertgrid.model.system.errors import InputError, reason_of
from expertgrid.model.system.files import cut_incomplete_line, make_folder, sync_folder, whole_lines
from expertgrid.model.training.resume import whole_state

Value = TypeVar("Value")
AGAIN = "run the same command again"
MOVE = "`expertgrid check --repair` moves the trial away, and the next run trains it again"


@dataclass(frozen=True)
class Found:
    """What was found of one file or folder."""

    kind: Literal["damaged", "unfinished", "note"]
    place: str  # below the study directory
    what: str
    remedy: str = ""
    trial: str = ""  # the id of the trial that it belongs to

    def __str__(self) -> str:
        return f"{self.kind}: {self.place}: {self.what}" + (f"; {self.remedy}" if self.remedy else "")


@dataclass(frozen=True)
class Checked:
    """The result of a check."""

    trials: int  # that are planned
    finished: int  # of them
    found: list[Found]

    @property
    def damaged(self) -> list[Found]:
        return [found for found in self.found if found.kind == "damaged"]


def check_files(directory: StudyDirectory) -> Checked:
    """Reads all files of a study. What is damaged is in the result: nothing is raised for it."""
    found = list(_study_files(directory))
    try:
        planned = [trial for cell in directory.plan.cells for trial in cell.trials]
    except InputError:  # it is named already; the trials are still looked at
        planned = sorted(place.name for place in directory.path.glob("trials/*"))
    planned = list(dict.fromkeys(planned))
    for trial in planned:
        found += _trial_files(directory, trial)
    others = {place.name for place in directory.path.glob("trials/*")} - set(planned)
    if others:
        found.append(Found("note", "trials", f"{len(others)} trials are not in the plan, and were not looked at"))
    found += _exports(directory.path)
    finished = sum((directory.trial(trial) / "record.json").exists() for trial in planned)
    return Checked(len(planned), finished, found)


def repair(directory: StudyDirectory, checked: Checked) -> list[str]:
    """Moves damaged trials to damaged/ID, and cuts an incomplete line from the ledger's end. Says what it did.

    Nothing is deleted: where damaged/ID is there already, a number is added. The caller holds the directory.
    """
    done = []
    for trial in dict.fromkeys(found.trial for found in checked.damaged if found.trial):
        place = directory.path / "damaged"
        make_folder(place)
        names = (trial if number == 1 else f"{trial}-{number}" for number in range(1, 10**6))
        target = next(place / name for name in names if not os.path.lexists(place / name))
        directory.trial(trial).rename(target)
        sync_folder(place)
        sync_folder(target.parent)
        sync_folder(directory.path / "trials")
        done.append(f"moved: trials/{trial} to damaged/{target.name}; the next run trains the trial again")
    ledger = directory.path / "ledger.jsonl"
    if ledger.exists() and (cut := cut_incomplete_line(ledger)):
        done.append(f"cut: ledger.jsonl: {cut} bytes of an incomplete last line")
    return done


def _study_files(directory: StudyDirectory) -> Iterator[Found]:
    path, wrong = directory.path, set()
    if not (path / "study.toml").exists():
        yield Found("damaged", "study.toml", "missing", f"{AGAIN}, which writes it again")
        wrong.add("study.toml")
    elif problem := _problem(lambda: directory.study):
        yield Found("damaged", "study.toml", problem, f"move it away and {AGAIN}, which writes it again")
        wrong.add("study.toml")
    if not (path / "plan.json").exists():
        yield Found("damaged", "plan.json", "missing", f"{AGAIN}, which writes it again")
        wrong.add("plan.json")
    elif not wrong and (problem := _problem(lambda: directory.plan)):
        yield Found("damaged", "plan.json", problem, f"move it away and {AGAIN}, which writes it again")
        wrong.add("plan.json")
    try:
        changed = changed_files(path, OF_A_STUDY)
    except InputError as error:
        yield Found("damaged", SUMS, _first_part(error), f"{AGAIN}, which writes it again")
        changed = {}
    for name, how in changed.items():
        if name not in wrong:
            yield Found("damaged", name, f"{how} since {SUMS} was written", f"{AGAIN}, which writes both again")
    if not (path / SUMS).exists():
        yield Found("note", SUMS, "missing, as in studies of older versions: study.toml and plan.json were only read")
    yield from _ledger(path / "ledger.jsonl")


def _ledger(ledger: Path) -> Iterator[Found]:
    if not ledger.exists():
        return
    wrong = []
    lines = whole_lines(ledger)
    for number, line in enumerate(lines, 1):
        if problem := _problem(lambda line=line, number=number: TestRead.of_line(line, f"line {number}")):
            wrong.append(problem)
    if wrong:
        more = f", and {len(wrong) - 1} lines more" if len(wrong) > 1 else ""
        remedy = "put back a copy of the file, or delete the damaged lines"
        yield Found("damaged", ledger.name, f"{wrong[0]}{more}", remedy)
    if rest := ledger.stat().st_size - sum(len(line) + 1 for line in lines):
        what = f"{rest} bytes of an incomplete last line, which no reader takes"
        yield Found("unfinished", ledger.name, what, "the next line that is written replaces it")


def _trial_files(directory: StudyDirectory, trial: str) -> Iterator[Found]:
    place = directory.trial(trial)
    wrong: dict[str, str] = {}  # by the file's name
    if not place.is_dir():
        yield Found("unfinished", f"trials/{trial}", "not begun", "the next run trains it", trial)
        return
    record = _read("record.json", lambda: directory.record(trial), wrong)
    if record is not None and record.trial != trial:
        wrong["record.json"] = f"of another trial: {record.trial}"
    finished = record is not None or "record.json" in wrong
    config = _read("config.json", lambda: directory.config(trial), wrong)
    if config is not None and config.id != trial:
        wrong["config.json"] = f"of another trial: {config.id}"
    failure = _read("failure.json", lambda: directory.failure(trial), wrong)
    _read("adopted.json", lambda: directory.adopted(trial), wrong)
    _read("predictions.npz", lambda: directory.predictions(trial), wrong)
    epochs = _read("epochs.jsonl", lambda: directory.epochs(trial), wrong)
    if record is not None and epochs is not None and record.epochs != len(epochs):
        wrong["epochs.jsonl"] = f"has {len(epochs)} epochs, the record has {record.epochs}"
    notes = _of_finished(directory, trial, wrong) if finished else []
    resume = directory.resume_file(trial)
    if not finished and resume.exists():
        _read("resume.pt", lambda: whole_state(resume), wrong)
    for name, what in wrong.items():
        yield Found("damaged", f"trials/{trial}/{name}", what, MOVE, trial)
    if wrong:
        return
    yield from (Found("note", f"trials/{trial}", note, trial=trial) for note in notes)
    if not finished:
        state = f"failed ({failure})" if failure else "begun" if config else "not begun"
        yield Found("unfinished", f"trials/{trial}", state, "the next run trains it", trial)


def _read(name: str, read: Callable[[], Value], wrong: dict[str, str]) -> Value | None:
    """What a reader gives. Where it raises, what is wrong is entered under the file's name."""
    try:
        return read()
    except InputError as error:
        wrong[name] = _first_part(error)
        return None


def _of_finished(directory: StudyDirectory, trial: str, wrong: dict[str, str]) -> list[str]:
    """Enters what is wrong with the files of a finished trial. Returns what is no damage and still worth a line."""
    place, notes = directory.trial(trial), []
    try:
        changed = changed_files(place, OF_A_TRIAL)
    except InputError as error:
        wrong[SUMS] = _first_part(error)
        changed = {}
    has_sums = (place / SUMS).exists()
    for name, how in changed.items():
        if (name, how) != ("model.safetensors", "missing"):
            wrong.setdefault(name, f"{how} since {SUMS} was written")
    if not (place / "config.json").exists():
        wrong["config.json"] = "missing"
    if not has_sums:
        notes.append(f"no {SUMS}, as in trials of older versions: its files were only read")
        if not (place / "predictions.npz").exists():
            notes.append("no predictions, as in trials of older versions")
    weights = directory.checkpoint(trial)
    if not weights.exists():
        notes.append("no weights")
    elif "model.safetensors" not in wrong and (problem := _weights_problem(weights, trial)):
        wrong["model.safetensors"] = problem
    if directory.resume_file(trial).exists():
        notes.append("resume.pt is not needed any more: `expertgrid clean` removes it")
    return notes


def _weights_problem(file: Path, trial: str) -> str:
    """What is wrong with a checkpoint; "" for a whole one of this trial. Its header gives the place of each tensor."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as opened:
            about = opened.metadata() or {}
        found = json.loads(about["trained"])["trial"]
    except (SafetensorError, OSError, ValueError, LookupError, TypeError) as error:
        return f"not a checkpoint, or a damaged one ({reason_of(error)})"
    return "" if found == trial else f"of another trial: {found}"


def _exports(path: Path) -> Iterator[Found]:
    if problem := _problem(lambda: read_record(TrainingRates, path / TRAINING)):
        yield Found("damaged", TRAINING, problem, "delete it and run expertgrid bench-train again")
    for file in sorted((path / "bench").glob("*.json")):
        if problem := _problem(lambda file=file: read_record(LatencyRecord, file)):
            yield Found("damaged", f"bench/{file.name}", problem, "delete it and run expertgrid bench again")
    if (path / "export").is_dir():
        from expertgrid.export.exported import export_problems  # which imports torch

        for file, problem in export_problems(path / "export"):
            if problem:
                yield Found("damaged", f"export/{file.name}", problem, "delete it and run expertgrid export again")


def _problem(read: Callable[[], object]) -> str:
    """What a reader finds wrong; "" where it reads."""
    try:
        read()
    except InputError as error:
        return _first_part(error)
    return ""


def _first_part(error: InputError) -> str:
    """What is wrong, without the remedy, and without the file, which the line names."""
    text = str(error).split("; the file is damaged: ")[0]
    file, colon, rest = text.partition(": ")
    if colon and "/" in file:
        return rest
    head, dot, rest = text.partition(".json.")  # a field of a file
    return f"field {rest}" if dot and "/" in head else text
