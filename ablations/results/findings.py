"""What a report says of a study, from its records, its best network and its validation images; nothing is drawn here.

What is not there is left out with a reason, never guessed. No image of the test split is looked at: the confusion
matrix on it is of the predictions that were kept when the split was read.

Shapes: B images, H x W pixels, C channels, N classes, S seeds, E epochs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from ablations.records import Plan, StudyDirectory, TestRead, read_record
from ablations.results import evidence, stats
from ablations.results.evidence import ALPHA, Judgement, Marginal, Row, on_validation
from ablations.results.gates import BlockGate, block_gate, predict_watched
from ablations.results.stats import Contrast, Share
from ablations.study import Study
from ablations.training.data import CACHE, load_data, split_share
from ablations.training.splits import ResidentData
from ablations.training.trial import Epoch, Trial
from model.checkpoint import Checkpoint, load
from model.errors import InputError

MOST_CURVES = 6  # cells whose curves are drawn
MOST_PAIRS = 10  # pairs of factors whose interactions are shown
MOST_MISTAKES = 24
MOST_CELLS = 200  # among which the probability to be the best is drawn
MOST_DRAWN = 1_000_000  # means, for it; of 200 cells 5,000 each, and exact to about 0.02
TRIED_FOR_GATES = 10  # cells, best first


@dataclass(frozen=True)
class Lead:
    """The best row less another, on validation. `p` is adjusted, None where there is no interval."""

    row: Row
    contrast: Contrast
    p: float | None

    @property
    def better(self) -> bool:
        """Whether that the best row is better than it is decided."""
        return self.p is not None and self.p <= ALPHA and self.contrast.mean > 0


@dataclass(frozen=True)
class Mistake:
    """A validation image that was taken for another class, surely."""

    pixels_HWC: np.ndarray  # uint8
    truth: str
    taken: str
    probability: float  # of the class that it was taken for
    loss: float  # nats


@dataclass
class Examined:
    """What the best network does, image by image; None with a reason in `missing` for what could not be had."""

    row: Row | None = None
    trial: str = ""
    classes: tuple[str, ...] = ()
    confusion_NN: np.ndarray | None = None
    confusion_split: str = ""
    shares: list[Share] = field(default_factory=list)  # by class
    mistakes: list[Mistake] | None = None
    wrong: int = 0  # validation images
    images: int = 0  # of the validation split
    gates: list[BlockGate] = field(default_factory=list)
    gates_row: Row | None = None
    gates_trial: str = ""
    missing: dict[str, str] = field(default_factory=dict)  # reasons, by "confusion", "mistakes" and "gates"


@dataclass(frozen=True)
class Findings:
    """All that a report says of a study. Accuracies are in percent."""

    name: str
    path: Path
    study: Study
    plan: Plan
    rows: list[Row]
    judgements: list[Judgement]  # against the first row
    best: Row | None
    leads: list[Lead]  # over the others, best on validation first
    probability: float | None  # that the best row has the highest true mean
    effects: dict[tuple[str, ...], list[Marginal]]  # by factor, and by pair of factors
    effects_missing: str
    curves: list[tuple[Row, list[list[Epoch]]]]  # of the best rows, by seed
    reads: list[TestRead]
    examined: Examined


def find(directory: StudyDirectory, data_dir: Path | None = None) -> Findings:
    """Reads a study directory. Raises InputError for one that is none or is damaged."""
    study, plan, rows = directory.study, directory.plan, evidence.study_rows(directory)
    best, ranked = evidence.best_row(rows), ranking(rows)
    effects, effects_missing = _effects(directory)
    return Findings(
        name=evidence.study_name(directory),
        path=directory.path,
        study=study,
        plan=plan,
        rows=rows,
        judgements=evidence.judge(rows, study.margin, plan.race),
        best=best,
        leads=leads(best, ranked, sequential=plan.race is not None) if best else [],
        probability=_probability(best, ranked) if best and plan.race is None else None,
        effects=effects,
        effects_missing=effects_missing,
        curves=[(row, [_epochs(directory, record.trial) for record in row.records]) for row in ranked[:MOST_CURVES]],
        reads=directory.test_reads(),
        examined=examine(directory, ranked, data_dir),
    )


def ranking(rows: Sequence[Row]) -> list[Row]:
    """The rows with a finished trial, best on validation first; that of `best_row` leads."""
    best = evidence.best_row(rows)
    merit = {id(row): row.interval(on_validation).mean for row in rows if row.records}
    return sorted((row for row in rows if row.records), key=lambda row: (row is not best, -merit[id(row)]))


def leads(best: Row, ranked: Sequence[Row], sequential: bool = False) -> list[Lead]:
    """The best row against each other, with p-values that allow for its having been chosen by the same scores.

    Holm's correction makes the C - 1 differences from one row a family, and a factor of C / 2 pays for the choice of
    that row among C: as if all pairs had been asked for. With it, any difference that is none is found with probability
    0.05 at most, whichever row is chosen. (For equal rows are equal to each other: among m of them each is one of m - 1
    true hypotheses of its family, at C levels that sum to at most 0.05.) `sequential`: seeds were added by a race, for
    which these tests do not hold; there are no p-values then.
    """
    others = [row for row in ranked if row is not best]
    contrasts = [evidence.contrast_of(best, row, on_validation) for row in others]
    decisions = stats.decide(contrasts)
    price = (len(others) + 1) / 2
    p = [None if sequential or one.p_difference is None else min(1.0, price * one.p_difference) for one in decisions]
    return [Lead(*one) for one in zip(others, contrasts, p)]


def _probability(best: Row, ranked: Sequence[Row]) -> float | None:
    seeds, validation_CS, _ = evidence.common_scores(ranked)
    if len(seeds) < 2 or not 1 < len(ranked) <= MOST_CELLS:
        return None
    draws = min(20_000, MOST_DRAWN // len(ranked))
    return float(stats.probability_best(validation_CS, draws)[list(map(id, ranked)).index(id(best))])


def pareto(costs_C: Sequence[float], scores_C: Sequence[float]) -> list[int]:
    """The places of those that nothing cheaper, or as cheap, is better than, in the order of their costs."""
    front, best = [], -np.inf
    for place in sorted(range(len(costs_C)), key=lambda place: (costs_C[place], -scores_C[place])):
        if scores_C[place] > best:
            front.append(place)
            best = scores_C[place]
    return front


def _effects(directory: StudyDirectory) -> tuple[dict[tuple[str, ...], list[Marginal]], str]:
    """The marginals of each factor and pair of factors that have effects, and why some have none."""
    study = directory.study
    factors = [name for name, levels in study.factors.items() if len(levels) > (study.design == "factorial")]
    if not factors:
        return {}, "The study varies no factor."
    pairs = [(one, other) for i, one in enumerate(factors) for other in factors[i + 1 :]]
    asked = [(name,) for name in factors]
    asked += pairs if study.design == "factorial" and len(pairs) <= MOST_PAIRS else []
    found = {names: evidence.marginals(directory, names) for names in asked}
    with_effects = {names: rows for names, rows in found.items() if any(_judged(row) for row in rows)}
    if not with_effects:
        return {}, "A cell has no finished trial, so that the levels are not alike in all else; or no seed is common."
    skipped = f"Interactions are left out: there are {len(pairs)} pairs of factors." if len(pairs) > MOST_PAIRS else ""
    return with_effects, skipped


def _judged(row: Marginal) -> bool:
    return row.effect is not None and row.effect.verdict != "reference"


def _epochs(directory: StudyDirectory, trial: str) -> list[Epoch]:
    try:
        return directory.epochs(trial)
    except UnicodeDecodeError as error:
        raise InputError(f"{directory.trial(trial) / 'epochs.jsonl'}: not UTF-8: {error}") from None


# --- The best network, image by image ---


def examine(directory: StudyDirectory, ranked: Sequence[Row], data_dir: Path | None = None) -> Examined:
    """The best trial of the best row on the validation images, and its kept predictions of the test images.

    Where that network has no gate, the gates are those of the best row that has some. Raises InputError for damaged
    files, and for a `data_dir` without the data.
    """
    found = Examined()
    if not ranked:
        found.missing = dict.fromkeys(("confusion", "mistakes", "gates"), "No trial is finished.")
        return found
    found.row, found.trial = ranked[0], evidence.best_record(ranked[0]).trial
    checkpoint = _checkpoint(directory, found.trial)
    kept = directory.predictions(found.trial)
    if checkpoint:
        found.classes = checkpoint.trained.classes
    elif kept:
        found.classes = tuple(str(label) for label in range(int(max(kept.test_labels.max(), kept.test.max())) + 1))
    if kept:
        _count(found, kept.test_labels, kept.test, "test")
    if checkpoint is None:
        reason = f"The checkpoint of trial {found.trial} is not in the study directory."
        found.missing |= {"mistakes": reason, "gates": reason} | ({} if kept else {"confusion": reason})
        return found
    resident, reason = _images(directory, found.trial, data_dir)
    if resident is None:
        found.missing |= {"mistakes": reason, "gates": reason} | ({} if kept else {"confusion": reason})
        return found
    hold_out = directory.plan.hold_out
    validation = resident.splits(hold_out, evidence.best_record(ranked[0]).seed).validation
    labels_B, pixels_BHWC = validation.labels_B.numpy(), validation.pixels_BHWC.numpy()
    logits_BN, weights = predict_watched(checkpoint, validation)
    found.images, found.wrong = len(labels_B), int((logits_BN.argmax(1) != labels_B).sum())
    found.mistakes = worst(logits_BN, labels_B, pixels_BHWC, found.classes)
    if not kept:
        _count(found, labels_B, logits_BN.argmax(1), "validation")
    found.gates_row, found.gates_trial = ranked[0], found.trial
    for row in ranked[1:TRIED_FOR_GATES]:
        if weights:
            break
        record = evidence.best_record(row)
        found.gates_row, found.gates_trial = row, record.trial
        other = _checkpoint(directory, found.gates_trial)
        if other and _has_gates(other):
            validation = resident.splits(hold_out, record.seed).validation
            weights = predict_watched(other, validation)[1]
    labels_B = validation.labels_B.numpy()
    found.gates = [block_gate(name, one_BK, labels_B, len(found.classes)) for name, one_BK in weights.items()]
    if not found.gates:
        found.missing["gates"] = "No network has a gate" + (
            "." if len(ranked) <= TRIED_FOR_GATES else f" among the {TRIED_FOR_GATES} best."
        )
    return found


def worst(
    logits_BN: np.ndarray, labels_B: np.ndarray, pixels_BHWC: np.ndarray, classes: Sequence[str]
) -> list[Mistake]:
    """The images that were taken for another class, those with the highest cross entropy first."""
    shifted_BN = logits_BN.astype(float) - logits_BN.max(1, keepdims=True)
    log_BN = shifted_BN - np.log(np.exp(shifted_BN).sum(1, keepdims=True))
    loss_B, taken_B = -log_BN[np.arange(len(labels_B)), labels_B], logits_BN.argmax(1)
    places = [place for place in np.argsort(-loss_B, kind="stable") if taken_B[place] != labels_B[place]]
    return [
        Mistake(
            pixels_BHWC[place],
            classes[labels_B[place]],
            classes[taken_B[place]],
            float(np.exp(log_BN[place, taken_B[place]])),
            float(loss_B[place]),
        )
        for place in places[:MOST_MISTAKES]
    ]


def _count(found: Examined, labels_B: np.ndarray, predicted_B: np.ndarray, split: str) -> None:
    found.confusion_NN = stats.confusion_matrix(labels_B, predicted_B, len(found.classes))
    found.confusion_split, found.shares = split, stats.class_accuracies(found.confusion_NN)


def _checkpoint(directory: StudyDirectory, trial: str) -> Checkpoint | None:
    file = directory.checkpoint(trial)
    return load(file) if file.exists() else None


def _has_gates(checkpoint: Checkpoint) -> bool:
    return any(".gate." in name for name in checkpoint.weights)


def _images(directory: StudyDirectory, trial: str, data_dir: Path | None) -> tuple[ResidentData | None, str]:
    """The images that a trial was trained on, or why they cannot be had here. Nothing is downloaded."""
    source, image_size = directory.plan.source, directory.plan.image_size
    cifar = split_share(source)[0] in ("cifar10", "cifar100")
    try:
        data = load_data(source, (data_dir or CACHE) if cifar else data_dir, image_size)
    except InputError as error:
        if data_dir is not None:
            raise
        return None, f"The images are not available on this machine: {error}."
    config = read_record(Trial, directory.trial(trial) / "config.json")
    if config is not None and config.fingerprint != data.fingerprint:
        return None, f"The data source {source!r} no longer has the images that this study was trained on."
    return ResidentData(data, torch.device("cpu")), ""
