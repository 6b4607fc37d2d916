"""What a training uses: what is asked for, what is chosen, and what is missing."""

import pytest
import torch
from torch import nn

from expertgrid.model.config import TimmModel
from expertgrid.model.fast.execution import EAGER, ExecutionOptions, ExecutionPlan, why_unavailable
from expertgrid.model.presets import PRESETS
from expertgrid.model.system.errors import InputError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LONG = 100 * 351


@pytest.fixture
def optimizer():
    return torch.optim.AdamW(nn.Linear(2, 2).parameters(), fused=True)


def test_on_cuda_kernels_and_graphs_are_chosen(optimizer):
    eight = PRESETS["eight_block"]
    assert ExecutionOptions().plan(eight, LONG, CUDA, optimizer) == ExecutionPlan(kernels=True, graphs=True)
    assert ExecutionOptions(kernels="off").plan(eight, LONG, CUDA, optimizer) == ExecutionPlan(graphs=True)
    assert ExecutionOptions(compile="on").plan(eight, LONG, CUDA, optimizer).compile
    assert ExecutionOptions(graphs="off").plan(eight, LONG, CUDA, optimizer) == ExecutionPlan(kernels=True)
    assert EAGER.plan(eight, LONG, CUDA, optimizer) == ExecutionPlan()
    others = ExecutionOptions().plan(TimmModel(timm="resnet18"), LONG, CUDA, optimizer)
    assert others == ExecutionPlan(compile=True, graphs=True)
    lion = torch.optim.SGD(nn.Linear(2, 2).parameters())
    assert not ExecutionOptions(graphs="on").plan(eight, LONG, CUDA, lion).graphs


@pytest.mark.parametrize("config", [PRESETS["eight_block"], TimmModel(timm="resnet18")])
def test_on_a_cpu_networks_may_be_compiled_in_long_trainings_and_a_repeated_one_as_before(config, optimizer):
    assert ExecutionOptions().plan(config, LONG, CPU, optimizer) == ExecutionPlan(compile=True)
    assert ExecutionOptions().plan(config, 100, CPU, optimizer) == ExecutionPlan()
    assert ExecutionOptions().as_before(True).compile == "on"
    assert ExecutionOptions(compile="off").as_before(True).compile == "off"


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
        assert f"--{name}: 'yes' is not one of 'auto', 'on', 'off'" in complaint
    assert not (tmp_path / "runs").exists()
    with pytest.raises(InputError, match="unknown choice of --compile 'yes'"):
        ExecutionOptions(compile="yes").check(CPU)
    with pytest.raises(InputError, match="cpu and cuda only"):
        ExecutionOptions(compile="on").check(torch.device("mps"))
