"""Errors of input, each in one line.

Every part of expertgrid raises `InputError` for input that a user can correct. The CLI prints it and exits with 2.
"""

import sysconfig
import traceback
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError  # imported only where it is raised, so that `--help` opens at once

LONGEST_VALUE = 80  # characters of a wrong value that an error shows


class InputError(ValueError):
    """Wrong input. The message names the field or file, what was found, and what is accepted.

    It is one line, and holds no character that a terminal would take for a command, whatever was found. In an error of
    `wrong_file`, `problem` is what is wrong with the file, without its name; in any other it is the whole message.
    """

    def __init__(self, message: str, problem: str | None = None):
        super().__init__(printable(" ".join(message.split())))
        self.problem = str(self) if problem is None else printable(" ".join(problem.split()))


def printable(text: str) -> str:
    """Text of a file as a terminal can show it: control characters are written as escapes, other than the line feed."""
    if text.replace("\n", "").isprintable():
        return text
    return "".join(sign if sign.isprintable() or sign == "\n" else repr(sign)[1:-1] for sign in text)


def wrong_file(file: object, problem: object, remedy: str = "") -> InputError:
    """The error for a file: its name, what is wrong with it, and what to do."""
    return InputError(f"{file}: {problem}{remedy and f'; {remedy}'}", str(problem))


def unknown(what: str, name: object, accepted: Iterable[str], more: str = "") -> InputError:
    """The error for a name that does not exist. It suggests the most similar name that does.

    `what` is the kind of name ("preset"), `accepted` the names that exist, `more` what else would be accepted.
    """
    accepted = list(accepted)
    near = get_close_matches(str(name), accepted, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return InputError(f"unknown {what} {name!r}{hint} Accepted: {', '.join(accepted)}{more}")


def invalid(where: str, error: "ValidationError", fields: Iterable[str] = ()) -> InputError:
    """The error for the first thing that pydantic found wrong in a file or object.

    `where` names that file or object ("": the message names none), `fields` the fields that it can have. The value that
    was found is shown in at most LONGEST_VALUE characters; of text that is not JSON nothing is shown.
    """
    from pydantic import BaseModel

    errors = error.errors()
    first = errors[0]
    at = first["loc"]
    alike = sum(other["input"] is first["input"] and other["loc"][:-1] == at[:-1] for other in errors)
    if alike > 1 and first["type"] != "missing":
        at = at[:-1]  # several types are accepted, and pydantic says for each why the value is not of that type
        types = {str(other["loc"][-1]) for other in errors if other["loc"][:-1] == at}
        if types >= {"bool", "int", "float", "str"}:
            first = first | {"msg": "a finite number, text, true, false, a list or a table is needed"}
    path = [where, *map(str, at)] if where else [*map(str, at)]
    if first["type"] == "extra_forbidden":
        return unknown(f"field of {'.'.join(path[:-1])}:" if path[1:] else "field", path[-1], fields)
    place = f"{'.'.join(path)}: " if path else ""
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "json_invalid":
        return InputError(f"{place}not JSON: {message.removeprefix('Invalid JSON: ')}")
    value = first["input"]
    said = isinstance(value, dict | BaseModel) or (isinstance(value, str) and repr(value) in message)
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # Python writes no number of more than 4,300 digits
        text = "a value that is too long to show"
    text = text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 3]}..."
    shown = "" if said else f", found {text}"
    return InputError(f"{place}{message[0].lower()}{message[1:]}{shown}")


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
