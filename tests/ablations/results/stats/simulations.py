"""What the verdicts are worth, by simulated studies whose truth is known: the tables of the note.

    python tests/ablations/results/stats/simulations.py [STUDIES]

All tables as Markdown; 2000 studies take half an hour.

The functions are those that judge real studies. A *miss* is a study in which some interval of the family misses its
truth. For equal cells that is a false verdict, and a wrong verdict needs one, so that it bounds the family's error.
test_simulations.py runs the same with fewer studies.

Shapes: X studies, Q contrasts, C cells, S seeds, P images of the population.
"""

import sys
from itertools import product

import numpy as np
from scipy.special import expit

from expertgrid.ablations.results.stats.contrasts import (
    Estimates,
    by_seeds_constant,
    errors,
    estimate,
    residual_variances,
    verdicts,
)
from expertgrid.ablations.results.stats.critical import correlation, joint_t
from expertgrid.ablations.results.stats.factors import against, main_effects
from expertgrid.ablations.results.stats.race import race

MARGIN = 0.5
SPREAD = 0.3
POPULATION, PARTS = 50_000, 10
HELD_OUT = POPULATION // PARTS
KINDS = ("equal", "base 3 times as noisy", "another cell so", "1 training in 20 loses 5 spreads")
# how unlike cells are on an image: standard deviations of what a factor's level and what a cell adds to the log odds,
# and of what a seed adds to the accuracy in points
LIKENESS = {
    "like the measured": (0.4, 0.2, 0.1),
    "the same, noisier": (0.4, 0.2, 0.5),
    "unlike": (1.0, 0.5, 0.1),
    "very unlike": (2.0, 1.0, 0.1),
}


def networks(cells: int) -> list[tuple]:
    """Experts 1, 2 or 4, gate linear or mlp (none with one expert), residual or not; 20 cells: Cutout or not."""
    cutouts = (0, 8) if cells == 20 else (0,)
    choices = product((1, 2, 4), ("linear", "mlp"), (False, True), cutouts)
    return list(dict.fromkeys((e, g if e > 1 else "-", r, c) for e, g, r, c in choices))


def effects(cells: int) -> np.ndarray:
    """The main effects (Q, C), as a study of these factors asks them."""
    factors = {"experts": (1, 2, 4), "gate": ("linear", "mlp"), "residual": (False, True)}
    factors |= {"cutout": (0, 8)} if cells == 20 else {"cutout": (0,)}
    points = [dict(zip(factors, levels)) for levels in product(*factors.values())]
    order = networks(cells)
    place = [order.index((p["experts"], p["gate"] if p["experts"] > 1 else "-", *list(p.values())[2:])) for p in points]
    return np.array([effect.weights_C for effect in main_effects(factors, points, place, len(order))])


def families(cells: int) -> dict[str, np.ndarray]:
    return {"main effects": effects(cells), "cells against base": against(0, cells)}


# --- Scores ---


def normal_scores(rng: np.random.Generator, shape: tuple[int, int, int], kind: str = KINDS[0]) -> np.ndarray:
    """Scores (X, C, S) of cells that are equal on average, with a spread of `SPREAD` after cell and seed."""
    return with_kind(rng, rng.normal(0, SPREAD, size=shape), kind, SPREAD)


def with_kind(rng: np.random.Generator, scores_XCS: np.ndarray, kind: str, spread: float) -> np.ndarray:
    """The scores with what kind of trouble is asked for: a cell of 3 times this spread, or bad trainings."""
    scores_XCS = scores_XCS.copy()
    if kind in KINDS[1:3]:
        cell = 0 if kind == KINDS[1] else -1
        scores_XCS[:, cell] += rng.normal(0, 8**0.5 * spread, size=scores_XCS[:, cell].shape)
    elif kind == KINDS[3]:
        scores_XCS -= 5 * spread * (rng.random(scores_XCS.shape) < 1 / 20)
    return scores_XCS


def population(cells: int, likeness: str, seed: int = 3) -> np.ndarray:
    """The probability (C, P) that a new seed of each cell recognises each image."""
    rng = np.random.default_rng(seed)
    of_level, of_cell, _ = LIKENESS[likeness]
    easy_P = rng.normal(6, 5, POPULATION)
    experts_P = {1: 0.0} | {count: of_level * rng.normal(size=POPULATION) for count in (2, 4)}
    mlp_P, residual_P, cutout_P = of_level * rng.normal(size=(3, POPULATION))
    rows = [
        expit(
            easy_P
            + experts_P[experts]
            + (gate == "mlp") * mlp_P
            + residual * residual_P
            + (cutout == 8) * cutout_P
            + of_cell * rng.normal(size=POPULATION)
        )
        for experts, gate, residual, cutout in networks(cells)
    ]
    return np.array(rows, dtype=np.float32)


def disagreement(chances_CP: np.ndarray) -> float:
    """How often two cells disagree on an image, over how often two seeds of one cell do."""

    def of(first_P: np.ndarray, second_P: np.ndarray) -> float:
        return (first_P * (1 - second_P) + second_P * (1 - first_P)).mean()

    return float(of(chances_CP[0], chances_CP[-1]) / of(chances_CP[0], chances_CP[0]))


def image_scores(
    rng: np.random.Generator, chances_CP: np.ndarray, shift: float, count: int, seeds: int, rotate: bool
) -> np.ndarray:
    """Accuracies (X, C, S) in percent, drawn image by image; each seed holds out another part of the population.

    Or, for `rotate` False, all of a study the same part. `shift` is what a seed adds besides, in points.
    """
    chances_PC = np.ascontiguousarray(chances_CP.T)
    scores_XCS = np.empty((count, len(chances_CP), seeds))
    for study_CS in scores_XCS:
        order_P = rng.permutation(POPULATION)
        for seed in range(seeds):
            if rotate or seed == 0:
                held_PC = chances_PC[order_P[seed * HELD_OUT : (seed + 1) * HELD_OUT]]
            study_CS[:, seed] = 100 * (rng.random(held_PC.shape, dtype=np.float32) < held_PC).mean(0)
    return scores_XCS + rng.normal(0, shift, size=scores_XCS.shape)


def new_image_scores(
    rng: np.random.Generator, chances_CP: np.ndarray, shift: float, count: int, seeds: int
) -> np.ndarray:
    """As `image_scores` that rotate, but every study and seed has images of its own, drawn without end.

    By the normal law of sums over 5,000 images, from the covariance (C, C) of the chances.
    """
    root_CC = np.linalg.cholesky(np.cov(100 * chances_CP.astype(float)) / HELD_OUT)
    noise_C = np.sqrt(1e4 * (chances_CP * (1 - chances_CP)).mean(1, dtype=float) / HELD_OUT + shift**2)
    images_XCS = root_CC @ rng.normal(size=(count, len(chances_CP), seeds))
    return images_XCS + noise_C[:, None] * rng.normal(size=images_XCS.shape)


# --- What is measured ---


def misses(found: Estimates, truth_Q: np.ndarray | float = 0.0) -> float:
    """The share of studies in which some interval misses its truth."""
    return float(((found.low_XQ > truth_Q) | (found.high_XQ < truth_Q)).any(1).mean())


def decided(found: Estimates, truth_Q: np.ndarray | float = 0.0, difference: float = 0.0) -> np.ndarray:
    """The share of studies (Q,) that decide each contrast, were its true difference this: rightly, any verdict."""
    move_Q = difference - truth_Q
    verdict_XQ = verdicts(found.low_XQ + move_Q, found.high_XQ + move_Q, MARGIN)
    right = ("better", "same") if 0 < difference < MARGIN else ("better",) if difference else ("same",)
    return np.isin(verdict_XQ, right).mean(0)


def false_same(found: Estimates, truth_Q: np.ndarray | float = 0.0) -> float:
    """The share of studies with a false *same*, were every true difference the margin itself, half of them below 0."""
    sign_Q = np.where(np.arange(found.mean_XQ.shape[1]) % 2, 1, -1)
    move_Q = sign_Q * MARGIN - truth_Q
    return float((verdicts(found.low_XQ + move_Q, found.high_XQ + move_Q, MARGIN) == "same").any(1).mean())


def table(title: str, head: list[str], rows: list[list]) -> str:
    def text(value: object) -> str:
        return f"{value:.1f}" if isinstance(value, float) else str(value)

    lines = [f"| {' | '.join(map(text, row))} |" for row in (head, ["---"] * len(head), *rows)]
    return f"\n### {title}\n\n" + "\n".join(lines)


# --- The tables ---


def of_spreads(studies: int) -> str:
    """Misses of both families by seeds, cells and kind of spread, without images: many studies are cheap."""
    rng, rows = np.random.default_rng(1), []
    for cells, seeds in product((10, 20), (2, 3, 4, 5, 7, 10)):
        for family, weights_QC in families(cells).items():
            percent = [
                100 * misses(estimate(weights_QC, normal_scores(rng, (studies, cells, seeds), kind))) for kind in KINDS
            ]
            rows.append([cells, seeds, family, *percent])
    return table(f"Misses in % of {studies} studies, by spread", ["cells", "seeds", "family", *KINDS], rows)


def of_small_designs(studies: int) -> str:
    """The same for few cells."""
    designs = {
        "2 cells": against(0, 2),
        "3 cells against base": against(0, 3),
        "4 cells against base": against(0, 4),
        "6 cells against base": against(0, 6),
        "2 x 2": np.array([[-1, -1, 1, 1], [-1, 1, -1, 1]]) / 2,
        "2 x 2 x 2": np.array([[-1] * 4 + [1] * 4, [-1, -1, 1, 1] * 2, [-1, 1] * 4]) / 4,
    }
    rng, rows = np.random.default_rng(2), []
    for (name, weights_QC), seeds in product(designs.items(), (2, 3, 5, 10)):
        shape = (studies, weights_QC.shape[1], seeds)
        rows.append([name, seeds, *(100 * misses(estimate(weights_QC, normal_scores(rng, shape, k))) for k in KINDS)])
    return table(f"Few cells: misses in % of {studies} studies", ["design", "seeds", *KINDS], rows)


def of_power(studies: int) -> str:
    """What is decided, at a spread of 0.3 points and of 0.6."""
    rng, rows = np.random.default_rng(3), []
    for cells, seeds in product((10, 20), (3, 5, 7, 10)):
        for family, weights_QC in families(cells).items():
            row = [cells, seeds, family]
            scores_XCS = normal_scores(rng, (studies, cells, seeds))
            for scale in (1, 2):
                found = estimate(weights_QC, scale * scores_XCS)
                for share_Q in (decided(found, difference=0.4), decided(found)):
                    low, high = 100 * share_Q.min(), 100 * share_Q.max()
                    row.append(f"{low:.0f}" if round(low) == round(high) else f"{low:.0f} to {high:.0f}")
            rows.append(row)
    head = ["0.4 points at 0.3", "same at 0.3", "0.4 points at 0.6", "same at 0.6"]
    return table(f"Decided in % of {studies} studies, by contrast", ["cells", "seeds", "family", *head], rows)


def of_images(studies: int) -> str:
    """Everything at once, drawn image by image, with a rotating hold-out and with a fixed one."""
    rng, rows = np.random.default_rng(4), []
    for cells, likeness in product((10, 20), LIKENESS):
        chances_CP, shift = population(cells, likeness), LIKENESS[likeness][2]
        accuracy_C = 100 * chances_CP.mean(1, dtype=float)
        for seeds in (3, 5, 7, 10):
            scores = {rotate: image_scores(rng, chances_CP, shift, studies, seeds, rotate) for rotate in (True, False)}
            for family, weights_QC in families(cells).items():
                truth_Q = weights_QC @ accuracy_C
                found = estimate(weights_QC, scores[True])
                spread = float(np.sqrt((found.spread_X**2).mean()))
                noisy = [
                    100 * misses(estimate(weights_QC, with_kind(rng, scores[True], kind, spread)), truth_Q)
                    for kind in KINDS[1:]
                ]
                fixed = estimate(weights_QC, scores[False])
                rows.append(
                    [
                        f"{likeness} ({disagreement(chances_CP):.2f})",
                        cells,
                        seeds,
                        family,
                        f"{spread:.2f}",
                        100 * misses(found, truth_Q),
                        *noisy,
                        100 * false_same(found, truth_Q),
                        f"{100 * decided(found, truth_Q, 0.4).min():.0f}",
                        f"{100 * decided(found, truth_Q).min():.0f}",
                        100 * misses(fixed, truth_Q),
                        f"{100 * decided(fixed, truth_Q, 0.4).min():.0f}",
                    ]
                )
    head = ["cells (disagreement)", "cells", "seeds", "family", "spread", *(f"misses, {kind}" for kind in KINDS)]
    head += ["false same at the margin", "0.4 decided", "same decided", "fixed split: misses", "fixed: 0.4 decided"]
    return table(f"Images: % of {studies} studies; what is decided, of the hardest contrast", head, rows)


def of_new_images(studies: int) -> str:
    """Misses where the truth is the accuracy on images without end: ten parts of one population never run out."""
    rng, rows = np.random.default_rng(9), []
    for cells, likeness in product((10, 20), LIKENESS):
        chances_CP, shift = population(cells, likeness), LIKENESS[likeness][2]
        for family, weights_QC in families(cells).items():
            percent = [
                100 * misses(estimate(weights_QC, new_image_scores(rng, chances_CP, shift, studies, seeds)))
                for seeds in (3, 5, 7, 10)
            ]
            rows.append([f"{likeness} ({disagreement(chances_CP):.2f})", cells, family, *percent])
    head = ["cells (disagreement)", "cells", "family", "3 seeds", "5", "7", "10"]
    return table(f"New images for every seed: misses in % of {studies} studies", head, rows)


def alternatives(weights_QC: np.ndarray, scores_XCS: np.ndarray) -> dict[str, np.ndarray]:
    """Errors (X, Q) by other rules: pooled residuals alone, and each cell by the larger of its own and the pooled."""
    spread = residual_variances(scores_XCS, np.ones(scores_XCS.shape[1:], bool))
    own_XC = np.maximum(spread.own_XC, spread.pooled_X[:, None])
    seeds, squares_CQ = scores_XCS.shape[-1], (weights_QC**2).T
    return {
        "pooled alone": np.sqrt(spread.pooled_X[:, None] * squares_CQ.sum(0) / seeds),
        "each cell the larger of own and pooled": np.sqrt(own_XC @ squares_CQ / seeds),
        "t over seeds": (weights_QC @ scores_XCS).std(-1, ddof=1) / seeds**0.5,
        "here": errors(weights_QC, scores_XCS).error_XQ,
    }


def of_rules(studies: int) -> str:
    """Why the errors are estimated as they are: misses and power of other rules on the same studies."""
    rng, rows = np.random.default_rng(5), []
    chances_CP = population(20, "very unlike")
    truth_C = 100 * chances_CP.mean(1, dtype=float)
    for seeds in (3, 5, 10):
        cases = {kind: normal_scores(rng, (studies, 20, seeds), kind) for kind in KINDS}
        images = image_scores(rng, chances_CP, 0.1, min(studies, 2000), seeds, rotate=True)
        cases["very unlike cells, images"] = images - truth_C[:, None]
        for family, weights_QC in families(20).items():
            joint, shown = joint_t(correlation(weights_QC)), {}
            for scores_XCS in cases.values():
                mean_XQ = scores_XCS.mean(-1) @ weights_QC.T
                for rule, error_XQ in alternatives(weights_QC, scores_XCS).items():
                    by_seeds = by_seeds_constant(seeds, len(weights_QC))
                    half_XQ = error_XQ * (by_seeds if rule == "t over seeds" else joint.constant(19 * (seeds - 1)))
                    if not shown.get(rule):
                        power = (mean_XQ + 0.4 > half_XQ).mean(0)
                        shown[rule] = [f"{100 * power.min():.0f} to {100 * power.max():.0f}"]
                    shown[rule].append(100 * float((np.abs(mean_XQ) > half_XQ).any(1).mean()))
            rows += [[seeds, family, rule, *shown[rule][1:], shown[rule][0]] for rule in shown]
    head = ["seeds", "family", "errors", *cases, "0.4 points found, equal"]
    return table(f"Other rules, 20 cells: misses in % of {studies} studies", head, rows)


def of_one_sided(studies: int) -> str:
    """Why *same* takes the interval that is printed: with a one-sided constant the deciding intervals cover too little.

    The constant is that of the largest signed t, half of the signs turned.
    """
    rng, rows = np.random.default_rng(6), []
    for seeds, family in product((5, 7, 10), families(20)):
        weights_QC = families(20)[family]
        joint = joint_t(correlation(weights_QC))
        sign_Q = np.where(np.arange(len(weights_QC)) % 2, 1, -1)
        normal_XQ = rng.normal(size=(200_000, joint.root_QR.shape[1])) @ joint.root_QR.T
        df = 19 * (seeds - 1)
        t_XQ = normal_XQ / np.sqrt(rng.chisquare(df, size=(len(normal_XQ), 1)) / df)
        one_sided = float(np.quantile((sign_Q * t_XQ).max(1), 0.95))
        found = estimate(weights_QC, normal_scores(rng, (studies, 20, seeds)))
        narrow = found._replace(constant_Q=np.full(len(weights_QC), one_sided))
        is_same_XQ = verdicts(narrow.low_XQ, narrow.high_XQ, MARGIN) == "same"
        low_XQ = np.where(is_same_XQ, narrow.low_XQ, found.low_XQ)
        high_XQ = np.where(is_same_XQ, narrow.high_XQ, found.high_XQ)
        rows.append(
            [
                seeds,
                family,
                f"{found.constant_Q[0]:.2f}",
                f"{one_sided:.2f}",
                100 * float(decided(found).mean()),
                100 * float(decided(narrow).mean()),
                100 * (1 - misses(found)),
                100 * (1 - float(((low_XQ > 0) | (high_XQ < 0)).any(1).mean())),
            ]
        )
    head = ["seeds", "family", "constant", "one-sided", "same decided", "same, one-sided"]
    head += ["all intervals cover", "all deciding intervals cover, one-sided"]
    return table(f"Same by a one-sided constant, 20 equal cells, spread 0.3: % of {studies} studies", head, rows)


RACES = {
    "20 cells, main effects 0.6, 1.0, 0, 0, 0.3; spread 0.6": ("main effects", 0.6, (0.6, 1.0, 0, 0, 0.3)),
    "20 cells, main effects 0.4, 0.8, 0, 0.4, 0.1; spread 0.6": ("main effects", 0.6, (0.4, 0.8, 0, 0.4, 0.1)),
    "20 cells against base, 10 clear, 9 equal; spread 0.3": ("cells against base", 0.3, 10),
    "20 cells against base, 15 clear, 4 equal; spread 0.3": ("cells against base", 0.3, 15),
    "20 equal cells against base; spread 0.3": ("cells against base", 0.3, 0),
}
CLEAR = (0.8, -0.8, 1, -1, 1.5, -1.5, 2, -2, -2, 1.2, 2, 2, 2, -2, -2)


def race_truth(effect: tuple | int) -> np.ndarray:
    """The means (C,) of 20 cells: from effects of 2 experts, 4, mlp, residual and Cutout; or so many clear ones."""
    if isinstance(effect, int):
        return np.array([0, *CLEAR[:effect], *[0] * (19 - effect)], dtype=float)
    of_experts = {1: 0, 2: effect[0], 4: effect[1]}
    return np.array(
        [
            of_experts[experts] + effect[2] * (gate == "mlp") + effect[3] * residual + effect[4] * (cutout == 8)
            for experts, gate, residual, cutout in networks(20)
        ]
    )


def raced(
    rng: np.random.Generator, weights_QC: np.ndarray, truth_C: np.ndarray, spread: float, last: int, studies: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What races decide (X, Q), the trainings of a cell that they take (X,), and whether some verdict is wrong (X,)."""
    truth_Q, decided_XQ, cost_X, wrong_X = weights_QC @ truth_C, [], [], []
    for _ in range(studies):
        scores_CS = truth_C[:, None] + rng.normal(0, spread, size=(len(truth_C), last))
        found = race(weights_QC, scores_CS, MARGIN, last)
        verdict_Q = np.array([judgement.verdict for judgement in found.judgements])
        decided_XQ.append(verdict_Q != "open")
        cost_X.append(found.wanted_C.mean())
        wrong_X.append(is_wrong(verdict_Q, truth_Q).any())
    return np.array(decided_XQ), np.array(cost_X), np.array(wrong_X)


def is_wrong(verdict_XQ: np.ndarray, truth_Q: np.ndarray) -> np.ndarray:
    return (
        ((verdict_XQ == "better") & (truth_Q <= 1e-9))
        | ((verdict_XQ == "worse") & (truth_Q >= -1e-9))
        | ((verdict_XQ == "same") & (np.abs(truth_Q) >= MARGIN - 1e-9))
    )


def of_races(studies: int) -> str:
    """Races against the fixed design that decides as much, for designs that decide 90 to 99% of their contrasts."""
    rng, rows = np.random.default_rng(7), []
    for name, (family, spread, effect) in RACES.items():
        weights_QC, truth_C = families(20)[family], race_truth(effect)
        shares = []
        counts = range(4, 31)
        for seeds in counts:
            scores_XCS = truth_C[:, None] + rng.normal(0, spread, size=(4000, 20, seeds))
            found = estimate(weights_QC, scores_XCS)
            shares.append(float((verdicts(found.low_XQ, found.high_XQ, MARGIN) != "open").mean()))
        shares = np.maximum.accumulate(shares)
        for last in (12, 16, 20, 24):
            decided_XQ, cost_X, wrong_X = raced(rng, weights_QC, truth_C, spread, last, studies)
            share = float(decided_XQ.mean())
            if not 0.85 <= share < shares[-1] or share > 0.9995:
                continue
            fixed = float(np.interp(share, shares, counts))
            rows.append(
                [
                    name,
                    last,
                    100 * share,
                    f"{cost_X.mean():.2f}",
                    fixed,
                    f"{cost_X.mean() / fixed:.2f}",
                    100 * float(wrong_X.mean()),
                ]
            )
    head = ["study", "last look", "decided %", "trainings a cell", "fixed design of the same power", "ratio", "wrong %"]
    return table(f"Races, {studies} of each", head, rows)


def of_race_errors(studies: int) -> str:
    """Studies in which some verdict of a race is wrong: equal cells, and all of them at the margin."""
    rng, rows = np.random.default_rng(8), []
    for family, weights_QC in families(20).items():
        for name, truth_C in (("equal", np.zeros(20)), ("at the margin", at_margin(weights_QC))):
            *_, wrong_X = raced(rng, weights_QC, truth_C, SPREAD, 10, studies)
            rows.append([family, name, 100 * float(wrong_X.mean())])
    return table(f"Races to 10 seeds, 20 cells: wrong in % of {studies}", ["family", "cells", "wrong %"], rows)


def at_margin(weights_QC: np.ndarray) -> np.ndarray:
    """Means (C,) that give every contrast the margin, half of them below 0."""
    target_Q = MARGIN * np.where(np.arange(len(weights_QC)) % 2, 1, -1)
    return np.linalg.lstsq(weights_QC, target_Q, rcond=None)[0]


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    for make, studies in (
        (of_spreads, 10 * count),
        (of_small_designs, 10 * count),
        (of_power, 2 * count),
        (of_rules, 5 * count),
        (of_one_sided, 5 * count),
        (of_races, count // 4),
        (of_race_errors, count // 2),
        (of_new_images, 5 * count),
        (of_images, count),
    ):
        print(make(studies), flush=True)
