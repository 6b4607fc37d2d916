"""Generates attacks on the command line: damaged studies, wrong values, hostile files, wrong words.

An attack is a folder that is made ready, and a command in it. Which ones they are follows from a seed.
"""

import copy
import io
import json
import os
import random
import shutil
import socket
import zipfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import pyarrow
import pyarrow.parquet
from onnx import TensorProto, helper
from PIL import Image

DEEP = "[" * 100_000
DIGITS = "9" * 5000


class Attack(NamedTuple):
    kind: str
    what: str
    command: list[str]  # of expertgrid


# --- Files that are something else ---


def npz(counts: dict[str, int]) -> bytes:
    """An npz file of zeros, so many of each array."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as arrays:
        for name, count in counts.items():
            with arrays.open(f"{name}.npy", "w", force_zip64=True) as array:
                np.lib.format.write_array_header_1_0(array, {"descr": "|u1", "fortran_order": False, "shape": (count,)})
                for _ in range(count // 2**20):
                    array.write(bytes(2**20))
    return file.getvalue()


PREDICTIONS = ("validation", "validation_labels", "test", "test_labels")
NPZ_BOMB = npz(dict.fromkeys(PREDICTIONS, 150 * 2**20))


def _socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the name of a socket is at most 107 characters long
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**40)


def _cut(path: Path, content: bytes) -> None:
    path.write_bytes(content[: len(content) // 2])


PLACED: dict[str, Callable[[Path, bytes], object]] = {  # what lies in a file's place
    "nothing": lambda path, _: None,
    "empty": lambda path, _: path.touch(),
    "pipe": lambda path, _: os.mkfifo(path),
    "socket": lambda path, _: _socket(path),
    "/dev/zero": lambda path, _: path.symlink_to("/dev/zero"),
    "/dev/full": lambda path, _: path.symlink_to("/dev/full"),
    "input error": lambda path, _: path.symlink_to("/proc/self/mem"),
    "folder": lambda path, _: path.mkdir(),
    "loop": lambda path, _: path.symlink_to(path.name),
    "dangling": lambda path, _: path.symlink_to("/nowhere/at/all"),
    "long link": lambda path, _: path.symlink_to("/" + "a" * 300),
    "sparse": lambda path, _: _sparse(path),
    "cut": _cut,
    "no text": lambda path, _: path.write_bytes(b"\xff\xfe\x80" * 50),
    "deep": lambda path, _: path.write_text(DEEP),
    "digits": lambda path, _: path.write_text(DIGITS),
    "one line": lambda path, _: path.write_text("[]\n{}\n"),
    "npz": lambda path, _: path.write_bytes(NPZ_BOMB),
}


def place(path: Path, name: str) -> None:
    """Puts something else in the place of a file or folder."""
    content = path.read_bytes() if path.is_file() else b""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    PLACED[name](path, content)


# --- Values that are something else ---

VALUES = (
    0, -1, -4, 1, 2, 10**6, 10**12, 2**63, 10**400, 1e308, -1e308, 0.0, -0.5, 1.5, True, None, "", "x", "../..",
    "$a$ $", "$\\frac{$", "\x1b[2J", "\ud800", "a" * 100_000, [], {}, [[]], [0], [None], {"a": 1}, "0" * 12, 101, 256,
    1e-320,
)  # fmt: skip


def change(content: object, chance: random.Random) -> object:
    """A JSON value with one or two places changed."""
    for _ in range(chance.choice([1, 1, 2])):
        places: list[tuple[dict | list, str | int]] = []

        def look(value: object, places: list = places) -> None:
            items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
            for key, inner in items:
                places.append((value, key))
                look(inner)

        look(content)
        if not places:
            return copy.deepcopy(chance.choice(VALUES))
        holder, key = chance.choice(places)
        way = chance.random()
        if way < 0.15:
            del holder[key]
        elif way < 0.25 and isinstance(holder[key], list):
            holder[key] = holder[key] * chance.choice([0, 2, 300])
        else:
            holder[key] = copy.deepcopy(chance.choice(VALUES))
    return content


def change_file(path: Path, chance: random.Random) -> None:
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    at = chance.randrange(len(lines))
    lines[at] = json.dumps(change(json.loads(lines[at]), chance))
    path.write_text("\n".join([*lines, ""]), errors="surrogatepass")


# --- ONNX files ---


def calls(name: str, times: int, domain: str = "f") -> list[onnx.NodeProto]:
    """So many calls of an operator in a row."""
    ends = ["x", *(f"v{i}" for i in range(times - 1)), "y"]
    return [helper.make_node(name, [a], [b], domain=domain) for a, b in zip(ends, ends[1:])]


def model_of(nodes: list, functions: list = (), shape: tuple = ("n", 4), kind: int = TensorProto.FLOAT, tensors=()):
    ends = [[helper.make_tensor_value_info(name, kind, shape)] for name in "xy"]
    graph = helper.make_graph(nodes, "g", *ends, list(tensors))
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("f", 1)]
    return helper.make_model(graph, ir_version=10, opset_imports=opsets, functions=functions)


def function(name: str, nodes: list) -> onnx.FunctionProto:
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("f", 1)]
    return helper.make_function("f", name, ["x"], ["y"], nodes, opsets)


def nested_functions(depth: int, times: int) -> bytes:
    functions = [function("f0", calls("Relu", times, ""))]
    functions += [function(f"f{i}", calls(f"f{i - 1}", times)) for i in range(1, depth)]
    return model_of(calls(f"f{depth - 1}", 1), functions).SerializeToString()


def recursive_functions(length: int) -> bytes:
    functions = [function(f"f{i}", calls(f"f{(i + 1) % length}", 1)) for i in range(length)]
    return model_of(calls("f0", 1), functions).SerializeToString()


SHAPES = ([1, 2**62], [2**33, 2**33], [-5, 4], [0, 0], [1, 8, 8, 10**7], [10**12, 4], [9] * 1000, [2**62] * 100_000)
KINDS = ("nested", "recursive", "type", "shape", "tensor", "bodies", "attribute", "names", "constant", "doubled")


def hostile_onnx(kind: str, chance: random.Random) -> bytes:
    """An ONNX file of one of KINDS."""
    if kind == "nested":
        return nested_functions(*chance.choice([(2, 3), (8, 10), (9, 40), (30, 2), (300, 1), (3, 2000), (60, 3)]))
    if kind == "recursive":
        return recursive_functions(chance.choice([1, 2, 5, 1000]))
    make, model = helper.make_node, model_of(calls("Relu", 1, ""))
    graph, number = model.graph, chance.choice([99, 999, -1, 2**31 - 1])
    if kind == "type":
        graph.input[0].type.tensor_type.elem_type = number
    elif kind == "shape":
        shape = chance.choice(SHAPES)
        for value in (*graph.input, *graph.output):
            value.CopyFrom(helper.make_tensor_value_info(value.name, TensorProto.FLOAT, shape))
    elif kind == "tensor":
        graph.initializer.append(TensorProto(name="w", data_type=chance.choice([0, 1, 8, number])))
        graph.initializer[0].dims.extend(chance.choice([[], [4], [-1], [10**9], *SHAPES]))
        graph.node[0].CopyFrom(make("Add", ["x", "w"], ["y"]))
    elif kind == "bodies":
        for _ in range(chance.choice([3, 20, 30])):
            node = make("If", ["x"], ["y"], then_branch=graph, else_branch=onnx.GraphProto())
            graph = helper.make_graph([node], "g", list(model.graph.input), list(model.graph.output))
        model.graph.CopyFrom(graph)
    elif kind == "attribute":
        name = chance.choice(["Conv", "Gemm", "MatMul", "Einsum", "QLinearConv", "Resize", "Constant", "If"])
        graph.node[0].CopyFrom(make(name, ["x", "x"][: chance.choice([0, 1, 2])], ["y"]))
        graph.node[0].attribute.add(name=chance.choice(["equation", "transA", "kernel_shape"]), i=number)
    elif kind == "names":
        key = chance.choice(["expertgrid.config", "classes", "mean"])
        helper.set_model_props(model, {key: chance.choice([DEEP, DIGITS, "\x1b[2J", ""])})
        model.opset_import[0].version = chance.choice([0, -1, 2**40, 20])
    else:
        if kind == "constant":
            graph.initializer.append(helper.make_tensor("s", TensorProto.INT64, [1], [chance.choice([2**28, 2**40])]))
            nodes = [make("ConstantOfShape", ["s"], ["f"])]
        else:
            graph.initializer.append(helper.make_tensor("c0", TensorProto.FLOAT, [1], [1]))
            nodes = [make("Concat", [f"c{i}", f"c{i}"], [f"c{i + 1}"], axis=0) for i in range(chance.choice([24, 40]))]
            nodes.append(make("Identity", [f"c{len(nodes)}"], ["f"]))
        graph.node[0].CopyFrom(nodes[0])
        graph.node.extend([*nodes[1:], make("ReduceSum", ["f"], ["r"]), make("Add", ["x", "r"], ["y"])])
    return model.SerializeToString()


# --- Images to train on ---

IMAGE = pyarrow.struct([("bytes", pyarrow.binary())])


def png(size: int = 8, bytes_: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("L", (size, size)).save(file, "PNG")
    return file.getvalue() + bytes(bytes_)


def parquet(rows: int, image: bytes | None, names: list[str], label: int | None = None) -> bytes:
    """Rows of one image, whose bytes are stored once, in groups of a million."""
    images = pyarrow.array([image] * 1000, pyarrow.binary())
    metadata = {"huggingface": json.dumps({"info": {"features": {"label": {"names": names}}}})}
    schema = pyarrow.schema([("image", IMAGE), ("label", pyarrow.int64())], metadata)
    file = io.BytesIO()
    with pyarrow.parquet.ParquetWriter(file, schema, compression="zstd") as writer:
        for start in range(0, rows, 1000):
            count = min(1000, rows - start)
            labels = np.arange(count) % 2 if label is None else np.full(count, label)
            column = pyarrow.StructArray.from_arrays([images[:count]], fields=list(IMAGE))
            writer.write_batch(
                pyarrow.record_batch([column, pyarrow.array(labels)], schema=schema), row_group_size=2**20
            )
    return file.getvalue()


PARQUETS = {
    "rows": lambda: parquet(3_000_000, png(1), ["a", "b"]),
    "no rows": lambda: parquet(0, None, ["a", "b"]),
    "no bytes": lambda: parquet(1000, None, ["a", "b"]),
    "large cells": lambda: parquet(4000, png(8, 10**6), ["a", "b"]),
    "large pixels": lambda: parquet(3000, png(1200), ["a", "b"]),
    "one name twice": lambda: parquet(300, png(), ["a", "a"]),
    "surrogate": lambda: parquet(300, png(), ["a", "\ud800"]),
    "label": lambda: parquet(300, png(), ["a", "b"], 10**15),
}


def image_folder(folder: Path, chance: random.Random) -> str:
    """A folder of images with one thing wrong."""
    classes = [b"cat", b"dog"]
    kind = chance.choice(
        [
            "class",
            "pipe",
            "/dev/zero",
            "sparse",
            "loop",
            "folder",
            "dangling",
            "socket",
            "input error",
            "empty",
            "no text",
        ]
    )
    if kind == "class":
        classes = [b"c\xff\xfe", b"dog"]
    for split in (b"train", b"test"):
        for name in classes:
            inner = Path(os.fsdecode(os.path.join(os.fsencode(folder), split, name)))
            inner.mkdir(parents=True)
            for number in range(12):
                (inner / f"{number}.png").write_bytes(png())
    if kind != "class":
        place(folder / chance.choice(["train", "test"]) / "cat" / "3.png", kind)
    return kind


# --- Words of the command line ---

WORDS = (
    "", " ", DIGITS, "-" + DIGITS, "0", "-1", "1e999", "nan", "inf", "a" * 250, "a" * 300, "a/" * 2500, "/", "/proc/x",
    "/dev/null", "/sys/x", "..", ".", "\udcff", "x\ny", "1,1,1", "[" * 3000, "a=" + "[" * 3000, "hf-hub:a/b",
    "folder:/", "parquet:/dev", "\x1b[2J", "🦊", "x.onnx", "/proc/a.onnx", "/dev/full", "/sys/a.json", "/proc/a.html",
    *("a" * length + suffix for length in (236, 240, 245, 250, 255) for suffix in (".onnx", ".html", ".json", ".png")),
)  # fmt: skip


FILE = "s/export/model-uint8.onnx"
BRIEF = ["--batch", "1", "--seconds", "0.01", "--engine", "own"]
COMMANDS = (
    ["check", "s"], ["check", "s", "--repair"], ["clean", "s", "--yes"], ["clean", "s", "--yes", "--trials"],
    ["table", "s"], ["table", "s", "--by", "experts"], ["table", "s", "--peek"], ["table", "s", "--format", "json"],
    ["table", "s", "--contrast", "experts=1", "experts=2"], ["report", "s"], ["report", "s", "--format", "png-figures"],
    ["verify", "s"], ["run", "s.toml", "--out", "s"], ["run", "s.toml", "--out", "s", "--dry-run"],
    ["run", "s.toml", "--out", "beside"], ["export", "s"], 
    ["bench", FILE, *BRIEF], ["bench-train", "s", "--steps", "1", "--rounds", "1"],
    ["rerun", "s", "ID"], ["publish", "s", "published"], ["predict", FILE, "image.png"], ["show-model", FILE],
    ["track", "s", "--to", "tensorboard"],
)  # fmt: skip
OPTIONS = {
    "run s.toml": "--data --data-dir --seeds --first-seed --set --out --device --max-seeds --import --jobs "
    "--trial-timeout --address --gpus-per-trial --cpus-per-trial --track --until",
    "table s": "--by --format --contrast", "report s": "--out --format --data-dir", "clean s": "--yes",
    "export s": "--out --input --precision --outputs --prune-gates --provider --batch --data --data-dir",
    f"bench {FILE} --seconds 0.01": "--batch --json --engine --seconds --fail-if-slower --baseline --bound-ms",
    "rerun s ID": "--data --data-dir --device", "publish s": "--data --data-dir",
    f"predict {FILE} image.png": "--top --provider",
    "list data": "--format --import", "show-augment fast --out x.png": "--out --data --set --seed --images",
    "bench-train two_block --steps 1 --rounds 1": "--batch --image-size --steps --rounds --device",
    "track s": "--to --data",
    "show-model": "", "check": "", "judge": "",
}  # fmt: skip


def wrong_words(chance: random.Random) -> list[str]:
    command = chance.choice(list(OPTIONS))
    words, names = command.split(), OPTIONS[command].split()
    if names and chance.random() < 0.8:
        name = chance.choice(names)
        words += [name, chance.choice(WORDS)]
        if name == "--contrast":
            words.append(chance.choice(WORDS))
    else:
        words.insert(chance.randrange(1, len(words) + 1), chance.choice(WORDS))
    return [word.replace("\0", "") for word in words]


# --- All of them ---


def attacks(study: Path, folder: Path, seed: int, kinds: str = "placed values onnx images words") -> Iterator[Attack]:
    """Attacks without end: for each `folder` is made anew from the folder of the finished `study`."""
    chance = random.Random(seed)
    trials = sorted(path.name for path in (study / "trials").iterdir())
    while True:
        if folder.exists():
            shutil.rmtree(folder)
        shutil.copytree(study.parent, folder, symlinks=True)
        kind, command, trial = chance.choice(kinds.split()), list(chance.choice(COMMANDS)), chance.choice(trials)
        files = sorted((folder / "s").rglob("*"))
        files = [path for path in files if path.parent.name not in trials or path.parent.name == trial]
        if kind == "placed":
            path, name = chance.choice(files), chance.choice(list(PLACED))
            place(path, name)
            what = f"{name} as {path.relative_to(folder)}"
        elif kind == "values":
            path = chance.choice([path for path in files if path.suffix in (".json", ".jsonl")])
            change_file(path, chance)
            what = f"values of {path.relative_to(folder)}"
        elif kind == "onnx":
            what = chance.choice(KINDS)
            (folder / FILE).write_bytes(hostile_onnx(what, chance))
            command = list(chance.choice([c for c in COMMANDS if FILE in c or c[0] in ("check", "verify")]))
        elif kind == "images":
            is_folder = chance.random() < 0.5
            what = image_folder(folder / "images", chance) if is_folder else parquets(folder / "images", chance)
            command = ["run", "s.toml", "--out", "other", "--data", f"{'folder' if is_folder else 'parquet'}:images"]
        else:
            what, command = "", wrong_words(chance)
        yield Attack(kind, what, [word.replace("ID", trial) for word in command])


def parquets(folder: Path, chance: random.Random) -> str:
    """A folder of Parquet files of which each is wrong in the same way."""
    name = chance.choice(list(PARQUETS))
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.parquet").write_bytes(_made(name))
    return name


@cache
def _made(name: str) -> bytes:
    return PARQUETS[name]()
