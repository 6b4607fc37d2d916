"""Latencies of files, what they say against each other, and the suite of pytest-benchmark."""

import json
import os

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import REPOSITORY
from onnx import TensorProto
from small import TRAINED, identity, two_block

from expertgrid.bench.latency import check_comparable, measure, notes, rows, with_baseline, with_first
from expertgrid.bench.record import Latency, LatencyRecord, read_latency
from expertgrid.bench.timing import Block, Times, compare
from expertgrid.model.system.errors import InputError


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(two_block())
    return path


def latency(kind: str, ms: float, batch: int = 1, title: str = "") -> Latency:
    """Of calls that take these milliseconds, more or less, alike in each of four openings."""
    blocks = [Block(opening, [ms, 0.9 * ms, 1.1 * ms]) for opening in range(4)]
    return Latency.of(title or f"{kind} cpu", kind, batch, Times(blocks))


def record(file: str, *latencies: Latency) -> LatencyRecord:
    return LatencyRecord(
        file=file, sha256="", trial="", model="", precision="", pruned=False, provider="cpu", device="cpu", threads=2,
        machine={"cores": 2, "instructions": "AVX2"}, versions={"torch": "2"}, finished="", latencies=list(latencies),
    )  # fmt: skip


def test_percentiles_and_rate():
    blocks = [Block(0, [1.0, 2.0], 3.0), Block(1, [3.0, 4.0], 1.0)] * 10
    timed = Latency.of("engine", "eager", 8, Times(blocks))
    assert (timed.p50_ms, timed.calls, timed.calls_ms) == (2.5, 40, [1.0, 2.0, 3.0, 4.0] * 10)
    assert timed.p90_ms == pytest.approx(np.percentile([1, 2, 3, 4] * 10, 90))
    assert timed.p99_ms is None
    assert timed.images_per_s == pytest.approx(8 * 4 / 0.010)
    assert timed.joules_per_image == pytest.approx(40 / 320)
    assert [(block.opening, block.calls_ms) for block in timed.times.blocks] == [block[:2] for block in blocks]


def test_a_record_of_version_0_2_has_the_kind_in_its_title():
    for kind, title in (
        ("onnxruntime", "onnxruntime cpu (1 thread, NCHW)"), ("eager", "pytorch eager cuda"),
        ("compiled-bf16", "pytorch compiled bf16 cpu"), ("openvino-bf16", "openvino-bf16 cpu"),
    ):  # fmt: skip
        fields = json.loads(latency(kind, 1.0, title=title).model_dump_json())
        del fields["kind"]
        assert Latency.model_validate(fields) == latency(kind, 1.0, title=title)


def test_record_of_a_file(file, tmp_path):
    (record,) = measure([file], "cpu", batches=(1, 3), measure_s=0.01)
    assert (record.trial, record.model, record.provider) == (TRAINED.trial, "two_block", "cpu")
    assert [(latency.engine, latency.kind, latency.batch) for latency in record.latencies] == [
        (*engine, batch)
        for batch in (1, 3)
        for engine in (("onnxruntime cpu", "onnxruntime"), ("pytorch eager cpu", "eager"))
    ]
    for latency, row in zip(record.latencies, rows([record], []), strict=True):
        low, high = latency.intervals_ms["p50"]
        assert 0 < low <= latency.p50_ms <= high
        assert len(latency.calls_ms) == latency.calls == sum(calls for _, calls in latency.blocks) >= 28
        assert row["p50 ms"] == (latency.p50_ms, low, high)
        eager = next(e for e in record.latencies if (e.batch, e.kind) == (latency.batch, "eager"))
        assert row["x eager"] == (None if latency is eager else compare(eager.times, latency.times))
    assert record.machine["cores"] == len(os.sched_getaffinity(0))
    assert 0 <= record.host.others_share <= 1
    assert notes([record])[0].startswith(record.device)
    (tmp_path / "record.json").write_text(record.model_dump_json())
    assert read_latency(tmp_path / "record.json") == record


def test_files_are_compared_with_the_first():
    """In the same engine, or each in its own: the first of a record. PyTorch's networks are not those of the files."""
    first = record("first.onnx", latency("onnxruntime", 6.0), latency("eager", 9.0, title="pytorch eager cpu"))
    quick = record("quick.onnx", latency("onnxruntime", 3.0), latency("eager", 9.0, title="pytorch eager cpu"))
    tuned = record("tuned.onnx", latency("openvino", 12.0), latency("openvino", 1.0, batch=8))
    comparisons = with_first([first, quick, tuned])
    assert list(map(str, comparisons)) == [
        "quick.onnx against first.onnx, batch 1, onnxruntime cpu: faster, 2 times as fast (2 to 2)",
        "tuned.onnx against first.onnx in onnxruntime cpu, batch 1, openvino cpu: slower, 0.5 times as fast (0.5 to "
        "0.5)",
    ]
    assert [comparison.slower_percent() for comparison in comparisons] == [0, pytest.approx(100)]
    table = rows([first, quick, tuned], comparisons)
    assert [row["verdict"] for row in table] == [None, None, "faster", None, "slower", None]
    assert [row["x first"] and round(row["x first"].value, 9) for row in table] == [None, None, 2.0, None, 0.5, None]
    assert [row["x eager"] and round(row["x eager"].value, 9) for row in table] == [1.5, None, 3, None, None, None]
    assert "x first" not in rows([first], [])[0]
    assert notes([first, quick])[1].startswith("x first: against first.onnx")


def test_a_baseline_is_of_this_machine_and_these_versions(tmp_path):
    place, now = tmp_path / "record.json", record("a.onnx", latency("onnxruntime", 3.0))
    place.write_text(record("a.onnx", latency("onnxruntime", 1.0)).model_dump_json())
    baseline = read_latency(place)
    check_comparable(baseline, now, place)
    (comparison,) = with_baseline(now, baseline, "record.json")
    assert (comparison.engine, comparison.ratio.word) == ("onnxruntime cpu", "slower")
    assert comparison.ratio.value == pytest.approx(1 / 3)
    assert comparison.slower_percent() == pytest.approx(200)
    with pytest.raises(InputError, match="earlier: has none of the engines and batch sizes"):
        with_baseline(now, record("a.onnx", latency("openvino", 1.0)), "earlier")
    for changed, what in (
        ({"threads": 64}, "threads 2, here it is 64"),
        ({"versions": {"torch": "1.0"}}, "torch 2, here it is 1.0"),
        ({"machine": now.machine | {"instructions": "SSE"}}, "instructions AVX2, here it is SSE"),
    ):
        with pytest.raises(InputError, match=rf"record.json: was measured with {what}; --across-machines"):
            check_comparable(baseline, now.model_copy(update=changed), place)
    without_blocks = baseline.latencies[0].model_copy(update={"blocks": []})
    for content, reason in (
        ("{}", "record.json.file: is missing"),
        ("[", "record.json: not JSON"),
        (record("a.onnx", without_blocks).model_dump_json(), "record.json: does not say in which blocks"),
    ):
        place.write_text(content)
        with pytest.raises(InputError, match=reason):
            read_latency(place)


def test_a_file_of_other_origin_is_measured_alone(tmp_path):
    (record,) = measure([identity(tmp_path / "other.onnx", ["n", 3, 4])], batches=(2,), measure_s=0.01)
    assert [(latency.engine, record.trial) for latency in record.latencies] == [("onnxruntime cpu", "")]
    assert rows([record], [])[0]["x eager"] is None


def test_files_that_cannot_be_measured(tmp_path):
    (tmp_path / "text.onnx").write_text("hello")
    identity(tmp_path / "open.onnx", ["n", "height", 4])
    identity(tmp_path / "int64.onnx", ["n", 4], TensorProto.INT64)
    identity(tmp_path / "fixed.onnx", [1, 4])
    for name, provider, message in (
        ("none", "cpu", "none.onnx: cannot be read: No such file"),
        ("text", "cpu", "text.onnx: not an ONNX file"),
        ("open", "cpu", r"open.onnx: needs one input of images.* found x: tensor\(float\)"),
        ("int64", "cpu", r"found x: tensor\(int64\)"),
        ("fixed", "cpu", "fixed.onnx: does not run at batch 2: "),
        ("fixed", "gpu", "unknown provider 'gpu'"),
    ):
        with pytest.raises(InputError, match=message):
            measure([tmp_path / f"{name}.onnx"], provider, batches=(1, 2), measure_s=0.01)


def test_the_suite_runs_every_published_file_of_a_study(file, tmp_path, monkeypatch, capsys):
    """Twice, with the second run compared to the first, and a histogram."""
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    monkeypatch.setenv("EXPERTGRID_STUDY", str(tmp_path / "study"))
    export = tmp_path / "study" / "export"
    export.mkdir(parents=True)
    files = "model-uint8.onnx", "model-uint8-tuned.onnx"
    for name in (*files, "model-uint8-int8.rejected.onnx"):
        (export / name).write_bytes(file.read_bytes())
    suite = ["tests/benchmarks", "-q", "-p", "no:cacheprovider", "--batch=1"]
    suite += [f"--benchmark-storage={tmp_path}/storage", f"--benchmark-histogram={tmp_path}/histogram"]
    compared = "--benchmark-compare", "--benchmark-json", f"{tmp_path}/result.json", "--benchmark-save-data"
    for more in (["--benchmark-autosave"], compared):
        status = pytest.main([*suite, *more])
        printed = capsys.readouterr().out
        assert status == 0, printed
        assert "4 passed" in printed
    assert "(0001_" in printed
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["machine_info"]["cpu"]
    for benchmark in result["benchmarks"]:
        extra, stats = benchmark["extra_info"], benchmark["stats"]
        assert extra["p50_ms"] == pytest.approx(1000 * stats["median"])
        assert extra["p90_ms"] == pytest.approx(1000 * np.percentile(stats["data"], 90))
        assert (extra["p99_ms"] is None) == (stats["rounds"] < 368)
        assert (extra["trial"], extra["threads"]) == (TRAINED.trial, torch.get_num_threads())
        assert extra["versions"]["onnxruntime"] == onnxruntime.__version__
        assert extra["machine"]["cores"] == len(os.sched_getaffinity(0))
        assert extra["images_per_s"] > 0
    measured = {(extra["file"], extra["engine"]) for extra in (each["extra_info"] for each in result["benchmarks"])}
    assert measured == {(name, engine) for name in files for engine in ("onnxruntime cpu", "pytorch eager cpu")}
    assert list(tmp_path.glob("histogram*.svg"))
    assert pytest.main([*suite, f"--study={tmp_path}"]) != 0
    assert "no published file in its export folder" in capsys.readouterr().out
