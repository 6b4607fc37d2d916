"""Recorded steps, on a CPU: what a replay does, and that it trains as plain steps do.

A CUDA graph is kernels with the addresses and the numbers that they were started with. `Tape` is the same of PyTorch's
operators: a replay runs them on the same tensors with the same numbers, and writes where they wrote. As on CUDA, a step
that reads a value of the device, or brings one to it, is refused.
"""

import copy
import inspect
import sys
from collections.abc import Callable

import pytest
import timm.optim
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from expertgrid.ablations.engines.local import run_local
from expertgrid.ablations.records.directory import StudyDirectory
from expertgrid.ablations.study.study import Study
from expertgrid.model.fast.cuda_graphs import WARM_UP, Recorder, recordable
from expertgrid.model.fast.execution import ExecutionOptions, ExecutionPlan
from expertgrid.model.training import loop, optimise
from expertgrid.model.training import prepare as preparation
from expertgrid.model.training.loop import start, train
from expertgrid.model.training.prepare import prepare
from expertgrid.model.training.recipe import RECIPES, Recipe
from expertgrid.model.training.trial import Trial

CPU = torch.device("cpu")
aten = torch.ops.aten
WAITS = (aten._local_scalar_dense.default, aten.nonzero.default, aten.lift_fresh.default)


class Tape(TorchDispatchMode):
    """Runs operators and keeps them, to be replayed."""

    def __init__(self):
        super().__init__()
        self.played = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in WAITS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {function}")
        result = function(*args, **(kwargs or {}))
        self.played.append((function, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        with torch._C._AutoDispatchBelowAutograd():  # where they were played
            for function, args, kwargs, result in self.played:
                again = function(*args, **kwargs)
                pairs = zip(result, again) if isinstance(result, list | tuple) else [(result, again)]
                for before, after in pairs:
                    if isinstance(before, torch.Tensor) and before.data_ptr() != after.data_ptr():
                        before.copy_(after)


class TapeRecorder(Recorder):
    """A recorder for CPUs, whose recordings take no step of their own, as those of CUDA."""

    replays = 0

    def _prepare(self) -> None:
        pass

    def _aside(self, step):
        return step()

    def _record(self, step):
        tape = Tape()
        with tape:
            outputs = step()
        first = []

        def replay() -> None:
            self.replays += 1
            if first:
                tape.replay()
            first.append(True)  # the recording was this step

        return replay, outputs


@pytest.fixture
def on_cpu(monkeypatch) -> Callable[[Recipe, nn.Module], torch.optim.Optimizer]:
    """Has optimisers keep their counts on the device, as on CUDA, and steps be recorded, though that is a CPU.

    Returns what makes such an optimiser.
    """
    for name, module in list(sys.modules.items()):
        if name.startswith(("torch.optim.", "timm.optim.")):
            if hasattr(module, "_get_capturable_supported_devices"):
                monkeypatch.setattr(module, "_get_capturable_supported_devices", lambda *_, **__: ["cpu", "cuda"])
            if hasattr(module, "_check_capturable_devices"):
                monkeypatch.setattr(module, "_check_capturable_devices", lambda *_, **__: None)

    def make(recipe: Recipe, net: nn.Module) -> torch.optim.Optimizer:
        optimizer = optimise.make_optimizer(recipe, net)
        for group in optimizer.param_groups:
            if "capturable" in group:
                group["capturable"] = optimizer.defaults["capturable"] = True
        return optimizer

    monkeypatch.setattr(loop, "make_optimizer", make)
    monkeypatch.setattr(preparation, "Recorder", TapeRecorder)
    return make


def trial_of(digits, **fields) -> Trial:
    small = {"width": 0.0625, "experts": 2, "recipe.batch_size": 128, "recipe.epochs": 2, "recipe.amp": "off"}
    return Study(name="test", question="?", seeds=1, set=small | fields).cells(digits)[0].trials[0]


def losses(trial, splits, execution) -> list[tuple[float, float, float]]:
    training = start(trial, splits)
    prepare(trial, splits, training, execution, steps=20)
    epochs = [(e.train_loss, e.train_accuracy, e.validation_loss) for e in train(trial, splits, training)]
    if training.recorder:
        assert training.recorder.replays > 2
    return epochs


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"recipe.opt": "muon", "recipe.lr": 0.02, "recipe.ema_decay": 0.9},
        {"recipe.opt": "sgd", "recipe.lr": 0.05, "recipe.sched": "onecycle"},
        {"recipe.mixup": 0.5, "recipe.cutmix": 1.0},
        {"recipe.small_size": 6},
    ],
    ids=["adamw", "muon", "sgd", "mixing", "two sizes"],
)
def test_replays_train_as_plain_steps_do(fields, digits, digits_splits, on_cpu):
    """Rates change at each step, and batches; what was recorded of one step has to follow."""
    trial = trial_of(digits, **fields)
    plain = losses(trial, digits_splits, ExecutionOptions(graphs="off"))
    replayed = losses(trial, digits_splits, ExecutionOptions(graphs="on"))
    assert [pytest.approx(epoch, rel=2e-4) for epoch in plain] == replayed


def test_a_replay_reads_the_batch_and_the_rate_of_its_step():
    net = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0, fused=True)
    recorder, twin = TapeRecorder(optimizer, CPU), copy.deepcopy(net)

    def step(x_BC):
        optimizer.zero_grad(set_to_none=True)
        net(x_BC).square().sum().backward()
        optimizer.step()
        return (net.weight.detach().sum(),)

    for i in range(WARM_UP + 4):
        x_BC, rate = torch.randn(3, 2), 0.1 / (i + 1)
        optimizer.param_groups[0]["lr"] = rate
        (total,) = recorder(step, x_BC)
        twin.zero_grad()
        twin(x_BC).square().sum().backward()
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter -= rate * parameter.grad
        torch.testing.assert_close(net.weight, twin.weight)
        assert total.item() == pytest.approx(twin.weight.sum().item(), rel=1e-4)
        assert optimizer.param_groups[0]["lr"] == rate
    assert recorder.replays == 4


# timm's optimisers that a recipe can have and whose steps are recorded on CUDA, by what makes that possible: a fused
# kernel reads the rate and counts steps on the device, and so does an implementation that is called capturable.
RECORDED = {
    "fused": ("adagrad", "momentum", "nesterov", "sgd"),
    "capturable, fused": ("adam", "adamw"),
    "capturable": (
        "adadelta", "adamax", "adamc", "adamuon", "adamwlegacy", "adopt", "adoptc", "adoptw", "cadamc", "cadamw",
        "cadopt", "cadoptc", "cadoptw", "cnadamc", "cnadamw", "muon", "nadam", "nadamc", "nadamuon", "nadamw", "nmuon",
        "radam", "radamw", "rmsprop",
    ),
}  # fmt: skip
NAMES = sorted(name for names in RECORDED.values() for name in names)


def test_which_optimisers_are_recorded():
    recorded = {}
    for name in timm.optim.list_optimizers():
        of_tests = name in ("my-sgd", "my-opt")  # which others register
        if (
            not of_tests
            and not name.startswith(("bnb", "fused"))
            and not timm.optim.get_optimizer_info(name).second_order
        ):
            known = inspect.signature(timm.optim.get_optimizer_class(name, bind_defaults=False)).parameters
            if ways := ", ".join(way for way in ("capturable", "fused") if way in known):
                recorded.setdefault(ways, []).append(name)
    assert {ways: tuple(names) for ways, names in recorded.items()} == RECORDED
    assert {recipe.opt for recipe in RECIPES.values()} <= set(NAMES)


@pytest.mark.skipif(torch.version.cuda is None, reason="this PyTorch has no kernels for CUDA")
@pytest.mark.parametrize("kernel", ["sgd", "adagrad", "adam", "adamw"])
def test_fused_kernels_are_there_that_read_the_rate_from_a_tensor(kernel):
    for overload in ("", ".tensor_lr"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::_fused_{kernel}_{overload}", "CUDA")


def weights_after(name: str, make: Callable, device: str, recorder: Callable | None) -> list[torch.Tensor]:
    """Weights after some steps at falling rates, recorded or plain."""
    recipe = Recipe(epochs=1, batch_size=2, opt=name, lr=0.01, weight_decay=0.1)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).to(device)
    batches = torch.randn(WARM_UP + 6, 16, 6).to(device)
    optimizer = make(recipe, net)
    assert recordable(optimizer)
    recorded = recorder and recorder(optimizer, torch.device(device))

    def step(x_BC: torch.Tensor) -> tuple[torch.Tensor]:
        optimizer.zero_grad(set_to_none=True)
        loss = net(x_BC).square().mean()
        loss.backward()
        optimizer.step()
        return (loss.detach(),)

    for i, x_BC in enumerate(batches):
        optimizer.param_groups[0]["lr"] = 0.01 / (i + 1)
        recorded(step, x_BC) if recorded else step(x_BC)
    return [parameter.detach() for parameter in net.parameters()]


# Of these PyTorch has another form for CPUs, which reads the rate.
@pytest.mark.parametrize("name", sorted({*NAMES} - {"adadelta", "rmsprop"}))
def test_replays_of_an_optimiser_step_as_it_does(name, on_cpu):
    """Where an optimiser decides something on the host, weights differ."""
    for plain, replayed in zip(*(weights_after(name, on_cpu, "cpu", way) for way in (None, TapeRecorder))):
        torch.testing.assert_close(replayed, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_graphs_of_an_optimiser_step_as_it_does(name):
    make = optimise.make_optimizer
    for plain, replayed in zip(*(weights_after(name, make, "cuda", way) for way in (None, Recorder))):
        torch.testing.assert_close(replayed, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("graphs", ["auto", "on"])
def test_a_recording_that_fails_is_an_error(graphs, digits, resident_digits, on_cpu, tmp_path, monkeypatch):
    """Which says what leaves graphs out. `test_isolation` has the process that then trains without them."""

    def refused(self, step):
        raise RuntimeError("operation not permitted\nand more")

    monkeypatch.setattr(TapeRecorder, "_record", refused)
    monkeypatch.setattr(ExecutionOptions, "plan", lambda *_: ExecutionPlan(graphs=True))
    trial, directory = trial_of(digits), StudyDirectory(tmp_path)
    *_, failed = run_local([trial], resident_digits, directory, execution=ExecutionOptions(graphs=graphs))
    reason = "a training step cannot be recorded as a CUDA graph, which --graphs off leaves out: RuntimeError: "
    assert directory.failure(trial.id).error == reason + "operation not permitted"
    assert failed.of_recording == (graphs == "auto")


def test_an_optimiser_that_counts_on_the_host_is_not_recorded(digits, digits_splits):
    trial = trial_of(digits, **{"recipe.opt": "lion"})
    training = start(trial, digits_splits)
    with pytest.raises(loop.TrainingError, match="--graphs on: the optimiser lion cannot be recorded"):
        prepare(trial, digits_splits, training, ExecutionOptions(graphs="on"), steps=2)
    prepare(trial, digits_splits, training, ExecutionOptions(), steps=2)
    assert training.recorder is None
