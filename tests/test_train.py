"""The training loop and the local engine: what they leave, and that nothing changes it."""

import json

import pytest
import torch
from torch import nn

from ablations.engines import EpochDone, TrialDone, TrialFailed, by_architecture, cost, run_local
from ablations.records import StudyDirectory
from ablations.study import Study, Trial
from ablations.train import TrainingError, batches, predict, score, start, train
from model.checkpoint import load
from model.presets import network


def trials(digits, **settings) -> list[Trial]:
    """The trials of a study of seconds."""
    fields = {"width": 0.125, "recipe.epochs": 3, "recipe.amp": "off", "experts": 2, **settings}
    study = Study(name="test", question="?", seeds=2, set=fields, factors={"gate": ["linear", "mlp"]})
    return [trial for cell in study.cells(digits) for trial in cell.trials]


@pytest.fixture
def trial(digits) -> Trial:
    return trials(digits)[0]


def weights(net: nn.Module) -> torch.Tensor:
    return torch.cat([tensor.flatten().double() for tensor in net.state_dict().values()])


def test_training_learns(digits):
    trial = trials(digits, **{"width": 0.25, "recipe.batch_size": 32, "recipe.lr": 0.01, "recipe.hflip": 0.0})[0]
    epochs = list(train(trial, digits, start(trial, digits)))
    assert [epoch.epoch for epoch in epochs] == [1, 2, 3]
    assert epochs[-1].train_loss < epochs[0].train_loss - 0.1
    assert epochs[-1].train_accuracy > epochs[0].train_accuracy + 0.1
    assert epochs[-1].lr < epochs[0].lr


def test_training_repeats_exactly(trial, digits):
    nets = []
    for _ in range(2):
        torch.rand(3)  # the state of the global generator must not matter
        training = start(trial, digits)
        list(train(trial, digits, training))
        nets.append(training.net)
    assert torch.equal(*map(weights, nets))


def test_seeds_differ(digits):
    first, second, *_ = trials(digits)
    assert (first.seed, second.seed) == (0, 1)
    assert not torch.equal(*(weights(start(trial, digits).net) for trial in (first, second)))


def test_loop_is_the_plain_one(digits):
    """One epoch equals PyTorch's textbook loop over the same batches, where nothing is random but their order."""
    plain = {"recipe.hflip": 0.0, "recipe.crop_padding": 0, "recipe.smoothing": 0.0, "model.head.dropout": 0.0}
    trial = trials(digits, **plain, **{"recipe.opt": "adamw", "recipe.sched": "none", "recipe.warmup": 0})[0]
    training, reference = start(trial, digits), start(trial, digits)
    next(train(trial, digits, training))

    net, recipe = reference.net.train(), trial.recipe
    decayed = [p for p in net.parameters() if p.ndim > 1]
    rest = [p for p in net.parameters() if p.ndim <= 1]
    groups = [{"params": rest, "weight_decay": 0}, {"params": decayed, "weight_decay": recipe.weight_decay}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr)
    order = torch.randperm(len(digits.train), generator=torch.Generator().manual_seed(0))
    for chosen in order.split(recipe.batch_size)[: len(order) // recipe.batch_size]:
        x = (digits.train.pixels_BHWC[chosen].permute(0, 3, 1, 2) / 255 - digits.mean[0]) / digits.std[0]
        optimizer.zero_grad()
        nn.CrossEntropyLoss()(net(x), digits.train.labels_B[chosen]).backward()
        optimizer.step()
    torch.testing.assert_close(weights(training.net), weights(net), rtol=1e-3, atol=1e-4)


def test_a_loss_that_is_not_finite_is_an_error(digits):
    trial = trials(digits, **{"recipe.lr": 100.0, "recipe.opt": "sgd", "recipe.warmup": 0, "norm_act": "none"})[0]
    with pytest.raises(TrainingError, match=r"the loss is \w+ in epoch \d"):
        list(train(trial, digits, start(trial, digits)))


def test_batches_are_whole(trial, digits):
    assert batches(trial.recipe, digits) == (128, 10)
    large = trial.recipe.model_copy(update={"batch_size": 5000})
    assert batches(large, digits) == (1293, 1)


def test_prediction_is_the_networks_own(trial, digits):
    training = start(trial, digits)
    mean_C, std_C = torch.tensor(digits.mean), torch.tensor(digits.std)
    logits_BN = predict(training.net, digits.test, mean_C, std_C)
    x = (digits.test.pixels_BHWC.permute(0, 3, 1, 2) / 255 - digits.mean[0]) / digits.std[0]
    expected = training.net.eval()(x)
    torch.testing.assert_close(logits_BN, expected, rtol=1e-4, atol=1e-5)
    loss, accuracy = score(logits_BN, digits.test.labels_B)
    assert loss == pytest.approx(nn.CrossEntropyLoss()(expected, digits.test.labels_B).item(), rel=1e-4)
    assert accuracy == pytest.approx((expected.argmax(1) == digits.test.labels_B).double().mean().item())


def test_a_resumed_trial_ends_as_one_that_never_stopped(digits, tmp_path):
    trial = trials(digits, **{"model.head.dropout": 0.3})[0]
    whole, stopped = (StudyDirectory(tmp_path / name) for name in ("whole", "stopped"))
    for directory in (whole, stopped):
        directory.path.mkdir()
    list(run_local([trial], digits, whole))
    events = run_local([trial], digits, stopped, resume_every_s=0)
    assert isinstance(next(events), EpochDone)
    assert isinstance(next(events), EpochDone)
    events.close()
    assert (stopped.trial(trial.id) / "resume.pt").exists()
    assert stopped.record(trial.id) is None

    events = list(run_local([trial], digits, stopped))
    assert [type(event) for event in events] == [EpochDone, TrialDone]
    assert not (stopped.trial(trial.id) / "resume.pt").exists()
    nets = [load(directory.checkpoint(trial.id)).network() for directory in (whole, stopped)]
    assert torch.equal(*map(weights, nets))
    timed = {"images_per_s", "train_seconds", "validation_seconds", "finished"}
    records = [directory.record(trial.id).model_dump(exclude=timed) for directory in (whole, stopped)]
    assert records[0] == records[1]
    epochs = [[e.model_dump(exclude=timed) for e in directory.epochs(trial.id)] for directory in (whole, stopped)]
    assert epochs[0] == epochs[1]
    assert [epoch["epoch"] for epoch in epochs[0]] == [1, 2, 3]


def test_record_is_what_the_checkpoint_gives(trial, digits, tmp_path):
    directory = StudyDirectory(tmp_path)
    *_, done = run_local([trial], digits, directory)
    checkpoint = load(directory.checkpoint(trial.id))
    mean_C, std_C = torch.tensor(checkpoint.trained.mean), torch.tensor(checkpoint.trained.std)
    loss, accuracy = score(predict(checkpoint.network(), digits.test, mean_C, std_C), digits.test.labels_B)
    assert done.record.test_accuracy == pytest.approx(accuracy)
    assert done.record.test_loss == pytest.approx(loss, rel=1e-4)
    assert directory.record(trial.id) == done.record
    assert checkpoint.config == trial.model
    assert Trial.model_validate_json((directory.trial(trial.id) / "config.json").read_bytes()) == trial
    (read,) = (tmp_path / "ledger.jsonl").read_text().splitlines()
    expected = {"time": "", "trial": trial.id, "reader": "training", "images": 360}
    assert json.loads(read) | {"time": ""} == expected


def test_a_failing_trial_leaves_the_others(digits, tmp_path):
    good, bad = trials(digits)[0], trials(digits, **{"recipe.lr": 100.0, "recipe.opt": "sgd", "norm_act": "none"})[0]
    directory = StudyDirectory(tmp_path)
    last = [event for event in run_local([bad, good], digits, directory) if not isinstance(event, EpochDone)]
    assert [type(event) for event in last] == [TrialFailed, TrialDone]
    assert directory.failure(bad.id).startswith("TrainingError: the loss is")
    assert directory.failure(good.id) is None
    assert directory.record(bad.id) is None
    assert not (tmp_path / "ledger.jsonl").read_text().count(bad.id)


def test_a_damaged_resume_file_is_named(trial, digits, tmp_path):
    directory = StudyDirectory(tmp_path)
    directory.write_config(trial)
    (directory.trial(trial.id) / "resume.pt").write_bytes(b"damaged")
    (failed,) = run_local([trial], digits, directory)
    assert "resume.pt is damaged; without it the trial starts anew" in failed.reason


def test_trials_of_one_network_run_next_to_each_other(digits):
    a0, a1, b0, b1 = trials(digits)
    assert by_architecture([a0, b0, a1, b1, a0]) == [a0, a1, b0, b1]


def test_cost_is_counted_by_hand():
    config = network("two_block")
    experts = 2 * 4 * 64 * 64 * 9 * 32 * 32
    gates = 2 * (64 * 16 + 16 * 4)
    assert cost(config, 32, 32) == (300_658, 3 * 64 * 9 * 32 * 32 + experts + gates + 64 * 10)
