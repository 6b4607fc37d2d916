"""Lists of the networks, recipes, studies and data sources."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from expertgrid.model.system.errors import InputError
from expertgrid.model.system.text import Format, render


def list_(what: str, modules: Sequence[str], format: Format) -> int:
    """Prints one of the lists; that of the models has those that `modules` registered, too."""
    lists = {"recipes": _recipes, "studies": _studies, "data": _sources}
    print(render(_models(modules) if what == "models" else lists[what](), format))
    return 0


def _models(modules: Sequence[str]) -> list[dict[str, object]]:
    from expertgrid.model.cost import cost
    from expertgrid.model.presets import PRESETS

    rows: list[dict[str, object]] = []
    for name, config in PRESETS.items():
        parameters, macs = cost(config, 32, 32)
        counts = sorted({len(block.kernels) for block in config.blocks()})
        gates = sorted({block.gate.kind for block in config.blocks() if block.gate})
        row: dict[str, object] = {
            "model": name,
            "blocks": len(list(config.blocks())),
            "K": ", ".join(map(str, counts)),
            "gate": ", ".join(gates),
        }
        rows.append(row | {"params": parameters, "MACs at 32x32": macs})
    return rows + (_registered(modules) if modules else [])


def _registered(modules: Sequence[str]) -> list[dict[str, object]]:
    """The networks that a user's modules, or parts of them, registered with timm."""
    from timm import list_models
    from timm.models import model_entrypoint

    from expertgrid.model.cost import check_image_size, cost
    from expertgrid.model.presets import network

    rows: list[dict[str, object]] = []
    for name in list_models():
        home = model_entrypoint(name).__module__
        if any(home == module or home.startswith(f"{module}.") for module in modules):
            config = network(name)
            row: dict[str, object] = {"model": name, "blocks": None, "K": "", "gate": ""}
            try:
                check_image_size(name, config, (32, 32), "32x32 pixels")
                parameters, macs = cost(config, 32, 32)
            except InputError:
                parameters, macs = None, "takes other images"
            rows.append(row | {"params": parameters, "MACs at 32x32": macs})
    return rows


def _recipes() -> list[dict[str, object]]:
    from expertgrid.model.training.recipe import RECIPES

    fields = ("epochs", "batch_size", "opt", "lr", "weight_decay", "sched", "hflip", "crop_padding", "cutout")
    return [
        {"recipe": name} | {field: str(getattr(recipe, field)) for field in fields} for name, recipe in RECIPES.items()
    ]


def _studies() -> list[dict[str, object]]:
    from expertgrid.ablations.study.study_file import load_study, shipped_studies

    studies = [load_study(name) for name in shipped_studies()]
    return [
        {"study": s.name, "data": s.base.data, "cells": len(s.settings()), "seeds": s.seeds, "question": s.question}
        for s in studies
    ]


def _sources() -> list[dict[str, object]]:
    from expertgrid.model.training.data import SOURCES

    return [{"data": source, "what": what} for source, what in SOURCES.items()]


def names(kind: str, directories: Sequence[str]) -> list[str]:
    """What the shell completes: studies, recipes, or the cells of study directories, as `experts=2,gate=mlp`."""
    from expertgrid.ablations.records.directory import StudyDirectory
    from expertgrid.ablations.study.study_file import shipped_studies
    from expertgrid.model.training.recipe import RECIPES

    if kind != "cells":
        return list(RECIPES) if kind == "recipes" else [*shipped_studies(), *map(str, Path().glob("*.toml"))]
    with suppress(InputError):  # of a directory that holds no study
        cells = [cell for place in directories for cell in StudyDirectory(Path(place)).read_plan().cells if cell.levels]
        return [",".join(f"{factor}={level}" for factor, level in cell.level_names.items()) for cell in cells]
    return []
