"""The lock of a study directory: one process writes to it."""

import errno
import os
import platform
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

import filelock
from pydantic import BaseModel

from expertgrid.ablations.records.reading import read_record
from expertgrid.model.system.errors import InputError
from expertgrid.model.system.files import disk_full, make_folder, now, write_whole

LOCK = ".lock"
WRITER = ".lock.json"
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
WRITER_S = 1.0  # for which the next writer waits to learn who has the lock


class Writer(BaseModel):
    """The file .lock.json: the process that writes a study."""

    host: str
    process: int
    since: str  # UTC, ISO 8601

    @property
    def runs(self) -> bool:
        """Whether the process is there. One on another host is taken to be."""
        if self.host != platform.node():
            return True
        try:
            os.kill(self.process, 0)
        except ProcessLookupError:
            return False
        except (OSError, OverflowError):
            return True
        return True


@contextmanager
def held(path: Path) -> Generator[None]:
    """Keeps other writers out of the study directory `path`.

    Raises InputError where another process writes, and where no lock can be had. The lock is one of the operating
    system (flock): it ends with its process, however that ends. On NFS, Linux makes it a lock of the server, which
    holds for all machines. The file .lock.json says who has the lock. It is read only while the lock is taken, so that
    one which a killed process left means nothing.
    """
    try:
        make_folder(path)
        lock = filelock.FileLock(path / LOCK, fallback_to_soft=False)
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise InputError(f"--out {path}: {_writer_in_words(path)}") from None
    except OSError as error:
        if error.errno in NO_LOCKS:
            raise InputError(
                f"--out {path}: this file system keeps no locks, so that two processes could write to one "
                "study; give a directory on another file system"
            ) from None
        if disk_full(error):
            raise
        raise InputError(f"--out {path}: cannot be written: {error.strerror}") from None
    try:
        writer = Writer(host=platform.node(), process=os.getpid(), since=now())
        try:
            write_whole(path / WRITER, writer.model_dump_json().encode())
        except OSError as error:  # what makes room on a full disk needs the lock, and not its writer's name
            if not disk_full(error):
                raise InputError(f"--out {path}: cannot be written: {error.strerror}") from None
        yield
    finally:
        (path / WRITER).unlink(missing_ok=True)
        lock.release()


def _writer_in_words(path: Path) -> str:
    """Who has the lock, in words. Waits a moment for a process that has just taken it, and has not said so yet."""
    deadline, writer = time.monotonic() + WRITER_S, None
    while time.monotonic() < deadline:
        with suppress(InputError):
            writer = read_record(Writer, path / WRITER)
        if writer and writer.runs:
            break
        time.sleep(0.02)
    if writer is None:
        return "another process is writing this study"
    return f"process {writer.process} on host {writer.host} is writing this study since {writer.since}"
