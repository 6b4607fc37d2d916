"""timm's own `train.py`, of a check-out, as one more way to train a network of timm."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from expertgrid.bench.baseline import Baseline, BaselineImages, batches_ahead
from expertgrid.model.config import Network, TimmModel
from expertgrid.model.registry import is_users
from expertgrid.model.system.errors import InputError
from expertgrid.model.system.machine import usable_cores


def timm_network(folder: Path, network: Network) -> TimmModel:
    """The network, if `train.py` of `folder` has it. Raises InputError for another, or where there is no `train.py`."""
    if not (folder / "train.py").is_file():
        raise InputError(f"--peer {folder}: has no train.py: it is to be a check-out of timm's repository")
    if not isinstance(network, TimmModel) or is_users(network):
        raise InputError("--peer: timm's train.py has the networks of timm alone")
    return network


@contextmanager
def timm_script(folder: Path, network: TimmModel, baseline: Baseline, rounds: int) -> Generator[Callable[[], float]]:
    """A function that lets `train.py` of `folder` train a round as the baseline does, and returns its seconds.

    It is called `rounds` times at most, and the script is stopped between two calls. It reads the baseline's images
    from PNG files, and does not augment them. Before the clock of a round starts, it uses up what its workers prepared.
    Raises InputError with its last line where it ends.
    """
    images, ahead = baseline.images, batches_ahead()
    arguments = [f"{name}={value!r}" for name, value in network.arguments.items()]
    with tempfile.TemporaryDirectory(prefix="expertgrid-timm-") as place:
        _write(images, Path(place, "train"), baseline.batch * (rounds + 1) * (baseline.steps + ahead + 1))
        command = [
            sys.executable, folder.resolve() / "train.py", "--data-dir", place, "--val-split", "train",
            "--output", place, "--device", baseline.device,
            "--model", network.timm, "--num-classes", network.num_classes,
            "--input-size", network.in_chans, *images.pixels.shape[1:3], "--batch-size", baseline.batch,
            *["--model-kwargs"] * bool(arguments), *arguments,
            "--workers", usable_cores(), "--smoothing", baseline.smoothing, "--opt", "sgd", "--lr", "0.01",
            "--epochs", "1", "--no-aug", "--log-interval", "1",
            *["--amp", "--amp-dtype", "bfloat16"] * baseline.bfloat16,
            *["--channels-last"] * baseline.channels_last, *["--torchcompile"] * baseline.compiled,
        ]  # fmt: skip
        with subprocess.Popen(
            [str(word) for word in command],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            cwd=place,
        ) as process:
            assert process.stderr is not None  # PIPE
            lines = iter(process.stderr)
            try:
                take_round = partial(_round, process.pid, lines, ahead, baseline.steps)
                take_round()  # until the script is stopped, it trains ahead
                yield take_round
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


def _write(images: BaselineImages, folder: Path, count: int) -> None:
    """So many image files in folders of their classes. Each image is one file with several names."""
    for i in range(count):
        place = folder / str(images.labels[i % len(images)])
        place.mkdir(parents=True, exist_ok=True)
        if i < len(images):
            images.image(i).save(place / f"{i}.png")
        else:
            os.link(place / f"{i % len(images)}.png", place / f"{i}.png")


def _round(group: int, lines: Iterator[str], ahead: int, steps: int) -> float:
    """Lets the script's processes go on until `steps` more are logged after `ahead`. Returns their seconds."""
    os.killpg(group, signal.SIGCONT)
    started, line = 0.0, ""
    for step in range(ahead + steps + 1):
        for line in lines:
            if line.startswith("Train:"):
                break
        else:
            raise InputError(f"--peer: train.py ended: {line.strip()}")
        if step == ahead:
            started = time.perf_counter()
    took = time.perf_counter() - started
    os.killpg(group, signal.SIGSTOP)
    return took
