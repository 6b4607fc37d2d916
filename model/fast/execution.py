"""How the steps of a training run: with kernels of ours, compiled blocks, recorded graphs; and what is chosen when.

Kernels take the parts of a network that they compute, the compiler what is left of it, and a graph records the whole.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace

import torch
from torch.optim import Optimizer

from model.config import Block, ModelConfig
from model.errors import InputError, unknown
from model.fast import compiled
from model.fast.cuda_graphs import recordable

CHOICES = ("auto", "on", "off")
WORDS = {"kernels": "Triton kernels", "compile": "torch.compile", "graphs": "CUDA graphs"}
MOST_EXPERTS = 8  # that the kernels take: each is written out in them


def missing(what: str, device: torch.device) -> str | None:
    """What keeps `what` (of `WORDS`) from working on the device, None where nothing that can be seen does."""
    if what == "compile":
        return compiled.missing(device)
    if device.type != "cuda":
        return f"{WORDS[what]} are for CUDA, not for {device.type}"
    return compiled.missing(device) if what == "kernels" else None


def has_kernels(block: Block) -> bool:
    """Whether the kernels compute a block.

    Of experts with norm and activation of their own they take one kernel size, of those with a norm after the mix two.
    """
    most = {"expert": 1, "mix": 2, "none": 0}[block.norm_act]
    return len(set(block.kernels)) <= most and len(block.kernels) <= MOST_EXPERTS


@dataclass(frozen=True)
class Means:
    """What a training uses."""

    kernels: bool = False
    compile: bool = False
    graphs: bool = False

    def __str__(self) -> str:
        return ", ".join(WORDS[name] for name, used in asdict(self).items() if used) or "eager"


@dataclass(frozen=True)
class Execution:
    """What the user asked for: one of `CHOICES` for each of `WORDS`.

    With "auto", CUDA devices use kernels and graphs wherever a network and an optimiser have them, as neither has to
    compile a network; what the kernels leave is compiled where `compiled.earns` says so.
    """

    kernels: str = "auto"
    compile: str = "auto"
    graphs: str = "auto"

    def check(self, device: torch.device) -> None:
        """Raises InputError for a choice that there is not, and for "on" where something is missing."""
        for name, choice in asdict(self).items():
            if choice not in CHOICES:
                raise unknown(f"choice of --{name}", choice, CHOICES)
            if choice == "on" and (reason := missing(name, device)):
                raise InputError(f"--{name} on: {reason}; with auto or off, networks are trained without")

    def chosen(self, config: object, steps: int, device: torch.device, optimizer: Optimizer | None = None) -> Means:
        """The means of a training of so many steps. Graphs are chosen where its optimiser is given.

        What follows from the trial and the kind of device alone, so that a trial trained again is trained alike.
        """
        ours, on_cuda = isinstance(config, ModelConfig), device.type == "cuda"
        kernels = ours and (self.kernels == "on" or (self.kernels == "auto" and on_cuda))
        left = [block for block in config.blocks() if not (kernels and has_kernels(block))] if ours else []
        earned = self.compile == "auto" and compiled.earns(left, steps, compiled.device_kind(device))
        graphs = optimizer is not None and recordable(optimizer)
        return Means(
            kernels=kernels,
            compile=self.compile == "on" or earned,
            graphs=graphs and (self.graphs == "on" or (self.graphs == "auto" and on_cuda)),
        )

    def usable(self, chosen: Iterable[Means], device: torch.device) -> tuple["Execution", list[str]]:
        """This without what is in `chosen` and missing on the device; and of each such thing, what it is and why."""
        execution, chosen, without = self, list(chosen), []
        for name, words in WORDS.items():
            if any(getattr(means, name) for means in chosen) and (reason := missing(name, device)):
                without.append(f"{words}: {reason}")
                execution = replace(execution, **{name: "off"})
        return execution, without

    @classmethod
    def of(cls, means: Means) -> "Execution":
        """What asks for just these means."""
        return cls(**{name: "on" if used else "off" for name, used in asdict(means).items()})


PLAIN = Execution.of(Means())
