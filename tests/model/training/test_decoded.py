"""The cache of decoded images: the same images as without it, whatever becomes of its files."""

import os
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from expertgrid.model.training import data, decoded
from expertgrid.model.training.data import load_data

SHAPE = (3, 4, 5, 3)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(decoded, "DECODED", tmp_path / "cache" / "decoded")
    return decoded.DECODED


@pytest.fixture
def file(tmp_path) -> Path:
    (tmp_path / "images").write_bytes(b"encoded")
    return tmp_path / "images"


def images(value: int) -> np.ndarray:
    return np.random.default_rng(value).integers(256, size=SHAPE, dtype=np.uint8)


def kept(file: Path, value: int, how: object = None) -> int:
    """0 where the images come from the cache, else `value`, which says what is decoded."""
    pixels_BHWC = decoded.decoded([file], how, lambda: images(value))
    found = [number for number in range(10) if (pixels_BHWC == images(number)).all()]
    assert len(found) == 1
    return found[0]


def test_a_source_is_decoded_once_and_shared(cache, tmp_path, monkeypatch):
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / "pets" / split / name).mkdir(parents=True)
            for number in range(3):
                pixels = np.random.default_rng(number).integers(256, size=(6, 7, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "pets" / split / name / f"{number}.png")
    source = f"folder:{tmp_path / 'pets'}"
    first = load_data(source)
    assert oct(cache.stat().st_mode)[-3:] == "700"
    monkeypatch.setattr(data, "_decode", lambda *_: pytest.fail("decoded again"))
    second = load_data(f"{source}@0.5")
    for before, after in ((first.train, second.train), (first.test, second.test)):
        np.testing.assert_array_equal(before.pixels_BHWC, after.pixels_BHWC)
    assert (first.fingerprint, first.mean, first.std) == (second.fingerprint, second.mean, second.std)
    pixels_BHWC = first.train.pixels_BHWC
    sent = bytes(ForkingPickler.dumps(first.train))
    assert pixels_BHWC[0].tobytes() not in sent
    np.testing.assert_array_equal(ForkingPickler.loads(sent).pixels_BHWC, pixels_BHWC)
    for part in (pixels_BHWC[2:4], pixels_BHWC[::-1], pixels_BHWC[[1, 0]]):
        np.testing.assert_array_equal(ForkingPickler.loads(ForkingPickler.dumps(part)), part)
    for file in cache.iterdir():  # what is mapped stays, and other processes get a copy
        file.unlink()
    assert pixels_BHWC[0].tobytes() in bytes(ForkingPickler.dumps(first.train))


def test_another_file_or_size_is_decoded(cache, file):
    assert [kept(file, 1), kept(file, 2), kept(file, 3, how=8), kept(file, 4, how=8)] == [1, 1, 3, 3]
    state = file.stat()
    file.write_bytes(b"ENCODED")
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))  # as large and as old as it was
    assert kept(file, 5) == 5


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "other shape"])
def test_a_damaged_file_is_decoded_again(damage, cache, file, capsys):
    assert kept(file, 1) == 1
    (place,) = cache.iterdir()
    content = bytearray(place.read_bytes())
    content[7] ^= 1
    place.write_bytes({"cut": content[:-1], "flipped": content, "empty": b""}.get(damage, place.read_bytes()))
    if damage == "other shape":
        place.rename(place.with_name(place.name.replace("3x4x5x3", "3x4x5x4")))
    assert kept(file, 2) == 2
    assert capsys.readouterr().err.count("is damaged; its images are decoded again\n") == 1


def test_the_oldest_files_make_room(cache, file, monkeypatch, capsys):
    monkeypatch.setattr(decoded, "MOST_BYTES", 2 * images(0).nbytes)
    for how in (1, 2, 3):
        assert kept(file, how, how) == how
        for place in cache.iterdir():
            os.utime(place, ns=(0, place.stat().st_mtime_ns - 10**10))
    assert len([*cache.iterdir()]) == 2
    assert [kept(file, 9, how) for how in (3, 2, 1)] == [3, 2, 9]
    monkeypatch.setattr(decoded, "MOST_BYTES", 10)
    assert [kept(file, 5, how=4), kept(file, 6, how=4)] == [5, 6]
    assert "decoded images are not kept in" in capsys.readouterr().err


def test_two_processes_at_once(cache, file):
    assert decoded.decoded([file], None, lambda: images(kept(file, 1))).tobytes() == images(1).tobytes()
    assert len([*cache.iterdir()]) == 1


def test_without_a_folder_images_stay_in_memory(cache, file, capsys):
    cache.parent.write_text("no folder")
    assert [kept(file, 1), kept(file, 2)] == [1, 2]
    assert capsys.readouterr().err.count("decoded images are not kept in") == 2


def test_clean_removes_it(expertgrid, cache, file, monkeypatch):
    monkeypatch.setattr("expertgrid.ablations.records.clean.DECODED", cache)
    kept(file, 1)
    assert "1 to remove, 180 bytes" in expertgrid("clean", "--cache").out
    assert expertgrid("clean", "--cache", "--yes").out.endswith("removed\n")
    assert not [*cache.iterdir()]
    assert "needs a study directory, or --cache alone" in expertgrid("clean").complaint
