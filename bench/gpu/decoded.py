"""Data that are decoded once and kept on the disk: a process that begins anew decodes no JPEG."""

import hashlib
import io
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from ablations.training.data import ImageData, Images, load_data
from model.files import write_whole

SPLITS = ("train", "test")
ABOUT = ("name", "classes", "mean", "std", "fingerprint")  # of ImageData, that are no arrays


def load_decoded(source: str, folder: Path) -> ImageData:
    """`load_data`, from uint8 arrays in `folder` where those of the same files are there; else they are written there.

    Sources without files of images are read as they are. Raises InputError.
    """
    kind, _, directory = source.partition(":")
    if kind not in ("parquet", "folder"):
        return load_data(source)
    place = folder / content_key(Path(directory.partition("@")[0]).expanduser())
    with suppress(OSError, ValueError, KeyError, TypeError):  # what is missing or damaged is decoded again
        return _read(source, place)
    data = load_data(source)
    for split in SPLITS:
        images: Images = getattr(data, split)
        for what, array in (("pixels", images.pixels_BHWC), ("labels", images.labels_B)):
            content = io.BytesIO()
            np.save(content, array)
            write_whole(place / f"{split}-{what}.npy", content.getvalue())
    write_whole(place / "about.json", json.dumps({name: getattr(data, name) for name in ABOUT}).encode())
    return data


def _read(source: str, place: Path) -> ImageData:
    about = json.loads((place / "about.json").read_bytes())
    fields: dict[str, Any] = {
        name: tuple(about[name]) if isinstance(about[name], list) else about[name] for name in ABOUT
    }
    for split in SPLITS:
        pixels_BHWC, labels_B = (
            np.load(place / f"{split}-{what}.npy", allow_pickle=False) for what in ("pixels", "labels")
        )
        fields[split] = Images(pixels_BHWC, labels_B)
    return ImageData(source=source, **fields)


def content_key(directory: Path) -> str:
    """A name for what the files below a directory hold."""
    digest = hashlib.sha256()
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            digest.update(f"{path.relative_to(directory)}\0{path.stat().st_size}\0".encode())
            with path.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()[:16]
