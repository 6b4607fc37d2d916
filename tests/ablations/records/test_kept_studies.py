"""The studies whose records are kept in the repository: their numbers follow from what is kept."""

from dataclasses import replace

import pytest
from conftest import REPOSITORY

from expertgrid.ablations.records.directory import StudyDirectory
from expertgrid.ablations.results.answer import answer
from expertgrid.ablations.results.evidence import read_evidence
from expertgrid.ablations.results.tables.effects import factor_table
from expertgrid.ablations.results.verify import check_study
from expertgrid.ablations.study.study import SHIPPED, load_study
from expertgrid.model.system.text import render_tables

KEPT = sorted(file.parent for file in SHIPPED.glob("*/study.toml"))


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.name)
def test_each_number_follows_from_the_records(path):
    found = check_study(StudyDirectory(path))
    assert found.problems == []
    assert found.checked > 100
    assert not [line for line in found.skipped if "predictions" in line]


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.name)
def test_what_was_run_is_the_study_that_ships(path):
    shipped, kept = load_study(path.name), StudyDirectory(path).study
    assert kept.model_dump() == shipped.change(data=kept.base.data).model_dump()


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.name)
def test_the_readme_shows_what_the_records_say(path):
    """Its table "What each factor does", its answer, and its picture."""
    found = read_evidence(StudyDirectory(path))
    if found.results.unfinished:
        pytest.skip("not finished")
    readme = (REPOSITORY / "README.md").read_text()
    assert render_tables([replace(factor_table(found), notes=[])], "text") in readme
    assert answer(found) in " ".join(readme.split())
    picture = path.with_suffix(".svg")
    assert f"](ablations/studies/{picture.name})" in readme
    assert picture.exists()
