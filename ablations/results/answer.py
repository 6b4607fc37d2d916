"""The answer to a study's question in one or two sentences, from its verdicts alone."""

from collections.abc import Sequence

from expertgrid.ablations.results.evidence import Effect, Evidence
from expertgrid.ablations.results.stats.contrasts import BETTER, NONE, OPEN, SAME, WORSE, Judgement

MOST_NAMED = 6  # changes in one list; the others are counted
ALIKE = 0.05  # costs that differ by less are the same
NAMES = {  # of changes whose levels alone say little
    ("experts", "1", "2"): "a second expert",
    ("matched", "false", "params"): "a wider network of one expert and equal parameters",
    ("matched", "false", "macs"): "a wider network of one expert and equal MACs",
    **{("gate", "own", gate): f"a {gate} gate" for gate in ("uniform", "constant", "frozen", "shuffled")},
}


def answer(evidence: Evidence) -> str:
    """What the study decided, what it cost, and what is open. Nothing that has no verdict is called a difference."""
    rows = evidence.results.rows
    if not any(row.by_seed for row in rows):
        return "No trial is finished, so there is no answer yet."
    if evidence.effects:
        said = _of_effects(evidence)
    elif any(evidence.against_base):
        said = _of_cells(evidence)
    else:
        return f"There is one network, {rows[0].name}, and nothing to compare it with."
    return ("On this split of the images: " + _lower(said)) if evidence.fixed_split else said


def _of_effects(evidence: Evidence) -> str:
    by_verdict: dict[str, list[Effect]] = {}
    for effect in evidence.effects:
        by_verdict.setdefault(effect.judgement.verdict, []).append(effect)
    parts = [
        f"{_named(effect)} {_points(effect.judgement)}{_cost(effect.cost)}"
        for verdict in (BETTER, WORSE)
        for effect in _largest(by_verdict.get(verdict, []))
    ]
    if left_out := sum(max(0, len(by_verdict.get(verdict, [])) - MOST_NAMED) for verdict in (BETTER, WORSE)):
        parts.append(f"{left_out} more changes are decided")
    if same := by_verdict.get(SAME):
        names = [f"{_named(effect)}{f' ({price})' if (price := _price(effect.cost)) else ''}" for effect in same]
        parts.append(f"{_listed(names)} {_plural('change', same)} less than {_margin(evidence)}")
    if undecided := by_verdict.get(OPEN):
        parts.append(
            f"{_listed([_named(effect) for effect in undecided])} {'are' if len(undecided) > 1 else 'is'} open"
            f"{_seeds([effect.seeds_to_decide for effect in undecided])}"
        )
    if without := by_verdict.get(NONE):
        parts.append(
            f"{_listed([_named(effect) for effect in without])} {_plural('have', without)} no verdict, as trainings "
            "failed"
        )
    return _sentence(parts)


def _largest(effects: Sequence[Effect]) -> list[Effect]:
    """At most `MOST_NAMED` effects, those of the largest size, in the order of the study."""
    by_size = sorted(effects, key=lambda effect: -abs(effect.judgement.mean or 0))[:MOST_NAMED]
    return [effect for effect in effects if effect in by_size]


def _of_cells(evidence: Evidence) -> str:
    rows = evidence.results.rows
    base = rows[0]
    by_verdict: dict[str, list[tuple[str, Judgement]]] = {}
    for row, judgement in zip(rows, evidence.against_base):
        if judgement:
            by_verdict.setdefault(judgement.verdict, []).append((row.name, judgement))
    parts = [
        f"{name} {_points(judgement)} against {base.name}"
        for verdict in (BETTER, WORSE)
        for name, judgement in by_verdict.get(verdict, [])[:MOST_NAMED]
    ]
    words = {
        SAME: ("differs", "differ", f" from {base.name} by less than {_margin(evidence)}"),
        OPEN: ("is", "are", f" open against {base.name}"),
        NONE: ("has", "have", " no verdict, as trainings failed"),
    }
    for verdict, (single, several, rest) in words.items():
        if found := by_verdict.get(verdict):
            parts.append(f"{_listed([name for name, _ in found])} {several if len(found) > 1 else single}{rest}")
    return _sentence(parts)


def _named(effect: Effect) -> str:
    (factor, before, after), *_ = effect.changes
    if (factor, before, after) in NAMES:
        return NAMES[factor, before, after]
    if factor == "experts" and before.isdigit() and after.isdigit():
        return f"going from {before} to {after} experts"
    if {before, after} == {"true", "false"}:
        return f"{factor} {'on' if after == 'true' else 'off'}"
    return f"{factor} {after} instead of {before}"


def _margin(evidence: Evidence) -> str:
    return f"{evidence.margin:g} point{'' if evidence.margin == 1 else 's'}"


def _points(judgement: Judgement) -> str:
    assert judgement.mean is not None  # a verdict better or worse has one
    size = f"{abs(judgement.mean):.1f}" if abs(judgement.mean) >= 0.095 else f"{abs(judgement.mean):.2f}"
    return f"{'adds' if judgement.mean > 0 else 'loses'} {size} points"


def _priced(cost: dict[str, float]) -> list[str]:
    """What a change costs in: multiply-accumulates, or parameters where only these differ, and measured latency."""
    computed = next((name for name in ("MACs", "parameters") if abs(cost.get(name, 1) - 1) >= ALIKE), None)
    return [name for name in (computed, "latency") if name and abs(cost.get(name, 1) - 1) >= ALIKE]


def _price(cost: dict[str, float]) -> str:
    return " and ".join(f"{cost[name]:.1f} times the {name}" for name in _priced(cost))


def _cost(cost: dict[str, float]) -> str:
    match _priced(cost):
        case []:
            return " at the same cost" if cost else ""
        case [name] if name != "latency" and abs(cost[name] - 2) < ALIKE:
            return f" and doubles the {name}"
        case _:
            return f" for {_price(cost)}"


def _seeds(needed: Sequence[int | None]) -> str:
    known = [count for count in needed if count is not None]
    if len(known) < len(needed) or not known:
        return ""
    least, most = min(known), max(known)
    return f": about {least if least == most else f'{least} to {most}'} seeds would show"


def _plural(verb: str, found: Sequence[object]) -> str:
    single = {"change": "changes", "have": "has"}[verb]
    return verb if len(found) > 1 else single


def _listed(names: Sequence[str]) -> str:
    if len(names) > MOST_NAMED:
        names = [*names[: MOST_NAMED - 1], f"{len(names) - MOST_NAMED + 1} more changes"]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _sentence(parts: Sequence[str]) -> str:
    said = "; ".join(parts)
    return f"{said[0].upper()}{said[1:]}."


def _lower(said: str) -> str:
    return said[0].lower() + said[1:]
