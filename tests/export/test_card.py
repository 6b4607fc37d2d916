"""Model cards: what the caller gave is in them as it is, and the code in them runs."""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from small_networks import CLASSES, small_checkpoint, small_model

from expertgrid.export.card import card
from expertgrid.export.certificate import Certificate
from expertgrid.export.compare import compare
from expertgrid.export.describe import Description, describe
from expertgrid.export.predict import read_pixels
from expertgrid.export.to_onnx import example, served
from expertgrid.model.checkpoint import Checkpoint
from expertgrid.model.system.errors import InputError
from expertgrid.model.system.text import Interval, Measured, markdown

GIVEN = {
    "trained": ["Recipe: 8 epochs, batch size 32.", "Data: my_data: 1,293 train images."],
    "results": {"n": 3, "test acc %": Interval(98.61, 96.88, 100.34), "params": 12345},
}


@pytest.fixture(scope="module", params=[("uint8", 3), ("float", 3), ("float", 1)], ids=lambda p: f"{p[0]} {p[1]}")
def made(request) -> tuple[Checkpoint, str, bytes]:
    kind, channels = request.param
    return small_checkpoint(channels), kind, small_model(channels, kind)


@pytest.fixture(scope="module")
def file(made) -> Description:
    return describe(made[2], "runs/study/export/model.onnx")


@pytest.fixture(scope="module")
def certificate(made) -> Certificate:
    checkpoint, kind, model = made
    return compare(model, served(checkpoint, kind), example(checkpoint, kind, 9).numpy(), np.arange(9) % 3)


def section(text: str, title: str) -> str:
    return re.search(rf"^## {title}\n\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)[1]


def test_what_was_given_is_in_the_card(file, certificate):
    text = card(file, certificate, **GIVEN)
    assert text.startswith("# two_block on my_data\n")
    assert "3 classes of 6x8 images" in text
    channels = file.inputs[0].shape[3 if file.inputs[0].type == "uint8" else 1]
    facts = f"- Preset or timm model: two_block\n- in_chans: {channels}\n- num_classes: 3\n- layers: "
    assert section(text, "The network").startswith(facts)
    lines = "- Recipe: 8 epochs, batch size 32.\n- Data: my_data: 1,293 train images.\n\n"
    assert section(text, "What was trained") == lines
    assert str(file.inputs[0]) in section(text, "The file")
    assert f"{file.macs:,}" in section(text, "The file")
    assert "logits: float32 batch×3" in section(text, "The file")
    assert str(certificate) in section(text, "Agreement with PyTorch")
    assert certificate.sha256 in section(text, "Agreement with PyTorch")
    assert "did not pass" not in text


def test_results_say_what_their_intervals_are(file, certificate):
    """Those of accuracies are over seeds, those of a latency over calls."""
    results = GIVEN["results"] | {"latency ms": Measured(0.123, 0.12, 0.126)}
    both = section(card(file, certificate, **GIVEN | {"results": results}), "Results")
    assert re.search(r"\| +3 \| +98.61 \(96.88 to 100.34\) \| +12,345 \| +0.1230 ±0.0030 \|", both)
    assert both.count("\n- ") == 2
    over_seeds, over_calls = "interval of the mean over seeds", "±: half of the 95% interval of the median"
    seeds = section(card(file, certificate, **GIVEN), "Results")
    alone = {"test acc %": Interval(98.61), "latency ms": results["latency ms"]}
    calls = section(card(file, certificate, **GIVEN | {"results": alone}), "Results")
    for text, notes in ((both, (True, True)), (seeds, (True, False)), (calls, (False, True))):
        assert (over_seeds in text, over_calls in text) == notes


def test_latency(file, certificate):
    rows = [{"batch": 1, "engine": "onnxruntime cpu", "p50 ms": 0.053}, {"batch": 64, "engine": "x|y", "p50 ms": None}]
    measured = section(card(file, certificate, **GIVEN, latency=rows), "Latency")
    assert re.search(r"\| +1 \| onnxruntime cpu +\| +0.053 \|", measured)
    assert re.search(r"\| +64 \| x\\\|y +\| +\|", measured)
    assert "expertgrid bench" not in measured
    missing = section(card(file, certificate, **GIVEN), "Latency")
    assert missing == "Not measured. This measures it:\n\n```sh\nexpertgrid bench model.onnx\n```\n\n"


def test_limits(file, certificate):
    other = file.model_copy(update={"metadata": file.metadata | {"data": "cifar10-jpeg"}})
    limits = section(card(other, certificate, **GIVEN), "Limits")
    assert len(limits.splitlines()) == 4
    for words in ("6x8 pixels", "3 classes", "not calibrated", "test split of cifar10-jpeg"):
        assert words in limits


def test_a_file_that_did_not_pass_of_which_nothing_is_stated(file, certificate):
    text = card(file, certificate.model_copy(update={"passed": False}), trained=[], results={})
    assert "**The file did not pass its comparison**" in text
    assert section(text, "What was trained") == section(text, "Results") == "Not stated.\n\n"


def test_names_are_markdown(file, certificate):
    text = card(file, certificate, **GIVEN | {"trained": ["a|b\n# c: <script>_x_</script>\n## No"]})
    assert "- a\\|b \\# c: \\<script>\\_x\\_\\</script> \\#\\# No\n" in text
    assert "a cat, b_dog\\*, \\<c> \\| \\`d\\`." in text
    assert markdown("![x](y) a\\b 10 000 $1 & ~2~") == "\\!\\[x\\](y) a\\\\b 10 000 \\$1 \\& \\~2\\~"
    assert len(re.findall("^#", text, re.MULTILINE)) == 9  # the card's own


def test_many_classes(file, certificate):
    names = "[" + ", ".join(f'"c{i}"' for i in range(1234)) + "]"
    many = file.model_copy(update={"metadata": file.metadata | {"classes": names}})
    text = card(many, certificate, **GIVEN)
    assert "c99 and 1,134 more, which are in the metadata." in text
    assert "c100" not in text


@pytest.mark.parametrize(("name", "size"), [("model.onnx", (6, 8)), ('it\'s a "```" model.onnx', (31, 20))])
def test_the_code_runs(made, certificate, name, size, tmp_path, monkeypatch, capsys):
    """Also on an image of another size, to which it does what `predict` does."""
    checkpoint, kind, model = made
    channels = checkpoint.config.in_chans
    (tmp_path / name).write_bytes(model)
    pixels = np.random.default_rng(1).integers(256, size=(*size, channels), dtype=np.uint8)
    Image.fromarray(pixels.squeeze()).save(tmp_path / "image.png")
    pixels = read_pixels(tmp_path / "image.png", 6, 8, channels).copy()
    monkeypatch.chdir(tmp_path)
    text = card(describe(model, f"anywhere/{name}"), certificate, **GIVEN)
    code = re.search(r"^(```+)python\n(.*?)\n\1$", text, re.MULTILINE | re.DOTALL)[2]
    variables: dict = {}
    exec(code, variables)
    expected = served(checkpoint, "uint8")(torch.from_numpy(pixels[None])).detach().numpy()
    np.testing.assert_allclose(variables["logits"], expected, rtol=1e-4, atol=1e-5)
    assert capsys.readouterr().out == f"{CLASSES[expected.argmax()]}\n"


def test_files_that_are_not_ours(file, certificate):
    foreign = file.model_copy(update={"metadata": {}})
    with pytest.raises(InputError, match="model.onnx: its metadata has no 'expertgrid.input'"):
        card(foreign, certificate, **GIVEN)
