"""What a seed trains on, holds out and is tested on."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from expertgrid.ablations.study.study import Study
from expertgrid.model.system.errors import InputError
from expertgrid.model.training.data import ImageData, Images
from expertgrid.model.training.holdout import HoldOut
from expertgrid.model.training.splits import ResidentData, Split

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def numbered(digits) -> ImageData:
    """Digits whose first two pixels say which image of the source it is."""
    pixels_BHWC, numbers_B = digits.train.pixels_BHWC.copy(), np.arange(len(digits.train))
    pixels_BHWC[:, 0, 0, 0], pixels_BHWC[:, 0, 1, 0] = numbers_B // 256, numbers_B % 256
    return replace(digits, train=Images(pixels_BHWC, digits.train.labels_B))


def numbers(split) -> list[int]:
    return (256 * split.pixels()[:, 0, 0, 0].int() + split.pixels()[:, 0, 1, 0].int()).tolist()


@pytest.mark.parametrize("seed", [0, 7, 10, 23])
@pytest.mark.parametrize("hold_out", [HoldOut(), HoldOut(share=0.3), HoldOut(kind="fixed")], ids=str)
def test_train_and_validation_are_all_train_images_in_their_order(hold_out, seed, numbered):
    splits = ResidentData(numbered, CPU).splits(hold_out, seed)
    train, validation = numbers(splits.train), numbers(splits.validation)
    assert not set(train) & set(validation)
    assert sorted(train + validation) == list(range(len(numbered.train)))
    assert (train, validation) == (sorted(train), sorted(validation))
    assert validation == hold_out.held_out(numbered.train.labels_B, numbered.fingerprint, seed).tolist()
    labels_B = torch.from_numpy(numbered.train.labels_B)
    for indices, split in ((train, splits.train), (validation, splits.validation)):
        assert torch.equal(split.labels_B, labels_B[indices])
        assert torch.equal(split.pixels(), torch.from_numpy(numbered.train.pixels_BHWC[indices]))
    assert torch.equal(splits.test.pixels(), torch.from_numpy(numbered.test.pixels_BHWC))
    assert torch.equal(splits.test.labels_B, torch.from_numpy(numbered.test.labels_B))
    assert splits.device == CPU
    pixels = {split.source_XHWC.untyped_storage().data_ptr() for split in (splits.train, splits.validation)}
    assert pixels == {numbered.train.pixels_BHWC.ctypes.data}  # no copies


def test_images_that_a_gpu_has_no_room_for_are_one_line(digits, monkeypatch):
    def of(images: Images, device: torch.device) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 30.00 GiB")

    monkeypatch.setattr(Split, "of", of)
    with pytest.raises(InputError, match="'digits': its images do not fit into the memory of cuda; image_size = N"):
        ResidentData(digits, torch.device("cuda"))


def test_all_cells_of_a_seed_share_their_hold_out(digits, resident_digits):
    factors = {"experts": [1, 2], "recipe.lr": [0.1, 0.2]}
    cells = Study(name="test", question="?", seeds=3, factors=factors, baselines=["test_resnet"]).cells(digits)
    held_out = [
        [resident_digits.splits(trial.hold_out, trial.seed).validation.pixels() for trial in cell.trials]
        for cell in cells
    ]
    assert len(held_out) == 5
    for cell in held_out[1:]:
        assert all(torch.equal(found, first) for found, first in zip(cell, held_out[0], strict=True))
    assert not torch.equal(held_out[0][0], held_out[0][1])


def test_images_are_normalised_by_all_train_images_whatever_a_seed_holds_out(digits, resident_digits):
    """So that the seeds of a study see the same pixels."""
    pixels = digits.train.pixels_BHWC / 255
    assert digits.mean == pytest.approx(pixels.mean((0, 1, 2)), abs=1e-6)
    assert digits.std == pytest.approx(pixels.std((0, 1, 2)), abs=1e-6)
    for seed in range(2):
        splits = resident_digits.splits(HoldOut(), seed)
        assert splits.data is digits
        kept = splits.train.pixels().double() / 255
        assert kept.mean().item() != pytest.approx(digits.mean[0], abs=1e-6)
