"""The measurement on a GPU: all pieces small on a CPU, what interrupts them, and the summary of what they wrote."""

import multiprocessing
import statistics
import time

import pytest
import torch

from bench import latency
from bench.command import INTERRUPTED
from bench.floor import floor
from bench.gpu import __main__ as gpu
from bench.gpu import runner, stages
from bench.gpu import tables as summary
from bench.gpu.pieces import Piece
from bench.gpu.stages import Measurement
from bench.peaks import Peaks
from model.cost import cost
from model.errors import InputError
from model.presets import PRESETS


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The directory of the results of a smoke run of all pieces."""
    out = tmp_path_factory.mktemp("gpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "WARM_UP_S", 0.0)
        assert gpu.main(["--smoke", "--device", "cpu", "--out", str(out), "--minutes", "30"]) == 0
    return next(out.glob("cpu-*"))


def made_of(steps, monkeypatch):
    """Puts pieces of other steps in place of all."""
    monkeypatch.setattr(runner, "PIECES", {name: lambda bench, found=found: found for name, found in steps.items()})


def started(out, *more):
    return gpu.main(["--smoke", "--device", "cpu", "--data", "digits", "--out", str(out), *more])


def test_smoke_run_has_all_pieces(smoke, capsys):
    results = summary.read(smoke)
    assert set(results) == set(stages.PIECES)
    for name, piece in results.items():
        assert piece["done"]
        assert (piece["piece"], piece["smoke"], piece["data"]) == (name, True, "images")
        assert piece["command"].startswith("python -m bench.gpu --smoke --device cpu --out gpu")
        assert {"torch", "torchvision"} <= piece["environments"][0]["versions"].keys()
    assert summary.newest(smoke.parent) == smoke
    assert gpu.main(["--smoke", "--device", "cpu", "--out", str(smoke.parent)]) == 0
    assert capsys.readouterr().err.count("done before") == len(stages.PIECES)


def test_numbers_of_the_summary_are_those_of_the_files(smoke, tmp_path, capsys):
    results = summary.read(smoke)
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- bench.gpu -->\nold\n<!-- /bench.gpu -->\nafter\n")
    assert gpu.main(["--summary", str(smoke), "--write", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith("before\n<!-- bench.gpu -->\nA smoke run")
    assert text.endswith("summary.svg)\n<!-- /bench.gpu -->\nafter\n")
    assert "old" not in text
    assert gpu.main(["--summary", str(smoke), "--write", str(readme)]) == 0
    assert readme.read_text() == text
    assert (smoke / "summary.svg").read_bytes().startswith(b"<?xml")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:2] == "| "]

    speed = results["train-speed"]["steps"]["two_block"]["value"]
    assert [speed["model"], "2", f"{round(speed['images_per_s'])}"] in [row[:3] for row in rows]
    assert len(speed["loop_s"]) == len(speed["bare_s"]) == len(speed["baseline_s"]) == speed["rounds"] == 1
    assert min(speed["loop_s"] + speed["bare_s"] + speed["baseline_s"]) > 0
    cell = results["fast"]["steps"]["speed"]["value"]["cells"][0]
    mean = statistics.mean(100 * record["test_accuracy_flip"] for record in cell["records"])
    row = next(row for row in rows if row[:2] == ["speed", "2"])
    assert row[4].split(" ± ")[0] == f"{mean:.2f}"
    assert row[6] == f"{cell['records'][0]['parameters']:,}"
    card = results["card"]["steps"]["2-seeds"]["value"]
    assert [cell["levels"] for cell in card["cells"]] == [{"experts": 1}, {"experts": 2}]
    assert [row["experts"] for row in card["effects"]["experts"]] == ["1", "2"]
    latency = results["inference"]["steps"]["eight_block-fp32-cpu-device"]["value"]["latencies"][0]
    assert ["onnxruntime cpu bound", "1", f"{latency['p50_ms']:.4f}"] in [row[1:4] for row in rows]
    assert "Training steps: eager (2 trainings)." in text
    references = [row for row in rows if row[-4:-3] == ["80.68 (last epoch)"]]
    assert [row[0] for row in references] == ["two_block"]


def test_no_results_change_nothing(tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("as it was")
    assert gpu.main(["--summary", "--out", str(tmp_path), "--write", str(readme)]) == 0
    assert capsys.readouterr().out.count("\n") == 1
    assert readme.read_text() == "as it was"


def test_interrupted_piece_goes_on_from_there(tmp_path, monkeypatch, capsys):
    called = []

    def second():
        called.append("second")
        if called.count("second") == 1:
            raise KeyboardInterrupt
        return Measurement({"is": 2})

    made_of(
        {"card": {"first": lambda: Measurement(called.append("first") or {"is": 1}), "second": second}}, monkeypatch
    )
    assert started(tmp_path) == INTERRUPTED
    assert capsys.readouterr().err.splitlines()[-1].startswith("stopped; what was measured is kept")
    kept = summary.read(next(tmp_path.glob("cpu-*")))["card"]
    assert (kept["done"], list(kept["steps"])) == (False, ["first"])
    assert started(tmp_path) == 0
    assert called == ["first", "second", "second"]
    assert started(tmp_path, "--again") == 0
    assert called[3:] == ["first", "second"]


def test_time_limit_keeps_what_was_measured(tmp_path, monkeypatch, capsys):
    runs = []
    steps = {"part": lambda: Measurement(runs.append(1) or time.sleep(0.3) or {"runs": len(runs)}, len(runs) > 1)}
    steps["whole"] = lambda: Measurement({})
    made_of({"card": steps}, monkeypatch)
    assert started(tmp_path, "--minutes", "0.003") == 1
    assert "card: stopped after 0.003 minutes; the same command goes on" in capsys.readouterr().err
    assert summary.read(next(tmp_path.glob("cpu-*")))["card"]["steps"]["part"]["value"] == {"runs": 1}
    assert started(tmp_path) == 0
    assert summary.read(next(tmp_path.glob("cpu-*")))["card"]["steps"]["part"]["value"] == {"runs": 2}


def test_step_that_fails_is_one_line_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    def fails():
        raise InputError("provider 'cuda': this ONNX Runtime was built without it")

    made_of({"inference": {"a": fails, "b": lambda: Measurement({"is": 1})}}, monkeypatch)
    assert started(tmp_path) == 1
    err = capsys.readouterr().err
    assert err.count("error: inference: a: provider 'cuda': this ONNX Runtime was built without it\n") == 1
    assert list(summary.read(next(tmp_path.glob("cpu-*")))["inference"]["steps"]) == ["b"]


def test_a_step_apart_is_what_it_is_here_and_ends_when_the_time_is_up(tmp_path):
    """In a process of its own, as on CUDA."""
    bench = stages.Bench(tmp_path, torch.device("cpu"), "digits", True, stages.SMOKE, until=time.monotonic() + 300)
    (rates,) = runner.measured_apart(bench, "peaks", "peaks").value
    assert rates.keys() == Peaks.model_fields.keys()
    bench.until = time.monotonic() - runner.GRACE_S + 0.5
    started = time.monotonic()
    with pytest.raises(stages.TimeIsUp):
        runner.measured_apart(bench, "card", "2-seeds")
    assert time.monotonic() - started < runner.GRACE_S
    assert multiprocessing.active_children() == []


def test_a_training_stops_between_epochs_when_the_time_is_up(tmp_path):
    bench = stages.Bench(tmp_path, torch.device("cpu"), "digits", True, stages.SMOKE, until=0.0)
    found = stages.train(bench, "card", stages.SMOKE.card, 2)
    assert not found.complete
    assert sum(len(cell["records"]) for cell in found.value["cells"]) < 4
    bench.until = time.monotonic() + 300
    found = stages.train(bench, "card", stages.SMOKE.card, 2)
    assert found.complete
    assert [len(cell["records"]) for cell in found.value["cells"]] == [2, 2]


def test_matched_baselines_are_not_measured_among_the_presets():
    for network in stages.NETWORKS:
        matched = stages.matched_baselines(network)
        assert len(matched) == 2
        assert not set(matched) & set(stages.Size().presets)
    assert stages.Size().presets[0] == stages.STEP_PRESET


def test_wrong_input_is_one_line(tmp_path, monkeypatch, capsys):
    def complaint(*arguments):
        assert gpu.main(list(arguments)) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        return err

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "there is no CUDA device here; --smoke" in complaint()
    assert "unknown device 'cuda:9'" in complaint("--device", "cuda:9")
    assert "a CUDA device is measured" in complaint("--device", "cpu")
    assert "unknown piece 'speeds'" in complaint("--pieces", "speeds")
    assert "--minutes 0" in complaint("--minutes", "0")
    place = tmp_path / "cpu-2026-01-01"
    place.mkdir()
    (place / "card.json").write_text("{")
    assert "card.json" in complaint("--summary", str(place))
    assert "only --summary takes it" in complaint("--write", str(place / "card.json"))
    assert "No such option" in complaint("--smok")
    (place / "card.json").write_text(Piece(piece="card", smoke=False, data="x", command="").model_dump_json())
    (tmp_path / "README.md").write_text("no markers")
    assert "needs the lines" in complaint("--summary", str(place), "--write", str(tmp_path / "README.md"))

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "A GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    with pytest.raises(InputError, match="A GPU has no bfloat16"):
        runner.check_device(torch.device("cuda"), smoke=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (2**30, 2**34))
    with pytest.raises(InputError, match=r"1\.0 of 16\.0 GiB of memory are free; 16\.0 are needed"):
        runner.check_device(torch.device("cuda"), smoke=False)


def test_data_has_its_own_name():
    assert runner.data_name("cifar10") == "cifar10"
    assert runner.data_name("parquet:some/where/cifar10-jpeg/") == "cifar10-jpeg"


def test_floor_of_eight_block_by_hand():
    """Blocks of 3 experts and 64 channels on 32x32 pixels, behind a convolution of 3 channels."""
    least = floor(PRESETS["eight_block"], 4, 32, 32)
    image, out = 4 * 3 * 1024, 4 * 64 * 1024
    stem = (image + out) + 2 * (out + out) + (out + out + image)
    block = (out + 3 * out) + 2 * (3 * out + out) + (3 * out + out + out + out)
    parameters, macs = cost(PRESETS["eight_block"], 32, 32)
    assert least.bytes == 2 * (stem + 8 * block) + 8 * 4 * parameters
    assert least.flops == 4 * 6 * macs - 2 * 4 * 1024 * 9 * 3 * 64  # no gradient of the images


def test_effects_are_shown_with_their_intervals():
    """As the table of a factor's levels gives them."""

    def level(name, accuracy, low, high, verdict):
        return {"experts": name, "test acc %": {"mean": accuracy, "low": low, "high": high}, "verdict": verdict}

    better = {"verdict": "better", "mean": 0.5, "low": 0.1, "high": 0.9}
    unknown = {"verdict": "open", "mean": -1.0, "low": None, "high": None}
    levels = [level("1", 90.0, 89.5, 90.5, None), level("2", 90.5, None, None, better), level("4", 89, 88, 90, unknown)]
    results = {"card": {"steps": {"3-seeds": {"value": {"effects": {"experts": levels}}}}}}
    assert [tuple(row.values()) for row in summary.effect_rows(results)] == [
        ("experts", "1", "90.00 (89.50 to 90.50)", "", ""),
        ("experts", "2", "90.50", "+0.50 (+0.10 to +0.90)", "better"),
        ("experts", "4", "89.00 (88.00 to 90.00)", "-1.00", "open"),
    ]


def test_spread_is_differences_by_seed_and_what_habits_add():
    def cell(accuracies, **levels):
        records = [{"seed": seed, "validation_accuracy": share} for seed, share in enumerate(accuracies)]
        return {"levels": {"experts": None, "gate": None} | levels, "records": records}

    cells = [
        cell([0.90, 0.91]),
        cell([0.88, 0.90], experts=1),
        cell([0.91, 0.92], gate="mlp"),
        cell([], gate="uniform"),
    ]
    peek = [{"last epoch": 90.5, "best epoch": 90.75, "best seed and epoch": 91.5}, {"best epoch": None}]
    results = {"references": {"steps": {"spread": {"value": {"cells": cells, "peek": peek}}}}}
    assert [tuple(row.values()) for row in summary.spread_rows(results)] == [
        ("experts 1", "-1.50 ± 6.35"),  # -2 and -1: half of the interval is 12.706 x 0.7071 / sqrt(2)
        ('gate "mlp"', "+1.00"),
        ('gate "uniform"', ""),
        ("another seed: standard deviation", "1.00"),  # the root of the mean of 0.5, 2 and 0.5
        ("quoting the best epoch: mean", "+0.25"),
        ("quoting the best epoch of the best seed: mean", "+1.00"),
    ]
    assert summary.spread_rows({}) == []
