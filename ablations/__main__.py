"""The command line's start: what it imports takes seconds, in which a user may already stop it."""

import sys
from importlib import import_module

INTERRUPTED = 130  # as shells have it for Ctrl-C


def main() -> None:
    try:
        cli = import_module("ablations.cli.app")
    except KeyboardInterrupt:
        print("error: stopped", file=sys.stderr)
        sys.exit(INTERRUPTED)
    cli.main()


if __name__ == "__main__":
    main()
