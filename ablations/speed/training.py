"""The training speed of each cell of a study, alone on the machine and in turns.

The speeds that a study's records have are those of whole trainings, hours apart, beside whatever else ran; of trials
that were trained at once they are no speeds at all.
"""

import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

import torch

from expertgrid.ablations.engines.local import planned_steps, prepare
from expertgrid.ablations.records.directory import StudyDirectory
from expertgrid.ablations.records.record import TrainingRates
from expertgrid.ablations.results.rows import Row, read_results
from expertgrid.bench.host import watched
from expertgrid.bench.training import in_turns
from expertgrid.model.fast.execution import ExecutionOptions
from expertgrid.model.system.errors import InputError
from expertgrid.model.system.files import now
from expertgrid.model.system.machine import device_name
from expertgrid.model.training.data import ImageData, Images
from expertgrid.model.training.loop import start, train, uses_bfloat16
from expertgrid.model.training.recipe import Recipe
from expertgrid.model.training.splits import Splits
from expertgrid.model.training.trial import Trial

TESTED = 64  # images that end each round; they are not counted


def measure_cells(
    directory: StudyDirectory,
    data: ImageData,
    device: torch.device,
    execution: ExecutionOptions,
    steps: int | None = None,
    rounds: int = 5,
    notice: Callable[[str], object] = lambda text: None,
) -> TrainingRates:
    """Trains each cell for `rounds` rounds of `steps` steps at full image size, in turns, after a round to warm up.

    `steps` is 4, or 100 on CUDA, where it is None. Raises InputError where no trial is finished.
    """
    steps = steps or (100 if device.type == "cuda" else 4)
    trials = {row.name: trial for row in read_results(directory).rows if (trial := _trial(directory, row))}
    if not trials:
        raise InputError(f"{directory.path}: no trial of this study is finished")
    ways, amp = {}, False
    with watched(device.type == "cuda") as host:
        for trial in trials.values():
            ways[trial.id] = _rounds(trial, data, device, execution, steps, rounds, notice)
            amp |= uses_bfloat16(trial.recipe, device)
        in_turns(ways, 1)
        seconds = in_turns(ways, rounds)
    sizes = {trial.id: trial.recipe.batch_size * steps for trial in trials.values()}
    rates = {name: [sizes[name] / found for found in every] for name, every in seconds.items()}
    for text in host.notes():
        notice(text)
    return TrainingRates(
        device=device_name(device),
        threads=torch.get_num_threads(),
        bfloat16=amp,
        torch=torch.__version__,
        others_share=host.others_share,
        finished=now(),
        images_per_s={name: statistics.median(found) for name, found in rates.items()},
        rounds=rates,
    )


def _trial(directory: StudyDirectory, row: Row) -> Trial | None:
    """A finished trial of the row: a network that crashed or hung would do so here too."""
    return directory.config(row.records[0].trial) if row.by_seed else None


def _rounds(
    trial: Trial,
    data: ImageData,
    device: torch.device,
    execution: ExecutionOptions,
    steps: int,
    rounds: int,
    notice: Callable[[str], object],
) -> Callable[[], float]:
    """A function that trains a trial's network for some steps, and returns their seconds."""
    whole = planned_steps(trial, data.trained_on(trial.hold_out))
    options, without = execution.usable([execution.plan(trial.model, whole, device)], device)
    fields: dict[str, Any] = dict(trial.recipe)
    fields |= {"epochs": rounds + 2, "small_size": 0, "small_share": None}
    short = trial.model_copy(update={"recipe": Recipe(**fields)})
    count = trial.recipe.batch_size * steps
    train_images = _first(data.train, count)
    splits = Splits.undivided(dataclasses.replace(data, train=train_images, test=_first(data.test, TESTED)), device)
    training = start(short, splits)
    prepared = prepare(short, splits, training, options, whole)
    for text in (*without, *prepared.without):
        notice(f"measured without {text}")
    epochs = train(short, splits, training)
    return lambda: next(epochs).train_seconds


def _first(images: Images, count: int) -> Images:
    """The first images; from the start again where there are too few."""
    places = [place % len(images) for place in range(count)]
    return Images(images.pixels_BHWC[places], images.labels_B[places])
