"""A picture of what a recipe's augmentation does to images."""

import io
from collections.abc import Mapping
from pathlib import Path

from expertgrid.ablations.cli.options import check_can_be_written
from expertgrid.ablations.cli.sources import read_data
from expertgrid.ablations.study.changes import changed_recipe
from expertgrid.ablations.study.levels import Level
from expertgrid.model.system.files import write_whole
from expertgrid.model.training.contact_sheet import contact_sheet


def show_augment(
    recipe: str, out: Path, data: str, data_dir: Path | None, settings: Mapping[str, Level], seed: int, images: int
) -> int:
    """Draws train images as the recipe's epochs give them to the network."""
    check_can_be_written("--out", out)
    changed = changed_recipe(recipe, settings)
    read = read_data(data, data_dir)
    changed.check_fits(read, len(read.train))
    picture = io.BytesIO()
    contact_sheet(changed, read, seed, images).save(picture, "PNG")
    write_whole(out, picture.getvalue())
    print(out)
    return 0
