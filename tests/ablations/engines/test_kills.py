"""A few random kills. `tests/ablations/kills.py` does hundreds."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.skipif(not hasattr(os, "fork"), reason="trainings are forks")
def test_random_kills_lose_nothing():
    line = [sys.executable, HERE / "kills.py", "6", "1"]
    done = subprocess.run(
        line, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(HERE.parents[2] / "src")}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    kills, saved, faults = map(int, re.findall(r"(\d+) (?:kills|with|faults)", done.stdout))
    assert kills >= 6 and saved >= 3 and faults == 0
