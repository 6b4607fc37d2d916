"""What is written of a trial: its record, or why it failed; and the training speed of a study's cells."""

import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from expertgrid.model.system import machine
from expertgrid.model.training.metrics import Scale
from expertgrid.model.training.trial import Share

if TYPE_CHECKING:
    import torch


class Environment(BaseModel):
    """The machine, the software and the settings that a number was measured with.

    Records of older versions have no processor, cores, memory, driver and commit.
    """

    device: str  # that trained: the GPU's name, or cpu (the processor's model)
    threads: int  # of PyTorch on the CPU
    python: str
    versions: dict[str, str]
    cpu: str = ""  # the processor's model
    cores: int | None = None  # logical cores that the process could use
    memory_bytes: int | None = None  # physical memory of the machine; None where the system does not say
    driver: str | None = None  # version of the NVIDIA driver, for numbers of a CUDA device
    commit: str | None = None  # of the git checkout that expertgrid ran from, "+changes" where its files differ

    @classmethod
    def of_machine(cls, device: "torch.device") -> "Environment":
        """This machine, for numbers that are measured on `device`."""
        import torch

        versions = {}
        for package in ("expertgrid", "torch", "torchvision", "timm"):
            with suppress(PackageNotFoundError):  # expertgrid runs from a checkout too
                versions[package] = version(package)
        return cls(
            device=machine.device_name(device),
            threads=torch.get_num_threads(),
            python=platform.python_version(),
            versions=versions,
            cpu=machine.cpu_name(),
            cores=machine.usable_cores(),
            memory_bytes=machine.memory_bytes(),
            driver=machine.gpu_driver() if device.type == "cuda" else None,
            commit=machine.checkout_commit(),
        )


Split = Literal["validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)  # what every choice and verdict is made on, and what is reported
Count = Annotated[int, Field(ge=0, lt=2**63)]
Some = Annotated[int, Field(ge=1, lt=2**63)]
Speed = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Record(BaseModel):
    """The result of a trial: accuracies, losses, cost and speed.

    An accuracy is a share of the split's images, from 0 to 1. A loss is a mean cross entropy in nats. Both are of the
    network after the last epoch, in fp32. Validation images are those that the trial's seed holds out.
    """

    model_config = ConfigDict(extra="forbid")

    trial: str
    seed: Count
    validation_accuracy: Share
    validation_loss: float
    validation_images: Some
    test_accuracy: Share
    test_loss: float
    test_images: Some
    validation_accuracy_flip: Share | None = None  # with logits averaged over each image and its mirror image;
    test_accuracy_flip: Share | None = None  # only where the recipe's tta is "flip"
    validation_metrics: dict[str, float] = {}  # the others by name, where they are defined; none in older records
    test_metrics: dict[str, float] = {}
    parameters: Count
    macs: Count  # multiply-accumulates of one image's forward pass
    epochs: Count
    images_per_s: Speed  # while training: the median of the epochs after the first
    train_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]  # of all epochs, without validation
    bfloat16: bool  # whether the forward pass of the training ran in bfloat16
    products: bool = False  # and bfloat16 weight gradients of small maps were products: see model.fast.products
    kernels: bool = False  # whether it used the fused Triton kernels,
    compiled: bool = False  # the network or parts of it, by torch.compile,
    graphs: bool = False  # and steps recorded as CUDA graphs
    deterministic: bool = False  # and whether the same bits come again on a GPU (--deterministic)
    at_once: Some = 1  # trials that were trained at once: where it is more, the times are no speeds
    parts: dict[str, str] = {}  # the code of the user's: see model.training.parts.codes_of
    compile_seconds: float = 0.0  # before the first epoch, of kernels and the network; not part of train_seconds
    environment: Environment
    finished: str  # UTC, ISO 8601

    @property
    def execution(self) -> str:
        """How the steps ran, in words."""
        used = {"Triton kernels": self.kernels, "torch.compile": self.compiled, "CUDA graphs": self.graphs}
        return ", ".join(name for name, is_used in used.items() if is_used) or "eager"

    def metric(self, split: Split, name: str) -> float | None:
        """The value of a metric on a split, None where the record does not have it."""
        field = {"accuracy": f"{split}_accuracy", "cross_entropy": f"{split}_loss"}.get(name)
        return getattr(self, field) if field else getattr(self, f"{split}_metrics").get(name)

    def score(self, split: Split, scale: Scale) -> float:
        """The value of a metric that the record has, in percent where its unit is points."""
        value = self.metric(split, scale.name)
        assert value is not None, f"{self.trial} has no {scale.name}"
        if scale.name == "accuracy":  # exact: rounding, as older records have it, would look like a spread over seeds
            images = getattr(self, f"{split}_images")
            return 100 * round(value * images) / images
        return 100 * value if scale.unit == "points" else value


class Failure(BaseModel):
    """Why a trial failed.

    A diverged trial has the step, counted from 1 over all epochs, the epoch and the learning rate. A trial that ran out
    of memory has the batch size. One whose process crashed, or that took longer than --trial-timeout, has the steps
    that were done and where its process was.
    """

    kind: Literal["diverged", "out_of_memory", "crashed", "timeout", "error"] = "error"
    error: str
    traceback: str = ""  # is in a file of its own, and in failure.json of older versions
    time: str
    step: int | None = None
    epoch: int | None = None  # from 1
    lr: float | None = None  # of that step
    batch_size: int | None = None

    def __str__(self) -> str:
        return f"{self.kind}: {self.error}"


class Adopted(BaseModel):
    """Beside the record of a trial that was not trained here."""

    directory: str  # the name of the neighbouring study directory that it was taken over from
    time: str


class TrainingRates(BaseModel):
    """The training speed of the cells of a study, alone on the machine and in turns, by a trial of each."""

    device: str
    threads: int
    bfloat16: bool
    torch: str
    others_share: float | None = None  # of the processors' time, taken by other processes meanwhile
    finished: str
    images_per_s: dict[str, Speed]  # medians over the rounds
    rounds: dict[str, Annotated[list[Speed], Field(min_length=1)]]

    def __str__(self) -> str:
        busy = f", {self.others_share:.0%} of its processors taken by others" if self.others_share else ""
        number = "bf16" if self.bfloat16 else "fp32"
        return f"{self.device}, {self.threads} threads, {number}, torch {self.torch}{busy}"
