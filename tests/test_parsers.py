"""Whatever a user gives is accepted, or is an error in one line: of each parser, many inputs.

200 inputs each in the usual run, and 10,000 in that of `-m nightly`; PARSER_CASES is another number for the latter. An
input may take two seconds of a processor, and a gigabyte. What was once a fault stays as an example.
"""

import io
import json
import os
import resource
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import safetensors.torch
import tomli_w
import torch
from conftest import TINY_STUDY, write_study
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from expertgrid.ablations.cli import options
from expertgrid.ablations.results.evidence import read_evidence
from expertgrid.ablations.study.cells import find_cell, groups
from expertgrid.ablations.study.changes import changed_recipe
from expertgrid.ablations.study.study import Base, Study
from expertgrid.ablations.study.study_file import load_study, parse_study
from expertgrid.bench.engines import engines
from expertgrid.bench.latency import random_images
from expertgrid.export.certificate import read_certificate
from expertgrid.export.describe import describe, read_onnx
from expertgrid.export.predict import predict, read_pixels
from expertgrid.export.to_onnx import to_onnx
from expertgrid.model.checkpoint import Checkpoint, Trained, load
from expertgrid.model.config import Block, Conv, ModelConfig
from expertgrid.model.presets import PRESETS
from expertgrid.model.registry import build
from expertgrid.model.system.errors import InputError
from expertgrid.model.training import optimise, policies  # noqa: F401  # imported now, so that no input's time has it
from expertgrid.model.training.data import SOURCES, ImageData, load_data
from expertgrid.model.training.recipe import RECIPES, Recipe
from expertgrid.model.variants import VARIANTS

NIGHTLY = pytest.param(int(os.environ.get("PARSER_CASES", "10000")), marks=pytest.mark.nightly, id="nightly")
LONGEST_S, LARGEST_KB = 2, 1_000_000


@pytest.fixture(params=[200, NIGHTLY])
def check(request) -> Callable:
    """Uses so many inputs, and the examples: each is accepted or refused in one line, in little time and memory."""
    options = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}

    def check_all(inputs: st.SearchStrategy, use: Callable[[Any], object], examples: tuple = ()) -> None:
        @settings(max_examples=request.param, derandomize=request.param == 200, **options)
        @given(inputs)
        def check_one(value: object) -> None:
            before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
            try:
                use(value)
            except InputError as error:
                assert str(error)
                assert str(error).isprintable(), repr(str(error))
            assert time.process_time() - started < LONGEST_S
            assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < LARGEST_KB

        for value in examples:
            check_one = example(value)(check_one)
        check_one()

    return check_all


# --- Inputs ---

TEXT = st.text(max_size=30)
NUMBERS = st.one_of(st.integers(), st.integers(-3, 70), st.floats(), st.sampled_from([0.5, 10**400, 2**63]))
VALUES = st.recursive(
    st.one_of(st.booleans(), NUMBERS, TEXT, st.sampled_from(["linear", "mlp", "adamw", "cosine", "base", ""])),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXT, inner, max_size=3)),
    max_leaves=6,
)


@st.composite
def changed(draw: st.DrawFn, wholes: st.SearchStrategy, upto: int | None = None):
    """A text or bytes in which some places have something else; at times the end is cut off.

    Only the first `upto` characters are changed, where it is given.
    """
    whole = draw(wholes)
    new = st.text(max_size=6) if isinstance(whole, str) else st.binary(max_size=6)
    place = st.integers(0, min(len(whole), upto or len(whole)))
    for at, old, text in draw(st.lists(st.tuples(place, st.integers(0, 6), new), min_size=1, max_size=3)):
        whole = whole[:at] + text + whole[at + old :]
    return whole[: draw(place)] if draw(st.integers(0, 9)) == 0 else whole


# --- Studies and settings ---

FACTORS = [*VARIANTS, *Recipe.model_fields, "model", "recipe", "reference", "recipe.lr", "model.head.dropout"]
PARTS = st.sampled_from(["model", "layers", "0", "1", "gate", "kernels", "head", "channels", "kind", "-1", ""])
NAMES = st.sampled_from([*FACTORS, *(f"recipe.{name}" for name in Recipe.model_fields)])
PATHS = st.one_of(NAMES, st.lists(PARTS).map(".".join), TEXT)
TABLES = st.dictionaries(PATHS, VALUES, max_size=3)
DATES = st.one_of(st.datetimes(), st.dates(), st.times())
FIELDS = {
    "base": st.fixed_dictionaries({}, optional={name: st.one_of(VALUES, DATES) for name in Base.model_fields}),
    "set": TABLES,
    "factors": st.dictionaries(PATHS, st.lists(st.one_of(VALUES, DATES), max_size=3), max_size=3),
    "contrasts": st.lists(st.tuples(TEXT, TEXT), max_size=2),
}
OPTIONAL = {
    name: st.one_of(FIELDS.get(name, VALUES), FIELDS.get(name, VALUES), VALUES, DATES)
    for name in (*Study.model_fields, "unknown")
    if name != "question"
}
TABLES_OF_STUDIES = st.fixed_dictionaries({"question": st.one_of(TEXT, VALUES)}, optional=OPTIONAL)
STUDIES = st.one_of(TEXT, changed(st.just(TINY_STUDY)), TABLES_OF_STUDIES.map(tomli_w.dumps))


def resolve(study: Study, data: ImageData) -> None:
    """The cells of a study, unless they are many."""
    if len(study.settings()) * study.seeds <= 20:
        study.cells(data)


def test_study_files(check, digits):
    once = (
        "seeds = " + "9" * 5000,
        "factors.experts = [0x" + "f" * 5000 + "]",
        "factors.lr = [[2020-01-01]]",
        "factors.lr = [[nan]]",
        "set.a = " + "[" * 500 + "]" * 500,
        "set.a = " + "{a=" * 90 + "1" + "}" * 90,
    )
    examples = tuple(f'question = "?"\n{text}' for text in once)
    check(STUDIES, lambda text: resolve(parse_study(text, Path("study.toml")), digits), examples)


def test_study_files_as_bytes(check, tmp_path):
    file = tmp_path / "study.toml"

    def use(content: bytes) -> None:
        file.write_bytes(content)
        load_study(str(file))

    check(st.one_of(st.binary(max_size=50), changed(st.just(TINY_STUDY.encode()))), use, (b"\xff", b"#" * 10**7))


def test_dotted_paths(check, digits):
    study = parse_study('question = "?"\nseeds = 1\n[factors]\nexperts = [2]', Path("study.toml"))

    def use(settings: dict) -> None:
        try:
            changed_recipe("fast", settings)
        except InputError:
            resolve(study.change(settings=settings), digits)

    check(TABLES, use)


def test_presets_and_recipes_with_a_change(check, digits):
    """A path and a value that often fit: deeper than the first check."""
    fields = st.sampled_from(sorted(Recipe.model_fields))

    def use(change: tuple[str, str, dict]) -> None:
        model, recipe, settings = change
        text = f'question = "?"\nseeds = 1\n[base]\nmodel = "{model}"\nrecipe = "{recipe}"'
        resolve(parse_study(text, Path("study.toml")).change(settings=settings), digits)

    changes = st.dictionaries(st.one_of(fields, st.sampled_from(sorted(VARIANTS))), VALUES, min_size=1, max_size=2)
    check(st.tuples(st.sampled_from(sorted(PRESETS)), st.sampled_from(sorted(RECIPES)), changes), use)


# --- The command line ---


def test_words_of_the_command_line(check):
    words = st.one_of(
        TEXT,
        st.text("0123456789,:@=.+- _", max_size=12),
        changed(st.sampled_from(["1,8,64", "recipe.epochs=1", "cuda:0", "logits,gates", "my.nets", "a=[1, 2]"])),
    )

    def use(word: str) -> None:
        for read in (
            lambda: options.settings([word]),
            lambda: options.batches(word),
            lambda: options.words("output", word, options.OUTPUTS),
            lambda: options.device_word(word),
            lambda: options.module_names([word]),
        ):
            try:
                read()
            except InputError as error:
                assert str(error).isprintable()

    check(words, use, ("9" * 5000, "a=" + "[" * 2000, "a=0x" + "f" * 5000, "cuda:٣"))


def test_names_of_studies_and_sources(check, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sources = [*SOURCES, "digits@0.2", "folder:.", "parquet:.", "folder:~nobody", "cifar10@.5"]
    of_files = st.builds("{}:{}".format, st.sampled_from(["folder", "parquet"]), TEXT)
    names = st.one_of(TEXT, changed(st.sampled_from(sources)), of_files)

    def use(name: str) -> None:
        if name.partition("@")[0] in ("cifar10", "cifar100"):
            return  # they would be downloaded
        try:
            load_study(name)
        except InputError as error:
            assert str(error).isprintable()
        load_data(name)

    once = ("a" * 300, "a/" * 3000, "folder:" + "a" * 300, "folder:~nobody", "folder:\0", "\0", "digits@1.")
    check(names, use, once)


def test_names_of_cells(check, digits):
    study = parse_study(TINY_STUDY, Path("study.toml"))
    networks = groups([cell.planned for cell in study.cells(digits)], study.combined_levels)
    names = st.sampled_from(["experts 2, gate mlp", "experts=2,gate=mlp", "experts=1", "two_block"])
    texts = st.one_of(TEXT, changed(names))
    check(texts, lambda text: find_cell(networks, text), ("experts=" * 3000, " " * 5000))


# --- ONNX files, checkpoints ---


def checkpoint() -> Checkpoint:
    torch.manual_seed(0)
    config = ModelConfig(in_chans=1, num_classes=2, layers=(Conv(channels=2), Block(channels=2, kernels=(3, 1))))
    about = {"trial": "abc", "model": "m", "data": "d", "fingerprint": "f", "classes": ("a", "b")}
    trained = Trained(**about, image_size=(6, 6), mean=(0.5,), std=(0.5,))
    return Checkpoint(config, trained, build(config).state_dict())


def test_onnx_files(check, tmp_path):
    Image.new("L", (6, 6)).save(tmp_path / "image.png")
    file = tmp_path / "model.onnx"

    def use(content: bytes) -> None:
        file.write_bytes(content)
        model = read_onnx(file)
        describe(model, "model.onnx")
        with suppress(InputError):
            read_certificate(model, file)
        try:
            predict(model, "model.onnx", [tmp_path / "image.png"])
        except InputError:
            runs, _ = engines(model, "model.onnx", "cpu")
            random_images(model, 1)

    wholes = [to_onnx(checkpoint(), kind) for kind in ("uint8", "float")]
    names = (b"torch", b"images", b"permute", b"Transpose")
    no_text = tuple(wholes[0].replace(name, b"\x80" + name[1:]) for name in names)
    check(st.one_of(st.binary(max_size=60), changed(st.sampled_from(wholes))), use, no_text)


def test_checkpoints(check, tmp_path):
    whole, file = checkpoint(), tmp_path / "model.safetensors"
    texts = {"config": whole.config.model_dump_json(), "trained": whole.trained.model_dump_json()}

    def use(content: bytes | tuple[str, str]) -> None:
        if isinstance(content, tuple):
            about = {"format": "expertgrid-2", **texts, content[0]: content[1]}
            content = safetensors.torch.save(whole.weights, about)
        file.write_bytes(content)
        load(file).network()

    described = st.one_of(
        st.tuples(st.just(name), st.one_of(TEXT, changed(st.just(text)), VALUES.map(json.dumps)))
        for name, text in texts.items()
    )
    names = ("hf-hub:a/b", "resnet18.none", "resnet18.a:b", "local-dir:a", "")
    timm = [("config", json.dumps({"timm": name})) for name in names]
    files = st.just(whole.to_bytes())
    inputs = st.one_of(st.binary(max_size=60), changed(files), changed(files, 3000), described)
    check(inputs, use, (*timm, ("config", "[" * 100_000)))


# --- Images and Parquet files ---

MODES = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "JPEG": ("L", "RGB", "CMYK"),
    "GIF": ("L", "P"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F", "LAB", "YCbCr"),
    "BMP": ("1", "L", "P", "RGB"),
    "PPM": ("1", "L", "RGB", "I;16"),
    "WEBP": ("RGB", "RGBA"),
}


def encoded(kind: str, mode: str, size: tuple[int, int] = (9, 7)) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, 1 if mode in ("1", "L", "P", "I", "I;16", "F") else None).save(file, kind)
    return file.getvalue()


PICTURES = [encoded(kind, mode) for kind, modes in MODES.items() for mode in modes]


def test_images(check, tmp_path):
    file = tmp_path / "image"

    def use(content: bytes) -> None:
        file.write_bytes(content)
        for channels in (1, 3):
            read_pixels(file, 8, 8, channels)

    pictures = st.sampled_from(PICTURES)
    check(st.one_of(st.binary(max_size=60), pictures, changed(pictures)), use, tuple(PICTURES))


def test_folders_of_images(check, tmp_path):
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "0.png").write_bytes(PICTURES[1])

    def use(image: tuple[bytes, int | None]) -> None:
        (tmp_path / "train" / "dog" / "0.png").write_bytes(image[0])
        load_data(f"folder:{tmp_path}", image_size=image[1])

    pictures = st.sampled_from(PICTURES)
    check(st.tuples(st.one_of(pictures, changed(pictures)), st.sampled_from([None, 3])), use)


def as_parquet(rows: list, labels: list, metadata: str, name: str, kind: str) -> bytes:
    if kind == "text":
        column = pyarrow.array([{"bytes": "no image"}] * len(rows), pyarrow.struct([("bytes", pyarrow.string())]))
    else:
        images = [None if row is None else {"bytes": row} for row in rows]
        column = pyarrow.array(images, pyarrow.struct([("bytes", pyarrow.binary())]))
    table = pyarrow.Table.from_arrays([column, pyarrow.array(labels)], [name, "label"])
    file = io.BytesIO()
    pyarrow.parquet.write_table(table.replace_schema_metadata({"huggingface": metadata}), file)
    return file.getvalue()


def test_parquet_files(check, tmp_path):
    names = json.dumps({"info": {"features": {"label": {"names": ["cat", "dog"]}}}})
    whole = as_parquet([PICTURES[1], PICTURES[1]], [0, 1], names, "image", "bytes")
    (tmp_path / "test.parquet").write_bytes(whole)

    def use(content: bytes | tuple) -> None:
        (tmp_path / "train.parquet").write_bytes(as_parquet(*content) if isinstance(content, tuple) else content)
        load_data(f"parquet:{tmp_path}", image_size=8)

    rows = st.one_of(st.none(), st.binary(max_size=9), st.sampled_from(PICTURES))
    labels = st.integers(0, 1), st.integers(-(2**63), 2**63 - 1), st.none(), st.text(max_size=3), st.floats()
    tables = st.integers(0, 3).flatmap(
        lambda count: st.tuples(
            st.lists(rows, min_size=count, max_size=count),
            st.one_of(st.lists(label, min_size=count, max_size=count) for label in labels),
            st.one_of(st.just(names), changed(st.just(names)), VALUES.map(json.dumps)),
            st.sampled_from(["image", "img", "x", "label"]),
            st.sampled_from(["bytes", "bytes", "text"]),
        )
    )
    no_names = ([PICTURES[1]], [2**62], "{}", "image", "bytes")
    check(st.one_of(changed(st.just(whole)), tables), use, (no_names,))


# --- Records ---


def test_records(check, tmp_path, digits):
    text = 'question = "?"\nseeds = 1\n[factors]\nexperts = [1, 2]'
    directory = write_study(tmp_path / "study", text, digits, lambda levels, seed: (90 + levels["experts"], 90))
    trial = directory.read_plan().cells[0].trials[0]
    directory.enter_test_read(trial, "training", 9)
    files = ["plan.json", "ledger.jsonl", "study.toml", f"trials/{trial}/record.json", f"trials/{trial}/config.json"]
    whole = {name: (directory.path / name).read_bytes() for name in files}

    def use(file: tuple[str, bytes]) -> None:
        name, content = file
        (directory.path / name).write_bytes(content)
        try:
            _ = directory.read_plan(), directory.test_reads(), directory.latencies(), directory.read_race()
            for trial in directory.read_plan().cells[0].trials:
                _ = directory.record(trial), directory.config(trial), directory.failure(trial)
                _ = directory.epochs(trial), directory.predictions(trial)
            of = read_evidence(directory)
            _ = of.effects, of.against_base, of.interactions, of.declared, of.spread, of.sight
        finally:
            (directory.path / name).write_bytes(whole[name])

    inputs = st.sampled_from(files).flatmap(
        lambda name: st.tuples(st.just(name), st.one_of(st.binary(max_size=40), changed(st.just(whole[name]))))
    )
    check(inputs, use)
