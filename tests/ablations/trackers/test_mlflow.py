"""MLflow: what is kept in a SQLite store, and what a server gives back over its REST API."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from datetime import datetime

import numpy as np
import onnxruntime
import pytest
from conftest import finished_study

from expertgrid.ablations.records.directory import StudyDirectory
from expertgrid.ablations.results.rows import best_record, best_row, read_results
from expertgrid.model.system.files import write_whole

START_S = 600  # on a busy machine


@pytest.fixture
def exported(expertgrid, trained_study, tmp_path) -> StudyDirectory:
    """A study whose best network was exported."""
    study = shutil.copytree(trained_study, tmp_path / "tiny")
    assert expertgrid("export", study).status == 0
    return StudyDirectory(study)


def check_is_whole(study: StudyDirectory, uri: str) -> None:
    """Reads all of a study back from a store, with MLflow's client, and its registered model with MLflow's loader."""
    import mlflow
    from mlflow import MlflowClient

    client = MlflowClient(uri, uri)
    experiment = client.get_experiment_by_name("tiny")
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    trials = {run.data.tags["expertgrid.trial"]: run for run in runs if run is not parent}
    assert len(trials) == len(runs) - 1 == 6
    assert parent.data.tags["mlflow.note.content"] == "Two experts or one?"
    assert parent.data.params["factor.gate"] == '["linear", "mlp"]'
    assert parent.data.metrics["trials_finished"] == 6
    for trial, run in trials.items():
        assert run.info.status == "FINISHED"
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.data.params["recipe.epochs"] == "2"
        record = study.record(trial)
        assert run.data.metrics["final/test_accuracy"] == pytest.approx(record.test_accuracy)
        trained = sum(epoch.train_seconds + epoch.validation_seconds for epoch in study.epochs(trial))
        assert run.info.end_time == 1000 * datetime.fromisoformat(record.finished).timestamp()
        assert run.info.end_time - run.info.start_time == pytest.approx(1000 * trained, abs=1)
        history = client.get_metric_history(run.info.run_id, "validation_accuracy")
        assert [point.step for point in history] == [1, 2]
        curve = [epoch.validation_accuracy for epoch in study.epochs(trial)]
        assert [point.value for point in history] == pytest.approx(curve)

    best = best_record(best_row(read_results(study).rows)).trial
    run_id = trials[best].info.run_id
    files = {file.path for file in client.list_artifacts(run_id, "export")}
    assert files == {"export/model-uint8.onnx", "export/model-uint8.certificate.json"}
    (version,) = client.search_model_versions("name = 'tiny'")
    assert (version.run_id, version.tags["expertgrid.trial"]) == (run_id, best)
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    images = np.arange(4 * 64, dtype=np.uint8).reshape(4, 8, 8, 1)
    session = onnxruntime.InferenceSession(study.path / "export" / "model-uint8.onnx")
    (logits,) = session.run(None, {"images": images})
    served = mlflow.pyfunc.load_model(f"models:/tiny/{version.version}").predict({"images": images})
    assert np.array_equal(served["logits"], logits)


def test_a_store_in_the_study_directory(expertgrid, exported):
    for _ in range(2):  # the second time there is nothing more to send
        outcome = expertgrid("track", exported.path, "--to", "mlflow")
        assert (outcome.status, outcome.out) == (0, f"{exported.path}: 6 trials are in mlflow\n"), outcome.err
    check_is_whole(exported, f"sqlite:///{exported.path}/mlflow/mlflow.db")


@pytest.mark.nightly
def test_a_trial_that_is_trained_again_takes_the_place_of_the_first(expertgrid, digits, tmp_path, monkeypatch):
    """In a database that the user names, with the files in the study directory."""
    from mlflow import MlflowClient

    monkeypatch.chdir(tmp_path)
    study = finished_study(tmp_path / "tiny", digits)
    uri = f"sqlite:///{tmp_path}/elsewhere.db"
    trial = study.read_plan().cells[0].trials[0]
    for test_accuracy in (0.25, 0.5):
        finished = f"2026-01-01T00:00:0{round(4 * test_accuracy)}+00:00"
        record = study.record(trial).model_copy(update={"test_accuracy": test_accuracy, "finished": finished})
        write_whole(study.trial(trial) / "record.json", record.model_dump_json().encode())
        assert expertgrid("track", study.path, "--to", f"mlflow:{uri}").status == 0
    client = MlflowClient(uri, uri)
    runs = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    assert len(runs) == 7
    (run,) = [run for run in runs if run.data.tags.get("expertgrid.trial") == trial]
    assert run.data.metrics["final/test_accuracy"] == 0.5
    artifacts = study.path / "mlflow" / "artifacts"
    assert all(run.info.artifact_uri.startswith(artifacts.as_uri()) for run in runs)
    assert list(artifacts.rglob("study.toml"))
    assert {file.name for file in tmp_path.iterdir()} == {"tiny", "elsewhere.db"}


@pytest.mark.parametrize("uri", ["http://127.0.0.1:9", "gopher://nowhere"])
def test_a_store_that_cannot_be_opened_is_one_line(expertgrid, trained_study, monkeypatch, uri):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    outcome = expertgrid("track", trained_study, "--to", f"mlflow:{uri}")
    assert (outcome.status, outcome.out) == (2, "")
    assert f"tracker mlflow: {uri}: " in outcome.complaint


@pytest.fixture
def server(tmp_path) -> Iterator[str]:
    """The address of an MLflow server, with SQLite and its own artifact store."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = tmp_path / "server"
    place.mkdir()
    line = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    line += ["--backend-store-uri", f"sqlite:///{place}/server.db", "--artifacts-destination", str(place / "artifacts")]
    environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with open(place / "log", "wb") as log:
        process = subprocess.Popen(line, cwd=place, env=environment, stdout=log, stderr=log, start_new_session=True)
    address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START_S
    try:
        while not _answers(f"{address}/health"):
            running = process.poll() is None and time.monotonic() < deadline
            assert running, f"the server did not start: {(place / 'log').read_text()[-2000:]}"
            time.sleep(0.5)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGTERM)  # its own processes, which it started in a session of its own
        process.wait(60)


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5):
            return True
    except OSError:
        return False


@pytest.mark.nightly
def test_a_server_has_the_study(expertgrid, exported, server):
    assert expertgrid("track", exported.path, "--to", f"mlflow:{server}").status == 0
    check_is_whole(exported, server)
    api = f"{server}/api/2.0/mlflow"
    with urllib.request.urlopen(f"{api}/experiments/get-by-name?experiment_name=tiny", timeout=60) as answer:
        experiment = json.load(answer)["experiment"]["experiment_id"]
    question = json.dumps({"experiment_ids": [experiment]}).encode()
    request = urllib.request.Request(f"{api}/runs/search", question, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        names = {run["info"]["run_name"] for run in json.load(answer)["runs"]}
    assert {"tiny", "experts 2, gate mlp, seed 0", "experts 1, seed 1"} < names
