"""What a training uses: what is asked for, what is chosen, and what is missing."""

import pytest
import torch
from torch import nn

from expertgrid.model.config import Block, TimmModel
from expertgrid.model.fast.execution import EAGER, ExecutionOptions, ExecutionPlan, why_unavailable
from expertgrid.model.presets import PRESETS
from expertgrid.model.system.errors import InputError
from expertgrid.model.variants import vary

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LONG = 100 * 351


@pytest.fixture
def optimizer():
    return torch.optim.AdamW(nn.Linear(2, 2).parameters(), fused=True)


@pytest.mark.parametrize(
    ("norm_act", "steps", "chosen"),
    [
        ("expert", LONG, ExecutionPlan(kernels=True, graphs=True)),  # the kernels leave nothing to compile
        ("none", LONG, ExecutionPlan(kernels=True, compile=True, graphs=True)),
        ("none", 10, ExecutionPlan(kernels=True, graphs=True)),
    ],
)
def test_on_cuda_all_that_is_worth_it_is_chosen(norm_act, steps, chosen, optimizer):
    config = vary(PRESETS["eight_block"], "norm_act", norm_act)
    assert ExecutionOptions().plan(config, steps, CUDA, optimizer) == chosen


def test_what_is_left_out_is_left_to_the_others(optimizer):
    eight = PRESETS["eight_block"]
    assert ExecutionOptions(kernels="off").plan(eight, LONG, CUDA, optimizer) == ExecutionPlan(
        compile=True, graphs=True
    )
    assert ExecutionOptions(graphs="off").plan(eight, LONG, CUDA, optimizer) == ExecutionPlan(kernels=True)
    assert EAGER.plan(eight, LONG, CUDA, optimizer) == ExecutionPlan()
    assert ExecutionOptions().plan(TimmModel(timm="resnet18"), LONG, CUDA, optimizer) == ExecutionPlan(graphs=True)
    lion = torch.optim.SGD(nn.Linear(2, 2).parameters())
    assert not ExecutionOptions(graphs="on").plan(eight, LONG, CUDA, lion).graphs


def test_on_a_cpu_neither_kernels_nor_graphs_are_chosen(optimizer):
    means = ExecutionOptions().plan(PRESETS["eight_block"], LONG, CPU, optimizer)
    assert (means.kernels, means.graphs) == (False, False)


def test_blocks_of_many_experts_or_several_kernel_sizes_have_no_kernels(optimizer):
    config = PRESETS["two_block"].change(
        layers=(Block(channels=8, kernels=(3,) * 9), Block(channels=8, kernels=(5, 3)))
    )
    assert ExecutionOptions().plan(config, 10**9, CUDA, optimizer).compile


def test_a_plan_is_in_words_and_can_be_required():
    plan = ExecutionPlan(kernels=True, graphs=True)
    assert str(plan) == "Triton kernels, CUDA graphs"
    assert str(ExecutionPlan()) == "eager"
    assert ExecutionOptions.requiring(plan) == ExecutionOptions(kernels="on", compile="off", graphs="on")


def test_wrong_choices_are_one_line(expertgrid, tiny_study, tmp_path):
    for name in ("kernels", "graphs"):
        outcome = expertgrid("run", tiny_study, f"--{name}", "on", "--device", "cpu")
        assert outcome.status == 2
        assert f"--{name} on: {why_unavailable(name, CPU)}; with auto or off" in outcome.complaint
        assert "for CUDA, not for cpu" in outcome.complaint
        complaint = expertgrid("bench-train", f"--{name}", "yes", "--device", "cpu").complaint
        assert f"'--{name}': 'yes' is not one of 'auto', 'on', 'off'" in complaint
    assert not (tmp_path / "runs").exists()
    with pytest.raises(InputError, match="unknown choice of --compile 'yes'"):
        ExecutionOptions(compile="yes").check(CPU)
    with pytest.raises(InputError, match="cpu and cuda only"):
        ExecutionOptions(compile="on").check(torch.device("mps"))
