"""`python -m expertgrid` is `expertgrid`."""

import atexit
import os
import sys
from contextlib import suppress

from expertgrid.ablations.cli import entry


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
    try:
        entry.main()
    except SystemExit as end:
        status = int(end.code or 0)
        raise


if __name__ == "__main__":
    main()
