"""Soft-expert convolutional networks. Importing this package registers its presets with timm.

It imports neither torch nor timm: where timm is not imported yet, its import registers the presets when it is done.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType


class _AfterTimm:
    """An import hook: finds timm as Python would, and has `model.registry` imported right after it."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "timm":
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is None or spec.loader is None:
            return spec
        loader, run = spec.loader, spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            importlib.import_module("expertgrid.model.registry")

        loader.exec_module = run_and_register  # type: ignore[method-assign]  # of this loader, which has loaded no other
        return spec


if "timm" in sys.modules:
    importlib.import_module("expertgrid.model.registry")
else:
    sys.meta_path.insert(0, _AfterTimm())
