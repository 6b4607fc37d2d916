"""What a study can see: the smallest effect that its seeds are likely to show, and the seeds that others need."""

from dataclasses import dataclass

from expertgrid.ablations.results.questions import Questions
from expertgrid.ablations.results.stats.planning import PowerAnalysis

DIFFERENCES = (0.3, 0.5, 1.0)  # points, for which a plan says how many seeds they need


@dataclass(frozen=True)
class Sight:
    """What a study can see."""

    spread: float  # points, of a cell's accuracy from seed to seed beyond its block
    measured: bool  # from records; else the binomial floor
    seeds: int
    smallest: float  # difference that is found with a probability of 80%, for the contrast that is hardest to see
    needed: dict[float, int | None]  # seeds by difference; None for more than 1,000


def sight(asked: Questions, spread: float, seeds: int, measured: bool = True) -> Sight | None:
    """What `seeds` seeds can see by a spread in points. None for a study with one network or one seed."""
    weights_QU = asked.first_family_QU
    if not len(weights_QU) or seeds < 2:
        return None
    analysis = PowerAnalysis(weights_QU, spread)
    hardest = int((weights_QU**2).sum(1).argmax())
    smallest = float(analysis.detectable(seeds)[hardest])
    needed = {difference: analysis.seeds_for(hardest, difference) for difference in DIFFERENCES}
    if smallest < DIFFERENCES[0]:
        half = float(f"{smallest / 2:.1g}")
        needed |= {half: analysis.seeds_for(hardest, half)}
    return Sight(spread, measured, seeds, smallest, needed)
