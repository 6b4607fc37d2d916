"""What a user brings: images, and modules that register networks with timm, and parts of a training."""

import importlib
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING

from expertgrid.ablations.cli.options import module_and_folder
from expertgrid.ablations.cli.terminal import status
from expertgrid.model.system.errors import InputError, reason_with_place

if TYPE_CHECKING:
    from expertgrid.model.training.data import ImageData


def read_data(source: str, data_dir: Path | None, image_size: int | None = None) -> "ImageData":
    """The images of a source, brought to `image_size` pixels where it is given.

    Raises InputError for a source that is unknown, missing or damaged.
    """
    from expertgrid.model.training.data import load_data

    with status(f"reading {source}"):
        return load_data(source, data_dir, image_size)


def import_modules(texts: Sequence[str]) -> None:
    """Imports the modules of --import, which register networks and parts of a training.

    The folder of a module comes first on Python's path while it is imported, as for a script, and last from then on.
    Raises InputError for a module that fails, with its reason, and for one that expertgrid uses itself.
    """
    if not texts:
        return
    # First: what timm needs is what is installed, whatever lies beside the modules.
    from expertgrid.model.registry import register_networks

    ours = set(sys.modules)
    for text in texts:
        name, folder = module_and_folder(text)
        sys.path.insert(0, str(folder))
        try:
            register_networks(importlib.import_module(name))
        except (Exception, SystemExit) as error:  # a user's module may fail in any way
            raise InputError(f"--import {text}: {reason_with_place(error)}") from error
        finally:
            with suppress(ValueError):  # the module has changed the path
                sys.path.remove(str(folder))
        if name in ours and PathFinder.find_spec(name.partition(".")[0], [str(folder)]) is None:
            raise InputError(f"--import {text}: is a module that expertgrid uses itself; it has no network of yours")
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
