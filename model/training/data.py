"""Images to train on: sources of several kinds, one form.

A source is decoded once into uint8 arrays, which `training.decoded` keeps. `training.splits` brings them to the
training device, and `training.holdout` says which train images a seed holds out. The test split is left as the source
has it. This file imports no torch unless a source needs torchvision. Shapes: B images, H x W pixels, C channels.
"""

import hashlib
import io
import itertools
import json
import os.path
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pickle import Unpickler, UnpicklingError
from threading import Lock
from typing import TYPE_CHECKING
from urllib.error import URLError

import numpy as np
from PIL import Image, UnidentifiedImageError

from expertgrid.model.pixels import FORMATS, fitted, opened
from expertgrid.model.system.errors import InputError, unknown
from expertgrid.model.system.files import opened_file, read_whole
from expertgrid.model.system.machine import memory_bytes
from expertgrid.model.training.decoded import CACHE, decoded
from expertgrid.model.training.holdout import LARGEST_SHARE, SHARE, SMALLEST_SHARE, HoldOut, Kind

if TYPE_CHECKING:
    import pyarrow.parquet

SOURCES = {
    "digits": "1,797 handwritten digits of 8x8 pixels, in scikit-learn: no download",
    "cifar10": "60,000 photographs of 32x32 pixels in 10 classes: downloaded once, or found in --data-dir",
    "cifar100": "60,000 photographs of 32x32 pixels in 100 classes: downloaded once, or found in --data-dir",
    "parquet:DIR": "DIR/train*.parquet and DIR/test*.parquet (or val*) in the Hugging Face image layout",
    "folder:DIR": "DIR/train/CLASS/* and DIR/test/CLASS/* (or val), image files",
    "SOURCE@SHARE": "one of these, of which each seed holds out another share than a tenth: cifar10@0.02",
}
DIGITS_TEST_SHARE = 0.2  # scikit-learn's digits come without a test split
DIGITS_SPLIT_SEED = 0
ONE_SIZE = "image_size = N in [base] brings all to N x N pixels"
LARGEST_SIDE = 1024  # pixels that `image_size` can ask for
MODES = ("RGB", "RGBA", "L", "LA", "P", "PA", "1", "CMYK", "YCbCr")  # of 8 bits a channel
MOST_CLASSES = 100_000  # of data that do not name them
MOST_IMAGES = 2_000_000  # of a split, which are all in memory
TOGETHER = 64  # images that are read at once
LARGE = 4_000_000  # pixels; larger images are decoded one at a time, so that memory holds one of them
Reader = tuple[str, Callable[[], bytes | None]]  # the name of an image, and what reads its file

# What a pickle of an array calls, by module and name. `numpy.core` is the module's name in older files.
ARRAYS = {("numpy", "ndarray"), ("numpy", "dtype")} | {
    (f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")
}


@dataclass(frozen=True)
class Images:
    """Decoded images and their class numbers."""

    pixels_BHWC: np.ndarray  # uint8
    labels_B: np.ndarray  # int64

    def __len__(self) -> int:
        return len(self.labels_B)


@dataclass(frozen=True)
class ImageData:
    """A source, decoded. Its share says how much of the train images a seed holds out."""

    source: str  # as the user gave it
    name: str  # as a table calls it
    classes: tuple[str, ...]
    train: Images  # with the images that a seed holds out
    test: Images
    mean: tuple[float, ...]  # of the train images' pixels from 0 to 1, one for each channel
    std: tuple[float, ...]
    fingerprint: str  # of the pixels and the labels

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        height, width = self.train.pixels_BHWC.shape[1:3]
        return height, width

    @property
    def channels(self) -> int:
        return self.train.pixels_BHWC.shape[3]

    def hold_out(self, kind: Kind = "rotating") -> HoldOut:
        """The hold-out of this kind and of the source's share. Raises InputError where a class is too small for it."""
        hold_out = HoldOut(kind=kind, share=split_share(self.source)[1])
        hold_out.check_fits(self.train.labels_B, self.classes, self.name)
        return hold_out

    def trained_on(self, hold_out: HoldOut) -> int:
        """The number of images that a seed trains on, of the first seed."""
        return len(self.train) - hold_out.size(self.train.labels_B, self.fingerprint)

    def in_words(self, hold_out: HoldOut) -> str:
        """The source in a line, with the numbers of images."""
        height, width = self.image_size
        train = self.trained_on(hold_out)
        counts = f"{train:,} train, {len(self.train) - train:,} validation, {len(self.test):,} test images"
        few = hold_out.few_images(self.train.labels_B, self.classes)
        classes = f"{len(self.classes)} classes{'; ' * bool(few)}{few}"
        return f"{self.name}: {counts} of {height}x{width}x{self.channels}, {classes}"

    @classmethod
    def random(cls, train: int, height: int, width: int, classes: int = 10) -> "ImageData":
        """Random RGB images to measure speed with: `train` train images, and one test image of each class."""
        rng = np.random.default_rng(0)

        def images(count: int) -> Images:
            pixels_BHWC = rng.integers(256, size=(count, height, width, 3), dtype=np.uint8)
            return Images(pixels_BHWC, np.arange(count) % classes)

        names = tuple(str(label) for label in range(classes))
        half = (0.5,) * 3
        return cls("random", "random", names, images(train), images(classes), half, half, "random")


def load_data(source: str, data_dir: Path | None = None, image_size: int | None = None) -> ImageData:
    """Reads a source of `SOURCES`, of which images that were decoded before are in the user's cache.

    Of a source that ends in @SHARE, a seed holds out this share of the train images (0.01 to 0.5): a small one for
    networks whose recipe was chosen before. With `image_size` each image is brought to so many pixels in height and
    width: its shorter side is resized (bicubic, antialiased), and the centre is cropped, as in timm's evaluation.

    `data_dir` is where torchvision's copy of CIFAR is; without it, one is downloaded to the user's cache and its
    checksum verified. Raises InputError for an unknown source and for data that is missing, damaged or of mixed sizes.
    """
    without_share, _ = split_share(source)
    kind, _, place = without_share.partition(":")
    if data_dir is not None and kind not in ("cifar10", "cifar100"):
        raise InputError(f"--data-dir is for cifar10 and cifar100; the data source is {source!r}")
    if without_share == "digits":
        return _digits(source, image_size)
    if without_share in ("cifar10", "cifar100"):
        return _cifar(source, without_share, data_dir, image_size)
    if kind in ("parquet", "folder") and place:
        directory = Path(os.path.expanduser(place))  # which leaves the ~ of an unknown user as it is
        if not os.path.isdir(directory):  # False also where a name is too long for a file
            raise _wrong(source, f"there is no directory {directory}")
        return (_parquet if kind == "parquet" else _folder)(source, directory, image_size)
    if "@" in source and without_share == source:
        raise _wrong(source, "what follows @ is a share of its train images, as in cifar10@0.02")
    raise unknown("data source", source, SOURCES)


def _wrong(source: str, problem: str) -> InputError:
    return InputError(f"data source {source!r}: {problem}")


def split_share(source: str) -> tuple[str, float]:
    """The source without its @SHARE, and the share."""
    match = re.fullmatch(r"(.+)@(\d*\.\d+)", source)
    if match is None:
        return source, SHARE
    share = float(match[2])
    if not SMALLEST_SHARE <= share <= LARGEST_SHARE:
        needed = f"a share from {SMALLEST_SHARE} to {LARGEST_SHARE} is needed"
        raise _wrong(source, f"{match[2]} of the train images cannot be held out; {needed}")
    return match[1], share


def _assemble(
    source: str,
    name: str,
    classes: Sequence[str],
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
) -> ImageData:
    pixels_BHWC, labels_B = train
    if pixels_BHWC.shape[1:] != test[0].shape[1:]:
        sizes = ["x".join(map(str, pixels.shape[1:3])) for pixels in (pixels_BHWC, test[0])]
        raise _wrong(source, f"train images have {sizes[0]} pixels, test images {sizes[1]}; {ONE_SIZE}")
    for text in (source, name, *classes):
        if text != text.encode(errors="replace").decode():
            raise _wrong(source, f"{text!r} is not UTF-8, in which the names of classes and folders are written")
    if len(set(classes)) < len(classes):
        raise _wrong(source, f"two classes have the name {next(c for c in classes if classes.count(c) > 1)!r}")
    if len(classes) < 2:
        raise _wrong(source, f"has {len(classes)} class; at least 2 are needed")
    digest = hashlib.sha256()
    for pixels, labels in (train, test):
        digest.update(f"{pixels.shape}{len(classes)}".encode())
        digest.update(pixels.data)
        digest.update(labels.astype("<i8").data)
    mean, std = _pixel_statistics(pixels_BHWC)
    parts = (Images(pixels, labels.astype(np.int64)) for pixels, labels in (train, test))
    return ImageData(source, name, tuple(classes), *parts, mean, std, digest.hexdigest()[:16])


def _pixel_statistics(pixels_BHWC: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, exactly, from counts of the 256 values."""
    channels = pixels_BHWC.shape[3]
    strips = map(np.concatenate, np.array_split(pixels_BHWC, len(pixels_BHWC) // TOGETHER + 1))  # images in a column
    images = (Image.fromarray(strip_HWC if channels > 1 else strip_HWC[..., 0]) for strip_HWC in strips)
    counts = sum((np.array(image.histogram()) for image in images), np.zeros(channels * 256, np.int64))
    values, shares = np.arange(256) / 255, counts.reshape(channels, 256) / pixels_BHWC[..., 0].size
    means = [float(share @ values) for share in shares]
    stds = [float(np.sqrt(share @ (values - mean) ** 2)) for share, mean in zip(shares, means)]
    return tuple(round(mean, 6) for mean in means), tuple(round(max(std, 1e-3), 6) for std in stds)


def _digits(source: str, image_size: int | None) -> ImageData:
    # Loading them takes longer than most commands.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    pixels_BHWC = _all_resized((bunch.images * (255 / 16)).round().astype(np.uint8)[..., None], image_size)
    labels_B = bunch.target
    train, test = train_test_split(
        np.arange(len(labels_B)), test_size=DIGITS_TEST_SHARE, stratify=labels_B, random_state=DIGITS_SPLIT_SEED
    )
    classes = [str(name) for name in bunch.target_names]
    return _assemble(
        source, "digits", classes, (pixels_BHWC[train], labels_B[train]), (pixels_BHWC[test], labels_B[test])
    )


def _cifar(source: str, name: str, data_dir: Path | None, image_size: int | None) -> ImageData:
    from torchvision.datasets import CIFAR10, CIFAR100
    from torchvision.datasets.utils import download_and_extract_archive

    about = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    root = data_dir or CACHE
    place, splits = root / about.base_folder, (about.train_list, about.test_list)

    def read_all() -> tuple[list[dict], list[dict], dict]:
        train, test = ([_unpickled(place / file, md5) for file, md5 in files] for files in splits)
        return train, test, _unpickled(place / about.meta["filename"], about.meta["md5"])

    try:
        train, test, meta = read_all()
    except (InputError, UnpicklingError):
        if data_dir is not None:
            problem = "files are missing or have another checksum"
            raise InputError(f"{name}: no complete copy in {root}: {problem}") from None
        try:
            download_and_extract_archive(about.url, str(root), filename=about.filename, md5=about.tgz_md5)
            train, test, meta = read_all()
        except (URLError, OSError, RuntimeError, InputError, UnpicklingError) as error:
            raise InputError(f"{name} could not be downloaded ({error}); --data-dir takes a copy of it") from None
    labels = "labels" if name == "cifar10" else "fine_labels"
    arrays = []
    for batches, files in zip((train, test), splits):
        pixels_BHWC = np.vstack([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        labels_B = np.array([label for batch in batches for label in batch[labels]])
        resized = partial(_all_resized, pixels_BHWC, image_size)
        arrays.append((decoded([place / file for file, _ in files], image_size, resized), labels_B))
    return _assemble(source, name, meta[about.meta["key"]], *arrays)


class _ArraysOnly(Unpickler):
    """Reads what the files of CIFAR hold: text, numbers, lists, and arrays of NumPy. Nothing else is made or called."""

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in ARRAYS:
            raise UnpicklingError(f"the file asks for {module}.{name}; files of CIFAR hold arrays alone")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _unpickled(file: Path, md5: str) -> dict:
    """A file of CIFAR, which is a pickle. Raises UnpicklingError for another checksum and for what is no array."""
    content = read_whole(file)
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
        raise UnpicklingError(f"{file} has another checksum")
    return _ArraysOnly(io.BytesIO(content), encoding="latin1").load()


def _splits(has: Callable[[str], object]) -> tuple[str, str]:
    """The names of a source's train and test split. One without `test` may call it `val` or `validation`."""
    return "train", next((name for name in ("test", "val", "validation") if has(name)), "test")


def _folder(source: str, directory: Path, image_size: int | None) -> ImageData:
    from torchvision.datasets import ImageFolder

    parts, splits = [], _splits(lambda name: (directory / name).is_dir())
    for split in splits:
        try:
            parts.append(ImageFolder(directory / split))
        except OSError as error:
            reason = (error.strerror or str(error)).split(". Supported")[0]
            raise _wrong(source, f"no images in {split}/CLASS/: {reason}") from None
    train, test = parts
    if train.classes != test.classes:
        differing = sorted(set(train.classes) ^ set(test.classes))
        raise _wrong(source, f"train/ and {splits[1]}/ differ in the classes {', '.join(differing)}")
    arrays = []
    for part in parts:
        files = [Path(path) for path, _ in part.samples]
        readers: Iterator[Reader] = ((str(file), partial(read_whole, file)) for file in files)
        decode = partial(_decode, source, readers, len(files), image_size)
        arrays.append((decoded(files, image_size, decode), np.array(part.targets)))
    return _assemble(source, directory.resolve().name, train.classes, *arrays)


def _parquet(source: str, directory: Path, image_size: int | None) -> ImageData:
    import pyarrow

    arrays: list[tuple[np.ndarray, np.ndarray]] = []
    classes: tuple[str, ...] = ()
    for split in _splits(lambda name: any(directory.glob(f"{name}*.parquet"))):
        files = sorted(directory.glob(f"{split}*.parquet"))
        if not files:
            raise _wrong(source, f"no {split}*.parquet in {directory}")
        tables = [_opened_table(source, file) for file in files]
        if (rows := sum(table.metadata.num_rows for table in tables)) > MOST_IMAGES:
            raise _wrong(source, f"{split} has {rows:,} rows; at most {MOST_IMAGES:,} images are read")
        image_column, label_column = _columns(source, files[0], tables[0].schema_arrow)
        try:
            columns = [table.read([label_column])[label_column].cast("int64", safe=False) for table in tables]
        except (pyarrow.ArrowException, OSError, KeyError) as error:
            raise _wrong(source, f"the {split}*.parquet files differ in columns, or are damaged: {error}") from None
        labels_B = np.concatenate([column.fill_null(-1).to_numpy() for column in columns])
        if split == "train":
            classes = _class_names(tables[0].schema_arrow, label_column, labels_B)
        if len(labels_B) == 0 or labels_B.min() < 0 or labels_B.max() >= len(classes):
            labels = f"{labels_B.min()} to {labels_B.max()}" if len(labels_B) else "none"
            needs = f"needs labels 0 to {len(classes) - 1 if classes else MOST_CLASSES - 1} in each row"
            raise _wrong(source, f"{split}: column {label_column!r} {needs}; found {labels}")
        images = _images(source, tables, image_column, split)
        arrays.append((decoded(files, image_size, partial(_decode, source, images, rows, image_size)), labels_B))
    return _assemble(source, directory.resolve().name, classes, *arrays)


def _opened_table(source: str, file: Path) -> "pyarrow.parquet.ParquetFile":
    """A Parquet file of which the end is read, which says how many rows there are."""
    import pyarrow
    import pyarrow.parquet

    try:
        with opened_file(file):
            return pyarrow.parquet.ParquetFile(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise _wrong(source, f"{file} is not Parquet, or is truncated: {error}") from None


def _images(source: str, tables: list["pyarrow.parquet.ParquetFile"], column: str, split: str) -> Iterator[Reader]:
    """The images of a split, some at a time: a few kilobytes can say the same megabytes in each row."""
    import pyarrow
    import pyarrow.compute

    places = itertools.count()
    try:
        for batch in itertools.chain.from_iterable(table.iter_batches(TOGETHER, columns=[column]) for table in tables):
            for blob in pyarrow.compute.struct_field(batch[column], "bytes"):  # ty: ignore[missing-attribute]
                yield f"{split} row {next(places)}", blob.as_py
    except (pyarrow.ArrowException, OSError, KeyError) as error:
        raise _wrong(source, f"{split} row {next(places)} cannot be read: {error}") from None


def _columns(source: str, file: Path, schema: "pyarrow.Schema") -> tuple[str, str]:
    """The names of the image column (a struct with `bytes`) and of the label column (integers)."""
    import pyarrow.types

    structs = [f.name for f in schema if pyarrow.types.is_struct(f.type) and f.type.get_field_index("bytes") >= 0]
    integers = [f.name for f in schema if pyarrow.types.is_integer(f.type)]
    structs = [name for name in ("image", "img") if name in structs] or structs
    integers = [name for name in ("label", "labels", "fine_label") if name in integers] or integers
    if len(structs) != 1 or len(integers) != 1:
        columns = ", ".join(f"{f.name}: {f.type}" for f in schema)
        needs = "a column of structs with the field 'bytes', and one column of integers, or one called label"
        raise _wrong(source, f"{file.name} needs {needs}; found {columns}")
    return structs[0], integers[0]


def _class_names(schema: "pyarrow.Schema", label_column: str, labels_B: np.ndarray) -> tuple[str, ...]:
    """The names that the `huggingface` metadata gives, else the label numbers."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(map(str, features[label_column]["names"]))
    except (LookupError, TypeError, ValueError, RecursionError):  # ValueError: no JSON, or no text
        largest = int(labels_B.max(initial=-1))
        return tuple(map(str, range(largest + 1))) if largest < MOST_CLASSES else ()


def _decode(source: str, readers: Iterator[Reader], count: int, image_size: int | None = None) -> np.ndarray:
    """Decodes `count` images to uint8 (B, H, W, 3). A reader is an image's name and a function that reads its bytes."""

    alone = Lock()

    def decode(reader: Reader) -> np.ndarray:
        name, read = reader
        try:
            content = read()
            if content is None:  # the row of a Parquet file has the image's path alone, which is not followed
                raise ValueError("it has no bytes")
            with opened(content) as image, alone if image.width * image.height > LARGE else nullcontext():
                if image.mode not in MODES:
                    raise ValueError(f"its mode is {image.mode}; accepted: {', '.join(MODES)}")
                image = image.convert("RGB")
                return np.asarray(image if image_size is None else fitted(image, image_size, image_size))
        except Exception as error:  # each format's decoder has errors of its own
            known = f"its format is none of {', '.join(FORMATS)}"
            reason = known if isinstance(error, UnidentifiedImageError) else getattr(error, "problem", error)
            raise _wrong(source, f"{name} does not decode as an image: {reason}") from None

    pixels_BHWC, first = np.empty((0, 0, 0, 3), np.uint8), ""
    with ThreadPoolExecutor() as pool:
        for start in range(0, count, TOGETHER):
            some = list(itertools.islice(readers, TOGETHER))
            for place, (name, _), array in zip(itertools.count(start), some, pool.map(decode, some)):
                if not place:
                    if (needed := count * array.nbytes) > (memory_bytes() or needed):
                        raise _wrong(source, f"its {count:,} images are {needed:,} bytes: more than the memory has")
                    pixels_BHWC, first = np.empty((count, *array.shape), np.uint8), name
                if array.shape != pixels_BHWC.shape[1:]:
                    sizes = [f"{width}x{height}" for height, width, _ in (pixels_BHWC.shape[1:], array.shape)]
                    differ = f"images differ in size: {first} has {sizes[0]}, {name} {sizes[1]}"
                    raise _wrong(source, f"{differ}; {ONE_SIZE}")
                pixels_BHWC[place] = array
    return pixels_BHWC


def _all_resized(pixels_BHWC: np.ndarray, side: int | None) -> np.ndarray:
    if side is None or pixels_BHWC.shape[1:3] == (side, side):
        return pixels_BHWC
    grey = pixels_BHWC.shape[3] == 1
    images = (Image.fromarray(pixels_HWC[..., 0] if grey else pixels_HWC) for pixels_HWC in pixels_BHWC)
    arrays = (np.asarray(fitted(image, side, side)).reshape(side, side, -1) for image in images)
    return np.fromiter(arrays, (np.uint8, (side, side, pixels_BHWC.shape[3])), len(pixels_BHWC))
