"""The study directory: what was run and what came of it, as files that appear whole or not at all.

study.toml        the study as it was run
plan.json         its cells, with their levels and trial ids, and the data
SHA256SUMS        the checksums of these two, as `sha256sum --check` reads them
trials/ID/        config.json, epochs.jsonl, model.safetensors, predictions.npz, SHA256SUMS and record.json once done:
                  record.json is written last, and says that the trial is finished; until then resume.pt, and
                  failure.json where training failed; adopted.json where another study trained it
export/  bench/   what `expertgrid export` and `bench` add
training.json     the training speed of each cell alone, where `expertgrid bench-train DIR` measured it
accuracy.svg      the picture of its table
ledger.jsonl      a line for each read of the test split, by a training or by an export, with its checksum
.lock             locked by the process that writes; .lock.json says which process that is
damaged/          what `expertgrid check --repair` moved out of the way

A file is on the disk when the function that writes it returns, so that a power cut takes nothing that was finished.
"""

import json
import shutil
import tempfile
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Literal

import tomli_w
from pydantic import ValidationError

from expertgrid.ablations.records.checksums import OF_A_STUDY, OF_A_TRIAL, changed_files, write_sums
from expertgrid.ablations.records.ledger import TestRead, read_ledger
from expertgrid.ablations.records.lock import LOCK, WRITER, held
from expertgrid.ablations.records.plan import Plan, PlannedCell, RaceRules, read_plan
from expertgrid.ablations.records.predictions import Predictions
from expertgrid.ablations.records.reading import TRAINING, damaged, read_record
from expertgrid.ablations.records.record import Adopted, Failure, Record, TrainingRates
from expertgrid.ablations.study.study import Cell, Study, level_name, read_study
from expertgrid.bench.record import LatencyRecord
from expertgrid.model.system.errors import InputError, invalid
from expertgrid.model.system.files import (
    LEFT_BY_A_CRASH,
    append_line,
    make_folder,
    now,
    sync_folder,
    sync_tree,
    whole_lines,
    write_whole,
)
from expertgrid.model.training.data import ImageData
from expertgrid.model.training.holdout import HoldOut
from expertgrid.model.training.trial import Epoch, Trial

ADOPTS = ".adopt."  # the folder of a trial that is being copied begins so


class StudyDirectory:
    """Reads and writes one study directory. Writers hold it with `written`, or with `held`."""

    def __init__(self, path: Path):
        self.path = path

    def read_study(self) -> Study:
        """The study that was run here. Raises InputError where there is none."""
        file = self.path / "study.toml"
        if not file.is_file():
            raise InputError(f"{self.path}: not a study directory: there is no study.toml in it")
        return read_study(file)

    def read_plan(self, study: Study | None = None) -> Plan:
        """The cells of the study, which is read where it is not given. Raises InputError for those of another study."""
        return read_plan(self.path, study or self.read_study())

    def read_race(self) -> RaceRules | None:
        """The race that was begun here, None where there is none, also where plan and study do not fit each other."""
        plan = read_record(Plan, self.path / "plan.json")
        return None if plan is None else plan.race

    def check_holds(self, study: Study) -> None:
        """Raises InputError where `study` cannot be written here: the directory has something else in it."""
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"--out {self.path}: there is a file of this name")
        if (self.path / "study.toml").exists():
            if apart := study.apart_from(self.read_study()):
                raise InputError(
                    f"--out {self.path}: holds another study, or more of this one: {apart}; give another directory "
                    "with --out"
                )
            self._check_families(study)
        elif (self.path / "plan.json").exists():  # study.toml was lost, and is written again
            read_plan(self.path, study)
        elif self.path.is_dir() and not all(_may_be_there(file.name) for file in self.path.iterdir()):
            if not (self.path / "study.toml").exists():
                raise InputError(f"--out {self.path}: is not empty, and holds no study")
            self.check_holds(study)  # again: since the first look another process has begun a study

    def _check_families(self, study: Study) -> None:
        """Raises InputError for more levels or baselines than there were when the first results came."""
        older = self.read_study()
        if not (self.path / "ledger.jsonl").exists():
            return
        for what, there, here in (
            ("baselines", older.baselines, study.baselines),
            *((f"levels of {name}", older.factors[name], levels) for name, levels in study.factors.items()),
        ):
            if added := [level_name(level) for level in here if level not in there]:
                raise InputError(
                    f"--out {self.path}: has results, and the study now has more {what}: {', '.join(added)}; what is "
                    "compared is declared before the first result. Give another directory with --out: it takes over "
                    "the finished trials"
                )

    @contextmanager
    def written(
        self, study: Study, data: ImageData, cells: list[Cell], race: RaceRules | None = None
    ) -> Generator[None]:
        """Makes this the directory of `study` and keeps others from writing to it. Raises InputError if it is taken."""
        self.check_holds(study)
        with self.held():
            self.check_holds(study)  # again: another process may have begun a study before the lock was had
            fields = study.model_dump(mode="json", exclude_none=True)
            write_whole(self.path / "study.toml", tomli_w.dumps(fields).encode())
            self.write_plan(study, data, cells, race)
            yield

    def held(self) -> AbstractContextManager[None]:
        """Keeps other writers out. Raises InputError where another process writes, and where no lock can be had."""
        return held(self.path)

    def write_plan(self, study: Study, data: ImageData, cells: list[Cell], race: RaceRules | None = None) -> None:
        planned = [
            PlannedCell(
                model_name=cell.model_name,
                levels=cell.levels,
                trials=[trial.id for trial in cell.trials],
                control=cell.control,
            )
            for cell in cells
        ]
        hold_out = data.hold_out(study.base.hold_out)
        plan = Plan(
            data=data.in_words(hold_out),
            source=data.source,
            image_size=study.base.image_size,
            pixels=data.image_size,
            hold_out=hold_out,
            first_seed=study.first_seed,
            margin=study.margin,
            contrasts=study.contrasts,
            cells=planned,
            race=race,
        )
        before = read_record(Plan, self.path / "plan.json")
        if before is None:
            plan.seen = self._seen_beside(plan)
        else:
            had, has = (max((len(cell.trials) for cell in found.cells), default=0) for found in (before, plan))
            here = self._seen([self], before) if race is None and has > had else set()
            plan.seen = sorted({*before.seen, *here})
        write_whole(self.path / "plan.json", plan.model_dump_json(indent=1).encode())
        write_sums(self.path, {name: (self.path / name).read_bytes() for name in OF_A_STUDY})

    def _seen_beside(self, plan: Plan) -> list[int]:
        """The seeds of which a directory beside this one has results.

        Where that directory has this very plan, it is the same study, and only what had been seen before it counts.
        """
        trials = set(plan.trials)
        seen: set[int] = set()
        for file in sorted(self.path.resolve().parent.glob("*/plan.json")):
            beside = StudyDirectory(file.parent)
            if beside.path == self.path.resolve():
                continue
            try:
                other = read_record(Plan, file)
            except InputError:
                other = None  # it is damaged, and its trials still count
            same = other is not None and {trial for cell in other.cells for trial in cell.trials} == trials
            seen |= set(other.seen) if same else self._seen([beside], plan)
        return sorted(seen)

    def _seen(self, places: Sequence["StudyDirectory"], plan: Plan) -> set[int]:
        """The seeds of a plan of which a directory has a record."""
        return {
            plan.first_seed + place
            for cell in plan.cells
            for place, trial in enumerate(cell.trials)
            if any((directory.trial(trial) / "record.json").exists() for directory in places)
        }

    def trial(self, trial_id: str) -> Path:
        return self.path / "trials" / trial_id

    def checkpoint(self, trial_id: str) -> Path:
        return self.trial(trial_id) / "model.safetensors"

    def resume_file(self, trial_id: str) -> Path:
        return self.trial(trial_id) / "resume.pt"

    def record(self, trial_id: str) -> Record | None:
        """The record of a finished trial, None for another. Raises InputError for a damaged one."""
        return read_record(Record, self.trial(trial_id) / "record.json")

    def adopted(self, trial_id: str) -> Adopted | None:
        """Where a trial was taken over from, None for one that was trained here. Raises InputError."""
        return read_record(Adopted, self.trial(trial_id) / "adopted.json")

    def hold_out(self, trial_id: str) -> HoldOut | None:
        """The hold-out of a trial, None for one without its config. Raises InputError for a damaged one."""
        file = self.trial(trial_id) / "config.json"
        try:
            return HoldOut.model_validate(json.loads(file.read_bytes()).get("hold_out", {}))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except ValidationError as error:
            raise invalid(str(file), error, HoldOut.model_fields) from None
        except (ValueError, AttributeError, RecursionError):
            raise InputError(f"{file}: damaged: not the config of a trial") from None

    def config(self, trial_id: str) -> Trial | None:
        """What a trial is, None where it was never begun. Raises InputError for a damaged one."""
        return read_record(Trial, self.trial(trial_id) / "config.json")

    def failure(self, trial_id: str) -> Failure | None:
        """Why a trial failed, None where it did not. Raises InputError for a damaged one."""
        return read_record(Failure, self.trial(trial_id) / "failure.json")

    def write_failure(self, trial_id: str, failure: Failure) -> None:
        write_whole(self.trial(trial_id) / "failure.json", failure.model_dump_json(indent=1).encode())

    def adopt(self, trial_id: str) -> str | None:
        """Takes over a finished trial of the same id, and its reads of the test split, from a study beside this one.

        Returns the name of that study's directory, None where no study has the trial undamaged.
        """
        for record in sorted(self.path.parent.glob(f"*/trials/{trial_id}/record.json")):
            beside_this = StudyDirectory(record.parent.parent.parent)
            try:
                from expertgrid.model.checkpoint import load

                if changed_files(record.parent, OF_A_TRIAL):
                    continue
                beside_this.record(trial_id)
                load(beside_this.checkpoint(trial_id))
                beside_this.predictions(trial_id)
                reads = [read for read in beside_this.test_reads() if read.trial == trial_id]
            except InputError:
                continue  # a damaged trial is trained again
            with tempfile.TemporaryDirectory(dir=self.path, prefix=ADOPTS) as beside:
                copy = shutil.copytree(record.parent, Path(beside) / trial_id)
                if not (copy / "adopted.json").exists():
                    taken = Adopted(directory=beside_this.path.name, time=now())
                    write_whole(copy / "adopted.json", taken.model_dump_json().encode())
                sync_tree(copy)
                entered = self.test_reads()  # by an adoption that was interrupted
                for read in reads:
                    if read not in entered:
                        self.enter(read)
                make_folder(self.trial(trial_id).parent)
                shutil.rmtree(self.trial(trial_id), ignore_errors=True)
                copy.rename(self.trial(trial_id))
                sync_folder(self.trial(trial_id).parent)
            return beside_this.path.name
        return None

    def write_config(self, trial: Trial) -> None:
        """Begins a training of the trial here."""
        (self.trial(trial.id) / "adopted.json").unlink(missing_ok=True)
        write_whole(self.trial(trial.id) / "config.json", trial.model_dump_json(indent=1).encode())

    def append_epoch(self, trial_id: str, epoch: Epoch) -> None:
        append_line(self.trial(trial_id) / "epochs.jsonl", epoch.model_dump_json())

    def epochs(self, trial_id: str) -> list[Epoch]:
        """What each epoch gave, without one that is being written. Raises InputError for a damaged file."""
        file = self.trial(trial_id) / "epochs.jsonl"
        try:
            return [Epoch.model_validate_json(line) for line in self._epoch_lines(trial_id)]
        except ValidationError as error:
            raise damaged(file, invalid(str(file), error, Epoch.model_fields)) from None

    def predictions(self, trial_id: str) -> Predictions | None:
        """None for a trial without them: an unfinished one, or one of an older version. Raises InputError."""
        file = self.trial(trial_id) / "predictions.npz"
        return Predictions.of_file(file) if file.exists() else None

    def write_epochs(self, trial_id: str, lines: list[str]) -> None:
        """Writes the lines of the epochs that a training goes on after."""
        content = "".join(f"{line}\n" for line in lines)
        write_whole(self.trial(trial_id) / "epochs.jsonl", content.encode())

    def _epoch_lines(self, trial_id: str) -> list[bytes]:
        return whole_lines(self.trial(trial_id) / "epochs.jsonl")

    def finish(self, trial_id: str, record: Record, checkpoint: bytes, predictions: Predictions) -> None:
        """Writes what a training gave, and the checksums of the trial's files. The record comes last."""
        place = self.trial(trial_id)
        written = {"model.safetensors": checkpoint, "predictions.npz": predictions.to_bytes()}
        for name, content in written.items():
            write_whole(place / name, content)
        written["record.json"] = record.model_dump_json(indent=1).encode()
        before = {name: (place / name).read_bytes() for name in OF_A_TRIAL if name not in written}
        write_sums(place, before | written)
        write_whole(place / "record.json", written["record.json"])

    def enter_test_read(self, trial_id: str, reader: str, images: int, tta: Literal["flip"] | None = None) -> None:
        """Adds the ledger's line for one read of the test split."""
        self.enter(TestRead(time=now(), trial=trial_id, reader=reader, images=images, tta=tta))

    def enter(self, read: TestRead) -> None:
        """Adds a line to the ledger."""
        append_line(self.path / "ledger.jsonl", read.to_line())

    def test_reads(self) -> list[TestRead]:
        """Each time the test split was read, without one that is being written. Raises InputError for damage."""
        return read_ledger(self.path / "ledger.jsonl")

    def training_rates(self) -> TrainingRates | None:
        """None where they were not measured. Raises InputError for damage."""
        return read_record(TrainingRates, self.path / TRAINING)

    def write_training_rates(self, rates: TrainingRates) -> None:
        write_whole(self.path / TRAINING, rates.model_dump_json(indent=1).encode())

    def latencies(self) -> dict[str, LatencyRecord]:
        """The latency record of each trial that was exported as it is, in fp32, and benched.

        The newest of a run of all cells, else of a file by itself.
        """
        found = [read_record(LatencyRecord, file) for file in sorted((self.path / "bench").glob("*.json"))]
        records = [record for record in found if record and record.precision == "fp32" and not record.pruned]
        return {record.trial: record for record in sorted(records, key=LatencyRecord.rank)}


def _may_be_there(name: str) -> bool:
    """Whether a file may lie in a directory before a study is written there: a process may have been killed before."""
    return name in (LOCK, WRITER) or LEFT_BY_A_CRASH.fullmatch(name) is not None
