"""Pictures of a study, from numbers that are ready: each function draws one, `save` makes a file of it.

They are narrow, so that a phone shows them without shrinking their letters. matplotlib is loaded when one is drawn.
"""

import io
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from expertgrid.ablations.records.record import SPLITS, Split
from expertgrid.ablations.results.rows import Row
from expertgrid.ablations.results.stats.contrasts import NONE, OPEN, Judgement
from expertgrid.model.system.errors import InputError, reason_of
from expertgrid.model.system.text import Interval
from expertgrid.model.training.metrics import ACCURACY, Scale
from expertgrid.model.training.trial import Epoch

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from expertgrid.ablations.results.report.gates import BlockGate

TEST, VALIDATION, TRAIN = "#0b6e8a", "#9aa1a7", "#c2703d"
DECIDED, UNDECIDED = "#0b6e8a", "#8b9196"
WIDTH = 4.1  # inches
LARGEST_MATRIX = 20  # classes whose numbers are written out
LONGEST_LABEL = 56  # characters

Kind = Literal["svg", "pdf", "png"]


def save(figure: "Figure", kind: Kind = "svg") -> bytes:
    """A picture as the content of a file, the same for the same picture."""
    import matplotlib

    picture = io.BytesIO()
    metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {}}[kind]
    with matplotlib.rc_context({"svg.hashsalt": "expertgrid", "pdf.fonttype": 42}):
        figure.savefig(picture, format=kind, metadata=metadata, dpi=200)
    return picture.getvalue()


def _figure(height: float, width: float = WIDTH) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _bare(axes: "Axes", grid: Literal["x", "y", "both"] = "x") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, linewidth=0.4)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8.5)


def _short(text: str, most: int = LONGEST_LABEL) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _listed(axes: "Axes", labels: Sequence[str]) -> None:
    """Rows from the top, each with its label above it, so that long ones find room."""
    axes.set_ylim(len(labels) - 0.45, -0.75)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    for place, label in enumerate(labels):
        axes.text(
            0.0, place - 0.36, _short(label), transform=axes.get_yaxis_transform(), fontsize=8.5, va="center",
            parse_math=False, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.85},
        )  # fmt: skip


def _under(figure: "Figure", axes: "Axes") -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=8.5)


def accuracy_figure(title: str, rows: Sequence[Row]) -> "Figure":
    """Each row's test and validation accuracy, or other metric, with 95% intervals, best on validation first.

    Rows without a finished trial are left out.
    """
    done = [row for row in rows if row.by_seed]
    done.sort(key=lambda row: -row.merit)
    figure = _figure(1.2 + 0.46 * len(done))
    axes = figure.add_subplot()
    looks = ("validation (selects)", "test"), (VALIDATION, TEST), (0.0, 0.22)
    for split, label, colour, shift in zip(SPLITS, *looks):
        intervals = _intervals(done, split)
        axes.errorbar(
            [interval.mean for interval in intervals],
            [y + shift for y in range(len(done))],
            xerr=_reach(intervals),
            fmt="o", markersize=4.5, capsize=2, linewidth=1.4, color=colour, label=label,
        )  # fmt: skip
    _listed(axes, [row.name for row in done])
    axes.set_xlabel(f"{done[0].scale.axis if done else ''}: mean over seeds, and its 95% interval", fontsize=8.5)
    _bare(axes)
    if title:
        figure.suptitle(title.replace("$", r"\$"), fontsize=9.5, wrap=True)  # wrapped text is parsed
    _under(figure, axes)
    return figure


def _intervals(rows: Sequence[Row], split: Split) -> list[Interval]:
    """Of rows that have a finished trial."""
    return [interval for row in rows if (interval := row.interval(split))]


def _reach(intervals: Sequence[Interval]) -> np.ndarray:
    """How far intervals reach below and above their means (2, X); 0 where there is none."""
    ends = [(0.0, 0.0) if low is None or high is None else (mean - low, high - mean) for mean, low, high in intervals]
    return np.array(ends).reshape(-1, 2).T


def check_draws(title: str) -> None:
    """Raises InputError where matplotlib draws no picture, with the settings and the fonts that the user has."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of a picture without rows
            save(accuracy_figure(title, []))
    except Exception as error:
        raise InputError(f"matplotlib draws no picture here: {reason_of(error)}") from error


def effects_figure(effects: Sequence[tuple[str, Judgement]], margin: float, by: Scale = ACCURACY) -> "Figure":
    """Differences with their intervals; filled where there is a verdict, the margin shaded."""
    figure = _figure(1.0 + 0.44 * len(effects))
    axes = figure.add_subplot()
    axes.axvspan(-margin, margin, color="#e9edf0", linewidth=0, zorder=0)
    axes.axvline(0, color="#555555", linewidth=0.8)
    for place, (_, judgement) in enumerate(effects):
        decided = judgement.verdict not in (OPEN, NONE)
        colour = DECIDED if decided else UNDECIDED
        mean, low, high = judgement.mean, judgement.low, judgement.high
        reach = None if mean is None or low is None or high is None else [[mean - low], [high - mean]]
        axes.errorbar(
            [mean], [place], xerr=reach, fmt="o", markersize=5, capsize=2, linewidth=1.4, color=colour,
            markerfacecolor=colour if decided else "white",
        )  # fmt: skip
    _listed(axes, [label for label, _ in effects])
    axes.set_xlabel(f"change in validation {by.title}, {by.reading}", fontsize=8.5)
    _bare(axes)
    return figure


def curves_figure(title: str, by_seed: Sequence[Sequence[Epoch]]) -> "Figure":
    """Loss and accuracy after each epoch, of train and validation images: a thin line a seed, and their mean."""
    figure = _figure(3.7, 3.7)
    loss, accuracy = figure.subplots(2, 1, sharex=True)
    most = max(map(len, by_seed))
    for axes, what, factor in ((loss, "loss", 1), (accuracy, "accuracy", 100)):
        for split, colour in (("train", TRAIN), ("validation", TEST)):
            lines = [[factor * getattr(epoch, f"{split}_{what}") for epoch in epochs] for epochs in by_seed]
            style = "o-" if most == 1 else "-"
            for line in lines if len(lines) > 1 else []:
                axes.plot(range(1, len(line) + 1), line, style, color=colour, linewidth=0.7, alpha=0.4, markersize=2)
            whole = [line for line in lines if len(line) == most]
            mean = np.mean(whole, axis=0)
            axes.plot(range(1, most + 1), mean, style, color=colour, linewidth=1.7, markersize=4, label=split)
        axes.set_ylabel("loss, nats" if what == "loss" else "accuracy, %", fontsize=8.5)
        _bare(axes, "y")
    accuracy.set_xlabel("epoch", fontsize=8.5)
    accuracy.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    figure.suptitle(_short(title, 50), fontsize=9, parse_math=False)
    _under(figure, accuracy)
    return figure


def costs_figure(rows: Sequence[Row], costs: Sequence[float], front: Sequence[int], what: str) -> "Figure":
    """The score on validation against a cost; those on the front, if any, are joined and numbered in their order."""
    figure = _figure(3.4)
    axes = figure.add_subplot()
    intervals = _intervals(rows, "validation")
    axes.errorbar(
        costs, [interval.mean for interval in intervals], yerr=_reach(intervals), fmt="o",
        markersize=4.5, capsize=2, linewidth=0.9, color=UNDECIDED, label="cell, with its 95% interval",
    )  # fmt: skip
    if front:
        axes.plot(
            [costs[place] for place in front], [intervals[place].mean for place in front], "o-", color=TEST,
            markersize=5.5, linewidth=1.4, label="Pareto front",
        )  # fmt: skip
    for number, place in enumerate(front, 1):
        axes.annotate(
            str(number), (costs[place], intervals[place].mean), xytext=(-6, 5) if number % 2 else (6, -11),
            textcoords="offset points", fontsize=9, fontweight="bold", ha="right" if number % 2 else "left",
        )  # fmt: skip
    axes.margins(x=0.1)
    if max(costs) <= 1.01 * min(costs):  # one cost: one column of points
        axes.set_xlim(0.5 * min(costs), 1.5 * max(costs))
        axes.set_xticks([float(np.mean(costs))], [f"{np.mean(costs):.3g} for all cells"])
    elif min(costs) > 0 and max(costs) > 5 * min(costs):
        axes.set_xscale("log")
    else:
        axes.locator_params(axis="x", nbins=4)
    axes.set_xlabel(what, fontsize=8.5)
    axes.set_ylabel(f"validation {rows[0].scale.axis}", fontsize=8.5)
    _bare(axes, "both")
    _under(figure, axes)
    return figure


def _matrix_figure(
    values: np.ndarray, written: np.ndarray, rows: Sequence[str], columns: Sequence[str], top: float,
    height: float, width: float = WIDTH, across: str = "", down: str = "",
) -> "Figure":  # fmt: skip
    """A heat map, with what is `written` in its cells where there is room; of many rows or columns some are named."""
    figure = _figure(height, width)
    axes = figure.add_subplot()
    axes.imshow(values, cmap="Blues", vmin=0, vmax=top, aspect="auto", interpolation="nearest")
    for axis, names in ((axes.yaxis, rows), (axes.xaxis, columns)):
        places = range(0, len(names), -(-len(names) // LARGEST_MATRIX))
        labels = [_short(names[place], 14) for place in places]
        upright = axis is axes.xaxis and max(map(len, labels)) * len(labels) > 44
        axis.set_ticks(places, labels, fontsize=8, rotation=90 if upright else 0, parse_math=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if max(values.shape) <= LARGEST_MATRIX:
        size = 8 if values.shape[1] <= 12 else 6
        for (i, j), text in np.ndenumerate(written):
            colour = "white" if values[i, j] > 0.55 * top else "#333333"
            axes.text(j, i, text, ha="center", va="center", fontsize=size, color=colour)
    axes.set_xlabel(across, fontsize=8.5)
    axes.set_ylabel(down, fontsize=8.5)
    return figure


def gate_figure(gate: "BlockGate", classes: Sequence[str]) -> "Figure":
    """Mean weight of each expert on the images of each class."""
    experts, top = [str(k) for k in range(gate.experts)], max(2 / gate.experts, np.nanmax(gate.mean_NK))
    height = 1.0 + 0.24 * min(len(classes), LARGEST_MATRIX)
    written = np.where(np.isnan(gate.mean_NK), "", np.char.mod("%.2f", gate.mean_NK))
    figure = _matrix_figure(gate.mean_NK, written, classes, experts, top, height, 3.7, "expert", "class")
    figure.axes[0].set_title(gate.block, fontsize=9, parse_math=False)
    return figure


def confusion_figure(confusion_NN: np.ndarray, classes: Sequence[str]) -> "Figure":
    """Counts of images: rows are what they are, columns what they were taken for. Colours are shares of a row."""
    height = 1.0 + (0.3 * len(classes) if len(classes) <= LARGEST_MATRIX else 3.6)
    share_NN = confusion_NN / np.maximum(confusion_NN.sum(1, keepdims=True), 1)
    written = np.where(confusion_NN, confusion_NN.astype(str), "")
    return _matrix_figure(share_NN, written, classes, classes, 1.0, height, across="taken for", down="is")
