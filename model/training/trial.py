"""A trial: one training run as data, and the numbers of each of its epochs. Imports no torch."""

import hashlib
import json
from functools import cached_property

from pydantic import BaseModel, ConfigDict, Field

from expertgrid.model.config import Network
from expertgrid.model.system.errors import InputError
from expertgrid.model.training.data import ImageData
from expertgrid.model.training.holdout import HoldOut
from expertgrid.model.training.recipe import Recipe, Share

NO_WEIGHTS = "none"  # what a study says for fresh ones, from a trial's seed


class Weights(BaseModel):
    """Weights that a training starts from: those of a file `weights/FINGERPRINT.safetensors` in the study's directory.

    They have the names and shapes of the network's tensors, so their fingerprint is all that a trial's id has of them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str  # as the study names them
    fingerprint: str = Field(pattern="^[0-9a-f]{64}$")  # SHA-256 of the file
    tensors: int  # that are loaded
    new: tuple[str, ...] = ()  # tensors of the network that start from the trial's seed


class Trial(BaseModel):
    """One training run.

    `model_name` and `source` say where the model and the data come from; they are not part of the id. Neither are
    fields that have their default values, so that a new field of a recipe changes no id.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model_name: str
    model: Network
    recipe: Recipe
    source: str
    fingerprint: str
    hold_out: HoldOut = HoldOut()
    weights: Weights | None = None  # fresh ones
    seed: int

    @cached_property
    def id(self) -> str:
        """12 hexadecimal digits: the same for the same network, recipe, data, hold-out, first weights and seed."""
        identity = {"model": _essence(self.model), "recipe": _essence(self.recipe)}
        identity |= {"fingerprint": self.fingerprint, "seed": self.seed}
        identity |= {"hold_out": hold_out} if (hold_out := _essence(self.hold_out)) else {}
        identity |= {"weights": self.weights.fingerprint} if self.weights else {}
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]

    def check_images(self, data: ImageData) -> None:
        """Raises InputError for other images than those that this trains on."""
        if data.fingerprint != self.fingerprint:
            raise InputError(f"data source {data.source!r}: has other images than trial {self.id} was trained on")


def _essence(value: object) -> object:
    """A config as JSON: its kind, and the fields that differ from their defaults."""
    if isinstance(value, BaseModel):
        fields = type(value).model_fields
        return {name: _essence(inner) for name, inner in value if name == "kind" or inner != fields[name].default}
    return [_essence(inner) for inner in value] if isinstance(value, tuple) else value


class Epoch(BaseModel):
    """The numbers of one epoch. Accuracies are shares from 0 to 1, losses means in nats, times in seconds."""

    epoch: int  # from 1
    lr: float  # after the last step
    train_loss: float
    train_accuracy: Share  # on the augmented images, while training; under mixup, of the class with the larger share
    validation_loss: float
    validation_accuracy: Share
    images_per_s: float  # of training alone
    train_seconds: float
    validation_seconds: float
