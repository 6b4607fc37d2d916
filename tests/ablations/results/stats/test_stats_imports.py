"""Verdicts must come at once: what they import is small."""

import subprocess
import sys


def test_verdicts_import_neither_torch_nor_the_slow_parts_of_scipy():
    code = (
        "import sys\n"
        "from ablations.results.stats import contrasts, critical, factors, images, planning, race, selection\n"
        "print(sorted({'torch', 'pandas', 'scipy.stats', 'scipy.optimize', 'ablations.study'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
