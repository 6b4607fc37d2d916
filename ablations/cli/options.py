"""Options as they are typed: what can be checked before anything is imported or read."""

import importlib.util
import re
import sys
import tempfile
import tomllib
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from importlib.machinery import PathFinder
from pathlib import Path

from expertgrid.model.system.errors import InputError, reason_of, unknown
from expertgrid.model.system.files import opened_file

HUB = "hf-hub:"
NOT_ISOLATED = "needs separate processes; it does not go with --no-isolate"
LARGEST_BATCH = 65_536
MOST_IMAGES = 64  # of a contact sheet
DEVICES = "auto, cpu, cuda, cuda:N, mps"
OUTPUTS = ("logits", "probabilities", "gates")
ORT_PROVIDERS = ("cpu", "cuda", "tensorrt")
PROVIDERS = (*ORT_PROVIDERS, "openvino")
TRACKERS = ("tensorboard", "mlflow", "wandb")
ENGINES = (
    "own", "onnxruntime", "eager", "eager-bf16", "compiled", "compiled-bf16", "openvino", "openvino-bf16",
)  # fmt: skip

Value = bool | int | float | str | list | dict  # of a setting, as TOML has it


def refuse(*rules: tuple[object, str]) -> None:
    """Raises InputError with the text of the first rule that applies."""
    for applies, text in rules:
        if applies:
            raise InputError(text)


def device_word(word: str) -> str:
    """Raises InputError for a word that names no device, whatever this machine has."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", word):
        raise unknown("device", word, DEVICES.split(", "))
    return word


def settings(texts: Sequence[str]) -> dict[str, Value]:
    """The settings `PATH=VALUE`. A value is TOML; what is not TOML is a text. Raises InputError without PATH=."""
    values: dict[str, Value] = {}
    for text in texts:
        path, equals, value = text.partition("=")
        if not equals or not path:
            raise InputError(f"--set {text!r}: PATH=VALUE is needed, as in recipe.epochs=1")
        if path in values:
            raise InputError(f"--set {text}: {path} is set twice")
        values[path] = value  # a plain word needs no quotes
        with suppress(ValueError, RecursionError):
            values[path] = tomllib.loads(f"value = {value}")["value"]
    return values


def words(what: str, text: str, accepted: Collection[str]) -> list[str]:
    """The words of a list that commas separate. Raises InputError for one that is not accepted."""
    names = text.split(",")
    for name in names:
        if name not in accepted:
            raise unknown(what, name, accepted)
    return names


def batches(text: str) -> list[int]:
    """The batch sizes of --batch, which commas separate. Raises InputError for anything else."""
    return [whole("--batch", size.strip(), LARGEST_BATCH) for size in text.split(",")]


def whole(option: str, text: str, most: int) -> int:
    """The whole number of an option. Raises InputError for anything else, and for 0 and more than `most`."""
    if not re.fullmatch(r"\d{1,9}", text, re.ASCII) or not 1 <= int(text) <= most:
        raise InputError(f"{option} {text}: a whole number from 1 to {most} is needed")
    return int(text)


def check_engine(engine: str, of_ray: Mapping[str, object], of_local: Mapping[str, object]) -> None:
    """Raises InputError for an option of the other engine that has a value other than None."""
    values, other = (of_ray, "ray") if engine == "local" else (of_local, "local")
    refuse(*((value is not None, f"{option}: is for --engine {other}") for option, value in values.items()))


def percent(option: str, text: str | None) -> float | None:
    """The number of an option like 5 or 5%, below 1000. Raises InputError for anything else."""
    if text is not None and not re.fullmatch(r"(\d{1,3}(\.\d*)?|\.\d+)%?", text, re.ASCII):
        raise InputError(f"{option} {text}: a percentage is needed, such as 5%")
    return float(text.removesuffix("%")) if text is not None else None


def module_names(texts: Sequence[str] | None) -> Sequence[str] | None:
    """Raises InputError for a module of --import that does not exist, or whose name is taken. Imports none of them."""
    folders: dict[str, Path] = {}
    for text in texts or ():
        name, folder = module_and_folder(text)
        package = name.partition(".")[0]
        if text.endswith(".py") and not Path(text).is_file():
            raise InputError(f"--import {text}: there is no such file")
        if not all(part.isidentifier() for part in name.split(".")):
            raise InputError(f"--import {text}: a module or its file is needed, as in my_net or nets/my_net.py")
        if package in (*sys.stdlib_module_names, "__main__"):
            raise InputError(f"--import {text}: {package} is a module of Python's own; give yours another name")
        beside = PathFinder.find_spec(package, [str(folder)])
        other = importlib.util.find_spec(package)
        if beside is None and other is None:
            raise InputError(f"--import {text}: there is no module {package} in {folder} or installed")
        taken_by = other.origin if other and beside and beside.origin not in (None, other.origin) else None
        if folders.setdefault(package, folder) != folder:
            taken_by = folders[package] / package
        if taken_by:
            raise InputError(f"--import {text}: the name {package} is taken by {taken_by}; give yours another name")
    return texts


def module_and_folder(text: str) -> tuple[str, Path]:
    """A module of --import: the name that it is imported by, and the folder that is searched for it first.

    `my_net` is looked for in the working directory, and `nets/my_net.py` is the module my_net in `nets`.
    """
    file = Path(text).absolute()
    return (file.stem, file.parent) if file.suffix == ".py" else (text, Path.cwd())


def file_named(option: str, suffix: str, parent_exists: bool = True) -> Callable[[Path | None], Path | None]:
    """The check of an option that names a file to write: its suffix and, if asked for, that its directory exists."""

    def check(file: Path | None) -> Path | None:
        if file is None:
            return None
        if file.suffix == suffix and not file.is_dir() and (file.absolute().parent.is_dir() or not parent_exists):
            return file
        article = "an" if suffix in (".svg", ".html", ".onnx") else "a"
        where = " in a directory that exists" if parent_exists else ""
        raise InputError(f"{option} {file}: the name of {article} {suffix} file{where} is needed")

    return check


def readable(files: Path | Sequence[Path] | None) -> Path | Sequence[Path] | None:
    """Raises InputError for a file that cannot be read."""
    for file in _paths(files):
        with opened_file(file):
            pass
    return files


def files_or_study(paths: Sequence[Path]) -> Sequence[Path]:
    """Raises InputError for a file that cannot be read, and for a directory that is no study or not alone."""
    for path in paths:
        if path.is_dir() and len(paths) > 1:
            raise InputError(f"{path}: a study directory is measured alone; {len(paths)} files were given")
        (study_directory if path.is_dir() else readable)(path)
    return paths


def study_directory(directories: Path | Sequence[Path]) -> Path | Sequence[Path]:
    """Raises InputError for a directory without a study."""
    for path in _paths(directories):
        if not (path / "study.toml").is_file():
            raise InputError(f"{path}: not a study directory: there is no study.toml in it")
    return directories


def study_remains(path: Path) -> Path:
    """Raises InputError for a directory that has nothing of a study."""
    if not any((path / name).exists() for name in ("study.toml", "plan.json", "trials")):
        raise InputError(f"{path}: not a study directory: there is no study.toml, plan.json or trials in it")
    return path


def study_or_checkpoint(source: Path) -> Path:
    """Raises InputError for a directory without a study, and for a file that does not exist."""
    if source.is_dir():
        study_directory(source)
    elif not source.exists():
        raise InputError(f"{source}: there is no such checkpoint")
    return source


def _paths(paths: Path | Sequence[Path] | None) -> Sequence[Path]:
    return [paths] if isinstance(paths, Path) else paths or ()


def hub_repository(target: str) -> str | None:
    """OWNER/NAME of a target `hf-hub:OWNER/NAME`, None for a folder. Raises InputError for another name."""
    if not target.startswith(HUB):
        return None
    name = target.removeprefix(HUB)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name, re.ASCII):
        raise InputError(f"TARGET {target}: hf-hub:OWNER/NAME is needed, or the name of a folder")
    return name


def trackers(texts: Sequence[str] | None) -> Sequence[str] | None:
    """Raises InputError for a tracker that does not exist, is not installed, takes no store or does not answer."""
    for text in texts or ():
        name, colon, uri = text.partition(":")
        if name not in TRACKERS:
            raise unknown("tracker", name, TRACKERS)
        if colon and (name != "mlflow" or not uri):
            raise InputError(f"tracker {text}: only mlflow takes a store, as in mlflow:http://localhost:5000")
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # a folder of that name without any code has no origin
            raise InputError(f"tracker {name}: is not installed; `uv sync --extra {name}` brings it")
        if uri.startswith(("http:", "https:")):
            from http.client import HTTPException
            from ssl import SSLError
            from urllib.error import HTTPError
            from urllib.request import urlopen

            try:
                urlopen(uri, timeout=4.0).close()  # MLflow itself would wait for minutes
            except (OSError, ValueError, HTTPException) as error:
                # A refusal is an answer, and MLflow has settings of its own for certificates.
                if not isinstance(error, HTTPError) and not isinstance(getattr(error, "reason", None), SSLError):
                    raise InputError(f"tracker mlflow: {uri}: {reason_of(error)}") from error
    return texts


def check_can_be_written(option: str, *files: Path) -> None:
    """Makes the directories. Raises InputError where one of the files cannot be written, before the long work."""
    for file in files:
        if file.is_dir():
            raise InputError(f"{option} {file}: cannot be written: there is a directory of this name")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=file.parent, prefix=f".{file.name}."):  # so long are our own names
                pass
        except OSError as error:
            raise InputError(f"{option} {file}: cannot be written: {error.strerror}") from None
