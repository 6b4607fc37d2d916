"""Weights & Biases: runs that are kept offline, read back from their own files."""

import json
import struct
import time
from pathlib import Path

from conftest import finished_study

BLOCK, HEADER = 32768, struct.Struct("<IHB")  # checksum, length, and whether a piece is whole, first, middle or last
WHOLE, FIRST, _, LAST = range(1, 5)


def records_of(file: Path) -> list:
    """The records of a run's file, once it is whole: `finish` returns before the process that writes it has ended."""
    deadline = time.monotonic() + 60
    while True:
        records = read_log(file)
        if any(record.HasField("exit") for record in records) or time.monotonic() > deadline:
            return records
        time.sleep(0.2)


def read_log(file: Path) -> list:
    """The records of a run's file, which is a log as LevelDB has them, after seven bytes of its own."""
    from wandb.proto import wandb_internal_pb2

    content, at, found, pieces = file.read_bytes(), 7, [], b""
    while at + HEADER.size <= len(content):
        if BLOCK - at % BLOCK < HEADER.size:  # no header begins at the end of a block
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = HEADER.unpack_from(content, at)
        at += HEADER.size
        pieces = content[at : at + length] if kind in (WHOLE, FIRST) else pieces + content[at : at + length]
        at += length
        if kind in (WHOLE, LAST):
            found.append(wandb_internal_pb2.Record.FromString(pieces))
    return found


def test_runs_have_configuration_metrics_and_the_contact_sheet(expertgrid, tmp_path, digits):
    study = finished_study(tmp_path / "study", digits)
    for _ in range(2):  # the second time replaces what the first one wrote
        outcome = expertgrid("track", study.path, "--to", "wandb")
        assert (outcome.status, outcome.out) == (0, f"{study.path}: 6 trials are in wandb\n"), outcome.err
    files = {file.stem.removeprefix("run-"): file for file in (study.path / "wandb").glob("offline-run-*/run-*.wandb")}
    assert set(files) == set(study.read_plan().trials)

    trial = study.read_plan().cells[3].trials[1]
    found = records_of(files[trial])
    (run,) = [record.run for record in found if record.HasField("run")]
    assert (run.display_name, run.run_group, run.project) == ("experts 2, gate mlp, seed 1", "study", "study")
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert (config["experts"], config["gate"], config["recipe.epochs"]) == ("2", "mlp", 2)
    rows = []
    for record in found:
        if record.HasField("history"):
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            rows.append((items["_step"], items.get("validation_accuracy")))
    assert rows == [(epoch.epoch, epoch.validation_accuracy) for epoch in study.epochs(trial)]
    summary = {}
    for record in found:
        summary |= {item.key: json.loads(item.value_json) for item in record.summary.update}
    assert summary["final/test_accuracy"] == study.record(trial).test_accuracy
    first = files[study.read_plan().cells[0].trials[0]].parent
    assert len(list(first.glob("files/media/images/augmented images*.png"))) == 1
