"""--import: a user's own network, from a study to an exported file."""

import json
import subprocess
import sys

import onnx
import pytest

NETWORK = """
from timm.models import register_model
from torch import nn


class MyNet(nn.Module):
    def __init__(self, in_chans, num_classes):
        super().__init__()
        self.stem = nn.Conv2d(in_chans, 4, 3, padding=1)
        self.classifier = nn.Linear(4, num_classes)

    def forward(self, x_BCHW):
        return self.classifier(self.stem(x_BCHW).relu().mean((2, 3)))


@register_model
def NAME(pretrained=False, in_chans=3, num_classes=10, **kwargs):
    return MyNet(in_chans, num_classes)
"""
STUDY = """
question = "Is my network better?"
seeds = 1
[base]
model = "NAME"
[set]
"recipe.epochs" = 1
"""
ELSEWHERE = """
import sys
from expertgrid.ablations.cli.entry import main

for line in (["run", "mine.toml"], ["export", "runs/mine"]):
    sys.argv = ["expertgrid", *line]
    try:
        main()
    except SystemExit as exit:
        assert exit.code == 2
"""  # in an interpreter that did not import the network


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def test_a_network_of_a_module_is_trained_exported_and_timed(expertgrid, place):
    (place / "nets_of_mine.py").write_text(NETWORK.replace("NAME", "my_net"))
    (place / "mine.toml").write_text(STUDY.replace("NAME", "my_net"))
    brought = ["--import", "nets_of_mine"]
    listed = json.loads(expertgrid("list", "models", *brought, "--format", "json").out)
    assert [row["params"] for row in listed if row["model"] == "my_net"] == [(3 * 9 + 1) * 4 + (4 + 1) * 10]
    outcome = expertgrid("run", "mine.toml", *brought, "--device", "cpu")
    assert outcome.status == 0, outcome.err
    assert expertgrid("export", "runs/mine", *brought).status == 0
    file = place / "runs" / "mine" / "export" / "model-uint8.onnx"
    assert onnx.load(file).graph.node
    timed = json.loads(expertgrid("bench", file, "--batch", 1, "--format", "json", *brought).out)
    assert [row["engine"] for row in timed] == ["onnxruntime cpu", "pytorch eager cpu"]
    trial = next((place / "runs" / "mine" / "trials").iterdir()).name
    assert "The same: " in expertgrid("rerun", "runs/mine", trial, *brought, "--device", "cpu").out

    done = subprocess.run([sys.executable, "-c", ELSEWHERE], capture_output=True, text=True)
    complaints = done.stderr.splitlines()
    assert len(complaints) == 2, done.stderr
    for complaint in complaints:
        assert "model 'my_net'" in complaint
        assert complaint.endswith("--import MODULE registers networks")


@pytest.mark.parametrize(
    ("module", "text", "message"),
    [
        ("nowhere_at_all", "", "--import nowhere_at_all: there is no module nowhere_at_all in this directory"),
        ("broken_net", "import no_such_thing", "--import broken_net: ModuleNotFoundError: No module named 'no_such"),
        ("raising_net", "raise ValueError('first\\nsecond')", "--import raising_net: ValueError: first"),
        ("syntax_net", "def", "--import syntax_net: SyntaxError: "),
        ("leaving_net", "raise SystemExit(3)", "--import leaving_net: SystemExit: 3"),
        ("my-nets.py", "", "--import my-nets.py: the name of a module is needed"),
    ],
)
def test_a_module_that_fails_is_one_line(expertgrid, place, module, text, message):
    if text:
        (place / f"{module}.py").write_text(text)
    outcome = expertgrid("list", "models", "--import", module)
    assert (outcome.status, outcome.out) == (2, "")
    assert message in outcome.complaint
    assert "second" not in outcome.complaint


def test_a_study_file_imports_nothing(expertgrid, place):
    (place / "mine.toml").write_text('import = "nets"\n' + STUDY)
    assert "'import'" in expertgrid("run", "mine.toml").complaint


@pytest.mark.parametrize(("more", "status"), [([], 0), (["--import", "broken"], 2)])
def test_the_process_ends_without_freeing_its_modules(place, more, status):
    """What a module does at the end is done; what Python would free, one object after another, is left."""
    (place / "late.py").write_text(
        "import atexit\nclass Held:\n    def __del__(self):\n        print('freed')\n"
        "held = Held()\natexit.register(print, 'at the end')\n"
    )
    (place / "broken.py").write_text("1 / 0")
    line = [sys.executable, "-m", "expertgrid", "run", "quickstart", "--dry-run", "--import", "late", *more]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert done.stdout.endswith("at the end\n")
