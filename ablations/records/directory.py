"""The study directory: what was run and what came of it, as files that appear whole or not at all.

study.toml        the study as it was run
plan.json         its cells, with their levels and trial ids, and the data
SHA256SUMS        the checksums of these two, as `sha256sum --check` reads them
trials/ID/        config.json, epochs.jsonl, model.safetensors, predictions.npz, SHA256SUMS and record.json once done:
                  record.json is written last, and says that the trial is finished; until then resume.pt, and
                  failure.json and traceback.txt where training failed; adopted.json where another study trained it;
                  network.json, what the code of a user's network computed when the training began
export/  bench/   what `expertgrid export` and `bench` add
weights/          the weights that trials start from, other than fresh ones: SHA256.safetensors
training.json     the training speed of each cell alone, where `expertgrid bench-train DIR` measured it
accuracy.svg      the picture of its table
ledger.jsonl      a line for each read of the test split, by a training or by an export, with its checksum
.lock             locked by the process that writes; .lock.json says which process that is
damaged/          what `expertgrid check --repair` moved out of the way
retired/          what `expertgrid retire` moved: trials of a network whose code was changed since

A file is on the disk when the function that writes it returns, so that a power cut takes nothing that was finished.
"""

import hashlib
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Generator, Iterable, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Literal

import tomli_w
from pydantic import ValidationError

from expertgrid.ablations.records.checksums import OF_A_STUDY, OF_A_TRIAL, changed_files, write_sums
from expertgrid.ablations.records.ledger import LEDGER, TestRead, read_ledger
from expertgrid.ablations.records.lock import LOCK, WRITER, held
from expertgrid.ablations.records.plan import Plan, RaceRules, make_plan, read_plan
from expertgrid.ablations.records.predictions import Predictions
from expertgrid.ablations.records.reading import AnyRecord, damaged, read_config, read_record, train_again
from expertgrid.ablations.records.record import SPLITS, Adopted, Failure, Record, TrainingRates
from expertgrid.ablations.study.cells import Cell
from expertgrid.ablations.study.study import Study
from expertgrid.ablations.study.study_file import read_study
from expertgrid.bench.record import LatencyRecord
from expertgrid.model.probe import NETWORK, Probe
from expertgrid.model.system.errors import InputError, invalid, wrong_file
from expertgrid.model.system.files import (
    LEFT_BY_A_CRASH,
    MissingFile,
    append_line,
    cut_incomplete_line,
    make_folder,
    now,
    sync_folder,
    sync_tree,
    whole_lines,
    write_whole,
)
from expertgrid.model.training.data import ImageData
from expertgrid.model.training.metrics import SHIPPED
from expertgrid.model.training.parts import changed_parts
from expertgrid.model.training.trial import Epoch, Trial

TRAINING = "training.json"
TRACEBACK = "traceback.txt"
ADOPTS = ".adopt."  # the folder of a trial that is being copied begins so


class StudyDirectory:
    """Reads and writes one study directory. Writers hold it with `written`, or with `held`.

    `extends`: a study that has results may be written with more levels and baselines. It is exploratory from then on.
    """

    def __init__(self, path: Path, extends: bool = False):
        self.path, self.extends = path, extends

    def read_study(self) -> Study:
        """The study that was run here. Raises InputError where there is none."""
        try:
            return read_study(self.path / "study.toml", was_run=True)
        except MissingFile:
            raise InputError(f"{self.path}: not a study directory: there is no study.toml in it") from None

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
        names = {file.name for file in self.path.iterdir()} if self.path.exists() else set()
        if "study.toml" in names:
            older = self.read_study()
            if difference := study.apart_from(older):
                raise InputError(
                    f"--out {self.path}: holds another study, or more of this one: {difference}; give another "
                    "directory with --out"
                )
            has_results = LEDGER in names or any(self.path.glob("trials/*/record.json"))
            if has_results and not self.extends and (more := study.more_than(older)):
                raise InputError(
                    f"--out {self.path}: has results, and the study now has {more}; what is compared is declared "
                    "before the first result. Give another directory with --out, which takes over the finished trials; "
                    "or --extend: this study is then exploratory"
                )
        elif "plan.json" in names:  # study.toml was lost, and is written again
            self.read_plan(study)
        elif not all(name in (LOCK, WRITER) or LEFT_BY_A_CRASH.fullmatch(name) for name in names):
            raise InputError(f"--out {self.path}: is not empty, and holds no study")

    @contextmanager
    def written(
        self, study: Study, data: ImageData, cells: list[Cell], race: RaceRules | None = None
    ) -> Generator[None]:
        """Makes this the directory of `study` and keeps others from writing to it. Raises InputError if it is taken."""
        with self.held():
            self.check_holds(study)
            self.try_ledger()
            fields = study.model_dump(mode="json", exclude_none=True)
            write_whole(self.path / "study.toml", tomli_w.dumps(fields).encode())
            self.write_plan(study, data, cells, race)
            yield

    def held(self) -> AbstractContextManager[None]:
        """Keeps other writers out. Raises InputError where another process writes, and where no lock can be had."""
        return held(self.path)

    def write_plan(self, study: Study, data: ImageData, cells: list[Cell], race: RaceRules | None = None) -> None:
        """Writes plan.json, with the seeds whose results could be seen before, and the study's checksums."""
        plan = make_plan(study, data, cells, race)
        before = read_record(Plan, self.path / "plan.json")
        if before is None:
            seen = self._seeds_seen_beside(plan)
        else:
            has_more = max(map(len, plan.by_cell), default=0) > max(map(len, before.by_cell), default=0)
            trained = self._seeds_with_records(before)
            seen = {*before.seen, *(trained if race is None and has_more else ())}
            plan.extended = before.extended or (bool(trained) and len(plan.cells) > len(before.cells))
            plan.fp32, plan.rules = before.fp32, before.rules
        plan.seen = sorted(seen)
        self._write_plan(plan)

    def write_precision(self, device: str, fp32: bool) -> None:
        """Notes in plan.json whether trials of the study use fp32 on a device where their recipe leaves it open."""
        plan = self.read_plan()
        plan.fp32[device] = fp32
        self._write_plan(plan)

    def _write_plan(self, plan: Plan) -> None:
        write_whole(self.path / "plan.json", plan.model_dump_json(indent=1).encode())
        write_sums(self.path, {name: (self.path / name).read_bytes() for name in OF_A_STUDY})

    def _seeds_seen_beside(self, plan: Plan) -> set[int]:
        """The seeds of which a directory beside this one has results.

        Where that directory has this very plan, it is the same study, and only what had been seen before it counts.
        """
        seen: set[int] = set()
        for file in sorted(self.path.resolve().parent.glob("*/plan.json")):
            if file.parent == self.path.resolve():
                continue
            try:
                other = read_record(Plan, file)
            except InputError:
                other = None  # it is damaged, and its trials still count
            same = other is not None and set(other.trials) == set(plan.trials)
            seen |= set(other.seen) if same else StudyDirectory(file.parent)._seeds_with_records(plan)
        return seen

    def _seeds_with_records(self, plan: Plan) -> set[int]:
        """The seeds of a plan of which this directory has a record."""
        return {
            plan.first_seed + place
            for trials in plan.by_cell
            for place, trial in enumerate(trials)
            if (self.trial(trial) / "record.json").exists()
        }

    def trial(self, trial_id: str) -> Path:
        return self.path / "trials" / trial_id

    def checkpoint(self, trial_id: str) -> Path:
        return self.trial(trial_id) / "model.safetensors"

    def resume_file(self, trial_id: str) -> Path:
        return self.trial(trial_id) / "resume.pt"

    def weights(self, trial: Trial) -> Path | None:
        """The file of the weights that a trial starts from, None for fresh ones.

        Raises InputError where it is missing, or has another checksum.
        """
        if trial.weights is None:
            return None
        file = self.path / "weights" / f"{trial.weights.fingerprint}.safetensors"
        if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != trial.weights.fingerprint:
            raise wrong_file(file, "missing or damaged", f"expertgrid run writes it from {trial.weights.source}")
        return file

    def write_weights(self, files: Mapping[str, bytes]) -> None:
        """Writes the weights that trials start from, by their fingerprints."""
        for fingerprint, content in files.items():
            write_whole(self.path / "weights" / f"{fingerprint}.safetensors", content)

    def check_weights(self, trials: Iterable[Trial]) -> None:
        """Raises InputError where weights that trials here have started from have changed since."""
        planned = {(trial.weights.source, trial.model): trial.weights.fingerprint for trial in trials if trial.weights}
        for place in self.path.glob("trials/*") if planned else ():
            trial = read_config(place)
            if trial is None or (weights := trial.weights) is None:
                continue
            if planned.get((weights.source, trial.model), weights.fingerprint) != weights.fingerprint:
                raise InputError(
                    f"weights {weights.source}: have changed since trial {trial.id} of {self.path} started from them; "
                    "put them back, or give another directory with --out"
                )

    def record(self, trial_id: str) -> Record | None:
        """The record of a finished trial, None for another. Raises InputError for a damaged one."""
        return self._of_trial(Record, trial_id, "record.json")

    def with_metric(self, record: Record, name: str) -> Record:
        """A record with a metric on both splits, which is computed from the predictions where the record lacks it.

        Raises InputError where it cannot be: older records have no metrics, and older predictions no probabilities.
        """
        added = {}
        for split in SPLITS:
            if record.metric(split, name) is None:
                predictions, config = self.predictions(record.trial), self.config(record.trial)
                computable = predictions is not None and config is not None and name in SHIPPED
                values = predictions.measured(split, config.model.num_classes, [name]) if computable else {}
                if name not in values:
                    raise InputError(
                        f"{self.trial(record.trial)}: has no {name}, and its predictions do not give it; those of "
                        "older studies, and of many classes, are without probabilities"
                    )
                added[f"{split}_metrics"] = getattr(record, f"{split}_metrics") | values
        return record.model_copy(update=added)

    def adopted(self, trial_id: str) -> Adopted | None:
        """Where a trial was taken over from, None for one that was trained here. Raises InputError."""
        return self._of_trial(Adopted, trial_id, "adopted.json")

    def config(self, trial_id: str) -> Trial | None:
        """What a trial is, None where it was never begun. Raises InputError for a damaged one."""
        return read_config(self.trial(trial_id))

    def network(self, trial_id: str) -> Probe | None:
        """What a user's network computed as its training began, None for another network. Raises InputError."""
        return self._of_trial(Probe, trial_id, NETWORK)

    def of_other_code(self, networks: Mapping[str, Probe]) -> dict[str, str]:
        """The finished trials whose networks did not compute `networks` (by trial), with what differs."""
        kept = {trial: self.network(trial) for trial in networks if self.record(trial)}
        different = {trial: probe.difference(networks[trial]) for trial, probe in kept.items() if probe}
        return {trial: what for trial, what in different.items() if what}

    def failure(self, trial_id: str) -> Failure | None:
        """Why a trial failed, None where it did not. Raises InputError for a damaged one."""
        return self._of_trial(Failure, trial_id, "failure.json")

    def _of_trial(self, kind: type[AnyRecord], trial_id: str, name: str) -> AnyRecord | None:
        place = self.trial(trial_id)
        return read_record(kind, place / name, train_again(place))

    def write_failure(self, trial_id: str, failure: Failure) -> None:
        """Writes why a trial failed, and its traceback beside it as a text."""
        place, fields = self.trial(trial_id), failure.model_dump_json(indent=1, exclude={"traceback"})
        write_whole(place / TRACEBACK, failure.traceback.encode(errors="replace"))
        write_whole(place / "failure.json", fields.encode())

    def adopt(self, trial_id: str, refused: Counter[str], metric: str = "accuracy") -> str | None:
        """Takes over a finished trial of the same id, and its reads of the test split, from a study beside this one.

        Returns the name of that study's directory, None where no study has the trial undamaged, of the same code and
        with this metric. Why one is not taken is counted in `refused`.
        """
        from expertgrid.model.checkpoint import load

        for record in sorted(self.path.parent.glob(f"*/trials/{trial_id}/record.json")):
            other = StudyDirectory(record.parent.parent.parent)
            try:
                if changed := changed_files(record.parent, OF_A_TRIAL):
                    raise InputError("; ".join(f"{name} is {how}" for name, how in changed.items()))
                if finished := other.record(trial_id):
                    other.with_metric(finished, metric)
                load(other.checkpoint(trial_id))
                other.predictions(trial_id)
                reads = [read for read in other.test_reads() if read.trial == trial_id]
            except (InputError, OSError) as error:
                refused[f"{other.path}: {error}"] += 1
                continue  # a trial that is damaged, or of other code, is trained again
            if finished and (parts := changed_parts(finished.parts)):
                refused.update(f"{other.path}: they have other code of the {part}" for part in parts)
                continue
            with tempfile.TemporaryDirectory(dir=self.path, prefix=ADOPTS) as folder:
                copy = shutil.copytree(record.parent, Path(folder) / trial_id, ignore=_no_files)
                if not (copy / "adopted.json").exists():
                    adopted = Adopted(directory=other.path.name, time=now())
                    write_whole(copy / "adopted.json", adopted.model_dump_json().encode())
                sync_tree(copy)
                entered = self.test_reads()  # by an adoption that was interrupted
                for read in reads:
                    if read not in entered:
                        self.enter(read)
                make_folder(self.trial(trial_id).parent)
                shutil.rmtree(self.trial(trial_id), ignore_errors=True)
                copy.rename(self.trial(trial_id))
                sync_folder(self.trial(trial_id).parent)
            return other.path.name
        return None

    def move_away(self, trial_id: str, folder: str) -> Path:
        """Moves a trial to a folder of the study; where one of its id is there already, a number is added."""
        place = self.path / folder
        make_folder(place)
        names = (trial_id if number == 1 else f"{trial_id}-{number}" for number in range(1, 10**6))
        target = next(place / name for name in names if not os.path.lexists(place / name))
        self.trial(trial_id).rename(target)
        sync_folder(place)
        sync_folder(self.path / "trials")
        return target

    def retire(self, trial_id: str) -> Path:
        """Moves a trial to retired/, with its exports, latencies and speeds: the next of this id is another network."""
        target = self.move_away(trial_id, "retired")
        for file in [*self.path.glob("export/*.onnx"), *self.path.glob("bench/*.json"), self.path / TRAINING]:
            if file.exists() and trial_id.encode() in file.read_bytes():
                for beside in file.parent.glob(f"{file.stem}.*"):  # such as the certificate
                    beside.rename(target / beside.name)
        return target

    def write_config(self, trial: Trial, network: Probe | None = None) -> None:
        """Begins a training of the trial here, of a user's `network` that computes this."""
        (self.trial(trial.id) / "adopted.json").unlink(missing_ok=True)
        write_whole(self.trial(trial.id) / "config.json", trial.model_dump_json(indent=1).encode())
        if network:
            write_whole(self.trial(trial.id) / NETWORK, network.model_dump_json().encode())

    def append_epoch(self, trial_id: str, epoch: Epoch) -> None:
        append_line(self.trial(trial_id) / "epochs.jsonl", epoch.model_dump_json())

    def epochs(self, trial_id: str) -> list[Epoch]:
        """What each epoch gave, without one that is being written. Raises InputError for a damaged file."""
        file = self.trial(trial_id) / "epochs.jsonl"
        try:
            return [Epoch.model_validate_json(line) for line in whole_lines(file)]
        except ValidationError as error:
            raise damaged(file, invalid("", error, Epoch.model_fields), train_again(file.parent)) from None

    def predictions(self, trial_id: str) -> Predictions | None:
        """None for a trial without them: an unfinished one, or one of an older version. Raises InputError."""
        try:
            return Predictions.of_file(self.trial(trial_id) / "predictions.npz")
        except MissingFile:
            return None

    def write_epochs(self, trial_id: str, lines: list[str]) -> None:
        """Writes the lines of the epochs that a training goes on after."""
        content = "".join(f"{line}\n" for line in lines)
        write_whole(self.trial(trial_id) / "epochs.jsonl", content.encode())

    def finish(self, trial_id: str, record: Record, checkpoint: bytes, predictions: Predictions) -> None:
        """Writes what a training gave, and the checksums of the trial's files; the record comes last.

        What an unfinished or failed trial has is removed then.
        """
        place = self.trial(trial_id)
        written = {"model.safetensors": checkpoint, "predictions.npz": predictions.to_bytes()}
        for name, content in written.items():
            write_whole(place / name, content)
        written["record.json"] = record.model_dump_json(indent=1).encode()
        begun = [*OF_A_TRIAL, *([NETWORK] if (place / NETWORK).exists() else [])]
        before = {name: (place / name).read_bytes() for name in begun if name not in written}
        write_sums(place, before | written)
        write_whole(place / "record.json", written["record.json"])
        for name in ("resume.pt", "failure.json", TRACEBACK):
            (place / name).unlink(missing_ok=True)

    def enter_test_read(self, trial_id: str, reader: str, images: int, tta: Literal["flip"] | None = None) -> None:
        """Adds the ledger's line for one read of the test split."""
        self.enter(TestRead(time=now(), trial=trial_id, reader=reader, images=images, tta=tta))

    def try_ledger(self) -> None:
        """Raises OSError where the ledger takes no line, before there is one that it must take."""
        if os.path.lexists(self.path / LEDGER):
            cut_incomplete_line(self.path / LEDGER)

    def enter(self, read: TestRead) -> None:
        """Adds a line to the ledger."""
        append_line(self.path / LEDGER, read.to_line())

    def test_reads(self) -> list[TestRead]:
        """Each time the test split was read, without one that is being written. Raises InputError for damage."""
        return read_ledger(self.path / LEDGER)

    def training_rates(self) -> TrainingRates | None:
        """None where they were not measured. Raises InputError for damage."""
        return read_record(TrainingRates, self.path / TRAINING, "delete it and run expertgrid bench-train again")

    def write_training_rates(self, rates: TrainingRates) -> None:
        write_whole(self.path / TRAINING, rates.model_dump_json(indent=1).encode())

    def latencies(self) -> dict[str, LatencyRecord]:
        """The latency record of each trial that was exported as it is, in fp32, and benched.

        The newest of a run of all cells, else of a file by itself.
        """
        files = sorted((self.path / "bench").glob("*.json"))
        records = [record for file in files if (record := read_latency(file))]
        records = [record for record in records if record.precision == "fp32" and not record.pruned]
        return {record.trial: record for record in sorted(records, key=LatencyRecord.rank)}


def _no_files(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if not os.path.isfile(os.path.join(folder, name))]


def read_latency(file: Path) -> LatencyRecord | None:
    """A latency record of a study; None where there is no such file. Raises InputError for damage."""
    return read_record(LatencyRecord, file, "delete it and run expertgrid bench again")
