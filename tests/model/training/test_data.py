"""Data sources: that each gives the images it should, and one clear line where it cannot."""

import io
import json
import shutil

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import CIFAR10_JPEG
from PIL import Image
from sklearn.datasets import load_digits
from torchvision.datasets import CIFAR10

from expertgrid.model.pixels import fitted
from expertgrid.model.system.errors import InputError
from expertgrid.model.training.data import load_data
from expertgrid.model.training.holdout import HoldOut

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
    assert (len(digits.train), len(digits.test)) == (1437, 360)
    ours = np.concatenate([images.pixels_BHWC for images in (digits.train, digits.test)]).reshape(1797, 64)
    theirs = (load_digits().data * 255 / 16).round().astype(np.uint8)
    assert (np.unique(ours, axis=0) == np.unique(theirs, axis=0)).all()
    labels_B = np.concatenate([images.labels_B for images in (digits.train, digits.test)])
    assert (np.bincount(labels_B) == np.bincount(load_digits().target)).all()
    assert np.bincount(digits.test.labels_B).min() >= 34


def test_a_source_says_how_much_of_it_a_seed_holds_out(digits, folder):
    data = load_data("digits@0.2")
    assert (data.source, data.name) == ("digits@0.2", "digits")
    assert data.fingerprint == digits.fingerprint, "the images are the same; a trial's id has the share by its hold-out"
    assert data.hold_out() == HoldOut(share=0.2)
    assert data.trained_on(data.hold_out()) == len(digits.train) - 288
    assert data.in_words(data.hold_out()) == (
        "digits: 1,149 train, 288 validation, 360 test images of 8x8x1, 10 classes"
    )
    for share in (".5", "0.5"):
        assert load_data(f"folder:{folder}@{share}").hold_out("fixed") == HoldOut(kind="fixed", share=0.5)
    with pytest.raises(InputError, match="'digits@0.9': 0.9 of the train images cannot be held out; a share from 0.01"):
        load_data("digits@0.9")


def test_folder_and_parquet_hold_the_same(folder, parquet):
    for source in (f"folder:{folder}", f"parquet:{parquet}"):
        data = load_data(source)
        assert data.classes == CLASSES
        assert data.name == source.rpartition("/")[2]
        assert (len(data.train), len(data.test)) == (40, 8)
        assert data.image_size == (6, 6)
        for images in (data.train, data.test):
            assert images.pixels_BHWC.dtype == np.uint8
            assert images.labels_B.dtype == np.int64
            assert (images.pixels_BHWC[:, 0, 0, 0] == images.labels_B * 100).all()
            assert (images.pixels_BHWC[..., 2] == 7).all()
        assert sorted(data.train.pixels_BHWC[:, 0, 0, 1].tolist()) == sorted([*range(20)] * 2)


def test_a_source_may_call_its_test_split_val(folder, parquet):
    expected = {load_data(source).fingerprint for source in (f"folder:{folder}", f"parquet:{parquet}")}
    (folder / "test").rename(folder / "val")
    (parquet / "test.parquet").rename(parquet / "validation-00000-of-00001.parquet")
    assert {load_data(source).fingerprint for source in (f"folder:{folder}", f"parquet:{parquet}")} == expected
    shutil.copytree(folder / "val" / CLASSES[0], folder / "test" / CLASSES[0])
    assert "train/ and test/ differ" in wrong(f"folder:{folder}"), "one that is called test goes before"
    (folder / "val" / CLASSES[1] / "00.png").unlink()
    shutil.rmtree(folder / "test")
    assert len(load_data(f"folder:{folder}").test) == 7


def test_fingerprint_follows_the_pixels(folder):
    before = load_data(f"folder:{folder}").fingerprint
    (folder / "test" / "cat" / "00.png").write_bytes(encoded(picture(0, 99)))
    assert load_data(f"folder:{folder}").fingerprint != before


def test_cifar10_from_a_directory_needs_its_checksums(tmp_path):
    """What is read from a whole copy is compared with torchvision in `test_untrusted.py`."""
    place = tmp_path / CIFAR10.base_folder
    place.mkdir()
    for name, _ in CIFAR10.train_list + CIFAR10.test_list:
        (place / name).write_bytes(b"another file")
    with pytest.raises(InputError, match="cifar10: no complete copy in .*: files are missing or have another check"):
        load_data("cifar10", tmp_path)


@pytest.mark.skipif(not CIFAR10_JPEG.is_dir(), reason="the JPEG copies of CIFAR-10 are not here")
def test_cifar10_jpeg():
    data = load_data(f"parquet:{CIFAR10_JPEG}")
    hold_out = data.hold_out()
    words = "cifar10-jpeg: 45,000 train, 5,000 validation, 10,000 test images of 32x32x3, 10 classes"
    assert data.in_words(hold_out) == words
    assert data.classes[0] == "airplane"
    held_out = hold_out.held_out(data.train.labels_B, data.fingerprint, seed=3)
    assert np.bincount(data.train.labels_B[held_out]).tolist() == [500] * 10
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
    Image.fromarray(np.full((6, 6), 40_000, dtype=np.uint16)).save(folder / "train" / "cat" / "05.png")
    assert "cat/05.png does not decode as an image: its mode is I;16; accepted: RGB" in wrong(source)
    (folder / "train" / "cat" / "05.png").unlink()
    (folder / "train" / "bird").mkdir()
    assert "bird" in wrong(source)
    (folder / "train" / "bird" / "0.png").write_bytes(encoded(picture(0, 5)))
    assert "train/ and test/ differ in the classes bird" in wrong(source)


def test_wrong_parquet(parquet):
    source, test = f"parquet:{parquet}", parquet / "test.parquet"
    image = encoded(picture(0, 1))

    def wrong_table(**columns) -> str:
        pyarrow.parquet.write_table(pyarrow.table(columns), test)
        return wrong(source)

    test.write_bytes(test.read_bytes()[:-100])
    assert "test.parquet is not Parquet, or is truncated" in wrong(source)
    message = wrong_table(img=["a"], label=[1])
    assert "test.parquet needs a column of structs with the field 'bytes'" in message
    assert "found img: string, label: int64" in message
    for blob in (image[:50], None):
        assert "test row 0 does not decode as an image" in wrong_table(img=[{"bytes": blob, "path": None}], label=[1])
    for label, values in ([2], "2 to 2"), ([None], "-1 to -1"), ([-3], "-3 to -3"):
        message = wrong_table(img=[{"bytes": image}], label=pyarrow.array(label, type="int64"))
        assert f"column 'label' needs labels 0 to 1 in each row; found {values}" in message
    message = wrong_table(img=[{"bytes": image}], a=[0], b=[1])
    assert "one column of integers, or one called label; found img: struct" in message


def test_labels_of_any_integer_type(parquet):
    before = load_data(f"parquet:{parquet}").fingerprint
    for file in parquet.iterdir():
        table = pyarrow.parquet.read_table(file)
        column = table.column_names.index("label")
        labels = table["label"].cast("uint8")
        pyarrow.parquet.write_table(table.set_column(column, "label", labels), file)
    assert load_data(f"parquet:{parquet}").fingerprint == before


def test_a_class_of_one_image_is_refused_once_the_hold_out_is_asked_for(folder):
    for split in ("train", "test"):
        (folder / split / "owl").mkdir()
        (folder / split / "owl" / "0.png").write_bytes(encoded(picture(1, 1)))
    data = load_data(f"folder:{folder}")
    with pytest.raises(InputError, match="hold-out of pets: class 'owl' has 1 train images; at least 2 are needed"):
        data.hold_out()


SIZES = [(40, 30), (30, 40), (24, 24), (16, 16), (16, 41), (51, 16), (97, 33), (9, 12), (5, 5), (17, 16), (23, 64)]


@pytest.fixture
def of_mixed_sizes(tmp_path) -> tuple[list[str], np.ndarray]:
    """A folder and Parquet files of the same images of mixed sizes, and their train images at 16 x 16 pixels."""
    random = np.random.default_rng(0)
    parquet, rows, expected = tmp_path / "parquet", [], []
    parquet.mkdir()
    for name in CLASSES:
        for split in ("train", "test"):
            (tmp_path / "pets" / split / name).mkdir(parents=True)
        for i, (width, height) in enumerate(SIZES):
            pixels = random.integers(256, size=(height, width, 3), dtype=np.uint8)
            for split in ("train", "test"):
                (tmp_path / "pets" / split / name / f"{i:02}.png").write_bytes(encoded(pixels))
            rows.append({"bytes": encoded(pixels), "path": None})
            expected.append(np.asarray(fitted(Image.fromarray(pixels), 16, 16)))
    table = pyarrow.table({"img": rows, "label": np.repeat([0, 1], len(SIZES))})
    for split in ("train", "test"):
        pyarrow.parquet.write_table(table, parquet / f"{split}.parquet")
    return [f"folder:{tmp_path / 'pets'}", f"parquet:{parquet}"], np.stack(expected)


def test_image_size_brings_all_images_to_one_size(of_mixed_sizes):
    sources, expected_BHWC = of_mixed_sizes
    for source in sources:
        assert "images differ in size" in wrong(source)
        assert "image_size = N in [base] brings all to N x N pixels" in wrong(source)
        data = load_data(source, image_size=16)
        assert data.image_size == (16, 16)
        for images in (data.train, data.test):
            assert images.pixels_BHWC.dtype == expected_BHWC.dtype == np.uint8
            assert (images.pixels_BHWC == expected_BHWC).all()


@pytest.mark.parametrize("size", [1, 7, 8, 12, 33])
def test_image_size_of_grey_images(size, digits):
    """Eight pixels are what they have."""
    data = load_data("digits", image_size=size)
    for pixels_HWC, fitted_HWC in zip(digits.train.pixels_BHWC[:20], data.train.pixels_BHWC):
        assert (np.asarray(fitted(Image.fromarray(pixels_HWC[..., 0]), size, size)) == fitted_HWC[..., 0]).all()
    assert data.image_size == (size, size)
    assert (data.fingerprint == digits.fingerprint) == (size == 8)


def test_train_and_test_images_of_other_sizes_are_brought_to_one(folder):
    for file in (folder / "test").rglob("*.png"):
        file.write_bytes(encoded(picture(0, 1, size=9)))
    assert "train images have 6x6 pixels, test images 9x9" in wrong(f"folder:{folder}")
    data = load_data(f"folder:{folder}", image_size=6)
    assert data.train.pixels_BHWC.shape[1:] == data.test.pixels_BHWC.shape[1:] == (6, 6, 3)
