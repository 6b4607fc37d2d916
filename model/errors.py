"""What a user did wrong, said in one line.

Every part of expertgrid raises `InputError` for input that a person can mend; the CLI prints it and exits with 2.
"""

from collections.abc import Iterable
from difflib import get_close_matches

from pydantic import BaseModel, ValidationError


class InputError(ValueError):
    """Wrong input: the message names the field or file, what was found and what is accepted."""


def unknown(what: str, found: object, accepted: Iterable[str], more: str = "") -> InputError:
    """The error for a name that does not exist, with the nearest one that does.

    `what` is the kind of name ("preset"), `accepted` the names there are, `more` what else would be accepted.
    """
    accepted = list(accepted)
    near = get_close_matches(str(found), accepted, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return InputError(f"unknown {what} {found!r}{hint} Accepted: {', '.join(accepted)}{more}")


def invalid(where: str, error: ValidationError, fields: Iterable[str] = ()) -> InputError:
    """One line for the first thing that pydantic found wrong: `where` is the file or object it was found in."""
    first = error.errors()[0]
    *parents, last = map(str, (where, *first["loc"]))
    if first["type"] == "extra_forbidden":
        return unknown(f"field of {'.'.join(parents)}:", last, fields)
    place = ".".join([*parents, last])
    message = first["msg"].removeprefix("Value error, ")
    found = "" if isinstance(first["input"], dict | BaseModel) else f", found {first['input']!r}"
    return InputError(f"{place}: {message[0].lower()}{message[1:]}{found}")
