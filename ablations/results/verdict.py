"""A verdict as a table shows it."""

from dataclasses import asdict, dataclass

from expertgrid.ablations.results.stats.contrasts import NONE, Judgement


@dataclass(frozen=True)
class Verdict:
    judgement: Judgement
    fixed_split: bool = False  # it is about one split of the images

    def __str__(self) -> str:
        verdict = self.judgement.verdict
        if verdict == NONE:
            return f"no verdict: {self.judgement.reason}"
        return f"{verdict} (this split)" if self.fixed_split and verdict != "open" else verdict

    def fields(self) -> dict[str, object]:
        """What JSON and CSV have of it, the verdict first."""
        return {"verdict": self.judgement.verdict} | asdict(self.judgement) | {"fixed_split": self.fixed_split}
