"""The measurement on a GPU: all steps small on a CPU, what interrupts them, and the summary of what they wrote."""

import os
import signal
import statistics
import subprocess
import sys
import tarfile
import threading
import time

import pytest
import torch
from conftest import REPOSITORY

from bench.command import INTERRUPTED
from bench.floor import floor
from bench.gpu import __main__ as gpu
from bench.gpu import check, plan, runner, stages
from bench.gpu import tables as summary
from bench.gpu.decoded import load_decoded
from bench.gpu.pieces import Piece, bring_back
from bench.gpu.plan import Bench, Measurement, Step
from bench.gpu.worker import TimeIsUp, Worker
from bench.peaks import Peaks
from model.cost import cost
from model.errors import InputError
from model.presets import PRESETS


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The directory of the results of a smoke run of all steps, and of the certificates of what it trained."""
    out = tmp_path_factory.mktemp("gpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bench.timing.LONGEST_WARM_UP_S", 0.0)
        kept = str(out / "kept.tgz")
        assert gpu.main(["--smoke", "--device", "cpu", "--out", str(out), "--keep", kept, "--minutes", "60"]) == 0
    place = next(out.glob("cpu-*"))
    assert gpu.main(["certify", str(place), "--smoke", "--data", f"folder:{out / 'images'}"]) == 0
    return place


def made_of(steps, monkeypatch):
    """Puts steps in place of all: functions by their names, by piece."""
    found = []
    for piece, functions in steps.items():
        for name, function in functions.items():
            found.append(Step(piece, name, 60, lambda bench, function=function: function()))
    monkeypatch.setattr(stages, "steps", lambda bench: found)


def started(out, *more):
    return gpu.main(["--smoke", "--device", "cpu", "--data", "digits", "--out", str(out), *more])


def smoke_bench(place, data="digits"):
    return Bench(place, torch.device("cpu"), data, True, plan.SMOKE)


def test_smoke_run_has_all_pieces(smoke, capsys):
    results = summary.read(smoke)
    assert set(results) == {*stages.PIECES, "certificates"}
    del results["certificates"]  # of which the next test tells
    for name, piece in results.items():
        assert piece["done"]
        assert (piece["piece"], piece["smoke"], piece["data"]) == (name, True, "images")
        assert piece["command"].startswith("python -m bench.gpu --smoke --device cpu --out gpu")
        assert {"torch", "torchvision"} <= piece["environments"][0]["versions"].keys()
    assert summary.newest(smoke.parent) == smoke
    assert gpu.main(["--smoke", "--device", "cpu", "--out", str(smoke.parent)]) == 0
    assert capsys.readouterr().err.count(": done\n") == len(stages.PIECES)


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
    together = results["train-speed"]["steps"]["at-once-speed-2"]["value"]
    assert len(together["rates"]) == 2
    assert ["speed", "2", f"{sum(together['rates']):,.0f}"] in [row[:3] for row in rows]
    cell = results["fast"]["steps"]["speed-2"]["value"]["cells"][0]
    mean = statistics.mean(100 * record["test_accuracy_flip"] for record in cell["records"])
    row = next(row for row in rows if row[:2] == ["speed", "2"] and len(row) > 5)
    assert row[4].split(" ± ")[0] == f"{mean:.2f}"
    assert row[6] == f"{cell['records'][0]['parameters']:,}"
    card = results["card"]["steps"]["2-seeds"]["value"]
    assert [cell["levels"] for cell in card["cells"]] == [{"experts": 1}, {"experts": 2}]
    assert [row["experts"] for row in card["effects"]["experts"]] == ["1", "2"]
    latency = results["inference"]["steps"]["eight_block-fp32-cpu-device"]["value"]["latencies"][0]
    assert ["onnxruntime cpu bound", "1", f"{latency['p50_ms']:.4f}"] in [row[1:4] for row in rows]
    assert "Training steps: eager (2 trainings)." in text
    certificate = results["certificates"]["steps"]["export-speed-fp32"]["value"]["certificate"]
    assert ["speed-fp32", "passed", f"{certificate['images']}"] in [[*row[:1], *row[3:5]] for row in rows]
    compared = results["check"]["steps"]["kernels-bf16"]["value"]["parts"]
    largest = max(part["kernels"] for part in compared.values())
    assert ["kernels-bf16", f"right: {largest:.1e} off at most, as shares of the values"] in rows
    assert ["check: graphs", "left out: graphs: CUDA graphs are for CUDA, not for cpu"] in rows
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
    assert "card: not done: part, whole; the same command goes on" in capsys.readouterr().err
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


def test_what_failed_is_tried_again_after_all_others(tmp_path, monkeypatch):
    called = []

    def fails_once():
        called.append("first")
        if called.count("first") == 1:
            raise InputError("no")
        return Measurement({})

    made_of({"card": {"first": fails_once, "second": lambda: Measurement(called.append("second"))}}, monkeypatch)
    assert started(tmp_path) == 1
    place = next(tmp_path.glob("cpu-*"))
    assert summary.read(place)["card"]["failed"] == {"first": "no"}
    (place / "card.json").write_text((place / "card.json").read_text().replace('"second"', '"other"'))
    assert started(tmp_path) == 0
    assert called == ["first", "second", "second", "first"]
    assert summary.read(place)["card"]["failed"] == {}


def test_what_fails_in_the_check_is_left_out_afterwards(tmp_path, monkeypatch, capsys):
    def wrong(bench):
        raise InputError("the input's gradient is 0.5 off")

    steps = [
        Step("check", "kernels-fp32", 60, wrong, ("kernels",)),
        Step("check", "kernels-bf16", 60, wrong, ("kernels",)),
        Step("card", "part", 60, lambda bench: Measurement(bench.execution.kernels)),
        Step("card", "with kernels", 60, lambda bench: Measurement({}), ("kernels",)),
    ]
    monkeypatch.setattr(stages, "steps", lambda bench: steps)
    assert started(tmp_path) == 1
    err = capsys.readouterr().err
    assert "check: Triton kernels: left out: kernels-fp32: the input's gradient is 0.5 off\n" in err
    assert err.count("card: with kernels: left out: kernels: kernels-fp32") == 1
    found = summary.read(next(tmp_path.glob("cpu-*")))
    assert found["card"]["steps"]["part"]["value"] == "off"
    assert found["card"]["done"] and list(found["card"]["left_out"]) == ["with kernels"]
    rows = summary.check_rows(found)
    assert {"check": "check: kernels-fp32", "found": "failed: the input's gradient is 0.5 off"} in rows
    monkeypatch.setattr(
        stages, "steps", lambda bench: [Step("card", "with kernels", 60, lambda bench: Measurement({}))]
    )
    assert started(tmp_path, "--pieces", "card") == 0


def test_kernels_that_are_wrong_are_found(tmp_path, monkeypatch):
    from model.fast import kernels

    def wrong(*given):
        out_BCHW, mean_F, variance_F = real(*given)
        return 1.01 * out_BCHW, mean_F, variance_F

    real = kernels.NormActMix.apply
    monkeypatch.setattr(kernels, "NormActMix", type("Wrong", (), {"apply": wrong}))
    bench = smoke_bench(tmp_path)
    with pytest.raises(InputError, match="in fp32 kernels differ: three experts: .* is .* off"):
        check.kernels_agree(bench, "fp32")


def test_settings_of_a_way_are_set_back():
    from model.fast import kernels

    before = kernels.TILE
    with check.settings({"model.fast.kernels.TILE": 7}):
        assert kernels.TILE == 7
    assert before == kernels.TILE


def killed(worker, after_s):
    """Kills a worker's process, as a broken device might."""
    time.sleep(after_s)
    os.kill(worker.process.pid, signal.SIGKILL)


def test_worker_measures_and_goes_on_after_a_step_that_hangs_or_dies(tmp_path, monkeypatch):
    """In a process of its own, as on CUDA."""
    monkeypatch.setattr("bench.gpu.worker.START_S", 2000.0)  # on a machine that does other things
    bench, worker = smoke_bench(tmp_path), Worker(stages.measure)
    by_name = {step.name: step for step in stages.steps(bench)}
    (rates,) = worker.measure(bench, by_name["peaks"], 300).value
    assert rates.keys() == Peaks.model_fields.keys()
    first = worker.process
    threading.Thread(target=killed, args=(worker, 0.2)).start()
    with pytest.raises(InputError, match="its process ended with status -9"):
        worker.measure(bench, by_name["step-eight_block-eager"], 300)
    with pytest.raises(InputError, match="unknown data source 'nothing'"):
        worker.measure(smoke_bench(tmp_path, "nothing"), by_name["2-seeds"], 300)
    monkeypatch.setattr("bench.gpu.worker.GRACE_S", 0.0)
    with pytest.raises(TimeIsUp):
        worker.measure(bench, by_name["two_block"], 0.01)
    assert worker.process is None and not first.is_alive()


def test_trainings_are_measured_one_at_a_time_and_stop_when_the_time_is_up(tmp_path):
    bench = smoke_bench(tmp_path)
    trainings = plan.Trainings("card", plan.SMOKE.card, 2, by=("experts",))
    bench.until = 0.0
    found = stages.train(bench, trainings)
    assert not found.complete
    assert [cell["records"] for cell in found.value["cells"]] == [[], []]
    bench.until = float("inf")
    counts = []
    while not found.complete:
        found = stages.train(bench, trainings)
        counts.append(sum(len(cell["records"]) for cell in found.value["cells"]))
    assert counts == [1, 2, 3, 4]
    assert list(found.value["effects"]) == ["experts"]


def test_call_that_is_killed_costs_one_measurement(tmp_path):
    """SIGKILL in the second training: the first is in the results and in the file that travels."""
    kept = tmp_path / "kept.tgz"
    command = [sys.executable, "-m", "bench.gpu", "--smoke", "--device", "cpu", "--data", "digits", "--pieces", "card"]
    command += ["--out", str(tmp_path / "out"), "--keep", str(kept)]
    process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 1000
        while not kept.exists():
            assert time.monotonic() < until and process.poll() is None
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    with tarfile.open(kept) as tar:
        names = tar.getnames()
    assert any(name.endswith("card.json") for name in names) and any(name.endswith("record.json") for name in names)
    assert not any(name.endswith((".safetensors", ".pt")) for name in names)
    bring_back(kept, tmp_path / "there")
    (before,) = (summary.read(place) for place in (tmp_path / "there").glob("cpu-*"))
    (records,) = [
        sum(len(cell["records"]) for cell in step["value"]["cells"]) for step in before["card"]["steps"].values()
    ]
    assert records >= 1
    arguments = ["--smoke", "--device", "cpu", "--data", "digits", "--pieces", "card", "--out", str(tmp_path / "there")]
    assert gpu.main(arguments) == 0
    (after,) = (summary.read(place) for place in (tmp_path / "there").glob("cpu-*"))
    assert [len(cell["records"]) for cell in after["card"]["steps"]["2-seeds"]["value"]["cells"]] == [2, 2]


def test_decoded_data_are_the_data(tmp_path, monkeypatch):
    source = runner.random_images(tmp_path / "images")
    read = load_decoded(source, tmp_path / "decoded")
    monkeypatch.setattr("bench.gpu.decoded.load_data", lambda source: pytest.fail("decoded twice"))
    again = load_decoded(source, tmp_path / "decoded")
    for name in ("source", "name", "classes", "mean", "std", "fingerprint"):
        assert getattr(again, name) == getattr(read, name)
    for name in ("train", "test"):
        assert (getattr(again, name).pixels_BHWC == getattr(read, name).pixels_BHWC).all()
        assert (getattr(again, name).labels_B == getattr(read, name).labels_B).all()
    monkeypatch.undo()
    (file,) = (tmp_path / "decoded").glob("*/train-pixels.npy")
    file.write_bytes(file.read_bytes()[:-1])
    assert load_decoded(source, tmp_path / "decoded").fingerprint == read.fingerprint
    image = next((tmp_path / "images" / "train").glob("*/*.png"))
    image.unlink()
    assert load_decoded(source, tmp_path / "decoded").fingerprint != read.fingerprint


WITHOUT_RUNTIMES = """
import sys
for name in ("onnxruntime", "onnxscript", "grandalf"):
    sys.modules[name] = None
from bench.gpu.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def test_trainings_need_neither_onnx_runtime_nor_grandalf(tmp_path):
    arguments = ["--smoke", "--device", "cpu", "--data", "digits", "--out", str(tmp_path), "--pieces", "card"]
    command = [sys.executable, "-c", WITHOUT_RUNTIMES, *arguments]
    run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_matched_baselines_are_not_measured_among_the_presets():
    for network in plan.NETWORKS:
        matched = plan.matched_baselines(network)
        assert len(matched) == 2
        assert not set(matched) & set(plan.Size().presets)
    assert plan.Size().presets[0] == plan.STEP_PRESET


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
    assert "there are no weights" in complaint("certify", str(place))
    assert "has no results" in complaint("certify", "--out", str(tmp_path / "nothing"))
    (tmp_path / "kept.tgz").write_bytes(b"no archive")
    arguments = ["--smoke", "--device", "cpu", "--out", str(tmp_path), "--keep", str(tmp_path / "kept.tgz")]
    assert "kept.tgz: incomplete or damaged" in complaint(*arguments)
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
