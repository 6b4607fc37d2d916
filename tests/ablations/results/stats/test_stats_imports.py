"""Verdicts must come at once: what they import is small."""

import subprocess
import sys

CODE = """
import sys
from expertgrid.ablations.results.stats import contrasts, critical, factors, images, planning, race, selection

slow = {"torch", "pandas", "scipy.stats", "scipy.optimize", "expertgrid.ablations.study.study"}
print(sorted(slow & sys.modules.keys()))
"""


def test_verdicts_import_neither_torch_nor_the_slow_parts_of_scipy():
    assert subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True).stdout == "[]\n"
