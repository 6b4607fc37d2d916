"""What the server of `ablations.isolation` imports, from which the processes that compute are forked."""

import atexit
import os
import signal

import ablations.engines  # noqa: F401

# A system that ends all processes of a job asks this one too. Those that train then save their states, and the server
# ends with the process that started it.
signal.signal(signal.SIGTERM, signal.SIG_IGN)
atexit.register(os._exit, 0)  # at once: freeing PyTorch's modules takes seconds, and a pipe's reader waits for its end
