"""Studies: designs, ids, and what a wrong study file says."""

from pathlib import Path

import pytest

from ablations.data import ImageData
from ablations.study import Study, load_study, parse_study, shipped_studies
from model.errors import InputError

HEAD = 'question = "?"\n'
CIFAR_LIKE = ImageData.random(train=40, height=32, width=32)


def study(text: str) -> Study:
    return parse_study(HEAD + text, Path("my.toml"))


def ids(one: Study, data: ImageData) -> list[str]:
    return [trial.id for cell in one.cells(data) for trial in cell.trials]


def test_shipped_studies():
    assert shipped_studies() == ["card", "quickstart", "references"]
    expected = {"card": (36, 140), "references": (5, 15)}
    for name, (cells, trials) in expected.items():
        found = load_study(name).cells(CIFAR_LIKE)
        assert len(found) == cells
        assert len({trial.id for cell in found for trial in cell.trials}) == trials


def test_quickstart_trains_one_expert_once(digits):
    found = ids(load_study("quickstart"), digits)
    assert len(found) == 2 * 2 * 3 * 3
    assert len(set(found)) == 30


def test_references_have_their_own_recipes():
    cells = load_study("references").cells(CIFAR_LIKE)
    assert [(cell.trials[0].model_name, cell.trials[0].recipe.epochs) for cell in cells] == [
        ("two_block", 100), ("eight_block", 100), ("segmented", 50), ("macro_residual", 70), ("mixed_kernel", 60),
    ]  # fmt: skip


def test_factorial_is_all_combinations(digits):
    one = study('seeds = 2\n[factors]\nexperts = [2, 3]\n"recipe.lr" = [0.1, 0.2]')
    assert [cell.levels for cell in one.cells(digits)] == [
        {"experts": k, "recipe.lr": lr} for k in (2, 3) for lr in (0.1, 0.2)
    ]
    trials = [trial for cell in one.cells(digits) for trial in cell.trials]
    assert [trial.seed for trial in trials] == [0, 1] * 4
    assert {(len(next(t.model.blocks()).kernels), t.recipe.lr) for t in trials} == {
        (2, 0.1),
        (2, 0.2),
        (3, 0.1),
        (3, 0.2),
    }


def test_one_at_a_time_leaves_the_base(digits):
    one = study('design = "one_at_a_time"\n[factors]\nexperts = [4, 2]\ncutout = [0, 2]')
    cells = one.cells(digits)
    assert [tuple(cell.levels.values()) for cell in cells] == [(None, None), (4, None), (2, None), (None, 0), (None, 2)]
    assert cells[0].trials[0].id == cells[1].trials[0].id == cells[3].trials[0].id
    assert len(set(ids(one, digits))) == 9


def test_ids_are_of_what_is_trained(digits):
    base = ids(study("[factors]\nexperts = [2]"), digits)
    assert ids(study("[factors]\nexperts = [2]\n[set]\n'recipe.cutout' = 0"), digits) == base
    assert ids(study("[set]\nexperts = 2"), digits) == base
    for change in ("'recipe.lr' = 0.5", "gate = 'uniform'", "'model.head.dropout' = 0.4"):
        assert not set(ids(study(f"[factors]\nexperts = [2]\n[set]\n{change}"), digits)) & set(base)
    assert ids(study("seeds = 4\n[factors]\nexperts = [2]"), digits)[:3] == base


def test_ids_depend_on_the_data():
    one = study("[factors]\nexperts = [2]")
    other = ImageData.random(train=40, height=32, width=32)
    assert ids(one, CIFAR_LIKE) == ids(one, other)
    changed = ImageData(**{**vars(other), "fingerprint": "other"})
    assert not set(ids(one, CIFAR_LIKE)) & set(ids(one, changed))


def test_order_of_factors_does_not_change_the_trials(digits):
    a = study("[factors]\nexperts = [1, 2]\ngate = ['mlp']\nwidth = [0.5]")
    b = study("[factors]\nwidth = [0.5]\ngate = ['mlp']\nexperts = [1, 2]")
    assert ids(a, digits) == ids(b, digits)


def test_network_follows_the_data(digits):
    trial = study("").cells(digits)[0].trials[0]
    assert (trial.model.in_chans, trial.model.num_classes) == (1, 10)


def test_timm_models_stand_as_baselines(digits):
    one = study("baselines = ['resnet18']\n[factors]\nexperts = [1, 2]")
    cells = one.cells(digits)
    assert [cell.model_name for cell in cells] == ["two_block", "two_block", "resnet18"]
    assert cells[-1].trials[0].model.model_dump() == {"timm": "resnet18", "in_chans": 1, "num_classes": 10}


def test_a_study_grows_by_levels_and_seeds():
    older = study("[factors]\nexperts = [1, 2]")
    for text in ("[factors]\nexperts = [1, 2]", "seeds = 5\n[factors]\nexperts = [4, 1, 2]"):
        assert study(text).grown_from(older)
    others = ("[factors]\nexperts = [1, 4]", "seeds = 2\n[factors]\nexperts = [1, 2]", "[factors]\ngate = ['mlp']")
    for text in (*others, "[factors]\nexperts = [1, 2]\n[base]\nmodel = 'eight_block'"):
        assert not study(text).grown_from(older)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seeds = 0", "my.toml.seeds: input should be greater than or equal to 1, found 0"),
        ("sedes = 3", "unknown field of my.toml: 'sedes'; did you mean 'seeds'?"),
        ("[base]\nmodle = 'x'", "unknown field of my.toml.base: 'modle'; did you mean 'model'?"),
        ("design = 'full'", "my.toml.design: input should be 'factorial' or 'one_at_a_time', found 'full'"),
        ("[factors]\nexpert = [1]", "unknown name in my.toml: 'expert'; did you mean 'experts'?"),
        ("[factors]\nexperts = []", "my.toml.factors.experts: value should have at least 1 item"),
        ("[factors]\nexperts = 3", "my.toml.factors.experts: input should be a valid list"),
        ("[factors]\nexperts = [3, 3]", "my.toml.factors.experts: a level is given twice"),
        ("[set]\nreference = 'two_block'", "unknown name in my.toml: 'reference'"),
        ("[factors", "my.toml: not TOML"),
    ],
)
def test_wrong_study_files(text, message):
    with pytest.raises(InputError) as error:
        study(text)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[base]\nmodel = 'eight_blocks'", "unknown model 'eight_blocks'; did you mean 'eight_block'?"),
        ("[base]\nrecipe = 'slow'", "unknown recipe 'slow'"),
        ("[factors]\nmodel = [3]", "factor model: level 3 is not a name"),
        ("[factors]\nexperts = [0]", "factor experts: level 0 is not accepted"),
        ("[set]\n'recipe.epoch' = 3", "unknown field of recipe: 'epoch'; did you mean 'epochs'?"),
        ("[set]\n'recipe.lr' = -3", "recipe.lr: input should be greater than 0, found -3"),
        ("[set]\n'recpe.lr' = 3", "unknown path 'recpe.lr'"),
        ("[set]\n'model.num_classes' = 3", "model.num_classes follows from the data and cannot be set"),
        ("[set]\n'model.layers.7.channels' = 3", "unknown field of model.layers: '7'. Accepted: 0, 1, 2"),
        ("[set]\n'model.head.dropout.p' = 3", "model.head.dropout has no fields"),
        ("[base]\nmodel = 'macro_residual'", "model macro_residual does not take the 8x8 images of digits"),
        (
            "[base]\nmodel = 'resnet18'\n[factors]\nexperts = [1]",
            "factor experts does not apply to timm model 'resnet18'",
        ),
        ("baselines = ['vit_tiny_patch16_224']", "vit_tiny_patch16_224 does not take the 8x8 images of digits"),
    ],
)
def test_studies_that_cannot_be(text, message, digits):
    with pytest.raises(InputError) as error:
        study(text).cells(digits)
    assert message in str(error.value)


def test_unknown_study():
    with pytest.raises(InputError, match="unknown study 'quickstrat'; did you mean 'quickstart'?"):
        load_study("quickstrat")


def test_a_factor_is_not_set_as_well():
    one = study("[factors]\ncutout = [0, 2]")
    with pytest.raises(InputError, match=r"--set recipe.cutout: cutout is a factor of study my, with levels \[0, 2\]"):
        one.change(settings={"recipe.cutout": 2})
