"""One file with what a machine without a network lacks, and one line that starts the measurement there.

    python -m bench.gpu pack runs/gpu.tar --data parquet:DIR       # here
    python3 -m bench.gpu.archive runs/gpu.tar --minutes 9          # there, in a checkout

The second unpacks the file beside itself (`runs/gpu-unpacked/`), installs the wheels there, and starts `bench.gpu` with
the data and what else it is given. The file has wheels of the versions that are installed here, built for PYTHON on
Linux, and the data as their source has them: the Parquet files of CIFAR-10 as JPEG are a tenth of its pixels. Beside
them is a list of checksums, against which everything is compared. Unpacking uses the standard library alone.
"""

import hashlib
import io
import json
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

from model.errors import InputError
from model.files import write_whole

PYTHON = "3.12"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
WHEELS = (  # in the versions that are installed here
    "annotated-types",
    "filelock",
    "grandalf",
    "nvidia-ml-py",
    "pydantic",
    "pydantic-core",
    "timm",
    "tomli-w",
    "typing-extensions",
    "typing-inspection",
)
MOST_BYTES = 60 * 2**20  # 64 MiB travel in all, and the checkout is among them
MANIFEST = "manifest.json"
INPUT_IS_WRONG = 2  # as in `bench.command`, which needs what is unpacked here


def pack(file: Path, data: str | None) -> str:
    """Writes the archive, and returns the line that starts it. Raises InputError.

    `data` is a source of `parquet:DIR` or `folder:DIR`; one that needs no file (`digits`) is only named.
    """
    members = dict(files_of_data(data))
    with tempfile.TemporaryDirectory() as place:
        for wheel in wheels(Path(place)):
            members[f"wheels/{wheel.name}"] = wheel
        size = sum(path.stat().st_size for path in members.values())
        if size > MOST_BYTES:
            raise InputError(
                f"{file}: wheels and data have {size / 2**20:,.1f} MiB, and at most {MOST_BYTES / 2**20:,.0f} MiB "
                "travel; data as JPEG are smaller"
            )
        source = data if data is None or ":" not in data else f"{data.partition(':')[0]}:{_folder_in_archive(data)}"
        about = {"data": source, "python": PYTHON, "files": {name: digest(path) for name, path in members.items()}}
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as tar:
            _add(tar, MANIFEST, json.dumps(about, indent=1).encode())
            for name, path in members.items():
                _add(tar, name, path.read_bytes())
    write_whole(file, packed.getvalue())
    return f"python3 -m bench.gpu.archive {file}" + (" --data SOURCE" if data is None else "")


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def wheels(place: Path) -> list[Path]:
    """Fetches the wheels into a folder. Raises InputError where one is not to be had."""
    try:
        asked = [f"{name}=={version(name)}" for name in WHEELS]
    except PackageNotFoundError as error:
        raise InputError(f"{error.name} is not installed here, and its version is what is packed") from None
    platforms = [word for name in PLATFORMS for word in ("--platform", name)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--python-version", PYTHON, "--implementation", "cp", *platforms]
    run = subprocess.run([*command, "--dest", str(place), *asked], capture_output=True, text=True)
    if run.returncode:
        lines = [line for line in run.stderr.splitlines() if line.startswith("ERROR")] or run.stderr.splitlines()
        raise InputError(f"the wheels for Python {PYTHON} cannot be had: {lines[-1] if lines else 'pip failed'}")
    return sorted(place.glob("*.whl"))


def files_of_data(data: str | None) -> Iterator[tuple[str, Path]]:
    """The files of a source by their names in the archive. Raises InputError for one that is not packed."""
    if data in (None, "digits"):
        return
    kind, _, rest = data.partition(":")
    patterns = {"parquet": ("train*.parquet", "test*.parquet"), "folder": ("train/*/*", "test/*/*")}.get(kind)
    if patterns is None or not rest:
        raise InputError(f"--data {data}: parquet:DIR, folder:DIR and digits can be packed")
    directory = Path(rest.partition("@")[0])
    for pattern in patterns:
        found = sorted(path for path in directory.glob(pattern) if path.is_file())
        if not found:
            raise InputError(f"--data {data}: there is no {pattern} in {directory}")
        yield from ((f"{_folder_in_archive(data, share=False)}/{path.relative_to(directory)}", path) for path in found)


def _folder_in_archive(data: str, share: bool = True) -> str:
    """Where a source's folder is in the archive; its name is kept, as tables show it."""
    directory, at, held_out = data.partition(":")[2].partition("@")
    return f"data/{Path(directory).resolve().name}" + (at + held_out if share else "")


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def place_of(file: Path) -> Path:
    """The folder that an archive is unpacked into."""
    return file.with_name(f"{file.stem}-unpacked")


def unpack(file: Path) -> dict[str, Any]:
    """Unpacks an archive, and returns its manifest. Raises InputError."""
    place = place_of(file)
    try:
        with tarfile.open(file) as tar:
            about = json.loads(_content(tar, MANIFEST).read())
            for name, wanted in about["files"].items():
                _unpack_member(tar, name, wanted, place / name)
    except OSError as error:
        raise InputError(f"{file}: cannot be unpacked: {error.strerror or error}") from None
    except (tarfile.TarError, ValueError, KeyError, TypeError, AttributeError, EOFError) as error:
        raise InputError(f"{file}: incomplete or damaged: {str(error) or type(error).__name__}; pack it anew") from None
    return about


def _content(tar: tarfile.TarFile, name: str) -> IO[bytes]:
    content = tar.extractfile(name)
    if content is None:
        raise ValueError(f"{name} is no file")
    return content


def _unpack_member(tar: tarfile.TarFile, name: str, wanted: str, target: Path) -> None:
    """Writes a member of the archive, unless the file is there. Raises ValueError where its checksum is another."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"{name!r} is outside of its folder")
    content = _content(tar, name).read()
    if hashlib.sha256(content).hexdigest() != wanted:
        raise ValueError(f"{name} has another checksum")
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists() or digest(target) != wanted:
        target.write_bytes(content)


def install(place: Path, names: Mapping[str, str]) -> Path:
    """Installs the unpacked wheels into a folder of their own; that folder. Raises InputError."""
    site, done = place / "site", place / "installed.json"
    if done.exists() and done.read_text() == json.dumps(names):
        return site
    found = [str(place / name) for name in names if name.startswith("wheels/")]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index"]
    command += ["--no-deps", "--no-compile", "--no-cache-dir", "--upgrade", "--target", str(site), *found]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        reason = (run.stderr.strip().splitlines() or ["pip failed"])[-1]
        raise InputError(f"{place / 'wheels'}: not installed: {reason}")
    done.write_text(json.dumps(names))
    return site


def main(arguments: Sequence[str] | None = None) -> int:
    """Unpacks the archive, and starts `bench.gpu` with its packages and data. Exit status 2 where it cannot."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        if not arguments:
            raise InputError("the archive's file is missing: python3 -m bench.gpu.archive runs/gpu.tar")
        file = Path(arguments[0])
        about = unpack(file)
        if (here := ".".join(platform.python_version_tuple()[:2])) != about["python"]:
            raise InputError(f"{file}: is for Python {about['python']}; here is {here}")
        site = install(place_of(file), about["files"])
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return INPUT_IS_WRONG
    source = about["data"]
    if source is not None and "--data" not in arguments:
        kind, colon, folder = source.partition(":")
        arguments += ["--data", f"{kind}:{place_of(file) / folder}" if colon else source]
    paths = [str(site), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    return _replaced_by([sys.executable, "-m", "bench.gpu", *arguments[1:]], environment)


def _replaced_by(command: list[str], environment: dict[str, str]) -> int:
    """Becomes the command, so that a signal reaches it."""
    os.execve(command[0], command, environment)


if __name__ == "__main__":
    sys.exit(main())
