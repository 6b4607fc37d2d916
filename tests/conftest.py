"""Fixtures: data, a study of seconds, and the command line as a user calls it."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from ablations import cli
from ablations.data import ImageData, load_data

REPOSITORY = Path(__file__).parent.parent
CIFAR10_JPEG = REPOSITORY.parent / "shared" / "data" / "cifar10-jpeg"

TINY_STUDY = """
question = "Two experts or one?"
seeds = 2
[base]
model = "two_block"
recipe = "fast"
data = "digits"
[set]
width = 0.0625
"recipe.epochs" = 2
[factors]
experts = [1, 2]
gate = ["linear", "mlp"]
"""


@dataclass
class Outcome:
    """What a command left: its exit status, what it printed, and the lines of complaint among it."""

    status: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """The one line that says what is wrong."""
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.err
        assert "Traceback" not in self.err
        return lines[0]


@pytest.fixture
def expertgrid(monkeypatch, capsys):
    """Runs the command line in this process."""

    def call(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["expertgrid", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        captured = capsys.readouterr()
        return Outcome(int(exit.value.code or 0), captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def digits() -> ImageData:
    return load_data("digits")


@pytest.fixture
def tiny_study(tmp_path, monkeypatch) -> Path:
    """A study file in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.toml"
    path.write_text(TINY_STUDY)
    return path


@pytest.fixture(scope="session")
def trained_study(tmp_path_factory) -> Path:
    """The directory of the tiny study, trained once by the command line. Tests must leave it as it is."""
    place = tmp_path_factory.mktemp("trained")
    (place / "tiny.toml").write_text(TINY_STUDY)
    before, argv = Path.cwd(), sys.argv
    os.chdir(place)
    sys.argv = ["expertgrid", "run", "tiny.toml", "--device", "cpu"]
    try:
        with pytest.raises(SystemExit) as exit:
            cli.main()
    finally:
        os.chdir(before)
        sys.argv = argv
    assert not exit.value.code
    return place / "runs" / "tiny"
