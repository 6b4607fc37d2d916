"""What a study directory holds that nothing needs any more."""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from expertgrid.ablations.records.directory import ADOPTS, StudyDirectory
from expertgrid.model.system.errors import InputError
from expertgrid.model.system.files import LEFT_BY_A_CRASH
from expertgrid.model.training.decoded import DECODED

WEEK_S = 7 * 86_400  # no command that has a temporary file in the system's folder runs so long
AGE_S = 600  # of a temporary file that no process is writing any more: exports and reports are written without the lock


@dataclass(frozen=True)
class Needless:
    """A file or folder that can go."""

    path: Path
    size: int  # in bytes, of all its files
    why: str


def needless(directory: StudyDirectory | None, unplanned: bool = False) -> list[Needless]:
    """What no table, report, check, export or training reads; with `unplanned`, trials that are not planned as well.

    Without a directory: the user's decoded images. Raises InputError where the plan cannot be read, with `unplanned`.
    """
    paths = _paths(directory, unplanned) if directory else ((file, "decoded images") for file in DECODED.glob("*"))
    return [Needless(path, _size(path), why) for path, why in sorted(paths)]


def remove(items: list[Needless]) -> None:
    """Deletes these files and folders. The caller holds the directory. Raises OSError."""
    for item in items:
        if item.path.is_dir() and not item.path.is_symlink():
            shutil.rmtree(item.path)
        else:
            item.path.unlink(missing_ok=True)


def _paths(directory: StudyDirectory, unplanned: bool) -> Iterator[tuple[Path, str]]:
    path = directory.path
    planned = set(directory.read_plan().trials) if unplanned else set()
    gone = set()
    for place in path.glob("trials/*"):
        if unplanned and place.name not in planned:
            gone.add(place)
            yield place, "a trial that is not planned"
        elif (place / "resume.pt").is_file() and _is_finished(directory, place.name):
            yield place / "resume.pt", "the state of a training that is finished"
    for place in path.glob(f"{ADOPTS}*"):
        if place.is_dir():
            yield place, "left by a crash"
    for folder in (path, *path.glob("trials/*"), *(path / name for name in ("export", "bench", "figures", "weights"))):
        if folder.is_dir() and folder not in gone:
            yield from ((file, "left by a crash") for file in folder.iterdir() if _is_left(file))
    for place in Path(tempfile.gettempdir()).glob("expertgrid-*"):
        is_own = not hasattr(os, "getuid") or place.lstat().st_uid == os.getuid()
        if is_own and time.time() - place.lstat().st_mtime > WEEK_S:
            yield place, "left by a crash in the system's temporary folder"
    if (path / "damaged").is_dir():
        yield path / "damaged", "moved away by `expertgrid check --repair`"


def _is_finished(directory: StudyDirectory, trial: str) -> bool:
    try:
        return directory.record(trial) is not None
    except InputError:
        return False


def _is_left(file: Path) -> bool:
    return (
        LEFT_BY_A_CRASH.fullmatch(file.name) is not None
        and file.is_file()
        and time.time() - file.lstat().st_mtime > AGE_S
    )


def _size(path: Path) -> int:
    files = [path] if not path.is_dir() or path.is_symlink() else path.rglob("*")
    return sum(file.lstat().st_size for file in files if file.is_symlink() or file.is_file())
