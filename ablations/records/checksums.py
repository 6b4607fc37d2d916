"""The SHA256SUMS of a study and of each trial."""

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

from expertgrid.model.probe import NETWORK
from expertgrid.model.system.errors import InputError, wrong_file
from expertgrid.model.system.files import MOST_OF_A_NETWORK, MissingFile, opened_file, read_whole, write_whole

SUMS = "SHA256SUMS"
OF_A_TRIAL = ("config.json", "epochs.jsonl", "model.safetensors", "predictions.npz", "record.json")
OF_A_STUDY = ("study.toml", "plan.json")


def write_sums(folder: Path, contents: dict[str, bytes]) -> None:
    """Writes the SHA256SUMS of files by their names, in the format of `sha256sum`."""
    lines = [f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in sorted(contents.items())]
    write_whole(folder / SUMS, "".join(lines).encode())


def changed_files(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """The files of a folder that are not those of its SHA256SUMS: "missing", "changed since", or why it is unreadable.

    Nothing where there is no SHA256SUMS, as in folders of older versions. Raises InputError for a damaged one: each of
    `names` must be in it, and no other but NETWORK.
    """
    try:
        content = read_whole(folder / SUMS)
    except MissingFile:
        return {}
    sums = re.findall(r"^([0-9a-f]{64})  ([\w.]+)\n", content.decode(errors="replace"), re.MULTILINE)
    whole = "".join(f"{digest}  {name}\n" for digest, name in sums).encode() == content
    if not whole or sorted(name for _, name in sums if name != NETWORK) != sorted(names):
        raise wrong_file(folder / SUMS, f"not the checksums of {', '.join(names)}")
    changed = {}
    for digest, name in sums:
        try:
            with opened_file(folder / name) as file:
                too_large = os.fstat(file.fileno()).st_size > MOST_OF_A_NETWORK
                if too_large or hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    changed[name] = f"changed since {SUMS} was written"
        except MissingFile:
            changed[name] = "missing"
        except InputError as error:
            changed[name] = error.problem
    return changed
