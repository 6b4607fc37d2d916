"""What was trained, in words: by the recipe and the records that a study has, and by nothing else."""

import json
import shutil
from dataclasses import replace

import pytest
from conftest import change_json

from expertgrid.ablations.records.directory import StudyDirectory
from expertgrid.ablations.results.evidence import Evidence, read_evidence
from expertgrid.ablations.results.rows import read_results
from expertgrid.ablations.results.tables.description import describe, methods, recipe_in_words
from expertgrid.model.training.recipe import RECIPES, Recipe


@pytest.mark.parametrize("name", RECIPES)
def test_each_field_that_a_recipe_changes_is_said(name):
    """A field has its own words: with one value for another they are others, and without the field they are fewer."""
    recipe = RECIPES[name]
    words = recipe_in_words(recipe)
    assert words.startswith(f"epochs {recipe.epochs}, batch size {recipe.batch_size:,}, ")
    for field, value in recipe:
        if value != Recipe.model_fields[field].default:
            assert len(recipe_in_words(recipe, [field])) < len(words), field
    assert "augmentation: none" in recipe_in_words(Recipe(epochs=1, batch_size=2, opt="sgd", lr=0.1))


def test_two_lines_say_what_was_trained_without_the_factors(trained_study):
    directory = StudyDirectory(trained_study)
    network, data = describe(directory, read_results(directory))
    assert network.startswith(
        "Network: two_block with width 0.0625, from fresh weights. Recipe: fast with changes: epochs 2"
    )
    assert "experts" not in network
    record = read_results(directory).rows[0].records[0]
    images = f"{record.validation_images} validation, {record.test_images} test images"
    for words in (images, "2 seeds", "one of 10 parts", f"torch {record.environment.versions['torch']}"):
        assert words in data


def test_a_recipe_that_is_varied_is_left_to_the_table(trained_study, tmp_path):
    path = shutil.copytree(trained_study, tmp_path / "s")
    results = read_results(StudyDirectory(path))
    config = path / "trials" / next(iter(results.rows[-1].trials.values())) / "config.json"
    change_json(config, recipe=json.loads(config.read_text())["recipe"] | {"lr": 1.0})
    network, _ = describe(StudyDirectory(path), results)
    assert "learning rate" not in network
    (alone, _), (all_but, _) = (
        describe(StudyDirectory(path), results, rows) for rows in (results.rows[-1:], results.rows[:-1])
    )
    assert "learning rate 1," in alone
    assert "learning rate 0.003" in all_but


def test_the_paragraph_claims_what_the_records_show(trained_study):
    directory = StudyDirectory(trained_study)
    evidence = read_evidence(directory)
    text = methods(directory, evidence)
    reads = len(directory.test_reads())
    for words in (
        "We compared 3 networks: all combinations of experts (1, 2) and gate (linear, mlp) (equal ones were trained ",
        *describe(directory, evidence.results),
        "6 trials were planned: 6 finished.",
        f"Reads of the test split: {reads} (",
        "families: the main effects and the cells against the base",
    ):
        assert words in text
    assert "taken over" not in text
    plan = evidence.results.plan.model_copy(update={"seen": [0]})
    seen = methods(directory, Evidence(replace(evidence.results, plan=plan)))
    assert "more than 1 such table in 20 may hold a wrong verdict" in seen


def test_the_command_prints_the_paragraph_and_nothing_else(expertgrid, trained_study):
    directory = StudyDirectory(trained_study)
    outcome = expertgrid("table", trained_study, "--methods")
    assert (outcome.status, outcome.out) == (0, methods(directory, read_evidence(directory)) + "\n")
    assert "--methods: is text" in expertgrid("table", trained_study, "--methods", "--format", "latex").complaint
