"""Errors of input, each in one line.

Every part of expertgrid raises `InputError` for input that a user can correct. The CLI prints it and exits with 2.
"""

import sysconfig
import traceback
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import ValidationError  # imported only where it is raised, so that `--help` opens at once

LONGEST_VALUE = 80  # characters of a wrong value that an error shows
MOST_NAMES = 12  # that are accepted, beside the one that was meant
NEEDED = {  # by the kind of error that pydantic names, or by its first word
    "int": "a whole number", "float": "a number", "finite": "a finite number", "bool": "true or false",
    "string": "text", "list": "a list", "tuple": "a list", "dict": "a table of fields", "model": "a table of fields",
    "literal": "{expected}", "greater_than": "more than {gt:g}", "greater_than_equal": "{ge:g} or more",
    "less_than": "less than {lt:g}", "less_than_equal": "{le:g} or less", "too_short": "a list of {min_length} or more",
    "string_pattern_mismatch": "text like {pattern}",
}  # fmt: skip


class InputError(ValueError):
    """Wrong input. The message names the field or file, what was found, and what is accepted.

    It is one line, and holds no character that a terminal would take for a command, whatever was found. In an error of
    `wrong_file`, `problem` is what is wrong with the file, without its name; in any other it is the whole message.
    `others` are the messages of what else is wrong, which are notes of the error.
    """

    def __init__(self, message: str, problem: str | None = None, others: Iterable[str] = ()):
        super().__init__(printable(" ".join(message.split())))
        self.problem = str(self) if problem is None else printable(" ".join(problem.split()))
        for other in others:
            self.add_note(other)


def messages(error: object) -> list[str]:
    """What is wrong: an error in words, and its notes."""
    return [str(error), *getattr(error, "__notes__", ())]


def all_of(errors: Iterable[InputError]) -> InputError:
    """One error for several. What two of them say is said once."""
    first, *others = dict.fromkeys(message for error in errors for message in messages(error))
    return InputError(first, others=others)


@contextmanager
def collected(errors: list[InputError]) -> Generator[None]:
    """Adds an InputError of the block to `errors`."""
    try:
        yield
    except InputError as error:
        errors.append(error)


def printable(text: str) -> str:
    """Text of a file as a terminal can show it: control characters are written as escapes, other than the line feed."""
    if text.replace("\n", "").isprintable():
        return text
    return "".join(sign if sign.isprintable() or sign == "\n" else repr(sign)[1:-1] for sign in text)


def wrong_file(file: object, problem: object, remedy: str = "") -> InputError:
    """The error for a file: its name, what is wrong with it, and what to do."""
    first, *others = (f"{file}: {message}{remedy and f'; {remedy}'}" for message in messages(problem))
    return InputError(first, str(problem), others)


def unknown(what: str, name: object, accepted: Iterable[str], more: str = "") -> InputError:
    """The error for a name that does not exist. It suggests the most similar name that does, instead of many names.

    `what` is the kind of name ("preset"), `accepted` the names that exist, `more` what else would be accepted.
    """
    accepted = list(accepted)
    near = get_close_matches(str(name), accepted, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    names = "" if near and len(accepted) > MOST_NAMES else f" Accepted: {', '.join(accepted)}{more}"
    return InputError(f"unknown {what} {name!r}{hint}{names}")


def invalid(where: str, error: "ValidationError", fields: Mapping[str, Any] | None = None) -> InputError:
    """The error for all that pydantic found wrong in a file or object: unknown fields first, missing ones last.

    `where` names that file or object ("": the messages name none), `fields` are the `model_fields` that it can have. A
    field is not missing where an unknown one has nearly its name. The value that was found is shown in at most
    LONGEST_VALUE characters; of text that is not JSON nothing is shown.
    """
    errors, problems = error.errors(), {}
    typos = [str(found["loc"][-1]) for found in errors if found["type"] == "extra_forbidden"]
    for found in sorted(errors, key=lambda found: (found["type"] == "missing") - (found["type"] == "extra_forbidden")):
        accepted = fields or {}
        at = tuple(part for part in found["loc"] if "[" not in str(part))  # without the types that were tried in turn
        for parent in at[:-1]:
            accepted = getattr(getattr(accepted.get(parent), "annotation", None), "model_fields", {})
        if found["type"] != "missing" or not get_close_matches(str(at[-1]), typos):
            problems.setdefault(at, _problem([where] * bool(where) + [*map(str, at)], found, accepted))
    return all_of(problems.values())


def _problem(path: list[str], found: Any, fields: Iterable[str]) -> InputError:
    kind, value, context = found["type"], found["input"], found.get("ctx", {})
    if kind == "extra_forbidden":
        return unknown(f"field of {'.'.join(path[:-1])}:" if path[1:] else "field", path[-1], fields)
    place = f"{'.'.join(path)}: " if path else ""
    if kind in ("missing", "json_invalid"):
        return InputError(f"{place}{'is missing' if kind == 'missing' else 'not JSON: ' + context['error']}")
    needed = NEEDED.get(kind, NEEDED.get(kind.partition("_")[0]))
    first, *others = messages(f"{needed.format(**context)} is needed" if needed else context.get("error", found["msg"]))
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # Python writes no number of more than 4,300 digits
        text = "a value that is too long to show"
    text = text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 3]}..."
    is_said = isinstance(value, dict) or hasattr(value, "model_dump") or (isinstance(value, str) and text in first)
    shown = "" if is_said else f", found {text}"
    return InputError(f"{place}{first}{shown}", others=[place + other for other in others])


def reason_of(error: BaseException) -> str:
    """An error of any kind in one line."""
    return f"{type(error).__name__}: {str(error) or 'no message'}".splitlines()[0]


def reason_with_place(error: BaseException) -> str:
    """An error in one line, after the last line of the user's own files that it came through, where there is one."""
    reason = str(error) if isinstance(error, InputError) else reason_of(error)
    others = (sysconfig.get_path("stdlib"), str(Path(__file__).parents[2]), "<")
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = frame.filename
        if not file.startswith(others) and not {"site-packages", "dist-packages"} & {*Path(file).parts}:
            return f"{file.removeprefix(f'{Path.cwd()}/')}:{frame.lineno}: {reason}"
    return reason
