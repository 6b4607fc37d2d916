"""The weights that the cells of a study start from, each read once. Only reading them imports torch."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from expertgrid.model.config import Network, TimmModel
from expertgrid.model.training.trial import Trial

if TYPE_CHECKING:
    from expertgrid.model.weights import Initial

NO_WEIGHTS = "none"  # fresh ones, from a trial's seed


class WeightsReader:
    """Reads weights once for each network, and keeps what was read."""

    def __init__(self) -> None:
        self.initial: dict[tuple[str, str], Initial] = {}  # by source and the network's config

    def read(self, source: str, network: Network, classes: Sequence[str]) -> "Initial":
        """The weights of `source` for a network whose outputs are `classes`. Raises InputError."""
        from expertgrid.model.weights import read_weights

        key = source, network.model_dump_json()
        if key not in self.initial:
            self.initial[key] = read_weights(source, network, classes)
        return self.initial[key]

    @property
    def files(self) -> dict[str, bytes]:
        """The files that trainings start from, by their fingerprints."""
        return {initial.weights.fingerprint: initial.file for initial in self.initial.values()}


def weights_in_words(trial: Trial) -> str:
    """What is loaded before a trial's first step, and what is new; "" for a trial that starts as one expects."""
    weights, name = trial.weights, trial.model_name
    if weights is None:
        if not (isinstance(trial.model, TimmModel) and "." in trial.model.timm):
            return ""
        return (
            f"{name} starts from fresh weights, although its name has the tag of weights: weights is {NO_WEIGHTS!r}; "
            'weights = "timm" in [base] starts from these'
        )
    new = f"new: {', '.join(weights.new)}" if weights.new else "nothing is new"
    mean_std = trial.recipe.normalise
    images = f"{mean_std!r}" if isinstance(mean_std, str) else " and ".join(map(str, map(list, mean_std)))
    return f"{name} starts from {weights.source}: {weights.tensors} tensors are loaded, {new}; images: {images}"
