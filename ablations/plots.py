"""Pictures of a study, from its rows."""

import io
from collections.abc import Sequence

from matplotlib.figure import Figure

from ablations.tables import Row, row_name

TEST, VALIDATION = "#0b6e8a", "#b9bfc4"


def accuracy_plot(title: str, rows: Sequence[Row]) -> bytes:
    """Each row's test and validation accuracy with 95% intervals, best on validation first, as an SVG.

    Rows without a finished trial are left out.
    """
    done = [row for row in rows if row.records]
    done.sort(key=lambda row: row.interval(lambda record: record.validation_accuracy).mean)
    figure = Figure(figsize=(7.2, 1.3 + 0.34 * len(done)), layout="constrained")
    axes = figure.add_subplot()
    series = {
        "validation (selects)": (VALIDATION, 0.14, lambda record: 100 * record.validation_accuracy),
        "test": (TEST, -0.14, lambda record: 100 * record.test_accuracy),
    }
    for label, (colour, shift, value) in series.items():
        intervals = [row.interval(value) for row in done]
        axes.errorbar(
            [interval.mean for interval in intervals],
            [y + shift for y in range(len(done))],
            xerr=[interval.half_width or 0 for interval in intervals],
            fmt="o", markersize=5, capsize=2, linewidth=1.4, color=colour, label=label,
        )  # fmt: skip
    axes.set_yticks(range(len(done)), [row_name(row) for row in done], parse_math=False)
    axes.set_xlabel("accuracy, %: mean over seeds, and its 95% interval")
    axes.set_xlim(right=min(100.5, axes.get_xlim()[1]))
    axes.grid(axis="x", linewidth=0.4)
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=9.5, wrap=True, parse_math=False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower right", ncols=2, frameon=False, fontsize=9)
    picture = io.BytesIO()
    figure.savefig(picture, format="svg", metadata={"Date": None})
    return picture.getvalue()
