"""Files of unknown origin: nothing in them runs, leaves its folder, fills the memory, or becomes part of a page."""

import csv
import errno
import hashlib
import io
import json
import os
import pickle
import random
import re
import struct
import zlib
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import attacks
import numpy as np
import onnx
import pyarrow
import pyarrow.parquet
import pytest
from conftest import REPOSITORY, change_json, write_study
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from PIL import Image
from tabulate import tabulate

from expertgrid.ablations.cli import bench as bench_command
from expertgrid.ablations.records.directory import StudyDirectory
from expertgrid.ablations.results.evidence import read_evidence
from expertgrid.ablations.study.study_file import parse_study
from expertgrid.export.describe import describe, read_onnx
from expertgrid.export.predict import read_pixels
from expertgrid.model.pixels import LARGEST_IMAGE, fitted
from expertgrid.model.system.errors import InputError, printable
from expertgrid.model.system.text import Table, render, render_tables
from expertgrid.model.training import data
from expertgrid.model.training.data import load_data

# --- Nothing runs ---


class Harmful:
    """Unpickled carelessly, it makes a file."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


def as_cifar(place: Path, monkeypatch, **harmful: object) -> None:
    """A folder of CIFAR-10 of few images, whose checksums are those that torchvision expects."""
    from torchvision.datasets import CIFAR10

    (place / CIFAR10.base_folder).mkdir()

    def written(name: str, content: dict) -> str:
        file = place / CIFAR10.base_folder / name
        file.write_bytes(pickle.dumps(content | harmful))
        return hashlib.md5(file.read_bytes()).hexdigest()

    batch = {"data": np.arange(20 * 3072).astype(np.uint8).reshape(20, 3072), "labels": [*range(10)] * 2}
    for files in ("train_list", "test_list"):
        monkeypatch.setattr(CIFAR10, files, [[name, written(name, batch)] for name, _ in getattr(CIFAR10, files)])
    names = {"label_names": [f"class {i}" for i in range(10)]}
    meta = CIFAR10.meta | {"md5": written("batches.meta", names)}
    monkeypatch.setattr(CIFAR10, "meta", meta)


def test_cifar_is_read_as_torchvision_reads_it(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    as_cifar(tmp_path, monkeypatch)
    ours = load_data("cifar10", tmp_path)
    for images, is_train in ((ours.train, True), (ours.test, False)):
        theirs = CIFAR10(tmp_path, train=is_train)
        assert (images.pixels_BHWC == theirs.data).all()
        assert images.labels_B.tolist() == theirs.targets
        assert list(ours.classes) == theirs.classes


def test_a_pickle_of_cifar_that_calls_something_is_refused(tmp_path, monkeypatch):
    """Even where its checksum is right."""
    as_cifar(tmp_path, monkeypatch, more=Harmful(tmp_path / "harm"))
    with pytest.raises(InputError, match="cifar10: no complete copy"):
        load_data("cifar10", tmp_path)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    "names", [("os", "system"), ("builtins", "eval"), ("numpy", "load"), ("numpy.f2py", "compile")]
)
def test_no_other_name_is_unpickled(names, tmp_path):
    file = tmp_path / "batch"
    file.write_bytes(b"c" + "\n".join(names).encode() + b"\n.")
    with pytest.raises(pickle.UnpicklingError, match="files of CIFAR hold arrays alone"):
        data._unpickled(file, hashlib.md5(file.read_bytes()).hexdigest())
    with pytest.raises(pickle.UnpicklingError, match="another checksum"):
        data._unpickled(file, hashlib.md5(b"").hexdigest())


def test_no_other_loader_unpickles():
    """`torch.load` takes weights only, `numpy.load` no pickles, and nothing evaluates text."""
    careless = re.compile(
        r"\bpickle\.loads?\(|torch\.load\((?!.*weights_only=True)|np\.load\((?!.*allow_pickle=False)"
        r"|(?<![.\w])(?:eval|exec)\(|yaml|joblib|Image\.open\((?!file, formats=FORMATS)|onnx\.load\("
    )
    for package in ("model", "export", "ablations", "bench"):
        for path in (REPOSITORY / package).rglob("*.py"):
            for number, line in enumerate(path.read_text().splitlines(), 1):
                match = careless.search(line)
                assert match is None or path.name == "card.py", f"{path}:{number}: {line.strip()}"


def test_postscript_is_no_image(tmp_path):
    """Pillow hands it to Ghostscript, which runs it."""
    Image.new("RGB", (8, 8)).save(tmp_path / "page.eps")
    (tmp_path / "page.png").write_bytes((tmp_path / "page.eps").read_bytes())
    for file in (tmp_path / "page.eps", tmp_path / "page.png"):
        with pytest.raises(InputError, match="not an image, or of another format than BMP, GIF, JPEG"):
            read_pixels(file, 8, 8, 3)


# --- Nothing leaves its folder ---


def with_values_in(folder: Path, location: str, **place: str) -> Path:
    """An ONNX file that adds a vector to an image's pixels, and has the vector in another file."""
    floats, make = onnx.TensorProto.FLOAT, onnx.helper
    values = onnx.TensorProto(name="secret", data_type=floats, dims=[4], data_location=onnx.TensorProto.EXTERNAL)
    for key, value in {"location": location, **place}.items():
        values.external_data.add(key=key, value=value)
    ends = [[make.make_tensor_value_info(name, floats, ["batch", 4])] for name in "xy"]
    graph = make.make_graph([make.make_node("Add", ["x", "secret"], ["y"])], "add", *ends, [values])
    model = make.make_model(graph, ir_version=10, opset_imports=[make.make_opsetid("", 20)])
    file = folder / "model.onnx"
    file.write_bytes(model.SerializeToString())
    return file


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder beside which a file lies that is not for everybody."""
    (tmp_path / "models").mkdir()
    (tmp_path / "secret").write_bytes(np.full(4, 7, np.float32).tobytes())
    (tmp_path / "models" / "link").symlink_to(tmp_path / "secret")
    (tmp_path / "models" / "up").symlink_to(tmp_path)
    (tmp_path / "models" / "weights").write_bytes(np.arange(8, dtype=np.float32).tobytes())
    return tmp_path / "models"


@pytest.mark.parametrize(
    "way", ["../secret", "absolute", "link", "up/secret", "models/../../secret", "none", "", "weights\0"]
)
def test_an_onnx_file_takes_no_values_from_outside_its_folder(way, folder, expertgrid):
    location = str(folder.parent / "secret") if way == "absolute" else way
    file = with_values_in(folder, location)
    Image.new("RGB", (4, 4)).save(folder / "image.png")
    for arguments in (["bench", file, "--batch", 1], ["predict", file, folder / "image.png"], ["show-model", file]):
        outcome = expertgrid(*arguments)
        assert outcome.status == 2
        assert "model.onnx: the values of 'secret' are in" in outcome.complaint


def test_an_onnx_file_takes_values_from_its_folder(folder, expertgrid):
    import onnxruntime

    file = with_values_in(folder, "weights", offset="4", length="16")
    session = onnxruntime.InferenceSession(read_onnx(file), providers=["CPUExecutionProvider"])
    assert session.run(None, {"x": np.zeros((1, 4), np.float32)})[0].tolist() == [[1, 2, 3, 4]]
    assert expertgrid("show-model", file).status == 0
    assert "onnxruntime cpu" in expertgrid("bench", file, "--batch", 1).out
    for place in ({"offset": "30"}, {"offset": "-1"}, {"length": "99"}, {"offset": "x"}):
        with_values_in(folder, "weights", **({"length": "16"} | place))
        assert "at no place that the file has: it has 32 bytes" in expertgrid("show-model", file).complaint


def test_pytorch_runs_no_foreign_file(folder, expertgrid):
    """Alone that is wrong input; beside another engine it is said."""
    bench = ["bench", with_values_in(folder, "weights", length="16"), "--batch", 1, "--seconds", 0.01, "--engine"]
    assert "does not say which network it is; engine eager needs that" in expertgrid(*bench, "eager").complaint
    outcome = expertgrid(*bench, "own,compiled,eager")
    assert "not timed in compiled, eager: it does not say" in " ".join(outcome.err.split())


def test_a_table_is_shown_before_it_is_kept(folder, expertgrid, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "record.json")

    monkeypatch.setattr(bench_command, "write_whole", full)
    file = with_values_in(folder, "weights", length="16")
    outcome = expertgrid("bench", file, "--batch", 1, "--seconds", 0.01, "--json", folder / "record.json")
    assert (outcome.status, outcome.complaint[:17]) == (1, "error: disk full:")
    assert "onnxruntime cpu" in outcome.out


@pytest.mark.parametrize("name", ["..toml", "...toml"])
def test_a_study_is_not_named_as_a_folder_above(name, tmp_path, monkeypatch, expertgrid):
    """It would be written to `runs/..`."""
    monkeypatch.chdir(tmp_path)
    Path(name).write_text('question = "?"\n[factors]\nexperts = [1]')
    assert "cannot be the name of a study" in expertgrid("run", name, "--dry-run").complaint


def test_a_path_in_a_parquet_file_is_not_read(tmp_path):
    """The Hugging Face layout has one beside the bytes."""
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    rows = [{"bytes": None, "path": str(tmp_path / "secret.png")}] * 2
    for split in ("train", "test"):
        table = pyarrow.table({"image": pyarrow.array(rows, type=IMAGE), "label": [0, 1]})
        pyarrow.parquet.write_table(table, tmp_path / f"{split}.parquet")
    with pytest.raises(InputError, match="train row 0 does not decode as an image: it has no bytes"):
        load_data(f"parquet:{tmp_path}")


IMAGE = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])

# --- Nothing fills the memory ---


def png_bomb(width: int, height: int) -> bytes:
    """A PNG of a few kilobytes whose header says that it is so large."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(2_000_000), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def gif_bomb(width: int, height: int) -> bytes:
    file, frames = io.BytesIO(), [Image.new("P", (4, 4), colour) for colour in range(3)]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    return file.getvalue()[:6] + struct.pack("<HH", width, height) + file.getvalue()[10:]


def tiff_bomb(width: int, height: int) -> bytes:
    entries = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8)]
    entries += [(277, 3, 1, 1), (278, 4, 1, height), (279, 4, 1, 100)]
    file = b"II*\0" + struct.pack("<IH", 8, len(entries))
    return file + b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(104)


BOMBS = {
    "png": png_bomb(50_000, 50_000),
    "gif": gif_bomb(65_000, 65_000),
    "tiff": tiff_bomb(60_000, 60_000),
    "png that Pillow would read": png_bomb(10_000, LARGEST_IMAGE // 10_000 + 1),
}


@pytest.mark.parametrize("name", BOMBS)
def test_images_of_too_many_pixels_are_refused(name, tmp_path):
    bomb, message = BOMBS[name], "more than 50,000,000 pixels, which is the limit"
    assert len(bomb) < 4000
    (tmp_path / "bomb.png").write_bytes(bomb)
    with pytest.raises(InputError, match=f"bomb.png: .*{message}"):
        read_pixels(tmp_path / "bomb.png", 8, 8, 3)
    for split in ("train", "test"):
        (tmp_path / split / "cat").mkdir(parents=True)
        (tmp_path / split / "cat" / "bomb.png").write_bytes(bomb)
        table = pyarrow.table({"image": pyarrow.array([{"bytes": bomb}], type=IMAGE), "label": [0]})
        pyarrow.parquet.write_table(table, tmp_path / f"{split}.parquet")
    for kind in ("folder", "parquet"):
        with pytest.raises(InputError, match=f"does not decode as an image: .*{message}"):
            load_data(f"{kind}:{tmp_path}", image_size=8)


def test_a_long_image_is_resized_in_little_memory():
    """A line of pixels, of which a square at its own scale would have 50 billion."""
    line = Image.new("L", (LARGEST_IMAGE // 10, 1), 9)
    assert np.asarray(fitted(line, 1024, 1024)).shape == (1024, 1024)


def test_a_study_of_too_many_trials_is_refused():
    """A few lines can ask for more trials than a computer can count."""
    levels = ", ".join(str(i / 1000) for i in range(1, 100))
    factors = [f"{name} = [{levels}]" for name in ("lr", "hflip", "reprob", "mixup")]
    with pytest.raises(InputError, match=r"study.toml: asks for 480,298,005 trials; at most 10,000"):
        parse_study("\n".join(['question = "?"\n[factors]', *factors]), Path("study.toml"))


HOSTILE = {
    "nested": "its functions call each other too often, too deep, or themselves",
    "recursive": "its functions call each other too often, too deep, or themselves",
    "shape": "has too many numbers for one image",
    "constant": "'f' has too many numbers for one image: 268435456|: 1099511627776",
    "doubled": "has too many numbers for one image",
    "type": "of an unknown type",
    "tensor": "of an unknown type",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_an_onnx_file_is_counted_before_it_is_expanded(kind, tmp_path):
    """Some of each kind are harmless; the largest is not."""
    file, chance = tmp_path / "model.onnx", random.Random(1)
    file.write_bytes(max((attacks.hostile_onnx(kind, chance) for _ in range(9)), key=len))
    with pytest.raises(InputError, match=f"model.onnx: .*({HOSTILE[kind]})"):
        read_onnx(file)


@pytest.mark.parametrize(
    ("name", "message"),
    {
        "rows": "train has 3,000,000 rows; at most 2,000,000 images are read",
        "one name twice": "two classes have the name 'a'",
        "surrogate": r"'\\ud800' is not UTF-8",
        "label": "column 'label' needs labels 0 to 1",
    }.items(),
)
def test_a_parquet_file_is_counted_before_it_is_read(name, message, tmp_path):
    for split in ("train", "test"):
        (tmp_path / f"{split}.parquet").write_bytes(attacks.PARQUETS[name]())
    with pytest.raises(InputError, match=message):
        load_data(f"parquet:{tmp_path}")


def test_more_pixels_than_memory_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "memory_bytes", lambda: 300 * 8 * 8 * 3 - 1)
    (tmp_path / "train.parquet").write_bytes(attacks.parquet(300, attacks.png(), ["a", "b"]))
    with pytest.raises(InputError, match="its 300 images are 57,600 bytes: more than the memory has"):
        load_data(f"parquet:{tmp_path}")


def test_the_name_of_a_class_is_utf_8(tmp_path):
    for split in (b"train", b"test"):
        for name in (b"caf\xe9", b"dog"):
            folder = Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), split, name)))
            folder.mkdir(parents=True)
            (folder / "0.png").write_bytes(attacks.png())
    with pytest.raises(InputError, match="is not UTF-8, in which the names of classes"):
        load_data(f"folder:{tmp_path}")


def test_a_trial_is_taken_over_without_what_is_no_file(study, trial, tmp_path):
    for name, kind in {"failure.json": "/dev/zero", "notes": "loop", "more": "pipe"}.items():
        attacks.place(study.trial(trial) / name, kind)
    other = StudyDirectory(study.path.parent / "other")
    other.path.mkdir()
    assert other.adopt(trial, Counter()) == study.path.name
    assert other.record(trial) == study.record(trial)
    assert not other.failure(trial)


# --- Nothing becomes part of a page ---

TAG = "<script>alert(1)</script>'\"&amp;</td><img src=x onerror=alert(2)>"


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""

    def handle_data(self, data):
        self.text += data

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


def study_that_says(words: str, place: Path, digits) -> Path:
    """The folder of a study whose every text is these words."""
    said = json.dumps(words)
    text = f"""question = {said}\nseeds = 2\ncontrasts = [["experts=1", "experts=2"]]
    [factors]\nexperts = [1, 2]\n[reported]\n1 = {said}"""
    directory = write_study(place / "study", text, digits, lambda levels, seed: (90 + levels["experts"] + seed, 90))
    trials = directory.read_plan().trials
    with (directory.path / "ledger.jsonl").open("w") as ledger:
        for trial in trials:
            ledger.write(json.dumps({"time": words, "trial": trial, "reader": words, "images": 9}) + "\n")
    cells = [cell.model_dump() | {"model_name": words} for cell in directory.read_plan().cells]
    change_json(directory.path / "plan.json", data=words, source=words, cells=cells)
    environment = {"device": words, "threads": 1, "python": words, "versions": {words: words}, "cpu": words}
    for trial in trials:
        change_json(directory.trial(trial) / "record.json", finished=words, environment=environment)
    return directory.path


def test_a_report_shows_text_as_text(tmp_path, digits):
    """The same page as of plain words, tag by tag: none comes from a question, a claim, a name or a record."""
    from expertgrid.ablations.results.report import report
    from expertgrid.ablations.results.report.findings import read_findings

    pages = {}
    for words in ("plain", TAG):
        path = study_that_says(words, tmp_path / words[:1].replace("<", "harmful"), digits)
        pages[words] = Tags()
        pages[words].feed(report.html(read_findings(StudyDirectory(path))))
    plain, harmful = ([(tag, sorted(about)) for tag, about in page.tags] for page in pages.values())
    assert harmful == plain
    assert sum(tag == "script" for tag, _ in harmful) == 2
    assert TAG in pages[TAG].text


def test_a_terminal_shows_text_as_text(tmp_path):
    """A file cannot clear the screen, or write over what is on it."""
    clear = "\x1b[2J\x9b2J\r"
    file = with_values_in(tmp_path, "model.onnx", length="16")
    model = onnx.load_from_string(read_onnx(file))
    model.producer_name = clear
    onnx.helper.set_model_props(model, {clear: clear})
    shown = str(describe(model.SerializeToString(), "model.onnx"))
    table = render([{clear: clear}], "text")
    for text in (shown, table, str(InputError(clear))):
        assert not set("\x1b\x9b\r") & set(text)
        assert r"\x1b[2J\x9b2J" in text


SIGNS = "|\\`*_[]<>~#&$!=+-@%{}^.)\n\r\t\x1b\x9b\u202e\u2028'\",;:/1a "
NASTY = st.text(st.one_of(st.sampled_from(SIGNS), st.characters()))


def on_one_line(text: str) -> str:
    return " ".join(printable(text).split())


def plain_texts(markdown: str) -> list[str]:
    """The texts of headings, cells and items. Fails where one holds anything but text."""
    parsed = MarkdownIt("commonmark").enable("table").parse(markdown)
    texts = [part for part in parsed if part.type == "inline"]
    assert {child.type for part in texts for child in part.children} <= {"text", "text_special"}
    assert not {part.type for part in parsed} & {"ordered_list_open", "blockquote_open", "code_block", "hr"}
    assert sum(part.type == "bullet_list_open" for part in parsed) <= 1
    return ["".join(child.content for child in part.children) for part in texts]


@pytest.mark.parametrize("cases", [100, pytest.param(5000, marks=pytest.mark.nightly)])
def test_tables_carry_nothing(cases):
    """Titles, notes and cells are text to who reads Markdown, LaTeX, CSV or a terminal."""

    @settings(max_examples=cases, deadline=None)
    @given(NASTY, NASTY, NASTY, NASTY.filter(bool))  # an empty column is not shown
    def check(title, note, name, value):
        title, note, name = f"t{title}", f"{note}n", f"c{name}"
        tables = [Table("key", title, [{name: value, "number": -3.25}], [note])]
        expected = [title, name, "number", value, "-3.25", note]
        assert plain_texts(render_tables(tables, "github")) == list(map(on_one_line, expected))
        text = render_tables(tables, "text")
        assert text.replace("\n", "").isprintable()
        lines = render_tables(tables, "latex").split("\n")
        assert len(lines) == 13 and lines[-2] == f"% {on_one_line(note)}" and lines[3] == r"\label{tab:key}"
        assert [number for number, line in enumerate(lines) if line.startswith("%")] == [len(lines) - 2]
        cell = tabulate([[on_one_line(title)]], tablefmt="latex", disable_numparse=True).split("\n")[2]
        caption = cell.strip().removesuffix(r" \\").replace(r"-\ensuremath{>}", r"$\to$")
        assert lines[2] == rf"\caption{{{caption}}}"
        header, cells = csv.reader(io.StringIO(render_tables(tables, "csv")))
        assert not any(cell.lstrip()[:1] in set("=+@-") for cell in (header[1], cells[1]) if not is_number(cell))
        assert cells[1].removeprefix("'") == printable(value).removeprefix("'") and cells[2] == "-3.25"

    check()


def is_number(text: str) -> bool:
    try:
        return bool(float(text)) or True
    except ValueError:
        return False


def test_commands_print_text_as_text(expertgrid, tmp_path, digits):
    """On stdout and stderr, whatever a study says."""
    study = study_that_says("\x1b[2J\x9b2J", tmp_path / "study", digits)
    for arguments in (["table", study], ["table", study, "--format", "csv"], ["check", study], ["verify", study]):
        outcome = expertgrid(*arguments)
        assert not set("\x1b\x9b") & set(outcome.out + outcome.err)
    assert r"\x1b[2J" in expertgrid("table", study).out


def test_a_picture_shows_text_as_text(tmp_path, digits):
    """SVG: the parts of a picture are those of plain words, and `$` begins no formula."""
    from xml.etree import ElementTree

    from expertgrid.ablations.results.report.plots import accuracy_figure, save

    for number, words in enumerate(
        (TAG, "$\\frac{$", "]]> <!-- &lt;", "so long that it is wrapped " * 5 + "$\\frac{$")
    ):
        evidence = read_evidence(StudyDirectory(study_that_says(words, tmp_path / str(number), digits)))
        picture = ElementTree.fromstring(save(accuracy_figure(words, evidence.results.rows)))
        assert not {part.tag.rpartition("}")[2] for part in picture.iter()} & {"script", "img", "td"}
