"""From the shell to a command and back: exit status, errors in one line, signals. Imports nothing that takes long.

Exit status: 0 done, 1 some trial or certificate failed, 2 the input is wrong, 130 stopped by the user.
"""

import errno
import io
import os
import shlex
import sys

from expertgrid.ablations.cli import interrupt
from expertgrid.ablations.cli.interrupt import INTERRUPTED
from expertgrid.model.system.errors import InputError, invalid, messages, printable, reason_of
from expertgrid.model.system.files import NO_SPACE, disk_full


def main() -> None:
    """Runs the command line. Wrong input is one line on stderr and exit status 2."""
    if sys.stdout is None:  # it was closed
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without the sign ± still gets its table
    write = sys.stdout.write
    # No character of a text is a command for a terminal.
    sys.stdout.write = lambda text: write(printable(text))  # ty: ignore[invalid-assignment]
    interrupt.watch()
    try:
        status = _run(sys.argv[1:] or ["--help"])
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of the output has gone, and nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except KeyboardInterrupt:
        status = INTERRUPTED
    except OSError as error:
        is_file = error.filename is not None or isinstance(error, FileNotFoundError)
        is_input = is_file and error.errno not in (*NO_SPACE, errno.EIO)
        status = _complain(_in_words(error), 2 if is_input else 1)
    except EOFError as error:
        status = _complain(str(error) or reason_of(error), 1)
    except MemoryError:
        status = _complain("there is not enough memory for this", 1)
    if status == INTERRUPTED:
        command = shlex.join(["expertgrid", *sys.argv[1:]])
        resumes = f", and the same command continues it: {command}" if sys.argv[1:2] == ["run"] else ""
        print(f"stopped; finished work is kept{resumes}", file=sys.stderr)
    sys.exit(status)


def _run(arguments: list[str]) -> int:
    """The exit status of a command; what is wrong with its input is printed.

    Typer's own errors are those with `format_message`: their class is click's in one version of Typer and a private
    copy of it in another, and the method is what click's documentation promises of them.
    """
    import typer

    from expertgrid.ablations.cli.app import app

    try:
        for word in arguments:
            if word != word.encode(errors="replace").decode():
                raise InputError(f"{word}: is not UTF-8")
        return app(arguments, standalone_mode=False)
    except typer.Abort as error:  # some versions make it of KeyboardInterrupt, and all of EOFError
        raise error.__cause__ or KeyboardInterrupt from None
    except InputError as error:
        return max(_complain(message, 2) for message in messages(error))
    except Exception as error:
        from pydantic import ValidationError  # which Typer has make a value of a word

        message, param = getattr(error, "format_message", None), getattr(error, "param", None)
        if message is None:
            raise
        if isinstance(error.__cause__, ValidationError) and param:
            return _complain(str(invalid(param.opts[0], error.__cause__)), 2)
        return _complain(message(), 2)


def _in_words(error: OSError) -> str:
    if not disk_full(error):
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error)
    resumes = sys.argv[1:2] == ["run"]
    more = "; finished trials are kept, and the same command continues once there is space" * resumes
    return f"disk full: {error}{more}"


def _complain(message: str, status: int) -> int:
    print(f"error: {' '.join(printable(message).split())}", file=sys.stderr)
    return status
