"""The server from which the processes that compute are forked: what it does beside importing what they need."""

import atexit
import os
import signal
import sys

SAFE_PATH = "expertgrid"  # the value of PYTHONSAFEPATH with which the server is started, unless the user has one


def _is_server() -> bool:
    """Whether this process is the server, whose program is `multiprocessing.forkserver.main`."""
    program = getattr(sys.modules["__main__"], "main", None)
    return getattr(program, "__module__", None) == "multiprocessing.forkserver"


if _is_server():  # any other process that imports this keeps its signals and its exit status
    if os.environ.get("PYTHONSAFEPATH") == SAFE_PATH:
        del os.environ["PYTHONSAFEPATH"]  # processes that a user's module starts have the user's environment
    # A system that ends all processes of a job asks this one too. Those that train then save their states, and the
    # server ends with the process that started it.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # At once: freeing PyTorch's modules takes seconds, and a pipe's reader waits for its end.
    atexit.register(os._exit, 0)
