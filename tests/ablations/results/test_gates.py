"""Gate diagnostics, against numbers worked out by hand, scikit-learn's, and a trained network's own gate."""

import numpy as np
import pytest
import torch
from sklearn.metrics import mutual_info_score

from expertgrid.ablations.records.directory import StudyDirectory
from expertgrid.ablations.results.report.gates import (
    block_gate,
    collapsed,
    mean_by_class,
    mutual_information,
    predict_watched,
)
from expertgrid.model.checkpoint import load
from expertgrid.model.net import Gate
from expertgrid.model.pixels import normalise
from expertgrid.model.training.loop import score

HARD_BK = np.array([[1.0, 0], [1, 0], [0, 1], [0, 1]])


def test_means_by_class():
    means_NK = mean_by_class(np.array([[1.0, 0], [0.5, 0.5], [0, 1]]), np.array([0, 0, 2]), 3)
    np.testing.assert_array_equal(means_NK, [[0.75, 0.25], [np.nan, np.nan], [0, 1]])


@pytest.mark.parametrize(
    ("weights_BK", "labels", "bits"),
    [
        (HARD_BK, [0, 0, 1, 1], 1.0),
        (HARD_BK, [0, 1, 0, 1], 0.0),
        (HARD_BK, [0, 0, 0, 1], 0.3112781244591328),  # H(1/4) + H(1/2) - H(1/2, 1/4, 1/4)
        ([[0.8, 0.2], [0.2, 0.8]], [0, 1], 0.2780719051126377),  # p is 0.4, 0.1, 0.1, 0.4: 2 bits less that entropy
        (np.full((4, 2), 0.5), [0, 0, 1, 1], 0.0),
    ],
)
def test_mutual_information_by_hand(weights_BK, labels, bits):
    assert mutual_information(np.array(weights_BK), np.array(labels), 2) == pytest.approx(bits, abs=1e-12)


def test_mutual_information_of_hard_assignments_is_scikit_learns():
    rng = np.random.default_rng(0)
    experts_B, labels_B = rng.integers(4, size=500), rng.integers(10, size=500)
    experts_B[labels_B < 3] = 1
    information = mutual_information(np.eye(4)[experts_B], labels_B, 10)
    assert information == pytest.approx(mutual_info_score(experts_B, labels_B) / np.log(2))


def test_its_bias_is_as_stated():
    rng = np.random.default_rng(0)
    information = [
        mutual_information(np.eye(4)[rng.integers(4, size=400)], np.arange(400) % 10, 10) for _ in range(100)
    ]
    assert np.mean(information) == pytest.approx(3 * 9 / (2 * 400 * np.log(2)), rel=0.1)


def test_collapsed_is_below_a_tenth_of_an_equal_share():
    assert collapsed(np.array([0.5, 0.024, 0.451, 0.025])) == (1,)
    assert collapsed(np.full(4, 0.25)) == ()


def test_block_gate():
    gate = block_gate("layers.1", HARD_BK, np.array([0, 0, 1, 1]), 2)
    assert (gate.entropy, gate.information, gate.collapsed) == (0, 1, ())
    assert gate.mean_NK.tolist() == [[1, 0], [0, 1]]
    with pytest.raises(ValueError, match=r"layers\.1: gate weights must be shares"):
        block_gate("layers.1", HARD_BK * 2, np.array([0, 0, 1, 1]), 2)


def test_weights_of_a_checkpoint_are_those_of_its_gates(trained_study, resident_digits):
    directory = StudyDirectory(trained_study)
    trial = next(cell.trials[0] for cell in directory.read_plan().cells if cell.levels["experts"] == 2)
    checkpoint, before = load(directory.checkpoint(trial)), directory.test_reads()
    record = directory.record(trial)
    hold_out = directory.read_plan().hold_out
    validation = resident_digits.splits(hold_out, record.seed).validation
    logits_BN, weights = predict_watched(checkpoint, validation)

    loss, accuracy = score(torch.from_numpy(logits_BN), validation.labels_B)
    assert (loss, accuracy) == pytest.approx((record.validation_loss, record.validation_accuracy))
    net = checkpoint.network()
    assert weights.keys() == {name.removesuffix(".gate") for name, m in net.named_modules() if isinstance(m, Gate)}
    for weights_BK in weights.values():
        assert weights_BK.shape == (len(validation), 2)
        np.testing.assert_allclose(weights_BK.sum(1), 1, rtol=1e-6)
    mean, std = torch.tensor(checkpoint.trained.mean), torch.tensor(checkpoint.trained.std)
    x_BCHW = normalise(validation.pixels().permute(0, 3, 1, 2), mean, std)
    first, block = next((name, m) for name, m in net.named_modules() if hasattr(m, "experts") and hasattr(m, "gate"))
    inputs = []
    block.register_forward_hook(lambda module, arguments, outputs: inputs.append(arguments[0]))
    with torch.no_grad():
        net(x_BCHW)
        expected_BK = block.gate(inputs[0])
    np.testing.assert_allclose(weights[first], expected_BK, rtol=1e-4)
    assert directory.test_reads() == before
