"""Titled values as text, Markdown, LaTeX, CSV or JSON."""

import csv
import io
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol, get_args, runtime_checkable

from tabulate import tabulate

from expertgrid.model.system.errors import InputError, printable

Format = Literal["text", "github", "latex", "csv", "json"]
FORMATS = get_args(Format)


class Points(float):
    """Percent, or points of accuracy: shown with two decimals."""


class Signed(float):
    """A difference in points: shown with its sign and two decimals."""


class Times(float):
    """A ratio: shown as x2.0."""


class Measured(NamedTuple):
    """A measured value and its interval: shown with half of the interval, in two digits of that half."""

    value: float
    low: float
    high: float


class Span(NamedTuple):
    """An interval of a difference: shown with signs."""

    low: float
    high: float


class Interval(NamedTuple):
    """A mean and its confidence interval; None where one value, or equal ones, give no interval."""

    mean: float
    low: float | None = None
    high: float | None = None


@runtime_checkable
class Recorded(Protocol):
    """A value of several fields: text shows it as `str` does, JSON and CSV have all fields, the main one first."""

    def fields(self) -> dict[str, object]: ...


@dataclass(frozen=True)
class Table:
    """Rows of titled values, under a title, with notes of a line each."""

    key: str  # in JSON and CSV
    title: str
    rows: list[dict[str, object]]
    notes: list[str] = field(default_factory=list)

    def named(self, study: str) -> "Table":
        """The table as one of several studies."""
        return Table(self.key, f"{study}: {self.title}", [{"study": study} | row for row in self.rows], self.notes)


def render(table: Sequence[dict[str, object]], format: Format, notes: Sequence[str] = ()) -> str:
    """One table without a title. Notes go under it in the formats that people read.

    In `csv` and `json` numbers are unrounded, an interval is its mean and ends, and a verdict has its numbers with it.
    Raises InputError for an empty table.
    """
    if not table:
        raise InputError("there is nothing to show: the study has no cells")
    if format == "json":
        return json.dumps(plain_rows(table), indent=1)
    if format == "csv":
        return _csv(table)
    titles = list(table[0])
    cells = [[printable(shown(row[title])) for title in titles] for row in table]
    styles = {"text": "simple", "github": "github", "latex": "latex_booktabs"}
    numeric = [
        all(isinstance(row[title], int | float | Interval | Measured | None) for row in table) for title in titles
    ]
    align = ["right" if is_number else "left" for is_number in numeric]
    text = tabulate(
        cells, headers=list(map(printable, titles)), tablefmt=styles[format], colalign=align, disable_numparse=True
    )
    if format == "latex":
        return "\n".join([text, *(f"% {note}" for note in notes)])
    return "\n".join(
        [text, *([""] if notes else []), *((f"- {note}" if format == "github" else note) for note in notes)]
    )


def render_tables(tables: Sequence[Table], format: Format) -> str:
    """Several tables with their titles.

    JSON is an object with the rows of each table by its key. CSV is one table whose first column is that key. Raises
    InputError where one is empty.
    """
    if format == "json":
        found: dict[str, list[dict[str, object]]] = {}
        for table in tables:
            found.setdefault(table.key, []).extend(plain_rows(table.rows))
        return json.dumps(found, indent=1)
    if format == "csv":
        return _csv([{"table": table.key, **row} for table in tables for row in table.rows])
    marks = {"text": "", "github": "### ", "latex": "% "}
    parts = []
    for table in tables:
        title = "\n".join(marks[format] + line for line in table.title.splitlines())
        parts.append(f"{title}\n\n{render(table.rows, format, table.notes)}")
    return "\n\n".join(parts)


def plain_rows(rows: Iterable[dict[str, object]]) -> list[dict[str, object]]:
    """Rows as JSON has them."""
    return [{title: _plain(value) for title, value in row.items()} for row in rows]


def _csv(rows: Sequence[dict[str, object]]) -> str:
    file = io.StringIO()
    flat = [dict(pair for title, value in row.items() for pair in _flat(title, value)) for row in rows]
    titles = list(dict.fromkeys(title for row in flat for title in row))
    writer = csv.DictWriter(file, titles, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return file.getvalue().rstrip("\n")


def _plain(value: object) -> object:
    match value:
        case Interval() | Measured() | Span():
            return value._asdict()
        case Recorded():
            return value.fields()
    return value


def _flat(title: str, value: object) -> list[tuple[str, object]]:
    match value:
        case Interval():
            return [(title, value.mean), (f"{title} low", value.low), (f"{title} high", value.high)]
        case Measured():
            return [(title, value.value), (f"{title} low", value.low), (f"{title} high", value.high)]
        case Span():
            return [(f"{title} low", value.low), (f"{title} high", value.high)]
        case Recorded():
            (_, main), *rest = value.fields().items()
            return [(title, main), *((f"{title} {name}", field) for name, field in rest)]
    return [(title, value)]


def shown(value: object) -> str:
    """A value as a table shows it."""
    match value:
        case None:
            return ""
        case Interval(mean, None):
            return f"{mean:.2f}"
        case Interval(mean, low, high):
            return f"{mean:.2f} ({low:.2f} to {high:.2f})"
        case Measured(mean, low, high):
            half = max(mean - low, high - mean)
            if not math.isfinite(half):
                return f"{mean:.3g} ±?"
            digits = max(0, 1 - math.floor(math.log10(half))) if half else 3
            return f"{mean:,.{digits}f} ±{half:,.{digits}f}"
        case Span(low, high):
            return f"{low:+.2f} to {high:+.2f}"
        case Signed():
            return f"{value:+.2f}"
        case Times():
            return f"x{value:.1f}" if value < 10 else f"x{value:.0f}"
        case Points():
            return f"{value:.2f}"
        case int():
            return f"{value:,}"
        case float():
            return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 10 else f"{value:.1f}"
    return str(value)
