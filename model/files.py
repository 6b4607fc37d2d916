"""Files that appear whole or not at all, and the time as records have it."""

import os
import tempfile
from datetime import UTC, datetime
from pathlib import Path


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file that is there whole or not at all, whatever interrupts it. Makes its folder where there is none."""
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
    """The time as records have it: UTC, ISO 8601, whole seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")
