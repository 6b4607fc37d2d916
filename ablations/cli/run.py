"""Training a study."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from expertgrid.ablations.cli import interrupt
from expertgrid.ablations.cli.plan import PlannedRun, StudyRequest, plan_run
from expertgrid.ablations.cli.sources import import_modules
from expertgrid.ablations.cli.terminal import console, notice, status
from expertgrid.ablations.cli.track import tracked
from expertgrid.ablations.engines.duration import ROUNDS, TimeLeft, in_time
from expertgrid.ablations.engines.events import Event, TrialFailed, by_seed
from expertgrid.ablations.engines.isolation import Pool, Setup
from expertgrid.ablations.engines.local import planned_steps, run_local
from expertgrid.ablations.engines.progress import StudyProgress
from expertgrid.ablations.engines.ray import RayEngine
from expertgrid.ablations.records.directory import TRACEBACK, StudyDirectory
from expertgrid.ablations.results import racing
from expertgrid.ablations.results.answer import answer
from expertgrid.ablations.results.evidence import read_evidence
from expertgrid.ablations.results.report.plots import accuracy_figure, check_draws, save
from expertgrid.ablations.results.rows import read_results
from expertgrid.ablations.results.tables.study import study_tables
from expertgrid.ablations.speed.training import measure_cells
from expertgrid.ablations.study.cells import Cell
from expertgrid.ablations.study.disk import check_space
from expertgrid.ablations.trackers.tracking import Tracking
from expertgrid.bench.precision import fp32_is_faster, networks_to_time
from expertgrid.model.fast.cuda_graphs import RecordingError
from expertgrid.model.fast.execution import ExecutionOptions
from expertgrid.model.system.errors import reason_of
from expertgrid.model.system.files import write_whole
from expertgrid.model.system.machine import deterministic, device_name, torch_device
from expertgrid.model.system.text import render_tables
from expertgrid.model.training.data import ImageData
from expertgrid.model.training.parts import changed_parts
from expertgrid.model.training.splits import ResidentData
from expertgrid.model.training.trial import Trial


@dataclass(frozen=True)
class How:
    """How a study is trained, as the options of `run` say it."""

    device: str
    execution: ExecutionOptions
    adopts: bool  # takes over finished trials of the studies beside
    fail_fast: bool  # ends with the first trial that fails
    timeout_s: float | None  # for a trial
    modules: Sequence[str]  # that register networks
    deterministic: bool  # the same bits again, on a GPU too
    trainer: Pool | RayEngine | None  # None: trials are trained in this process
    track: Sequence[str]  # trackers that are shown the trials, too
    timing: bool = True  # of each cell alone, where trials were trained at once

    def train_on(self) -> torch.device:
        """The device of the trials. Raises InputError for one that is not there, and for what it cannot do."""
        on = torch.device(self.trainer.device) if isinstance(self.trainer, RayEngine) else torch_device(self.device)
        if _is_known(on):
            self.execution.check(on)
        return on


def train_study(request: StudyRequest, data_dir: Path | None, how: How, after_s: float = 0.0) -> list[TrialFailed]:
    """Trains what is not there yet, and returns the trials that failed. What follows takes `after_s` seconds."""
    on = how.train_on()
    planned = plan_run(request, data_dir)
    planned.check_directory()
    study, directory, cells = planned.study, planned.directory, planned.cells
    begun = directory.read_race()
    race = begun or planned.race
    check_draws(study.question)
    lines = study.question, planned.data.in_words(planned.hold_out), *planned.weight_lines
    notice("\n".join(lines))
    if how.trainer is not None and how.trainer.in_words:
        notice(how.trainer.in_words)
    counts = {cell.trials[0].id: study.seeds for cell in cells}
    if begun:
        counts |= {cell.trials[0]: max(len(cell.trials), study.seeds) for cell in directory.read_plan().cells}
    pool = how.trainer if isinstance(how.trainer, Pool) else None
    at_once = pool.at_once if pool else 1
    if isinstance(how.trainer, RayEngine):
        at_once = max(1, how.trainer.slots)
    trials, steps_done = [trial for cell in cells for trial in cell.trials], pool.steps_done if pool else dict
    left = TimeLeft(trials, planned.data, at_once, on.type, how.timing, after_s, steps_done)
    left.read_records(directory.path.parent)
    with directory.written(study, planned.data, racing.cells_with(cells, counts), race):
        directory.write_weights(planned.weights)
        with tracked(how.track, directory, planned.data) as tracking:
            failed = _train(planned, racing.cells_with(cells, counts), on, how, tracking, left)
            while race and not (failed and how.fail_fast):
                evidence = read_evidence(directory)
                next_counts = racing.next_counts(evidence, counts)
                notice(racing.look_in_words(evidence, next_counts, counts))
                if next_counts == counts:
                    break
                counts = next_counts
                directory.write_plan(study, planned.data, racing.cells_with(cells, counts), race)
                failed += _train(planned, racing.cells_with(cells, counts), on, how, tracking, left)
        if isinstance(how.trainer, RayEngine):
            how.trainer.end()
        if how.timing and any(row.packed and row.alone is None for row in read_results(directory).rows):
            _time_alone(planned, on, how, left)
    return failed


def _is_known(on: torch.device) -> bool:
    """Whether this machine can tell what the device of the trials can do: nodes may have GPUs that it has not."""
    return on.type != "cuda" or torch.cuda.is_available()


def _time_alone(planned: PlannedRun, on: torch.device, how: How, left: TimeLeft) -> None:
    """Measures the training speed of each cell, as trials that were trained at once have none."""
    directory = planned.directory
    steps, seconds = left.timing(left.clock() - left.begun)
    if not steps or (isinstance(how.trainer, RayEngine) and not how.trainer.embedded):
        notice(f"training was not timed alone; expertgrid bench-train {directory.path} times it on this machine")
        return
    notice(f"each cell is now trained alone, to time it, for about {in_time(1.0 + seconds)}; --no-timing leaves it out")
    try:
        with status("timing the training of each cell alone"):
            rates = measure_cells(directory, planned.data, on, how.execution, steps, ROUNDS, notice)
        directory.write_training_rates(rates)
    except RecordingError as error:  # a trial was then trained without CUDA graphs, in a process of its own
        notice(f"training was not timed alone: {error}")


def say_failures(directory: StudyDirectory, failed: list[TrialFailed]) -> int:
    """Names the trials that failed, on stderr; 1 where there is one."""
    if not failed:
        return 0
    lines = [f"{len(failed)} {'trial' if len(failed) == 1 else 'trials'} failed, and the same command tries again:"]
    for event in failed:
        file = directory.trial(event.trial.id) / TRACEBACK
        lines.append(f"  {event.trial.id}, seed {event.trial.seed}: {event.reason}; traceback in {file}")
    notice("\n".join(lines), style="red")
    return 1


def _train(
    planned: PlannedRun, cells: list[Cell], on: torch.device, how: How, tracking: Tracking, left: TimeLeft
) -> list[TrialFailed]:
    """Trains what is not there yet of these cells, and returns the trials that failed."""
    directory, data = planned.directory, planned.data
    trials = by_seed([trial for cell in cells for trial in cell.trials])
    pending = [trial for trial in trials if directory.record(trial.id) is None]
    records = filter(None, (directory.record(trial.id) for trial in trials))
    changed = Counter(part for record in records for part in changed_parts(record.parts))
    if how.adopts:
        refused: Counter[str] = Counter()
        adopt = partial(directory.adopt, refused=refused, metric=planned.study.metric)
        taken = Counter(place for trial in pending if (place := adopt(trial.id)))
        for reason, count in refused.items():
            notice(f"not taken over: {count} trials of {reason}")
        for place, count in taken.items():
            notice(f"taken over from {directory.path.parent / place}: {count} trials")
        pending = [trial for trial in pending if directory.record(trial.id) is None]
    for part, count in changed.items():
        remedy = f"`expertgrid retire {directory.path} --import MODULE` moves those of this study away"
        notice(f"{count} finished trials have other code of the {part}; {remedy}")
    done_before = len(trials) - len(pending)
    notice(f"{len(trials)} trials, {done_before} of them done before; {directory.path}")
    check_space(pending, data, directory.path)
    steps = {trial.id: planned_steps(trial, data.trained_on(trial.hold_out)) for trial in pending}
    execution = how.execution
    if _is_known(on):
        execution = replace(execution, fp32=_uses_fp32(planned, trials, pending, on, how))
        chosen = [execution.plan(trial.model, steps[trial.id], on) for trial in pending]
        execution, without = execution.usable(chosen, on)
        for text in without:
            notice(f"trained without {text}")
    tracking.replay()
    left.waiting = {trial.id: trial for trial in pending}
    progress, failed = StudyProgress(cells, left, done_before, console), []
    with progress.live(), interrupt.training(progress.stop):
        for event in _events(planned, pending, on, how, execution):
            progress.show(event)
            tracking.show(event)
            if isinstance(event, TrialFailed):
                failed.append(event)
                if how.fail_fast:
                    break
    if interrupt.stopped.is_set():
        raise KeyboardInterrupt
    return failed


def _uses_fp32(planned: PlannedRun, trials: list[Trial], pending: list[Trial], on: torch.device, how: How) -> bool:
    """Whether trials whose recipes leave it open train in fp32 here: as it was decided for this study, or is now."""
    directory, data = planned.directory, planned.data
    device, decided = device_name(on), directory.read_plan().fp32
    if device in decided:
        return decided[device]
    records = (directory.record(trial.id) for trial in trials if trial.recipe.amp == "auto")  # of older versions
    fp32 = next((not of.bfloat16 for of in records if of and of.environment.device == device), None)
    if fp32 is None:
        begun = any(directory.resume_file(trial.id).exists() for trial in trials)
        timed = [] if begun or isinstance(how.trainer, RayEngine) else networks_to_time(pending, data, on)
        fp32 = bool(timed) and _times_fp32_faster(timed, data, how)
    directory.write_precision(device, fp32)  # always: a network may train in fp32 for another reason
    return fp32


def _times_fp32_faster(timed: list[Trial], data: ImageData, how: How) -> bool:
    """Whether fp32 is faster for the study, by steps of these networks, and says so."""
    try:
        with status(f"timing {len(timed)} networks in fp32 and bf16"):
            fp32 = fp32_is_faster(timed, data, partial(import_modules, how.modules))
    except Exception as error:  # of the networks, whose trials will have it too
        notice(f"trained in bf16, as steps could not be timed: {reason_of(error)}")
        return False
    notice(f"trained in {'fp32' if fp32 else 'bf16'}, which timed steps chose for this study")
    return fp32


def _events(
    planned: PlannedRun, trials: list[Trial], on: torch.device, how: How, execution: ExecutionOptions
) -> Iterator[Event]:
    directory, data, stopped = planned.directory, planned.data, interrupt.stopped
    if how.trainer is None:
        with deterministic(how.deterministic):
            resident = ResidentData(data, on)
            yield from run_local(trials, resident, directory, execution=execution, stop=lambda step: stopped.is_set())
    else:
        begin = partial(import_modules, how.modules)
        threads, at_once = how.trainer.threads, how.trainer.at_once
        setup = Setup(data, str(on), directory.path, begin, execution, how.deterministic, threads, at_once)
        yield from how.trainer.run(trials, setup, directory, stopped, how.timeout_s)


def show_study(directory: StudyDirectory) -> None:
    """The study's question, its tables and the answer on stdout, and its picture in its directory."""
    evidence = read_evidence(directory)
    picture = directory.path / "accuracy.svg"
    print(f"{evidence.results.study.question}\n\n{render_tables(study_tables(directory, evidence), 'text')}\n")
    print(f"Picture: {picture}. All notes: expertgrid table {directory.path} --notes\n\n{answer(evidence)}", flush=True)
    write_whole(picture, save(accuracy_figure(evidence.results.study.question, evidence.results.rows)))
