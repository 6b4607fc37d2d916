"""The training speed of each cell of a study, alone on the machine and in turns.

The speeds that a study's records have are those of whole trainings, hours apart, beside whatever else ran; of trials
that were trained at once they are no speeds at all.
"""

import dataclasses
import statistics
from collections.abc import Callable

import torch

from expertgrid.ablations.records.directory import StudyDirectory
from expertgrid.ablations.records.record import TrainingRates
from expertgrid.ablations.results.rows import read_results
from expertgrid.bench.host import watched
from expertgrid.bench.rounds import in_turns, rounds_of
from expertgrid.model.fast.execution import ExecutionOptions
from expertgrid.model.system.errors import InputError
from expertgrid.model.system.files import now
from expertgrid.model.system.machine import device_name
from expertgrid.model.training.data import ImageData


def measure_cells(
    directory: StudyDirectory,
    data: ImageData,
    device: torch.device,
    execution: ExecutionOptions,
    steps: int | None = None,
    rounds: int = 5,
    notice: Callable[[str], object] = lambda text: None,
) -> TrainingRates:
    """Trains each cell for `rounds` rounds of `steps` steps at full image size, in turns, after a round to warm up.

    `steps` is 4, or 100 on CUDA, where it is None. Raises InputError where no trial is finished.
    """
    steps = steps or (100 if device.type == "cuda" else 4)
    firsts = [row.records[0] for row in read_results(directory).rows if row.by_seed]  # others might crash or hang here
    trials = [(trial, record) for record in firsts if (trial := directory.config(record.trial))]
    if not trials:
        raise InputError(f"{directory.path}: no trial of this study is finished")
    ways, amp = {}, False
    with watched(device.type == "cuda") as host:
        for trial, record in trials:
            how = dataclasses.replace(execution.as_before(record.compiled), fp32=not record.bfloat16)
            ways[trial.id] = rounds_of(trial, data, device, how, steps, rounds, notice)
            amp |= record.bfloat16
        in_turns(ways, 1)
        seconds = in_turns(ways, rounds)
    sizes = {trial.id: trial.recipe.batch_size * steps for trial, _ in trials}
    rates = {trial: [sizes[trial] / round_s for round_s in rounds_s] for trial, rounds_s in seconds.items()}
    for text in host.notes():
        notice(text)
    return TrainingRates(
        device=device_name(device),
        threads=torch.get_num_threads(),
        bfloat16=amp,
        torch=torch.__version__,
        others_share=host.others_share,
        finished=now(),
        images_per_s={trial: statistics.median(of_rounds) for trial, of_rounds in rates.items()},
        rounds=rates,
    )
