"""MLflow: a run of the study with a run of each trial in it, in the study directory (SQLite) or on a server."""

import logging
import os
import platform
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from expertgrid.ablations.records.record import Record
from expertgrid.ablations.trackers.tracking import Ended, StudyRun, Tracker, TrialRun
from expertgrid.export.describe import read_onnx
from expertgrid.export.exported import ExportedFile
from expertgrid.model.system.errors import InputError, reason_of
from expertgrid.model.system.files import make_folder

if TYPE_CHECKING:
    from mlflow.entities import Run

STUDY, TRIAL, FINISHED, SHA256 = (f"expertgrid.{name}" for name in ("study", "trial", "finished", "sha256"))
PARENT, NOTE = "mlflow.parentRunId", "mlflow.note.content"  # tags that MLflow knows
SETTINGS = {  # for a user who has not set them
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # a server that is gone holds up a study for seconds, not for minutes
}


class MLflow(Tracker):
    """An experiment for the study's name, with nested runs, parameters, metrics, files, and a model for the winner.

    Raises InputError for a store that cannot be opened.
    """

    def __init__(self, study: StudyRun, uri: str | None):
        for name, value in SETTINGS.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        self.study, self.own = study, study.directory / "mlflow"
        if uri is None:
            make_folder(self.own)
        store = uri or f"sqlite:///{self.own / 'mlflow.db'}"
        try:
            self.client = MlflowClient(store, store)
            self.experiment = self._experiment(store)
            self.parent = self._parent()
        except Exception as error:  # of its stores, databases and HTTP library
            raise InputError(f"tracker mlflow: {store}: {reason_of(error)}") from error
        self.open: dict[str, str] = {}  # the run's id of each trial that is under way

    def _experiment(self, store: str) -> str:
        """A server says where files are kept. For a bare database MLflow would take the working directory."""
        experiment = self.client.get_experiment_by_name(self.study.name)
        if experiment is not None:
            if experiment.lifecycle_stage == "deleted":
                self.client.restore_experiment(experiment.experiment_id)
            return experiment.experiment_id
        is_server = store.startswith(("http:", "https:", "databricks"))
        return self.client.create_experiment(self.study.name, None if is_server else (self.own / "artifacts").as_uri())

    def _parent(self) -> str:
        """The study's run: that of this directory on this machine, so that the same command goes on with it."""
        place = f"{platform.node()}:{self.study.directory}"
        runs = self._runs(f"tags.`{STUDY}` = '{_quoted(place)}'")
        if runs:
            self.client.update_run(runs[0].info.run_id, status="RUNNING")
            return runs[0].info.run_id
        tags = {STUDY: place, NOTE: self.study.question}
        run = self.client.create_run(self.experiment, tags=tags, run_name=self.study.name)
        self._parameters(run.info.run_id, dict(self.study.parameters))
        return run.info.run_id

    def _runs(self, condition: str) -> "list[Run]":
        return list(self.client.search_runs([self.experiment], condition))

    def _of(self, trial: str) -> "list[Run]":
        return self._runs(f"tags.`{PARENT}` = '{self.parent}' and tags.`{TRIAL}` = '{trial}'")

    def _parameters(self, run_id: str, parameters: dict) -> None:
        from mlflow.entities import Param

        self.client.log_batch(run_id, params=[Param(name, str(value)) for name, value in parameters.items()])

    def _metrics(self, run_id: str, metrics: dict[str, float], step: int) -> None:
        from mlflow.entities import Metric

        at = int(time.time() * 1000)
        self.client.log_batch(run_id, metrics=[Metric(name, value, at, step) for name, value in metrics.items()])

    def holds(self, record: Record) -> bool:
        return any(run.data.tags.get(FINISHED) == record.finished for run in self._of(record.trial))

    def begin_trial(self, run: TrialRun) -> None:
        for older in self._of(run.trial):
            self.client.delete_run(older.info.run_id)  # MLflow keeps what is deleted until `mlflow gc`
        tags = {PARENT: self.parent, TRIAL: run.trial}
        begun = None if run.begun is None else _milliseconds(run.begun)
        made = self.client.create_run(self.experiment, start_time=begun, tags=tags, run_name=run.name)
        self.open[run.trial] = made.info.run_id
        self._parameters(made.info.run_id, run.parameters)

    def add_images(self, run: TrialRun, sheet: Image.Image) -> None:
        self.client.log_image(self.open[run.trial], sheet, "augmented-images.png")

    def add_epoch(self, run: TrialRun, epoch: int, metrics: dict[str, float]) -> None:
        self._metrics(self.open[run.trial], metrics, epoch)

    def end_trial(self, run: TrialRun, record: Record, metrics: dict[str, float]) -> None:
        run_id = self.open.pop(run.trial)
        self._metrics(run_id, metrics, record.epochs)
        self.client.set_terminated(run_id, "FINISHED", _milliseconds(datetime.fromisoformat(record.finished)))
        self.client.set_tag(run_id, FINISHED, record.finished)  # last: it says that the run is whole

    def fail_trial(self, run: TrialRun, reason: str) -> None:
        run_id = self.open.pop(run.trial)
        self.client.set_tag(run_id, NOTE, reason)
        self.client.set_terminated(run_id, "FAILED")

    def close(self, ended: Ended) -> None:
        for run_id in self.open.values():
            self.client.set_terminated(run_id, "KILLED")
        self.open.clear()
        self._metrics(self.parent, ended.metrics, 0)
        for file in ended.files:
            self.client.log_artifact(self.parent, str(file))
        for exported in ended.exported:
            for run in self._of(exported.trial):
                for file in (exported.file, exported.certificate_file):
                    self.client.log_artifact(run.info.run_id, str(file), "export")
        winners = [exported for exported in ended.exported if exported.trial == ended.winner]
        if winners and winners[0].is_the_network:
            self._register(winners[0])
        self.client.set_terminated(self.parent, "FINISHED")

    def _register(self, exported: ExportedFile) -> None:
        """Registers a file as the newest version of the model that has the study's name, once."""
        import mlflow.onnx
        import onnx
        from mlflow.exceptions import MlflowException

        name, digest = self.study.name, exported.certificate.sha256
        runs = self._of(exported.trial)
        if not runs:
            return  # its trial is not of this study any more
        try:
            self.client.get_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            self.client.create_registered_model(name, description=self.study.question)
        versions = self.client.search_model_versions(f"name = '{_quoted(name)}'")
        if any(version.tags.get(SHA256) == digest for version in versions):
            return
        run_id, model = runs[0].info.run_id, onnx.load_from_string(read_onnx(exported.file))
        with tempfile.TemporaryDirectory() as beside:
            made = Path(beside) / "model"
            mlflow.onnx.save_model(model, str(made), pip_requirements=["onnx", "onnxruntime"])
            (made / exported.certificate_file.name).write_bytes(exported.certificate_file.read_bytes())
            self.client.log_artifacts(run_id, str(made), "model")
        source = f"{runs[0].info.artifact_uri}/model"
        tags = {TRIAL: exported.trial, SHA256: digest}
        self.client.create_model_version(name, source, run_id, tags=tags, description=str(exported.certificate))


def _milliseconds(time: datetime) -> int:
    """As MLflow has times: since 1970."""
    return int(time.timestamp() * 1000)


def _quoted(text: str) -> str:
    """A text in a filter, which has quotes around it."""
    return text.replace("'", "''")
