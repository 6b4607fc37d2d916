"""TensorBoard: event files in the study directory, a folder for each trial. `tensorboard --logdir DIR/tensorboard`."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from expertgrid.ablations.records.record import Record
from expertgrid.ablations.trackers.tracking import Ended, StudyRun, Tracker, TrialRun
from expertgrid.model.system.files import make_folder

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter as Writer

LONGEST_NAME = 150  # characters of a folder's name
EVENTS = "events.out.tfevents.*"


class TensorBoard(Tracker):
    """Scalars of each epoch, the contact sheet, and the hyperparameters with the final metrics."""

    def __init__(self, study: StudyRun):
        from torch.utils.tensorboard import SummaryWriter

        self.make = SummaryWriter
        self.folder = study.directory / "tensorboard"
        make_folder(self.folder)
        self.writers: dict[str, Writer] = {}  # of the trials that are under way

    def begin_trial(self, run: TrialRun) -> None:
        if run.trial in self.writers:
            self.writers.pop(run.trial).close()
        place = self._place(run)
        for file in place.glob(EVENTS):
            file.unlink()
        self.writers[run.trial] = self.make(str(place))

    def add_images(self, run: TrialRun, sheet: Image.Image) -> None:
        self.writers[run.trial].add_image("augmented images", np.asarray(sheet), 0, dataformats="HWC")

    def add_epoch(self, run: TrialRun, epoch: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self.writers[run.trial].add_scalar(name, value, epoch)
        self.writers[run.trial].flush()

    def end_trial(self, run: TrialRun, record: Record, metrics: dict[str, float]) -> None:
        from torch.utils.tensorboard.summary import hparams

        writer = self.writers.pop(run.trial)
        for summary in hparams(run.parameters, metrics):  # into the trial's own folder: `add_hparams` makes another
            writer._get_file_writer().add_summary(summary)
        for name, value in metrics.items():
            writer.add_scalar(name, value, record.epochs)
        writer.close()

    def fail_trial(self, run: TrialRun, reason: str) -> None:
        writer = self.writers.pop(run.trial)
        writer.add_text("failed", reason)
        writer.close()

    def close(self, ended: Ended) -> None:
        for writer in self.writers.values():
            writer.close()
        self.writers.clear()

    def _place(self, run: TrialRun) -> Path:
        name = re.sub(r"[^\w=.,() -]", "_", run.name)[:LONGEST_NAME].strip()
        return self.folder / f"{name} ({run.trial})"
