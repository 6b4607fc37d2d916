"""The studies whose records are kept in the repository: their numbers follow from what is kept."""

import pytest

from ablations.records import StudyDirectory
from ablations.study import SHIPPED, load_study
from ablations.verify import check_study

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
