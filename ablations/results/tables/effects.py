"""The tables of a study's contrasts: what each factor does, interactions, declared contrasts, levels."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from expertgrid.ablations.records.plan import RULES
from expertgrid.ablations.results.evidence import Evidence
from expertgrid.ablations.results.levels import Marginal
from expertgrid.ablations.results.stats.contrasts import NONE, OPEN, SAME, Judgement
from expertgrid.ablations.results.tables.notes import counted, effect_notes, reasons, verdict_notes
from expertgrid.model.system.text import Signed, Span, Table, rounded

PARTS = {2: "half", 3: "third", 4: "quarter", 5: "fifth", 8: "eighth", 10: "tenth", 20: "twentieth"}
FALLING = ("training time", "parameters", "MACs", "latency", "95% interval")  # on a narrow terminal, in this order
COSTS = ("parameters", "MACs", "training time", "latency")


@dataclass(frozen=True)
class Verdict:
    """A verdict as a table shows it."""

    judgement: Judgement
    fixed_split: bool = False  # it is about one split of the images

    def __str__(self) -> str:
        verdict = self.judgement.verdict
        if verdict == NONE:
            return f"no verdict: {self.judgement.reason}"
        low, high = self.judgement.low or 0.0, self.judgement.high or 0.0
        word = f"same, {'above' if low > 0 else 'below'} 0" if verdict == SAME and (low > 0 or high < 0) else verdict
        return f"{word} (this split)" if self.fixed_split and verdict != OPEN else word

    def fields(self) -> dict[str, object]:
        """What JSON and CSV have of it, the verdict first."""
        ends = [abs(end) for end in (self.judgement.low, self.judgement.high) if end is not None]
        more = {"fixed_split": self.fixed_split, "ruled_out_above": max(ends, default=None), "rules": RULES}
        return {"verdict": self.judgement.verdict} | asdict(self.judgement) | more


def judged(evidence: Evidence, judgement: Judgement | None, effect: str = "effect") -> dict[str, object]:
    """The columns of a judgement of a study."""
    return judgement_columns(judgement, effect, evidence.scale.decimals, evidence.fixed_split)


def judgement_columns(
    judgement: Judgement | None, effect: str = "effect", decimals: int = 2, fixed_split: bool = False
) -> dict[str, object]:
    """The effect, under this title, its interval and verdict. The interval that is shown is the one that decides."""
    if judgement is None:
        return {effect: None, "95% interval": None, "verdict": None}
    has_interval = judgement.low is not None and judgement.high is not None
    return {
        effect: None if judgement.mean is None else rounded(Signed(judgement.mean), decimals),
        "95% interval": rounded(Span(judgement.low, judgement.high), decimals) if has_interval else None,
        "verdict": Verdict(judgement, fixed_split),
    }


def factor_table(evidence: Evidence) -> Table:
    """The main effects: the first family. Costs that no effect has are left out."""
    names = [name for name in COSTS if any(name in effect.cost for effect in evidence.effects)]
    rows = [
        {
            "factor": effect.factor,
            "change": effect.change,
            **judged(evidence, effect.judgement),
            **{name: effect.cost.get(name) for name in names},
        }
        for effect in evidence.effects
    ]
    title = f"What each factor does ({_about(evidence)})"
    return Table("factors", title, rows, effect_notes(evidence), falls=FALLING)


def _about(evidence: Evidence) -> str:
    plan, what = evidence.results.plan, f"validation {evidence.scale.title}, {evidence.scale.reading}"
    if plan.race:
        return f"{what}; a race from {plan.race.first} to {plan.race.last} seeds"
    counts = sorted({round(judgement.seeds, 1) for judgement in evidence.judgements if judgement.seeds})
    counts = counts or [evidence.results.study.seeds]
    least = f"{counts[0]:g} to " if len(counts) > 1 else ""
    seeds = f"{least}{counts[-1]:g} seed{'' if counts[-1] == 1 else 's'}"
    part = f"{PARTS.get(plan.hold_out.parts, f'{plan.hold_out.parts}th')} of the images"
    own = f"each on one {part}, with overlaps" if evidence.repeats_images else f"each on its own {part}"
    where = f"all on the same {part}" if evidence.fixed_split else own
    afterwards = ", chosen after seeing" if evidence.results.chosen_afterwards else ""
    return f"{what}{afterwards}; {seeds}, {where}"


def interaction_table(evidence: Evidence) -> Table:
    """The interactions that are decided: an exploratory family."""
    rows = [
        {"factors": effect.factor, "changes": effect.change, **judged(evidence, effect.judgement)}
        for effect in evidence.decided_interactions
    ]
    notes = [
        f"{len(rows)} of {counted(len(evidence.interactions), 'interaction')} decided: what one change adds to the "
        "other. Exploratory: not declared before training."
    ]
    return Table("interactions", f"Interactions that are decided ({evidence.scale.reading})", rows, notes)


def contrast_table(evidence: Evidence) -> Table:
    """The contrasts that the study declared."""
    rows = [
        {"cell": pair.first.name, "against": pair.second.name, **judged(evidence, pair.judgement)}
        for pair in evidence.declared
    ]
    notes = reasons((pair.name, pair.judgement) for pair in evidence.declared)
    return Table("contrasts", f"Contrasts that the study declares ({evidence.scale.reading})", rows, notes)


def level_table(evidence: Evidence, marginals: Sequence[Marginal]) -> Table:
    """The levels of a factor, or of two, with their means and effects."""
    names = list(marginals[0].levels)
    effects = [marginal.effect for marginal in marginals if marginal.effect]
    title = "interaction" if len(names) > 1 else "effect"
    rows = []
    for marginal in marginals:
        values: dict[str, object] = {**marginal.levels, "cells": marginal.cells, "n": marginal.seeds}
        values |= {f"val {evidence.scale.column}": marginal.validation, f"test {evidence.scale.column}": marginal.test}
        judgement = marginal.effect.judgement if marginal.effect else None
        rows.append(values | (judged(evidence, judgement, title) if effects else {}))
    notes = ["Means over the networks of each level, for each seed; in brackets the 95% interval over seeds."]
    if not effects:
        notes.append("No effects: no two networks differ in this alone.")
    elif len(names) > 1:
        notes.append("interaction: what one change of level adds to the other. Exploratory: not declared.")
    else:
        notes.append("effect: over the cells that differ in this factor alone, one of the study's main effects.")
        notes += verdict_notes(evidence)
    notes += reasons((effect.name, effect.judgement) for effect in effects)
    return Table("levels", f"By {' and '.join(names)}", rows, notes)
