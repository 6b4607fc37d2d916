"""The latency of a study's cells, and the front of accuracy and latency."""

import json
import shutil

import pytest
import torch
from conftest import write_latency

from expertgrid.ablations.records.directory import StudyDirectory
from expertgrid.ablations.results.rows import latency_front, read_results, smallest
from expertgrid.ablations.speed.latency import _may_be_on_front
from expertgrid.bench.record import LatencyRecord

SHORT = "--batch", 1, "--seconds", 0.02


@pytest.fixture(autouse=True)
def one_thread():
    """Those of an engine wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def study(trained_study, tmp_path):
    return shutil.copytree(trained_study, tmp_path / "tiny")


def set_latencies(study, p50_ms: dict[str, float], run: str = "2026-01-01", cells: int = 1) -> None:
    """Writes a latency record of the cells that are named."""
    for row in read_results(StudyDirectory(study)).rows:
        if row.name in p50_ms:
            write_latency(study, row.records[0].trial, p50_ms[row.name], run, cells)


def dominated(row, rows) -> bool:
    """Whether another row is as fast and better, or as good and faster: every pair is looked at."""
    ms, accuracy = smallest(row.latency).p50_ms, row.mean("validation")
    others = [(smallest(other.latency).p50_ms, other.mean("validation")) for other in rows if other is not row]
    return any((a <= ms and b > accuracy) or (a < ms and b >= accuracy) for a, b in others)


def test_cells_take_turns_and_table_and_report_show_it(expertgrid, study):
    before = json.loads(expertgrid("table", study, "--format", "json").out)["cells"]
    reads = StudyDirectory(study).test_reads()
    outcome = expertgrid("bench", study, *SHORT, "--format", "json")
    assert outcome.status == 0, outcome.err
    printed = json.loads(outcome.out)
    rows = read_results(StudyDirectory(study)).rows
    assert [row["cell"] for row in printed] == [row.name for row in rows]
    assert [row["MACs"] for row in printed] == [row["MACs"] for row in before]
    assert {row["engine"] for row in printed} == {"onnxruntime cpu"}
    assert {row["verdict"] for row in printed[1:]} <= {"faster", "slower", "can't tell"}
    assert printed[0]["verdict"] not in ("faster", "slower", "can't tell")
    assert len({row.latency.finished for row in rows}) == 1
    assert all(row.latency.cells == len(rows) for row in rows)
    front = [row.name for row in rows if not dominated(row, rows)]
    assert sorted(row.name for row in latency_front(rows)) == sorted(front)
    assert [row["cell"] for row in printed if row["front"] == "yes"] == front
    after = json.loads(expertgrid("table", study, "--format", "json").out)["cells"]
    assert [row["latency ms"]["value"] for row in after] == [smallest(row.latency).p50_ms for row in rows]
    assert all(row["latency ms"]["low"] <= row["latency ms"]["value"] <= row["latency ms"]["high"] for row in after)
    assert [row["front"] == "yes" for row in after] == [row.name in front for row in rows]
    assert [row["val acc %"] for row in after] == [row["val acc %"] for row in before]
    assert StudyDirectory(study).test_reads() == reads
    text = expertgrid("table", study, "--notes").out
    assert "Latency: median of ONNX Runtime at batch 1, cpu, " in text
    assert f"of {len(rows)} cells in turns" in text
    assert expertgrid("report", study).status == 0
    assert "Validation accuracy against measured latency, ms (median, batch 1)" in (study / "report.html").read_text()
    assert expertgrid("check", study).status == 0
    assert expertgrid("verify", study).status == 0


@pytest.mark.nightly  # all cells are exported and timed twice
def test_the_front_alone_is_timed_at_length(expertgrid, study):
    outcome = expertgrid("bench", study, *SHORT, "--front", "--format", "json")
    assert outcome.status == 0, outcome.err
    timed = {row["cell"] for row in json.loads(outcome.out)}
    rows = read_results(StudyDirectory(study)).rows
    assert timed == {row.name for row in rows if row.latency}
    best = max(row.mean("validation") for row in rows)
    assert best in [row.mean("validation") for row in rows if row.name in timed]
    left = [row.name for row in rows if row.name not in timed]
    assert ("are not on the front, and were timed briefly: " + "; ".join(left) in outcome.err) == bool(left)


def test_a_cell_is_left_out_where_another_is_clearly_faster_and_as_good(study):
    rows = sorted(read_results(StudyDirectory(study)).rows, key=lambda row: row.mean("validation"))
    best = rows[-1]
    assert _may_be_on_front(rows, [2.0] * (len(rows) - 1) + [1.0]) == [best]
    assert _may_be_on_front(rows, [1.05] * (len(rows) - 1) + [1.0]) == rows, "brief times cannot tell"
    assert best in _may_be_on_front(rows, [1.0] * (len(rows) - 1) + [9.0])


def test_the_front_is_of_one_run(study):
    names = [row.name for row in read_results(StudyDirectory(study)).rows]
    set_latencies(study, dict.fromkeys(names[:1], 1.0))
    assert latency_front(read_results(StudyDirectory(study)).rows) == []
    set_latencies(study, dict.fromkeys(names, 3.0))
    set_latencies(study, dict(zip(names[:2], (1.0, 2.0))), "2026-01-02")
    rows = read_results(StudyDirectory(study)).rows
    assert {row.name for row in latency_front(rows)} <= set(names[:2])
    set_latencies(study, {names[2]: 0.1}, "2026-01-03", cells=0)  # a file by itself, later
    rows = read_results(StudyDirectory(study)).rows
    assert smallest(rows[2].latency).p50_ms == 3.0
    assert LatencyRecord.model_validate_json(next((study / "bench").glob("*-2026-01-03.json")).read_text()).cells == 0


def test_cells_that_cannot_be_timed(expertgrid, study, tmp_path):
    directory = StudyDirectory(study)
    rows = read_results(directory).rows
    for trial in rows[0].trials.values():
        directory.checkpoint(trial).unlink()
    outcome = expertgrid("bench", study, *SHORT)
    assert outcome.status == 0, outcome.err
    said = f"1 of the cells have no weights, only records, and were not timed: {rows[0].name}"
    assert [line for line in outcome.err.splitlines() if "weights" in line] == [said]
    for file in study.glob("trials/*/model.safetensors"):
        file.unlink()
    for arguments, reason in (
        ([study], "none of its trials has weights, only records"),
        ([tmp_path], "not a study directory: there is no study.toml"),
        ([study, study], "a study directory is measured alone; 2 files were given"),
        ([study, "--json", tmp_path / "a.json"], "--json: is for one file; the records of a study's cells are kept in"),
        ([study, "--fail-if-slower", "5%"], "--fail-if-slower: a second file or --baseline FILE.json is needed"),
        ([next((study / "bench").glob("*.json")), "--front"], "--front: is for a study directory"),
        ([study, "--engine", "onyx"], "unknown engine 'onyx'"),
    ):
        outcome = expertgrid("bench", *arguments)
        assert (outcome.status, reason in outcome.complaint) == (2, True), outcome.complaint
