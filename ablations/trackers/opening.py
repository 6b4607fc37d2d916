"""Trackers by their names, as `--track` and `--to` give them."""

from collections.abc import Callable, Sequence

from expertgrid.ablations.records.directory import StudyDirectory
from expertgrid.ablations.trackers.tracking import StudyRun, Tracker, Tracking, study_run
from expertgrid.model.system.errors import unknown
from expertgrid.model.training.data import ImageData

TRACKERS = ("tensorboard", "mlflow", "wandb")


def open_trackers(
    texts: Sequence[str], directory: StudyDirectory, data: ImageData | None, say: Callable[[str], None]
) -> Tracking:
    """The trackers of a study that is written, or begun. `data` is what contact sheets are drawn from.

    Raises InputError for another name, and for a store that cannot be opened.
    """
    study = study_run(directory)
    return Tracking(directory, data, {text: _tracker(text, study) for text in dict.fromkeys(texts)}, say)


def _tracker(text: str, study: StudyRun) -> Tracker:
    """`mlflow:URI` is a store; other trackers, and `mlflow` without it, keep what they get in the study directory."""
    name, _, uri = text.partition(":")
    match name:
        case "tensorboard":
            from expertgrid.ablations.trackers.tensorboard import TensorBoard

            return TensorBoard(study)
        case "mlflow":
            from expertgrid.ablations.trackers.mlflow import MLflow

            return MLflow(study, uri or None)
        case "wandb":
            from expertgrid.ablations.trackers.wandb import WeightsAndBiases

            return WeightsAndBiases(study)
    raise unknown("tracker", name, TRACKERS)
