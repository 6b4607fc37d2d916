"""The PyTorch baseline: the same network, trained as a good tutorial has it.

An eager network in float32 and PyTorch's default memory layout, or one with its channels last that is in bfloat16 or
compiled or both. Its blocks stack their experts' outputs and sum them with their weights. PIL images come through
torchvision's transforms in a `DataLoader` with as many workers as there are cores, kept between epochs, with pinned
memory on CUDA. It has the recipe's optimiser as PyTorch has it by default, and its label smoothing, without a schedule;
the recipe's crop, flip and Cutout. The other augmentation only expertgrid's loop does. Nothing slows it down: TF32 is
as PyTorch has it, batches are copied without waiting, the loss is not read, and workers run before the clock of a round
starts. What they prepared while others were measured is dropped.
"""

import copy
import itertools
import multiprocessing
import os
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
from PIL import Image
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import transforms

from expertgrid.model.net import ExpertBlock
from expertgrid.model.system.machine import usable_cores
from expertgrid.model.system.processes import answers
from expertgrid.model.training.loop import seconds

PREFETCHED = 2  # batches that each worker prepares ahead: PyTorch's default


def batches_ahead() -> int:
    """The batches that workers have prepared when a round starts, and the one that is then taken."""
    return usable_cores() * PREFETCHED + 1


class TextbookBlock(nn.Module):
    """An expert block as one writes it down: all experts' outputs stacked, weighted, and summed."""

    def __init__(self, block: ExpertBlock):
        super().__init__()
        self.experts, self.gate, self.norm_act = block.experts, block.gate, block.norm_act

    def forward(self, x_BCHW: Tensor) -> Tensor:
        outputs_BKCHW = torch.stack([expert(x_BCHW) for expert in self.experts], dim=1)
        if self.gate is None:
            return self.norm_act(outputs_BKCHW[:, 0])
        return self.norm_act((self.gate(x_BCHW)[:, :, None, None, None] * outputs_BKCHW).sum(1))


def textbook(net: nn.Module) -> nn.Module:
    """`net` itself, with a `TextbookBlock` of the same weights in place of each expert block."""
    for name, child in net.named_children():
        setattr(net, name, TextbookBlock(child) if isinstance(child, ExpertBlock) else textbook(child))
    return net


class Cutout:
    """A square of `size` pixels of an image (C, H, W) set to zero, its centre anywhere in the image."""

    def __init__(self, size: int):
        self.size = size

    def __call__(self, x_CHW: Tensor) -> Tensor:
        top, left = (random.randrange(pixels) - self.size // 2 for pixels in x_CHW.shape[1:])
        x_CHW[:, max(0, top) : max(0, top + self.size), max(0, left) : max(0, left + self.size)] = 0
        return x_CHW


def baseline_transform(
    mean: tuple[float, ...],
    std: tuple[float, ...],
    image_size: tuple[int, int],
    crop_padding: int = 0,
    hflip: float = 0.0,
    cutout: int = 0,
) -> Callable[[Image.Image], Tensor]:
    """torchvision's transforms of a PIL image, in their usual order; those which are 0 are left out."""
    return transforms.Compose(
        [
            *[transforms.RandomCrop(image_size, padding=crop_padding)] * bool(crop_padding),
            *[transforms.RandomHorizontalFlip(hflip)] * bool(hflip),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
            *[Cutout(cutout)] * bool(cutout),
        ]
    )


class BaselineImages(Dataset):
    """Images (B, H, W, C) of uint8 as PIL images through a transform, with their labels: torchvision's CIFAR10."""

    def __init__(self, pixels_BHWC: Tensor, labels_B: Tensor, transform: Callable[[Image.Image], Tensor]):
        pixels_BHWC = pixels_BHWC.squeeze(3) if pixels_BHWC.shape[3] == 1 else pixels_BHWC
        self.pixels, self.labels, self.transform = pixels_BHWC.cpu().numpy(), labels_B.tolist(), transform

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index])

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.image(index)), self.labels[index]


@dataclass(frozen=True)
class Baseline:
    """A network (on the CPU) and how the baseline trains it, in rounds of `steps` steps."""

    net: nn.Module
    optimizer: Callable[[nn.Module], Optimizer]
    images: BaselineImages
    batch: int
    steps: int
    smoothing: float
    device: torch.device
    bfloat16: bool = False
    compiled: bool = False

    @property
    def channels_last(self) -> bool:
        """Whether its memory layout is not PyTorch's default, as it is not the plain one."""
        return self.bfloat16 or self.compiled

    def __str__(self) -> str:
        tuned = ", channels last" if self.channels_last else ""
        return f"{'bf16' if self.bfloat16 else 'fp32'}{tuned}, {'compiled' if self.compiled else 'eager'}"

    def in_own_process(self) -> AbstractContextManager[Callable[[], float]]:
        """A function that trains a round and returns its seconds.

        It trains in a process of its own, as the loop changes how its process allocates memory. That process and its
        workers run until the context is left. Errors of the training are raised here.
        """
        return answers("the PyTorch baseline", _begin, self)

    def rounds(self) -> Iterator[float]:
        """Trains a round for each `next`, and yields its seconds.

        One long epoch is drawn from the images, with replacement. An optimiser is set back to the implementation that
        PyTorch takes by itself.
        """
        net = copy.deepcopy(self.net).to(self.device).train()  # what arrived may be memory that two processes share
        if self.channels_last:
            net = net.to(memory_format=torch.channels_last)
        if self.compiled:
            net.compile(dynamic=False)
        optimizer = self.optimizer(net)
        for group in optimizer.param_groups:
            group |= {name: default for name, default in (("fused", None), ("capturable", False)) if name in group}
        workers = usable_cores()
        loader = DataLoader(
            self.images,
            self.batch,
            sampler=RandomSampler(self.images, replacement=True, num_samples=10**9),
            num_workers=workers,
            multiprocessing_context=multiprocessing.get_all_start_methods()[0],  # the system's; here it is spawn
            persistent_workers=True,
            pin_memory=self.device.type == "cuda",
            prefetch_factor=PREFETCHED,
        )
        criterion = nn.CrossEntropyLoss(label_smoothing=self.smoothing)
        batches = iter(loader)
        while True:
            for _ in range(batches_ahead()):
                next(batches)
            started = seconds(self.device)
            for x_BCHW, y_B in itertools.islice(batches, self.steps):
                x_BCHW, y_B = (x.to(self.device, non_blocking=True) for x in (x_BCHW, y_B))
                baseline_step(net, optimizer, criterion, x_BCHW, y_B, self.bfloat16)
            yield seconds(self.device) - started


def _begin(baseline: Baseline) -> Callable[[], float]:
    """In the process: a function that trains a round and returns its seconds."""
    signal.signal(signal.SIGTERM, _end)
    return partial(next, baseline.rounds())


def _end(*_: object) -> None:
    """Ends this process with its workers, which would print that nobody takes their batches."""
    for worker in multiprocessing.active_children():
        worker.kill()
    os._exit(1)


def baseline_step(
    net: nn.Module, optimizer: Optimizer, criterion: nn.Module, x_BCHW: Tensor, y_B: Tensor, bfloat16: bool = False
) -> Tensor:
    """One step of the textbook; returns its loss."""
    optimizer.zero_grad()
    with torch.autocast(x_BCHW.device.type, torch.bfloat16, enabled=bfloat16):
        loss = criterion(net(x_BCHW), y_B)
    loss.backward()
    optimizer.step()
    return loss.detach()
