"""The verdicts of a study: contrasts of its networks, in the families that `questions` declares.

`stats.contrasts` judges all of them, on the metric that decides, those in points in percent. What is asked later is
exploratory.

Shapes: Q contrasts, U networks, S seeds.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from expertgrid.ablations.records.directory import StudyDirectory
from expertgrid.ablations.records.record import Record
from expertgrid.ablations.results.costs import Costs, costs
from expertgrid.ablations.results.questions import study_questions
from expertgrid.ablations.results.rows import Results, Row, read_results
from expertgrid.ablations.results.stats import contrasts, factors, planning
from expertgrid.ablations.results.stats.assumptions import FTest, effects_by_seed, may_be_best, seeds_that_decide
from expertgrid.ablations.results.stats.contrasts import BETTER, NONE, OPEN, SAME, WORSE, Judgement
from expertgrid.ablations.results.stats.factors import Change, EffectContrast
from expertgrid.ablations.results.stats.images import images_variance
from expertgrid.ablations.results.stats.planning import Sight, sight
from expertgrid.ablations.results.stats.race import RaceState, race
from expertgrid.ablations.study.cells import PlannedCell, groups
from expertgrid.ablations.study.study import Study
from expertgrid.model.training.data import split_share
from expertgrid.model.training.holdout import SMALLEST_SHARE, HoldOut
from expertgrid.model.training.metrics import scale

CIRCUMSTANCES: dict[str, Callable[[Record], object]] = {  # of a training, that are no factors
    "code": lambda record: record.environment.commit,
    "versions": lambda record: (record.environment.python, *sorted(record.environment.versions.items())),
    "device": lambda record: record.environment.device,
    "threads": lambda record: record.environment.threads,
    "precision": lambda record: record.bfloat16,
}


@dataclass(frozen=True)
class Effect:
    """A main effect (one change) or an interaction (two changes), in words, with its verdict and its price."""

    changes: tuple[Change, ...]
    judgement: Judgement
    cost: Costs  # after over before, mean over the matched cells
    seeds_to_decide: float | None = None  # about how many in all; None for what is decided, inf for more than `most`
    pairs: tuple[tuple[Row, Row], ...] = ()  # the matched cells of a main effect: before, after

    @property
    def factor(self) -> str:
        return " and ".join(factor for factor, _, _ in self.changes)

    @property
    def change(self) -> str:
        return ", ".join(f"{before} -> {after}" for _, before, after in self.changes)

    @property
    def name(self) -> str:
        return ", with ".join(f"{factor} {before} -> {after}" for factor, before, after in self.changes)

    @property
    def sides(self) -> list[list[Row]]:
        """The rows before and after a main effect."""
        return [list(dict.fromkeys(side)) for side in zip(*self.pairs)]

    @property
    def confounded(self) -> list[str]:
        """The circumstances in which half or more of the trainings before and after a main effect differ."""
        sides = [[record for row in side for record in row.records] for side in self.sides]

        def alike(of: Callable[[Record], object]) -> float:
            before, after = (Counter(map(of, side)) for side in sides)
            return sum(min(before[value] / before.total(), after[value] / after.total()) for value in before)

        return [name for name, of in CIRCUMSTANCES.items() if all(sides) and alike(of) <= 0.5]

    @property
    def diverged(self) -> tuple[list[list[int]], float] | None:
        """Trainings that diverged and that did not, before and after, with Fisher's exact p; None where none did."""
        counts = [[sum(row.diverged for row in side), sum(len(row.by_seed) for row in side)] for side in self.sides]
        if not any(count for count, _ in counts):
            return None
        from scipy.stats import fisher_exact  # slow to import

        return counts, float(fisher_exact(counts).pvalue)


@dataclass(frozen=True)
class Comparison:
    """The first row less the second, on validation, and on test for the record."""

    first: Row
    second: Row
    judgement: Judgement
    test: Judgement
    declared: bool
    seeds_to_decide: float | None = None

    @property
    def name(self) -> str:
        return f"{self.first.name} against {self.second.name}"


class Evidence:
    """The networks of a study with their scores, and all verdicts on them, each made when it is first asked for."""

    def __init__(self, results: Results) -> None:
        self.results, self.margin, self.scale = results, results.margin, results.scale  # of the metric that decides
        self.most_seeds = most_seeds(results.plan.hold_out, results.study.seeds)
        self.questions = study_questions(results.study, results.rows)
        self.declared_pairs = [(results.row(first), results.row(second)) for first, second in results.study.contrasts]
        self.scores_US = results.scores()
        self.no_verdict = {unit: row.no_verdict for unit, row in enumerate(results.rows) if row.no_verdict}

    @cached_property
    def race(self) -> RaceState | None:
        rules = self.results.plan.race
        if rules is None or self.questions.networks < 2:
            return None
        limits = rules.margin, rules.last, rules.first
        state = race(self.questions.race_QU, self.scores_US, *limits, self.no_verdict)
        return replace(state, judgements=[self._directed(judgement) for judgement in state.judgements])

    @cached_property
    def effects(self) -> list[Effect]:
        asked, weights_QU = self.questions.effects, self.questions.effect_weights_QU
        if self.race:
            return [self._effect(*answered) for answered in zip(asked, self.race.judgements)]
        judgements = self._family(weights_QU)
        needed = planning.seeds_to_decide(weights_QU, judgements, self.margin, self.most_seeds)
        return [self._effect(*answered) for answered in zip(asked, judgements, needed)]

    @cached_property
    def against_base(self) -> list[Judgement | None]:
        """By row; None for the base, and in a race for rows that it does not judge so."""
        networks, judged = self.questions.networks, {}
        if self.race:
            judged = dict(zip(self.questions.in_no_effect, self.race.judgements[len(self.questions.effects) :]))
        elif networks > 1:
            judged = dict(enumerate(self._family(factors.against(0, networks)), 1))
        return [judged.get(unit) for unit in range(networks)]

    @cached_property
    def interactions(self) -> list[Effect]:
        judgements = [] if self.race else self._family(self.questions.interaction_weights_QU)
        return [self._effect(*answered) for answered in zip(self.questions.interactions, judgements)]

    @cached_property
    def declared(self) -> list[Comparison]:
        return self.compare(self.declared_pairs, declared=True) if self.declared_pairs and not self.race else []

    @cached_property
    def sight(self) -> Sight | None:
        if not self.spread or self.race:
            return None
        differences = self.scale.differences(self.margin)
        seeds = self.results.study.seeds
        return sight(self.questions.first_family_QU, self.spread, seeds, differences, self.most_seeds)

    @property
    def fixed_split(self) -> bool:
        """Whether the verdicts are about one split of the images."""
        return self.results.plan.hold_out.kind == "fixed"

    @property
    def judgements(self) -> list[Judgement]:
        """All in the declared families."""
        declared = [comparison.judgement for comparison in (*self.effects, *self.declared)]
        return declared + [judgement for judgement in self.against_base if judgement]

    @property
    def decided(self) -> bool:
        return any(judgement.verdict not in (OPEN, NONE) for judgement in self.judgements)

    @property
    def added_seeds(self) -> bool:
        """Whether seeds were added after results of others were there to be seen."""
        seen = self.results.plan.seen
        return bool(seen) and any(seed not in seen for row in self.results.rows for seed in row.trials)

    @property
    def race_names(self) -> list[str]:
        """The names of the contrasts of a race."""
        names = [row.name for row in self.results.rows]
        against = [f"{names[network]} against {names[0]}" for network in self.questions.in_no_effect]
        return [*(effect.name for effect in self.effects), *against]

    @property
    def repeats_images(self) -> bool:
        """Whether seeds are of more than one partition of the images, so that images are held out again."""
        parts = self.results.plan.hold_out.parts
        return len({seed // parts for row in self.results.rows for seed in row.trials}) > 1

    @property
    def not_confirmed(self) -> str:
        """Why more than 1 such study in 20 may hold a wrong verdict; "" where it does not."""
        if self.results.chosen_afterwards:
            return f"the metric, {self.scale.title}, was chosen after seeing the results"
        if self.results.plan.extended:
            return "levels or baselines were added after results were seen: the study is exploratory"
        if self.added_seeds:
            return "seeds were added after results were seen"
        return "results of these seeds were seen before the study was made" if self.results.plan.seen else ""

    @cached_property
    def varies_by_seed(self) -> FTest | None:
        """Whether main effects vary from seed to seed by more than the noise."""
        weights_QU = self.questions.effect_weights_QU
        return effects_by_seed(weights_QU, self.judged_US) if len(weights_QU) else None

    @cached_property
    def spread_by_level(self) -> list[float]:
        """The spread after cell and seed of the cells before and after each main effect."""
        squares_U, rows = self.residuals.squares_XC, self.results.rows
        sides = [squares_U[[rows.index(row) for row in side]] for effect in self.effects for side in effect.sides]
        means = [side[side > 0].mean() for side in (squares_U, *sides) if side.any()]  # 0: without a verdict
        return [(self.spread or 0.0) * float(mean / means[0]) ** 0.5 for mean in means[1:]]

    @cached_property
    def images_share(self) -> float | None:
        """The part of the spread's square that few validation images make, as the predictions of four cells tell it."""
        rows, seed = self.results.rows, min(self.results.rows[0].by_seed, default=None)
        if self.scale.name != "accuracy" or not self.spread or seed is None:
            return None
        trials = [row.by_seed[seed].trial for row in rows if seed in row.by_seed]
        read = map(StudyDirectory(self.results.path).predictions, trials[:: -(-len(trials) // 4)])
        right = [of.validation == of.validation_labels for of in read if of]
        return min(1.0, images_variance(np.array(right)) / self.spread**2) if len(right) > 1 else None

    @cached_property
    def hanging_on_a_seed(self) -> dict[str, list[int]]:
        """Main effects that are decided, by name, with the seeds without any one of which they would not be so."""
        if self.race or not self.effects:
            return {}
        every = sorted({seed for row in self.results.rows for seed in row.trials})
        places = seeds_that_decide(self.questions.effect_weights_QU, self.judged_US, self.margin)
        return {effect.name: [every[i] for i in at] for effect, at in zip(self.effects, places) if at}

    @cached_property
    def may_be_best(self) -> list[Row]:
        """The rows that no other is surely better than; none after a race, which judges other contrasts."""
        rows = [] if self.race else [unit for unit, row in enumerate(self.results.rows) if not row.control]
        best_C = may_be_best(self.scale.sign * self.judged_US[rows]) if rows else ()
        return [self.results.rows[unit] for unit, best in zip(rows, best_C) if best]

    def without_diverged(self, effect: Effect) -> Judgement | None:
        """A main effect over the matched cells that have a verdict, where others diverged: exploratory."""
        pairs = [pair for pair in effect.pairs if not (pair[0].no_verdict or pair[1].no_verdict)]
        return self._over(pairs) if pairs and len(pairs) < len(effect.pairs) and not self.race else None

    def dependence(self, effect: Effect) -> tuple[Effect, str, dict[str, Judgement]] | None:
        """The interaction by which a main effect depends most on a factor, that factor, and the effect at its levels.

        None where no interaction is decided; for what is the same on average, where none may pass the margin either.
        Exploratory.
        """

        def size(interaction: Effect) -> float:
            return abs(interaction.judgement.mean or 0.0)

        def matters(judgement: Judgement) -> bool:
            if judgement.low is None or judgement.high is None:
                return False
            passes = max(-judgement.low, judgement.high) > self.margin and effect.judgement.verdict == SAME
            return passes or judgement.verdict in (BETTER, WORSE)

        change = effect.changes[0]
        those = [of for of in self.interactions if change in of.changes and matters(of.judgement)]
        for interaction in sorted(those, key=size, reverse=True):
            factor, *levels = next(other for other in interaction.changes if other != change)
            at = {level: [pair for pair in effect.pairs if pair[0].levels[factor] == level] for level in levels}
            if all(at.values()):
                return interaction, factor, {level: self._over(pairs) for level, pairs in at.items()}
        return None

    def _over(self, pairs: Sequence[tuple[Row, Row]]) -> Judgement:
        weights_U = np.zeros(len(self.results.rows))
        for pair in pairs:
            weights_U[[self.results.rows.index(row) for row in pair]] += -1 / len(pairs), 1 / len(pairs)
        return self._family(weights_U[None])[0]

    @cached_property
    def decided_interactions(self) -> list[Effect]:
        return [effect for effect in self.interactions if effect.judgement.verdict in ("better", "worse")]

    def _family(self, weights_QU: np.ndarray, scores_US: np.ndarray | None = None) -> list[Judgement]:
        """The verdicts on contrasts that are asked together, on validation where no other scores are given."""
        scores_US = self.scores_US if scores_US is None else scores_US
        judgements = contrasts.judge(weights_QU, scores_US, self.margin, self.no_verdict)
        return [self._directed(judgement) for judgement in judgements]

    def _directed(self, judgement: Judgement) -> Judgement:
        return judgement if self.scale.higher_is_better else judgement.turned

    @cached_property
    def judged_US(self) -> np.ndarray:
        """The scores of the networks that may be judged; NaN for the others."""
        whole_US = self.scores_US.copy()
        whole_US[list(self.no_verdict)] = np.nan
        return whole_US

    @cached_property
    def residuals(self) -> contrasts.Residuals:
        whole_US = self.judged_US
        return contrasts.residual_variances(np.nan_to_num(whole_US), contrasts.Fit(~np.isnan(whole_US)))

    @cached_property
    def spread(self) -> float | None:
        """The pooled residual standard deviation, None where it is not known or nothing."""
        whole_US = self.judged_US
        if len(whole_US) < 2 or np.isnan(whole_US).all():
            return None
        spread = float(np.sqrt(self.residuals.pooled_X)) if self.residuals.df > 0 else 0.0
        return spread if spread > 1e-6 * float(np.nanmax(np.abs(whole_US))) else None

    def _effect(self, contrast: EffectContrast, judgement: Judgement, to_decide: float | None = None) -> Effect:
        pairs = [(self.results.rows[before], self.results.rows[after]) for before, after in contrast.pairs]
        explained = self._explained(judgement, contrast.weights_C)
        return Effect(contrast.changes, explained, costs(pairs), to_decide, tuple(pairs))

    def _explained(self, judgement: Judgement, weights_U: np.ndarray) -> Judgement:
        """A judgement without a verdict with the reason of all its cells together."""
        if judgement.verdict != NONE:
            return judgement
        rows = [self.results.rows[unit] for unit in np.flatnonzero(weights_U)]
        if sum(bool(row.no_verdict) for row in rows) == 1 and len(rows) == 2:
            return judgement
        count = sum(row.diverged for row in rows)
        return replace(judgement, reason=f"diverged in {count} of {sum(row.seeds for row in rows)} trainings")

    def compare(self, pairs: Sequence[tuple[int, int]], declared: bool) -> list[Comparison]:
        """Pairs of rows as one family."""
        rows = self.results.rows
        weights_QU = np.array([factors.difference(*pair, len(rows)) for pair in pairs])
        validation, test = self._family(weights_QU), self._family(weights_QU, self.results.scores("test"))
        to_decide = planning.seeds_to_decide(weights_QU, validation, self.margin, self.most_seeds)
        return [
            Comparison(rows[first], rows[second], on_validation, on_test, declared, seeds)
            for (first, second), on_validation, on_test, seeds in zip(pairs, validation, test, to_decide)
        ]


def most_seeds(hold_out: HoldOut, seeds: int) -> int:
    """The seeds that a plan may have, so that no image is held out twice. No such limit where that is so anyway."""
    return hold_out.parts if hold_out.kind == "rotating" and seeds <= hold_out.parts else planning.MOST_SEEDS


def images_again(source: str, hold_out: HoldOut) -> str:
    """That more seeds hold out the same images, and which source has more parts."""
    share = max(SMALLEST_SHARE, hold_out.share / 2)
    more = f"; {split_share(source)[0]}@{share:g} has {round(1 / share)} parts" if share < hold_out.share else ""
    return f"{hold_out.parts} seeds hold out all images once, and more seeds the same again{more}"


def read_evidence(directory: StudyDirectory, metric: str | None = None) -> Evidence:
    """Reads a study directory, as `rows.read_results` does. Raises InputError as that."""
    return Evidence(read_results(directory, metric))


def foresee(
    study: Study, cells: Sequence[PlannedCell], hold_out: HoldOut, directory: StudyDirectory | None
) -> Sight | None:
    """What a study can see before it is trained, from the spread in its directory's records, if there are enough.

    None for a study with one network or one seed.
    """
    questions = study_questions(study, groups(cells, study.combined_levels))
    spread = read_evidence(directory).spread if directory and (directory.path / "plan.json").exists() else None
    differences = scale(study.metric, study.margin).differences(study.margin)
    return sight(questions.first_family_QU, spread, study.seeds, differences, most_seeds(hold_out, study.seeds))
