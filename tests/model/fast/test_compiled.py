"""Compilation: of what, how often, when, and that nothing else changes."""

import copy
import json
from functools import partial

import pytest
import torch

from expertgrid.ablations.engines.events import TrialDone, TrialNote
from expertgrid.ablations.engines.local import Stopped, run_local
from expertgrid.ablations.engines.rerun import train_again
from expertgrid.ablations.records.directory import StudyDirectory
from expertgrid.ablations.study.study import Study
from expertgrid.model.checkpoint import load
from expertgrid.model.config import Block, ModelConfig, TimmModel
from expertgrid.model.fast import compiled as compilation
from expertgrid.model.fast.compiled import compile_net, why_unavailable
from expertgrid.model.fast.execution import ExecutionOptions, ExecutionPlan
from expertgrid.model.presets import PRESETS
from expertgrid.model.registry import build
from expertgrid.model.training import prepare as preparation
from expertgrid.model.training.loop import predict, start, train
from expertgrid.model.training.prepare import prepare
from expertgrid.model.training.trial import Trial
from expertgrid.model.variants import vary

CPU = torch.device("cpu")


@pytest.fixture
def graphs():
    """A backend that runs a graph as it is, and the list of those that it was compiled."""
    torch._dynamo.reset()
    compiled = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]):
        compiled.append(graph)
        return graph

    yield backend, compiled
    torch._dynamo.reset()


@pytest.fixture
def trial(digits) -> Trial:
    fields = {"width": 0.0625, "recipe.epochs": 1, "recipe.amp": "off", "experts": 2, "recipe.batch_size": 128}
    return Study(name="test", question="?", seeds=1, set=fields).cells(digits)[0].trials[0]


@pytest.mark.parametrize(
    "config", [vary(PRESETS["eight_block"], "width", 0.125), TimmModel(timm="test_resnet.r160_in1k")]
)
def test_a_network_is_compiled_whole_and_once(config, graphs, digits_splits):
    backend, compiled = graphs
    torch.manual_seed(0)
    nets = [build(config.change(in_chans=1)) for _ in range(2)]
    before = copy.deepcopy(nets[1].state_dict())
    random_state = torch.get_rng_state()
    x_BCHW = torch.randn(4, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    expected_BN = copy.deepcopy(nets[1]).train()(x_BCHW)
    for net in nets:
        assert compile_net(net, [x_BCHW], False, backend) > 0
    assert torch.equal(torch.get_rng_state(), random_state)
    assert list(nets[1].state_dict()) == list(before)
    output_BN = nets[1].train()(x_BCHW)
    assert torch.equal(output_BN, expected_BN)
    output_BN.sum().backward()
    predict(nets[0], digits_splits.validation, torch.zeros(1), torch.ones(1))
    assert len(compiled) == 1, "evaluation is eager"


def test_the_first_run_changes_nothing_of_the_network(graphs):
    net = build(vary(PRESETS["two_block"], "width", 0.0625)).eval()
    before = copy.deepcopy(net.state_dict())
    compile_net(net, [torch.randn(2, 3, 8, 8)], False, graphs[0])
    assert not net.training
    assert all(parameter.grad is None for parameter in net.parameters())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_many_different_networks_are_all_compiled(graphs):
    backend, compiled = graphs
    for channels in range(2, 14):
        net = build(ModelConfig(layers=(Block(channels=channels, kernels=(1, 1)),)))
        compile_net(net, [torch.randn(2, 3, 4, 4)], False, backend)
    assert len(compiled) == 12


def test_a_network_that_does_not_compile_stays_eager(graphs):
    def broken(graph, inputs):
        raise ValueError("no")

    net = build(vary(PRESETS["two_block"], "width", 0.0625))
    x_BCHW = torch.randn(2, 3, 8, 8)
    with pytest.raises(Exception, match="no"):
        compile_net(net, [x_BCHW], False, broken)
    assert net(x_BCHW).shape == (2, 10)


@pytest.mark.skipif(why_unavailable(CPU) is not None, reason="there is no C++ compiler")
def test_compiled_training_agrees_with_eager(trial, digits_splits):
    losses = []
    for compiled in (False, True):
        training = start(trial, digits_splits)
        if compiled:
            assert prepare(trial, digits_splits, training, ExecutionOptions(compile="on"), steps=1).seconds > 0
        losses += [(epoch.train_loss, epoch.validation_loss) for epoch in train(trial, digits_splits, training)]
    assert len(losses) == 2
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.parametrize(
    ("compiled_s", "steps", "output", "pays"),
    [(0.5, 1000, 2.3, True), (0.98, 1000, 2.3, False), (0.5, 100, 2.3, None), (0.5, 1000, 9.0, "log-sum 2.3 when")],
)
def test_networks_are_compiled_where_it_is_faster(compiled_s, steps, output, pays, monkeypatch):
    changed = []

    def timed(net, x_BCHW, bfloat16):
        return (compiled_s, output) if net in changed else (1.0, 2.3)

    monkeypatch.setattr(compilation, "_pass", timed)
    measure = partial(compilation.is_faster, torch.nn.Linear(2, 2), changed.append, [torch.zeros(1)], False, steps)
    if isinstance(pays, str):
        with pytest.raises(RuntimeError, match=pays):
            measure()
    else:
        assert measure() == bool(pays)
        assert bool(changed) == (pays is not None), "a short training is spared the compiler"


def test_a_missing_compiler_is_an_error_or_a_notice(expertgrid, tiny_study, tmp_path):
    with torch._inductor.config.patch({"cpp.cxx": (None, "/nowhere/g++")}):
        reason = why_unavailable(CPU)
        assert reason.startswith("there is no C++ compiler")
        outcome = expertgrid("run", tiny_study, "--compile", "on", "--device", "cpu")
        assert outcome.status == 2
        assert f"--compile on: {reason}" in outcome.complaint
        assert expertgrid("bench-train", "--compile", "on", "--device", "cpu").status == 2
        options, without = ExecutionOptions().usable([ExecutionPlan(compile=True)], CPU)
        assert (options.compile, without) == ("off", [f"torch.compile: {reason}"])
        assert ExecutionOptions().usable([ExecutionPlan()], CPU) == (ExecutionOptions(), [])
    assert not (tmp_path / "runs").exists()
    assert "cpu and cuda only" in why_unavailable(torch.device("mps"))


@pytest.mark.parametrize("again", ["resumed", "rerun"])
def test_a_compiled_trial_is_repeated_as_it_was(again, graphs, digits, resident_digits, tmp_path, monkeypatch):
    """Whatever the measurement would say the second time: its bits are those of the first training."""
    backend, compiled = graphs
    monkeypatch.setattr(preparation, "compile_net", partial(compile_net, backend=backend))
    monkeypatch.setattr(compilation, "LEAST_STEPS", 1)
    base, fields = {"model": "test_resnet"}, {"recipe.epochs": 2, "recipe.batch_size": 128, "recipe.amp": "off"}
    study = Study(name="test", question="?", seeds=1, base=base, set=fields)
    cells = study.cells(digits)
    (trial,) = cells[0].trials
    first, second = StudyDirectory(tmp_path / "first"), StudyDirectory(tmp_path / "second")
    monkeypatch.setattr(compilation, "is_faster", lambda *_: True)
    with first.written(study, digits, cells[:1]):
        *_, done = run_local([trial], resident_digits, first, execution=ExecutionOptions())
    assert done.record.compiled
    if again == "resumed":
        with pytest.raises(Stopped):
            list(run_local([trial], resident_digits, second, 1e9, ExecutionOptions(), stop=lambda step: step == 12))
    monkeypatch.setattr(compilation, "is_faster", lambda *_: False)
    compiled.clear()
    if again == "rerun":
        assert train_again(first, trial, done.record, resident_digits).verdict.startswith("The same: weights")
    else:
        list(run_local([trial], resident_digits, second, execution=ExecutionOptions()))
        weights = [load(directory.checkpoint(trial.id)).weights for directory in (first, second)]
        assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
        assert second.record(trial.id).compiled


def fails_to_compile(*arguments, steps) -> float:
    raise RuntimeError("Python.h is not there\nand more")


def test_a_compiler_that_fails_leaves_bench_train_eager_or_is_its_error(expertgrid, monkeypatch, capsys):
    monkeypatch.setattr(preparation, "compile_net", fails_to_compile)
    monkeypatch.setattr(ExecutionOptions, "plan", lambda *arguments: ExecutionPlan(compile=True))
    monkeypatch.setattr("expertgrid.bench.training.why_unavailable", str)  # so that no baseline is compiled
    small = "bench-train", "two_block", "--batch", "2", "--steps", "1", "--rounds", "1", "--device", "cpu"
    outcome = expertgrid(*small, "--format", "json")
    notice = "measured without torch.compile, which failed: RuntimeError: Python.h is not there\n"
    assert outcome.err.count(notice) == 1
    speed = json.loads(outcome.out)
    assert (speed["compiled"], speed["compile_seconds"]) == (False, 0)
    outcome = expertgrid(*small, "--compile", "on")
    assert outcome.status == 2
    assert "--compile on: torch.compile failed: RuntimeError: Python.h is not there" in outcome.complaint


@pytest.mark.parametrize("fails", [True, False])
def test_records_say_what_was_compiled(fails, trial, resident_digits, tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "compile_net", fails_to_compile if fails else lambda *arguments, steps: 2.5)
    monkeypatch.setattr(ExecutionOptions, "plan", lambda *arguments: ExecutionPlan(compile=True))
    directory = StudyDirectory(tmp_path / "study")
    events = list(run_local([trial], resident_digits, directory, execution=ExecutionOptions()))
    record = next(event.record for event in events if isinstance(event, TrialDone))
    assert (record.compiled, record.compile_seconds) == ((False, 0) if fails else (True, 2.5))
    assert load(directory.checkpoint(trial.id)).trained.trial == trial.id
    notes = [event.text for event in events if isinstance(event, TrialNote)]
    assert notes == ["trained without torch.compile, which failed: RuntimeError: Python.h is not there"] * fails
