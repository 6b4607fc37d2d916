"""Parts and recipes of a user's own: the README's module, from a training to the tables, and code that changes."""

import re
import sys

import pytest
from conftest import REPOSITORY

from expertgrid.ablations.records.directory import StudyDirectory
from expertgrid.model.training import parts

README = (REPOSITORY / "ablations" / "README.md").read_text()
(MODULE,) = re.findall(r"```python\n(# my_parts.py\n.*?)```", README, re.DOTALL)
RECIPE = 'base = "fast"\nepochs = 1\nopt = "heavy_ball"\nsched = "triangle"\naugment = "noise"\n'
STUDY = """
question = "Is the focal loss better?"
seeds = 1
metric = "brier"
margin = 0.05
[base]
recipe = "mine.toml"
[set]
width = 0.0625
"recipe.batch_size" = 400
[factors]
"recipe.loss" = ["cross_entropy", "focal"]
"""
USED = ["augment noise", "loss focal", "metric brier", "opt heavy_ball", "sched triangle"]


@pytest.fixture
def run(expertgrid, tmp_path, monkeypatch):
    """Runs the study with a module of this source, as another process does; `forget` takes its parts away again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "mine.toml").write_text(RECIPE)
    (tmp_path / "study.toml").write_text(STUDY)
    before = {kind: dict(functions) for kind, functions in parts.PARTS.items()}, dict(parts.CODES)

    def forget():
        sys.modules.pop("my_parts", None)
        for kind, functions in before[0].items():
            for name in parts.PARTS[kind].keys() - functions.keys():
                del parts.PARTS[kind][name]
                if kind == "opt":
                    import timm.optim._optim_factory as timm

                    del timm.default_registry._optimizers[parts.timm_name(name)]
                parts.METRICS.pop(name, None)
        for name in parts.CODES.keys() - before[1].keys():
            del parts.CODES[name]

    def call(source, *arguments):
        forget()
        (tmp_path / "my_parts.py").write_text(source)
        return expertgrid("run", "study.toml", "--import", "my_parts", "--device", "cpu", *arguments)

    call.forget = forget
    yield call
    forget()


def test_the_readmes_parts_are_trained_and_read_without_their_module(run, expertgrid, tmp_path):
    outcome = run(MODULE)
    assert outcome.status == 0, outcome.err
    study = StudyDirectory(tmp_path / "runs" / "study")
    by_loss = {study.config(trial).recipe.loss: study.record(trial) for trial in study.read_plan().trials}
    assert sorted(by_loss["focal"].parts) == USED
    assert sorted(by_loss["cross_entropy"].parts) == [name for name in USED if "focal" not in name]
    assert by_loss["focal"].validation_loss != by_loss["cross_entropy"].validation_loss

    (tmp_path / "mine.toml").unlink()
    run.forget()
    for command in ("table", "verify", "check", "report"):
        outcome = expertgrid(command, study.path)
        assert outcome.status == 0, outcome.err
        if command == "check":
            assert "damaged:" not in outcome.out
            notes = [line for line in outcome.out.splitlines() if "not imported" in line]
            both, focal = (
                f"note: trials/{study.read_plan().trials[0]} and 1 more: uses the ",
                f"note: trials/{study.read_plan().trials[1]}: uses the ",
            )
            assert sorted(notes) == sorted(
                (focal if part == "loss focal" else both) + f"{part} of a module that is not imported" for part in USED
            )
    assert "not imported" not in expertgrid("check", study.path, "--import", "my_parts").out
    run.forget()
    assert (
        "recipe.augment: unknown name 'noise'" in expertgrid("rerun", study.path, study.read_plan().trials[0]).complaint
    )
    (tmp_path / "mine.toml").write_text(RECIPE)
    assert "recipe.augment: unknown name 'noise'" in expertgrid("run", "study.toml", "--dry-run").err


def test_changed_code_is_said_and_never_averaged_nor_taken_over(run, expertgrid, tmp_path):
    assert run(MODULE).status == 0
    changed = MODULE.replace("- logs_BN.exp()) ** 2", "- logs_BN.exp()) ** 3.0")  # of another size: bytecode goes by it
    said = "1 finished trials have other code of the loss focal; `expertgrid retire runs/"
    more = run(changed, "--seeds", 2, "--no-adopt")
    study = StudyDirectory(tmp_path / "runs" / "study")
    cell = next(cell for cell in study.read_plan().cells if cell.levels["recipe.loss"] == "focal")
    old, new = map(study.record, cell.trials)
    assert old.parts["loss focal"] != new.parts["loss focal"]
    assert said in more.err
    notes = expertgrid("table", study.path, "--notes").out
    assert f"as other code trained them than the newest trial of recipe.loss focal: {old.trial}." in notes
    checked = expertgrid("check", study.path, "--import", "my_parts").out
    assert f"note: trials/{old.trial}: was trained by other code of the loss focal than is imported" in checked
    elsewhere = run(changed, "--out", "runs/other").err
    assert "not taken over: 1 trials of runs/study: they have other code of the loss focal" in elsewhere
    assert "\ntaken over from runs/study: 1 trials" in elsewhere
    again = StudyDirectory(tmp_path / "runs" / "other").record(old.trial)
    assert again.parts == new.parts
    assert again.validation_loss != old.validation_loss
    retired = expertgrid("retire", study.path, "--import", "my_parts").out
    assert retired.startswith(f"moved: trials/{old.trial} to retired/{old.trial}; the sources of the loss focal differ")
    assert study.record(old.trial) is None


def test_a_part_that_raises_is_a_failed_trial_with_the_users_line(run, tmp_path):
    outcome = run(MODULE.replace("logs_BN = ", "logs_BN = 1 / 0 * "))
    assert outcome.status == 1
    line = 1 + MODULE[: MODULE.index("logs_BN = ")].count("\n")
    assert f"error: my_parts.py:{line}: ZeroDivisionError: division by zero" in outcome.err
    assert "1 trial failed" in outcome.err
    outcome = run(MODULE + "\n@parts.register_loss\ndef focal(*_):\n    return 0\n")
    assert (outcome.status, "loss 'focal': the name is taken" in outcome.complaint) == (2, True)
    assert f": my_parts.py:{MODULE.count(chr(10)) + 2}: " in outcome.complaint


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("base = 'fast'\nepoch = 1", "unknown field of recipe mine.toml: 'epoch'; did you mean 'epochs'?"),
        ("epochs = 1", "recipe mine.toml.batch_size: is missing"),
        ("base = 'fats'", "unknown recipe 'fats'; did you mean 'fast'?"),
        ("base = 'fast'\nlr = 1979-05-27", "recipe mine.toml.lr: a number is needed"),
        ("epochs", "mine.toml: not TOML: "),
        (None, "mine.toml: cannot be read: No such file"),
    ],
)
def test_a_wrong_recipe_file_is_one_line(run, tmp_path, recipe, message):
    (tmp_path / "mine.toml").unlink() if recipe is None else (tmp_path / "mine.toml").write_text(recipe)
    outcome = run(MODULE)
    assert (outcome.status, outcome.err.startswith(f"error: {message}")) == (2, True), outcome.err
    assert not (tmp_path / "runs").exists()
