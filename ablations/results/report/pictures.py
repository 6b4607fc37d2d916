"""The figures of a report, with the words for those who don't see them, and those under them."""

import base64
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from expertgrid.ablations.results.evidence import Effect, Evidence
from expertgrid.ablations.results.report import plots
from expertgrid.ablations.results.report.findings import Examined, Findings
from expertgrid.ablations.results.rows import Row, latency_front, smallest, timed_together

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_ROWS = 24  # cells in a figure
MOST_EFFECTS = 24  # in a figure
MOST_GATES = 12  # blocks whose heat maps are drawn


@dataclass(frozen=True)
class Picture:
    """A figure with the words for those who don't see it, and those under it."""

    section: str  # of the report
    name: str  # of its file
    draw: Callable[[], "Figure"]
    alt: str
    caption: str
    wide: bool = True

    @property
    def uri(self) -> str:
        return f"data:image/svg+xml;base64,{base64.b64encode(plots.save(self.draw(), 'svg')).decode()}"


def pictures(findings: Findings) -> list[Picture]:
    """All figures of a report. None where no trial is finished."""
    if not findings.ranked:
        return []
    evidence = findings.evidence
    alone = "The mean over the cells that differ in this factor alone."
    added = "What one change adds to the other: 0 where each does the same with and without the other. Exploratory."
    return [
        *_scores(findings.ranked),
        *_effects("Main effects", evidence, evidence.effects, alone),
        *_effects("Interactions", evidence, evidence.interactions, added),
        *_curves(findings),
        _cost(findings),
        *_gates(findings.examined),
        *_confusion(findings.examined),
    ]


def _scores(ranked: Sequence[Row]) -> Iterator[Picture]:
    best, drawn = ranked[0], ranked[:MOST_ROWS]
    most = f"The {MOST_ROWS} best of {len(ranked)} cells. " if len(ranked) > MOST_ROWS else ""
    yield Picture(
        "table",
        "accuracy",
        partial(plots.accuracy_figure, "", drawn),
        f"Validation and test {best.scale.title} of {len(drawn)} cells; best on validation is {best.name}.",
        f"{most}Lines are 95% intervals of the mean over seeds; a dot without one has one seed, or seeds that agree.",
    )


def _effects(title: str, evidence: Evidence, effects: Sequence[Effect], meaning: str) -> Iterator[Picture]:
    known = [effect for effect in effects if effect.judgement.mean is not None]
    margin, by = evidence.margin, evidence.scale
    largest = sorted(known, key=lambda effect: -abs(effect.judgement.mean or 0))[:MOST_EFFECTS]
    left_out = f" The {MOST_EFFECTS} largest of {len(known)}." if len(known) > MOST_EFFECTS else ""
    if largest:
        yield Picture(
            "effects",
            title.lower().replace(" ", "-"),
            partial(plots.effects_figure, [(effect.name, effect.judgement) for effect in largest], margin, by),
            f"{title}: " + "; ".join(f"{of.name}: {of.judgement.mean:+.{by.decimals}f}" for of in largest[:8]),
            f"{title}. {meaning} Lines are the simultaneous 95% intervals that decide, the shade is the margin; a "
            f"filled dot has a verdict.{left_out}",
        )


def _curves(findings: Findings) -> Iterator[Picture]:
    for number, (row, every_seed) in enumerate(findings.curves, 1):
        if by_seed := [epochs for epochs in every_seed if epochs]:
            last = sum(epochs[-1].validation_accuracy for epochs in by_seed) / len(by_seed)
            yield Picture(
                "curves",
                f"curves-{number}",
                partial(plots.curves_figure, row.name, by_seed),
                f"Loss and accuracy by epoch of {row.name}: {100 * last:.1f}% validation accuracy at the end.",
                f"{number}. {row.name}, {len(by_seed)} seed{'s' if len(by_seed) > 1 else ''}.",
                wide=False,
            )


def _cost(findings: Findings) -> Picture:
    """The score against latency where two rows were timed together, else against MACs."""
    latencies = {row: smallest(row.latency) for row in timed_together(findings.ranked) if row.latency}
    front = [list(latencies).index(row) for row in latency_front(findings.ranked)]
    if latencies:
        rows, costs = list(latencies), [timed.p50_ms for timed in latencies.values()]
        what = f"measured latency, ms (median, batch {latencies[rows[0]].batch})"
        names = "; ".join(f"{number}: {rows[place].name}" for number, place in enumerate(front, 1))
        on_front = f"; the Pareto front is {names}"
        caption = (
            f"The {len(rows)} cells that were exported and timed in turns. No cell is both faster and better than one "
            f"on the front ({names}); the front goes by means, and does not ask whether the differences are decided."
        )
    else:
        rows, costs, on_front = findings.ranked, [row.records[0].macs / 1e6 for row in findings.ranked], ""
        what = "multiply-accumulates of one image, millions"
        caption = (
            "Against multiply-accumulates, which are no time, as fewer than two cells have a measured latency. "
            f"`expertgrid bench {shlex.quote(str(findings.evidence.results.path))}` measures all of them."
        )
    draw = partial(plots.costs_figure, rows, costs, front, what)
    alt = f"Validation {rows[0].scale.title} against {what}{on_front}."
    return Picture("cost", "cost", draw, alt, caption)


def _gates(examined: Examined) -> Iterator[Picture]:
    for number, gate in enumerate(examined.gates[:MOST_GATES], 1):
        yield Picture(
            "gates",
            f"gate-{number}",
            partial(plots.gate_figure, gate, examined.classes),
            f"Mean gate weight by class and expert in block {gate.block}: "
            + ", ".join(f"expert {k} {weight:.2f}" for k, weight in enumerate(gate.mean_K)),
            f"Block {gate.block}: mean weight of each expert, by class.",
            wide=False,
        )


def _confusion(examined: Examined) -> Iterator[Picture]:
    if examined.confusion_NN is not None:
        right, images = int(np.trace(examined.confusion_NN)), int(examined.confusion_NN.sum())
        share = f"{right:,} of {images:,} {examined.confusion_split} images are"
        yield Picture(
            "confusion",
            "confusion",
            partial(plots.confusion_figure, examined.confusion_NN, examined.classes),
            f"Confusion matrix: {share} recognised.",
            f"{share} on the diagonal. Rows are what an image is, columns what it was taken for; the colour is the "
            "share of its row.",
        )
