"""Many trials in one process: memory, open files and threads stay as they are."""

import sys
from pathlib import Path

import pytest

from expertgrid.ablations.engines.events import TrialDone
from expertgrid.ablations.engines.local import run_local
from expertgrid.ablations.records.directory import StudyDirectory
from expertgrid.ablations.study.study import Study

TRIALS, SETTLED = 300, 60  # after which caches are full
ME = Path("/proc/self")


def used() -> tuple[int, int, int]:
    """Bytes of memory, open files and threads."""
    pages = int((ME / "statm").read_text().split()[1])
    return 4096 * pages, len(list((ME / "fd").iterdir())), len(list((ME / "task").iterdir()))


@pytest.mark.nightly
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_many_trials_leave_nothing_in_their_process(digits, resident_digits, tmp_path):
    fields = {"width": 0.0625, "recipe.epochs": 1, "recipe.ema_decay": 0.9}
    study = Study(name="soak", question="?", seeds=TRIALS // 3, set=fields, factors={"experts": [1, 2, 3]})
    trials = [trial for cell in study.cells(digits) for trial in cell.trials]
    usages = []
    for event in run_local(trials, resident_digits, StudyDirectory(tmp_path), save_every_s=0):
        if isinstance(event, TrialDone):
            usages.append(used())
    assert len(usages) == TRIALS
    (memory, files, threads), (last_memory, last_files, last_threads) = usages[SETTLED], usages[-1]
    assert (last_files, last_threads) == (files, threads)
    assert last_memory < memory + 16 * 2**20, f"{(last_memory - memory) / 2**20:.1f} MiB in {TRIALS - SETTLED} trials"
    print(f"{memory / 2**20:.1f} MiB after {SETTLED} trials, {last_memory / 2**20:.1f} after {TRIALS}", usages[-1])
