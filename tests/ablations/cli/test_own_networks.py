"""A user's own network: its code is part of what a trial is, and a changed one is never averaged with the old one."""

import json
import re
import shutil
import sys

import pytest
import timm
from conftest import REPOSITORY, change_json, snapshot, write_latency

from expertgrid.ablations.cli.plan import plan_run, read_request
from expertgrid.ablations.cli.sources import import_modules
from expertgrid.ablations.engines.events import Stopped, TrialNote
from expertgrid.ablations.engines.local import run_local
from expertgrid.ablations.records.directory import StudyDirectory
from expertgrid.ablations.results.rows import read_results
from expertgrid.model.system.errors import InputError
from expertgrid.model.variants import SHIPPED, VARIANTS

NETWORK = """
import torch
from torch import nn
from timm.layers import DropPath
from timm.models import build_model_with_cfg, register_model


class Block(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, stride=1, padding=1, padding_mode="zeros", bias=False)
        self.norm = nn.BatchNorm2d(4, eps=1e-5, momentum=0.1)
        self.act = {"relu": nn.ReLU, "gelu": nn.GELU}[act]()
        self.drop_path = DropPath(0.1)

    def forward(self, x):
        return x + self.drop_path(self.act(self.norm(self.conv(x))))


class Net(nn.Module):
    def __init__(self, in_chans=3, num_classes=10, depth=1, act="relu", use_se=False):
        super().__init__()
        self.stem = nn.Conv2d(in_chans, 4, 3, padding=1)
        self.blocks = nn.Sequential(*[Block(act) for _ in range(depth)])
        self.se = nn.Linear(4, 4) if use_se else nn.Identity()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(4, num_classes)
        nn.init.normal_(self.head.weight, std=0.1)

    def forward(self, x):
        return self.head(self.drop(self.se(self.pool(self.blocks(self.stem(x))).flatten(1))))


@register_model
def my_net(pretrained=False, **kwargs):
    return build_model_with_cfg(Net, "my_net", pretrained, **kwargs)
"""
CHANGES = {  # of the code, and whether it makes other ids
    "activation": ('"relu": nn.ReLU', '"relu": nn.SiLU', False),
    "order of layers": ("self.act(self.norm(self.conv(x)))", "self.norm(self.act(self.conv(x)))", False),
    "dropped residual": ("return x + ", "return ", False),
    "initialisation": ("std=0.1", "std=0.11", False),
    "stride": ("4, 3, padding=1)", "4, 3, padding=1, stride=2)", True),
    "epsilon of the norm": ("eps=1e-5", "eps=1e-4", False),
    "momentum of the norm": ("momentum=0.1", "momentum=0.11", False),
    "dropout rate": ("Dropout(0.2)", "Dropout(0.21)", False),
    "kind of pooling": ("AdaptiveAvgPool2d", "AdaptiveMaxPool2d", False),
    "bias": ("bias=False", "bias=True", True),
    "kernel size": ("nn.Conv2d(4, 4, 3, stride=1, padding=1", "nn.Conv2d(4, 4, 5, stride=1, padding=2", True),
    "padding mode": ('"zeros"', '"reflect"', False),
    "drop path": ("DropPath(0.1)", "DropPath(0.11)", False),
    "frozen layer": ("        self.drop = ", "        self.stem.requires_grad_(False)\n        self.drop = ", False),
    "dead at the start": ("nn.init.normal_(self.head.weight, std=0.1)", "nn.init.zeros_(self.head.weight)", False),
}
pytestmark = pytest.mark.filterwarnings("ignore:Overwriting my_net in registry")
STUDY = """
question = "Which activation?"
seeds = 1
[base]
model = "my_net"
[set]
"recipe.epochs" = 1
[factors]
"model.act" = ["relu", "gelu"]
"""
RUN = ("run", "mine.toml", "--import", "my_net", "--device", "cpu")


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A working directory with the network and the study."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "mine.toml").write_text(STUDY)
    write()
    yield tmp_path
    sys.modules.pop("my_net", None)
    for name in VARIANTS.keys() - set(SHIPPED):
        del VARIANTS[name]


def write(*change: str, file: str = "my_net.py") -> None:
    """Writes the module with its code changed; the next command imports it anew."""
    code = NETWORK.replace(*change) if change else NETWORK
    assert bool(change) == (code != NETWORK)
    with open(file, "w") as module:
        module.write(code)
    sys.modules.pop("my_net", None)


def planned():
    import_modules(["my_net"])
    planned = plan_run(read_request("mine.toml", None, None, None, {}, None, None, None), None)
    planned.check_directory()
    return planned


def ids() -> list[str]:
    return [trial.id for cell in planned().cells for trial in cell.trials]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return tmp_path_factory.mktemp("trained")


@pytest.fixture
def study(expertgrid, place, trained) -> StudyDirectory:
    """The study as it was trained by the code above."""
    if not (trained / "runs").exists():
        outcome = expertgrid(*RUN)
        assert outcome.status == 0, outcome.err
        shutil.copytree("runs", trained / "runs")
    else:
        shutil.copytree(trained / "runs", "runs")
    return StudyDirectory(place / "runs" / "mine")


@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_network_is_not_the_old_one(study, what):
    old, new, other_ids = CHANGES[what]
    write(old, new)
    if other_ids:
        assert not set(ids()) & set(study.read_plan().trials)
    else:
        with pytest.raises(InputError, match="finished trials are of other code than my_net has now"):
            ids()


def test_code_that_computes_the_same_is_the_same(study):
    write("x + self.drop_path(self.act", "x + 1.0 * self.drop_path(self.act")
    assert ids() == study.read_plan().trials


def test_a_corrected_cell_costs_that_cell_alone(expertgrid, study):
    relu, gelu = ids()
    write('"relu": nn.ReLU', '"relu": nn.LeakyReLU')
    kept = snapshot(study.path)
    complaint = expertgrid(*RUN).complaint
    assert "1 finished trials are of other code than my_net has now (cells: model.act relu; " in complaint
    assert "expertgrid retire runs/mine --import MODULE" in complaint.replace(str(study.path), "runs/mine")
    assert snapshot(study.path) == kept
    assert "other code" in expertgrid("rerun", study.path, relu, "--import", "my_net").complaint
    assert expertgrid("verify", study.path, "--import", "my_net").status == 1
    outcome = expertgrid(*RUN, "--out", "runs/fresh")  # takes over the cell whose code is the same
    assert "taken over from" in outcome.err and "mine: 1 trials" in outcome.err.replace("\n", "")
    fresh = StudyDirectory(study.path.parent / "fresh")
    assert (fresh.adopted(relu), fresh.adopted(gelu).directory) == (None, "mine")

    write_latency(study.path, relu, 1.0)
    retired = expertgrid("retire", study.path, "--import", "my_net")
    assert f"moved: trials/{relu} to retired/{relu}; outputs in training differ" in retired.out
    assert (study.record(relu), study.record(gelu).trial) == (None, gelu)
    moved = {file.name for file in (study.path / "retired" / relu).iterdir()}
    assert moved >= {"record.json", "network.json", f"{relu}-2026-01-01.json"}
    assert "1 of them done before" in expertgrid(*RUN, "--no-adopt").err
    assert expertgrid("verify", study.path, "--import", "my_net").status == 0
    assert "2 trials: their networks were not run" in verify_without(expertgrid, study)
    assert expertgrid("check", study.path).status == 0


def verify_without(expertgrid, study) -> str:
    from timm.models import _registry

    entry = _registry._model_entrypoints.pop("my_net")
    try:
        outcome = expertgrid("verify", study.path)
    finally:
        _registry._model_entrypoints["my_net"] = entry
    assert outcome.status == 0, outcome.out + outcome.err
    return outcome.out


def test_records_of_different_code_are_not_averaged(expertgrid, study):
    (study.path.parent / "two.toml").write_text(STUDY)
    expertgrid(*RUN, "--out", "runs/two", "--seeds", 2)
    two = StudyDirectory(study.path.parent / "two")
    plan = two.read_plan()
    old, new = plan.cells[0].trials
    file = two.trial(old) / "network.json"
    values = json.loads(file.read_text())["values"]
    values["outputs in training"][0] *= 1.001
    change_json(file, values=values)
    change_json(two.trial(new) / "record.json", finished="2999-01-01T00:00:00+00:00")
    row = read_results(two).rows[0]
    assert ([record.trial for record in row.records], row.other_code) == ([new], (old,))
    table = expertgrid("table", two.path, "--notes").out
    assert f"other code trained them than the newest trial of model.act relu: {old}" in table
    assert "is not that of SHA256SUMS" in expertgrid("check", two.path).out or expertgrid("check", two.path).status == 1


def test_a_stopped_training_goes_on_with_the_same_code_alone(resident_digits, place):
    trial, directory = planned().cells[0].trials[0], StudyDirectory(place / "stopped")

    def notes(last_step: int) -> list[str]:
        texts = []
        with pytest.raises(Stopped):
            for event in run_local([trial], resident_digits, directory, stop=lambda step: step == last_step):
                texts += [event.text] if isinstance(event, TrialNote) else []
        return texts

    assert notes(1) == notes(2) == []
    write("momentum=0.1", "momentum=0.2")
    import_modules(["my_net"])
    assert notes(1) == ["trained from the start, because the code of its network was changed"]
    assert notes(2) == []


def test_factors_that_change_nothing_are_said(expertgrid, place):
    write("nn.GELU", "nn.ReLU")
    (place / "mine.toml").write_text(STUDY + '"model.depth" = [1, 2]\n')
    out = expertgrid(*RUN, "--dry-run").out
    assert "model.act changes nothing" in out and "model.depth changes nothing" not in out
    drop_path = STUDY.replace("my_net", "resnet10t").replace("model.act", "model.drop_path_rate")
    (place / "mine.toml").write_text(drop_path.replace('["relu", "gelu"]', "[0.0, 0.1]"))
    out = expertgrid(*RUN, "--dry-run").out
    assert "resnet10t" in out and "changes nothing" not in out


@pytest.mark.parametrize(
    ("model", "line", "message"),
    [
        (
            "my_net",
            '"model.dpth" = 2',
            "unknown argument of my_net: 'dpth'; did you mean 'depth'? Accepted: depth, act, use_se",
        ),
        ("my_net", '"model.depth" = "two"', 'model.depth = "two": my_net does not take it: TypeError'),
        ("my_net", '"model.act" = "swish"', "model.act = \"swish\": my_net does not take it: KeyError: 'swish'"),
        ("my_net", '"model.pretrained" = true', "pretrained cannot be set: `weights` says"),
        ("resnet10t", '"model.drop_pth_rate" = 0.1', "did you mean 'drop_path_rate'?"),
        ("resnet10t", '"model.drop_path_rate" = "high"', 'model.drop_path_rate = "high": resnet10t does not take it'),
        ("resnet10t", '"model.features_only" = true', "features_only cannot be set: a study trains classifiers"),
    ],
)
def test_arguments_that_cannot_be_are_one_line(expertgrid, place, model, line, message):
    (place / "mine.toml").write_text(STUDY.split("[factors]")[0].replace("my_net", model) + line)
    outcome = expertgrid(*RUN, "--dry-run")
    assert (outcome.status, message in outcome.complaint) == (2, True), outcome.complaint


def test_the_readme_s_network_and_variant(expertgrid, place):
    """Trained, exported and published with its arguments; a kept study with a variant is read without its module."""
    section = (REPOSITORY / "ablations" / "README.md").read_text().split("## Your own network")[1].split("\n## ")[0]
    (place / "my_net.py").write_text("\n".join(re.findall("```python\n(.*?)```", section, re.DOTALL)))
    (place / "mine.toml").write_text(STUDY.replace("my_net", "MyNet") + "wide = [false, true]\n")
    outcome = expertgrid(*RUN)
    assert outcome.status == 0, outcome.err
    assert expertgrid("publish", "runs/mine", "published", "--import", "my_net").status == 0
    arguments = json.loads((place / "published" / "config.json").read_text())["model_args"]
    assert "import my_net  # your module" in (place / "published" / "README.md").read_text()
    net = timm.create_model("local-dir:published", pretrained=True)
    assert (net.conv.out_channels, "act" in arguments) == (arguments.get("width", 16), True)
    sys.modules.pop("my_net")
    taken = "variant wide: the name is taken, by another variant or a field of the recipe"
    assert taken in expertgrid(*RUN).complaint
    del VARIANTS["wide"]
    for command in ("table", "check", "report"):
        outcome = expertgrid(command, "runs/mine")
        assert outcome.status == 0, outcome.err
    assert "unknown name 'wide'" in expertgrid("run", "mine.toml").complaint
