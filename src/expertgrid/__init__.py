"""expertgrid: a laboratory for ablations of image networks. Importing it imports no torch, nor anything else of ours.

`expertgrid.run` trains a study, `expertgrid.open` opens a study's directory as Arrow tables, and `expertgrid.judge`
gives verdicts on scores that were made elsewhere.

What is in it lies at the top of the repository: `model`, `export`, `bench` and `ablations` beside this file are links.
"""

import os.path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from expertgrid.ablations.library import InputError as InputError
    from expertgrid.ablations.library import judge as judge
    from expertgrid.ablations.library import open as open
    from expertgrid.ablations.library import run as run

if not os.path.isdir(os.path.join(__path__[0], "model")):  # a checkout without links, from a ZIP or on Windows
    __path__.append(os.path.join(__path__[0], "..", ".."))


def __getattr__(name: str) -> Any:
    """What takes long to import, and `__version__`; of source code that is not installed, "unknown"."""
    if name in ("InputError", "judge", "open", "run"):
        from expertgrid.ablations import library

        return getattr(library, name)
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("expertgrid")
    except PackageNotFoundError:
        return "unknown"
