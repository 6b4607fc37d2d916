"""What several trainings at once on one device gain: the images a second of all of them, against one alone."""

import shutil
from functools import partial
from threading import Event

from ablations.events import TrialFailed
from ablations.isolation import Setup, isolated
from ablations.records import StudyDirectory
from ablations.study import Base, Study
from bench.gpu.decoded import load_decoded
from bench.gpu.plan import Bench, Measurement, Step, Trainings
from model.errors import InputError

EPOCHS = 8  # of each training: processes do not begin at the same moment, and a median is taken


def steps(bench: Bench) -> list[Step]:
    """Each network and recipe with each number of trainings, of which the first is one."""
    return [
        Step(
            "train-speed",
            f"at-once-{model}-{jobs}",
            180,
            partial(at_once, model=model, recipe=recipe, jobs=jobs),
            expected_s=40,
        )
        for model, recipe in bench.size.at_once.items()
        for jobs in bench.size.jobs
    ]


def at_once(bench: Bench, model: str, recipe: str, jobs: int) -> Measurement:
    """Trains a network with so many seeds at once, each in a process of its own.

    The rates are the images a second of each of them, in its median epoch. Raises InputError where a training fails.
    """
    study = Study(
        name=f"at-once-{model}-{jobs}",
        question="What do several trainings at once gain?",
        base=Base(model=model, recipe=recipe),
        set={"recipe.epochs": EPOCHS},
    )
    data, directory = load_decoded(bench.data, bench.work / "decoded"), StudyDirectory(bench.work / study.name)
    shutil.rmtree(directory.path, ignore_errors=True)  # of a call that was cut
    asked = Trainings(study.name, study, jobs).asked(bench, jobs)
    cells = asked.cells(data)
    trials = [trial for cell in cells for trial in cell.trials]
    with isolated(jobs, str(bench.device)) as pool, directory.written(asked, data, cells):
        setup = Setup(
            data, str(bench.device), directory.path, _begin, bench.execution, threads=pool.threads, at_once=jobs
        )
        for event in pool.run(trials, setup, directory, Event()):
            if isinstance(event, TrialFailed):
                raise InputError(f"a training failed: {event.reason}")
    records = [directory.record(trial.id) for trial in trials]
    rates = [record.images_per_s for record in records if record is not None]
    return Measurement({"model": model, "at_once": jobs, "rates": rates, "without_mps": pool.gpu.missing})


def _begin() -> None:
    """No networks but the presets are needed."""
