"""The command line, as a user calls it."""

import hashlib
import json
import multiprocessing
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import CIFAR10_JPEG, TINY_STUDY, change_json, snapshot
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from expertgrid.ablations.cli import run
from expertgrid.ablations.cli.export import export
from expertgrid.ablations.cli.plan import PlannedRun
from expertgrid.ablations.records.directory import StudyDirectory
from expertgrid.ablations.study.study import Study
from expertgrid.bench.record import LatencyRecord
from expertgrid.export.certificate import BOUNDS, Bound
from expertgrid.model.cost import cost
from expertgrid.model.presets import network
from expertgrid.model.system.machine import computes_bfloat16
from expertgrid.model.variants import vary


def test_run_trains_once_and_shows_its_table(expertgrid, tiny_study, tmp_path):
    """The question is text, and no markup of a terminal or a plot."""
    question = "Is $a_{ better than [/b] [bold]c[/bold] :smile:?"
    tiny_study.write_text(TINY_STUDY.replace("Two experts or one?", question))
    command = ["run", tiny_study, "--device", "cpu", "--out", "runs/[x]", "--set", "recipe.epochs=1"]
    outcome = expertgrid(*command)
    assert outcome.status == 0, outcome.err
    assert outcome.out.startswith(f"{question}\n")
    assert question in outcome.err
    assert "Reads of the test split: 6 (" in expertgrid("table", "runs/[x]", "--notes").out
    assert "trial 6/6 two_block experts=2 gate=mlp seed 1: val" in outcome.err
    study = tmp_path / "runs" / "[x]"
    assert len(list((study / "trials").iterdir())) == 6
    assert (study / "accuracy.svg").read_text().count("<svg") == 1
    before = snapshot(study / "trials")

    again = expertgrid(*command)
    assert again.out == outcome.out
    assert "6 trials, 6 of them done before; runs/[x]" in again.err
    assert snapshot(study / "trials") == before


@pytest.mark.parametrize(
    ("factors", "taken"),
    [
        ({"cutout": [0, 4]}, "model two_block, recipe fast"),
        ({"recipe": ["fast", "speed"]}, "model two_block"),
        ({"model": ["speed", "accuracy"]}, "recipe fast"),
        ({"reference": ["two_block", "segmented"]}, ""),
    ],
)
def test_what_neither_base_nor_a_factor_names_is_said(factors, taken, digits):
    study = Study(name="test", question="?", base={"data": "digits"}, factors=factors)
    lines = PlannedRun(study, StudyDirectory(Path("runs")), digits, [], None, {}).weight_lines
    assert lines == [f"[base] does not name all, and these are taken: {taken}"] * bool(taken)


def test_a_new_level_trains_only_what_is_new(expertgrid, tiny_study, trained_study, tmp_path):
    """Trials that another machine has trained are taken over; their speeds are not compared."""
    study = shutil.copytree(trained_study, tmp_path / "runs" / "tiny")
    for file in study.glob("trials/*/record.json"):
        environment = json.loads(file.read_text())["environment"]
        change_json(file, environment=environment | {"threads": environment["threads"] + 1})
        (file.parent / "SHA256SUMS").unlink()  # as in trials of older versions
    tiny_study.write_text(TINY_STUDY.replace("[1, 2]", "[1, 2, 3]"))
    refused = expertgrid("run", tiny_study, "--device", "cpu")
    assert refused.status == 2
    assert "the study now has more levels of experts: 3; what is compared is declared" in refused.complaint
    plan = expertgrid("run", tiny_study, "--dry-run")
    assert (plan.status, "Without --dry-run this is refused: --out runs/tiny: has results" in plan.out) == (0, True)
    outcome = expertgrid("run", tiny_study, "--device", "cpu", "--out", "runs/more")
    assert outcome.status == 0, outcome.err
    assert "taken over from runs/tiny: 6 trials" in outcome.err
    assert "10 trials, 6 of them done before" in outcome.err
    assert "Results of these seeds were seen before the study was made" in outcome.out
    assert "Taken over from tiny: 6 trials." in expertgrid("table", "runs/more", "--notes").out
    assert "training time" not in outcome.out
    effects = json.loads(expertgrid("table", "runs/more", "--format", "json").out)["factors"]
    assert all("training time" not in effect for effect in effects)

    extended = expertgrid("run", tiny_study, "--device", "cpu", "--extend")
    assert "taken over from runs/more: 4 trials" in extended.err
    assert "evels or baselines were added after results were seen" in extended.out
    assert "evels or baselines were added" in expertgrid("run", tiny_study, "--device", "cpu").out
    tiny_study.write_text(TINY_STUDY)
    assert "it has more levels of experts: 3" in expertgrid("run", tiny_study, "--extend").complaint


def test_another_study_takes_over_trials(expertgrid, tiny_study, trained_study, tmp_path):
    shutil.copytree(trained_study, tmp_path / "runs" / "tiny")
    other = tmp_path / "other.toml"
    other.write_text(TINY_STUDY.replace("[1, 2]", "[2]").replace("Two", "Again: two"))
    outcome = expertgrid("run", other, "--device", "cpu")
    assert "taken over from runs/tiny: 4 trials" in outcome.err
    assert "4 trials, 4 of them done before" in outcome.err
    notes = expertgrid("table", "runs/other", "--notes").out
    assert "Reads of the test split: 4 (4 at the end of a training" in notes
    assert "Taken over from tiny: 4 trials" in notes
    assert "train images/s" in outcome.out

    alone = expertgrid("run", other, "--device", "cpu", "--no-adopt", "--out", "runs/alone", "--seeds", 1)
    assert "2 trials, 0 of them done before" in alone.err
    assert "aken over" not in alone.out + alone.err


def test_without_a_study_the_best_network_is_exported_and_timed(expertgrid, digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = expertgrid("run", "--set", "recipe.epochs=1", "--set", "width=0.125", "--seeds", 1, "--device", "cpu")
    assert outcome.status == 0, outcome.err
    study = tmp_path / "runs" / "quickstart"
    best = onnx.load(study / "export" / "model-uint8.onnx").metadata_props
    trial = next(prop.value for prop in best if prop.key == "trial")
    assert f"trial {trial}, " in outcome.out
    assert "fp32 agrees with PyTorch on 360 test images at batch sizes 64, 1, 2, 7" in outcome.out
    for name in ("model-uint8", "model-uint8-tuned"):
        assert json.loads((study / "bench" / f"{name}-cpu.json").read_text())["trial"] == trial
        assert json.loads((study / "export" / f"{name}.certificate.json").read_text())["passed"]
    tuned = json.loads((study / "export" / "model-uint8-tuned.certificate.json").read_text())["tuning"]
    assert [candidate["outcome"] for candidate in tuned].count("chosen") == 1
    assert {(candidate["batch"], candidate["options"]) for candidate in tuned} == {(1, "")}
    assert re.search(r"(cpu|openvino) +(fp32|int8|bf16) .* chosen\n", outcome.out)
    rows = json.loads(expertgrid("table", study, "--format", "json").out)["cells"]
    assert [bool(row["latency ms"]) for row in rows].count(True) == 1 and len(rows) == 6
    assert f", trial {trial}." in outcome.out
    assert "\nruns/quickstart/report.html\n" in outcome.out
    assert outcome.out.splitlines()[-1].endswith(" is not decided.")
    verified = expertgrid("verify", study)
    assert (verified.status, verified.err) == (0, ""), verified.out
    Image.fromarray(digits.test.pixels_BHWC[0, :, :, 0]).save("digit.png")
    assert expertgrid("predict", study / "export" / "model-uint8-tuned.onnx", "digit.png").status == 0


def test_dry_run_shows_and_writes_nothing(expertgrid, tiny_study, tmp_path):
    before = snapshot(tmp_path)
    outcome = expertgrid("run", tiny_study, "--dry-run")
    assert outcome.status == 0
    assert "6 different trials in runs/tiny; nothing was trained or written." in outcome.out
    assert re.search(r"Time: about \d+ s with .*; known by records of 0 networks and short trials of", outcome.out)
    assert re.search(r"Memory: about \d+\.\d [MG]B at the peak", outcome.out)
    assert snapshot(tmp_path) == before
    assert "Time: about" not in expertgrid("run", tiny_study, "--dry-run", "--engine", "ray").out


@pytest.mark.parametrize("study", ["card", "references"])
def test_shipped_studies_dry_run_and_start(expertgrid, study, tmp_path, monkeypatch):
    """On images of CIFAR-10's size that are made up, and networks that are cut to size."""
    from expertgrid.model.training.data import ImageData

    made_up = ImageData.random(train=128, height=32, width=32)
    monkeypatch.setattr("expertgrid.model.training.data.load_data", lambda source, data_dir, image_size: made_up)
    monkeypatch.chdir(tmp_path)
    small = ["--set", "recipe.epochs=1", "--set", "recipe.batch_size=32", "--seeds", 1, "--set", "width=0.05"]
    assert expertgrid("run", study, *small, "--dry-run").status == 0
    outcome = expertgrid("run", study, *small, "--device", "cpu", "--out", "out")
    assert outcome.status == 0, outcome.err
    assert "n: seeds" in outcome.out


@pytest.mark.skipif(not CIFAR10_JPEG.is_dir(), reason="the JPEG copies of CIFAR-10 are not here")
def test_real_images(expertgrid, trained_study, tmp_path):
    images = ["--data", f"parquet:{CIFAR10_JPEG}"]
    outcome = expertgrid("run", "references", *images, "--dry-run", "--out", tmp_path / "o")
    assert outcome.status == 0
    assert "Data: cifar10-jpeg: 45,000 train" in outcome.out
    assert "15 different trials" in outcome.out
    checkpoint = next((trained_study / "trials").iterdir()) / "model.safetensors"
    outcome = expertgrid("export", checkpoint, *images, "--out", tmp_path / "x.onnx")
    assert (outcome.status, "has other classes or image sizes than" in outcome.complaint) == (2, True)


def test_failed_trials_are_named_and_fail_fast_ends_at_the_first(expertgrid, tiny_study, tmp_path):
    other_factors = '"recipe.lr" = [100.0, 0.01]'
    tiny_study.write_text(TINY_STUDY.replace("[1, 2]", "[2]").replace('gate = ["linear", "mlp"]', other_factors))
    command = ["run", tiny_study, "--set", "recipe.opt=sgd", "--set", "norm_act=none", "--seeds", 1, "--device", "cpu"]
    outcome = expertgrid(*command, "--fail-fast")
    assert outcome.status == 1
    (failed,) = (tmp_path / "runs" / "tiny" / "trials").glob("*/failure.json")
    *_, number, line = outcome.err.splitlines()
    assert number == "1 trial failed, and the same command tries again:"
    assert f"traceback in {failed.relative_to(tmp_path).with_name('traceback.txt')}" in line
    assert failed.with_name("traceback.txt").read_text().startswith("Traceback (most recent call last):\n")
    assert "traceback" not in json.loads(failed.read_text())
    failed.with_name("traceback.txt").unlink()
    assert "traceback.txt: cannot be read: No such file" in expertgrid("check", "runs/tiny").out
    assert not list((tmp_path / "runs" / "tiny" / "trials").glob("*/record.json"))
    outcome = expertgrid(*command)
    assert outcome.status == 1
    assert "failed: two_block experts=2 recipe.lr=100.0 seed 0" in outcome.err
    assert "Failed: " in outcome.out
    assert "0/1" in outcome.out


def test_deterministic_training_is_recorded(expertgrid, tiny_study, trained_study, tmp_path):
    """On a CPU it changes no bit."""
    tiny_study.write_text(TINY_STUDY.replace('gate = ["linear", "mlp"]', 'gate = ["mlp"]').replace("[1, 2]", "[2]"))
    line = ["run", tiny_study, "--seeds", 1, "--device", "cpu", "--deterministic", "--fail-fast"]
    assert expertgrid(*line).status == 0
    directory = StudyDirectory(tmp_path / "runs" / "tiny")
    ((trial,),) = (cell.trials for cell in directory.read_plan().cells)
    assert directory.record(trial).deterministic
    assert not torch.are_deterministic_algorithms_enabled()
    whole = StudyDirectory(trained_study)
    assert not whole.record(trial).deterministic
    assert directory.checkpoint(trial).read_bytes() == whole.checkpoint(trial).read_bytes()


def test_an_interrupt_lets_a_record_be_written_and_the_study_goes_on(expertgrid, tiny_study, tmp_path):
    interrupted_at_the_end = """
import signal
from expertgrid.ablations.cli import entry as cli
from expertgrid.ablations.engines import local as engines

finish = engines._finish

def interrupted(*arguments):
    signal.raise_signal(signal.SIGINT)
    return finish(*arguments)

engines._finish = interrupted
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's processes in the background ignore it
cli.main()
"""
    tiny_study.write_text(TINY_STUDY.replace('gate = ["linear", "mlp"]', "").replace("seeds = 2", "seeds = 1"))
    line = [sys.executable, "-c", interrupted_at_the_end, "run", tiny_study, "--device", "cpu"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 130
    assert done.stderr.splitlines()[-1].startswith(
        f"stopped; finished work is kept, and the same command continues it: expertgrid run {tiny_study}"
    )
    assert len(list((tmp_path / "runs" / "tiny" / "trials").glob("*/record.json"))) == 1
    outcome = expertgrid("run", tiny_study, "--device", "cpu")
    assert outcome.status == 0
    assert "2 trials, 1 of them done before" in outcome.err


def test_table_formats(expertgrid, trained_study):
    tables = json.loads(expertgrid("table", trained_study, "--format", "json").out)
    assert [row["change"] for row in tables["factors"]] == ["1 -> 2", "linear -> mlp"]
    assert [row["n"] for row in tables["cells"]] == [2, 2, 2]
    lines = expertgrid("table", trained_study, "--format", "csv").out.splitlines()
    assert [line.split(",")[0] for line in lines] == ["table", *["factors"] * 2, *["cells"] * 3]
    assert expertgrid("table", trained_study, "--format", "github").out.startswith("### What each factor does (")
    assert r"\toprule" in expertgrid("table", trained_study, "--format", "latex").out
    assert expertgrid("table", trained_study).out.startswith("What each factor does (")


def test_table_of_several_studies(expertgrid, trained_study, tmp_path):
    shutil.copytree(trained_study, tmp_path / "other")
    rows = json.loads(expertgrid("table", trained_study, tmp_path / "other", "--format", "json").out)["cells"]
    assert [row["study"] for row in rows] == ["tiny"] * 3 + ["other"] * 3


def test_export_of_a_study_and_of_a_checkpoint(expertgrid, trained_study, tmp_path):
    study = shutil.copytree(trained_study, tmp_path / "tiny")
    outcome = expertgrid("export", study, "--input", "float")
    assert outcome.status == 0, outcome.err
    assert (study / "export" / "model-float.onnx").exists()
    checkpoint = next((study / "trials").glob("*/model.safetensors"))
    outcome = expertgrid("export", checkpoint, "--out", tmp_path / "mine.onnx")
    assert outcome.status == 0, outcome.err
    assert sorted(path.name for path in tmp_path.glob("mine*")) == ["mine.certificate.json", "mine.md", "mine.onnx"]


def test_every_precision_with_certificate_and_card(expertgrid, trained_study, tmp_path):
    study = shutil.copytree(trained_study, tmp_path / "tiny")
    outcome = expertgrid("export", study, "--precision", "all", "--outputs", "logits,gates", "--no-fuse")
    lines = outcome.out.splitlines()
    assert [line.split(": ")[0].rpartition("/")[2] for line in lines] == [
        "model-uint8.onnx", "model-uint8-fp16.onnx", "model-uint8-int8.onnx",
    ]  # fmt: skip
    passed = {line.split(": ")[0] for line in lines if "agrees with PyTorch" in line}
    assert str(study / "export" / "model-uint8.onnx") in passed
    for file in map(Path, passed):
        assert file.exists()
        certificate = file.with_suffix(".certificate.json").read_bytes()
        assert json.loads(certificate)["passed"]
        metadata = {prop.key: prop.value for prop in onnx.load(file).metadata_props}
        assert metadata["expertgrid.certificate"] == hashlib.sha256(certificate).hexdigest()
        assert "## Limits" in file.with_suffix(".md").read_text()
    assert "3 to certify an export" in expertgrid("table", study, "--notes").out


@pytest.mark.parametrize("option", [["--precision", "int8"], ["--prune-gates", "0.1"]])
def test_what_held_out_images_decide_needs_to_know_them(expertgrid, trained_study, tmp_path, option):
    alone = shutil.copy(next((trained_study / "trials").iterdir()) / "model.safetensors", tmp_path)
    outcome = expertgrid("export", alone, *option)
    assert outcome.status == 2
    assert f"{option[0]}" in outcome.complaint
    assert "config.json is missing; it says which images the training held out" in outcome.complaint
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_tune_takes_its_batch_size_and_one_otherwise(expertgrid, trained_study, monkeypatch):
    """What tuning does is in `tests/bench/test_tune.py` and in the quickstart."""
    monkeypatch.setattr("expertgrid.ablations.cli.export.export", lambda *arguments: arguments[7])
    assert [expertgrid("export", trained_study, "--tune", *more).status for more in ([], ["--batch", 8])] == [1, 8]


def test_predict_and_show_model(expertgrid, trained_study, digits, tmp_path):
    study = shutil.copytree(trained_study, tmp_path / "tiny")
    assert expertgrid("export", study, "--prune-gates", "0.0").status == 0
    file = study / "export" / "model-uint8-pruned.onnx"
    assert expertgrid("bench", file, "--batch", "1", "--json", tmp_path / "latency.json").status == 0
    assert json.loads((tmp_path / "latency.json").read_text())["pruned"]
    assert "latency ms" not in expertgrid("table", study, "--notes").out
    image = tmp_path / "digit.png"
    Image.fromarray(digits.test.pixels_BHWC[0, :, :, 0]).save(image)
    rows = json.loads(expertgrid("predict", file, image, "--top", 10, "--format", "json").out)
    assert [row["image"] for row in rows] == [str(image)] * 10
    assert sum(row["probability"] for row in rows) == pytest.approx(1)
    assert "images: uint8 batch×8×8×1" in expertgrid("show-model", file).out
    code = "import runpy, sys; sys.modules |= dict.fromkeys(('torch', 'scipy')); runpy.run_module('expertgrid')"
    command = [sys.executable, "-c", code.replace("'expertgrid'", "'expertgrid', run_name='__main__'")]
    done = subprocess.run([*command, "predict", file, image, "--top", "10", "--format", "json"], capture_output=True)
    assert json.loads(done.stdout) == rows, done.stderr


def test_a_model_that_disagrees_is_not_published(expertgrid, trained_study, tmp_path, monkeypatch):
    monkeypatch.setitem(BOUNDS, "fp32", Bound(logit_difference=0.0, argmax_flips=0, accuracy_loss=0.0))
    study = shutil.copytree(trained_study, tmp_path / "tiny")
    outcome = expertgrid("export", study)
    assert outcome.status == 1
    assert "fp32 DOES NOT agree" in outcome.out
    names = sorted(path.name for path in (study / "export").iterdir())
    assert names == ["model-uint8.rejected.certificate.json", "model-uint8.rejected.onnx"]


@pytest.fixture(scope="module")
def exported_file(trained_study, tmp_path_factory) -> Path:
    """The best network of a copy of the study. Tests may write into its bench folder."""
    study = shutil.copytree(trained_study, tmp_path_factory.mktemp("exported") / "tiny")
    assert export(study) == 0
    return study / "export" / "model-uint8.onnx"


def test_bench_prints_and_keeps_what_it_measured(expertgrid, exported_file, tmp_path):
    study = exported_file.parent.parent
    command = ["bench", exported_file, "--batch", "2"]
    outcome = expertgrid(*command, "--format", "json", "--json", tmp_path / "record.json")
    assert [row["engine"] for row in json.loads(outcome.out)] == ["onnxruntime cpu", "pytorch eager cpu"]
    assert (tmp_path / "record.json").read_bytes() == (study / "bench" / "model-uint8-cpu.json").read_bytes()
    table = expertgrid("table", study, "--notes").out
    assert "latency ms" in table
    assert "Latency: median of ONNX Runtime at batch 2, cpu" in table
    if not torch.cuda.is_available():
        outcome = expertgrid(*command, "--provider", "cuda")
        assert (outcome.status, "provider 'cuda'" in outcome.complaint) == (2, True)


def test_bench_says_which_is_faster_and_fails_where_asked(expertgrid, exported_file, tmp_path):
    record = tmp_path / "record.json"
    command = "bench", exported_file, "--batch", 2, "--seconds", 0.05, "--engine", "onnxruntime"
    assert expertgrid(*command, "--json", record).status == 0
    quicker = LatencyRecord.model_validate_json(record.read_text())
    for latency in quicker.latencies:
        latency.calls_ms = [ms / 10 for ms in latency.calls_ms]
    record.write_text(quicker.model_dump_json())
    outcome = expertgrid(*command, "--baseline", record, "--fail-if-slower", "5%")
    assert outcome.status == 1
    assert f"model-uint8.onnx against {record}, batch 2, onnxruntime cpu: slower, 0." in outcome.out
    assert re.search(r"slower by \d+.\d%, more than 5%: model-uint8.onnx against", outcome.err)
    assert expertgrid("bench", exported_file, *command[1:], "--fail-if-slower", "900%").status == 0
    record.write_text(quicker.model_copy(update={"threads": 64}).model_dump_json())
    outcome = expertgrid(*command, "--baseline", record)
    assert (outcome.status, "measured with threads 64" in outcome.complaint) == (2, True)
    assert expertgrid(*command, "--baseline", record, "--across-machines").status == 0


def test_a_study_decides_its_precision_once(expertgrid, tiny_study, tmp_path, monkeypatch):
    """By timed steps, which are taken once: also for seeds that are added later."""
    calls = []
    monkeypatch.setattr(run, "networks_to_time", lambda trials, *_: trials[:1])
    monkeypatch.setattr(run, "fp32_is_faster", lambda *work: calls.append(work) or True)
    outcome = expertgrid("run", tiny_study, "--device", "cpu", "--seeds", 1)
    assert "trained in fp32, which timed steps chose for this study" in outcome.err
    assert expertgrid("run", tiny_study, "--device", "cpu", "--seeds", 2).status == 0
    directory = StudyDirectory(tmp_path / "runs" / "tiny")
    assert len(calls) == 1
    assert set(directory.read_plan().fp32.values()) == {True}
    assert not any(directory.record(trial).bfloat16 for trial in directory.read_plan().trials)


def test_a_network_that_needs_fp32_leaves_the_others_as_they_are(expertgrid, tiny_study, tmp_path):
    """Also where the study goes on after a trial of it is done: the decision is kept, and not taken from its record."""
    assert expertgrid("run", tiny_study, "--device", "cpu", "--seeds", 1).status == 0
    directory = StudyDirectory(tmp_path / "runs" / "tiny")
    first, before = directory.trial(directory.read_plan().trials[0]) / "record.json", directory.read_plan()
    assert set(before.fp32.values()) == {False}
    first.write_text(directory.record(first.parent.name).model_copy(update={"bfloat16": False}).model_dump_json())
    assert expertgrid("run", tiny_study, "--device", "cpu", "--seeds", 2).status == 0
    others = [directory.record(trial) for trial in set(directory.read_plan().trials) - set(before.trials)]
    assert others and {record.bfloat16 for record in others} == {computes_bfloat16(torch.device("cpu"))}


def test_bench_train(expertgrid):
    arguments = ["two_block", "--batch", 4, "--image-size", 16, "--steps", 1, "--rounds", 2, "--device", "cpu"]
    arguments += ["--compile", "off", "--set", "experts=2", "--set", "cutout=2"]
    speed = json.loads(expertgrid("bench-train", *arguments, "--format", "json").out)
    baseline_s = speed["baselines_s"][speed["baseline"]]
    assert len(speed["loop_s"]) == len(speed["bare_s"]) == len(baseline_s) == speed["rounds"] == 2
    assert speed["ratio"] == pytest.approx(np.exp(np.mean(np.log(np.divide(baseline_s, speed["loop_s"])))))
    rate, peak = speed["images_per_s"], speed["device_peak_flops"]
    assert speed["peak_share"] == pytest.approx(6 * speed["macs"] * rate / peak)
    assert speed["model"] == "two_block, experts=2, cutout=2"
    assert speed["macs"] == cost(vary(network("two_block"), "experts", 2), 16, 16)[1]
    assert min(rate, peak, speed["baseline_images_per_s"], speed["peaks"]["copy_bytes_per_s"]) > 0
    assert (speed["compiled"], speed["compile_seconds"]) == (False, 0)
    assert 1e8 < speed["peak_memory_bytes"] < 1e10  # PyTorch alone has more than the one
    assert multiprocessing.active_children() == []


def test_lists(expertgrid):
    models = {row["model"]: row for row in json.loads(expertgrid("list", "models", "--format", "json").out)}
    numbers = {"blocks": 7, "K": "6", "gate": "mlp", "params": 7_676_660, "MACs at 32x32": 547_548_672}
    assert models["mixed_kernel"] == {"model": "mixed_kernel"} | numbers
    for what, name in (("recipes", "fast"), ("studies", "references"), ("data", "parquet:DIR")):
        assert name in expertgrid("list", what).out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("run quickstrat", "unknown study 'quickstrat'; did you mean 'quickstart'?"),
        ("run --data digit", "unknown data source 'digit'; did you mean 'digits'?"),
        ("run --data folder:none", "there is no directory none"),
        ("run --seeds many", "--seeds: a whole number is needed, found 'many'"),
        ("run --set recipe.epochs=0", "recipe.epochs: more than 0 is needed, found 0"),
        ("run --set recipe.epochs", "PATH=VALUE is needed"),
        ("run --set experts=3", "experts is a factor, with levels [1, 2], and is set as well"),
        ("run --device gpu", "unknown device 'gpu'"),
        ("run --sets x=1", "No such option: --sets"),
        ("run --out full", "--out full: is not empty, and holds no study"),
        ("run --out tiny", "--out tiny: holds another study"),
        ("table full", "full: not a study directory"),
        ("table tiny --format md", "--format: 'md' is not one of 'text', 'github', 'latex', 'csv', 'json', 'parquet'."),
        ("table", "Missing argument 'DIR...'"),
        ("export full", "full: not a study directory"),
        ("export none.safetensors", "none.safetensors: there is no such checkpoint"),
        ("export broken.safetensors", "broken.safetensors: not a safetensors file, or a damaged one"),
        ("export other.safetensors", "other.safetensors: weights of another config"),
        ("export tiny --input uint", "--input: 'uint' is not one of 'uint8', 'float'."),
        ("export tiny --out full", "--out full: the name of an .onnx file is needed"),
        ("export tiny --tune --precision int8", "--tune: chooses precision and rewrites itself"),
        ("export tiny --batch 8", "--batch: is for --tune"),
        ("export tiny --precision bf16", "--precision bf16: is computed by OpenVINO alone"),
        ("export tiny --outputs logits,gate", "unknown output 'gate'; did you mean 'gates'?"),
        ("export tiny --provider cpu,gpu", "unknown provider 'gpu'"),
        ("export tiny --prune-gates 2", "--prune-gates: 1 or less is needed, found '2'"),
        ("predict none.onnx x.png", "none.onnx: cannot be read"),
        ("predict full/notes.txt full/notes.txt", "full/notes.txt: not an ONNX file"),
        ("show-model none.onnx", "none.onnx: cannot be read"),
        ("bench none.onnx", "none.onnx: cannot be read"),
        ("bench full/notes.txt", "full/notes.txt: not an ONNX file"),
        ("bench broken.safetensors --batch 1,x", "--batch x: a whole number from 1 to 65536 is needed"),
        ("bench broken.safetensors --batch 0", "--batch 0: a whole number from 1 to 65536 is needed"),
        ("bench broken.safetensors --json model.onnx", "--json model.onnx: the name of a .json file"),
        ("bench broken.safetensors --engine ort", "unknown engine 'ort'. Accepted: own, onnxruntime, eager"),
        ("bench broken.safetensors --fail-if-slower 5", "--fail-if-slower: a second file or --baseline FILE.json"),
        ("bench broken.safetensors broken.safetensors --fail-if-slower a%", "a%: a percentage is needed"),
        ("bench broken.safetensors --across-machines", "--across-machines: is for --baseline"),
        ("bench broken.safetensors --baseline none.json", "none.json: cannot be read"),
        ("bench broken.safetensors broken.safetensors --json all.json", "--json: is for one file"),
        ("bench-train macro_residual --image-size 8", "macro_residual does not take the 8x8 images"),
        ("bench-train --rounds 0", "--rounds: 1 or more is needed, found '0'"),
        ("bench-train resnet18 --set model.widht=2", "unknown argument of resnet18: 'widht'"),
        ("bench-train two_block --set batch_size=4", "--set batch_size: --batch sets it"),
        ("bench-train two_block --set opt=lino", "recipe.opt: unknown name 'lino'"),
        ("bench-train eight_blok", "unknown model 'eight_blok'; did you mean 'eight_block'?"),
        ("runn", "No such command 'runn'"),
    ],
)
def test_wrong_input_is_one_line_and_nothing_is_touched(
    expertgrid, arguments, message, trained_study, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained_study, "tiny")
    Path("full").mkdir()
    Path("full/notes.txt").write_text("mine")
    Path("broken.safetensors").write_bytes(b"broken")
    with safe_open(next(Path("tiny").rglob("model.safetensors")), "pt") as file:
        save_file({"weight": torch.zeros(1)}, "other.safetensors", file.metadata())
    before = snapshot(tmp_path)
    outcome = expertgrid(*arguments.split())
    assert outcome.status == 2
    assert message in outcome.complaint
    assert outcome.out == ""
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_goes_away_is_no_error(trained_study, unbuffered):
    line = f"PYTHONUNBUFFERED={unbuffered} '{sys.executable}' -m expertgrid table --notes '{trained_study}' | true"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# --- What is wrong is one line, before anything is trained ---


def test_a_dry_run_shows_baselines_and_the_control(expertgrid, tiny_study):
    text = tiny_study.read_text().replace("seeds = 2", 'seeds = 2\nbaselines = ["two_block"]\ncontrol = true')
    tiny_study.write_text(text)
    lines = [line.split("  ")[0] for line in expertgrid("run", tiny_study, "--dry-run").out.splitlines()]
    assert lines[4:10] == ["two_block"] * 5 + ["base again"]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["tiny.toml", "--set", "lr=1", "--set", "lr=2"], "--set lr=2: lr is set twice"),
        (["tiny.toml", "--set", "lr=1", "--set", "recipe.lr=2"], "--set: one field is set twice: lr, recipe.lr"),
        ([""], "study : is a directory"),
        (["\udcff.toml"], r"\udcff.toml: is not UTF-8"),
        (["a" * 300], "unknown study"),
        (["tiny.toml", "--out", "a" * 300], "a: File name too long"),
        (["tiny.toml", "--isolate", "--jobs", "9" * 5000], "a whole number from 1 to 256 is needed"),
    ],
)
def test_wrong_words_of_run(expertgrid, tiny_study, words, complaint):
    outcome = expertgrid("run", *words)
    assert outcome.status == 2
    assert complaint in outcome.complaint
    assert not list(tiny_study.parent.rglob("trials"))


def test_a_baseline_is_named_once(expertgrid, tiny_study):
    tiny_study.write_text(tiny_study.read_text().replace("seeds = 2", 'seeds = 2\nbaselines = ["vgg", "vgg"]'))
    assert "tiny.toml: baselines: vgg is given twice" in expertgrid("run", tiny_study).complaint


@pytest.mark.parametrize("length", [242, 250, 255, 300])
def test_a_name_that_is_too_long_is_refused_before_the_work(expertgrid, study, length):
    for words in (["export", study.path, "--out", "a" * (length - 5) + ".onnx"],
                  ["report", study.path, "--out", "a" * (length - 5) + ".html"]):  # fmt: skip
        if length > 242 or words[0] == "export":
            assert "File name too long" in expertgrid(*words).complaint
    assert not (study.path / "export").exists() or not list((study.path / "export").iterdir())


def test_matplotlib_is_tried_before_the_training(expertgrid, tiny_study, monkeypatch):
    from matplotlib import rc_context

    monkeypatch.setenv("PATH", "")  # where no LaTeX is
    with rc_context({"text.usetex": True}):
        assert "matplotlib draws no picture here: RuntimeError" in expertgrid("run", tiny_study).complaint
    assert not list(tiny_study.parent.rglob("trials"))


def test_the_ledger_is_tried_before_the_training(expertgrid, study, trial, tiny_study):
    (study.path / "ledger.jsonl").unlink()
    (study.path / "ledger.jsonl").mkdir()
    for words in (["rerun", study.path, trial], ["run", tiny_study, "--out", study.path]):
        assert "ledger.jsonl: Is a directory" in expertgrid(*words).complaint
