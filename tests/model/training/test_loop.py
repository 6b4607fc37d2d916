"""The training loop and the local engine: what they leave, and that nothing changes it."""

import gc
import itertools
import json
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path

import own_parts  # noqa: F401  (it registers a loss and an augmentation)
import pytest
import torch
from conftest import TINY_STUDY
from torch import nn

from expertgrid.ablations.engines import local as engines
from expertgrid.ablations.engines.events import (
    EpochDone,
    Event,
    Stopped,
    TrialDone,
    TrialFailed,
    TrialNote,
    TrialStarted,
    by_seed,
)
from expertgrid.ablations.engines.local import FIRST_SAVE_S, Saver, run_local
from expertgrid.ablations.records.directory import StudyDirectory
from expertgrid.ablations.study.changes import changed_recipe
from expertgrid.ablations.study.study import Study
from expertgrid.model.checkpoint import load
from expertgrid.model.cost import cost
from expertgrid.model.presets import network
from expertgrid.model.system.errors import InputError
from expertgrid.model.training import loader, parts
from expertgrid.model.training import prepare as preparation
from expertgrid.model.training.data import ImageData, Images
from expertgrid.model.training.holdout import HoldOut
from expertgrid.model.training.loader import Loader
from expertgrid.model.training.loop import Diverged, predict, score, start, train
from expertgrid.model.training.prepare import planned_steps
from expertgrid.model.training.recipe import RECIPES, Recipe
from expertgrid.model.training.resume import read_state, write_state
from expertgrid.model.training.splits import ResidentData, Split, Splits
from expertgrid.model.training.step import training_step
from expertgrid.model.training.trial import Trial


def trials(digits, **settings) -> list[Trial]:
    """The trials of a study of seconds."""
    fields = {"width": 0.125, "recipe.epochs": 3, "recipe.amp": "off", "experts": 2, **settings}
    study = Study(name="test", question="?", seeds=2, set=fields, factors={"gate": ["linear", "mlp"]})
    return [trial for cell in study.cells(digits) for trial in cell.trials]


def ends(events: Iterable[Event]) -> list[TrialDone | TrialFailed]:
    """How each trial ended."""
    return [event for event in events if isinstance(event, TrialDone | TrialFailed)]


@pytest.fixture
def trial(digits) -> Trial:
    return trials(digits)[0]


def weights(net: nn.Module) -> torch.Tensor:
    return torch.cat([tensor.flatten().double() for tensor in net.state_dict().values()])


def test_accuracy_is_an_exact_share():
    """Not a mean in single precision, whose rounding would give a spread to seeds that differ by the same."""
    logits_BN = torch.tensor([[1.0, 0.0]] * 144)
    labels_B = torch.tensor([0] * 43 + [1] * 101)
    assert score(logits_BN, labels_B)[1] == 43 / 144


def test_training_learns(digits, digits_splits):
    trial = trials(digits, **{"width": 0.25, "recipe.batch_size": 32, "recipe.lr": 0.01, "recipe.hflip": 0.0})[0]
    epochs = list(train(trial, digits_splits, start(trial, digits_splits)))
    assert [epoch.epoch for epoch in epochs] == [1, 2, 3]
    assert epochs[-1].train_loss < epochs[0].train_loss - 0.1
    assert epochs[-1].train_accuracy > epochs[0].train_accuracy + 0.1
    assert epochs[-1].lr < epochs[0].lr


def test_training_repeats_exactly_and_seeds_differ(digits, digits_splits):
    first, second, *_ = trials(digits)
    nets = []
    for trial in (first, first, second):
        torch.rand(3)  # the state of the global generator must not matter
        training = start(trial, digits_splits)
        list(train(trial, digits_splits, training))
        nets.append(weights(training.net))
    assert torch.equal(nets[0], nets[1]) and not torch.equal(nets[0], nets[2])


def test_loop_is_the_plain_one(digits, digits_splits):
    """One epoch equals PyTorch's textbook loop over the same batches, where nothing is random but their order.

    With an optimiser that does not divide by its gradients, which would make much of their last digits.
    """
    plain = {"recipe.hflip": 0.0, "recipe.crop_padding": 0, "recipe.smoothing": 0.0, "model.head.dropout": 0.0}
    steady = {"recipe.opt": "momentum", "recipe.lr": 0.05, "recipe.sched": "none", "recipe.warmup": 0}
    trial = trials(digits, **plain, **steady)[0]
    training, reference = start(trial, digits_splits), start(trial, digits_splits)
    next(train(trial, digits_splits, training))

    net, recipe = reference.net.train(), trial.recipe
    decayed = [p for p in net.parameters() if p.ndim > 1]
    rest = [p for p in net.parameters() if p.ndim <= 1]
    groups = [{"params": rest, "weight_decay": 0}, {"params": decayed, "weight_decay": recipe.weight_decay}]
    optimizer = torch.optim.SGD(groups, lr=recipe.lr, momentum=0.9)
    order = torch.randperm(len(digits_splits.train), generator=torch.Generator().manual_seed(0))
    for chosen in order.split(recipe.batch_size)[: len(order) // recipe.batch_size]:
        x = (digits_splits.train.pixels(chosen).permute(0, 3, 1, 2) / 255 - digits.mean[0]) / digits.std[0]
        optimizer.zero_grad()
        nn.CrossEntropyLoss()(net(x), digits_splits.train.labels_B[chosen]).backward()
        optimizer.step()
    torch.testing.assert_close(weights(training.net), weights(net), rtol=1e-3, atol=1e-4)


def test_a_loss_that_is_not_finite_is_an_error(digits, digits_splits):
    trial = trials(digits, **{"recipe.lr": 100.0, "recipe.opt": "sgd", "recipe.warmup": 0, "norm_act": "none"})[0]
    with pytest.raises(Diverged, match=r"the loss is \w+ at step \d+ \(epoch \d, learning rate [\d.]+\)") as raised:
        list(train(trial, digits_splits, start(trial, digits_splits)))
    assert raised.value.step > 1
    assert raised.value.epoch == -(-raised.value.step // 10)
    assert raised.value.lr == pytest.approx(100 * (1 - (raised.value.step - 1) / 30))


def test_prediction_is_the_networks_own(trial, digits, digits_splits):
    training = start(trial, digits_splits)
    mean_C, std_C = torch.tensor(digits.mean), torch.tensor(digits.std)
    tuned = []
    training.net.register_forward_hook(lambda *_: tuned.append(torch.backends.cudnn.benchmark))
    logits_BN = predict(training.net, digits_splits.test, mean_C, std_C)
    assert (any(tuned), torch.backends.cudnn.benchmark) == (False, True)
    x = (digits_splits.test.pixels().permute(0, 3, 1, 2) / 255 - digits.mean[0]) / digits.std[0]
    expected = training.net.eval()(x)
    torch.testing.assert_close(logits_BN, expected, rtol=1e-4, atol=1e-5)
    loss, accuracy = score(logits_BN, digits_splits.test.labels_B)
    assert loss == pytest.approx(nn.CrossEntropyLoss()(expected, digits_splits.test.labels_B).item(), rel=1e-4)
    assert accuracy == pytest.approx((expected.argmax(1) == digits_splits.test.labels_B).double().mean().item())


PLAIN = {"model.head.dropout": 0.3}
NEW = {
    "ema and one-cycle": {"recipe.ema_decay": 0.9, "recipe.sched": "onecycle", "recipe.tta": "flip"},
    "batch arithmetic": {
        "recipe.alternating_flip": True, "recipe.crop_padding": 0, "recipe.translate": 1, "recipe.mixup": 0.4,
        "recipe.cutmix": 1.0, "recipe.reprob": 0.3, "recipe.opt": "muon",
    },
    "policy": {"recipe.auto_augment": "rand-m9-mstd0.5"},
}  # fmt: skip


@pytest.mark.parametrize("settings", [PLAIN, *NEW.values()], ids=["plain", *NEW])
def test_a_resumed_trial_ends_as_one_that_never_stopped(digits, resident_digits, tmp_path, settings):
    """Stopped by the user within the second epoch, then by a crash that loses what came after the last save."""
    trial = trials(digits, **settings)[0]
    whole, stopped = (StudyDirectory(tmp_path / name) for name in ("whole", "stopped"))
    for directory in (whole, stopped):
        directory.path.mkdir()
    list(run_local([trial], resident_digits, whole))
    steps = planned_steps(trial, len(resident_digits.splits(trial.hold_out, trial.seed).train)) // 3
    events = []
    with pytest.raises(Stopped):
        events.extend(run_local([trial], resident_digits, stopped, stop=lambda step: step == steps + 3))
    assert stopped.resume_file(trial.id).exists()
    assert stopped.record(trial.id) is None
    assert [epoch.epoch for epoch in stopped.epochs(trial.id)] == [1]

    crashed = run_local([trial], resident_digits, stopped, save_every_s=0)
    assert [type(event) for event in (next(crashed), next(crashed))] == [TrialStarted, EpochDone]
    assert read_state(stopped.resume_file(trial.id))["training"]["epoch"] == 1  # its last save was before the end
    crashed.close()

    events = list(run_local([trial], resident_digits, stopped))
    assert [type(event) for event in events] == [TrialStarted, EpochDone, EpochDone, TrialDone]
    assert not stopped.resume_file(trial.id).exists()
    assert stopped.checkpoint(trial.id).read_bytes() == whole.checkpoint(trial.id).read_bytes()
    timed = {"images_per_s", "train_seconds", "validation_seconds", "finished"}
    records = [directory.record(trial.id).model_dump(exclude=timed) for directory in (whole, stopped)]
    assert records[0] == records[1]
    epochs = [[e.model_dump(exclude=timed) for e in directory.epochs(trial.id)] for directory in (whole, stopped)]
    assert epochs[0] == epochs[1]
    assert [epoch["epoch"] for epoch in epochs[0]] == [1, 2, 3]


def test_record_is_what_the_checkpoint_gives(digits, digits_splits, resident_digits, tmp_path):
    """Validated, tested and saved is the average of the weights; flip TTA is measured beside the plain accuracy."""
    trial = trials(digits, **{"recipe.tta": "flip", "recipe.ema_decay": 0.99})[0]
    training, test = start(trial, digits_splits), digits_splits.test
    *_, last = train(trial, digits_splits, training)
    assert training.result is training.average.module
    assert not torch.equal(weights(training.result), weights(training.net))

    directory = StudyDirectory(tmp_path)
    *_, done = run_local([trial], resident_digits, directory)
    checkpoint, record = load(directory.checkpoint(trial.id)), directory.record(trial.id)
    assert torch.equal(weights(checkpoint.network()), weights(training.result))
    mean_C, std_C = torch.tensor(checkpoint.trained.mean), torch.tensor(checkpoint.trained.std)
    flipped = Split(test.source_XHWC.flip(2), test.indices_B, test.labels_B)
    plain_BN, other_BN = (predict(checkpoint.network(), split, mean_C, std_C) for split in (test, flipped))
    torch.testing.assert_close(predict(checkpoint.network(), test, mean_C, std_C, mirrored=True), other_BN)
    assert (record.test_loss, record.test_accuracy) == pytest.approx(score(plain_BN, test.labels_B), rel=1e-4)
    assert record.test_accuracy_flip == pytest.approx(score((plain_BN + other_BN) / 2, test.labels_B)[1])
    assert record.validation_accuracy_flip is not None
    assert record.validation_accuracy == pytest.approx(last.validation_accuracy)
    assert record == done.record and checkpoint.config == trial.model
    assert Trial.model_validate_json((directory.trial(trial.id) / "config.json").read_bytes()) == trial
    (read,) = (tmp_path / "ledger.jsonl").read_text().splitlines()
    expected = {"time": "", "crc32": "", "trial": trial.id, "reader": "training", "images": 360, "tta": "flip"}
    assert json.loads(read) | {"time": "", "crc32": ""} == expected


def test_a_failing_trial_leaves_the_others(digits, resident_digits, tmp_path):
    good, bad = trials(digits)[0], trials(digits, **{"recipe.lr": 100.0, "recipe.opt": "sgd", "norm_act": "none"})[0]
    directory = StudyDirectory(tmp_path)
    last = [
        event
        for event in run_local([bad, good], resident_digits, directory)
        if not isinstance(event, EpochDone | TrialStarted)
    ]
    assert [type(event) for event in last] == [TrialFailed, TrialDone]
    failure = directory.failure(bad.id)
    assert failure.kind == "diverged"
    assert failure.error.startswith("the loss is")
    assert failure.lr > 0
    assert (failure.epoch, failure.batch_size) == (-(-failure.step // 10), None)
    assert last[0].reason == f"diverged: {failure.error}"
    assert directory.failure(good.id) is None
    assert directory.record(bad.id) is None
    assert not (tmp_path / "ledger.jsonl").read_text().count(bad.id)


def test_a_damaged_resume_file_is_named(trial, resident_digits, tmp_path):
    """At every length that a crash could leave, and with one bit changed."""
    directory = StudyDirectory(tmp_path)
    file = directory.resume_file(trial.id)
    with pytest.raises(Stopped):
        list(run_local([trial], resident_digits, directory, stop=lambda step: step > 0))
    whole = file.read_bytes()
    for damaged in (b"", whole[:10], whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1])):
        file.write_bytes(damaged)
        with pytest.raises(InputError, match="resume.pt: damaged, or of an older version"):
            read_state(file)
    assert_trained_from_the_start(run_local([trial], resident_digits, directory))


def assert_trained_from_the_start(events: Iterable[Event]) -> None:
    *_, done = events = list(events)
    (note,) = (event for event in events if isinstance(event, TrialNote))
    assert note.text.startswith("trained from the start, because ") and "resume.pt" in note.text
    assert done.record.epochs == 3


def test_a_stopped_training_begins_again_where_the_code_of_a_part_was_changed(
    digits, resident_digits, tmp_path, monkeypatch
):
    trial, directory = trials(digits, **{"recipe.loss": "my_squares", "recipe.epochs": 1})[0], StudyDirectory(tmp_path)
    notes = []
    for code in ("same", "same", "changed"):
        monkeypatch.setitem(parts.CODES, "loss my_squares", code)
        with pytest.raises(Stopped):
            notes.append([])
            for event in run_local([trial], resident_digits, directory, stop=lambda step: step > 0):
                notes[-1] += [event.text] if isinstance(event, TrialNote) else []
    assert notes == [[], [], ["trained from the start, because the code of the loss my_squares was changed"]]


@pytest.mark.parametrize("missing", [("training",), ("training", "so_far"), ("training", "so_far", "loader")])
def test_a_state_of_another_version_is_not_used(missing, trial, resident_digits, tmp_path):
    """The training after it is the same as without it."""
    whole, other = (StudyDirectory(tmp_path / name) for name in ("whole", "other"))
    list(run_local([trial], resident_digits, whole))
    file = other.resume_file(trial.id)
    with pytest.raises(Stopped):
        list(run_local([trial], resident_digits, other, stop=lambda step: step == 12))
    state = parent = read_state(file)
    for key in missing[:-1]:
        parent = parent[key]
    parent[f"old {missing[-1]}"] = parent.pop(missing[-1])
    write_state(file, state)
    assert_trained_from_the_start(run_local([trial], resident_digits, other))
    assert other.checkpoint(trial.id).read_bytes() == whole.checkpoint(trial.id).read_bytes()


def test_a_clock_that_jumps_changes_nothing(digits, resident_digits, tmp_path, monkeypatch):
    """The machine's time of day is set while a trial trains: by a year forwards at one look, backwards at the next."""
    trial = trials(digits, **{"recipe.epochs": 2})[0]
    looks = itertools.cycle(["2027-01-01T00:00:00+00:00", "2026-01-01T00:00:00+00:00"])
    results = []
    for name, clock in (("steady", None), ("jumping", lambda: next(looks))):
        if clock:
            for place in (
                "expertgrid.ablations.engines.local.now",
                "expertgrid.ablations.records.directory.now",
                "expertgrid.ablations.records.lock.now",
                "expertgrid.model.system.files.now",
            ):
                monkeypatch.setattr(place, clock)
            monkeypatch.setattr("time.time", lambda: next(looks) and 0.0)
        directory = StudyDirectory(tmp_path / name)
        directory.path.mkdir()
        with pytest.raises(Stopped):
            list(run_local([trial], resident_digits, directory, stop=lambda step: step == 3))
        *_, done = run_local([trial], resident_digits, directory, save_every_s=0)
        results.append(
            (directory.checkpoint(trial.id).read_bytes(), done.record.test_loss, len(directory.test_reads()))
        )
        assert 0 < done.record.train_seconds < 60
    assert results[0] == results[1]


def test_nothing_in_a_resume_file_is_run(tmp_path):
    class Malicious:
        def __reduce__(self):
            return print, ("run",)

    file = tmp_path / "resume.pt"
    write_state(file, {"epochs": Malicious()})
    with pytest.raises(InputError, match="resume.pt: not the state of a training"):
        read_state(file)


def test_saving_takes_a_small_share_of_the_time(trial, resident_digits, tmp_path, monkeypatch):
    """A clock that saving takes 2 s of: the next save is 200 s later, though one every 10 s was asked for."""
    clock, saved = itertools.count(step=1.0), []
    monkeypatch.setattr("expertgrid.ablations.engines.local.time.monotonic", lambda: next(clock))
    saver = Saver(StudyDirectory(tmp_path), trial, start(trial, resident_digits.splits(HoldOut(), 0)), 10.0, bool)
    monkeypatch.setattr(
        "expertgrid.ablations.engines.local.write_state", lambda file, state: saved.extend([next(clock), next(clock)])
    )
    saver()  # after the first step: the next save is soon
    assert saver.due == FIRST_SAVE_S
    saver.save()
    assert saver.due == saved[-1] + 1 + 100 * 3


def test_saving_is_no_training_time(digits, resident_digits, tmp_path, monkeypatch):
    """A clock that only saving moves, by 1,000 s."""
    clock = [0.0]
    monkeypatch.setattr("expertgrid.model.training.loop.time.perf_counter", lambda: clock[0])
    monkeypatch.setattr("expertgrid.ablations.engines.local.write_state", lambda *_: clock.append(clock.pop() + 1000.0))
    trial = trials(digits, **{"recipe.epochs": 1})[0]
    directory, splits = StudyDirectory(tmp_path), resident_digits.splits(HoldOut(), 0)
    training = start(trial, splits)
    training.train_seconds = 5.0  # of an epoch, of which a step is done
    training.loader.begin(0)
    training.learning_rates.append(0.0)
    saver = Saver(directory, trial, training, every_s=0.0, stop=bool)
    (epoch,) = train(trial, splits, training, after_step=saver.save)
    assert clock[0] > 1000.0 and epoch.train_seconds == 5.0


def test_all_cells_are_trained_on_the_first_seed_before_the_next(digits):
    a0, a1, b0, b1 = trials(digits)
    assert by_seed([a0, a1, b0, b1, a0]) == [a0, b0, a1, b1]


def test_cost_is_counted_by_hand():
    config = network("two_block")
    experts = 2 * 4 * 64 * 64 * 9 * 32 * 32
    gates = 2 * (64 * 16 + 16 * 4)
    assert cost(config, 32, 32) == (300_658, 3 * 64 * 9 * 32 * 32 + experts + gates + 64 * 10)


@pytest.mark.parametrize(
    ("error", "tried"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), [64, 32]),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried 1"), []),
        (MemoryError(), []),
    ],
)
def test_no_memory_ends_the_trial_and_no_other(error, tried, digits, resident_digits, tmp_path, monkeypatch):
    """Where a device has no memory, the batch size that fits is found by trying. Here that is 32."""
    bad, good, *_ = trials(digits, **{"recipe.epochs": 1})
    real, sizes = engines.start, []

    def start(trial, data, weights=None):
        sizes.append(trial.recipe.batch_size)
        if trial.seed == bad.seed and trial.recipe.batch_size > 32:
            raise error
        return real(trial, data, weights)

    for module in (engines, preparation):
        monkeypatch.setattr(module, "start", start)
    directory = StudyDirectory(tmp_path)
    last = ends(run_local([bad, good], resident_digits, directory))
    assert [type(event) for event in last] == [TrialFailed, TrialDone]
    failure = directory.failure(bad.id)
    assert (failure.kind, failure.batch_size, failure.step) == ("out_of_memory", 128, None)
    assert "at batch size 128" in failure.error
    assert failure.error.endswith("; a step at batch size 32 fits") == bool(tried)
    assert sizes == [128, *tried, 128]


def test_a_whitening_stem_stays_as_it_was_fitted():
    fields = {"recipe.epochs": 2, "recipe.batch_size": 16, "recipe.amp": "off", "recipe.ema_decay": 0.9, "width": 0.125}
    few = ImageData.random(train=100, height=32, width=32)
    study = Study(name="test", question="?", seeds=1, base={"model": "speed"}, set=fields)
    trial = study.cells(few)[0].trials[0]
    splits = ResidentData(few, torch.device("cpu")).splits(trial.hold_out, trial.seed)
    training = start(trial, splits)
    frozen = {name: value.clone() for name, value in training.net.named_buffers() if name.endswith(".weight")}
    assert "layers.0.conv.weight" in frozen
    list(train(trial, splits, training))
    for net in (training.net, training.result):
        assert all(torch.equal(value, net.get_buffer(name)) for name, value in frozen.items())


@pytest.mark.parametrize("policy", ["3a", "augmix-m5"])
def test_how_many_batches_a_policy_takes_together_changes_nothing(policy, digits, digits_splits, monkeypatch):
    settings = {"recipe.auto_augment": policy, "recipe.cutmix": 1.0}
    trial = trials(digits, **settings | ({"recipe.color_jitter": [0.4, 0.2, 0.1]} if policy == "3a" else {}))[0]
    seen = []
    for together in (1, 3, 1000):
        monkeypatch.setattr(loader, "PIXELS_TOGETHER", together * trial.recipe.batch_size * 64)
        made = Loader(trial.recipe, digits_splits, trial.seed)
        seen.append([batch for epoch in range(2) for batch in made.epoch(epoch)])
    assert len(seen[0]) == 20
    for first, *others in zip(*seen):
        assert all(torch.equal(batch.x_BCHW, first.x_BCHW) for batch in others)
        assert all(torch.equal(batch.targets, first.targets) for batch in others)
    assert not torch.equal(seen[0][0].x_BCHW, seen[0][10].x_BCHW)


def test_nothing_accumulates_over_epochs(digits, digits_splits):
    settings = {"recipe.ema_decay": 0.9, "recipe.mixup": 0.2, "recipe.epochs": 4, "recipe.sched": "onecycle"}
    trial = trials(digits, **settings)[0]
    counts = []
    for _ in train(trial, digits_splits, start(trial, digits_splits)):
        gc.collect()
        counts.append(sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()))
    assert len(set(counts[1:])) == 1, counts


def test_the_table_has_flip_tta_apart_and_names_failures(expertgrid, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changes = ("tta=flip", "opt=sgd", "norm_act=none", "recipe.epochs=1")
    settings = [part for change in changes for part in ("--set", change)]
    text = TINY_STUDY.replace('gate = ["linear", "mlp"]', '"recipe.lr" = [0.001, 100.0]')
    Path("tiny.toml").write_text(text.replace('"recipe.epochs" = 2', "").replace("[1, 2]", "[2]"))
    done = expertgrid("run", "tiny.toml", *settings, "--device", "cpu")
    assert done.status == 1
    assert "test acc % with flip TTA" in done.out
    assert "Failed: 2 of the trials (2 diverged)." in done.out
    notes = expertgrid("table", "runs/tiny", "--notes").out
    assert len(re.findall(r"Failed: \w{12}: diverged: the loss is \w+ at step \d+ \(epoch 1, learning", notes)) == 2
    assert "Reads of the test split: 2 (2 at the end of a training" in notes
    assert "Flip TTA: logits averaged over each image and its mirror image; 2 of these reads predicted both." in notes


def test_the_step_is_as_long_as_clipped_gradients_allow():
    moved = []
    for most in (0.0, 0.01, 100.0):
        torch.manual_seed(0)
        net, recipe = nn.Linear(4, 3), changed_recipe("fast", {"clip_grad": most})
        before, labels_B = torch.nn.utils.parameters_to_vector(net.parameters()).detach(), torch.arange(9) % 3
        training_step(net, torch.optim.SGD(net.parameters(), 1.0), False, recipe)(torch.randn(9, 4), labels_B, labels_B)
        moved.append((torch.nn.utils.parameters_to_vector(net.parameters()) - before).norm().item())
    assert moved[1] == pytest.approx(0.01, rel=1e-3)
    assert moved[0] == moved[2] > 0.1


# A value for each field, other than the base's, and what the base needs for the field to mean something.
CHANGES = {
    "epochs": (2, {}),
    "batch_size": (64, {}),
    "opt": ("lion", {}),
    "lr": (0.01, {}),
    "weight_decay": (0.5, {}),
    "filter_bias_and_bn": (False, {"weight_decay": 5.0}),
    "opt_betas": ((0.5, 0.9), {}),
    "momentum": (0.5, {"opt": "sgd"}),
    "layer_decay": (0.5, {}),
    "freeze": ("all but head", {}),
    "sched": ("cosine", {}),
    "decay_epochs": (0.5, {"sched": "step"}),
    "decay_rate": (0.5, {"sched": "step", "decay_epochs": 0.5}),
    "warmup": (0.5, {}),
    "ema_decay": (0.9, {}),
    "clip_grad": (0.01, {}),
    "loss": ("my_squares", {}),
    "smoothing": (0.3, {}),
    "class_weights": ("balanced", {}),
    "sampler": ("balanced", {}),
    "auto_augment": ("rand-m9", {}),
    "color_jitter": (0.5, {}),
    "hflip": (0.2, {}),
    "alternating_flip": (True, {}),
    "vflip": (0.5, {}),
    "scale": ((0.3, 1.0), {"crop_padding": 0}),
    "ratio": ((1.0, 2.0), {"crop_padding": 0, "scale": (0.3, 1.0)}),
    "crop_padding": (2, {}),
    "translate": (2, {"crop_padding": 0}),
    "normalise": ("half", {}),
    "cutout": (3, {}),
    "reprob": (0.5, {}),
    "remode": ("rand", {"reprob": 0.5}),
    "recount": (3, {"reprob": 0.5}),
    "augment": ("my_hflip", {}),
    "small_size": (4, {"small_size": 7, "small_share": 1.0}),
    "small_share": (1.0, {"small_size": 4, "small_share": 0.4}),
    "mixup": (0.5, {}),
    "cutmix": (1.0, {}),
    "mixup_prob": (0.3, {"mixup": 0.5}),
    "mixup_switch_prob": (0.9, {"mixup": 0.5, "cutmix": 1.0}),
    "amp": ("on", {}),
    "tta": ("flip", {}),
}


def test_every_field_is_tried():
    assert list(CHANGES) == list(Recipe.model_fields)


@pytest.fixture(scope="module")
def trained(digits) -> Callable[[Recipe], torch.Tensor]:
    """The weights after a training on few images, which is done once for each recipe."""

    @cache
    def train_once(recipe: Recipe) -> torch.Tensor:
        trial, splits = few_trial(digits, recipe)
        training = start(trial, splits)
        list(train(trial, splits, training))
        return weights(training.result)

    return train_once


def few_trial(digits: ImageData, recipe: Recipe) -> tuple[Trial, Splits]:
    few = replace(digits, train=Images(digits.train.pixels_BHWC[:300], digits.train.labels_B[:300]))
    trial = trials(digits)[0].model_copy(update={"recipe": recipe})
    return trial, ResidentData(few, torch.device("cpu")).splits(trial.hold_out, trial.seed)


@pytest.mark.parametrize("field", CHANGES)
def test_every_field_changes_what_is_trained(field, digits, trained, tmp_path):
    value, needed = CHANGES[field]
    base = {**dict(RECIPES["fast"]), "epochs": 1, "batch_size": 32, "amp": "off", "crop_padding": 1, "lr": 0.001}
    base |= needed
    recipes = Recipe(**base), Recipe(**base | {field: value})
    if field != "tta":
        assert not torch.equal(*map(trained, recipes))
        return
    accuracies = []  # which tta adds; it changes no weights
    for i, recipe in enumerate(recipes):
        trial, splits = few_trial(digits, recipe)
        directory = StudyDirectory(tmp_path / str(i))
        *_, done = run_local([trial], ResidentData(splits.data, splits.device), directory)
        accuracies.append(done.record.test_accuracy_flip)
    assert accuracies[0] is None
    assert accuracies[1] is not None


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_memory_is_kept():
    """By the system's count of mapped pages, in a process of its own; the heap takes a few rounds to settle."""
    code = (
        "import resource, torch; from expertgrid.model.fast.memory import keep_freed_memory\n"
        "def faults():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    for _ in range(5): torch.zeros(2**24).add_(1)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "by_default, can = faults(), keep_freed_memory()\n"
        "print(by_default, can, min(faults() for _ in range(8)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    by_default, can, kept = done.stdout.split()
    assert can == "True"
    assert int(kept) < int(by_default) / 20
