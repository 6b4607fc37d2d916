"""The file predictions.npz: what a trained network predicted for each image."""

import io
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from expertgrid.ablations.records.reading import damaged, train_again
from expertgrid.model.system.files import read_whole

LARGEST = 2**26  # bytes of all arrays; a few kilobytes can say that they are gigabytes
UNREADABLE_ARRAYS = (  # what NumPy and zipfile raise for damaged files of arrays
    ArithmeticError, AttributeError, BadZipFile, EOFError, LookupError, MemoryError, RuntimeError, SyntaxError,
    TypeError, ValueError, struct.error, zlib.error,
)  # fmt: skip


@dataclass(frozen=True)
class Predictions:
    """The class that a trained network predicted for each image, and the image's own: integers (B,), in split order.

    Tables and reports about single images read these, so that they need not read the test split again. Predictions
    from logits averaged with the mirror image are there where the recipe's tta is "flip".
    """

    validation: np.ndarray
    validation_labels: np.ndarray
    test: np.ndarray
    test_labels: np.ndarray
    validation_flip: np.ndarray | None = None
    test_flip: np.ndarray | None = None

    def to_bytes(self) -> bytes:
        """The file predictions.npz."""
        file = io.BytesIO()
        arrays = {name: array for name, array in vars(self).items() if array is not None}
        kind = np.uint8 if max(int(array.max()) for array in arrays.values()) < 256 else np.uint16
        np.savez_compressed(file, **{name: array.astype(kind) for name, array in arrays.items()})
        return file.getvalue()

    @classmethod
    def of_file(cls, file: Path) -> "Predictions":
        """Raises InputError for a damaged file."""
        content = io.BytesIO(read_whole(file))  # so that no wrong offset in it becomes an error of the system
        try:
            with np.load(content, allow_pickle=False) as arrays:
                if sum(array.file_size for array in arrays.zip.infolist()) > LARGEST:
                    raise ValueError("more than a file of predictions has")
                predictions = cls(**{name: arrays[name].astype(np.int64) for name in arrays.files})
        except UNREADABLE_ARRAYS:
            raise damaged(file, "not a file of predictions", train_again(file.parent)) from None
        for split in ("validation", "test"):
            arrays = (array for name, array in vars(predictions).items() if name.startswith(split))
            shapes = {array.shape for array in arrays if array is not None}
            if len(shapes) > 1 or len(next(iter(shapes))) != 1:
                problem = f"the arrays of {split} have the shapes {sorted(shapes)}"
                raise damaged(file, problem, train_again(file.parent))
        return predictions
