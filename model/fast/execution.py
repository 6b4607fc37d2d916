"""How training steps are executed: what the user asks for, and what a training then uses.

There are three features. Fused Triton kernels compute the parts of a network that they support. torch.compile compiles
the other blocks, or a whole network that is not ours. CUDA graphs record the whole step. Importing it imports no torch:
the options are plain data.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from expertgrid.model.config import ModelConfig
from expertgrid.model.system.errors import InputError, unknown

if TYPE_CHECKING:
    import torch
    from torch.optim import Optimizer

CHOICES = ("auto", "on", "off")
LABELS = {"kernels": "Triton kernels", "compile": "torch.compile", "graphs": "CUDA graphs"}  # of the features


def why_unavailable(feature: str, device: "torch.device") -> str | None:
    """The reason why a feature (a key of `LABELS`) cannot work on the device; None where no reason is found."""
    from expertgrid.model.fast import compiled

    if feature == "compile":
        return compiled.why_unavailable(device)
    if device.type != "cuda":
        return f"{LABELS[feature]} are for CUDA, not for {device.type}"
    return compiled.why_unavailable(device) if feature == "kernels" else None


@dataclass(frozen=True)
class ExecutionPlan:
    """The features that a training uses."""

    kernels: bool = False
    compile: bool = False
    graphs: bool = False

    def __str__(self) -> str:
        return ", ".join(LABELS[name] for name, used in asdict(self).items() if used) or "eager"


@dataclass(frozen=True)
class ExecutionOptions:
    """What the user asks for: one of `CHOICES` for each feature.

    With "auto", kernels and graphs are used on CUDA wherever the network and the optimiser support them. In long
    trainings on a CPU, and those of networks that are not ours on CUDA, a network is compiled where
    `compiled.is_faster` says so.
    """

    kernels: str = "auto"
    compile: str = "auto"
    graphs: str = "auto"
    fp32: bool = False  # of recipes that leave the precision to us: faster for the study than bfloat16

    def check(self, device: "torch.device") -> None:
        """Raises InputError for an unknown choice, and for "on" where the feature cannot work on the device."""
        for name in LABELS:
            if (choice := getattr(self, name)) not in CHOICES:
                raise unknown(f"choice of --{name}", choice, CHOICES)
            if choice == "on" and (reason := why_unavailable(name, device)):
                raise InputError(f"--{name} on: {reason}; with auto or off, networks are trained without")

    def plan(
        self, config: object, steps: int, device: "torch.device", optimizer: "Optimizer | None" = None
    ) -> ExecutionPlan:
        """The plan for a training of so many steps. It has graphs only where the optimiser is given.

        It depends on the trial and the kind of device alone, but for `compile`: what `is_faster` measures is kept with
        the trial, so that a repeated trial is trained in the same way.
        """
        from expertgrid.model.fast import compiled
        from expertgrid.model.fast.cuda_graphs import recordable

        on_cuda, ours = device.type == "cuda", isinstance(config, ModelConfig)
        measured = steps >= compiled.LEAST_STEPS and (device.type == "cpu" or not ours)
        graphs = optimizer is not None and recordable(optimizer)
        return ExecutionPlan(
            kernels=ours and (self.kernels == "on" or (self.kernels == "auto" and on_cuda)),
            compile=self.compile == "on" or (self.compile == "auto" and measured),
            graphs=graphs and (self.graphs == "on" or (self.graphs == "auto" and on_cuda)),
        )

    def usable(self, plans: Iterable[ExecutionPlan], device: "torch.device") -> tuple["ExecutionOptions", list[str]]:
        """These options with each feature off that a plan has and that cannot work on the device.

        Also returns one line for each such feature: its name and the reason.
        """
        options, plans, without = self, list(plans), []
        for name, label in LABELS.items():
            if any(getattr(plan, name) for plan in plans) and (reason := why_unavailable(name, device)):
                without.append(f"{label}: {reason}")
                options = replace(options, **{name: "off"})
        return options, without

    def as_before(self, compiled: bool) -> "ExecutionOptions":
        """These options for a trial for which it was measured before whether compiling pays."""
        return replace(self, compile="on" if compiled else "off") if self.compile == "auto" else self

    @classmethod
    def requiring(cls, plan: ExecutionPlan, fp32: bool = False) -> "ExecutionOptions":
        """The options that ask for exactly this plan."""
        return cls(**{name: "on" if used else "off" for name, used in asdict(plan).items()}, fp32=fp32)


EAGER = ExecutionOptions.requiring(ExecutionPlan())
