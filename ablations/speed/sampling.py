"""How long a study takes on this machine: by records, else by short trials of its networks. Imports no torch."""

import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event

import numpy as np
from rich.filesize import decimal

from expertgrid.ablations.engines.duration import TimeLeft, cell, in_time
from expertgrid.ablations.engines.events import TrialDone, TrialFailed
from expertgrid.ablations.engines.isolation import Setup, isolated
from expertgrid.ablations.records.directory import StudyDirectory
from expertgrid.bench.host import peak_bytes
from expertgrid.model.system.errors import InputError, reason_of
from expertgrid.model.training.data import Images

LIMIT_S, HANGS_S = 20.0, 60.0  # for all short trials; one that takes longer hangs
WORK, MOST_EPOCHS = 10**10, 20  # multiply-accumulates of a short trial, which has 3 epochs at least


def duration(left: TimeLeft, setup: Setup, studies: Path) -> list[str]:
    """How long the trials of `left` take that are trained by `setup`, and their memory, in words.

    The network with the most MACs is always trained, for its memory; the others where no study in a folder has records.
    """
    networks = {cell(trial): trial for trial in reversed(left.waiting.values())}
    largest, *others = sorted(networks, key=lambda of: -left.work[of])
    left.read_records(studies)
    missing = [of for first in range(4) for of in others[first::4] if of not in left.step_s]  # all sizes soon
    shorts, records, begun, peaks = [], len(left.step_s), time.monotonic(), [0]
    for seed, of in ((seed, of) for seed in range(left.slots) for of in (largest, *missing)):
        epochs = min(MOST_EPOCHS, max(3, WORK // left.work[of]))
        recipe = networks[of].recipe.model_copy(update={"epochs": epochs})
        shorts.append(networks[of].model_copy(update={"recipe": recipe, "weights": None, "seed": seed}))
    share = max(short.recipe.batch_size / left.trained_on(short.hold_out) for short in shorts)  # of a step
    parts = {name: _part(getattr(left.data, name), max(1, int(0.9 / share))) for name in ("train", "test")}
    data, stopped = replace(left.data, **parts), Event()
    trained, start_s = TimeLeft(shorts, data, left.slots), 0.0  # until a process trains
    try:
        with TemporaryDirectory() as folder, isolated(left.slots, setup.device) as pool:
            setup = replace(setup, data=data, directory=Path(folder), threads=pool.threads)
            for event in pool.run(shorts, setup, StudyDirectory(Path(folder)), stopped, HANGS_S):
                trained.take(event)
                start_s = start_s or time.monotonic() - begun
                if isinstance(event, TrialFailed) and not trained.step_s:
                    raise InputError(event.reason)
                if isinstance(event, TrialDone | TrialFailed):
                    peaks += [peak_bytes(Path(f"/proc/{of.process.pid}/status")) or 0 for of in pool.trainers]
                over = time.monotonic() > begun + LIMIT_S
                if len(peaks) > 1 and (over or trained.step_s.keys() >= {largest, *missing}):
                    stopped.set()
                    break
    except Exception as error:  # a user's network may fail in any way, and so may a process
        return [f"Time: not known, as a short trial failed: {reason_of(error)}."]
    left.step_s.update(trained.step_s)
    left.begun, took_s = left.clock(), time.monotonic() - begun
    whole_s = start_s + (left.left_s() or 0.0)
    at_once = f"{left.slots} trials at once" if left.slots > 1 else "one trial at a time"
    after = in_time(left.timing(whole_s)[1] + left.after_s)
    splits = [left.data.train.pixels_BHWC, left.data.test.pixels_BHWC]
    images = sum(of.nbytes * (1 if isinstance(of, np.memmap) else 1 + left.slots) for of in splits)  # one map for all
    return [
        f"Time: about {in_time(whole_s)} with {at_once} on this {setup.device}, {after} of it after the last trial; "
        f"known by records of {records} networks and short trials of {len(trained.step_s)}, which took "
        f"{in_time(took_s)}.",
        f"Memory: about {decimal(left.slots * max(peaks) + images)} at the peak.",
    ]


def _part(images: Images, each: int) -> Images:
    """One in so many images, so that all classes are there."""
    return Images(images.pixels_BHWC[::each], images.labels_B[::each])
