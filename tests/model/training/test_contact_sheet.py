"""The contact sheet: that it shows what the training's loader gives, and refuses what it cannot write."""

import numpy as np
import pytest
import torch
from PIL import Image

from expertgrid.ablations.study.changes import changed_recipe
from expertgrid.model.system.errors import InputError
from expertgrid.model.training.contact_sheet import DRAWS, GAP, LINE, contact_sheet
from expertgrid.model.training.data import ImageData

PLAIN = {"hflip": 0.0, "crop_padding": 0}


def tiles(sheet: Image.Image, side: int, scale: int, rows: int) -> np.ndarray:
    """The images (row, column, H, W, C) of a sheet of square images, at their own size."""
    pixels = np.asarray(sheet)
    found = []
    for j in range(rows):
        y = LINE + GAP + j * (side * scale + 2 * LINE + GAP)
        xs = [GAP + i * (side * scale + GAP) for i in range(DRAWS + 1)]
        found.append([pixels[y : y + side * scale : scale, x : x + side * scale : scale] for x in xs])
    return np.array(found)


def test_without_augmentation_each_epoch_shows_the_original(digits):
    shown = tiles(contact_sheet(changed_recipe("fast", PLAIN), digits, 0, 3), 8, 14, 3)
    assert (shown == shown[:, :1]).all()
    originals = digits.train.pixels_BHWC[..., 0]
    assert all((originals == row[0, ..., 0]).all((1, 2)).any() for row in shown)


def test_alternating_flip_alternates_on_the_sheet():
    data = ImageData.random(train=20, height=32, width=32)
    recipe = changed_recipe("fast", PLAIN | {"hflip": 0.5, "alternating_flip": True})
    shown = tiles(contact_sheet(recipe, data, 1, 4), 32, 4, 4)
    assert (shown[:, 1::2] == shown[:, 1:2]).all()
    assert (shown[:, 2::2] == shown[:, 1:2, :, ::-1]).all()


def test_same_seed_same_sheet(digits):
    recipe = changed_recipe("fast", {"crop_padding": 1, "mixup": 0.4, "cutmix": 1.0, "auto_augment": "rand-m9"})
    before = torch.get_rng_state()
    first, same, other = (contact_sheet(recipe, digits, seed, 4) for seed in (0, 0, 1))
    assert first == same != other
    assert torch.equal(torch.get_rng_state(), before)


def test_more_images_than_there_are(digits):
    with pytest.raises(InputError, match="--images 5: random has 4 images to train on"):
        contact_sheet(changed_recipe("fast", PLAIN), ImageData.random(4, 8, 8), 0, 5)


def test_the_command(expertgrid, tmp_path):
    out = tmp_path / "sheet.png"
    done = expertgrid("show-augment", "fast", "--out", out, "--set", "cutout=3", "--images", 2)
    assert (done.status, done.out) == (0, f"{out}\n")
    assert Image.open(out).format == "PNG"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["fast", "--out", "missing/sheet.png"], "--out missing/sheet.png: the name of a .png file in a directory"),
        (["fast", "--out", "sheet.jpg"], "--out sheet.jpg: the name of a .png file in a directory"),
        (["fsat", "--out", "sheet.png"], "unknown recipe 'fsat'; did you mean 'fast'?"),
        (["fast", "--out", "sheet.png", "--set", "cutuot=3"], "unknown field of the recipe 'cutuot'"),
        (["fast", "--out", "sheet.png", "--set", "cutout=9"], "recipe.cutout: 9 is too large for the 8x8 images"),
        (["fast", "--out", "sheet.png", "--set", "auto_augment=rand-x"], "'x' is no part of timm's rand policies"),
    ],
)
def test_wrong_input(expertgrid, tmp_path, monkeypatch, arguments, complaint):
    monkeypatch.chdir(tmp_path)
    done = expertgrid("show-augment", *arguments)
    assert done.status == 2
    assert complaint in done.complaint
    assert not list(tmp_path.iterdir())
