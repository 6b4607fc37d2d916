"""Data sources: that each gives the images it should, and one clear line where it cannot."""

import io
import json
import pickle

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import CIFAR10_JPEG
from PIL import Image
from sklearn.datasets import load_digits

from ablations.training.data import load_data
from model.errors import InputError

CLASSES = ("cat", "dog")


def picture(label: int, number: int, size: int = 6) -> np.ndarray:
    """An image of one colour that says which it is."""
    return np.full((size, size, 3), (label * 100, number, 7), dtype=np.uint8)


def encoded(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    """20 train and 4 test images of each class."""
    for split, count in (("train", 20), ("test", 4)):
        for label, name in enumerate(CLASSES):
            place = tmp_path / "pets" / split / name
            place.mkdir(parents=True)
            for i in range(count):
                (place / f"{i:02}.png").write_bytes(encoded(picture(label, i)))
    return tmp_path / "pets"


@pytest.fixture
def parquet(tmp_path):
    """The same images as Parquet, the train images in two files."""
    place = tmp_path / "parquet"
    place.mkdir()
    features = {"label": {"names": list(CLASSES), "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    for name, numbers in (("train-0", range(10)), ("train-1", range(10, 20)), ("test", range(4))):
        rows = [(label, i) for label in (0, 1) for i in numbers]
        images = [{"bytes": encoded(picture(label, i)), "path": None} for label, i in rows]
        table = pyarrow.table({"img": images, "label": [label for label, _ in rows]})
        pyarrow.parquet.write_table(table.replace_schema_metadata(metadata), place / f"{name}.parquet")
    return place


def test_digits_are_those_of_scikit_learn(digits):
    assert (len(digits.train), len(digits.validation), len(digits.test)) == (1293, 144, 360)
    splits = (digits.train, digits.validation, digits.test)
    ours = torch.cat([split.pixels_BHWC for split in splits]).flatten(1)
    theirs = torch.from_numpy((load_digits().data * 255 / 16).round().astype(np.uint8))
    assert torch.equal(ours.unique(dim=0), theirs.unique(dim=0))
    assert torch.bincount(torch.cat([split.labels_B for split in splits])).sum() == 1797
    assert torch.bincount(digits.validation.labels_B).min() >= 13


def test_splits_share_no_image_and_are_always_the_same(digits):
    again = load_data("digits")
    assert again.fingerprint == digits.fingerprint
    assert torch.equal(again.validation.pixels_BHWC, digits.validation.pixels_BHWC)


def test_a_source_says_how_much_of_it_validates(digits, folder):
    data = load_data("digits@0.2")
    assert (data.source, data.name) == ("digits@0.2", "digits")
    together = len(data.train) + len(data.validation)
    assert together == len(digits.train) + len(digits.validation)
    assert len(data.validation) == round(0.2 * together)
    assert torch.equal(data.test.pixels_BHWC, digits.test.pixels_BHWC)
    assert data.fingerprint != digits.fingerprint
    assert len(load_data(f"folder:{folder}@.5").validation) == len(load_data(f"folder:{folder}@0.5").train)
    with pytest.raises(InputError, match="'digits@0.9': 0.9 of the train images cannot validate; a share from 0.01"):
        load_data("digits@0.9")


def test_statistics_are_of_the_train_images(digits):
    pixels = digits.train.pixels_BHWC.double() / 255
    assert digits.mean == pytest.approx(pixels.mean((0, 1, 2)).tolist(), abs=1e-5)
    assert digits.std == pytest.approx(pixels.std((0, 1, 2), correction=0).tolist(), abs=1e-5)


def test_folder_and_parquet_hold_the_same(folder, parquet):
    for source in (f"folder:{folder}", f"parquet:{parquet}"):
        data = load_data(source)
        assert data.classes == CLASSES
        assert data.name == source.rpartition("/")[2]
        assert (len(data.train), len(data.validation), len(data.test)) == (36, 4, 8)
        assert data.image_size == (6, 6)
        for split in (data.train, data.validation, data.test):
            assert torch.equal(split.pixels_BHWC[:, 0, 0, 0], (split.labels_B * 100).byte())
            assert (split.pixels_BHWC[..., 2] == 7).all()
        assert torch.bincount(data.validation.labels_B).tolist() == [2, 2]
        numbers = torch.cat([data.train.pixels_BHWC, data.validation.pixels_BHWC])[:, 0, 0, 1]
        assert numbers.sort().values.tolist() == sorted([*range(20)] * 2)


def test_fingerprint_follows_the_pixels(folder):
    before = load_data(f"folder:{folder}").fingerprint
    (folder / "test" / "cat" / "00.png").write_bytes(encoded(picture(0, 99)))
    assert load_data(f"folder:{folder}").fingerprint != before


def test_cifar10_from_a_directory(tmp_path, monkeypatch):
    """torchvision's layout, with its own checksums left out."""
    from torchvision.datasets import CIFAR10

    place = tmp_path / CIFAR10.base_folder
    place.mkdir()
    rng = np.random.default_rng(0)
    for name, _ in CIFAR10.train_list + CIFAR10.test_list:
        batch = {"data": rng.integers(256, size=(40, 3072), dtype=np.uint8), "labels": [i % 10 for i in range(40)]}
        (place / name).write_bytes(pickle.dumps(batch))
    (place / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class {i}" for i in range(10)]}))
    with pytest.raises(
        InputError, match=r"cifar10: no complete copy in .*: files are missing or have another checksum"
    ):
        load_data("cifar10", tmp_path)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    data = load_data("cifar10", tmp_path)
    assert (len(data.train), len(data.validation), len(data.test)) == (180, 20, 40)
    assert data.classes[3] == "class 3"


@pytest.mark.skipif(not CIFAR10_JPEG.is_dir(), reason="the JPEG copies of CIFAR-10 are not here")
def test_cifar10_jpeg():
    data = load_data(f"parquet:{CIFAR10_JPEG}")
    assert str(data) == ("cifar10-jpeg: 45,000 train, 5,000 validation, 10,000 test images of 32x32x3, 10 classes")
    assert data.classes[0] == "airplane"
    assert torch.bincount(data.validation.labels_B).tolist() == [500] * 10
    assert data.mean == pytest.approx((0.4913, 0.4821, 0.4465), abs=1e-3)
    assert data.std == pytest.approx((0.2452, 0.2428, 0.2606), abs=1e-3)


def wrong(source: str) -> str:
    with pytest.raises(InputError) as error:
        load_data(source)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_wrong_sources(tmp_path):
    assert "unknown data source 'cifar-10'; did you mean 'cifar10'?" in wrong("cifar-10")
    assert "unknown data source 'parquet:'" in wrong("parquet:")
    assert "there is no directory" in wrong(f"folder:{tmp_path}/none")
    assert "no images in train/CLASS/" in wrong(f"folder:{tmp_path}")
    assert "no train*.parquet" in wrong(f"parquet:{tmp_path}")
    with pytest.raises(InputError, match="--data-dir is for cifar10 and cifar100"):
        load_data("digits", tmp_path)


def test_wrong_folders(folder):
    source = f"folder:{folder}"
    (folder / "train" / "cat" / "05.png").write_bytes(b"no image")
    assert "cat/05.png does not decode as an image" in wrong(source)
    (folder / "train" / "cat" / "05.png").write_bytes(encoded(picture(0, 5, size=7)))
    assert "images differ in size" in wrong(source)
    assert "05.png 7x7" in wrong(source)
    (folder / "train" / "cat" / "05.png").unlink()
    (folder / "train" / "bird").mkdir()
    assert "bird" in wrong(source)
    (folder / "train" / "bird" / "0.png").write_bytes(encoded(picture(0, 5)))
    assert "train/ and test/ differ in the classes bird" in wrong(source)


def test_wrong_parquet(parquet):
    source = f"parquet:{parquet}"
    test = parquet / "test.parquet"
    whole = test.read_bytes()
    test.write_bytes(whole[:-100])
    assert "test.parquet is not Parquet, or is truncated" in wrong(source)
    pyarrow.parquet.write_table(pyarrow.table({"img": ["a"], "label": [1]}), test)
    assert "test.parquet needs a column of structs with the field 'bytes'" in wrong(source)
    assert "found img: string, label: int64" in wrong(source)
    for blob in (encoded(picture(0, 1))[:50], None):
        images = [{"bytes": blob, "path": None}]
        pyarrow.parquet.write_table(pyarrow.table({"img": images, "label": [1]}), test)
        if blob:
            assert "test row 0 does not decode as an image" in wrong(source)
    images = [{"bytes": encoded(picture(0, 1)), "path": None}]
    for label, found in ([2], "2 to 2"), ([None], "-1 to -1"), ([-3], "-3 to -3"):
        labels = pyarrow.array(label, type="int64")
        pyarrow.parquet.write_table(pyarrow.table({"img": images, "label": labels}), test)
        assert f"column 'label' needs labels 0 to 1 in each row; found {found}" in wrong(source)
    table = pyarrow.table({"img": images, "a": [0], "b": [1]})
    pyarrow.parquet.write_table(table, test)
    assert "one column of integers, or one called label; found img: struct" in wrong(source)


def test_labels_of_any_integer_type(parquet):
    before = load_data(f"parquet:{parquet}").fingerprint
    for file in parquet.iterdir():
        table = pyarrow.parquet.read_table(file)
        column = table.column_names.index("label")
        labels = table["label"].cast("uint8")
        pyarrow.parquet.write_table(table.set_column(column, "label", labels), file)
    assert load_data(f"parquet:{parquet}").fingerprint == before


def test_images_of_more_than_8_bits_are_refused(folder):
    Image.fromarray(np.full((6, 6), 40_000, dtype=np.uint16)).save(folder / "train" / "cat" / "05.png")
    assert "cat/05.png does not decode as an image: its mode is I;16; accepted: RGB" in wrong(f"folder:{folder}")


def test_train_and_test_images_of_other_sizes(folder):
    for file in (folder / "test").rglob("*.png"):
        file.write_bytes(encoded(picture(0, 1, size=9)))
    assert "train images have 6x6 pixels, test images 9x9" in wrong(f"folder:{folder}")


def test_a_class_of_one_image_cannot_be_split(folder):
    for split in ("train", "test"):
        (folder / split / "owl").mkdir()
        (folder / split / "owl" / "0.png").write_bytes(encoded(picture(1, 1)))
    assert "class 'owl' has 1 train images; at least 2 are needed" in wrong(f"folder:{folder}")
