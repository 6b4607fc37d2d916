"""Checks that all files of a study are there and undamaged. Imports no torch.

Whether the numbers in them follow from each other is a matter of `expertgrid verify`.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from expertgrid.ablations.records.checksums import OF_A_STUDY, OF_A_TRIAL, SUMS, changed_files
from expertgrid.ablations.records.directory import TRACEBACK, TRAINING, StudyDirectory, read_latency
from expertgrid.ablations.records.ledger import LEDGER
from expertgrid.model.probe import NETWORK
from expertgrid.model.system.errors import InputError, reason_of
from expertgrid.model.system.files import cut_incomplete_line, opened_file, read_whole
from expertgrid.model.training.parts import CODES, changed_parts
from expertgrid.model.training.resume import whole_state

Value = TypeVar("Value")
AGAIN = "run the same command again"
MOVE = "`expertgrid check --repair` moves the trial away, and the next run trains it again"


@dataclass(frozen=True)
class FileState:
    """A file or folder that is not as that of a finished study is."""

    kind: Literal["damaged", "unfinished", "note"]
    place: str  # below the study directory
    problem: str
    remedy: str = ""
    trial: str = ""  # the id of the trial that it belongs to

    def __str__(self) -> str:
        return f"{self.kind}: {self.place}: {self.problem}" + (f"; {self.remedy}" if self.remedy else "")


@dataclass(frozen=True)
class CheckResult:
    trials: int  # that are planned
    finished: int  # of them
    states: list[FileState]

    @property
    def damaged(self) -> list[FileState]:
        return [state for state in self.states if state.kind == "damaged"]


def check_files(directory: StudyDirectory) -> CheckResult:
    """Reads all files of a study. What is damaged is in the result: nothing is raised for it."""
    states = list(_study_files(directory))
    folders = {folder.name for folder in directory.path.glob("trials/*")}
    try:
        planned = directory.read_plan().trials
    except InputError:  # it is named already; the trials are still looked at
        planned = sorted(folders)
    finished = [trial for trial in planned if os.path.lexists(directory.trial(trial) / "record.json")]
    problems: dict[str, str] = {}
    reads = _read(LEDGER, directory.test_reads, problems)
    trained = {read.trial for read in reads or () if read.reader == "training"}
    if reads is not None and (unread := [trial for trial in finished if trial not in trained]):
        more = f" and {len(unread) - 1} others" if unread[1:] else ""
        problems[LEDGER] = f"lines are missing: of the training of {unread[0]}{more}, which read the test split"
    states += _damaged(problems, "put back a copy of the file; a damaged line can be deleted")
    keeps_weights = any(os.path.lexists(directory.checkpoint(trial)) for trial in planned)
    for trial in planned:
        states += _trial_files(directory, trial, trial in trained, keeps_weights)
    if others := folders - set(planned):
        states.append(FileState("note", "trials", f"{len(others)} trials are not in the plan, and were not looked at"))
    states += _measurements(directory)
    states += _exports(directory.path / "export")
    return CheckResult(len(planned), len(finished), states)


def repair(directory: StudyDirectory, result: CheckResult) -> list[str]:
    """Moves damaged trials to damaged/ID, and cuts an incomplete line from the ledger's end. Says what it did.

    Nothing is deleted: where damaged/ID is there already, a number is added. The caller holds the directory.
    """
    done = []
    for trial in dict.fromkeys(state.trial for state in result.damaged if state.trial):
        target = directory.move_away(trial, "damaged")
        done.append(f"moved: trials/{trial} to damaged/{target.name}; the next run trains the trial again")
    if cut := _read(LEDGER, lambda: cut_incomplete_line(directory.path / LEDGER), {}):
        done.append(f"cut: {LEDGER}: {cut} bytes of an incomplete last line")
    return done


def _read(name: str, read: Callable[[], Value], problems: dict[str, str]) -> Value | None:
    """What a reader gives. Where it raises, what is wrong is entered under the file's name."""
    try:
        return read()
    except (InputError, OSError) as error:
        problems[name] = error.problem if isinstance(error, InputError) else f"cannot be read: {error.strerror}"
        return None


def _damaged(problems: dict[str, str], remedy: str, folder: str = "", trial: str = "") -> list[FileState]:
    """The states of files by their names in a folder."""
    return [FileState("damaged", folder + name, problem, remedy, trial) for name, problem in problems.items()]


def _study_files(directory: StudyDirectory) -> Iterator[FileState]:
    path, unreadable = directory.path, {}
    lost = {name: "missing" for name in OF_A_STUDY if not os.path.lexists(path / name)}
    study = None if "study.toml" in lost else _read("study.toml", directory.read_study, unreadable)
    if study and "plan.json" not in lost:
        _read("plan.json", lambda: directory.read_plan(study), unreadable)
    for name, how in (_read(SUMS, lambda: changed_files(path, OF_A_STUDY), lost) or {}).items():
        if name not in unreadable:
            lost.setdefault(name, how)
    yield from _damaged(unreadable, f"move it away and {AGAIN}, which writes it again")
    yield from _damaged(lost, f"{AGAIN}, which writes it again")
    if not os.path.lexists(path / SUMS):
        note = "missing, as in studies of older versions: study.toml and plan.json were only read"
        yield FileState("note", SUMS, note)
    for name in ("trials", "export", "bench"):
        if os.path.lexists(path / name) and not os.path.isdir(path / name):
            yield FileState("damaged", name, "not a folder", "move it away")
    if rest := (_read(LEDGER, lambda: read_whole(path / LEDGER), {}) or b"").rpartition(b"\n")[2]:
        problem = f"{len(rest)} bytes of an incomplete last line, which no reader takes"
        yield FileState("unfinished", LEDGER, problem, "the next line that is written replaces it")


def _trial_files(directory: StudyDirectory, trial: str, trained: bool, keeps_weights: bool) -> Iterator[FileState]:
    """`trained`: the ledger says that its training came to the end. `keeps_weights`: the study does, of some trial."""
    place, problems, folder = f"trials/{trial}", {}, directory.trial(trial)
    if os.path.lexists(folder) and not os.path.isdir(folder):
        yield FileState("damaged", place, "not a folder", MOVE, trial)
        return
    if not os.path.lexists(folder):
        if trained and not any((directory.path / "damaged").glob(f"{trial}*")):
            yield FileState("damaged", place, "missing, and the ledger has its training", f"{AGAIN}, which trains it")
        else:
            yield FileState("unfinished", place, "not begun", "the next run trains it", trial)
        return
    changed = _read(SUMS, lambda: changed_files(folder, OF_A_TRIAL), problems) or {}
    record = _read("record.json", lambda: directory.record(trial), problems)
    if record is not None and record.trial != trial:
        problems["record.json"] = f"of another trial: {record.trial}"
    finished = record is not None or "record.json" in problems
    config = _read("config.json", lambda: directory.config(trial), problems)
    if config is not None and config.id != trial:
        problems["config.json"] = f"of another trial: {config.id}"
    failure = _read("failure.json", lambda: directory.failure(trial), problems)
    if failure and "traceback" not in failure.model_fields_set:
        _read(TRACEBACK, lambda: read_whole(folder / TRACEBACK), problems)
    _read(NETWORK, lambda: directory.network(trial), problems)
    _read("adopted.json", lambda: directory.adopted(trial), problems)
    if "predictions.npz" not in changed:
        _read("predictions.npz", lambda: directory.predictions(trial), problems)
    epochs = _read("epochs.jsonl", lambda: directory.epochs(trial), problems)
    if record is not None and epochs is not None and record.epochs != len(epochs):
        problems["epochs.jsonl"] = f"has {len(epochs)} epochs, the record has {record.epochs}"
    resume = directory.resume_file(trial)
    if not finished and os.path.lexists(resume):
        _read("resume.pt", lambda: whole_state(resume), problems)
    elif not finished and "record.json" in changed and failure is None:
        problems["record.json"], finished = "missing", True
    notes = _of_finished(directory, trial, changed, problems, keeps_weights) if finished else []
    parts = record.parts if record else {}
    notes += [f"uses the {part} of a module that is not imported" for part in parts if part not in CODES]
    notes += [f"was trained by other code of the {part} than is imported" for part in changed_parts(parts)]
    yield from _damaged(problems, MOVE, f"{place}/", trial)
    if problems:
        return
    yield from (FileState("note", place, note, trial=trial) for note in notes)
    if not finished:
        state = f"failed ({failure})" if failure else "begun" if config else "not begun"
        yield FileState("unfinished", place, state, "the next run trains it", trial)


def _of_finished(
    directory: StudyDirectory, trial: str, changed: dict[str, str], problems: dict[str, str], keeps_weights: bool
) -> list[str]:
    """Enters what is wrong with the files of a finished trial. Returns what is no damage and still worth a line."""
    folder, notes = directory.trial(trial), []
    for name, how in changed.items():
        if keeps_weights or (name, how) != ("model.safetensors", "missing"):
            problems.setdefault(name, how)
    if not os.path.lexists(folder / "config.json"):
        problems["config.json"] = "missing"
    if not os.path.lexists(folder / SUMS):
        notes.append(f"no {SUMS}, as in trials of older versions: its files were only read")
        if not os.path.lexists(folder / "predictions.npz"):
            notes.append("no predictions, as in trials of older versions")
    weights = directory.checkpoint(trial)
    if not os.path.lexists(weights):
        notes.append("no weights")
    elif "model.safetensors" not in problems and (problem := _weights_problem(weights, trial)):
        problems["model.safetensors"] = problem
    if os.path.lexists(directory.resume_file(trial)):
        notes.append("resume.pt is not needed any more: `expertgrid clean` removes it")
    return notes


def _weights_problem(file: Path, trial: str) -> str:
    """What is wrong with a checkpoint; "" for a whole one of this trial. Its header gives the place of each tensor."""
    from safetensors import SafetensorError, safe_open

    try:
        with opened_file(file), safe_open(file, framework="numpy") as opened:
            about = opened.metadata() or {}
        trained = json.loads(about["trained"])["trial"]
    except InputError as error:
        return error.problem
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        return f"not a checkpoint, or a damaged one ({reason_of(error)})"
    return "" if trained == trial else f"of another trial: {trained}"


def _measurements(directory: StudyDirectory) -> Iterator[FileState]:
    training, latency = {}, {}
    for file in directory.path.glob("weights/*.safetensors"):
        if hashlib.sha256(file.read_bytes()).hexdigest() != file.stem:
            yield from _damaged({file.name: "its name is not its checksum"}, f"{AGAIN}, which writes it", "weights/")
    _read(TRAINING, directory.training_rates, training)
    bench = directory.path / "bench"
    for file in sorted(bench.glob("*.json") if os.path.isdir(bench) else ()):
        _read(file.name, lambda file=file: read_latency(file), latency)
    yield from _damaged(training, "delete it and run expertgrid bench-train again")
    yield from _damaged(latency, "delete it and run expertgrid bench again", "bench/")


def _exports(folder: Path) -> Iterator[FileState]:
    if not os.path.isdir(folder):
        return
    from expertgrid.export.exported import export_problems  # which imports torch

    problems = {file.name: problem for file, problem in export_problems(folder) if problem}
    yield from _damaged(problems, "delete it and run expertgrid export again", "export/")
