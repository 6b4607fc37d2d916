"""The command lines of `python -m bench.NAME`: Typer's options, and one line on stderr for wrong input."""

import sys
from collections.abc import Callable, Sequence

import typer

from model.errors import InputError

INPUT_IS_WRONG, INTERRUPTED = 2, 130  # exit statuses


def run(command: Callable[..., int], arguments: Sequence[str] | None = None) -> int:
    """The exit status of a command that gets its options from `arguments`, or else from `sys.argv`.

    What `command` returns, or 2 for wrong input, which is printed. The `obj` of its `typer.Context` is the arguments.
    Raises KeyboardInterrupt where the user stops it.
    """
    app = typer.Typer(
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.command()(command)
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        status = app(arguments, standalone_mode=False, obj=arguments)
    except typer.Abort:  # what older versions of Typer make of Ctrl-C; newer ones return 130
        status = INTERRUPTED
    except InputError as error:
        return complain(str(error), INPUT_IS_WRONG)
    except Exception as error:
        message = getattr(error, "format_message", None)  # of Typer's own errors, whose class differs by its version
        if message is None:
            raise
        return complain(message(), INPUT_IS_WRONG)
    if status == INTERRUPTED:
        raise KeyboardInterrupt
    return status


def complain(message: str, status: int) -> int:
    """Prints an error in one line, and returns `status`."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return status
