"""What the gates of a trained network do: who is used, for which class, and how surely.

Shapes: B images, K experts of a block, N classes. A gate's weight is a soft assignment: an image of weight 0.7 on an
expert counts as 0.7 of an image there. Entropies and mutual information are in bits.
"""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import entropy

from expertgrid.model.checkpoint import Checkpoint
from expertgrid.model.gates import gates, recorded
from expertgrid.model.training.loop import predict
from expertgrid.model.training.splits import Split

COLLAPSED = 0.1  # of its equal share 1 / K


@dataclass(frozen=True)
class BlockGate:
    """The gate of one block on a set of images."""

    block: str  # the module's name
    mean_K: np.ndarray  # weight
    mean_NK: np.ndarray  # weight on the images of a class; nan for a class without images
    entropy: float  # of an image's weights, mean over images
    collapsed: tuple[int, ...]  # experts, from 0
    information: float  # of expert and class

    @property
    def experts(self) -> int:
        return len(self.mean_K)


def mean_by_class(values_BX: np.ndarray, labels_B: np.ndarray, classes: int) -> np.ndarray:
    """The mean (N, X) of the rows of each class; nan for a class without rows."""
    counts_N = np.bincount(labels_B, minlength=classes).astype(float)
    sums_NX = np.zeros((classes, *values_BX.shape[1:]))
    np.add.at(sums_NX, labels_B, values_BX)
    counts_N[counts_N == 0] = np.nan
    return sums_NX / counts_N[:, None]


def collapsed(mean_K: np.ndarray) -> tuple[int, ...]:
    """The experts whose mean weight is below a tenth of an equal share, 0.1 / K: of 4 experts, below 0.025."""
    return tuple(np.flatnonzero(mean_K < COLLAPSED / len(mean_K)).tolist())


def mutual_information(weights_BK: np.ndarray, labels_B: np.ndarray, classes: int) -> float:
    """The mutual information of expert and class, where an image's weights are its probabilities of each expert.

    p(k, n) is the mean over images of the weight of k where the class is n. 0 where all classes have the same mean
    weights, at most log2 of the smaller of K and N; for weights of 0 and 1 it is that of two labellings. Of few images
    it is too large: of hard assignments to experts at random by about (K - 1) (N - 1) / (2 B ln 2).
    """
    joint_NK = np.zeros((classes, weights_BK.shape[1]))
    np.add.at(joint_NK, labels_B, weights_BK / len(weights_BK))
    of_both, of_expert, of_class = (
        entropy(shares, base=2) for shares in (joint_NK.ravel(), joint_NK.sum(0), joint_NK.sum(1))
    )
    return max(0.0, float(of_expert + of_class - of_both))


def block_gate(block: str, weights_BK: np.ndarray, labels_B: np.ndarray, classes: int) -> BlockGate:
    """The diagnosis of one gate from its weights. Raises ValueError for rows that are no distributions."""
    if len(weights_BK) == 0 or (weights_BK < 0).any() or np.abs(weights_BK.sum(1) - 1).max() > 1e-3:
        raise ValueError(f"{block}: gate weights must be shares that sum to 1 for each image")
    entropy_B, mean_K = entropy(weights_BK, base=2, axis=1), weights_BK.mean(0)
    return BlockGate(
        block=block,
        mean_K=mean_K,
        mean_NK=mean_by_class(weights_BK, labels_B, classes),
        entropy=float(entropy_B.mean()),
        collapsed=collapsed(mean_K),
        information=mutual_information(weights_BK, labels_B, classes),
    )


def predict_watched(checkpoint: Checkpoint, split: Split) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logits (B, N) of a split's images in fp32, and the weights (B, K) of each gate by its block's name.

    Give the validation split: each read of the test split belongs in the ledger.
    """
    net, trained = checkpoint.network(), checkpoint.trained
    with recorded(gates(net)) as parts:
        logits_BN = predict(net, split, torch.tensor(trained.mean), torch.tensor(trained.std))
    return logits_BN.numpy(), {name: torch.cat(weights).double().numpy() for name, weights in parts.items()}
