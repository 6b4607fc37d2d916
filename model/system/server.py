"""The server from which the processes that compute are forked: what it does beside importing what they need."""

import atexit
import os
import signal
import sys

SAFE_PATH = "expertgrid"  # the value of PYTHONSAFEPATH with which our processes start, unless the user has one
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def leave_safe_path() -> None:
    """From now on processes that a user's module starts have the user's environment."""
    if os.environ.get("PYTHONSAFEPATH") == SAFE_PATH:
        del os.environ["PYTHONSAFEPATH"]


program = getattr(sys.modules["__main__"], "main", None)
if getattr(program, "__module__", None) == "multiprocessing.forkserver":  # any other process keeps its signals
    leave_safe_path()
    # Ctrl-C reaches all processes of a terminal, and a system that ends all processes of a job asks this one too. Those
    # that train then save their states, and the server ends with the process that started it.
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    # At once: freeing PyTorch's modules takes seconds, and a pipe's reader waits for its end.
    atexit.register(os._exit, 0)
