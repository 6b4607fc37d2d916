"""Trainings that go on for some steps at a time, so that several can be timed in turns."""

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import torch

from expertgrid.model.fast.execution import ExecutionOptions
from expertgrid.model.system.errors import InputError
from expertgrid.model.training.data import ImageData, Images
from expertgrid.model.training.loop import Training, TrainingError, start, train
from expertgrid.model.training.prepare import Prepared, planned_steps, prepare
from expertgrid.model.training.recipe import Recipe
from expertgrid.model.training.splits import Splits
from expertgrid.model.training.trial import Trial

Key = TypeVar("Key")

TESTED = 64  # images that end each round of a trial; they are not counted


def at_full_size(recipe: Recipe, epochs: int) -> Recipe:
    """The recipe for so many epochs, with no small images in the first of them."""
    return recipe.model_copy(update={"epochs": epochs, "small_size": 0, "small_share": None})


def prepared_training(
    trial: Trial,
    splits: Splits,
    execution: ExecutionOptions,
    whole: int,
    notice: Callable[[str], object] = lambda text: None,
) -> tuple[Training, Prepared]:
    """A training that runs as one of `whole` steps would. `notice` is told what is left out.

    Raises InputError for what was asked for and does not work.
    """
    plan = execution.plan(trial.model, whole, splits.device)
    execution, without = execution.usable([plan], splits.device)
    training = start(trial, splits)
    try:
        prepared = prepare(trial, splits, training, execution, whole)
    except TrainingError as error:
        raise InputError(str(error)) from error
    for text in (*without, *prepared.without):
        notice(f"measured without {text}")
    return training, prepared


def rounds_of(
    trial: Trial,
    data: ImageData,
    device: torch.device,
    execution: ExecutionOptions,
    steps: int,
    rounds: int,
    notice: Callable[[str], object] = lambda text: None,
) -> Callable[[], float]:
    """A function that trains a trial's network for some steps, and returns their seconds."""
    whole = planned_steps(trial, data.trained_on(trial.hold_out))
    short = trial.model_copy(update={"recipe": at_full_size(trial.recipe, rounds + 2)})
    train_images = _first(data.train, trial.recipe.batch_size * steps)
    splits = Splits.undivided(dataclasses.replace(data, train=train_images, test=_first(data.test, TESTED)), device)
    training, _ = prepared_training(short, splits, execution, whole, notice)
    epochs = train(short, splits, training)
    return lambda: next(epochs).train_seconds


def _first(images: Images, count: int) -> Images:
    """The first images; from the start again where there are too few."""
    places = [place % len(images) for place in range(count)]
    return Images(images.pixels_BHWC[places], images.labels_B[places])


def in_turns(ways: dict[Key, Callable[[], float]], rounds: int) -> dict[Key, list[float]]:
    """The seconds that each way returns, `rounds` times, in turns whose order is reversed each round."""
    rounds_s: dict[Key, list[float]] = {name: [] for name in ways}
    for i in range(rounds):
        for name in list(ways)[:: 1 if i % 2 else -1]:
            rounds_s[name].append(ways[name]())
    return rounds_s
