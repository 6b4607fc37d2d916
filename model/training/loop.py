"""Training: one visible loop.

`train` is a generator: each `next` trains one epoch and yields its numbers. Its caller writes records, draws progress
or takes the time; the loop does none of these.

Precision: networks train in bfloat16 (`uses_bfloat16`). Where they do not, convolutions are in TF32 on CUDA devices
that have it. Accuracies and losses of the trained network are measured in full fp32.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim import Optimizer

from expertgrid.model.fast.cuda_graphs import Recorder
from expertgrid.model.fast.settings import full_fp32, set_for_training, untuned
from expertgrid.model.net import ExpertNet
from expertgrid.model.pixels import normalise
from expertgrid.model.registry import build
from expertgrid.model.system.machine import computes_bfloat16
from expertgrid.model.training.loader import Loader, steps_per_epoch
from expertgrid.model.training.optimise import freeze, make_average, make_optimizer, make_scheduler
from expertgrid.model.training.recipe import Recipe
from expertgrid.model.training.splits import Split, Splits
from expertgrid.model.training.step import training_step
from expertgrid.model.training.trial import Epoch, Trial

EVALUATION_BATCH, EVALUATION_PIXELS = 500, 1 << 21  # images, and of images above SMALL their pixels, at once at most
SMALL = 32 * 32  # pixels
STEM_IMAGES, STEM_PIXELS = 5_000, 5_000 << 10  # train images that a whitening stem is fitted to, and theirs


class TrainingError(RuntimeError):
    """A trial cannot go on. The other trials can."""


class Diverged(TrainingError):
    """A loss is not finite. Step and epoch count from 1; `lr` is the learning rate of that step."""

    def __init__(self, what: str, loss: float, step: int, epoch: int, lr: float):
        super().__init__(f"the {what} is {loss} at step {step} (epoch {epoch}, learning rate {lr:.3g})")
        self.step, self.epoch, self.lr = step, epoch, lr


@dataclass
class Training:
    """The state of a trial that trains, between any two steps."""

    net: nn.Module
    optimizer: Optimizer
    scheduler: Scheduler | None
    average: ModelEmaV3 | None
    loader: Loader
    bfloat16: bool  # whether forward passes run in it
    losses_S: Tensor  # of the epoch's steps
    correct: Tensor  # images of the steps that were done, whose class was predicted
    learning_rates: list[float] = field(default_factory=list)  # of the steps that were done; none between two epochs
    epoch: int = 0  # epochs done
    train_seconds: float = 0.0  # that the steps took until `resumed_at`
    resumed_at: float = 0.0  # as `seconds` counts
    frozen: list[nn.Module] = field(default_factory=list)  # parts that are not trained
    recorder: Recorder | None = None  # of the steps, where they are taken as CUDA graphs

    @property
    def result(self) -> nn.Module:
        """The network that is validated, tested and saved: the moving average where the recipe has one."""
        return self.net if self.average is None else self.average.module

    @property
    def steps(self) -> int:
        """The steps that were done, of all epochs."""
        return self.epoch * len(self.losses_S) + len(self.learning_rates)

    def begin_epoch(self, seed: int) -> None:
        torch.manual_seed(seed)  # dropout draws from the global generator
        self.loader.begin(self.epoch)
        self.correct.zero_()
        self.train_seconds = 0.0

    def stop_clock(self) -> None:
        """Waits for the device. The time until `start_clock` is not counted as training."""
        self.train_seconds += seconds(self.losses_S.device) - self.resumed_at

    def start_clock(self) -> None:
        self.resumed_at = seconds(self.losses_S.device)

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of the training depends on, after a step, while the clock is stopped."""
        average = {} if self.average is None else {"average": self.average.module.state_dict()}
        so_far = {
            "losses": self.losses_S,
            "correct": self.correct,
            "rates": self.learning_rates,
            "seconds": self.train_seconds,
            "loader": self.loader.state_dict(),
            "random": {name: module.get_rng_state() for name, module in self._generators().items()},
        }
        net, optimizer = self.net.state_dict(), self.optimizer.state_dict()
        return {"net": net, "optimizer": optimizer, "epoch": self.epoch, **average, "so_far": so_far}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises KeyError, TypeError, ValueError or RuntimeError for a state of another training or version."""
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.module.load_state_dict(state["average"])
        self.epoch, so_far = state["epoch"], state["so_far"]
        self.losses_S.copy_(so_far["losses"])
        self.correct.copy_(so_far["correct"])
        self.learning_rates = so_far["rates"]
        self.train_seconds = so_far["seconds"]
        self.loader.begin(self.epoch)
        self.loader.load_state_dict(so_far["loader"])
        for name, module in self._generators().items():
            module.set_rng_state(so_far["random"][name])

    def _generators(self) -> dict[str, Any]:
        """The modules of PyTorch that have the global random numbers: the CPU's, and the device's."""
        device = self.losses_S.device
        return {"cpu": torch} | ({} if device.type == "cpu" else {"device": torch.get_device_module(device)})


def start(trial: Trial, splits: Splits, weights: Path | None = None) -> Training:
    """A trial before its first step: network, optimiser and schedule, on the splits' device.

    The initial weights are those of the safetensors file `weights`; what it does not have follows from the trial's
    seed. Whitening stems without a file are fitted to the train images.
    """
    device = splits.device
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where Triton starts its kernels
    set_for_training()
    torch.manual_seed(trial.seed)  # weights start from torch's global generator
    net = build(trial.model)
    if weights is not None:
        net.load_state_dict(load_file(weights), strict=False)
    net = net.to(device).to(memory_format=torch.channels_last)
    if isinstance(net, ExpertNet) and weights is None:
        mean_C, std_C = (torch.tensor(values, device=device) for values in trial.recipe.mean_std(splits.data))
        images = min(STEM_IMAGES, max(1, STEM_PIXELS // math.prod(splits.data.image_size)))
        net.fit_stem(normalise(splits.train.pixels(slice(images)).permute(0, 3, 1, 2), mean_C, std_C))
    frozen = freeze(trial.recipe, net)
    optimizer = make_optimizer(trial.recipe, net)
    steps = steps_per_epoch(trial.recipe, len(splits.train))
    return Training(
        net,
        optimizer,
        make_scheduler(trial.recipe, optimizer, steps),
        make_average(trial.recipe, net),
        Loader(trial.recipe, splits, trial.seed),
        uses_bfloat16(trial.recipe, device),
        losses_S=torch.zeros(steps, device=device),
        correct=torch.zeros((), device=device, dtype=torch.int64),
        frozen=frozen,
    )


def train(
    trial: Trial, splits: Splits, training: Training, after_step: Callable[[], None] = lambda: None
) -> Iterator[Epoch]:
    """Trains from the state of `training` to the recipe's last epoch, and yields the numbers of each epoch.

    Nothing waits for a CUDA device within an epoch, unless `after_step` does: it is called after each step, and may
    keep the state of `training` or raise to end it. The random numbers of an epoch follow from the trial's seed and
    the epoch's number, so that a resumed trial ends as if it had never stopped. Raises Diverged where a loss is not
    finite: at that step on a CPU, after its epoch elsewhere.
    """
    recipe, net, optimizer, losses_S = trial.recipe, training.net, training.optimizer, training.losses_S
    steps, images = len(losses_S), len(losses_S) * recipe.batch_size  # of an epoch
    device, loader, learning_rates = splits.device, training.loader, training.learning_rates
    step = training_step(net, optimizer, training.bfloat16, recipe, loader.class_weights_N)
    take = partial(training.recorder, step) if training.recorder else step
    for epoch in range(training.epoch, recipe.epochs):
        training.start_clock()
        if not learning_rates:
            training.begin_epoch(trial.seed * recipe.epochs + epoch)
        net.train()
        for part in training.frozen:
            part.eval()
        for batch in loader.batches(len(learning_rates)):
            i = len(learning_rates)
            learning_rate = optimizer.param_groups[0]["lr"]
            losses_S[i], correct = take(batch.x_BCHW, batch.targets, batch.labels_B)
            learning_rates.append(learning_rate)
            if device.type == "cpu" and not math.isfinite(losses_S[i]):
                break
            training.correct += correct
            if training.average is not None:
                training.average.update(net, training.steps)
            if training.scheduler is not None:
                training.scheduler.step_update(training.steps)
            after_step()
        training.stop_clock()
        _check_finite(losses_S, epoch * steps, epoch, learning_rates)
        validating = time.perf_counter()
        numbers = loader.mean_C, loader.std_C, training.bfloat16, recipe.batch_size
        logits_BN = predict(training.result, splits.validation, *numbers)
        validation_loss, validation_accuracy = score(logits_BN, splits.validation.labels_B)
        if not math.isfinite(validation_loss):
            raise Diverged("validation loss", validation_loss, (epoch + 1) * steps, epoch + 1, learning_rates[-1])
        training.epoch = epoch + 1
        learning_rates.clear()
        yield Epoch(
            epoch=epoch + 1,
            lr=optimizer.param_groups[0]["lr"],
            train_loss=losses_S.mean().item(),
            train_accuracy=training.correct.item() / images,
            validation_loss=validation_loss,
            validation_accuracy=validation_accuracy,
            images_per_s=images / training.train_seconds,
            train_seconds=training.train_seconds,
            validation_seconds=time.perf_counter() - validating,
        )


def _check_finite(losses_S: Tensor, steps_before: int, epoch: int, learning_rates: list[float]) -> None:
    """Raises Diverged for the first of an epoch's losses that is not finite. Waits for the device."""
    if not torch.isfinite(losses_S).all():
        first = int(torch.isfinite(losses_S).logical_not().int().argmax())
        raise Diverged("loss", losses_S[first].item(), steps_before + first + 1, epoch + 1, learning_rates[first])


@torch.compiler.set_stance("force_eager")  # batches of another size, in another mode: not worth compiling for
@untuned()
@full_fp32()
@torch.inference_mode()
def predict(
    net: nn.Module, split: Split, mean_C: Tensor, std_C: Tensor, amp: bool = False, most: int = EVALUATION_BATCH,
    mirrored: bool = False,
) -> Tensor:  # fmt: skip
    """Logits (B, N) of all images of a split, in their order and without augmentation, or mirrored left to right.

    Sets the network to evaluation mode. Of images above 32 x 32 pixels it takes `most` at once, or fewer.
    """
    net.eval()
    parts = []
    pixels = math.prod(split.source_XHWC.shape[1:3])
    at_once = EVALUATION_BATCH if pixels <= SMALL else min(EVALUATION_BATCH, most, max(1, EVALUATION_PIXELS // pixels))
    for first in range(0, len(split), at_once):
        pixels_BHWC = split.pixels(slice(first, first + at_once))
        x_BCHW = normalise((pixels_BHWC.flip(2) if mirrored else pixels_BHWC).permute(0, 3, 1, 2), mean_C, std_C)
        with torch.autocast(x_BCHW.device.type, torch.bfloat16, enabled=amp):
            parts.append(net(x_BCHW).float())
    return torch.cat(parts)


def score(logits_BN: Tensor, labels_B: Tensor) -> tuple[float, float]:
    """Mean cross entropy in nats, and the share of images whose largest logit is their class."""
    loss = F.cross_entropy(logits_BN, labels_B)
    return loss.item(), (logits_BN.argmax(1) == labels_B).sum().item() / len(labels_B)


def uses_bfloat16(recipe: Recipe, device: torch.device, fp32: bool = False) -> bool:
    """Whether the forward pass runs in bfloat16: as the recipe says.

    With "auto" it does where the device computes it natively, unless `fp32` was found to be faster for the study.
    """
    return recipe.amp == "on" if recipe.amp != "auto" else not fp32 and computes_bfloat16(device)


def seconds(device: torch.device) -> float:
    """The time, once all work queued on `device` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()
