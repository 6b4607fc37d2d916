"""Attacks on the command line: each ends as done, or in one line, in little time and memory.

25 in the usual run, and 5,000 in that of `-m nightly`; ATTACKS is another number for the latter.
"""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import attacks
import pytest
from PIL import Image

MOST_BYTES = 1_500_000_000
NIGHTLY = pytest.param(int(os.environ.get("ATTACKS", "5000")), marks=pytest.mark.nightly, id="nightly")


@pytest.fixture(scope="module")
def command(tmp_path_factory) -> Callable[..., dict]:
    """Runs a command in a folder, in a process of its own."""
    server = subprocess.Popen(
        [sys.executable, Path(__file__).with_name("commands.py")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert server.stdout.readline() == "ready\n"
    file = tmp_path_factory.mktemp("output") / "of_command"

    def run(folder: Path, *arguments: str) -> dict:
        server.stdin.write(json.dumps({"arguments": arguments, "folder": str(folder), "file": str(file)}) + "\n")
        server.stdin.flush()
        return json.loads(server.stdout.readline())

    with server:
        yield run
        server.stdin.close()


@pytest.fixture(scope="module")
def study(tmp_path_factory, command) -> Path:
    """A finished study with all that can be in its folder, beside its file and an image."""
    folder = tmp_path_factory.mktemp("attacked") / "whole"
    folder.mkdir()
    (folder / "s.toml").write_text(
        'question = "?"\nseeds = 2\n[base]\nmodel = "two_block"\n[set]\nwidth = 0.0625\n"recipe.epochs" = 1\n'
        "[factors]\nexperts = [1, 2]"
    )
    Image.new("L", (9, 9)).save(folder / "image.png")
    for words in ("run s.toml --out s --device cpu", "export s", f"bench {attacks.FILE} --batch 1 --seconds 0.01",
                  "bench-train s --steps 1 --rounds 1", "report s"):  # fmt: skip
        outcome = command(folder, *words.split())
        assert outcome["status"] == 0, outcome["err"]
    trial = next((folder / "s" / "trials").iterdir())
    (trial / "failure.json").write_text('{"kind": "error", "error": "?", "traceback": "", "time": ""}')
    (trial / "adopted.json").write_text('{"directory": "x", "time": ""}')
    return folder / "s"


def fault(outcome: dict) -> str:
    """What is wrong with how a command ended; "" for nothing."""
    lines = [line for line in outcome["err"].splitlines() if line.startswith("error: ")]
    if outcome["late"]:
        return "hang"
    if outcome["bytes"] > MOST_BYTES or outcome["status"] == -9:
        return "memory"
    if "Traceback" in outcome["err"] or outcome["status"] not in (0, 1, 2):
        return "traceback"
    if "[Errno" in outcome["err"] or len(lines) > 1 or (outcome["status"] == 2 and not lines):
        return "not one line"
    return ""


@pytest.mark.parametrize("count", [25, NIGHTLY])
def test_each_attack_ends_in_one_line(study, command, count, tmp_path):
    faults, folder = [], tmp_path / "here"
    for _, attack in zip(range(count), attacks.attacks(study, folder, seed=count)):
        outcome = command(folder, *attack.command)
        if kind := fault(outcome):
            faults.append((kind, attack, outcome["err"][-1000:]))
    shutil.rmtree(folder)
    assert not faults, f"{Counter(kind for kind, *_ in faults)}: {faults[:5]}"
