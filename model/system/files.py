"""Files that survive a crash: atomic writes, lines that are added whole, and the time as it is written in records.

Only regular files are opened: a pipe would keep a command waiting, and a device may have no end.
"""

import errno
import os
import re
import stat
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from io import BufferedReader
from pathlib import Path

from expertgrid.model.system.errors import InputError, wrong_file

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
MOST_BYTES, MOST_OF_A_NETWORK = 2**28, 2**35  # of a file that is read as a whole
LONGEST_LINE = 2**20
LEFT_BY_A_CRASH = re.compile(  # `.NAME.xxxxxxxx`, as `write_whole` calls a file until it is whole
    r"\.(.+\.(toml|json|jsonl|npz|safetensors|pt|svg|html|onnx|md|pdf|png)|SHA256SUMS)\.[a-z0-9_]{8}"
)


class MissingFile(InputError):
    """There is no such file."""


@contextmanager
def opened_file(path: Path) -> Generator[BufferedReader]:
    """A regular file that is open for reading.

    Raises InputError where it cannot be read, which is MissingFile where there is none.
    """
    try:
        with os.fdopen(_handle(path, os.O_RDONLY), "rb") as file:
            yield file
    except OSError as error:
        kind = MissingFile if isinstance(error, FileNotFoundError | NotADirectoryError) else InputError
        problem = f"cannot be read: {error.strerror}"
        raise kind(f"{path}: {problem}", problem) from None


def read_whole(path: Path, most: int = MOST_BYTES) -> bytes:
    """The content of a regular file. Raises as `opened_file`, and InputError for more than `most` bytes."""
    with opened_file(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > most:
            raise wrong_file(path, f"cannot be read: it has {size:,} bytes; at most {most:,} are read")
        return file.read(size)


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Writes a file atomically: after an interruption the old file, or none, is there. Makes the folder if needed.

    It returns once the disk has the file and its name, so that both survive a power cut.
    """
    write_together({path: content})


def write_together(contents: Mapping[Path, bytes | memoryview]) -> None:
    """`write_whole` of several files: where one of them cannot be written, none is."""
    beside: dict[Path, Path] = {}
    try:
        for path, content in contents.items():
            make_folder(path.parent)
            new = path.with_name(f".{path.name}.{os.urandom(4).hex()}")
            handle = _handle(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            beside[path] = new
            try:
                _write(handle, content)
                os.fsync(handle)
            finally:
                os.close(handle)
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        for path, new in beside.items():
            os.replace(new, path)
    except BaseException:
        for new in beside.values():
            new.unlink(missing_ok=True)
        raise
    for folder in {path.parent for path in contents}:
        sync_folder(folder)


def append_line(path: Path, line: str) -> None:
    """Adds a line to a file of lines, and returns once the disk has it.

    An incomplete last line, which a crash left, is cut away first. Where the line cannot be written, the file is as it
    was. Raises OSError.
    """
    is_new = not path.exists()
    handle = _handle(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
    try:
        _lock(handle)
        end = _end_of_lines(handle, path)
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
        return read_whole(path).split(b"\n")[:-1]
    except MissingFile:
        return []


def cut_incomplete_line(path: Path) -> int:
    """Cuts away a last line without newline. Returns how many bytes that were."""
    handle = _handle(path, os.O_RDWR)
    try:
        _lock(handle)
        end, size = _end_of_lines(handle, path), os.fstat(handle).st_size
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


def _handle(path: Path, flags: int) -> int:
    """Opens a regular file. Raises OSError, also for a pipe, a device and a folder."""
    handle = os.open(path, flags | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0), 0o666)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return handle


def _write(handle: int, content: bytes | memoryview) -> None:
    left = memoryview(content)
    while left:
        left = left[os.write(handle, left) :]


def _end_of_lines(handle: int, path: Path) -> int:
    """Where the last newline of a file ends. Reads from the end of the file."""
    end = size = os.fstat(handle).st_size
    while end:
        start = max(0, end - 4096)
        newline = os.pread(handle, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        if size - start > LONGEST_LINE:
            raise OSError(errno.EFBIG, "not a file of lines", str(path))
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
