"""The tables of scores that were made elsewhere."""

from expertgrid.ablations.records.plan import RULES
from expertgrid.ablations.results.scores import JudgedScores
from expertgrid.ablations.results.stats.contrasts import Judgement
from expertgrid.ablations.results.stats.planning import MOST_SEEDS
from expertgrid.ablations.results.tables.effects import judgement_columns
from expertgrid.ablations.results.tables.notes import about_seeds, counted, reasons, word_notes
from expertgrid.model.system.text import Table


def score_tables(judged: JudgedScores) -> list[Table]:
    """What each factor does, and the cells against the first one."""
    effects: list[dict[str, object]] = [
        {"factor": effect.factor, "change": f"{effect.before} -> {effect.after}", **_columns(effect.judgement)}
        for effect in judged.effects
    ]
    cells: list[dict[str, object]] = [
        {**cell.levels, "n": cell.seeds, "mean": cell.mean, **_columns(cell.against_first)}
        | {"may be best": "yes" if cell.may_be_best else ""}
        for cell in judged.cells
    ]
    notes = word_notes(judged.margin)
    notes += reasons(
        (f"{effect.factor} {effect.before} -> {effect.after}", effect.judgement) for effect in judged.effects
    )
    needed = [(effect.factor, effect.seeds_to_decide) for effect in judged.effects if effect.seeds_to_decide]
    seeds = "; ".join(f"{factor}: {about_seeds(count, MOST_SEEDS)}" for factor, count in needed)
    if_large = "if it is as large as it looks, and each seed has its own images"
    notes += [f"To decide what is open, {if_large}: {seeds}."] * bool(needed)
    notes += [f"{counted(judged.missing, 'score')} missing."] * bool(judged.missing)
    notes += ["p: of no difference, adjusted for all rows of the table.", f"Judged by version {RULES} of the rules."]
    best = ["may be best: no other cell is surely better; the best is among these with a probability of 95% or more."]
    tables = [Table("factors", "What each factor does", effects, notes)] if effects else []
    against = [(", ".join(cell.levels.values()), cell.against_first) for cell in judged.cells]
    return [*tables, Table("cells", "Cells, against the first", cells, [*reasons(against), *best])]


def _columns(judgement: Judgement | None) -> dict[str, object]:
    return judgement_columns(judgement) | {"p": judgement.p if judgement else None}
