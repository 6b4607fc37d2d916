"""Training: one visible loop.

`train` is a generator: each `next` trains one epoch and yields what came of it. Whoever drives it writes records,
draws progress or takes the time; the loop itself knows of none of these.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pydantic import BaseModel
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.optim import Optimizer

from ablations.augment import normalise
from ablations.data import ImageData, Split
from ablations.recipe import Recipe
from ablations.study import Trial
from model.presets import build

EVALUATION_BATCH = 500


class TrainingError(RuntimeError):
    """A trial that cannot go on; the other trials can."""


class Epoch(BaseModel):
    """What one epoch gave. Accuracies are shares, losses are means in nats, times are in seconds."""

    epoch: int  # from 1
    lr: float  # after the last step
    train_loss: float
    train_accuracy: float  # on the augmented images, while training
    validation_loss: float
    validation_accuracy: float
    images_per_s: float  # of training alone
    train_seconds: float
    validation_seconds: float


@dataclass
class Training:
    """All that changes while a trial trains."""

    net: nn.Module
    optimizer: Optimizer
    scheduler: Scheduler | None
    epoch: int = 0  # epochs done

    def state_dict(self) -> dict:
        """Network, optimiser and epochs done. The schedule follows from these, and so do all random numbers."""
        return {"net": self.net.state_dict(), "optimizer": self.optimizer.state_dict(), "epoch": self.epoch}

    def load_state_dict(self, state: dict) -> None:
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch = state["epoch"]


def start(trial: Trial, data: ImageData) -> Training:
    """A network with the initial weights of the trial's seed on the data's device, and its optimiser and schedule."""
    device = data.train.labels_B.device
    torch.manual_seed(trial.seed)  # weights start from torch's global generator
    net = build(trial.model).to(device, memory_format=torch.channels_last)
    optimizer = trial.recipe.optimizer(net)
    _, steps = batches(trial.recipe, data)
    return Training(net, optimizer, trial.recipe.scheduler(optimizer, steps))


def batches(recipe: Recipe, data: ImageData) -> tuple[int, int]:
    """Images in a batch, and whole batches in an epoch: the rest of a shuffled epoch is left out."""
    batch = min(recipe.batch_size, len(data.train))
    return batch, len(data.train) // batch


def train(trial: Trial, data: ImageData, training: Training) -> Iterator[Epoch]:
    """Trains from where `training` stands to the recipe's last epoch, yielding after each.

    Images stay on their device, where each batch is gathered and augmented; nothing waits for the device within an
    epoch. All that is random in an epoch follows from the trial's seed and the epoch's number, so that a resumed trial
    ends as if it had never stopped. Raises TrainingError where the loss is no longer finite.
    """
    recipe, net, optimizer = trial.recipe, training.net, training.optimizer
    device = data.train.labels_B.device
    mean_C, std_C = (torch.tensor(values, device=device) for values in recipe.mean_std(data))
    batch, steps = batches(recipe, data)
    amp = uses_bfloat16(recipe, device)
    generator = torch.Generator(device)

    for epoch in range(training.epoch, recipe.epochs):
        generator.manual_seed(trial.seed * recipe.epochs + epoch)
        torch.manual_seed(trial.seed * recipe.epochs + epoch)  # dropout draws from the global generator
        order = torch.randperm(len(data.train), device=device, generator=generator)
        loss_sum = torch.zeros((), device=device)
        correct = torch.zeros((), device=device, dtype=torch.int64)
        net.train()
        started = seconds(device)
        for step in range(steps):
            chosen_B = order[step * batch : (step + 1) * batch]
            x_BCHW = recipe.augment(data.train.pixels_BHWC[chosen_B], mean_C, std_C, generator)
            y_B = data.train.labels_B[chosen_B]
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                logits_BN = net(x_BCHW)
                loss = F.cross_entropy(logits_BN, y_B, label_smoothing=recipe.smoothing)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if training.scheduler is not None:
                training.scheduler.step_update(epoch * steps + step + 1)
            loss_sum += loss.detach()
            correct += (logits_BN.detach().argmax(1) == y_B).sum()
        trained = seconds(device)
        train_loss = loss_sum.item() / steps
        lr = optimizer.param_groups[0]["lr"]
        if not torch.isfinite(loss_sum):
            raise TrainingError(f"the loss is {train_loss} in epoch {epoch + 1} (learning rate {lr:.2g})")
        logits_BN = predict(net, data.validation, mean_C, std_C, amp)
        validation_loss, validation_accuracy = score(logits_BN, data.validation.labels_B)
        training.epoch = epoch + 1
        yield Epoch(
            epoch=epoch + 1,
            lr=lr,
            train_loss=train_loss,
            train_accuracy=correct.item() / (steps * batch),
            validation_loss=validation_loss,
            validation_accuracy=validation_accuracy,
            images_per_s=steps * batch / (trained - started),
            train_seconds=trained - started,
            validation_seconds=seconds(device) - trained,
        )


@torch.inference_mode()
def predict(net: nn.Module, split: Split, mean_C: Tensor, std_C: Tensor, amp: bool = False) -> Tensor:
    """Logits (B, N) of all images of a split, in order, without augmentation, with the network in evaluation mode."""
    net.eval()
    parts = []
    for pixels_BHWC in split.pixels_BHWC.split(EVALUATION_BATCH):
        x_BCHW = normalise(pixels_BHWC.permute(0, 3, 1, 2), mean_C, std_C)
        with torch.autocast(x_BCHW.device.type, torch.bfloat16, enabled=amp):
            parts.append(net(x_BCHW).float())
    return torch.cat(parts)


def score(logits_BN: Tensor, labels_B: Tensor) -> tuple[float, float]:
    """Mean cross entropy in nats, and the share of images whose largest logit is their class."""
    loss = F.cross_entropy(logits_BN, labels_B)
    return loss.item(), (logits_BN.argmax(1) == labels_B).float().mean().item()


def uses_bfloat16(recipe: Recipe, device: torch.device) -> bool:
    """Whether the forward pass runs in bfloat16: as the recipe says, or where the device computes it natively."""
    if recipe.amp != "auto":
        return recipe.amp == "on"
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def seconds(device: torch.device) -> float:
    """The time, once all work queued on `device` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
