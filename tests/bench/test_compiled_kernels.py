"""The fused kernels, compiled for GPUs that are not here."""

import json
import os
import subprocess
import sys

import pytest
import torch

from model.presets import PRESETS

pytest.importorskip("triton", reason="there is no Triton")
from bench import kernels

COMPILED = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}

PRESSED = """
from bench import kernels
from model.presets import PRESETS

(form,) = [form for form in kernels.forms(PRESETS["eight_block"], 8, 32) if str(form).startswith("K=3, GATED=True, ")
           and form.kernel == "_gradient"]
for options in ({}, {"maxnreg": 32}):
    print(kernels.compiled(form, 90, **options).model_dump_json())
"""


def run(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=COMPILED)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="Triton has its assembler there")
def test_no_kernel_spills():
    found = json.loads(run("-m", "bench.kernels", "eight_block", "speed", "--format", "json"))
    assert {kernel["capability"] for kernel in found} == {80, 90}
    ours = {name for name in vars(kernels.kernels) if name in {kernel["kernel"] for kernel in found}}
    assert ours >= {"_gate", "_gate_gradient", "_layer_gradient", "_mix", "_gradient", "_weighted_sum_gradient"}
    for kernel in found:
        assert kernel["spilled_bytes"] == 0, kernel
        assert 16 <= kernel["registers"] <= 255
        assert kernel["wide_loads"] or "gate" in kernel["kernel"] or kernel["kernel"] == "_layer_gradient", kernel


@pytest.mark.skipif(sys.platform != "linux", reason="Triton has its assembler there")
def test_what_spills_is_seen():
    """With no more than 32 registers."""
    free, pressed = map(json.loads, run("-c", PRESSED).splitlines())
    assert (free["spilled_bytes"], pressed["registers"]) == (0, 32)
    assert free["registers"] > 32
    assert pressed["spilled_bytes"] > 100


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here, not interpreted")
def test_interpreted_kernels_are_not_compiled(capsys):
    assert kernels.main(["two_block"]) == 2
    assert capsys.readouterr().err.startswith("error: TRITON_INTERPRET is set")


@pytest.mark.parametrize(
    "arguments", [("resnet18",), ("eigth_block",), ("speed", "--size", "4"), ("two_block", "--batch", "0")]
)
def test_wrong_input_is_one_line(arguments, monkeypatch, capsys):
    monkeypatch.setattr(kernels.triton.knobs.runtime, "interpret", False)
    assert kernels.main(arguments) == 2
    complaint = capsys.readouterr().err
    assert complaint.startswith("error: ")
    assert complaint.count("\n") == 1


def test_a_kernel_has_one_form_for_all_numbers_of_steps():
    """And for all batch sizes that are alike to the compiler."""
    output = run(
        "-c",
        "from bench.kernels import forms; from model.presets import PRESETS\n"
        "for batch in 64, 128, 512: print(len({f for f in forms(PRESETS['two_block'], batch, 32) "
        "if f.kernel == '_tile_statistics'}))",
    )
    assert output.split() == ["2", "2", "2"]  # of one map, and of four
    assert PRESETS["two_block"]
