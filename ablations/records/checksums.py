"""The SHA256SUMS of a study and of each trial."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from expertgrid.ablations.records.reading import SUMS, damaged
from expertgrid.model.system.errors import InputError
from expertgrid.model.system.files import write_whole

OF_A_TRIAL = ("config.json", "epochs.jsonl", "model.safetensors", "predictions.npz", "record.json")  # in its SHA256SUMS
OF_A_STUDY = ("study.toml", "plan.json")  # in the study's


def write_sums(place: Path, contents: dict[str, bytes]) -> None:
    """Writes the SHA256SUMS of files by their names, in the format of `sha256sum`."""
    lines = [f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in sorted(contents.items())]
    write_whole(place / SUMS, "".join(lines).encode())


def read_sums(place: Path, names: Sequence[str]) -> dict[str, str] | None:
    """The checksums in a folder's SHA256SUMS by the files' names; None where there is no such file.

    Raises InputError for a damaged file: each of `names` must be in it, and no other.
    """
    file = place / SUMS
    try:
        content = file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    found = re.findall(r"^([0-9a-f]{64})  ([\w.]+)\n", content.decode(errors="replace"), re.MULTILINE)
    whole = "".join(f"{digest}  {name}\n" for digest, name in found).encode() == content
    if not whole or sorted(name for _, name in found) != sorted(names):
        raise damaged(file, InputError(f"{file}: not the checksums of {', '.join(names)}"))
    return {name: digest for digest, name in found}


def changed_files(place: Path, names: Sequence[str]) -> dict[str, str]:
    """The files of a folder that are not those of its SHA256SUMS: "missing", or "changed".

    Nothing is found where there is no SHA256SUMS, as in folders of older versions. Raises InputError for a damaged one.
    """
    found = {}
    for name, digest in (read_sums(place, names) or {}).items():
        try:
            with (place / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    found[name] = "changed"
        except FileNotFoundError:
            found[name] = "missing"
    return found
