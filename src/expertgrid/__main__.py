"""`python -m expertgrid` is `expertgrid`."""

import atexit
import os
import sys
from contextlib import suppress


def main() -> None:
    """Runs the command line, and ends the process without freeing what its modules hold.

    Python frees PyTorch's modules one by one, which takes 1 to 3 s after a command's last line.
    """
    status = 1  # Python's own for an error that nobody expected

    def leave() -> None:
        with suppress(OSError):  # whoever read the output has gone
            for stream in filter(None, (sys.stdout, sys.stderr)):  # None where it was closed before the start
                stream.flush()
        os._exit(status)

    atexit.register(leave)  # the first, which Python calls last
    with suppress(FileNotFoundError):  # the working directory was removed
        _leave_working_directory()
    from expertgrid.ablations.cli import entry

    try:
        entry.main()
    except SystemExit as end:
        status = int(end.code or 0)
        raise


def _leave_working_directory() -> None:
    """Takes the working directory off Python's path: a user's `random.py` there is no module of expertgrid's.

    `python -m` puts it there, and an empty word in PYTHONPATH. `--import` adds the folders of the user's modules.
    """
    ours = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    sys.path[:] = [place for place in sys.path if os.path.abspath(place) != os.getcwd() or os.getcwd() == ours]


if __name__ == "__main__":
    main()
