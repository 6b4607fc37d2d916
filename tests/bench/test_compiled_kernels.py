"""The fused kernels, compiled for GPUs that are not here."""

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="there is no Triton")
from bench import kernels

COMPILED = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}

# How often the kernel is compiled that gathers statistics, at three batch sizes; another kernel with its own choice of
# registers, and with no more than 32.
FORMS = """
from bench.kernels import compiled, forms
from model.presets import PRESETS

for batch in (64, 128, 512):
    print(sum(form.kernel == "_tile_statistics" for form in forms(PRESETS["two_block"], batch, 32)))
(form,) = [form for form in forms(PRESETS["two_block"], 8, 32) if form.kernel == "_gradient" and "K=4" in str(form)]
for options in ({}, {"maxnreg": 32}):
    print(compiled(form, 90, **options).model_dump_json())
"""


def run(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=COMPILED)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="Triton has its assembler there")
def test_no_kernel_spills():
    found = json.loads(run("-m", "bench.kernels", "eight_block", "speed", "--format", "json"))
    assert {kernel["capability"] for kernel in found} == {80, 90}
    names = {kernel["kernel"] for kernel in found}
    assert names >= {"_gate", "_gate_gradient", "_layer_gradient", "_mix", "_gradient", "_weighted_sum_gradient"}
    for kernel in found:
        assert kernel["spilled_bytes"] == 0, kernel
        assert 16 <= kernel["registers"] <= 255
        assert kernel["wide_loads"] or "gate" in kernel["kernel"] or kernel["kernel"] == "_layer_gradient", kernel


@pytest.mark.skipif(sys.platform != "linux", reason="Triton has its assembler there")
def test_forms_of_kernels_and_what_spills_is_seen():
    *counts, free, pressed = run("-c", FORMS).splitlines()
    assert counts == ["2"] * 3, "one for the maps of one conv and one for those of four, whatever the number of steps"
    free, pressed = json.loads(free), json.loads(pressed)
    assert (free["spilled_bytes"], pressed["registers"]) == (0, 32)
    assert free["registers"] > 32
    assert pressed["spilled_bytes"] > 100


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here, not interpreted")
def test_interpreted_kernels_are_not_compiled(capsys):
    assert kernels.main(["two_block"]) == 2
    assert capsys.readouterr().err.startswith("error: TRITON_INTERPRET is set")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("resnet18",), "unknown preset 'resnet18'"),
        (("speed", "--size", "4"), "leaves none"),
        (("two_block", "--batch", "0"), "Invalid value for '--batch'"),
    ],
)
def test_wrong_input_is_one_line(arguments, reason, monkeypatch, capsys):
    monkeypatch.setattr(kernels.triton.knobs.runtime, "interpret", False)
    assert kernels.main(arguments) == 2
    complaint = capsys.readouterr().err
    assert complaint.startswith("error: ")
    assert reason in complaint
    assert complaint.count("\n") == 1
