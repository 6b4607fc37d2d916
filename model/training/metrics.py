"""The metrics that a study can decide by. scikit-learn computes them, and is imported when one is. Imports no torch.

Shapes: B images, N classes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from expertgrid.model.system.errors import InputError, reason_of, unknown

Function = Callable[[np.ndarray, np.ndarray], float]
Unit = Literal["points", "plain"]  # points: of shares from 0 to 1, which are shown times 100


class Scale(BaseModel):
    """How the values of a metric are read. A study keeps it: its tables need no function of a metric."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = "accuracy"
    higher_is_better: bool = True
    unit: Unit = "points"
    decimals: int = 2  # that are shown

    @property
    def title(self) -> str:
        return {"macro_f1": "macro F1", "auroc": "AUROC"}.get(self.name, self.name.replace("_", " "))

    @property
    def column(self) -> str:
        return f"{'acc' if self.name == 'accuracy' else self.title}{' %' if self.points else ''}"

    @property
    def axis(self) -> str:
        return f"{self.title}{', %' if self.points else ''}"

    @property
    def points(self) -> str:
        """What follows a difference."""
        return " points" if self.unit == "points" else ""

    @property
    def reading(self) -> str:
        direction = "higher" if self.higher_is_better else "lower"
        return "points" if self.points and self.higher_is_better else f"{direction} is better"

    @property
    def sign(self) -> int:
        return 1 if self.higher_is_better else -1

    def differences(self, margin: float) -> tuple[float, ...]:
        """Those for which a plan says how many seeds they need."""
        return (0.3, 0.5, 1.0) if self.points else (margin / 2, margin, 2 * margin)


ACCURACY = Scale()


@dataclass(frozen=True)
class Metric:
    """A number that says how good predictions are.

    `function` takes the classes of images (B,), integers from 0, and log-probabilities (B, N). Where
    `needs_probabilities` is False it looks at the predicted class alone: it is given 0 there and -inf elsewhere.
    """

    function: Function
    higher_is_better: bool = True
    needs_probabilities: bool = True
    unit: Unit = "points"
    needs_each_class: bool = False  # it is not defined, NaN, where a class has no image


def _of_classes(name: str, **options: Any) -> Function:
    """A function of scikit-learn that takes predicted classes."""

    def function(labels_B: np.ndarray, log_BN: np.ndarray) -> float:
        import sklearn.metrics

        return getattr(sklearn.metrics, name)(labels_B, log_BN.argmax(1), **options)

    return function


def _cross_entropy(labels_B: np.ndarray, log_BN: np.ndarray) -> float:
    return -log_BN[np.arange(len(labels_B)), labels_B].mean(dtype=np.float64)


def _auroc(labels_B: np.ndarray, log_BN: np.ndarray) -> float:
    """Of two classes that of the second, of more the mean over classes of each against all others."""
    from scipy.special import softmax
    from sklearn.metrics import roc_auc_score

    share_BN = softmax(log_BN.astype(np.float64), axis=1)
    return roc_auc_score(labels_B, share_BN[:, 1] if share_BN.shape[1] == 2 else share_BN, multi_class="ovr")


of_classes: dict[str, Any] = {"needs_probabilities": False, "needs_each_class": True}
METRICS: dict[str, Metric] = {
    "accuracy": Metric(_of_classes("accuracy_score"), needs_probabilities=False),
    "balanced_accuracy": Metric(_of_classes("balanced_accuracy_score"), **of_classes),
    "macro_f1": Metric(_of_classes("f1_score", average="macro", zero_division=0), **of_classes),
    "cross_entropy": Metric(_cross_entropy, higher_is_better=False, unit="plain"),
    "auroc": Metric(_auroc, needs_each_class=True),
}
SHIPPED = tuple(METRICS)


def scale(name: str, margin: float = 0.5) -> Scale:
    """How a metric is read in which this difference matters. Raises InputError for one that does not exist."""
    if name not in METRICS:
        raise unknown("metric", name, METRICS)
    metric = METRICS[name]
    decimals = 2 if metric.unit == "points" else max(2, 1 - math.floor(math.log10(margin)))
    return Scale(name=name, higher_is_better=metric.higher_is_better, unit=metric.unit, decimals=decimals)


def measured(
    labels_B: np.ndarray, predicted_B: np.ndarray, log_BN: np.ndarray | None, classes: int, names: Sequence[str]
) -> dict[str, float]:
    """These metrics of predictions, without those that are not defined, or need log-probabilities where none are."""
    certain_BN = np.full((len(labels_B), classes), -np.inf, dtype=np.float16)
    certain_BN[np.arange(len(labels_B)), predicted_B] = 0
    has_each_class, values = len(np.unique(labels_B)) == classes, {}
    for name in names:
        given_BN = log_BN if METRICS[name].needs_probabilities else certain_BN
        if given_BN is not None and (has_each_class or not METRICS[name].needs_each_class):
            values[name] = float(METRICS[name].function(labels_B, given_BN))
    return {name: value for name, value in values.items() if math.isfinite(value)}


def check_defined(name: str, splits: Mapping[str, np.ndarray], classes: Sequence[str]) -> None:
    """Raises InputError where a metric gives no number on the labels (B,) of a split, for an almost perfect network."""
    for split, labels_B in splits.items():
        log_BN = np.log(0.9 * np.eye(len(classes))[labels_B] + 0.1 / len(classes))
        try:
            defined = measured(labels_B, labels_B, log_BN, len(classes), [name])
        except Exception as error:  # a user's function may fail in any way
            raise InputError(f"metric {name}: fails on the classes of {split}: {reason_of(error)}") from error
        if not defined:
            without = [of for i, of in enumerate(classes) if i not in labels_B]
            why = f": class {without[0]!r} has no image there; accuracy and cross_entropy need none" if without else ""
            raise InputError(f"metric {name}: is not defined on {split}{why}")
