"""What a call would measure in how many minutes, simulated: the real order of steps on a clock that only counts.

    python -m bench.gpu schedule --faster 300

A training takes its operations over the rate at which trainings ran on a CPU, as the records of the kept studies say,
times a stated factor; and a few seconds besides, to build it, record its graphs and evaluate it. Other steps take the
seconds that `stages` expects of them.
"""

import io
import statistics
import tempfile
from collections import Counter
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tabulate import tabulate

from ablations.records import Record
from ablations.study import SHIPPED
from ablations.training.data import ImageData
from ablations.training.trial import Trial
from bench.gpu import stages
from bench.gpu.plan import Bench, Measurement, Size, Step
from bench.gpu.runner import Run
from bench.gpu.worker import TimeIsUp
from model.cost import cost
from model.errors import InputError

START_S = 15.0  # of a process: it imports PyTorch and starts CUDA
IMAGES, SIDE = 50_000, 32


def operations(trial: Trial, images: float) -> float:
    """Of a whole training: a step is the work of three forward passes, and a multiply-accumulate two operations."""
    recipe = trial.recipe
    sizes = (recipe.image_size(epoch, (SIDE, SIDE)) for epoch in range(recipe.epochs))
    return sum(3 * 2 * cost(trial.model, *size)[1] * images for size in sizes)


def recorded_rate(studies: Path = SHIPPED) -> float:
    """Operations a second of trainings on a CPU that had it alone: the median of the kept studies' records.

    Raises InputError where there are none.
    """
    rates = []
    for file in studies.glob("*/trials/*/record.json"):
        record = Record.model_validate_json(file.read_bytes())
        if record.at_once > 1:
            continue
        trial = Trial.model_validate_json((file.parent / "config.json").read_bytes())
        share = trial.hold_out.share
        rates.append(operations(trial, record.validation_images * (1 - share) / share) / record.train_seconds)
    if not rates:
        raise InputError(f"{studies}: has no records of trainings")
    return statistics.median(rates)


@dataclass
class Simulation:
    """A device and a clock: the seconds that each step takes there, and what was done when."""

    bench: Bench
    rate: float  # operations a second
    now: float = START_S
    done: list[tuple[float, str, str]] = field(default_factory=list)  # when, piece, and what
    whole: dict[str, dict[str, float]] = field(default_factory=dict)  # by step, seconds that each trial needs
    trained: dict[str, float] = field(default_factory=dict)  # seconds that each trial has had

    def __post_init__(self) -> None:
        self.data = ImageData.random(train=IMAGES, height=SIDE, width=SIDE)

    def clock(self) -> float:
        return self.now

    def measure(self, bench: Bench, step: Step, seconds: float) -> Measurement:
        """In place of the measurement: the clock goes on. Raises TimeIsUp where the step does not end in time."""
        if step.trainings is None:
            took, complete = step.expected_s, True
            if took > seconds:
                self.now += seconds
                raise TimeIsUp
        else:
            took, complete = self._train(step, seconds)
        self.now += took
        self.done.append((self.now, step.piece, step.name))
        return Measurement({}, complete)

    def _train(self, step: Step, seconds: float) -> tuple[float, bool]:
        """Trains the next trial of a study that is not done; the seconds that it took, and whether all are done."""
        assert step.trainings is not None
        if step.title not in self.whole:
            cells = step.trainings.asked(self.bench, step.trainings.seeds).cells(self.data)
            self.whole[step.title] = {
                trial.id: step.start_s + operations(trial, self.data.trained_on(trial.hold_out)) / self.rate
                for cell in cells
                for trial in cell.trials
            }
        whole = self.whole[step.title]
        pending = [trial for trial, needs in whole.items() if self.trained.get(trial, 0.0) < needs]
        took = min(whole[pending[0]] - self.trained.get(pending[0], 0.0), seconds) if pending else 0.0
        if pending:
            self.trained[pending[0]] = self.trained.get(pending[0], 0.0) + took
        return took, all(self.trained.get(trial, 0.0) >= needs for trial, needs in whole.items())


def simulate(minutes: float, faster: float, place: Path) -> tuple[Simulation, Run]:
    """What a call of so many minutes measures on a GPU whose trainings are `faster` than those of the records.

    The files of the pieces are written to `place`, as by a real call.
    """
    bench = Bench(place, torch.device("cuda"), "random", smoke=False, size=Size())
    simulation = Simulation(bench, faster * recorded_rate())
    run = Run(bench, stages.steps(bench), "schedule", {"device": "simulated"}, clock=simulation.clock)
    run.left_out = lambda piece, device: {}  # all works there
    run.go_on(minutes - simulation.now / 60, simulation.measure)
    return simulation, run


def show(minutes: float, faster: float) -> int:
    """Prints what is done in these minutes: each step with its end, and the pieces after each minute."""
    with tempfile.TemporaryDirectory() as place, redirect_stderr(io.StringIO()):
        simulation, run = simulate(minutes, faster, Path(place))
        missing = {name: run.missing(name) for name in run.pieces}
    print(f"Trainings {faster:g} times as fast as on the CPU of the records: {simulation.rate / 1e12:,.1f} TFLOP/s.\n")
    counts = Counter((piece, name) for _, piece, name in simulation.done)
    ends = {(piece, name): end for end, piece, name in simulation.done}
    rows = [
        {
            "step": f"{piece}: {name}",
            "measurements": counts[piece, name],
            "ends after min": f"{end / 60:.1f}",
            "": "goes on later" if name in missing[piece] else "",
        }
        for (piece, name), end in ends.items()
    ]
    print(tabulate(rows, headers="keys", disable_numparse=True))
    print()
    cuts = [cut(simulation, 60 * minute) for minute in range(1, int(minutes) + 1)]
    print(tabulate(cuts, headers="keys", disable_numparse=True))
    later = [f"{piece}: {name}" for piece, steps in missing.items() for name in steps]
    print(f"\nFor the next call: {', '.join(later) or 'nothing'}.")
    return 0


def cut(simulation: Simulation, seconds: float) -> dict[str, object]:
    """How many measurements each piece has where the call is cut off after so many seconds."""
    counts = Counter(piece for end, piece, _ in simulation.done if end <= seconds)
    return {"cut after min": f"{seconds / 60:g}"} | {piece: counts[piece] for piece in stages.PIECES}
