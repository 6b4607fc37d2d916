"""The answer to a study's question in one or two sentences, from its verdicts alone."""

from collections.abc import Sequence

from expertgrid.ablations.results.costs import Costs
from expertgrid.ablations.results.evidence import Effect, Evidence
from expertgrid.ablations.results.stats.contrasts import BETTER, NONE, OPEN, SAME, WORSE, Judgement
from expertgrid.model.system.text import MeasuredMultiple, Multiple

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
        sentence = _of_effects(evidence)
    elif any(evidence.against_base):
        sentence = _of_cells(evidence)
    else:
        return f"There is one network, {rows[0].name}, and nothing to compare it with."
    if evidence.fixed_split:
        return f"On this split of the images: {sentence[0].lower()}{sentence[1:]}"
    return sentence


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
        if judged := by_verdict.get(verdict):
            parts.append(f"{_listed([name for name, _ in judged])} {several if len(judged) > 1 else single}{rest}")
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


def _computed(cost: Costs) -> tuple[str, float] | None:
    """The change in multiply-accumulates, or in parameters where only these differ."""
    ratios = [(name, float(ratio)) for name in ("MACs", "parameters") if isinstance(ratio := cost.get(name), Multiple)]
    return next(((name, ratio) for name, ratio in ratios if abs(ratio - 1) >= ALIKE), None)


def _latency(cost: Costs) -> str:
    latency = cost.get("latency")
    if not isinstance(latency, MeasuredMultiple) or (latency.is_known and abs(latency.value - 1) < ALIKE):
        return ""
    if not latency.is_known:
        return "a latency that the measurement can't tell"
    return f"{latency.value:.1f} ({latency.low:.1f} to {latency.high:.1f}) times the latency"


def _price(cost: Costs) -> str:
    computed = _computed(cost)
    parts = (computed and f"{computed[1]:.1f} times the {computed[0]}", _latency(cost))
    return " and ".join(filter(None, parts))


def _cost(cost: Costs) -> str:
    match _computed(cost), _latency(cost):
        case None, "":
            return " at the same cost" if cost else ""
        case (name, ratio), "" if abs(ratio - 2) < ALIKE:
            return f" and doubles the {name}"
    return f" for {_price(cost)}"


def _seeds(needed: Sequence[int | None]) -> str:
    known = [count for count in needed if count is not None]
    if len(known) < len(needed) or not known:
        return ""
    least, most = min(known), max(known)
    return f": about {least if least == most else f'{least} to {most}'} seeds would show"


def _plural(verb: str, subjects: Sequence[object]) -> str:
    single = {"change": "changes", "have": "has"}[verb]
    return verb if len(subjects) > 1 else single


def _listed(names: Sequence[str]) -> str:
    if len(names) > MOST_NAMED:
        names = [*names[: MOST_NAMED - 1], f"{len(names) - MOST_NAMED + 1} more changes"]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _sentence(parts: Sequence[str]) -> str:
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}."
