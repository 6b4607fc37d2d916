"""Weights & Biases, offline: runs in the study directory. `wandb sync DIR/wandb/offline-run-*` uploads them."""

import os
import shutil
from typing import TYPE_CHECKING

from PIL import Image

from expertgrid.ablations.records.record import Record
from expertgrid.ablations.trackers.tracking import Ended, StudyRun, Tracker, TrialRun
from expertgrid.model.system.files import make_folder

if TYPE_CHECKING:
    from wandb import Run


class WeightsAndBiases(Tracker):
    """A run of each trial, in a group of the study: configuration, metrics of each epoch, summary, contact sheet."""

    def __init__(self, study: StudyRun):
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self.wandb, self.study = wandb, study
        make_folder(study.directory)
        self.open: dict[str, Run] = {}

    def begin_trial(self, run: TrialRun) -> None:
        if run.trial in self.open:
            self.open.pop(run.trial).finish(exit_code=1)
        for older in (self.study.directory / "wandb").glob(f"offline-run-*-{run.trial}"):
            shutil.rmtree(older)
        quiet = self.wandb.Settings(
            silent=True, console="off", disable_git=True, disable_code=True, save_code=False, x_disable_stats=True
        )
        self.open[run.trial] = self.wandb.init(
            mode="offline",
            dir=str(self.study.directory),
            project=self.study.name,
            group=self.study.name,
            notes=self.study.question,
            id=run.trial,
            name=run.name,
            config=dict(run.parameters),
            reinit="create_new",
            settings=quiet,
        )

    def add_images(self, run: TrialRun, sheet: Image.Image) -> None:
        self.open[run.trial].log({"augmented images": self.wandb.Image(sheet)}, step=0)

    def add_epoch(self, run: TrialRun, epoch: int, metrics: dict[str, float]) -> None:
        self.open[run.trial].log(metrics, step=epoch)

    def end_trial(self, run: TrialRun, record: Record, metrics: dict[str, float]) -> None:
        made = self.open.pop(run.trial)
        made.summary.update(metrics)
        made.finish()

    def fail_trial(self, run: TrialRun, reason: str) -> None:
        made = self.open.pop(run.trial)
        made.summary.update({"failed": reason})
        made.finish(exit_code=1)

    def close(self, ended: Ended) -> None:
        for made in self.open.values():
            made.finish(exit_code=1)
        self.open.clear()
