"""Two cells of a study in full: their verdict, and every seed."""

from dataclasses import dataclass, replace

from expertgrid.ablations.records.directory import StudyDirectory
from expertgrid.ablations.results.evidence import Comparison, Evidence
from expertgrid.ablations.results.rows import Row, right_on_test
from expertgrid.ablations.results.stats.contrasts import NONE, Judgement
from expertgrid.export.mcnemar import McNemar, mcnemar
from expertgrid.model.system.errors import InputError


@dataclass(frozen=True)
class TwoCells:
    """One row against another, with every seed."""

    comparison: Comparison
    mcnemar: dict[int, McNemar]  # by seed, on the test images, of the seeds whose predictions were kept

    @property
    def seeds(self) -> list[int]:
        """The seeds that either has."""
        return sorted(self.comparison.first.by_seed.keys() | self.comparison.second.by_seed.keys())


def compare(directory: StudyDirectory, evidence: Evidence, first: int, second: int) -> TwoCells:
    """The comparison of two rows: as it was declared, else as a question of its own that was chosen afterwards.

    After a race it has no verdict, as the seeds depend on what was seen. Raises InputError for a row and itself.
    """
    results = evidence.results
    pair = results.rows[first], results.rows[second]
    if first == second:
        raise InputError(f"--contrast: {pair[0].name!r} is one cell, by both of its names")
    declared = {(comparison.first, comparison.second): comparison for comparison in evidence.declared}
    if pair in declared:
        comparison = declared[pair]
    elif pair[::-1] in declared:
        comparison = _turned(declared[pair[::-1]])
    else:
        (comparison,) = evidence.compare([(first, second)], declared=False)
        if results.plan.race is not None:
            reason = "seeds were added by a race, which decides other contrasts"
            none = replace(comparison.judgement, verdict=NONE, low=None, high=None, reason=reason)
            comparison = replace(comparison, judgement=none)
    return TwoCells(comparison, _mcnemar(directory, *pair))


def _turned(comparison: Comparison) -> Comparison:
    def turn(judgement: Judgement) -> Judgement:
        mean, low, high = (value and -value for value in (judgement.mean, judgement.high, judgement.low))
        return replace(judgement.turned, mean=mean, low=low, high=high)

    return replace(
        comparison,
        first=comparison.second,
        second=comparison.first,
        judgement=turn(comparison.judgement),
        test=turn(comparison.test),
    )


def _mcnemar(directory: StudyDirectory, first: Row, second: Row) -> dict[int, McNemar]:
    tests = {}
    for seed in sorted(first.by_seed.keys() & second.by_seed.keys()):
        ours, theirs = (directory.predictions(row.by_seed[seed].trial) for row in (first, second))
        if ours is not None and theirs is not None:
            tests[seed] = mcnemar(right_on_test(ours), right_on_test(theirs))
    return tests
