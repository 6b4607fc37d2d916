"""The metrics that a study can decide by, computed by scikit-learn, which is imported when one is. Imports no torch.

Shapes: B images, N classes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from expertgrid.model.system.errors import InputError, reason_of, unknown

Unit = Literal["points", "plain"]  # points: of shares from 0 to 1, which are shown times 100
TITLES = {"macro_f1": "macro F1", "auroc": "AUROC"}  # where they are more than the name without underscores


class Scale(BaseModel):
    """How the values of a metric are read. A study keeps it: its tables need no function of a metric."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = "accuracy"
    higher_is_better: bool = True
    unit: Unit = "points"
    decimals: int = 2  # that are shown

    @property
    def title(self) -> str:
        return TITLES.get(self.name, self.name.replace("_", " "))

    @property
    def short(self) -> str:
        """The title for the head of a column, with the unit."""
        return f"{'acc' if self.name == 'accuracy' else self.title}{' %' if self.unit == 'points' else ''}"

    @property
    def points(self) -> str:
        """What follows a difference."""
        return " points" if self.unit == "points" else ""

    @property
    def in_words(self) -> str:
        """The title with its unit, and with the direction where that is not the usual one."""
        return (
            f"{self.title}{',' * bool(self.points)}{self.points}{'' if self.higher_is_better else ', lower is better'}"
        )

    @property
    def unit_in_words(self) -> str:
        """`points` of accuracy, whose name goes without saying, else `in_words`."""
        return "points" if self.name == "accuracy" else self.in_words

    def differences(self, margin: float) -> tuple[float, ...]:
        """Those for which a plan says how many seeds they need."""
        return (0.3, 0.5, 1.0) if self.points else (margin / 2, margin, 2 * margin)

    @property
    def sign(self) -> int:
        """1 where higher values are better, else -1."""
        return 1 if self.higher_is_better else -1


ACCURACY = Scale()


@dataclass(frozen=True)
class Metric:
    """A number that says how good predictions are.

    `function` takes the classes of images (B,), integers from 0, and log-probabilities (B, N). Where
    `needs_probabilities` is False it looks at the predicted class alone: it is given 0 there and -inf elsewhere.
    """

    function: Callable[[np.ndarray, np.ndarray], float]
    higher_is_better: bool = True
    needs_probabilities: bool = True
    unit: Unit = "points"
    needs_each_class: bool = False  # it is not defined, NaN, where a class has no image


def _accuracy(labels_B: np.ndarray, log_BN: np.ndarray) -> float:
    return float(np.mean(log_BN.argmax(1) == labels_B))


def _balanced_accuracy(labels_B: np.ndarray, log_BN: np.ndarray) -> float:
    from sklearn.metrics import balanced_accuracy_score

    return balanced_accuracy_score(labels_B, log_BN.argmax(1))


def _macro_f1(labels_B: np.ndarray, log_BN: np.ndarray) -> float:
    from sklearn.metrics import f1_score

    return f1_score(labels_B, log_BN.argmax(1), average="macro", zero_division=0)


def _cross_entropy(labels_B: np.ndarray, log_BN: np.ndarray) -> float:
    return float(-log_BN[np.arange(len(labels_B)), labels_B].mean(dtype=np.float64))


def _auroc(labels_B: np.ndarray, log_BN: np.ndarray) -> float:
    """Of two classes that of the second, of more the mean over classes of each against all others."""
    from scipy.special import softmax
    from sklearn.metrics import roc_auc_score

    share_BN = softmax(log_BN.astype(np.float64), axis=1)
    return roc_auc_score(labels_B, share_BN[:, 1] if share_BN.shape[1] == 2 else share_BN, multi_class="ovr")


METRICS: dict[str, Metric] = {
    "accuracy": Metric(_accuracy, needs_probabilities=False),
    "balanced_accuracy": Metric(_balanced_accuracy, needs_probabilities=False, needs_each_class=True),
    "macro_f1": Metric(_macro_f1, needs_probabilities=False, needs_each_class=True),
    "cross_entropy": Metric(_cross_entropy, higher_is_better=False, unit="plain"),
    "auroc": Metric(_auroc, needs_each_class=True),
}
SHIPPED = tuple(METRICS)
IN_POINTS = tuple(name for name, metric in METRICS.items() if metric.unit == "points")  # the margin has a default


def scale(name: str, margin: float = 0.5) -> Scale:
    """How a metric is read in which this difference matters. Raises InputError for one that does not exist."""
    if name not in METRICS:
        raise unknown("metric", name, METRICS)
    unit = METRICS[name].unit
    decimals = 2 if unit == "points" else max(2, 1 - math.floor(math.log10(margin)))
    return Scale(name=name, higher_is_better=METRICS[name].higher_is_better, unit=unit, decimals=decimals)


def measured(
    labels_B: np.ndarray, predicted_B: np.ndarray, log_BN: np.ndarray | None, classes: int, names: Sequence[str] = ()
) -> dict[str, float]:
    """The metrics of predictions, of these names or all, without those that are not defined or cannot be computed.

    Without log-probabilities these are the metrics that need the predicted classes alone.
    """
    certain_BN = np.full((len(labels_B), classes), -np.inf, dtype=np.float16)
    certain_BN[np.arange(len(labels_B)), predicted_B] = 0
    whole = len(np.unique(labels_B)) == classes
    values = {}
    for name in names or METRICS:
        metric = METRICS[name]
        given_BN = log_BN if metric.needs_probabilities else certain_BN
        if given_BN is not None and (whole or not metric.needs_each_class):
            values[name] = float(metric.function(labels_B, given_BN))
    return {name: value for name, value in values.items() if np.isfinite(value)}


def check_defined(name: str, splits: Mapping[str, np.ndarray], classes: Sequence[str]) -> None:
    """Raises InputError where a metric gives no number on the labels (B,) of a split, for an almost perfect network."""
    for split, labels_B in splits.items():
        shares_BN = np.full((len(labels_B), len(classes)), 0.1 / len(classes))
        shares_BN[np.arange(len(labels_B)), labels_B] += 0.9
        try:
            defined = name in measured(labels_B, labels_B, np.log(shares_BN), len(classes), [name])
        except Exception as error:  # a user's function may fail in any way
            raise InputError(f"metric {name}: fails on the classes of {split}: {reason_of(error)}") from error
        if not defined:
            without = [classes[i] for i in np.flatnonzero(np.bincount(labels_B, minlength=len(classes)) == 0)]
            why = f": class {without[0]!r} has no image there" if without else ""
            raise InputError(
                f"metric {name}: is not defined on {split}{why}; accuracy and cross_entropy need no image of each class"
            )
