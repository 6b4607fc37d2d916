"""Files that survive a crash: atomic writes, lines that are added whole, and the time as it is written in records."""

import errno
import os
import re
import tempfile
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
LEFT_BY_A_CRASH = re.compile(  # `.NAME.xxxxxxxx`, as `write_whole` calls a file until it is whole
    r"\.(.+\.(toml|json|jsonl|npz|safetensors|pt|svg|html|onnx|md|pdf|png)|SHA256SUMS)\.[a-z0-9_]{8}"
)


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file atomically: after an interruption the old file, or none, is there. Makes the folder if needed.

    It returns once the disk has the file and its name, so that both survive a power cut.
    """
    make_folder(path.parent)
    handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        try:
            _write(handle, content)
            os.fsync(handle)
        finally:
            os.close(handle)
        os.chmod(beside, 0o644)
        os.replace(beside, path)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def append_line(path: Path, line: str) -> None:
    """Adds a line to a file of lines, and returns once the disk has it.

    An incomplete last line, which a crash left, is cut away first. Where the line cannot be written, the file is as it
    was. Raises OSError.
    """
    is_new = not path.exists()
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        _lock(handle)
        end = _end_of_lines(handle)
        if end != os.fstat(handle).st_size:
            os.ftruncate(handle, end)
        try:
            _write(handle, line.encode() + b"\n")
            os.fsync(handle)
        except BaseException:
            with suppress(OSError):
                os.ftruncate(handle, end)
            raise
    finally:
        os.close(handle)
    if is_new:
        sync_folder(path.parent)


def whole_lines(path: Path) -> list[bytes]:
    """The lines of a file, without a last one that has no newline: its writer is at it, or crashed. None: no file."""
    try:
        return path.read_bytes().split(b"\n")[:-1]
    except (FileNotFoundError, NotADirectoryError):
        return []


def cut_incomplete_line(path: Path) -> int:
    """Cuts away a last line without newline. Returns how many bytes that were."""
    handle = os.open(path, os.O_RDWR)
    try:
        _lock(handle)
        end, size = _end_of_lines(handle), os.fstat(handle).st_size
        if end != size:
            os.ftruncate(handle, end)
            os.fsync(handle)
        return size - end
    finally:
        os.close(handle)


def make_folder(path: Path) -> None:
    """Makes a folder and its parents where they are missing, each so that it survives a power cut."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Returns once the disk has the names in a folder. File systems that know no such order are left alone."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:  # a folder that can be written to, but not listed
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(handle)


def sync_tree(path: Path) -> None:
    """Returns once the disk has a folder and all that is in it."""
    for place in (path, *path.rglob("*")):
        sync_folder(place)


def disk_full(error: BaseException) -> bool:
    """Whether an error says that a disk or a quota has no space left."""
    return isinstance(error, OSError) and error.errno in NO_SPACE


def now() -> str:
    """The time as it is written in records: UTC, ISO 8601, whole seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _write(handle: int, content: bytes) -> None:
    left = memoryview(content)
    while left:
        left = left[os.write(handle, left) :]


def _end_of_lines(handle: int) -> int:
    """Where the last newline of a file ends. Reads from the end of the file."""
    end = os.fstat(handle).st_size
    while end:
        start = max(0, end - 4096)
        newline = os.pread(handle, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


def _lock(handle: int) -> None:
    """Waits for other processes that add to the file. They are kept out until the file is closed.

    A file system without locks is taken as it is: a line is added by one call of the system.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return
    with suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_EX)
