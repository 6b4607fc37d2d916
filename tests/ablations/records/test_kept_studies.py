"""The studies whose records are kept in the repository: their numbers follow from what is kept."""

from dataclasses import replace

import pytest
from conftest import REPOSITORY

from expertgrid.ablations.records.directory import StudyDirectory
from expertgrid.ablations.results.answer import answer
from expertgrid.ablations.results.evidence import read_evidence
from expertgrid.ablations.results.tables.cells import columns
from expertgrid.ablations.results.tables.effects import factor_table
from expertgrid.ablations.results.verify import verify_study
from expertgrid.ablations.study.study_file import SHIPPED, load_study
from expertgrid.model.system.text import render_tables

KEPT = sorted(file.parent for file in SHIPPED.glob("*/study.toml"))


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.name)
def test_each_number_follows_from_the_records(path):
    verified = verify_study(StudyDirectory(path))
    assert verified.problems == []
    assert verified.checked > 10 * len(list(path.glob("trials/*/record.json")))
    assert not [line for line in verified.skipped if "predictions" in line]


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.name)
def test_what_was_run_is_the_study_that_ships(path):
    shipped, recorded = load_study(path.name), StudyDirectory(path).read_study()
    assert recorded.model_dump() == shipped.change(data=recorded.base.data).model_dump()


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.name)
def test_the_pages_show_what_the_records_say(path):
    """The table "What each factor does", its answer, and its picture."""
    evidence = read_evidence(StudyDirectory(path))
    if evidence.results.unfinished:
        pytest.skip("not finished")
    pages = "".join(page.read_text() for page in (REPOSITORY / "README.md", SHIPPED / "README.md"))
    words = " ".join(pages.split())
    if not evidence.effects:  # one network: its accuracies, those of test images with their intervals
        (cell,) = columns(evidence.results.rows)
        for title, (mean, low, high) in ((title, cell[title]) for title in cell if "acc %" in title):
            assert f"{mean:.2f} " + f"({low:.2f} to {high:.2f})" * title.startswith("test") in words
        return
    assert render_tables([replace(factor_table(evidence), notes=[])], "text") in pages
    assert answer(evidence) in words
    picture = path.with_suffix(".svg")
    assert f"{picture.name})" in pages
    assert picture.exists()
