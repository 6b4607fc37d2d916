"""What is measured on a GPU, as data: how much, in which steps, and what a step gives."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ablations.study import Base, Level, Study, load_study
from export.metadata import Precision
from model.fast.execution import ExecutionOptions
from model.presets import PRESETS

STEP_PRESET = "eight_block"
NETWORKS = ("speed", "accuracy")  # expertgrid's own


def matched_baselines(network: str) -> list[str]:
    """The presets that are a network's matched baselines, of equal parameters or of equal cost: NETWORK_..."""
    return [name for name in PRESETS if name.startswith(f"{network}_")]


def without_baselines() -> tuple[str, ...]:
    """All presets but the matched baselines, the one whose step is measured first."""
    matched = {name for network in NETWORKS for name in matched_baselines(network)}
    return (STEP_PRESET, *(name for name in PRESETS if name != STEP_PRESET and name not in matched))


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    check: Mapping[str, Any] = field(
        default_factory=lambda: {
            "preset": STEP_PRESET,
            "batch": 128,
            "size": 32,
            "width": 1.0,
            "steps": 10,
            "rounds": 3,
        }
    )
    presets: tuple[str, ...] = without_baselines()
    training: Mapping[str, Any] = field(default_factory=lambda: {"batch": 128, "steps": 100, "rounds": 5})
    stepped: tuple[str, ...] = (STEP_PRESET, "speed")  # whose step is measured: norms in the experts, after the mix
    step: Mapping[str, Any] = field(default_factory=lambda: {"batch": 128})
    at_once: Mapping[str, str] = field(default_factory=lambda: {"speed": "speed", "macro_residual": "fast_muon"})
    jobs: tuple[int, ...] = (1, 2, 4)  # trainings at once, of each network of `at_once` by its recipe
    execution: ExecutionOptions = ExecutionOptions()  # of trainings
    rounds: int = 5  # of the peaks
    peaks: Mapping[str, Any] = field(default_factory=lambda: {"measure_s": 1.0})
    settings: Mapping[str, Level] = field(default_factory=dict)  # of each study
    networks: Mapping[str, int] = field(default_factory=lambda: {"speed": 3, "accuracy": 2})  # with their first seeds
    baselines: bool = True  # the matched baselines are trained too
    seeds: int = 5  # of networks and baselines, in the end
    card: str | Study = "card"
    card_seeds: tuple[int, ...] = (3, 5)
    card_factors: tuple[str, ...] = ("experts", "residual", "gate", "cutout")
    references: str | Study = "references"
    reference_seeds: tuple[int, ...] = (1, 3)
    spread: str | Study = "spread"
    spread_seeds: int = 3
    served: tuple[str, ...] = (STEP_PRESET, *NETWORKS)  # whose latency is measured
    precisions: tuple[Precision, ...] = ("fp32", "fp16")
    batches: tuple[int, ...] = (1, 8, 64, 512, 2048)
    largest_on_cpu: int = 512
    measure_s: float = 1.0


SMOKE = Size(
    check={"preset": "two_block", "batch": 2, "size": 8, "width": 0.0625, "steps": 1, "rounds": 1},
    presets=("two_block",),
    training={"batch": 2, "steps": 1, "rounds": 1, "matrices": 64},
    stepped=(STEP_PRESET,),
    step={"batch": 2, "size": 8, "width": 0.0625, "steps": 1, "rounds": 1},
    at_once={"speed": "speed"},
    jobs=(2,),
    execution=ExecutionOptions(compile="off"),
    rounds=1,
    peaks={"measure_s": 0.01, "size": 64},
    settings={"width": 0.0625, "recipe.epochs": 1, "recipe.batch_size": 16},
    networks={"speed": 1},
    baselines=False,
    seeds=2,
    card=Study(name="card", question="One expert or two?", base=Base(model="two_block"), factors={"experts": [1, 2]}),
    card_seeds=(2,),
    card_factors=("experts",),
    references=Study(
        name="references",
        question="What do two references reach?",
        factors={"reference": ["two_block", "segmented"]},
        reported={"two_block": "80.68 (last epoch)", "segmented": "91.07"},
    ),
    reference_seeds=(1,),
    spread=Study(
        name="spread",
        question="What is an expert worth?",
        base=Base(model="two_block"),
        design="one_at_a_time",
        factors={"experts": [1]},
    ),
    spread_seeds=2,
    served=(STEP_PRESET,),
    precisions=("fp32",),
    batches=(1, 2),
    measure_s=0.01,
)


@dataclass
class Bench:
    """Where and how large the steps are measured, until when the present one may go on, and what is left out."""

    place: Path  # OUT/DEVICE-DATE
    device: torch.device
    data: str
    smoke: bool
    size: Size
    until: float = float("inf")  # of time.monotonic
    without: Mapping[str, str] = field(default_factory=dict)  # features of `model.fast.execution`, and why

    @property
    def work(self) -> Path:
        return self.place / "work"

    @property
    def execution(self) -> ExecutionOptions:
        """How trainings run: without what the check found not to work."""
        return replace(self.size.execution, **dict.fromkeys(self.without, "off"))


@dataclass(frozen=True)
class Measurement:
    """What a step measured, as JSON has it, and whether that is all of it."""

    value: Any
    complete: bool = True


@dataclass(frozen=True)
class Trainings:
    """A study that a step trains, one training at a time, so that a cut costs one training."""

    name: str  # of its directory in `work`
    study: str | Study
    seeds: int
    by: Sequence[str] = ()  # factors whose effects are asked for
    peek: bool = False  # whether it is asked what picking the best epoch would claim
    settings: Mapping[str, Level] = field(default_factory=dict)
    serves: bool = False  # whether its best checkpoint is kept for the export

    def asked(self, bench: Bench, seeds: int) -> Study:
        """The study with these seeds, on the data, at the size that is asked for. Raises InputError."""
        study = load_study(self.study) if isinstance(self.study, str) else self.study
        return study.change(seeds, bench.data, {**self.settings, **bench.size.settings})


@dataclass(frozen=True)
class Step:
    """A measurement that can be made apart from the others."""

    piece: str  # whose file it is in
    name: str
    limit_s: float  # after which it is ended; a training is saved then, and goes on
    measure: Callable[[Bench], Measurement]
    needs: tuple[str, ...] = ()  # features without which it is left out
    trainings: Trainings | None = None
    expected_s: float = 10.0  # on a GPU, without the trainings: an estimate for the schedule
    start_s: float = 0.0  # of the same, that each of its trainings takes besides its steps

    @property
    def title(self) -> str:
        return f"{self.piece}: {self.name}"
