"""The files of a study directory: whether they are whole, and which of them can go."""

import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from rich.filesize import decimal

from expertgrid.ablations.cli.sources import read_data
from expertgrid.ablations.records.check import FileState, check_files, repair
from expertgrid.ablations.records.clean import needless, remove
from expertgrid.ablations.records.directory import StudyDirectory
from expertgrid.model.probe import probe_of
from expertgrid.model.system.errors import InputError
from expertgrid.model.training.parts import changed_parts


def check(path: Path, repairs: bool, data: str | None, data_dir: Path | None) -> int:
    """Prints each file that is missing or damaged, and what to do; 1 where there is one. `data` are read."""
    directory = StudyDirectory(path)
    if repairs:
        with directory.held():
            for line in repair(directory, check_files(directory)):
                print(line)
    result = check_files(directory)
    places: dict[FileState, list[str]] = {}  # what several trials have is one line
    for state in result.states:
        alike = state if state.kind == "damaged" else replace(state, place="", trial="")
        places.setdefault(alike, []).append(state.place)
    for state, (first, *others) in places.items():
        more = f" and {len(others)} more" if others else ""
        print(replace(state, place=f"{first}{more}"))
    damaged = len(result.damaged)
    verdict = f"{damaged} damaged or missing" if damaged else "nothing is damaged"
    print(f"{path}: {result.finished} of {result.trials} trials finished, {verdict}")
    if data or data_dir:
        plan = directory.read_plan()
        images = read_data(data or plan.source, data_dir, plan.image_size)
        for trial in filter(None, map(directory.config, plan.trials)):
            trial.check_images(images)
        print(f"{images.source}: has the images of the study")
    return 1 if damaged else 0


def retire(path: Path) -> int:
    """Moves trials that are of other code than their network has now to DIR/retired, with what was measured of them."""
    directory = StudyDirectory(path)
    with directory.held():
        plan, networks = directory.read_plan(), {}
        for trial in filter(None, map(directory.config, plan.trials)):
            if directory.network(trial.id) and plan.pixels:
                if (network := probe_of(trial.model, plan.pixels)) is None:
                    raise InputError(f"model {trial.model_name!r}: unknown to timm; --import MODULE registers networks")
                networks[trial.id] = network
        retired = directory.of_other_code(networks)
        for record in filter(None, map(directory.record, plan.trials)):
            if changed := changed_parts(record.parts):
                retired.setdefault(record.trial, f"the sources of the {' and the '.join(changed)}")
        for trial_id, what in retired.items():
            place = directory.retire(trial_id)
            print(f"moved: trials/{trial_id} to retired/{place.name}; {what} differ")
    print(f"{path}: {len(retired)} of {len(plan.trials)} trials are of other code; the next run trains them again")
    return 0


def clean(path: Path | None, agreed: bool, unplanned: bool) -> int:
    """Prints what can go from a study, or without one from the cache, and removes it where the user agrees."""
    directory = StudyDirectory(path) if path else None
    removable = needless(directory, unplanned)
    for item in removable:
        place = item.path.relative_to(path) if path and item.path.is_relative_to(path) else item.path
        print(f"{decimal(item.size):>10}  {place}  ({item.why})")
    total = decimal(sum(item.size for item in removable))
    print(f"{path or 'cache'}: {len(removable)} to remove, {total}", flush=True)
    if not removable:
        return 0
    if not agreed and not sys.stdin.isatty():
        print("nothing was removed; --yes removes these")
        return 0
    if not agreed and input("Remove these? [y/N] ").strip().lower() not in ("y", "yes"):
        print("nothing was removed")
        return 0
    with directory.held() if directory else nullcontext():
        paths = {item.path for item in needless(directory, unplanned)}  # a run may have begun in the meantime
        remove([item for item in removable if item.path in paths])
    print("removed")
    return 0
