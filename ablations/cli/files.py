"""The files of a study directory: whether they are whole, and which of them can go."""

import sys
from dataclasses import replace
from pathlib import Path

from expertgrid.ablations.records.check import Found, check_files, repair
from expertgrid.ablations.records.clean import needless, remove
from expertgrid.ablations.records.directory import StudyDirectory
from expertgrid.ablations.study.disk import in_words


def check(path: Path, repairs: bool) -> int:
    """Prints each file of a study that is missing or damaged, and what to do; 1 where there is one."""
    directory = StudyDirectory(path)
    if repairs:
        with directory.held():
            for line in repair(directory, check_files(directory)):
                print(line)
    checked = check_files(directory)
    places: dict[Found, list[str]] = {}  # what several trials have is one line
    for found in checked.found:
        alike = found if found.kind == "damaged" else replace(found, place="", trial="")
        places.setdefault(alike, []).append(found.place)
    for found, (first, *others) in places.items():
        more = f" and {len(others)} more" if others else ""
        print(replace(found, place=f"{first}{more}"))
    damaged = len(checked.damaged)
    verdict = f"{damaged} damaged or missing" if damaged else "nothing is damaged"
    print(f"{path}: {checked.finished} of {checked.trials} trials finished, {verdict}")
    return 1 if damaged else 0


def clean(path: Path, agreed: bool, unplanned: bool) -> int:
    """Prints what can go, and removes it where the user agrees."""
    directory = StudyDirectory(path)
    found = needless(directory, unplanned)
    for item in found:
        print(f"{in_words(item.size):>10}  {item.path.relative_to(path)}  ({item.why})")
    print(f"{path}: {len(found)} to remove, {in_words(sum(item.size for item in found))}", flush=True)
    if not found:
        return 0
    if not agreed and not sys.stdin.isatty():
        print("nothing was removed; --yes removes these")
        return 0
    if not agreed and input("Remove these? [y/N] ").strip().lower() not in ("y", "yes"):
        print("nothing was removed")
        return 0
    with directory.held():
        still = {item.path for item in needless(directory, unplanned)}  # a run may have begun in the meantime
        remove([item for item in found if item.path in still])
    print("removed")
    return 0
