"""--import: a user's own network, from a study to an exported file, beside files that have the names of our folders."""

import json
import subprocess
import sys

import onnx
import pytest

PART = """
import sys
from torch import nn

first = sys.path[0]


class Net(nn.Module):
    def __init__(self, in_chans, num_classes):
        super().__init__()
        self.stem = nn.Conv2d(in_chans, 4, 3, padding=1)
        self.classifier = nn.Linear(4, num_classes)

    def forward(self, x_BCHW):
        return self.classifier(self.stem(x_BCHW).relu().mean((2, 3)))
"""
NETWORK = """
from timm.models import register_model
from model import Net


@register_model
def my_net(pretrained=False, in_chans=3, num_classes=10, **kwargs):
    return Net(in_chans, num_classes)
"""
STUDY = """
question = "Is my network better?"
seeds = 1
[base]
model = "my_net"
[set]
"recipe.epochs" = 1
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with files that have names of ours and of Python's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    (tmp_path / "bench").mkdir()
    (tmp_path / "random.py").write_text("raise SystemExit('random.py of the user')")
    (tmp_path / "model.py").write_text(PART)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.mark.parametrize("brought", ["nets_of_mine", "nets/of_mine.py"])
def test_a_network_of_a_module_is_trained_exported_and_timed(expertgrid, place, brought):
    file = (place / brought).with_suffix(".py")
    file.parent.mkdir(exist_ok=True)
    (place / "model.py").rename(file.with_name("model.py"))
    file.write_text(NETWORK.replace("my_net", file.stem))
    (place / "mine.toml").write_text(STUDY.replace("my_net", file.stem))
    command = ["--import", brought]
    listed = json.loads(expertgrid("list", "models", *command, "--format", "json").out)
    assert sys.modules["model"].first == str(file.parent) == sys.path[-1]
    if brought.endswith(".py"):  # the rest has been seen for a name
        return
    assert [row["params"] for row in listed if row["model"] == file.stem] == [(3 * 9 + 1) * 4 + (4 + 1) * 10]
    outcome = expertgrid("run", "mine.toml", *command, "--device", "cpu")
    assert outcome.status == 0, outcome.err
    assert expertgrid("export", "runs/mine", *command).status == 0
    exported_file = place / "runs" / "mine" / "export" / "model-uint8.onnx"
    assert onnx.load(exported_file).graph.node
    timed = json.loads(expertgrid("bench", exported_file, "--batch", 1, "--format", "json", *command).out)
    assert [row["engine"] for row in timed] == ["onnxruntime cpu", "pytorch eager cpu"]
    trial = next((place / "runs" / "mine" / "trials").iterdir()).name
    assert "The same: " in expertgrid("rerun", "runs/mine", trial, *command, "--device", "cpu").out

    (place / "mine.toml").write_text(STUDY.replace("my_net", "no_net"))
    assert expertgrid("run", "mine.toml", "--out", "x").complaint.endswith("--import MODULE registers networks")


@pytest.mark.parametrize(
    ("module", "text", "message"),
    [
        ("nowhere_at_all", "", "--import nowhere_at_all: there is no module nowhere_at_all in /"),
        ("nets/nowhere.py", "", "--import nets/nowhere.py: there is no such file"),
        (
            "broken_net",
            "import no_such_thing",
            "--import broken_net: broken_net.py:1: ModuleNotFoundError: No module named 'no_such",
        ),
        (
            "raising_net",
            "raise ValueError('first\\nsecond')",
            "--import raising_net: raising_net.py:1: ValueError: first",
        ),
        ("syntax_net", "def", "--import syntax_net: SyntaxError: "),
        ("leaving_net", "raise SystemExit(3)", "--import leaving_net: leaving_net.py:1: SystemExit: 3"),
        ("my-nets", "", "--import my-nets: a module or its file is needed, as in my_net or nets/my_net.py"),
        ("random", "", "--import random: random is a module of Python's own; give yours another name"),
        ("./random.py", "", "--import ./random.py: random is a module of Python's own; give yours another name"),
        ("numpy", "", "--import numpy: is a module that expertgrid uses itself; it has no network of yours"),
        ("expertgrid", "", "--import expertgrid: is a module that expertgrid uses itself"),
        ("timm", "x = 1", "--import timm: the name timm is taken by /"),
    ],
)
def test_a_module_that_fails_is_one_line(expertgrid, place, module, text, message):
    if text:
        (place / f"{module}.py").write_text(text)
    outcome = expertgrid("list", "models", "--import", module)
    assert (outcome.status, outcome.out) == (2, "")
    assert message in outcome.complaint
    assert "second" not in outcome.complaint


CLASS = """
from torch import nn


class Plain(nn.Sequential):
    def __init__(self, width=4, **unused):
        super().__init__(nn.Conv2d(1, width, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


class Wide(Plain):
    def __init__(self, width):
        super().__init__(width)
"""


def test_a_class_is_a_network_by_its_name(expertgrid, place):
    """It gets the arguments that it takes, and no others; two of one name are told apart by nobody."""
    (place / "nets.py").write_text(CLASS)
    (place / "mine.toml").write_text(STUDY.replace("my_net", "Wide") + '[factors]\n"model.width" = [2, 3]\n')
    outcome = expertgrid("run", "mine.toml", "--import", "nets", "--device", "cpu", "--no-timing")
    assert outcome.status == 0, outcome.err
    records = [json.loads(file.read_text()) for file in place.glob("runs/mine/trials/*/record.json")]
    assert sorted(record["parameters"] for record in records) == [10 * w + 10 * w + 10 for w in (2, 3)]
    assert json.loads(expertgrid("list", "models", "--import", "nets", "--format", "json").out)[-1]["model"] == "Wide"
    assert expertgrid("publish", "runs/mine", "published", "--import", "nets").status == 0
    code = (place / "published" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    (place / "random.py").unlink()
    done = subprocess.run([sys.executable, "-c", f"{code}\nprint(type(net))"], capture_output=True, text=True)
    assert done.stdout == "<class 'nets.Wide'>\n", done.stderr

    def complaint(model: str, line: str = "", *modules: str) -> str:
        (place / "mine.toml").write_text(STUDY.replace("my_net", model) + line)
        imports = [word for module in ("nets", *modules) for word in ("--import", module)]
        return expertgrid("run", "mine.toml", *imports, "--out", "x", "--dry-run").complaint

    assert "missing 1 required positional argument: 'width'" in complaint("Wide")
    assert "unknown argument of Wide: 'wdth'; did you mean 'width'?" in complaint("Wide", '"model.wdth" = 2')
    (place / "others.py").write_text(CLASS)
    assert "model 'Plain': nets and others both have a class of this name" in complaint("Plain", "", "others")


def test_two_modules_of_one_name_are_one_line(expertgrid, place):
    for folder in ("a", "b"):
        (place / folder).mkdir()
        (place / folder / "net.py").write_text("")
    outcome = expertgrid("list", "models", "--import", "a/net.py", "--import", "b/net.py")
    assert (outcome.status, f"the name net is taken by {place / 'a'}" in outcome.complaint) == (2, True)


def test_the_process_ends_without_freeing_its_modules(place):
    """What a module does at the end is done; what Python would free, one object after another, is left.

    Python puts the working directory first on its path for `-m`, and its `random.py` is not run.
    """
    (place / "late.py").write_text(
        "import atexit\nclass Held:\n    def __del__(self):\n        print('freed')\n"
        "held = Held()\natexit.register(print, 'at the end')\n"
    )
    (place / "broken.py").write_text("1 / 0")
    line = [sys.executable, "-m", "expertgrid", "list", "models", "--import", "late", "--import", "broken"]
    done = subprocess.run(line, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "at the end\n"), done.stderr
