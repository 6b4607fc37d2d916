"""Kills trainings of one study with SIGKILL at random moments, and looks at what is left: kills.py [KILLS] [SEED].

Each training is a fork of this process, which has imported everything and computed nothing, so that a training begins
at once. It saves every 50 ms, so that kills hit all kinds of moments: between steps, within a save, while a record is
written. The moments are in CPU time, so that what else the machine does changes nothing. Prints a line, and exits with
1 where a finished trial was lost or trained again, or where a final table differs from that of the undisturbed study.
"""

import os

os.environ |= {"OMP_NUM_THREADS": "1", "EXPERTGRID_ISOLATE": "0"}

import json
import random
import signal
import sys
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from io import StringIO
from pathlib import Path

import expertgrid.ablations.cli.run
from expertgrid.ablations.cli.app import app
from expertgrid.ablations.engines.local import run_local
from expertgrid.ablations.records.directory import StudyDirectory
from expertgrid.ablations.results.report.plots import accuracy_figure, save
from expertgrid.ablations.results.rows import read_results
from expertgrid.model.system.files import write_whole
from expertgrid.model.training.data import load_data

STUDY = """
question = "What is left?"
seeds = 2
[base]
model = "two_block"
recipe = "fast"
data = "digits"
[set]
width = 0.0625
"recipe.epochs" = 12
"recipe.ema_decay" = 0.9
[factors]
experts = [1, 2]
"""
LONGEST_S = 2.0  # of CPU time from start to kill
MEASURED = ("training time", "train images/s")  # columns that differ from run to run


@dataclass
class Count:
    kills: int = 0
    studies: int = 0
    trials: int = 0  # finished
    resumed: int = 0  # kills after which a saved state was there
    faults: list[str] = field(default_factory=list)


def train(study: Path, out: Path) -> int:
    """Starts a training in a fork, and returns its process id."""
    if child := os.fork():
        os.setpgid(child, child)  # a group of its own, so that a kill reaches the processes that it starts
        return child
    status = 70
    try:
        os.setpgid(0, 0)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        expertgrid.ablations.cli.run.run_local = partial(run_local, save_every_s=0.05)
        status = app(["run", str(study), "--out", str(out), "--device", "cpu", "--no-adopt"], standalone_mode=False)
    finally:
        os._exit(status)


def cpu_seconds(process: int) -> float:
    """That a process of this one has used so far, or had used when it ended. In Linux."""
    user, system = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def finished(directory: StudyDirectory) -> dict[str, tuple[bytes, bytes, int]]:
    """The record and the checkpoint of each finished trial, and when the record was written."""
    return {
        file.parent.name: (
            file.read_bytes(),
            directory.checkpoint(file.parent.name).read_bytes(),
            file.stat().st_mtime_ns,
        )
        for file in sorted(directory.path.glob("trials/*/record.json"))
    }


def table(out: Path) -> object:
    """The study's tables, without what was measured in seconds."""
    printed = StringIO()
    with redirect_stdout(printed):
        app(["table", str(out), "--format", "json"], standalone_mode=False)
    return _without(json.loads(printed.getvalue()))


def _without(value: object) -> object:
    if isinstance(value, dict):
        return {key: _without(inner) for key, inner in value.items() if key not in MEASURED}
    return [_without(inner) for inner in value] if isinstance(value, list) else value


def kill_until(kills: int, seed: int) -> Count:
    """Kills so many trainings, study after study. Each study is killed until it is finished."""
    moments, count = random.Random(seed), Count()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        study = place / "kills.toml"
        write_whole(study, STUDY.encode())
        os.waitpid(train(study, place / "whole" / "undisturbed"), 0)
        undisturbed = StudyDirectory(place / "whole" / "undisturbed")
        expected, whole = table(undisturbed.path), finished(undisturbed)
        load_data("digits")  # this and the picture are imported here, and not in each fork
        save(accuracy_figure("", read_results(undisturbed).rows))
        while count.kills < kills:
            directory = StudyDirectory(place / f"{count.studies}" / "killed")  # without neighbours
            before: dict = {}
            while len(before) < len(whole):
                child = train(study, directory.path)
                until, ended, status = moments.uniform(0, LONGEST_S), 0, 0
                while not ended and cpu_seconds(child) < until:
                    ended, status = os.waitpid(child, os.WNOHANG)
                    time.sleep(0.002)
                if not ended:
                    os.killpg(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                    count.kills += 1
                    count.resumed += any(directory.path.glob("trials/*/resume.pt"))
                elif status:
                    count.faults.append(f"a training ended with {os.waitstatus_to_exitcode(status)}")
                after = finished(directory)
                count.faults += [f"trial {trial} was lost" for trial in before if trial not in after]
                count.faults += [
                    f"trial {trial} was trained again"
                    for trial, files in before.items()
                    if trial in after and after[trial] != files
                ]
                before = after
            if table(directory.path) != expected:
                count.faults.append(f"study {count.studies}: another table")
            if [weights for _, weights, _ in before.values()] != [weights for _, weights, _ in whole.values()]:
                count.faults.append(f"study {count.studies}: other weights")
            count.studies += 1
            count.trials += len(before)
    return count


if __name__ == "__main__":
    arguments = [int(word) for word in sys.argv[1:]]
    count = kill_until(*(arguments + [500, 0][len(arguments) :]))
    print(
        f"{count.kills} kills, {count.resumed} with a saved state; {count.studies} studies, {count.trials} trials "
        f"finished; {len(count.faults)} faults"
    )
    print("\n".join(count.faults))
    sys.exit(bool(count.faults))
