"""The answer to a study's question in one or two sentences, from its verdicts alone."""

from collections.abc import Sequence
from typing import NamedTuple

from expertgrid.ablations.results.costs import Costs
from expertgrid.ablations.results.evidence import Effect, Evidence
from expertgrid.ablations.results.stats.contrasts import BETTER, NONE, OPEN, SAME, VERDICTS, WORSE, Judgement
from expertgrid.model.system.text import MeasuredMultiple, Multiple, listed
from expertgrid.model.training.metrics import Scale

MOST_NAMED = 6  # changes in one list; the others are counted
ALIKE = 0.05  # costs that differ by less are the same
NAMES = {  # of changes whose levels alone say little
    ("experts", "1", "2"): "a second expert",
    ("matched", "false", "params"): "a wider network of one expert and equal parameters",
    ("matched", "false", "macs"): "a wider network of one expert and equal MACs",
    **{("gate", "own", gate): f"a {gate} gate" for gate in ("uniform", "constant", "frozen", "shuffled")},
}


class Change(NamedTuple):
    """A change, or a cell against the base, with its verdict."""

    name: str
    judgement: Judgement
    cost: Costs = {}
    seeds_to_decide: float | None = None


def answer(evidence: Evidence) -> str:
    """What the study decided, what it cost, and what is open. Nothing that has no verdict is called a difference."""
    rows = evidence.results.rows
    by = evidence.scale
    margin = f"less than {evidence.margin:g}{by.points.removesuffix('s') if evidence.margin == 1 else by.points}"
    margin += "" if by.name == "accuracy" else f" {'of' if by.points else 'in'} {by.title}"
    if not any(row.by_seed for row in rows):
        return "No trial is finished, so there is no answer yet."
    if evidence.effects:
        changes = [Change(_named(of), of.judgement, of.cost, of.seeds_to_decide) for of in evidence.effects]
        mean = " on average over the other factors" if len(evidence.results.study.factors) > 1 else ""
        sentence = _sentence(changes, by, "", ("changes", "change"), margin + mean, evidence.most_seeds)
    elif any(evidence.against_base):
        base = rows[0].name
        changes = [Change(row.name, judged) for row, judged in zip(rows, evidence.against_base) if judged]
        sentence = _sentence(changes, by, f" against {base}", ("differs", "differ"), f"from {base} by {margin}", 0)
    else:
        return f"There is one network, {rows[0].name}, and nothing to compare it with."
    if evidence.fixed_split:
        sentence = f"On this split of the images: {sentence[0].lower()}{sentence[1:]}"
    return f"{sentence} To be confirmed: {evidence.not_confirmed}." if evidence.not_confirmed else sentence


def _sentence(changes: list[Change], by: Scale, against: str, differ: tuple[str, str], margin: str, most: int) -> str:
    by_verdict: dict[str, list[Change]] = {verdict: [] for verdict in VERDICTS}
    for change in changes:
        by_verdict[change.judgement.verdict].append(change)
    decided = by_verdict[BETTER], by_verdict[WORSE]
    parts = [
        f"{change.name} {_amount(change.judgement, by)}{_cost(change.cost)}{against}"
        for of_verdict in decided
        for change in _largest(of_verdict)
    ]
    if left_out := sum(max(0, len(of_verdict) - MOST_NAMED) for of_verdict in decided):
        parts.append(f"{left_out} more changes are decided")
    if same := by_verdict[SAME]:
        names = [f"{change.name}{f' ({price})' if (price := _price(change.cost)) else ''}" for change in same]
        parts.append(f"{_listed(names)} {differ[len(same) > 1]} {margin}")
    if undecided := by_verdict[OPEN]:
        names, seeds = _listed([change.name for change in undecided], "or"), [of.seeds_to_decide for of in undecided]
        than = against.replace("against", "than")
        parts.append(f"whether {names} is better or worse{than} is not decided{_seeds(seeds, most)}")
    if without := by_verdict[NONE]:
        names, verb = [change.name for change in without], ("has", "have")[len(without) > 1]
        parts.append(f"{_listed(names)} {verb} no verdict, as trainings diverged")
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}."


def _largest(changes: Sequence[Change]) -> list[Change]:
    """At most `MOST_NAMED` changes, those of the largest size, in the order of the study."""
    by_size = sorted(changes, key=lambda change: -abs(change.judgement.mean or 0))[:MOST_NAMED]
    return [change for change in changes if change in by_size]


def _named(effect: Effect) -> str:
    (factor, before, after), *_ = effect.changes
    factor = factor.rpartition(".")[2]
    if (factor, before, after) in NAMES:
        return NAMES[factor, before, after]
    if factor == "experts" and before.isdigit() and after.isdigit():
        return f"going from {before} to {after} experts"
    if {before, after} == {"true", "false"}:
        return f"{factor} {'on' if after == 'true' else 'off'}"
    return f"{factor} {after} instead of {before}"


def _amount(judgement: Judgement, by: Scale) -> str:
    assert judgement.mean is not None  # a verdict better or worse has one
    size, rises = abs(judgement.mean), judgement.mean > 0
    if not by.points:
        return f"{'raises' if rises else 'lowers'} {by.title} by {size:.{by.decimals}f}"
    of = "" if by.name == "accuracy" else f" of {by.title}"
    return f"{'adds' if rises else 'loses'} {size:.{1 if size >= 0.095 else 2}f} points{of}"


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
            return f" at the same {'cost' if 'latency' in cost else 'MACs'}" if cost else ""
        case (name, ratio), "" if abs(ratio - 2) < ALIKE:
            return f" and doubles the {name}"
    return f" for {_price(cost)}"


def _seeds(needed: Sequence[float | None], limit: int) -> str:
    known = [count for count in needed if count is not None]
    if len(known) < len(needed) or not known:
        return ""
    least, most = (f"more than {limit}" if count > limit else str(count) for count in (min(known), max(known)))
    about = "" if min(known) > limit else "about "
    return f": {about}{least if least == most else f'{least} to {most}'} seeds would decide it in a fresh study"


def _listed(names: Sequence[str], last: str = "and") -> str:
    if len(names) > MOST_NAMED:
        names = [*names[: MOST_NAMED - 1], f"{len(names) - MOST_NAMED + 1} more changes"]
    return listed(names, last)
