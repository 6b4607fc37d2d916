"""What a user brings: images, and modules that register networks with timm."""

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from expertgrid.ablations.cli.options import working_directory_first
from expertgrid.ablations.cli.terminal import status
from expertgrid.model.system.errors import InputError, reason_of

if TYPE_CHECKING:
    from expertgrid.model.training.data import ImageData


def read_data(source: str, data_dir: Path | None, image_size: int | None = None) -> "ImageData":
    """The images of a source, brought to `image_size` pixels where it is given.

    Raises InputError for a source that is unknown, missing or damaged.
    """
    from expertgrid.model.training.data import load_data

    with status(f"reading {source}"):
        return load_data(source, data_dir, image_size)


def import_modules(names: Sequence[str]) -> None:
    """Imports modules, which register networks with timm. Raises InputError for one that fails, with its reason.

    The working directory is searched first, as Python does for a script, and stays on the path after all others, for
    what the module imports later.
    """
    for name in names:
        try:
            with working_directory_first():
                importlib.import_module(name)
        except (Exception, SystemExit) as error:  # a user's module may fail in any way
            raise InputError(f"--import {name}: {reason_of(error)}") from error
    if names and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
