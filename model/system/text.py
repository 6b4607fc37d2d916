"""Titled values as text, Markdown, LaTeX, CSV or JSON."""

import csv
import io
import json
import math
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, Protocol, TypeVar, get_args, runtime_checkable

from tabulate import LATEX_ESCAPE_RULES, tabulate

from expertgrid.model.system.errors import InputError, printable

Format = Literal["text", "github", "latex", "csv", "json"]
FORMATS = get_args(Format)
SCHEMA = 2  # of JSON: levels have their types since 2
NARROWEST = 8  # characters of a column, before a table gets wider than the terminal
MOST_NOTES = 3  # under a table, where not all are asked for
MARKDOWN = re.compile(  # where a sign is; an underscore within a word is none
    r"^(\d*)(?=[.)](?:\s|$)|>|\+(?:\s|$)|-(?:[\s-]|$))|(?=[\\`*\[\]<|~#&$!])|(?<![^\W_])(?=_)|(?=_(?![^\W_]))"
)
FORMULA = re.compile(r"\s*([=@＝＋－＠]|[+-](?!\d*\.?\d+(e[+-]?\d+)?$))")  # as a spreadsheet knows one


class _Rounded:
    decimals = 2  # that are shown, unless `rounded` says otherwise


class Points(_Rounded, float):
    """Percent, or points of accuracy."""


class Signed(_Rounded, float):
    """A difference in points: shown with its sign."""


class Typed(str):
    """A text, for which JSON has a value of another type."""

    value: object

    def __new__(cls, text: str, value: object) -> "Typed":
        typed = super().__new__(cls, text)
        typed.value = value
        return typed


class Multiple(float):
    """An exact ratio: shown as x2.0."""


class Measured(NamedTuple):
    """A measured value and its interval: shown with half of the interval, in two digits of that half."""

    value: float
    low: float
    high: float


class MeasuredMultiple(NamedTuple):
    """A ratio of measured times and its interval, if there is one: shown as x2.04 (1.95 to 2.13), or as can't tell."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def is_known(self) -> bool:
        """Whether there is an interval whose ends are at most a factor of 2 apart."""
        return self.low is not None and self.high is not None and self.high <= 2 * self.low


class _Span(NamedTuple):
    low: float
    high: float


class Span(_Rounded, _Span):
    """An interval of a difference: shown with signs."""


class _Interval(NamedTuple):
    mean: float
    low: float | None = None
    high: float | None = None


class Interval(_Rounded, _Interval):
    """A mean and its confidence interval; None where one value, or equal ones, give no interval."""


Value = TypeVar("Value", bound=_Rounded)


def rounded(value: Value, decimals: int) -> Value:
    """The value itself, which from now on is shown with so many decimals."""
    value.decimals = decimals
    return value


@runtime_checkable
class Recorded(Protocol):
    """A value of several fields: text shows it as `str` does, JSON and CSV have all fields, the main one first."""

    def fields(self) -> dict[str, object]: ...


@dataclass(frozen=True)
class Table:
    """Rows of titled values, under a title, with notes of a line each, the most important one first."""

    key: str  # in JSON and CSV
    title: str
    rows: list[dict[str, object]]
    notes: list[str] = field(default_factory=list)
    trained: list[str] = field(default_factory=list)  # what was trained: lines that are always shown
    falls: Sequence[str] = ()  # columns that a narrow terminal does without, the least important first

    def named(self, study: str) -> "Table":
        """The table as one of several studies."""
        rows = [{"study": study} | row for row in self.rows]
        return replace(self, title=f"{study}: {self.title}", rows=rows)


def markdown(text: object) -> str:
    """A text that comes from outside, on one line, so that Markdown shows it as it is."""
    return MARKDOWN.sub(r"\1\\", _on_one_line(text))


def _on_one_line(text: object) -> str:
    return " ".join(printable(str(text)).split())


def csv_cell(value: object) -> object:
    """No text of it is a formula."""
    return "'" * bool(FORMULA.match(value)) + printable(value) if isinstance(value, str) else value


# What comes from outside is escaped here alone: in titles, notes and cells. tabulate then escapes the cells of LaTeX.
ESCAPES: dict[str, Callable[[str], str]] = {"text": printable, "github": markdown, "latex": _on_one_line}
FLOAT = "\\begin{{table}}\n\\centering\n\\caption{{{}}}\n\\label{{tab:{}}}\n{}\n\\end{{table}}"
ARROW = (r"-\ensuremath{>}", r"$\to$")  # of a change, in LaTeX
MARKS = {"text": ("", ""), "github": ("### ", "- "), "latex": ("", "% ")}  # of titles and notes


def render(
    table: Sequence[dict[str, object]], format: Format, notes: Sequence[str] = (), falls: Sequence[str] = ()
) -> str:
    """One table without a title and, but for JSON, without empty columns. Notes go under it where people read it.

    In `csv` and `json` numbers are unrounded, an interval is its mean and ends, and a verdict has its numbers with it.
    As `text` it fits the terminal, if there is one: columns in `falls` are left out, the first one first, and cells are
    wrapped where that is not enough. Raises InputError for an empty table.
    """
    if not table:
        raise InputError("there is nothing to show: the study has no cells")
    if format == "json":
        return json.dumps(plain_rows(table), indent=1)
    table, room, left_out = filled(table), terminal_width() if format == "text" else None, []
    if format == "csv":
        return _csv(table)
    escaped = ESCAPES[format]
    columns = {escaped(title): [escaped(shown(row[title])) for row in table] for title in table[0]}
    numeric = (all(row[title] is None or sort_key(row[title]) is not None for row in table) for title in table[0])
    align = {title: "right" if is_number else "left" for title, is_number in zip(columns, numeric)}
    widths = {title: max(len(title) + 2, *map(len, cells)) for title, cells in columns.items()}
    while room and sum(widths.values()) + 2 * len(widths) - 2 > room and max(widths.values()) > NARROWEST:
        if falling := next((title for title in falls if title in widths), None):
            del widths[falling]
            left_out.append(falling)
        else:
            widths[max(widths, key=widths.__getitem__)] -= 1
    text = tabulate(
        {
            wrapped(title, widths[title] - 2): [wrapped(cell, widths[title]) for cell in columns[title]]
            for title in widths
        },
        headers="keys",
        tablefmt={"text": "simple", "github": "github", "latex": "latex_booktabs"}[format],
        colalign=[align[title] for title in widths],
        disable_numparse=True,
    ).replace(*ARROW)
    lines = [f"Without {', '.join(left_out)}: the terminal has {room} columns."] if left_out else []
    lines = [wrapped(MARKS[format][1] + escaped(note), room) for note in (*lines, *notes)]
    return "\n".join([text, *[""][: len(lines) * (format != "latex")], *lines])


def filled(table: Sequence[dict[str, object]]) -> list[dict[str, object]]:
    """The rows without the columns that are empty throughout."""
    empty = {title for title in table[0] if all(row.get(title) in (None, "") for row in table)}
    return [{title: value for title, value in row.items() if title not in empty} for row in table]


def terminal_width() -> int | None:
    """Characters in a line of the terminal; None where the output goes elsewhere."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def listed(words: Sequence[str], last: str = "and") -> str:
    """One or more words in a sentence: "a, b and c"."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}"


def wrapped(line: str, width: int | None) -> str:
    return line if width is None or len(line) <= width else textwrap.fill(line, width, break_on_hyphens=False)


def render_tables(tables: Sequence[Table], format: Format, most_notes: int | None = MOST_NOTES) -> str:
    """Several tables with their titles, and at most so many notes under each; None for all notes.

    JSON is an object with the rows of each table by its key. CSV is one table whose first column is that key. LaTeX
    needs the package booktabs. Raises InputError where one is empty.
    """
    if format == "json":
        head = {"schema": SCHEMA, "trained": [line for table in tables for line in table.trained]}
        return json.dumps(head | rows_by_key(tables), indent=1)
    if format == "csv":
        return _csv([{"table": table.key, **row} for table in tables for row in filled(table.rows)])
    (mark, _), escaped, parts = MARKS[format], ESCAPES[format], []
    for table in tables:
        text = render(table.rows, format, table.trained + table.notes[:most_notes], table.falls)
        if format == "latex":
            title = "".join(LATEX_ESCAPE_RULES.get(sign, sign) for sign in escaped(table.title)).replace(*ARROW)
            label = re.sub(r"\W+", "-", f"{table.rows[0].get('study', '')} {table.key}".strip())
            parts.append(FLOAT.format(title, label, text))
        else:
            parts += [wrapped(mark + escaped(table.title), terminal_width() if format == "text" else None), text]
    return "\n\n".join(parts)


def rows_by_key(tables: Sequence[Table]) -> dict[str, list[dict[str, object]]]:
    """The rows of tables as JSON has them, those of several studies together."""
    rows: dict[str, list[dict[str, object]]] = {}
    for table in tables:
        rows.setdefault(table.key, []).extend(plain_rows(table.rows))
    return rows


def plain_rows(rows: Iterable[dict[str, object]]) -> list[dict[str, object]]:
    """Rows as JSON has them."""
    return [
        {title: of.value if isinstance(of, Typed) else _fields(of) or of for title, of in row.items()} for row in rows
    ]


def _csv(rows: Sequence[dict[str, object]]) -> str:
    file = io.StringIO()
    flat = [{csv_cell(title): csv_cell(value) for title, value in row.items()} for row in flat_rows(rows)]
    titles = list(dict.fromkeys(title for row in flat for title in row))
    writer = csv.DictWriter(file, titles, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return file.getvalue().rstrip("\n")


def flat_rows(rows: Sequence[dict[str, object]]) -> list[dict[str, object]]:
    """Rows in which each field of a value that has several is a value of its own, as CSV has them."""
    return [dict(pair for title, value in row.items() for pair in _flat(title, value)) for row in rows]


def _fields(value: object) -> dict[str, object] | None:
    """The fields of a value that has several, the main one first; a `Span` has two ends and no main field."""
    match value:
        case Interval() | Measured() | MeasuredMultiple() | Span():
            return value._asdict()
        case Recorded():
            return value.fields()
    return None


def _flat(title: str, value: object) -> list[tuple[str, object]]:
    fields = _fields(value)
    if fields is None:
        return [(title, value)]
    named = [(f"{title} {name}", field) for name, field in fields.items()]
    return named if isinstance(value, Span) else [(title, named[0][1]), *named[1:]]


def sort_key(value: object) -> float | None:
    """The number that a value is sorted by and aligned as; None for what is no number."""
    match value:
        case Interval(number) | Measured(number) | MeasuredMultiple(number):
            return number
        case int() | float() if not isinstance(value, bool):
            return float(value)
    return None


def shown(value: object) -> str:
    """A value as a table shows it."""
    match value:
        case None:
            return ""
        case Interval(mean, None, decimals=decimals):
            return f"{mean:z.{decimals}f}"
        case Interval(mean, low, high, decimals=decimals):
            return f"{mean:z.{decimals}f} ({low:z.{decimals}f} to {high:z.{decimals}f})"
        case Measured(mean, low, high):
            half = max(mean - low, high - mean)
            if not half <= 10 * abs(mean):  # of two rounds that were disturbed
                return f"{mean:.3g} ±?"
            digits = max(0, 1 - math.floor(math.log10(half))) if half else 3
            return f"{mean:,.{digits}f} ±{half:,.{digits}f}"
        case Span(low, high, decimals=decimals):
            return f"{low:+z.{decimals}f} to {high:+z.{decimals}f}"
        case Signed(decimals=decimals):
            return f"{value:+z.{decimals}f}"
        case MeasuredMultiple(_, low, high):
            return f"x{value.value:.2f} ({low:.2f} to {high:.2f})" if value.is_known else "can't tell"
        case Multiple():
            return f"x{value:.1f}" if value < 10 else f"x{value:.0f}"
        case Points(decimals=decimals):
            return f"{value:z.{decimals}f}"
        case int():
            return f"{value:,}"
        case float():
            return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 10 else f"{value:.1f}"
    return str(value)
