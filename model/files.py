"""Atomic writes, and the time as it is written in records."""

import os
import tempfile
from datetime import UTC, datetime
from pathlib import Path


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file atomically: after an interruption the old file, or none, is there. Makes the folder if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(beside, 0o644)
        os.replace(beside, path)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise


def now() -> str:
    """The time as it is written in records: UTC, ISO 8601, whole seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")
