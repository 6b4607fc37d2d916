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
    """The presets, and the networks that a user's modules, or parts of them, registered with timm."""
    from expertgrid.model.config import ModelConfig
    from expertgrid.model.cost import check_image_size, cost
    from expertgrid.model.presets import PRESETS, network

    names, rows = list(PRESETS), []
    if modules:
        from timm import list_models
        from timm.models import model_entrypoint

        homes = {name: f"{model_entrypoint(name).__module__}." for name in list_models()}
        names += [name for name, home in homes.items() if any(home.startswith(f"{module}.") for module in modules)]
    for name in names:
        config = network(name)
        blocks = list(config.blocks()) if isinstance(config, ModelConfig) else []
        row: dict[str, object] = {
            "model": name,
            "blocks": len(blocks) or None,
            "K": ", ".join(map(str, sorted({len(block.kernels) for block in blocks}))),
            "gate": ", ".join(sorted({block.gate.kind for block in blocks if block.gate})),
            "params": None,
            "MACs at 32x32": "needs arguments, or other images",
        }
        with suppress(InputError):
            check_image_size(name, config, (32, 32), "32x32 pixels")
            row["params"], row["MACs at 32x32"] = cost(config, 32, 32)
        rows.append(row)
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
