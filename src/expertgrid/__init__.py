"""expertgrid: a laboratory for ablations of image networks. Importing it imports no torch, nor anything else of ours.

What is in it lies at the top of the repository: `model`, `export`, `bench` and `ablations` beside this file are links.
"""

import os.path

if not os.path.isdir(os.path.join(__path__[0], "model")):  # a checkout without links, from a ZIP or on Windows
    __path__.append(os.path.join(__path__[0], "..", ".."))


def __getattr__(name: str) -> str:
    """`__version__`, which takes long to look up; of a folder of source code that is not installed, "unknown"."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("expertgrid")
    except PackageNotFoundError:
        return "unknown"
