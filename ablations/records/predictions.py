"""The file predictions.npz: what a trained network predicted for each image."""

import io
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from expertgrid.ablations.records.reading import damaged, train_again
from expertgrid.ablations.records.record import Split
from expertgrid.model.system.errors import InputError
from expertgrid.model.system.files import read_whole
from expertgrid.model.training.metrics import measured

LARGEST = 2**26  # bytes of all arrays; a few kilobytes can say that they are gigabytes
UNREADABLE_ARRAYS = (  # what NumPy and zipfile raise for damaged files of arrays
    ArithmeticError, AttributeError, BadZipFile, EOFError, LookupError, MemoryError, RuntimeError, SyntaxError,
    TypeError, ValueError, struct.error, zlib.error,
)  # fmt: skip


@dataclass(frozen=True)
class Predictions:
    """The class that a trained network predicted for each image, and the image's own: integers (B,), in split order.

    Tables and reports about single images read these, so that they need not read the test split again. Predictions
    from logits averaged with the mirror image are there where the recipe's tta is "flip", and log-probabilities in half
    precision (B, N), of plain logits, where the N classes are few; trials of older versions have none.
    """

    validation: np.ndarray
    validation_labels: np.ndarray
    test: np.ndarray
    test_labels: np.ndarray
    validation_flip: np.ndarray | None = None
    test_flip: np.ndarray | None = None
    validation_log: np.ndarray | None = None
    test_log: np.ndarray | None = None

    def to_bytes(self) -> bytes:
        """The file predictions.npz."""
        file = io.BytesIO()
        arrays = {name: array for name, array in vars(self).items() if array is not None}
        labels = [array for name, array in arrays.items() if not name.endswith("_log")]
        kind = np.uint8 if max(int(array.max()) for array in labels) < 256 else np.uint16
        kinds = {name: np.float16 if name.endswith("_log") else kind for name in arrays}
        np.savez_compressed(file, **{name: array.astype(kinds[name]) for name, array in arrays.items()})
        return file.getvalue()

    def measured(self, split: Split, classes: int, names: Sequence[str]) -> dict[str, float]:
        """`model.training.metrics.measured` of a split. Raises InputError for predictions of other classes."""
        labels_B, predicted_B, log_BN = (getattr(self, split + what) for what in ("_labels", "", "_log"))
        both = np.concatenate([labels_B, predicted_B])
        if (
            both.min(initial=0) < 0
            or both.max(initial=0) >= classes
            or (log_BN is not None and log_BN.shape[1] != classes)
        ):
            raise InputError(f"the predictions of {split} are not of {classes} classes")
        return measured(labels_B, predicted_B, log_BN, classes, names)

    @classmethod
    def of_file(cls, file: Path) -> "Predictions":
        """Raises InputError for a damaged file."""
        content = io.BytesIO(read_whole(file))  # so that no wrong offset in it becomes an error of the system
        try:
            with np.load(content, allow_pickle=False) as arrays:
                if sum(array.file_size for array in arrays.zip.infolist()) > LARGEST:
                    raise ValueError("more than a file of predictions has")
                kinds = {name: np.float16 if name.endswith("_log") else np.int64 for name in arrays.files}
                predictions = cls(**{name: arrays[name].astype(kind) for name, kind in kinds.items()})
        except UNREADABLE_ARRAYS:
            raise damaged(file, "not a file of predictions", train_again(file.parent)) from None
        for split in ("validation", "test"):
            arrays = [(name, array) for name, array in vars(predictions).items() if name.startswith(split)]
            shapes = {of.shape[: of.ndim - name.endswith("_log")] for name, of in arrays if of is not None}
            log_BN = arrays[-1][1]
            if len(shapes) > 1 or len(next(iter(shapes))) != 1:
                problem = f"the arrays of {split} have the shapes {sorted(shapes)}"
                raise damaged(file, problem, train_again(file.parent))
            if log_BN is not None and not (np.isfinite(log_BN) & (log_BN <= 0)).all():
                problem = f"log-probabilities of {split} are not finite, or above 0"
                raise damaged(file, problem, train_again(file.parent))
        return predictions
