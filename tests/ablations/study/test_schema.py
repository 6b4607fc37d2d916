"""`expertgrid schema` and `expertgrid new`: what an editor is told, and a file to begin with."""

import json
import sys
import tomllib
from contextlib import nullcontext

import pytest
from jsonschema import Draft7Validator, Draft202012Validator

from expertgrid.ablations.study.schema import study_schema
from expertgrid.ablations.study.study_file import SHIPPED, read_study
from expertgrid.model.system.errors import InputError

FILES = [*SHIPPED.glob("*.toml"), *SHIPPED.glob("*/study.toml")]
HEAD = 'question = "?"\n'


@pytest.fixture(scope="module", params=[Draft7Validator, Draft202012Validator])  # as editors take it
def validator(request):
    schema = json.loads(study_schema())
    request.param.check_schema(schema)
    return request.param(schema)


def test_the_studies_that_ship_have_the_schema(validator):
    assert len(FILES) > 8
    for file in FILES:
        assert [error.message for error in validator.iter_errors(tomllib.loads(file.read_text()))] == []


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ("[set]\nrecipe.lr = 0.1\n[factors]\n'model.head.dropout' = [0.1]\nreference = ['two_block']", True),
        ("[set]\ncolor_jitter = 0.4\n[factors]\ncutout = [0, 2]\n'recipe.sched' = ['poly', 'cosine']", True),
        ("seed = 3", False),
        ("name = 'x'", False),
        ("seeds = 0", False),
        ("[base]\nrecipe = 'fastt'", False),
        ("[base]\nmodell = 'resnet18'", False),
        ("[set]\ncutoutt = 2", False),
        ("[set]\nexperts = 2\n'recipe.amp' = 'maybe'", False),
        ("[set]\nrecipe.hflip = 2", False),
        ("[factors]\nhflip = 0.5", False),
        ("[factors]\ncutout = [0, 0.5]", False),
    ],
)
def test_the_schema_takes_what_a_study_takes(validator, digits, tmp_path, text, valid):
    assert validator.is_valid(tomllib.loads(HEAD + text)) == valid
    (tmp_path / "x.toml").write_text(HEAD + text)
    with nullcontext() if valid else pytest.raises(InputError):
        read_study(tmp_path / "x.toml").cells(digits)


def test_a_new_study_says_its_schema_and_can_be_run(expertgrid, validator, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = expertgrid("new", "my.toml", "--recipe", "fast_muon", "--data", "cifar10@0.02")
    assert (outcome.status, outcome.out.split()) == (0, ["study.schema.json", "my.toml"])
    text = (tmp_path / "my.toml").read_text()
    place = text.splitlines()[0].removeprefix("#:schema ")
    assert json.loads((tmp_path / place).read_text()) == json.loads(expertgrid("schema").out) == validator.schema
    assert validator.is_valid(tomllib.loads(text))
    study = read_study(tmp_path / "my.toml")
    assert (study.base.model, study.base.recipe, study.base.data) == ("two_block", "fast_muon", "cifar10@0.02")
    assert list(study.factors) == ["experts", "hflip"]
    assert "already" in expertgrid("new", "my.toml").complaint
    assert (tmp_path / "my.toml").read_text() == text

    assert expertgrid("new", "digits.toml", "--model", "resnet18", "--image-size", 32).status == 0
    outcome = expertgrid("run", "digits.toml", "--dry-run")
    assert outcome.status == 0 and "resnet18" in outcome.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x.txt"], "FILE x.txt: the name of a .toml file in a directory that exists is needed"),
        (["x.toml", "--model", "two_blok"], "unknown model 'two_blok'; did you mean 'two_block'?"),
        (["x.toml", "--recipe", "slow"], "unknown recipe 'slow'"),
        (["x.toml", "--data", "folder:none"], "there is no directory none"),
        (
            ["x.toml", "--data", "cifar100", "--image-size", "1"],
            "crop_padding: 4 is too large for the 1x1 images of cifar100",
        ),
        (["x.toml", "--recipe", "segmented"], "recipe.cutout: 16 is too large for the 8x8 images of digits"),
    ],
)
def test_what_does_not_go_together_is_no_new_study(expertgrid, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    outcome = expertgrid("new", *arguments)
    assert (outcome.status, outcome.out, message in outcome.complaint) == (2, "", True)
    assert list(tmp_path.iterdir()) == []


def test_a_schema_of_someone_else_is_left_alone(expertgrid, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "study.schema.json").write_text("{}")
    assert "is no schema of expertgrid's" in expertgrid("new", "my.toml").complaint
    assert (tmp_path / "study.schema.json").read_text() == "{}"


def test_the_shell_completes_studies_recipes_and_cells(trained_study, tmp_path, monkeypatch, capsys):
    """As the scripts of `--show-completion` ask."""
    from expertgrid.ablations.cli.app import app

    monkeypatch.chdir(tmp_path)
    (tmp_path / "quick.toml").touch()
    monkeypatch.setenv("_EXPERTGRID_COMPLETE", "complete_bash")
    monkeypatch.setattr(sys, "argv", ["expertgrid"])
    for words, completed in (
        ("run qu", ["quickstart", "quick.toml"]),
        ("show-augment fast", ["fast", "fast_muon"]),
        ("new my.toml --recipe tw", ["two_block"]),
        (f"table {trained_study} --contrast experts=2", ["experts=2,gate=linear", "experts=2,gate=mlp"]),
        (f"table {tmp_path} --contrast experts=2", []),
    ):
        monkeypatch.setenv("COMP_WORDS", f"expertgrid {words}")
        monkeypatch.setenv("COMP_CWORD", str(len(words.split())))
        with pytest.raises(SystemExit):
            app(prog_name="expertgrid", standalone_mode=False)
        assert capsys.readouterr().out.split() == completed
