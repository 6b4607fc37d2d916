"""What the server of `ablations.isolation` imports, from which the processes that compute are forked."""

import signal

import ablations.engines  # noqa: F401

# A system that ends all processes of a job asks this one too. Those that train then save their states, and the server
# ends with the process that started it.
signal.signal(signal.SIGTERM, signal.SIG_IGN)
