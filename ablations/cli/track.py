"""Showing a study in trackers: while it is trained, or from its directory."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

from expertgrid.ablations.cli.sources import read_data
from expertgrid.ablations.cli.terminal import notice, status
from expertgrid.ablations.records.directory import StudyDirectory
from expertgrid.ablations.trackers.tracking import StudyRun, Tracker, Tracking, study_run
from expertgrid.model.system.errors import InputError
from expertgrid.model.training.data import ImageData


@contextmanager
def tracked(names: Sequence[str], directory: StudyDirectory, data: ImageData | None) -> Generator[Tracking]:
    """The trackers of a study. When it is left, they are shown what there is of the study then, and end.

    Raises InputError for a store that cannot be opened.
    """
    with status("opening trackers") if names else nullcontext():
        study = study_run(directory)
        trackers = {text: _tracker(text, study) for text in dict.fromkeys(names)}
        tracking = Tracking(directory, data, trackers, partial(notice, style="yellow"))
    try:
        yield tracking
    finally:
        with status("trackers get what is left") if names else nullcontext():
            tracking.close()


def _tracker(text: str, study: StudyRun) -> Tracker:
    """`mlflow:URI` is a store; other trackers, and `mlflow` without it, keep what they get in the study directory."""
    name, _, uri = text.partition(":")
    if name == "tensorboard":
        from expertgrid.ablations.trackers.tensorboard import TensorBoard

        return TensorBoard(study)
    if name == "mlflow":
        from expertgrid.ablations.trackers.mlflow import MLflow

        return MLflow(study, uri or None)
    assert name == "wandb"  # `options.trackers` has looked at it
    from expertgrid.ablations.trackers.wandb import WeightsAndBiases

    return WeightsAndBiases(study)


def track(directory: Path, names: Sequence[str], data: str | None, data_dir: Path | None) -> int:
    """Shows all trials of a study; 1 where a tracker failed."""
    study = StudyDirectory(directory)
    images = _images(study, data, data_dir)
    with tracked(names, study, images) as tracking:
        tracking.replay(failures=True)
    for name in tracking.trackers:
        print(f"{directory}: {len(tracking.done)} trials are in {name}")
    return 1 if tracking.lost else 0


def _images(study: StudyDirectory, data: str | None, data_dir: Path | None) -> ImageData | None:
    """The study's images, for the contact sheets; None where none were asked for and they are not there any more."""
    plan = study.read_plan()
    try:
        images = read_data(data or plan.source, data_dir, plan.image_size)
        if trial := study.config(plan.cells[0].trials[0]):
            trial.check_images(images)
    except InputError as error:
        if data is not None or data_dir is not None:
            raise
        notice(f"no contact sheets: {error}")
        return None
    return images
