"""Training a trial again, beside its record."""

from collections.abc import Sequence
from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path

from expertgrid.ablations.cli.sources import import_modules, read_data
from expertgrid.ablations.cli.terminal import starting, status
from expertgrid.ablations.records.directory import StudyDirectory
from expertgrid.ablations.records.plan import Plan
from expertgrid.ablations.records.record import Record
from expertgrid.ablations.study.changes import check_parts
from expertgrid.model.system.errors import InputError
from expertgrid.model.system.text import Format, render
from expertgrid.model.training.trial import Trial


def rerun(
    directory: Path,
    trial_id: str,
    data: str | None,
    data_dir: Path | None,
    device_name: str,
    modules: Sequence[str],
    format: Format,
) -> int:
    """Trains a trial again and prints the comparison; 1 where it comes out otherwise."""
    study = StudyDirectory(directory)
    plan = study.read_plan()
    trial, record = _finished_trial(study, plan, trial_id)
    with starting():
        from expertgrid.ablations.engines.rerun import train_again
        from expertgrid.model.checkpoint import load
        from expertgrid.model.system.machine import torch_device
        from expertgrid.model.training.splits import ResidentData
    import_modules(modules)
    check_parts(trial.recipe)
    load(study.checkpoint(trial_id))  # raises InputError for a network whose code has changed
    on = torch_device(device_name)
    images = read_data(data or trial.source, data_dir, plan.image_size)
    with status(f"training trial {trial_id} again"):
        result = train_again(study, trial, record, ResidentData(images, on))
    if result.compared:
        rows = [asdict(compared) for compared in result.compared]
        if format != "json":
            rows = [row | {"same": "yes" if row["same"] else "no"} for row in rows]
        print(render(rows, format, [result.verdict]))
    else:
        print(result.verdict)
    return 0 if result.same else 1


def _finished_trial(directory: StudyDirectory, plan: Plan, trial_id: str) -> tuple[Trial, Record]:
    """A trial with its record. Raises InputError for one that is not of this study, not finished, or damaged."""
    trials = plan.trials
    if trial_id not in trials:
        near = get_close_matches(trial_id, trials, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(trials[:5])} ..."
        raise InputError(f"unknown trial of {directory.path}: {trial_id!r}{hint}")
    record, trial = directory.record(trial_id), directory.config(trial_id)
    if record is None or trial is None:
        failure = directory.failure(trial_id)
        why = f"it failed ({failure.kind})" if failure else "it is not finished"
        raise InputError(f"trial {trial_id} of {directory.path} has no record to compare with: {why}")
    if trial.id != trial_id:
        raise InputError(
            f"{directory.trial(trial_id) / 'config.json'}: not of trial {trial_id}, its hash is {trial.id}"
        )
    return trial, record
