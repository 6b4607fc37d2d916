"""Training on a device that is not the host: nothing in an epoch waits for it, and nothing goes to it.

PyTorch's meta device stands for CUDA: its tensors have no values, so that reading one is an error, as is arithmetic
with a tensor of the host.
"""

from collections.abc import Iterator

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from expertgrid.ablations.study.study import Study
from expertgrid.model.presets import PRESETS
from expertgrid.model.training import loop as training
from expertgrid.model.training.data import ImageData
from expertgrid.model.training.holdout import HoldOut
from expertgrid.model.training.recipe import RECIPES
from expertgrid.model.training.splits import ResidentData
from expertgrid.model.training.trial import Trial

META = torch.device("meta")


class OneDevice(TorchDispatchMode):
    """Refuses operators that take tensors of two devices: on CUDA such a copy waits."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        devices = {x.device.type for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        assert len(devices) < 2, f"{function} takes tensors of {devices}"
        return function(*args, **(kwargs or {}))


class Generator(torch.Generator):
    """One of the host, which says that it is of the device that it was made for."""

    def __new__(cls, device: torch.device | None = None):
        return super().__new__(cls)

    def __init__(self, device: torch.device | None = None):
        self.made_for = device

    @property
    def device(self) -> torch.device:
        return self.made_for


class EpochIsOver(Exception):
    pass


@pytest.fixture(scope="module")
def images() -> ImageData:
    return ImageData.random(train=40, height=32, width=32, classes=4)


@pytest.fixture
def on_meta(monkeypatch) -> Iterator[None]:
    """What there is not for meta, as it is for the CPU; and the clock, which is read before and after the steps."""
    autocast, mode = torch.autocast, OneDevice()
    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(torch, "autocast", lambda kind, *more, **options: autocast("cpu", *more, enabled=False))
    started = []

    def seconds(device: torch.device) -> float:
        if started:
            raise EpochIsOver
        started.append(mode.__enter__())
        return 0.0

    monkeypatch.setattr(training, "seconds", seconds)
    yield
    mode.__exit__(None, None, None)


def trial_of(images: ImageData, model: str, recipe: str, **fields) -> Trial:
    base = {"model": model, "recipe": recipe}
    small = {"width": 0.125, "recipe.batch_size": 8, "recipe.epochs": 2}
    return Study(name="test", question="?", seeds=1, base=base, set=small | fields).cells(images)[0].trials[0]


def take_an_epoch(trial: Trial, images: ImageData) -> None:
    splits = ResidentData(images, META).splits(HoldOut(), trial.seed)
    assert splits.train.pixels().device == META
    with pytest.raises(EpochIsOver):
        next(training.train(trial, splits, training.start(trial, splits)))


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_stay_on_the_device(recipe, images, on_meta):
    model = recipe if recipe in PRESETS else "two_block"
    take_an_epoch(trial_of(images, model, recipe), images)


@pytest.mark.parametrize(
    "fields",
    [
        {"recipe.translate": 2, "recipe.crop_padding": 0, "recipe.hflip": 0.5, "recipe.alternating_flip": True},
        {"recipe.reprob": 0.5, "recipe.remode": "pixel", "recipe.recount": 2},
        {"recipe.reprob": 0.5, "recipe.remode": "const"},
        {"recipe.mixup": 0.5, "recipe.cutmix": 1.0},
        {"recipe.scale": [0.3, 1.0], "recipe.crop_padding": 0, "recipe.vflip": 0.5, "recipe.clip_grad": 1.0},
        {"recipe.cutout": 4, "recipe.small_size": 8},
        {"recipe.auto_augment": "rand-m9-n4-p1-mstd2-inc1"},
        {"recipe.auto_augment": "3a", "recipe.color_jitter": [0.4, 0.4, 0.4, 0.1]},
        {"recipe.auto_augment": "augmix-m5"},
        {"recipe.ema_decay": 0.9, "recipe.sched": "onecycle"},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_augmentation_stays_on_the_device(fields, images, on_meta):
    take_an_epoch(trial_of(images, "two_block", "fast", **fields), images)


def test_the_stand_in_refuses_what_waits():
    x = torch.zeros(4, device=META)
    with pytest.raises(RuntimeError, match="meta"):
        x.sum().item()
    with pytest.raises(RuntimeError, match="not on the expected device"):
        torch.where(x > 0, torch.zeros(4), x)
    with OneDevice(), pytest.raises(AssertionError, match="takes tensors of"):
        x[torch.tensor([0, 1])]
