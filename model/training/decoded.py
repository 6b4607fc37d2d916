"""Decoded images in the user's cache: they are decoded once, and all processes map the same files, without changes."""

import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import PIL
from platformdirs import user_cache_path

from expertgrid.model.system.files import write_whole

CACHE = Path(os.environ.get("EXPERTGRID_CACHE") or user_cache_path("expertgrid", appauthor=False)).absolute()
DECODED = CACHE / "decoded"  # SOURCE-SHAPE-CONTENT, with the SHA-256 of what a file was made of and of its content
MOST_BYTES = 20 * 10**9  # of all files; the oldest are dropped
CODE = [(Path(__file__).parents[1] / file).read_bytes() for file in ("pixels.py", "training/data.py")]


def decoded(files: Sequence[Path], how: object, decode: Callable[[], np.ndarray]) -> np.ndarray:
    """The uint8 images (B, H, W, C) that `decode` makes of these files; `how` is what else they depend on.

    They are mapped from the cache, or in memory where it has no room for them, which is said on stderr.
    """
    digest = hashlib.sha256(repr((how, CODE, PIL.__version__)).encode())
    for path in map(os.path.abspath, files):
        with suppress(OSError):  # it is missing, as `decode` says
            state = os.stat(path)
            digest.update(os.fsencode(f"{path}\0{state.st_size} {state.st_mtime_ns} {state.st_ctime_ns}\0"))
    made_of = digest.hexdigest()[:32]
    for file in DECODED.glob(f"{made_of}-*"):
        with suppress(OSError, ValueError):
            _, shape, checksum = file.name.split("-")
            pixels_BHWC = np.memmap(file, mode="c", shape=tuple(map(int, shape.split("x"))))
            if checksum == hashlib.sha256(pixels_BHWC.data).hexdigest():
                return pixels_BHWC
        print(f"{file} is damaged; its images are decoded again", file=sys.stderr)
    pixels_BHWC = np.ascontiguousarray(decode())
    shape, size = "x".join(map(str, pixels_BHWC.shape)), pixels_BHWC.nbytes
    file = DECODED / f"{made_of}-{shape}-{hashlib.sha256(pixels_BHWC.data).hexdigest()}"
    try:
        DECODED.mkdir(parents=True, exist_ok=True)
        DECODED.chmod(0o700)  # which fails for the folder of another user
        if size > min(MOST_BYTES, shutil.disk_usage(DECODED).free // 2):
            raise OSError(f"there is no room for {size:,} bytes")
        for old in sorted(DECODED.iterdir(), key=os.path.getmtime, reverse=True):
            size += old.stat().st_size
            if size > MOST_BYTES:
                old.unlink()
        write_whole(file, pixels_BHWC.reshape(-1).data)
        return np.memmap(file, mode="c", shape=pixels_BHWC.shape)
    except OSError as error:
        print(f"decoded images are not kept in {DECODED}: {error}", file=sys.stderr)
        return pixels_BHWC


def _for_process(array: np.memmap) -> tuple:
    """What another process of this machine gets: a file to map where the array is all of it, else a copy."""
    file = Path(array.filename or "")
    if array.flags.c_contiguous and file.is_file() and file.stat().st_size == array.nbytes:
        return np.memmap, (file, array.dtype, "c", 0, array.shape)
    return np.array, (np.asarray(array),)


ForkingPickler.register(np.memmap, _for_process)
