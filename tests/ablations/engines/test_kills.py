"""A few random kills. `tests/ablations/engines/kills.py` does hundreds."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.skipif(sys.platform != "linux", reason="trainings are forks, whose CPU time is in /proc")
def test_random_kills_lose_nothing():
    line = [sys.executable, HERE / "kills.py", "4", "1"]
    done = subprocess.run(
        line, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(HERE.parents[2] / "src")}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    kills, saved, faults = map(int, re.findall(r"(\d+) (?:kills|with|faults)", done.stdout))
    assert kills >= 4 and saved >= 2 and faults == 0
