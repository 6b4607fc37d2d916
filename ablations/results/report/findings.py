"""What a report says of a study, from its records, its best network and its validation images; nothing is drawn here.

What is not there is left out with a reason, never guessed. No network is run on the test split: what is said of its
images is of the predictions that were kept when the split was read.

Shapes: B images, H x W pixels, C channels, N classes, S seeds, E epochs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from scipy.special import log_softmax
from sklearn.metrics import confusion_matrix

from expertgrid.ablations.records.directory import StudyDirectory
from expertgrid.ablations.records.plan import Plan
from expertgrid.ablations.results.evidence import Evidence, read_evidence
from expertgrid.ablations.results.report.gates import BlockGate, block_gate, predict_watched
from expertgrid.ablations.results.rows import Row, best_record, ranking
from expertgrid.ablations.results.stats.images import Share, class_accuracies, consistent_images
from expertgrid.model.checkpoint import Checkpoint, load
from expertgrid.model.system.errors import InputError
from expertgrid.model.training.data import CACHE, load_data, split_share
from expertgrid.model.training.splits import ResidentData
from expertgrid.model.training.trial import Epoch

MOST_CURVES = 6  # cells whose curves are drawn
MOST_MISTAKES = 24
MOST_IMAGES = 40  # on which two cells differ at every seed
SEARCHED_FOR_GATES = 10  # cells, best first


@dataclass(frozen=True)
class Mistake:
    """A validation image that was taken for another class, surely."""

    pixels_HWC: np.ndarray  # uint8
    truth: str
    taken: str
    probability: float  # of the class that it was taken for


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
class DifferentImage:
    """An image that one cell recognises at every seed and another cell at none."""

    number: int  # in the split, from 0
    truth: str
    first: str  # what the networks of the first cell take it for, most frequent first
    second: str
    pixels_HWC: np.ndarray | None  # uint8; None where the data are not here


@dataclass(frozen=True)
class ImageDifferences:
    """On which images two cells differ at every seed, from predictions that were kept."""

    first: Row
    second: Row
    seeds: int
    split: str  # "test", or "validation" where all seeds hold out the same images
    only_first: list[DifferentImage]
    only_second: list[DifferentImage]
    counts: tuple[int, int]  # of all, also those that are not listed
    by_chance: float  # images of both kinds together, of two cells that are equal


@dataclass(frozen=True)
class Findings:
    """All that a report says of a study. Accuracies are in percent."""

    evidence: Evidence
    ranked: list[Row]  # with a finished trial, best on validation first
    images: ImageDifferences | None
    images_missing: str
    curves: list[tuple[Row, list[list[Epoch]]]]  # of the best rows, by seed
    examined: Examined


def read_findings(
    directory: StudyDirectory, data: str | None = None, data_dir: Path | None = None, metric: str | None = None
) -> Findings:
    """Reads a study directory. Raises InputError for a directory without a study and for damaged files."""
    evidence = read_evidence(directory, metric)
    ranked = ranking(evidence.results.rows)
    plan = evidence.results.plan
    resident, reason = _images(directory, plan, best_record(ranked[0]).trial, data, data_dir) if ranked else (None, "")
    examined = examine(directory, plan, ranked, resident, reason)
    images, images_missing = _different_images(directory, evidence, ranked, examined.classes, resident)
    return Findings(
        evidence=evidence,
        ranked=ranked,
        images=images,
        images_missing=images_missing,
        curves=[(row, [directory.epochs(record.trial) for record in row.records]) for row in ranked[:MOST_CURVES]],
        examined=examined,
    )


# --- Two cells, image by image ---


def _different_images(
    directory: StudyDirectory,
    evidence: Evidence,
    ranked: Sequence[Row],
    classes: Sequence[str],
    resident: ResidentData | None,
) -> tuple[ImageDifferences | None, str]:
    """The best cell against the base (against the next best where the base is the best), or why there is nothing."""
    if len(ranked) < 2:
        return None, "There are no two cells with finished trials."
    first, base = ranked[0], evidence.results.rows[0]
    second = base if base in ranked[1:] else ranked[1]
    split = "validation" if evidence.fixed_split else "test"
    seeds = sorted(first.by_seed.keys() & second.by_seed.keys())
    if len(seeds) < 2:
        return None, "Two seeds of both cells are needed to tell what a cell does from what a seed does."
    predictions = [[directory.predictions(row.by_seed[seed].trial) for seed in seeds] for row in (first, second)]
    if not all(map(all, predictions)):
        return None, "The predictions of these trials were not kept."
    taken = [[getattr(of_seed, split) for of_seed in row] for row in predictions]
    labels_B = getattr(predictions[0][0], f"{split}_labels")
    right = [np.array([predicted_B == labels_B for predicted_B in row]) for row in taken]
    consistent = consistent_images(*right)
    pixels_BHWC = None
    if resident is not None:
        splits = resident.splits(evidence.results.plan.hold_out, seeds[0])
        pixels_BHWC = (splits.validation if split == "validation" else splits.test).pixels().numpy()

    def listed(places_B: np.ndarray) -> list[DifferentImage]:
        return [
            DifferentImage(
                int(place),
                _class_name(classes, labels_B[place]),
                *(_taken_for([predicted_B[place] for predicted_B in row], classes) for row in taken),
                None if pixels_BHWC is None else pixels_BHWC[place],
            )
            for place in places_B[:MOST_IMAGES]
        ]

    places = consistent.only_first, consistent.only_second
    counts = len(places[0]), len(places[1])
    return ImageDifferences(first, second, len(seeds), split, *map(listed, places), counts, consistent.by_chance), ""


def _class_name(classes: Sequence[str], label: int) -> str:
    return classes[label] if label < len(classes) else str(label)


def _taken_for(labels: Sequence[int], classes: Sequence[str]) -> str:
    values, counts = np.unique(labels, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return ", ".join(_class_name(classes, values[place]) for place in order)


# --- The best network, image by image ---


def examine(
    directory: StudyDirectory, plan: Plan, ranked: Sequence[Row], resident: ResidentData | None, reason: str
) -> Examined:
    """The best trial of the best row on the validation images, and its kept predictions of the test images.

    Where that network has no gate, the gates are those of the best row that has some. `reason` says why there are no
    images, where there are none. Raises InputError for damaged files.
    """
    if not ranked:
        missing = dict.fromkeys(("confusion", "mistakes", "gates"), "No trial is finished.")
        return Examined(missing=missing)
    best = best_record(ranked[0])
    examined = Examined(row=ranked[0], trial=best.trial)
    checkpoint, predictions = _checkpoint(directory, best.trial), directory.predictions(best.trial)
    if checkpoint:
        examined.classes = checkpoint.trained.classes
        if predictions:
            predictions.measured("test", len(examined.classes), ())  # raises InputError for other classes
    elif predictions:
        last = int(max(predictions.test_labels.max(), predictions.test.max()))
        examined.classes = tuple(str(label) for label in range(last + 1))
    if predictions:
        _count(examined, predictions.test_labels, predictions.test, "test")
    if checkpoint is None or resident is None:
        reason = reason if checkpoint else f"The checkpoint of trial {best.trial} is not in the study directory."
        examined.missing = {"mistakes": reason, "gates": reason} | ({} if predictions else {"confusion": reason})
        return examined
    validation = resident.splits(plan.hold_out, best.seed).validation
    labels_B, pixels_BHWC = validation.labels_B.numpy(), validation.pixels().numpy()
    logits_BN, weights = predict_watched(checkpoint, validation)
    examined.images, examined.wrong = len(labels_B), int((logits_BN.argmax(1) != labels_B).sum())
    examined.mistakes = worst(logits_BN, labels_B, pixels_BHWC, examined.classes)
    if not examined.mistakes:
        examined.missing["mistakes"] = f"The best network mistakes none of the {len(labels_B)} validation images."
    if not predictions:
        _count(examined, labels_B, logits_BN.argmax(1), "validation")
    examined.gates_row, examined.gates_trial = ranked[0], best.trial
    for row in ranked[1:SEARCHED_FOR_GATES]:
        if weights:
            break
        record = best_record(row)
        examined.gates_row, examined.gates_trial = row, record.trial
        other = _checkpoint(directory, record.trial)
        if other and any(".gate." in name for name in other.weights):
            validation = resident.splits(plan.hold_out, record.seed).validation
            weights = predict_watched(other, validation)[1]
    labels_B, classes = validation.labels_B.numpy(), len(examined.classes)
    examined.gates = [block_gate(name, weights_BK, labels_B, classes) for name, weights_BK in weights.items()]
    if not examined.gates:
        among = f" among the {SEARCHED_FOR_GATES} best" if len(ranked) > SEARCHED_FOR_GATES else ""
        examined.missing["gates"] = f"No network has a gate{among}."
    return examined


def worst(
    logits_BN: np.ndarray, labels_B: np.ndarray, pixels_BHWC: np.ndarray, classes: Sequence[str]
) -> list[Mistake]:
    """The images that were taken for another class, those with the highest cross entropy first."""
    log_BN = log_softmax(logits_BN.astype(float), axis=1)
    loss_B, taken_B = -log_BN[np.arange(len(labels_B)), labels_B], logits_BN.argmax(1)
    places = [place for place in np.argsort(-loss_B, kind="stable") if taken_B[place] != labels_B[place]]
    return [
        Mistake(
            pixels_BHWC[place],
            classes[labels_B[place]],
            classes[taken_B[place]],
            float(np.exp(log_BN[place, taken_B[place]])),
        )
        for place in places[:MOST_MISTAKES]
    ]


def _count(examined: Examined, labels_B: np.ndarray, predicted_B: np.ndarray, split: str) -> None:
    examined.confusion_NN = confusion_matrix(labels_B, predicted_B, labels=range(len(examined.classes)))
    examined.confusion_split, examined.shares = split, class_accuracies(examined.confusion_NN)


def _checkpoint(directory: StudyDirectory, trial: str) -> Checkpoint | None:
    file = directory.checkpoint(trial)
    return load(file) if file.exists() else None


def _images(
    directory: StudyDirectory, plan: Plan, trial: str, source: str | None, data_dir: Path | None
) -> tuple[ResidentData | None, str]:
    """The images that a trial was trained on, or why they cannot be had here. Nothing is downloaded."""
    cifar = split_share(source or plan.source)[0] in ("cifar10", "cifar100")
    try:
        data = load_data(source or plan.source, (data_dir or CACHE) if cifar else data_dir, plan.image_size)
        if config := directory.config(trial):
            config.check_images(data)
    except InputError as error:
        if source or data_dir:
            raise
        return None, f"The images are not available on this machine: {error}."
    return ResidentData(data, torch.device("cpu")), ""
