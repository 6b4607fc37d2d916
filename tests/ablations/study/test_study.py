"""Studies: designs, ids, and what a wrong study file says."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import REPOSITORY, write_study

from expertgrid.ablations.results.rows import read_results
from expertgrid.ablations.study.study import Study
from expertgrid.ablations.study.study_file import load_study, parse_study, shipped_studies
from expertgrid.model.config import TimmModel
from expertgrid.model.presets import PRESETS
from expertgrid.model.system.errors import InputError, messages
from expertgrid.model.training.data import ImageData
from expertgrid.model.training.holdout import HoldOut
from expertgrid.model.training.trial import Trial, Weights
from expertgrid.model.weights import Initial

HEAD = 'question = "?"\n'
CIFAR_LIKE = ImageData.random(train=1200, height=32, width=32)


def study(text: str) -> Study:
    return parse_study(HEAD + text, Path("my.toml"))


def ids(varied: Study, data: ImageData) -> list[str]:
    return [trial.id for cell in varied.cells(data) for trial in cell.trials]


def test_shipped_studies(monkeypatch):
    initial = Initial(Weights(source="", fingerprint="0" * 64, tensors=1), b"", None)
    monkeypatch.setattr("expertgrid.model.weights.read_weights", lambda *what: initial)
    sizes = {  # cells, and different trials
        "card": (36, 140), "card-small": (24, 100), "finetune": (4, 20), "finetune-before": (1, 1),
        "quickstart": (8, 36), "references": (5, 15), "routing": (90, 200), "routing-small": (15, 35),
        "speed": (1, 5), "speed-94": (1, 5), "spread": (12, 36),
    }  # fmt: skip
    cells = {name: load_study(name).cells(CIFAR_LIKE) for name in shipped_studies()}
    assert {name: (len(of), len({t.id for cell in of for t in cell.trials})) for name, of in cells.items()} == sizes
    own_recipes = [(cell.trials[0].model_name, cell.trials[0].recipe.epochs) for cell in cells["references"]]
    assert own_recipes == [
        ("two_block", 100), ("eight_block", 100), ("segmented", 50), ("macro_residual", 70), ("mixed_kernel", 60),
    ]  # fmt: skip


def test_factorial_is_all_combinations(digits):
    cells = study('seeds = 2\n[factors]\nexperts = [2, 3]\n"recipe.lr" = [0.1, 0.2]').cells(digits)
    assert [cell.levels for cell in cells] == [{"experts": k, "recipe.lr": lr} for k in (2, 3) for lr in (0.1, 0.2)]
    for cell in cells:
        assert [trial.seed for trial in cell.trials] == [0, 1]
        for trial in cell.trials:
            assert len(next(trial.model.blocks()).kernels) == cell.levels["experts"]
            assert trial.recipe.lr == cell.levels["recipe.lr"]


def test_one_at_a_time_leaves_the_base(digits):
    varied = study('design = "one_at_a_time"\n[factors]\nexperts = [4, 2]\ncutout = [0, 2]')
    cells = varied.cells(digits)
    assert [tuple(cell.levels.values()) for cell in cells] == [(None, None), (4, None), (2, None), (None, 0), (None, 2)]
    assert cells[0].trials[0].id == cells[1].trials[0].id == cells[3].trials[0].id
    assert len(set(ids(varied, digits))) == 15


def test_ids_are_of_what_is_trained(digits):
    """A trial of the same network, recipe and data is the same in the next version and in another study, too."""
    base = ids(study("[factors]\nexperts = [2]"), digits)
    for same in ("[factors]\nexperts = [2]\n[set]\n'recipe.cutout' = 0", "[set]\nexperts = 2"):
        assert ids(study(same), digits) == base
    for change in ("'recipe.lr' = 0.5", "gate = 'uniform'", "'model.head.dropout' = 0.4"):
        assert not set(ids(study(f"[factors]\nexperts = [2]\n[set]\n{change}"), digits)) & set(base)
    assert ids(study("seeds = 6\n[factors]\nexperts = [2]"), digits)[:5] == base
    orders = ("experts = [1, 2]\ngate = ['mlp']\nwidth = [0.5]", "width = [0.5]\ngate = ['mlp']\nexperts = [1, 2]")
    assert ids(study(f"[factors]\n{orders[0]}"), digits) == ids(study(f"[factors]\n{orders[1]}"), digits)
    assert ids(study(""), digits)[0] == "4fc29465abec"
    segmented = study("seeds = 1\n[base]\nmodel = 'eight_block'\nrecipe = 'segmented'\n[set]\ncutout = 3")
    assert ids(segmented, digits) == ["b5cced766f9c"]
    assert ids(study("[base]\nmodel = 'resnet18'"), digits)[0] == "3cdd7d67da71"


def test_ids_depend_on_the_data():
    other = ImageData.random(train=160, height=32, width=32)
    assert ids(study(""), CIFAR_LIKE) == ids(study(""), other)
    changed = ImageData(**{**vars(other), "fingerprint": "other"})
    assert not set(ids(study(""), CIFAR_LIKE)) & set(ids(study(""), changed))


def test_the_default_hold_out_changes_no_id_and_another_does(digits):
    """So that a trial whose record was written before there was a choice keeps its id."""
    default, written, fixed, share = (
        ids(study(base), data)
        for base, data in (
            ("", digits),
            ("[base]\nhold_out = 'rotating'", digits),
            ("[base]\nhold_out = 'fixed'", digits),
            ("[base]\ndata = 'digits@0.2'", replace(digits, source="digits@0.2")),
        )
    )
    assert default == written
    assert len({*default, *fixed, *share}) == len(default) + len(fixed) + len(share) == 15
    trial = study("").cells(digits)[0].trials[0]
    fields = json.loads(trial.model_dump_json())
    assert fields.pop("hold_out") == {"kind": "rotating", "share": 0.1, "offset": 0}
    assert Trial.model_validate(fields).id == trial.id == default[0]


def test_all_cells_of_a_study_have_its_hold_out(digits):
    varied = study("baselines = ['resnet10t']\n[base]\nhold_out = 'fixed'\n[factors]\nexperts = [1, 2]")
    held_out = {trial.hold_out for cell in varied.cells(digits) for trial in cell.trials}
    assert held_out == {HoldOut(kind="fixed")}


def test_a_study_of_too_few_images_for_its_hold_out_is_refused():
    few = ImageData.random(train=15, height=32, width=32)
    with pytest.raises(InputError, match="hold-out of random: class '5' has 1 train images; at least 2 are needed"):
        study("[set]\n'recipe.batch_size' = 8").cells(few)
    halves = replace(ImageData.random(train=95, height=32, width=32), source="random@0.5")
    (cell,) = study("[set]\n'recipe.batch_size' = 47").cells(halves)
    assert cell.trials[0].hold_out.parts == 2
    with pytest.raises(InputError, match="recipe.batch_size: 48, and random has 47 images to train on"):
        study("[set]\n'recipe.batch_size' = 48").cells(halves)


def test_baselines_are_as_they_are_and_trained_like_the_base(digits):
    varied = study("baselines = ['resnet10t', 'two_block']\n[set]\nexperts = 2\nepochs = 5\n[factors]\ncutout = [0, 2]")
    *cells, resnet, plain = varied.cells(digits)
    assert [cell.model_name for cell in (*cells, resnet)] == ["two_block", "two_block", "resnet10t"]
    assert (resnet.levels, plain.levels) == ({}, {})
    assert resnet.trials[0].model == TimmModel(timm="resnet10t", in_chans=1, num_classes=10)
    assert resnet.trials[0].recipe.epochs == 5
    assert plain.trials[0].model == PRESETS["two_block"].change(in_chans=1)


def test_a_study_grows_by_levels_and_seeds():
    older = study("[factors]\nexperts = [1, 2]")
    for text in ("[factors]\nexperts = [1, 2]", "seeds = 5\n[factors]\nexperts = [4, 1, 2]"):
        assert study(text).apart_from(older) == ""
    others = ("[factors]\nexperts = [1, 4]", "seeds = 2\n[factors]\nexperts = [1, 2]", "[factors]\ngate = ['mlp']")
    for text in (*others, "[factors]\nexperts = [1, 2]\n[base]\nmodel = 'eight_block'"):
        assert study(text).apart_from(older)
    assert study("[set]\nwidth = 2.0").apart_from(study("")) == "set.width is not given there, and 2.0 here"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seeds = 0", "my.toml: seeds: 1 or more is needed, found 0"),
        ("[base]\nmodle = 'x'", "my.toml: unknown field of base: 'modle'; did you mean 'model'?"),
        ("[base]\nimage_size = 0", "my.toml: base.image_size: 1 or more is needed, found 0"),
        ("[base]\nimage_size = 1025", "my.toml: base.image_size: 1024 or less is needed, found 1025"),
        ("[base]\nimage_size = 64.0", "my.toml: base.image_size: a whole number is needed, found 64.0"),
        ("[base]\nhold_out = 'rot'", "my.toml: base.hold_out: 'rotating' or 'fixed' is needed, found 'rot'"),
        ("[factors]\nexpert = [1]", "my.toml: factors: unknown name 'expert'; did you mean 'experts'?"),
        ("[factors]\nexperts = []", "my.toml: factors.experts: a list of 1 or more is needed, found []"),
        ("[factors]\nexperts = [3, 3]", "my.toml: factors.experts: 3 is given twice"),
        ("[set]\nreference = 'two_block'", "my.toml: set: reference is named in [base], or is a factor"),
        ("[set]\nmodel = 'two_block'", "set: model is named in [base], or is a factor"),
        ("[set]\ncutout = 3\n'recipe.cutout' = 4", "my.toml: set: recipe.cutout is given twice"),
        ("[set]\n'recipe.lr' = nan", "my.toml: set.recipe.lr: a finite number, text, true, false, a list or a table"),
        ("[factors]\nlr = [0.1, inf]", "my.toml: factors.lr.1: a finite number, text, true, false, a list or a table"),
        ("margin = true", "my.toml: margin: a number is needed, found True"),
        ("[reported]\n2 = '90'", "my.toml: reported is of levels, and the study has no factors"),
        ("[factors", "my.toml: not TOML"),
        ("name = 'x'", "my.toml: unknown field 'name'. Accepted: question, design, seeds, metric, margin,"),
        ("seeds = true", "my.toml: seeds: a whole number is needed, found True"),
        ("[set]\nexperts = 2\n[factors]\nexperts = [1]", "my.toml: experts is a factor, with levels [1], and is set"),
        ("[factors]\ncutout = [1]\n'recipe.cutout' = [2]", "factors: recipe.cutout is given twice"),
        ("[factors]\nreference = ['two_block']\nmodel = ['two_block']", "factor reference is a model and a recipe"),
        ("[factors]\nexperts = [1]\n[reported]\n2 = '90'", "my.toml: unknown level in reported: '2'. Accepted: 1"),
    ],
)
def test_wrong_study_files(text, message):
    with pytest.raises(InputError) as error:
        study(text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[base]\nmodel = 'eight_blocks'", "unknown model 'eight_blocks'; did you mean 'eight_block'?"),
        ("[base]\nrecipe = 'slow'", "unknown recipe 'slow'"),
        ("[factors]\nmodel = [3]", "factor model: level 3 is not a name"),
        ("[set]\nrecipe.epochs = true", "set: recipe.epochs: a whole number is needed, found True"),
        ("[set]\nopt = 'sgd'\nopt_betas = [0.9, 0.9]", "recipe.opt_betas: optimiser 'sgd' has none"),
        ("[set]\nopt_betas = [1.0, 1.0]", "recipe.opt: 'adamw' cannot be made here with this recipe: Invalid beta"),
        ("[factors]\nexperts = [0]", "experts: 0 is not accepted"),
        ("[set]\n'recipe.epoch' = 3", "unknown field of recipe: 'epoch'; did you mean 'epochs'?"),
        ("[set]\n'recpe.lr' = 3", "unknown path 'recpe.lr'"),
        ("[set]\n'model.num_classes' = 3", "model.num_classes cannot be set: it follows from the data"),
        ("[set]\n'model.layers.7.channels' = 3", "unknown field of model.layers: '7'. Accepted: 0, 1, 2"),
        ("[set]\n'model.head.dropout.p' = 3", "model.head.dropout has no fields"),
        ("[base]\nmodel = 'macro_residual'", "model macro_residual does not take the 8x8 images of digits"),
        ("[base]\nmodel = 'mixed_kernel'\n[set]\nsmall_size = 4", "mixed_kernel does not take the 4x4 images"),
        ("[base]\nmodel = 'resnet18'\n[factors]\nexperts = [1]", "experts does not apply to timm model 'resnet18'"),
        ("baselines = ['vit_tiny_patch16_224']", "vit_tiny_patch16_224 does not take the 8x8 images of digits"),
    ],
)
def test_studies_that_cannot_be(text, message, digits):
    with pytest.raises(InputError) as error:
        study(text).cells(digits)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_all_that_is_wrong_is_said_at_once(digits):
    """A field is not missing beside one that has nearly its name, and what several cells have is one line."""
    text = "qestion = ''\nseeds = true\nfirst_seed = true\n[base]\nmodle = 'x'\n[set]\nrecipe.epoch = 3\nlr = -1"
    text += "\n[factors]\ncutot = [1]\nrecipe.normalise = ['data', [[0.5], [0]]]\nhflip = [0.5, 'x']"
    with pytest.raises(InputError) as error:
        parse_study(text, Path("my.toml"))
    lines = [line.removeprefix("my.toml: ").partition(" Accepted")[0] for line in messages(error.value)]
    assert lines == [
        "unknown field of base: 'modle'; did you mean 'model'?",
        "unknown field 'qestion'; did you mean 'question'?",
        "seeds: a whole number is needed, found True",
        "set: recipe.lr: more than 0 is needed, found -1",
        "set: unknown field of recipe: 'epoch'; did you mean 'epochs'?",
        "factors: unknown name 'cutot'; did you mean 'cutout'?",
        "factors: recipe.hflip: a number is needed, found 'x'",
        "factors: recipe.normalise: 'data' or 'half' is needed, found [[0.5], [0]]",
        "factors: recipe.normalise.1.0: more than 0 is needed, found 0",
        "first_seed: a whole number is needed, found True",
    ]
    wrong = study("baselines = ['resnet19']\n[factors]\nexperts = [0, 1]\nwidth = [1.0, -1.0]")
    with pytest.raises(InputError) as error:
        wrong.cells(digits)
    assert [line.partition(" is not ")[0].partition(";")[0] for line in messages(error.value)] == [
        "experts: 0", "width: -1.0", "unknown model 'resnet19'",
    ]  # fmt: skip
    wrong = study("baselines = ['resnet19']\n[base]\nrecipe = 'fats'\n[factors]\nmodel = ['two_blok', 3]")
    assert [" ".join(str(error).split()[:3]) for error in wrong.unknown_choices()] == [
        "unknown model 'resnet19';", "unknown model 'two_blok';", "unknown recipe 'fats';",
    ]  # fmt: skip


def test_a_factor_needs_no_quotes():
    quoted, bare = (study(f"[factors]\n{name} = [0.1, 0.2]") for name in ("'recipe.lr'", "recipe.lr"))
    assert quoted == bare
    assert list(bare.factors) == ["recipe.lr"]


def test_what_is_no_study_file(tmp_path):
    (tmp_path / "my.toml").write_bytes(b"\xff\xfe")
    for name, message in (
        (str(tmp_path / "my.toml"), "my.toml: not TOML: 'utf-8' codec"),
        ("quickstrat", "unknown study 'quickstrat'; did you mean 'quickstart'?"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            load_study(name)


def test_settings_have_one_name(digits):
    quoted, table, bare = (study(f"[set]\n{line} = 5") for line in ("'recipe.epochs'", "recipe.epochs", "epochs"))
    assert quoted == table == bare
    changed = quoted.change(settings={"epochs": 7})
    assert changed.set == {"recipe.epochs": 7}
    assert changed.cells(digits)[0].trials[0].recipe.epochs == 7


def test_depth_goes_before_gates_that_differ_by_channels():
    sizes = {}
    for gate in ("linear", "mlp"):
        varied = study(f"[base]\nmodel = 'segmented'\n[factors]\ngate = ['{gate}']\ndepth = [0.5, 1, 2]")
        sizes[gate] = [len(list(cell.trials[0].model.blocks())) for cell in varied.cells(CIFAR_LIKE)]
    assert sizes["linear"] == sizes["mlp"]
    assert len(set(sizes["mlp"])) >= 2


def test_the_readmes_study_is_one():
    readme = (REPOSITORY / "README.md").read_text()
    text = readme.split("```toml\n")[1].split("```")[0]
    cells = parse_study(text, Path("my.toml")).cells(CIFAR_LIKE)
    assert len(cells) == 3 * 2


def test_a_factor_is_not_set_as_well():
    varied = study("[factors]\ncutout = [0, 2]")
    with pytest.raises(InputError, match=r"study my: cutout is a factor, with levels \[0, 2\], and is set as well"):
        varied.change(settings={"recipe.cutout": 2})


def test_what_is_claimed_of_a_level_that_is_true_is_shown(digits, tmp_path):
    text = HEAD + "seeds = 1\n[factors]\nalternating_flip = [false, true]\n[set]\nhflip = 0.5\n[reported]\ntrue = '95'"
    directory = write_study(tmp_path / "my", text, digits, lambda levels, seed: (90, 90))
    assert [row.reported for row in read_results(directory).rows] == ["", "95"]
