"""In which precision the trials of a study train whose recipes leave it open, measured once for a study and device.

Bfloat16 is usually faster where the processor computes it, and on CPUs not always: small maps and weights that are cast
in each step can make it slower. All cells train in one precision, as it may change what they reach.
"""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial

import torch

from expertgrid.bench.rounds import in_turns, rounds_of
from expertgrid.model.cost import cost
from expertgrid.model.fast.execution import EAGER
from expertgrid.model.system.machine import computes_bfloat16
from expertgrid.model.system.processes import answers
from expertgrid.model.training.data import ImageData
from expertgrid.model.training.prepare import planned_steps
from expertgrid.model.training.trial import Trial

NETWORKS, STEPS, ROUNDS = 4, 2, 3  # networks at most, steps of a round, and rounds after one that is not counted
FASTER = 1.1  # times as fast fp32 must be at least: what is measured has noise
LONG = 2e13  # operations of a training that takes at least a minute on two cores with AVX-512


def networks_to_time(trials: Iterable[Trial], data: ImageData, device: torch.device) -> list[Trial]:
    """A trial of each network with the most work, none where all are short, or not on a CPU that computes bfloat16.

    Timing them takes less than a tenth of one of these trainings.
    """
    if device.type != "cpu" or not computes_bfloat16(device):
        return []
    networks = {trial.model: trial for trial in trials if trial.recipe.amp == "auto"}.values()
    steps = {trial: planned_steps(trial, data.trained_on(trial.hold_out)) for trial in networks}
    work = {
        trial: 6 * cost(trial.model, *data.image_size)[1] * trial.recipe.batch_size * steps[trial] for trial in networks
    }
    longest = sorted((trial for trial in work if work[trial] >= LONG), key=work.__getitem__)[-NETWORKS:]
    timed_steps = 2 * STEPS * (ROUNDS + 1) * 10  # of one network, to be less than a tenth
    return longest[: min((steps[trial] for trial in longest), default=0) // timed_steps]


def fp32_is_faster(trials: Sequence[Trial], data: ImageData, register: Callable[[], object]) -> bool:
    """`time_both` on the CPU in a process of its own, which first calls `register` for the user's networks.

    Raises the networks' errors, and ProcessLost where one crashes the process.
    """
    with answers("the networks that are timed", _begin, trials, data, register) as ask:
        return ask()


def _begin(trials: Sequence[Trial], data: ImageData, register: Callable[[], object]) -> Callable[[], bool]:
    register()
    return partial(time_both, trials, data)


def time_both(trials: Sequence[Trial], data: ImageData) -> bool:
    """Whether the whole trainings of these trials would be faster in fp32 on the CPU, by steps in turns."""
    ways = {
        (trial, fp32): rounds_of(trial, data, torch.device("cpu"), replace(EAGER, fp32=fp32), STEPS, ROUNDS)
        for trial in trials
        for fp32 in (False, True)
    }
    in_turns(ways, 1)
    whole_s = {False: 0.0, True: 0.0}
    for (trial, fp32), seconds in in_turns(ways, ROUNDS).items():
        steps = max(1, planned_steps(trial, data.trained_on(trial.hold_out)))
        whole_s[fp32] += steps * statistics.median(seconds)
    return whole_s[True] * FASTER < whole_s[False]
