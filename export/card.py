"""The model card that stands beside an exported file: a Markdown text that says what the network is and is not.

What the network was trained on, and how, is what the caller and the file say.
"""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from types import MappingProxyType

from expertgrid.export.certificate import Certificate
from expertgrid.export.describe import Description
from expertgrid.export.metadata import Metadata, read_metadata
from expertgrid.model.system.errors import InputError
from expertgrid.model.system.text import Interval, Measured, markdown, render

LISTED_CLASSES = 100


def card(
    file: Description,
    certificate: Certificate,
    *,
    trained: Sequence[str],
    results: Mapping[str, object],
    latency: Sequence[Mapping[str, object]] = (),
    more: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """The card of an ONNX file that `to_onnx` made, in Markdown.

    `file` is what `describe` returns. Its metadata say what the network is, and on which data it was trained.
    `trained` says how, a line each. `results` is the network's row in its study's table: values of `model.system.text`
    by their titles. `latency` is the rows of `expertgrid bench`, empty where nothing was measured. `more` is further
    sections by their titles, in Markdown, which come first.
    Raises InputError for a file without expertgrid's metadata.
    """
    metadata = read_metadata(file.metadata, file.name)
    network = metadata.trained
    classes, (height, width) = network.classes, network.image_size
    name, data_name = PurePath(file.name).name, network.data
    sections = [
        f"# {markdown(network.model)} on {markdown(data_name)}",
        f"A network that tells {len(classes):,} classes of {height}x{width} images apart, as the ONNX file "
        f"{markdown(name)}. Its weights are those of the trial {markdown(network.trial)}.",
        *(part for title, text in more.items() for part in (f"## {title}", text)),
        "## The network",
        _facts({"Preset or timm model": network.model} | metadata.config.model_dump(mode="json")),
        "## What was trained",
        "\n".join(f"- {markdown(line)}" for line in trained) or "Not stated.",
        "## Results",
        _results(results),
        "## Latency",
        _latency(latency, name),
        "## The file",
        _file(file, metadata),
        f"Classes, in the order of the logits: {_listed(classes)}.",
        "## Agreement with PyTorch",
        _agreement(certificate),
        "## How to use it",
        _usage(file, metadata),
        "## Limits",
        _limits(height, width, len(classes), data_name),
    ]
    return "\n\n".join(sections) + "\n"


def _shown(value: object) -> str:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return f"{value:,}" if number else markdown(value if isinstance(value, str) else json.dumps(value, default=str))


def _facts(facts: Mapping[str, object]) -> str:
    return "\n".join(f"- {markdown(title)}: {_shown(value)}" for title, value in facts.items())


def _results(results: Mapping[str, object]) -> str:
    if not results:
        return "Not stated."
    values, notes = results.values(), []
    if any(isinstance(value, Interval) and value.low is not None for value in values):
        notes.append("In brackets: 95% interval of the mean over seeds (Student's t). The file is one seed's network.")
    if any(isinstance(value, Measured) for value in values):
        notes.append("±: half of the 95% interval of the median.")
    return render([dict(results)], "github", notes)


def _latency(latency: Sequence[Mapping[str, object]], name: str) -> str:
    if latency:
        return render(list(map(dict, latency)), "github")
    return "Not measured. This measures it:\n\n" + _fenced(f"expertgrid bench {shlex.quote(name)}", "sh")


def _fenced(code: str, language: str) -> str:
    """A block of code, in a fence that is longer than any in it."""
    longest = max(map(len, re.findall("`+", code)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{code}\n{fence}"


def _file(file: Description, metadata: Metadata) -> str:
    meanings = {
        "uint8": "raw pixels from 0 to 255, in the order batch, height, width, channels; the file normalises them",
        "float": "pixels from 0 to 1, less the mean and divided by the standard deviation of each channel (both in the "
        "metadata), in the order batch, channels, height, width",
    }
    facts = {
        "Input": ", ".join(map(str, file.inputs)),
        "Input holds": meanings[metadata.input],
        "Output": ", ".join(map(str, file.outputs)),
        "Output holds": "logits, one for each class, before any softmax",
        "Size": f"{file.file_bytes:,} bytes, {file.parameters:,} numbers in its tensors",
        "Multiply-accumulates for one image": file.macs_unknown if file.macs is None else file.macs,
        "Opset": file.opsets_in_words,
        "Operators": file.operators_in_words,
    }
    return _facts(facts)


def _listed(classes: Sequence[str]) -> str:
    shown = ", ".join(map(markdown, classes[:LISTED_CLASSES]))
    left = len(classes) - LISTED_CLASSES
    return f"{shown} and {left:,} more, which are in the metadata" if left > 0 else shown


def _agreement(certificate: Certificate) -> str:
    verdict = "The file passed its comparison" if certificate.passed else "**The file did not pass its comparison**"
    facts = {
        "Comparison": str(certificate),
        "SHA-256 of the file that was compared": certificate.sha256,
        "Versions": ", ".join(f"{library} {version}" for library, version in certificate.versions.items()),
    }
    return f"{verdict} with the network that was trained, on the test split.\n\n{_facts(facts)}"


def _usage(file: Description, metadata: Metadata) -> str:
    """A block of Python code that classifies `image.png` with the file, both in the working directory."""
    height, width = metadata.trained.image_size
    images, logits = file.inputs[0], file.outputs[0]
    is_uint8 = metadata.input == "uint8"
    channels = "?" if images.shape is None else images.shape[3 if is_uint8 else 1]
    mode = {1: "L", 3: "RGB"}.get(channels)
    if mode is None:
        raise InputError(
            f"{file.name}: takes images of {channels} channels; image files are read as grey (1) or RGB (3)"
        )
    lines = [
        "import json",
        "",
        "import numpy as np",
        "import onnxruntime",
        "from PIL import Image",
        "",
        f"session = onnxruntime.InferenceSession({PurePath(file.name).name!r}, providers=['CPUExecutionProvider'])",
        "about = session.get_modelmeta().custom_metadata_map",
        "classes = json.loads(about['classes'])",
        "",
        f"image = Image.open('image.png').convert({mode!r})",
        *_resizing(height, width),
        f"images = np.asarray(image).reshape(1, {height}, {width}, {channels})  # batch, height, width, channels",
    ]
    if not is_uint8:
        lines += [
            "mean, std = (np.float32(json.loads(about[key])) for key in ('mean', 'std'))",
            "images = (images.astype(np.float32) / 255 - mean) / std",
            "images = images.transpose(0, 3, 1, 2)  # batch, channels, height, width",
        ]
    lines += [
        f"(logits,) = session.run([{logits.name!r}], {{{images.name!r}: images}})",
        "print(classes[logits[0].argmax()])",
    ]
    return _fenced("\n".join(lines), "python")


def _resizing(height: int, width: int) -> list[str]:
    """Code that does to `image` what `model.pixels.fitted` does: its shorter side is resized, its centre is cropped."""
    if height == width:
        resized = f"[side * {width} // min(image.size) for side in image.size]"
    else:
        resized = f"[round(side / min(image.width / {width}, image.height / {height})) for side in image.size]"
    return [
        f"image = image.resize({resized}, Image.Resampling.BICUBIC)",
        f"left, top = round((image.width - {width}) / 2), round((image.height - {height}) / 2)",
        f"image = image.crop((left, top, left + {width}, top + {height}))",
    ]


def _limits(height: int, width: int, classes: int, data_name: str) -> str:
    name = markdown(data_name)
    limits = [
        f"It was trained on images of {height}x{width} pixels. The code above brings others to that size, as the "
        "evaluation of training data of another size does.",
        f"It knows {classes:,} classes, and gives one of them to any image, also to one that shows something else.",
        "The softmax of its logits adds up to 1, but was not calibrated: 0.9 does not mean right in nine of ten cases.",
        f"Accuracies are of the test split of {name}. Nothing is claimed for other data.",
    ]
    return "\n".join(f"- {limit}" for limit in limits)
