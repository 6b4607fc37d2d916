"""The notes under a study's tables, a line each. Those that a reader needs most come first."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from expertgrid.ablations.records.directory import StudyDirectory
from expertgrid.ablations.records.plan import RULES
from expertgrid.ablations.records.record import SPLITS, Record
from expertgrid.ablations.results.comparison import TwoCells
from expertgrid.ablations.results.evidence import Evidence, images_again
from expertgrid.ablations.results.rows import (
    Results,
    best_record,
    best_row,
    common_scores,
    complete,
    smallest,
    timed_together,
    winner,
)
from expertgrid.ablations.results.stats.contrasts import BETTER, NONE, OPEN, SAME, WORSE, Judgement
from expertgrid.ablations.results.stats.planning import Sight
from expertgrid.ablations.study.cells import EACH_LEVEL
from expertgrid.model.config import TimmModel
from expertgrid.model.system.text import Signed, Span, rounded, shown
from expertgrid.model.training.metrics import ACCURACY, Scale

MOST_NAMED = 5  # cells or trials in a note
FIRST_NAMED = 3  # of more than these; the others are counted


# --- Verdicts ---


def effect_notes(evidence: Evidence) -> list[str]:
    """What a reader needs to know of the main effects."""
    by = evidence.scale
    lines = verdict_notes(evidence)
    confounded = [f"{effect.name} with {', '.join(what)}" for effect in evidence.effects if (what := effect.confounded)]
    if confounded:
        lines.insert(-1, f"Confounded, as half or more of the trainings differ in it too: {_some(confounded, '; ')}.")
    lines += reasons((effect.name, effect.judgement) for effect in evidence.effects)
    for effect in evidence.effects:
        if diverged := effect.diverged:
            before, after = (f"{count} of {count + ended}" for count, ended in diverged[0])
            p = f"Fisher's exact p {diverged[1]:.2g}; exploratory"
            lines.append(f"{effect.name}: {before} trainings diverged before, {after} after ({p}).")
        if matched := evidence.without_diverged(effect):
            lines.append(
                f"{effect.name} over the cells that did not diverge (exploratory): {_effect(matched, by, True)}."
            )
        if dependence := evidence.dependence(effect):
            interaction, factor, at = dependence
            may = "depends" if interaction.judgement.verdict in (BETTER, WORSE) else "may depend"
            may = f"is same on average, and {may}" if effect.judgement.verdict == SAME else may
            where = "; ".join(f"{_effect(judgement, by)} at {level}" for level, judgement in at.items())
            lines.append(f"{effect.name} {may} on {factor} (exploratory): {where}.")
    for name, seeds in evidence.hanging_on_a_seed.items():
        lines.append(f"{name} is narrowly decided: without seed {' or '.join(map(str, seeds))} it is not.")
    seeds = {effect.name: effect.seeds_to_decide for effect in evidence.effects if effect.seeds_to_decide is not None}
    if seeds:
        needed = sorted(f"{name}: {about_seeds(count, evidence.most_seeds)}" for name, count in seeds.items())
        lines.append(f"To decide what is open, if it is as large as it looks: {_some(needed, '; ')}; in a fresh study.")
    if evidence.sight:
        lines.append(sight_line(evidence.sight, by))
        if math.inf in (*seeds.values(), *evidence.sight.needed.values()) and not evidence.repeats_images:
            lines.append(f"{images_again(evidence.results.plan.source, evidence.results.plan.hold_out)}.")
    if test := evidence.varies_by_seed:
        how = "more than noise does, which the intervals count" if test.p < 0.05 else "no more than noise does"
        lines.append(f"Effects vary from seed to seed {how} (F {test.f:.2f}, p {test.p:.2g}).")
    lines += _spread_notes(evidence)
    costs = {name for effect in evidence.effects for name in effect.cost}
    if costs:
        lines.append("Costs: after the change over before, the geometric mean over the cells that differ in it alone.")
    if "training time" in costs:
        repeated = "rounds, in each of which all cells were timed" if evidence.results.timed else "seeds"
        lines.append(
            f"Training time: with its 95% interval (Student's t) over the {repeated}. can't tell: no interval, or one "
            "whose ends are more than a factor of 2 apart."
        )
    families = ["the main effects (this table)", "the cells against the base"]
    families += ["the declared contrasts"] if evidence.declared else []
    return [*lines, f"Families, declared before training: {', '.join(families)}. Everything else is exploratory."]


def _spread_notes(evidence: Evidence) -> list[str]:
    if not (evidence.spread and evidence.spread_by_level):
        return []
    low, high = min(evidence.spread_by_level), max(evidence.spread_by_level)
    spread = f"{evidence.spread:.2g}{evidence.scale.points}, by level {low:.2g} to {high:.2g}"
    if (images := evidence.images_share) is None:
        return [f"Spread after cell and seed: {spread}."]
    by_seed = min(evidence.varies_by_seed.share, 1 - images) if evidence.varies_by_seed else 0.0
    varying = f"{by_seed:.0%} from effects that vary by seed, " if evidence.varies_by_seed else ""
    return [
        f"Spread after cell and seed: {spread}. Its square: {images:.0%} from few images (larger hold-outs help), "
        f"{varying}{1 - images - by_seed:.0%} from training (longer may help); more seeds help against all."
    ]


def verdict_notes(evidence: Evidence) -> list[str]:
    """What the words mean, and how often such a table is wrong."""
    return [*word_notes(evidence.margin, evidence.scale.points), *_error_notes(evidence)]


def word_notes(margin: float, unit: str = "") -> list[str]:
    """What the words mean. `unit` is that of the margin, with a space before it."""
    unit = unit.removesuffix("s") if margin == 1 else unit
    return [
        "better, worse: the whole interval is on one side of 0. same: the interval lies within "
        f'{margin:g}{unit}. open: not decided; this is not "no difference".'
    ]


def _error_notes(evidence: Evidence) -> list[str]:
    plan, unfinished = evidence.results.plan, evidence.results.unfinished
    often = "more than 1 such table in 20 may hold a wrong verdict."
    lines = []
    if reason := evidence.not_confirmed:
        lines.append(f"{reason[0].upper()}{reason[1:]}, so {often}")
    elif unfinished and evidence.decided:
        lines.append(f"{counted(len(unfinished), 'trial')} not finished: the verdicts are not final, and {often}")
    elif evidence.decided:
        repeated = "new seeds, on images that no network of it has trained on"
        if evidence.fixed_split or evidence.repeats_images:
            repeated = f"new seeds on {'this split of the' if evidence.fixed_split else 'these'} images"
        lines.append(
            f"If this study were repeated with {repeated}, at most 1 such table in 20 would hold a wrong verdict."
        )
    if plan.race:
        seen = f" The race was begun after results of {plan.race.seen} trials were seen." if plan.race.seen else ""
        lines.append(
            f"A race: seeds are added until each contrast is decided; its intervals pay for a look after each seed "
            f"from {plan.race.first} to {plan.race.last}.{seen}"
        )
    older = f"; the study was begun under version {plan.rules}, which may have judged otherwise"
    return [*lines, f"Judged by version {RULES} of the rules{older if plan.rules != RULES else ''}."]


def reasons(judged: Iterable[tuple[str, Judgement | None]]) -> list[str]:
    """A line for each reason that a judgement has, with the names of what it is about."""
    names_by_reason: dict[tuple[str, str], list[str]] = {}
    for name, judgement in judged:
        if judgement and judgement.reason:
            word = "No verdict" if judgement.verdict == NONE else judgement.verdict.capitalize()
            names_by_reason.setdefault((word, judgement.reason), []).append(name)
    return [f"{word}: {_some(names, '; ')}: {reason}." for (word, reason), names in names_by_reason.items()]


def sight_line(sight: Sight, by: Scale) -> str:
    """What a study can see, and how many seeds other differences would need."""
    smaller = [difference for difference in sight.needed if difference < sight.smallest]
    needed = [f"for {size:g}{by.points}: {about_seeds(sight.needed[size], sight.most)}" for size in sorted(smaller)]
    return f"This study {_tells(sight, by)}; {'; '.join(needed)}."


def _tells(sight: Sight, by: Scale) -> str:
    if sight.smallest >= (99.5 if by.points else math.inf):  # "99" is the most in two figures
        return f"can tell no effect{' below 100 points' * bool(by.points)} from 0: it needs more seeds"
    return f"can tell effects from 0 from about {sight.smallest:.2g}{by.points}"


def plan_lines(sight: Sight | None, by: Scale = ACCURACY, margin: float = 0.5, images_again: str = "") -> list[str]:
    """For a study that is planned: what it can see, by which spread, and how many seeds differences need."""
    if sight is None:
        return ["One seed or one network has no verdicts."]
    if sight.spread is None:
        unit = by.points.removesuffix("s") if margin == 1 else by.points
        return [
            f"With {sight.seeds} seeds {margin:g}{unit} can be told from 0 (probability 80%) where scores of a "
            f"cell spread by {margin / sight.smallest:.2g}{by.points} or less, beyond what all cells of a seed share. "
            "The spread is known once there are records."
        ]
    needed = [f"{size:g}{by.points}: {about_seeds(count, sight.most)}" for size, count in sorted(sight.needed.items())]
    needed += [images_again] if math.inf in sight.needed.values() else []
    return [
        f"With {sight.seeds} seeds this study {_tells(sight, by)} (probability 80%, the seeds of its records spread by "
        f"{sight.spread:.2g}{by.points}). Seeds that a difference needs: {'; '.join(needed)}."
    ]


def _effect(judgement: Judgement, by: Scale, with_verdict: bool = False) -> str:
    if judgement.mean is None or judgement.low is None or judgement.high is None:
        return "not known"
    verdict = f", {judgement.verdict}" if with_verdict else ""
    mean, span = Signed(judgement.mean), Span(judgement.low, judgement.high)
    return f"{shown(rounded(mean, by.decimals))} ({shown(rounded(span, by.decimals))}){verdict}"


def about_seeds(count: float, most: int) -> str:
    """How many seeds something needs: `most` and inf are as in `planning`."""
    return f"more than {most:,} seeds" if count > most else f"about {counted(int(count), 'seed')}"


def comparison_notes(evidence: Evidence, two: TwoCells) -> list[str]:
    """What a reader needs to know of two cells side by side."""
    comparison = two.comparison
    lines = []
    if not comparison.declared or evidence.results.chosen_afterwards:
        lines.append(
            "Chosen after seeing the table: read this as a suggestion and test it on new seeds (--first-seed "
            f"{evidence.results.next_seed})."
        )
    lines += verdict_notes(evidence)[:1] + reasons([("A against B", comparison.judgement)])
    if comparison.judgement.verdict == OPEN and comparison.seeds_to_decide is not None:
        lines.append(f"To decide it: {about_seeds(comparison.seeds_to_decide, evidence.most_seeds)}.")
    if two.mcnemar:
        lines.append("McNemar's exact p, of the test images: it is about these two networks, not about the cells.")
    elif comparison.first.by_seed and comparison.second.by_seed:
        lines.append("No McNemar test: the predictions of these trials were not kept.")
    rows = (comparison.first, comparison.second)
    lines += [f"Failed: {trial}: {why}" for row in rows for trial, why in row.failures.items()]
    return lines


# --- Cells ---


def cell_notes(directory: StudyDirectory, evidence: Evidence) -> list[str]:
    """What a reader needs to know of the cells."""
    results = evidence.results
    rows = results.rows
    lines = []
    if failures := {trial: failure for row in rows for trial, failure in row.failures.items()}:
        kinds = Counter(failure.kind for failure in failures.values())
        words = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        lines.append(f"Failed: {len(failures)} of the trials ({words}).")
    for row in rows:
        if row.other_code:
            lines.append(
                f"Not counted, as other code trained them than the newest trial of {row.name}: "
                f"{_some(row.other_code)}. `expertgrid retire {directory.path} --import MODULE` moves what is of other "
                "code than MODULE has now."
            )
        versions = {record.environment.versions.get("timm", "unknown") for record in row.records}
        trial = directory.config(row.records[0].trial) if len(versions) > 1 else None
        if trial and isinstance(trial.model, TimmModel):
            lines.append(f"{row.name}: trained with timm {' and '.join(sorted(versions))}, whose networks may differ.")
    if results.unfinished:
        lines.append(f"Not finished: {len(results.unfinished)} of the trials: {_some(results.unfinished)}.")
    lines += [*_best_notes(evidence), *_column_notes(results)]
    if timed := timed_together(rows):
        lines.append(
            f"front: no other of the {len(timed)} cells that were timed together is as fast and better on validation. "
            "It goes by means, whether or not the differences are decided."
        )
    lines += [*_speed_notes(results), *test_read_notes(directory)]
    return lines + [f"Failed: {trial}: {failure}" for trial, failure in failures.items()]


def _column_notes(results: Results) -> list[str]:
    """What n, the intervals and the levels mean."""
    rows = results.rows
    intervals = "in brackets the 95% interval of the mean over seeds (Student's t), on test: over seeds on these images"
    if any(len(row.by_seed) == 1 for row in rows):
        intervals += "; one seed has no interval"
    several = [row.interval(split) for row in rows if len(row.by_seed) > 1 for split in SPLITS]
    if any(interval and interval.low is None for interval in several):
        intervals += "; seeds that all agree have none, as their spread is unknown"
    lines = [f"n: seeds; {intervals}."]
    if any("base" in row.levels.values() for row in rows):
        base = results.study.base
        lines.append(f"base: {base.model} with the recipe {base.recipe} and the study's settings.")
    if any(EACH_LEVEL in row.levels.values() for row in rows):
        lines.append(f"{EACH_LEVEL}: the network is the same at each level of this factor, and was trained once.")
    lines += [
        f"{baseline}: the same network as {row.name}, and was trained once."
        for row in rows
        for baseline in row.baselines
        if row.levels
    ]
    if any(row.control for row in rows):
        lines.append(
            "base again: the base trained from other seeds on the same hold-outs. It should come out the same."
        )
    return lines


def _best_notes(evidence: Evidence) -> list[str]:
    """Which row is the best on validation, and what its test score is worth."""
    rows = evidence.results.rows
    best = best_row(rows)
    if best is None:
        return []
    lines = [f"Best on validation: {best.name}, trial {best_record(best).trial}."]
    if 1 < len(evidence.may_be_best) < len(rows):
        others = _some([row.name for row in evidence.may_be_best if row is not best], "; ")
        lines.append(f"It may not be the best: no cell is surely better than {others} either (95%, all together).")
    first, among = winner(rows), [row for row in complete(rows) if not row.control]
    if first is None or first.corrected is None or first.agreement is None or len(among) < 2:
        return lines
    seeds = len(common_scores(among)[0])
    on = f" on the {seeds} seeds that all cells have" if seeds < len(best.by_seed) else ""
    lines.append(
        f"Its test {best.scale.title}{on}: {shown(first.reported)}. Corrected for selection as the best of "
        f"{len(among)}: {shown(first.corrected)}, approximate. (Each seed is read for the cell that is best on the "
        f"other seeds: this cell for {round(first.agreement * seeds)} of {seeds} seeds.)"
    )
    return lines


def _speed_notes(results: Results) -> list[str]:
    """On what the cells were trained and timed."""
    rows = results.rows
    lines = []
    if results.timed and any(row.alone for row in rows):
        lines.append(f"Train images/s: each cell alone and in turns at full image size, on {results.timed}.")
    elif any(row.packed for row in rows):
        lines.append("Train images/s: none, as trials were trained at once; `expertgrid bench-train` measures them.")
    machines: dict[str, dict[str, None]] = {}  # with the cells of each
    for row in rows:
        for record in row.records:
            machines.setdefault(", ".join(machine_words(record)), {})[row.name] = None
    if len(machines) > 1:
        lines += [f"Trained on {name}: {_some(list(of), '; ')}." for name, of in machines.items()]
    adopted = {trial: taken.directory for row in rows for trial, taken in row.adopted.items()}
    if adopted:
        lines.append(f"Taken over from {_some(sorted(set(adopted.values())))}: {counted(len(adopted), 'trial')}.")
    trials: dict[str, list[str]] = {}
    for latency in (row.latency for row in rows if row.latency):
        timed = smallest(latency)
        engine = "ONNX Runtime" if timed.kind == "onnxruntime" else timed.engine
        of = f"{latency.cells} cells in turns" if latency.cells else latency.file
        threads = counted(latency.threads, "thread")
        run = f"{engine} at batch {timed.batch}, {latency.provider}, {threads}, of {of}, {latency.finished}"
        trials.setdefault(run, []).append(latency.trial)
    for run, timed_trials in trials.items():
        of = f" (trial {_some(timed_trials)})" if len(trials) > 1 else ""
        lines.append(f"Latency: median of {run}{of}.")
    return lines


def test_read_notes(directory: StudyDirectory) -> list[str]:
    """How often the test split was read, by the ledger."""
    reads = directory.test_reads()
    readers = Counter(read.reader for read in reads)
    again = f", {readers['rerun']} by trials that were trained again" if readers["rerun"] else ""
    lines = [
        f"Reads of the test split: {readers.total()} ({readers['training']} at the end of a training, "
        f"{readers['export']} to certify an export{again})."
    ]
    if flips := sum(read.tta == "flip" for read in reads):
        lines.append(
            f"Flip TTA: logits averaged over each image and its mirror image; {flips} of these reads predicted both."
        )
    return lines


def machine_words(record: Record) -> list[str]:
    """On what a training ran: device, threads, precision and PyTorch."""
    environment, number = record.environment, "bf16" if record.bfloat16 else "fp32"
    torch = f"torch {environment.versions.get('torch', 'of an unknown version')}"
    return [environment.device, counted(environment.threads, "thread"), number, torch]


# --- Words ---


def counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _some(names: Sequence[str], separator: str = ", ") -> str:
    """Names in a note: of more than `MOST_NAMED` the first `FIRST_NAMED`, and how many more there are."""
    if len(names) <= MOST_NAMED:
        return separator.join(names)
    return f"{separator.join(names[:FIRST_NAMED])} and {len(names) - FIRST_NAMED:,} more"
