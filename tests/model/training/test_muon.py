"""Muon of stacked weights: against timm's, weight by weight, and against PyTorch's."""

import copy
from collections import Counter
from functools import partial

import pytest
import timm.optim
import torch
from timm.optim import muon as timms
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from expertgrid.model.training import muon
from expertgrid.model.training.muon import StackedMuon
from expertgrid.model.training.optimise import make_optimizer
from expertgrid.model.training.recipe import Recipe

STEPS = 6
EXACT = partial(timms.zeropower_via_newtonschulz, dtype=torch.float64)


def net() -> nn.Module:
    """Weights of two shapes that are there several times, of one that is there once, and some that are not Muon's."""
    torch.manual_seed(0)
    convs = [nn.Conv2d(channels, 8, 3, bias=False) for channels in (3, 8, 8, 8)]
    linear = [nn.Linear(inputs, 8) for inputs in (32, 8, 8)]
    net = nn.Sequential(*convs, nn.BatchNorm2d(8), nn.Flatten(), *linear)
    return net.double().to(memory_format=torch.channels_last)


def trained(first: nn.Module, opt: str, stacked: bool, state: dict | None = None) -> tuple[nn.Module, dict]:
    """The network after some steps at falling rates, and the optimiser's state."""
    trained = copy.deepcopy(first)
    recipe = Recipe(epochs=1, batch_size=2, opt=opt, lr=0.05, weight_decay=0.1, filter_bias_and_bn=True)
    optimizer = make_optimizer(recipe, trained)
    assert type(optimizer) is StackedMuon
    if not stacked:
        optimizer.__class__ = timm.optim.Muon
    if state is not None:
        optimizer.load_state_dict(state)
    generator = torch.Generator().manual_seed(1)
    for i in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 / (i + 1)
        optimizer.zero_grad()
        x_BCHW = torch.randn(16, 3, 10, 10, generator=generator, dtype=torch.float64)
        trained(x_BCHW).square().mean().backward()
        gradients = [parameter.grad for parameter in trained.parameters()]
        optimizer.step()
        assert all(a is b.grad for a, b in zip(gradients, trained.parameters())), "they are there after the step"
    return trained, optimizer.state_dict()


def distance(a: nn.Module, b: nn.Module) -> float:
    """The root mean square of the differences of all weights."""
    parts = [(p - q).double().flatten() for p, q in zip(a.parameters(), b.parameters())]
    return torch.cat(parts).square().mean().sqrt().item()


@pytest.mark.parametrize("opt", ["muon", "nmuon"])
def test_stacked_weights_step_as_timm_has_each_step(opt, monkeypatch):
    first = net()
    rounded = {stacked: trained(first, opt, stacked)[0] for stacked in (False, True)}
    for module in (muon, timms):
        monkeypatch.setattr(module, "zeropower_via_newtonschulz", EXACT)
    exact = {stacked: trained(first, opt, stacked)[0] for stacked in (False, True)}
    moved = distance(exact[False], first)
    assert distance(exact[True], exact[False]) < 1e-5 * moved
    error, timms_error = (distance(rounded[stacked], exact[False]) for stacked in (True, False))
    assert error < 1.5 * timms_error, "in bfloat16 it is as near to the exact step as timm's"
    assert timms_error < 0.1 * moved


def test_it_goes_on_from_timms_state_and_timms_from_its(monkeypatch):
    for module in (muon, timms):
        monkeypatch.setattr(module, "zeropower_via_newtonschulz", EXACT)
    halfway, state = trained(net(), "muon", stacked=False)
    other, other_state = trained(net(), "muon", stacked=True)
    names = [[sorted(values) for values in saved["state"].values()] for saved in (state, other_state)]
    assert names[0] == names[1]
    ends = [trained(halfway, "muon", True, state)[0], trained(other, "muon", False, other_state)[0]]
    assert distance(*ends) < 1e-5 * distance(ends[0], halfway)


@pytest.mark.parametrize("shape", [(12, 12), (8, 24), (24, 8)])
def test_matrices_step_as_with_pytorchs_muon(shape):
    torch.manual_seed(0)
    stacked = [nn.Parameter(torch.randn(shape)) for _ in range(3)]
    reference = copy.deepcopy(stacked)
    before = torch.stack([weight.detach().clone() for weight in stacked])
    fields = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9, "nesterov": True, "adjust_lr_fn": "match_rms_adamw"}
    optimizers = StackedMuon(stacked, ns_coefficients="original", **fields), torch.optim.Muon(reference, **fields)
    for _ in range(STEPS):
        for pair in zip(stacked, reference):
            gradient = torch.randn(shape)
            for weight in pair:
                weight.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    weights, expected = torch.stack([*stacked]).detach(), torch.stack([*reference]).detach()
    assert (weights - expected).norm() < 0.02 * (expected - before).norm()


class Operators(TorchDispatchMode):
    """The operators that run, by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def test_weights_of_one_shape_share_each_operator():
    counts = []
    for layers in (1, 12):
        stack = nn.Sequential(*[nn.Linear(8, 8, bias=False) for _ in range(layers)])
        optimizer = make_optimizer(Recipe(epochs=1, batch_size=2, opt="muon", lr=0.1), stack)
        for _ in range(2):  # the first is timm's
            stack(torch.randn(4, 8)).sum().backward()
            with Operators() as operators:
                optimizer.step()
        counts.append(operators.counts)
    assert counts[0]["baddbmm"] == 15, "three products in each of five iterations"
    for name in ("baddbmm", "linalg_vector_norm", "_to_copy", "_foreach_lerp_", "_foreach_add_", "mul"):
        assert counts[1][name] == counts[0][name], name
    assert "addmm" not in counts[1]


def test_other_algorithms_are_timms():
    optimizer = make_optimizer(Recipe(epochs=1, batch_size=2, opt="adamuon", lr=0.1), net())
    assert type(optimizer) is timm.optim.Muon
