"""The measurement on a GPU: all pieces small on a CPU, what interrupts them, and the summary of what they wrote."""

import statistics
import time

import pytest
import torch

from bench import gpu, summary
from bench.peaks import Peaks
from bench.step import floor
from model.cost import cost
from model.errors import InputError
from model.presets import PRESETS


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The directory of the results of a smoke run of all pieces."""
    out = tmp_path_factory.mktemp("gpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # more have nothing to do, and get in each other's way
        assert gpu.main(["--smoke", "--device", "cpu", "--out", str(out), "--minutes", "30"]) == 0
    return next(out.glob("cpu-*"))


def made_of(steps, monkeypatch):
    """Puts pieces of other steps in place of all."""
    monkeypatch.setattr(gpu, "PIECES", {name: lambda bench, one=one: one for name, one in steps.items()})


def started(out, *more):
    return gpu.main(["--smoke", "--device", "cpu", "--data", "digits", "--out", str(out), *more])


def test_smoke_run_has_all_pieces(smoke, capsys):
    results = summary.read(smoke)
    assert set(results) == set(gpu.PIECES)
    for name, piece in results.items():
        assert piece["done"]
        assert (piece["piece"], piece["smoke"], piece["data"]) == (name, True, "images")
        assert piece["command"].startswith("python -m bench.gpu --smoke --device cpu --out gpu")
        assert {"torch", "torchvision"} <= piece["environments"][0]["versions"].keys()
    assert summary.newest(smoke.parent) == smoke
    assert gpu.main(["--smoke", "--device", "cpu", "--out", str(smoke.parent)]) == 0
    assert capsys.readouterr().err.count("done before") == len(gpu.PIECES)


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
        return {"is": 2}, True

    made_of({"card": {"first": lambda: (called.append("first") or {"is": 1}, True), "second": second}}, monkeypatch)
    assert started(tmp_path) == gpu.INTERRUPTED
    assert capsys.readouterr().err.splitlines()[-1].startswith("stopped; what was measured is kept")
    kept = summary.read(next(tmp_path.glob("cpu-*")))["card"]
    assert (kept["done"], list(kept["steps"])) == (False, ["first"])
    assert started(tmp_path) == 0
    assert called == ["first", "second", "second"]
    assert started(tmp_path, "--again") == 0
    assert called[3:] == ["first", "second"]


def test_time_limit_keeps_what_was_measured(tmp_path, monkeypatch, capsys):
    runs = []
    steps = {"part": lambda: (runs.append(1) or time.sleep(0.3) or {"runs": len(runs)}, len(runs) > 1)}
    steps["whole"] = lambda: ({}, True)
    made_of({"card": steps}, monkeypatch)
    assert started(tmp_path, "--minutes", "0.003") == 1
    assert "card: stopped after 0.003 minutes; the same command goes on" in capsys.readouterr().err
    assert summary.read(next(tmp_path.glob("cpu-*")))["card"]["steps"]["part"]["value"] == {"runs": 1}
    assert started(tmp_path) == 0
    assert summary.read(next(tmp_path.glob("cpu-*")))["card"]["steps"]["part"]["value"] == {"runs": 2}


def test_step_that_fails_is_one_line_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    def fails():
        raise InputError("provider 'cuda': this ONNX Runtime was built without it")

    made_of({"inference": {"a": fails, "b": lambda: ({"is": 1}, True)}}, monkeypatch)
    assert started(tmp_path) == 1
    err = capsys.readouterr().err
    assert err.count("error: inference: a: provider 'cuda': this ONNX Runtime was built without it\n") == 1
    assert list(summary.read(next(tmp_path.glob("cpu-*")))["inference"]["steps"]) == ["b"]


def test_command_is_interrupted_when_the_time_is_up(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bench = gpu.Bench(tmp_path, torch.device("cpu"), "digits", True, gpu.SMOKE, until=time.monotonic() + 0.5)
    started = time.monotonic()
    with pytest.raises(gpu.TimeIsUp):
        bench.expertgrid("run", "quickstart")
    assert time.monotonic() - started < gpu.GRACE_S


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
    assert "damaged" in complaint("--summary", str(place))
    (place / "card.json").write_text(gpu.Piece(piece="card", smoke=False, data="x", command="").model_dump_json())
    assert "needs the lines" in complaint("--summary", str(place), "--write", __file__.replace("test_gpu", "conftest"))

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "A GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    with pytest.raises(InputError, match="A GPU has no bfloat16"):
        gpu.check_device(torch.device("cuda"), smoke=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (2**30, 2**34))
    with pytest.raises(InputError, match=r"1\.0 of 16\.0 GiB of memory are free; 16\.0 are needed"):
        gpu.check_device(torch.device("cuda"), smoke=False)


def test_data_has_its_own_name():
    assert gpu.data_name("cifar10") == "cifar10"
    assert gpu.data_name("parquet:some/where/cifar10-jpeg/") == "cifar10-jpeg"


def test_floor_of_eight_block_by_hand():
    """Blocks of 3 experts and 64 channels on 32x32 pixels, behind a convolution of 3 channels."""
    least = floor(PRESETS["eight_block"], 4, 32, 32)
    image, out = 4 * 3 * 1024, 4 * 64 * 1024
    stem = (image + out) + 2 * (out + out) + (out + out + image)
    block = (out + 3 * out) + 2 * (3 * out + out) + (3 * out + out + out + out)
    parameters, macs = cost(PRESETS["eight_block"], 32, 32)
    assert least.bytes == 2 * (stem + 8 * block) + 8 * 4 * parameters
    assert least.flops == 4 * 6 * macs - 2 * 4 * 1024 * 9 * 3 * 64  # no gradient of the images


def a_cell(name, accuracies, seconds):
    known = {"train_seconds": seconds, "compile_seconds": 5.0}
    records = [{"test_accuracy_flip": share, "test_accuracy": share, **known} for share in accuracies]
    return {"model": name, "levels": {"model": name}, "planned": len(records), "records": records}


def a_latency(engine, p50_ms, images_per_s):
    return {"engine": f"onnxruntime cuda {engine}", "batch": 1, "p50_ms": p50_ms, "images_per_s": images_per_s}


def test_targets_are_met_or_missed_by_how_much():
    cells = [a_cell("speed", [0.90, 0.91], 5.0), a_cell("accuracy", [0.93, 0.94], 75.0)]
    peaks = Peaks(bf16_flops=1e12, fp32_flops=1e11, copy_bytes_per_s=1e12).model_dump()
    step = {"model": "eight_block", "step_ms": [2.0, 1.0, 3.0], "floor": {"flops": 10**9, "bytes": 10**6}}
    slower = step | {"step_ms": [9.0]}
    values = {
        "fast": {"speed": {"cells": cells}},
        "peaks": {"peaks": [peaks]},
        "train-speed": {
            "step-eight_block-eager": slower,
            "step-eight_block-kernels": step,
            "eight_block": {"ratio": 25.0},
        },
        "card": {"3-seeds": {"cells": [a_cell("two_block", [0.9], 1e6)]}, "5-seeds": {"cells": cells}},
        "references": {"1-seeds": {"cells": [a_cell("two_block", [0.9], 1e6) | {"planned": 2}]}},
        "inference": {
            "export-speed-fp32": {"certificate": {"passed": True}},
            "export-speed-fp16": {"certificate": {"passed": True}, "rejected": {"passed": False}},
            "eight_block-fp16-cuda-device": {"latencies": [a_latency("graph", 0.1, 5e4), a_latency("bound", 0.2, 2e5)]},
        },
    }
    results = {
        name: {"data": "cifar10-jpeg", "steps": {step: {"value": value} for step, value in steps.items()}}
        for name, steps in values.items()
    }
    verdicts = {row["target"]: row["verdict"] for row in (one.row() for one in summary.targets(results))}
    assert verdicts == {
        "a step of eight_block, which the bf16 peak binds": "met by 10 %",
        "training of eight_block against the plain way": "met by 5 x",
        "speed on cifar10-jpeg, with flips": "met by 0 %",
        "accuracy over speed on cifar10-jpeg, with flips": "met by 1 points",
        "training of speed, once compiled": "met by 1 s",
        "training of accuracy, once compiled": "missed by 15 s",
        "training of the card, 5 seeds": "met by 27 minutes",
        "of 2 exported files passed": "missed by 50 %",
        "latency of eight_block at batch 1, fp16 (onnxruntime cuda graph)": "met by 50 us",
        "images a second (eight_block fp16, from the device, onnxruntime cuda bound, batch 1)": "met by 1e+05 images/s",
    }
    assert not any("CIFAR-10" in target for target in verdicts)


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
