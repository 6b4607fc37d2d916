"""A study that starts from weights: from its plan to what rerun, check and a changed file make of it."""

import pytest
import torch
from conftest import snapshot
from safetensors.torch import load_file

from expertgrid.ablations.records.directory import StudyDirectory

STUDY = """
question = "Does it help?"
seeds = 2
[base]
model = "two_block"
recipe = "finetune"
[set]
width = 0.0625
"recipe.epochs" = 1
"recipe.freeze" = "all but head"
[factors]
weights = ["none", "{}"]
"""


def test_a_study_starts_from_a_trial(expertgrid, study, trial, tmp_path, monkeypatch):
    """Classes of other names get a new classifier, from each trial's seed; what is frozen stays, norms too."""
    monkeypatch.chdir(tmp_path)
    source, checkpoint = f"runs/tiny@{trial}", study.checkpoint(trial)
    checkpoint.write_bytes(checkpoint.read_bytes().replace(rb"[\"0\",\"1\"", rb"[\"9\",\"1\""))
    (tmp_path / "second.toml").write_text(STUDY.format(source))
    run = "run", "second.toml", "--device", "cpu", "--set", "experts=2", "--set", "gate=mlp"
    planned = expertgrid(*run, "--dry-run")
    said = "tensors are loaded, new: head.classifier.bias, head.classifier.weight; images normalised by mean [0.305434]"
    assert f"two_block starts from {source}: " in planned.out and said in planned.out
    assert not (tmp_path / "runs/second").exists()
    done = expertgrid(*run)
    assert done.status == 0, done.err
    assert said in done.err

    second, before = StudyDirectory(tmp_path / "runs/second"), load_file(checkpoint)
    fresh, loaded = ([second.config(id) for id in cell.trials] for cell in second.read_plan().cells)
    assert {config.weights for config in fresh} == {None} and {config.recipe.normalise for config in fresh} == {"data"}
    heads = []
    for config in loaded:
        assert config.weights.new == ("head.classifier.bias", "head.classifier.weight")
        after = load_file(second.checkpoint(config.id))
        heads += [after.pop(name) for name in config.weights.new[1:]]
        assert all(torch.equal(after[name], before[name]) for name in after.keys() - {*config.weights.new})
    assert not torch.equal(*heads)
    assert "equal to the last bit" in expertgrid("rerun", second.path, loaded[0].id, "--device", "cpu").out
    assert expertgrid("verify", second.path).status == expertgrid("check", second.path).status == 0

    kept = snapshot(second.path)
    checkpoint.write_bytes(checkpoint.read_bytes()[:-4] + bytes(4))
    refused = expertgrid(*run)
    assert refused.status == 2 and f"weights {source}: have changed since trial" in refused.complaint
    assert snapshot(second.path) == kept
    (file,) = second.path.glob("weights/*")
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    assert "its name is not its checksum" in expertgrid("check", second.path).out
    refused = expertgrid("rerun", second.path, loaded[0].id, "--device", "cpu")
    assert "missing or damaged; expertgrid run writes it" in refused.complaint


@pytest.mark.parametrize(
    ("base", "problem"),
    [
        ('weights = "none.pth"', "weights none.pth: there is no file none.pth"),
        ('weights = "best"', "weights 'best': accepted: none, timm, hf-hub:OWNER/NAME, DIR@TRIAL, or a file"),
        ('weights = "timm"', "weights timm: cannot be loaded: RuntimeError: No pretrained weights exist"),
        ('[set]\n"recipe.freeze" = "conv"', "recipe.freeze: 'conv' names none of the 37 parameters; accepted: stem"),
        ('[set]\n"recipe.freeze" = "("', "is no regular expression"),
        ("[set]\nweights = 'timm'", "weights is named in [base], or is a factor"),
        ('[set]\n"recipe.normalise" = [[0.5, 0.5], [0.5, 0.5]]', "(0.5, 0.5)), and digits has 1 channels"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_before_anything_is_trained(expertgrid, tmp_path, monkeypatch, base, problem):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.toml").write_text(f'question = "?"\n[base]\n{base}')
    refused = expertgrid("run", "bad.toml", "--device", "cpu")
    assert refused.status == 2 and problem in refused.complaint
    assert not (tmp_path / "runs").exists()


def test_a_name_with_a_tag_says_that_it_starts_without_weights(expertgrid, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tag.toml").write_text('question = "?"\n[base]\nmodel = "test_resnet.r160_in1k"\nimage_size = 32')
    said = "test_resnet.r160_in1k starts from fresh weights, although its name has the tag of weights"
    assert said in expertgrid("run", "tag.toml", "--dry-run").out
