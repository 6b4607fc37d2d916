"""The file resume.pt: the state of a training that goes on later, behind a checksum. Checking it imports no torch."""

import hashlib
import io
import pickle
from pathlib import Path

from expertgrid.model.system.errors import wrong_file
from expertgrid.model.system.files import MOST_OF_A_NETWORK, read_whole, write_whole

SAVE_EVERY_S = 10.0  # between two saves of a training's state
DIGEST = hashlib.sha256().digest_size


def write_state(file: Path, state: dict) -> None:
    """Writes a training's state: tensors, numbers, texts, and lists, tuples and dictionaries of these."""
    import torch

    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    write_whole(file, hashlib.sha256(content).digest() + content)


def read_state(file: Path) -> dict:
    """The state, on the CPU. No code in the file is run.

    Raises InputError for a file that is damaged or of an older version.
    """
    import torch

    try:
        return torch.load(io.BytesIO(whole_state(file)), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise wrong_file(file, f"not the state of a training ({type(error).__name__})") from None


def whole_state(file: Path) -> bytes:
    """The bytes that the checksum is of. Raises InputError where it does not fit."""
    content = read_whole(file, MOST_OF_A_NETWORK)
    if hashlib.sha256(content[DIGEST:]).digest() != content[:DIGEST]:
        raise wrong_file(file, "damaged, or of an older version: its checksum does not fit")
    return content[DIGEST:]
