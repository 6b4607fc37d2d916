"""expertgrid as it is installed: from a wheel, from an sdist, and in a checkout without links."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest
from conftest import REPOSITORY

UV = shutil.which("uv", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
FOLDERS = ("model", "export", "bench", "ablations")
OUTSIDE = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "EXPERTGRID_ISOLATE")}
VERSION = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]


def run(*line: object, place: Path) -> str:
    """What a command prints that must succeed, in an environment without the checkout on Python's path."""
    done = subprocess.run([*map(str, line)], cwd=place, env=OUTSIDE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from the sdist, as `pip install` of an sdist does."""
    if UV is None:
        pytest.skip("uv is not installed")
    place = tmp_path_factory.mktemp("dist")
    run(UV, "build", "-q", "--offline", "--python", sys.executable, "-o", place, REPOSITORY, place=place)
    return next(place.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The commands of an environment that has the wheel, and all else from the environment of the tests."""
    place = tmp_path_factory.mktemp("environment")
    run(UV, "venv", "-q", "--python", sys.executable, place, place=place)
    run(UV, "pip", "install", "-q", "--offline", "--no-deps", "--python", place, wheel, place=place)
    packages = next(place.glob("lib/python*/site-packages"))
    (packages / "of_the_tests.pth").write_text(sysconfig.get_path("purelib"))
    return place / "bin"


@pytest.fixture
def place(tmp_path) -> Path:
    """A user's folder, with files that have names of our folders and of Python's modules."""
    for name in ("random", "types", "queue"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('the user's {name}.py')")
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "__init__.py").touch()
    (tmp_path / "model.py").write_text("class Net: ...")
    (tmp_path / "my_net.py").write_text("from model import Net")
    return tmp_path


def test_the_wheel_has_all_code_and_no_records(wheel, tmp_path):
    files = {info.filename: info.CRC for info in zipfile.ZipFile(wheel).infolist()}
    package = {name.removeprefix("expertgrid/") for name in files if name.startswith("expertgrid/")}
    code = {str(path.relative_to(REPOSITORY)) for folder in FOLDERS for path in (REPOSITORY / folder).rglob("*.py")}
    shown = {f"ablations/results/report/report.{suffix}" for suffix in ("html.j2", "js")}
    studies = {f"ablations/studies/{path.name}" for path in (REPOSITORY / "ablations" / "studies").glob("*.toml")}
    assert package >= code | shown | studies
    assert not [name for name in package if name.startswith("bench/results") or "/trials/" in name]
    assert {name.partition("/")[0] for name in files} == {"expertgrid", f"expertgrid-{VERSION}.dist-info"}
    run(UV, "build", "-q", "--offline", "--wheel", "--python", sys.executable, "-o", "x", REPOSITORY, place=tmp_path)
    (direct,) = (tmp_path / "x").glob("*.whl")
    assert {info.filename: info.CRC for info in zipfile.ZipFile(direct).infolist()} == files


def test_only_the_name_expertgrid_is_taken(installed, tmp_path):
    """Importing it imports nothing of ours, and no torch."""
    code = (
        "import importlib.util, json, sys, expertgrid\n"
        f"taken = [name for name in {FOLDERS} if importlib.util.find_spec(name)]\n"
        "imported = [name for name in sys.modules if name.startswith(('expertgrid.', 'torch'))]\n"
        "print(json.dumps([taken, imported, expertgrid.__version__, expertgrid.__file__]))"
    )
    *names, version, file = json.loads(run(installed / "python", "-c", code, place=tmp_path))
    assert (names, version) == ([[], []], VERSION)
    assert Path(file).is_relative_to(installed.parent)


def test_the_study_of_the_quickstart_is_trained_in_a_folder_with_names_of_ours(installed, place):
    """The user's module is imported in the command and where trials are trained, and imports the file beside it."""
    short = ["--set", "recipe.epochs=1", "--set", "width=0.125", "--seeds", 1, "--jobs", 1, "--device", "cpu"]
    printed = run(installed / "expertgrid", "run", "quickstart", *short, "--import", "my_net", place=place)
    assert "What each factor does" in printed


@pytest.mark.nightly
def test_the_whole_quickstart_runs_there_too(installed, place):
    assert "runs/quickstart/report.html" in run(installed / "expertgrid", "run", place=place)


def test_a_checkout_without_links_runs(tmp_path):
    """Git without symbolic links, and a ZIP, have files there that name the folders."""
    package = tmp_path / "src" / "expertgrid"
    package.mkdir(parents=True)
    for path in (REPOSITORY / "src" / "expertgrid").glob("*.py"):
        shutil.copy(path, package)
    for folder in FOLDERS:
        (tmp_path / folder).symlink_to(REPOSITORY / folder)
        (package / folder).write_text(f"../../{folder}")
    assert "quickstart" in run(sys.executable, "-m", "expertgrid", "list", "studies", place=tmp_path / "src")
