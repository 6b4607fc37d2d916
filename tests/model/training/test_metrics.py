"""Metrics against scikit-learn and by hand, and training with classes of few images."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import log_softmax
from sklearn import metrics as sklearn_metrics
from sklearn.utils.class_weight import compute_class_weight
from torch import nn

from expertgrid.ablations.study.changes import changed_recipe
from expertgrid.model.system.errors import InputError
from expertgrid.model.training.data import ImageData, Images
from expertgrid.model.training.holdout import HoldOut
from expertgrid.model.training.loader import Loader
from expertgrid.model.training.loop import predict
from expertgrid.model.training.metrics import METRICS, Metric, check_defined, measured
from expertgrid.model.training.splits import ResidentData, Split
from expertgrid.model.training.step import training_step


@pytest.mark.parametrize("classes", [2, 5])
def test_metrics_are_those_of_scikit_learn(classes):
    rng = np.random.default_rng(classes)
    labels_B = rng.choice(classes, 400, p=np.arange(1, classes + 1) / np.arange(1, classes + 1).sum())
    log_BN = log_softmax(rng.normal(size=(400, classes)) + 2 * np.eye(classes)[labels_B], axis=1)
    shares_BN, predicted_B = np.exp(log_BN), log_BN.argmax(1)
    shares = shares_BN[:, 1] if classes == 2 else shares_BN
    assert measured(labels_B, predicted_B, log_BN, classes, METRICS) == pytest.approx(
        {
            "accuracy": sklearn_metrics.accuracy_score(labels_B, predicted_B),
            "balanced_accuracy": sklearn_metrics.balanced_accuracy_score(labels_B, predicted_B),
            "macro_f1": sklearn_metrics.f1_score(labels_B, predicted_B, average="macro"),
            "cross_entropy": sklearn_metrics.log_loss(labels_B, shares_BN),
            "auroc": sklearn_metrics.roc_auc_score(labels_B, shares, multi_class="ovr"),
        }
    )


def test_metrics_by_hand():
    labels_B, predicted_B = np.array([0, 0, 0, 1]), np.array([0, 0, 1, 1])
    log_BN = np.log([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7], [0.5, 0.5]])
    assert measured(labels_B, predicted_B, log_BN, 2, METRICS) == pytest.approx(
        {
            "accuracy": 3 / 4,
            "balanced_accuracy": (2 / 3 + 1) / 2,
            "macro_f1": (4 / 5 + 2 / 3) / 2,
            "cross_entropy": -np.log([0.9, 0.6, 0.3, 0.5]).mean(),
            "auroc": 2 / 3,  # of the 3 pairs of an image of each class, 0.5 is above 0.1 and 0.4
        }
    )
    classes_alone = measured(labels_B, predicted_B, None, 2, METRICS)
    assert list(classes_alone) == ["accuracy", "balanced_accuracy", "macro_f1"]
    assert list(measured(labels_B, predicted_B, np.pad(log_BN, ((0, 0), (0, 1))), 3, METRICS)) == [
        "accuracy",
        "cross_entropy",
    ]


def test_what_is_not_defined_is_one_line(monkeypatch):
    labels_B, classes = np.array([0, 0, 2]), ("cat", "dog", "owl")
    for name in ("auroc", "macro_f1", "balanced_accuracy"):
        with pytest.raises(InputError, match=f"metric {name}: .* on the test split: class 'dog' has no image there"):
            check_defined(name, {"the test split": labels_B}, classes)
        check_defined(name, {"the test split": np.array([0, 1, 2])}, classes)
    check_defined("cross_entropy", {"the test split": labels_B}, classes)
    monkeypatch.setitem(METRICS, "mine", Metric(lambda labels_B, log_BN: 1 / (labels_B == 1).sum().item()))
    with pytest.raises(InputError, match="metric mine: fails on the classes of it: ZeroDivisionError: division by"):
        check_defined("mine", {"it": labels_B}, classes)


def imbalanced(digits: ImageData) -> ImageData:
    """The digits 0, 1 and 2, of which there are 100, 40 and 10."""
    labels_B = digits.train.labels_B
    places = np.concatenate([np.flatnonzero(labels_B == i)[:count] for i, count in enumerate((100, 40, 10))])
    train = Images(digits.train.pixels_BHWC[places], labels_B[places])
    return ImageData("few", "few", ("0", "1", "2"), train, train, digits.mean, digits.std, "few")


def test_balanced_class_weights_and_sampler(digits):
    splits = ResidentData(imbalanced(digits), torch.device("cpu")).splits(HoldOut(), seed=0)
    labels_B = splits.train.labels_B
    loader = Loader(changed_recipe("fast", {"class_weights": "balanced", "batch_size": 128}), splits, seed=0)
    expected_N = compute_class_weight("balanced", classes=np.arange(3), y=labels_B.numpy())
    assert loader.class_weights_N.tolist() == pytest.approx(expected_N)
    batch = next(loader.epoch(0))
    net = nn.Sequential(nn.Flatten(), nn.LazyLinear(3))
    logits_BN = net(batch.x_BCHW)
    weights_B = loader.class_weights_N[batch.targets]
    by_hand = (weights_B * F.cross_entropy(logits_BN, batch.targets, reduction="none")).sum() / weights_B.sum()
    plain = changed_recipe("fast", {"smoothing": 0.0})
    step = training_step(net, torch.optim.SGD(net.parameters(), lr=0.1), True, plain, loader.class_weights_N)
    assert step(batch.x_BCHW, batch.targets, batch.labels_B)[0] == pytest.approx(by_hand.item(), rel=0.02)  # bfloat16

    loader = Loader(changed_recipe("fast", {"sampler": "balanced", "batch_size": 128}), splits, seed=0)
    drawn_B, again_B = (
        torch.cat([batch.labels_B for epoch in range(30) for batch in loader.epoch(epoch)]) for _ in "ab"
    )
    assert torch.equal(drawn_B, again_B)
    assert np.bincount(drawn_B) / len(drawn_B) == pytest.approx([1 / 3] * 3, abs=0.03)
    without = torch.arange(128) % 2 * 2  # as where speed is measured on few images: no image of a class
    few = replace(splits, train=replace(splits.train.part(torch.arange(128)), labels_B=without))
    loader = Loader(changed_recipe("fast", {"sampler": "balanced", "batch_size": 128}), few, seed=0)
    assert set(next(loader.epoch(0)).labels_B.tolist()) == {0, 2}


@pytest.mark.parametrize(
    ("side", "most", "largest"), [(8, 9, 500), (32, 9, 500), (64, 900, 500), (64, 9, 9), (224, 900, 41), (1500, 9, 1)]
)
def test_evaluation_takes_as_many_images_at_once_as_fit(side, most, largest):
    sizes = []

    class Net(nn.Module):
        def forward(self, x_BCHW):
            sizes.append(len(x_BCHW))
            return x_BCHW.mean((2, 3))

    pixels = torch.zeros(1, 1, 1, 1, dtype=torch.uint8).expand(largest + 1, side, side, 1)
    split = Split(pixels, torch.arange(largest + 1), torch.zeros(largest + 1, dtype=torch.int64))
    assert len(predict(Net(), split, torch.zeros(1), torch.ones(1), most=most)) == largest + 1
    assert sizes == [largest, 1]
