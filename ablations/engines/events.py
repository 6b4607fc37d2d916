"""What an engine tells while it trains trials: an event for each thing that happens. Importing it imports no torch."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from expertgrid.ablations.records.record import Record
    from expertgrid.model.training.trial import Epoch, Trial


class Stopped(KeyboardInterrupt):
    """The training was stopped, and its state is saved."""


@dataclass(frozen=True)
class TrialStarted:
    trial: "Trial"


@dataclass(frozen=True)
class EpochDone:
    trial: "Trial"
    epoch: "Epoch"


@dataclass(frozen=True)
class StateSaved:
    """The trial's resume.pt is written anew."""

    trial: "Trial"


@dataclass(frozen=True)
class TrialDone:
    trial: "Trial"
    record: "Record"


@dataclass(frozen=True)
class TrialFailed:
    trial: "Trial"
    reason: str
    of_recording: bool = False  # of its steps as CUDA graphs, which nobody required: it can be trained without them


@dataclass(frozen=True)
class TrialNote:
    """A notice about a trial, which goes on."""

    trial: "Trial"
    text: str


Event = TrialStarted | EpochDone | StateSaved | TrialDone | TrialFailed | TrialNote


def by_seed(trials: "list[Trial]") -> "list[Trial]":
    """The trials without repetitions, those of the first seed first; the order is kept otherwise.

    A study that is stopped has then trained all cells on the same seeds, and its effects can be read.
    """
    return sorted({trial.id: trial for trial in trials}.values(), key=lambda trial: trial.seed)
