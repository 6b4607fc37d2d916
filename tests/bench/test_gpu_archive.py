"""The archive for a machine without a network: packed from real wheels, unpacked, damaged in each way."""

import json
import re
import subprocess
import sys
import tarfile

import pytest
from conftest import REPOSITORY

from bench.gpu import __main__ as gpu
from bench.gpu import archive, runner
from model.errors import InputError

PYTHON_HERE = ".".join(map(str, sys.version_info[:2]))


def wheel(place, name="nothing", version="1.0"):
    """A wheel with one module, built by hand."""
    import zipfile

    place.mkdir(parents=True, exist_ok=True)
    file = place / f"{name}-{version}-py3-none-any.whl"
    about = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(file, "w") as made:
        made.writestr(f"{name}.py", "FOUND = True\n")
        made.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        made.writestr(
            f"{about}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        made.writestr(f"{about}/RECORD", f"{name}.py,,\n{about}/METADATA,,\n{about}/WHEEL,,\n{about}/RECORD,,\n")
    return file


@pytest.fixture
def packed(tmp_path, monkeypatch):
    """An archive with one wheel for this Python and a folder of images."""
    monkeypatch.setattr(archive, "wheels", lambda place: [wheel(place)])
    monkeypatch.setattr(archive, "PYTHON", PYTHON_HERE)
    source = runner.random_images(tmp_path / "images")
    file = tmp_path / "gpu.tar"
    line = archive.pack(file, source + "@0.2")
    assert line == f"python3 -m bench.gpu.archive {file}"
    return file


def changed(file, change):
    """Rewrites an archive: `change` gets the members' contents by name."""
    with tarfile.open(file) as tar:
        contents = {member.name: tar.extractfile(member).read() for member in tar}
    change(contents)
    with tarfile.open(file, "w") as tar:
        for name, content in contents.items():
            archive._add(tar, name, content)


def test_archive_is_unpacked_installed_and_started(packed, monkeypatch):
    seen = {}
    monkeypatch.setattr(archive, "_replaced_by", lambda command, environment: seen.update(c=command, e=environment))
    archive.main([str(packed), "--minutes", "9"])
    place = archive.place_of(packed)
    assert seen["c"][1:] == ["-m", "bench.gpu", "--minutes", "9", "--data", f"folder:{place / 'data' / 'images@0.2'}"]
    code = "import nothing; assert nothing.FOUND"
    subprocess.run([sys.executable, "-c", code], env=seen["e"], check=True)
    assert (place / "data" / "images" / "train" / "a" / "0.png").exists()
    (place / "wheels" / "nothing-1.0-py3-none-any.whl").write_bytes(b"damaged since")
    archive.main([str(packed), "--data", "digits"])
    assert seen["c"][3:] == ["--data", "digits"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda contents: contents.pop("manifest.json"), "filename 'manifest.json' not found"),
        (lambda contents: contents.pop("data/images/test/a/0.png"), "'data/images/test/a/0.png' not found"),
        (lambda contents: contents.update({"data/images/test/a/0.png": b"x"}), "0.png has another checksum"),
        (lambda contents: contents.update({"manifest.json": b"{}"}), "'files'"),
        (lambda contents: contents.update({"manifest.json": b"[1]"}), "list indices"),
        (
            lambda contents: contents.update({"manifest.json": json.dumps({"files": {"../x": "0"}}).encode()}),
            "'../x' is outside of its folder",
        ),
    ],
)
def test_damaged_archive_is_one_line(packed, change, said, capsys):
    changed(packed, change)
    assert archive.main([str(packed)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {packed}: incomplete or damaged: ") and said in err
    assert err.count("\n") == 1


def test_cut_off_archive_is_one_line(packed, capsys):
    whole = packed.read_bytes()
    for size in (0, 100, 700, len(whole) // 2):
        packed.write_bytes(whole[:size])
        assert archive.main([str(packed)]) == 2
        assert re.fullmatch(r"error: .*gpu.tar: incomplete or damaged: .*; pack it anew\n", capsys.readouterr().err)


def test_wrong_input_is_one_line(packed, tmp_path, monkeypatch, capsys):
    def complaint(call, *arguments):
        assert call(list(arguments)) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1
        return err

    assert "the archive's file is missing" in complaint(archive.main)
    assert "nothing.tar: cannot be unpacked: No such file" in complaint(archive.main, str(tmp_path / "nothing.tar"))
    changed(packed, lambda contents: contents.update({
        "manifest.json": contents["manifest.json"].replace(f'"{PYTHON_HERE}"'.encode(), b'"2.7"')
    }))  # fmt: skip
    assert "is for Python 2.7; here is" in complaint(archive.main, str(packed))
    file = str(tmp_path / "new.tar")
    assert "parquet:DIR, folder:DIR and digits can be packed" in complaint(gpu.main, "pack", file, "--data", "cifar10")
    assert "there is no train*.parquet in" in complaint(gpu.main, "pack", file, "--data", f"parquet:{tmp_path}")
    monkeypatch.setattr(archive, "MOST_BYTES", 1000)
    assert "at most 0 MiB travel" in complaint(gpu.main, "pack", file, "--data", f"folder:{tmp_path / 'images'}")
    assert not (tmp_path / "new.tar").exists()


def test_wheels_that_cannot_be_had(monkeypatch, tmp_path):
    monkeypatch.setattr(archive, "WHEELS", ("expertgrid-that-is-nowhere",))
    with pytest.raises(InputError, match="expertgrid-that-is-nowhere is not installed here"):
        archive.wheels(tmp_path)
    monkeypatch.setattr(archive, "WHEELS", ("timm",))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(InputError, match=r"the wheels for Python 3\.12 cannot be had: ERROR: No matching distribution"):
        archive.wheels(tmp_path)


def test_archive_and_what_it_imports_are_the_standard_library():
    code = "import sys; sys.modules['pydantic'] = sys.modules['numpy'] = None; import bench.gpu.archive"
    subprocess.run([sys.executable, "-S", "-c", code], cwd=REPOSITORY, check=True)
