"""The space that a study needs on its disk. Only counting a network's weights imports torch."""

import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from rich.filesize import decimal

from expertgrid.model.config import Network
from expertgrid.model.system.errors import InputError
from expertgrid.model.training.data import ImageData
from expertgrid.model.training.trial import Trial

TEXT = 32_768  # bytes of a trial's config, record, checksums and headers, in whole blocks of a file system
EPOCH = 320  # bytes of a line of epochs.jsonl
SPARE = 1.05
MOST_CLASSES, MOST_LOG = 100, 16_000_000  # with which log-probabilities are kept, and their bytes in a trial


def check_space(trials: Sequence[Trial], data: ImageData, path: Path) -> None:
    """Raises InputError where the disk of the directory `path` has no room for these trials."""
    needed, free = bytes_needed(trials, data), shutil.disk_usage(path).free
    if free < needed:
        raise InputError(
            f"--out {path}: {len(trials)} trials need {decimal(needed)}, and the disk has {decimal(free)} left; "
            "make room, or give a directory on another disk"
        )


def bytes_needed(trials: Sequence[Trial], data: ImageData) -> int:
    """What trials will take: their files, and the state of one that goes on, which is twice there while it is written.

    The state has the weights, their average, and at most two numbers of the optimiser for each parameter.
    """
    weights = {trial.model: stored_bytes(trial.model) for trial in trials}
    files, states = log_bytes(trials, data), 0
    for trial in trials:
        both = 3 if trial.recipe.tta == "flip" else 2  # predictions, labels, predictions of the mirror images
        held_out = len(data.train) - data.trained_on(trial.hold_out)
        predictions = both * (held_out + len(data.test)) * (1 if len(data.classes) <= 256 else 2)
        files += weights[trial.model] + predictions + TEXT + EPOCH * trial.recipe.epochs
        states = max(states, (4 if trial.recipe.ema_decay else 3) * weights[trial.model] + TEXT)
    return int(SPARE * (files + 2 * states))


def log_bytes(trials: Sequence[Trial], data: ImageData) -> int:
    """Those of the log-probabilities of trials in half precision, as far as they are kept."""
    sizes = [
        2 * len(data.classes) * (len(data.train) - data.trained_on(trial.hold_out) + len(data.test)) for trial in trials
    ]
    return sum(sizes) if len(data.classes) <= MOST_CLASSES and max(sizes, default=0) <= MOST_LOG else 0


@cache
def stored_bytes(network: Network) -> int:
    """The bytes of a network's weights and buffers, which is made without their values."""
    from expertgrid.model.registry import build, for_shapes

    with for_shapes(network):
        return sum(tensor.numel() * tensor.element_size() for tensor in build(network).state_dict().values())
