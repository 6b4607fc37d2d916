"""Networks of timm that are timed beside a file."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from small import CONFIG, TRAINED, two_block

from expertgrid.bench import peers
from expertgrid.bench.peers import _exported, _nearest, peers_of
from expertgrid.export.describe import describe
from expertgrid.export.metadata import Metadata
from expertgrid.model.config import TimmModel
from expertgrid.model.cost import cost
from expertgrid.model.system.errors import InputError

METADATA = Metadata(input="uint8", config=CONFIG, trained=TRAINED.model_copy(update={"image_size": (32, 32)}))


@pytest.mark.parametrize("name", ["repvgg_a0", pytest.param("mobilenetv3_small_050", marks=pytest.mark.nightly)])
def test_a_peer_computes_what_timm_does(name):
    """In timm's own form, which for RepVGG has three branches: the file has one convolution for each block."""
    model = _exported(name, METADATA)
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=10).eval()
    pixels_BHWC = np.random.default_rng(0).integers(256, size=(2, 32, 32, 3), dtype=np.uint8)
    x_BCHW = (torch.from_numpy(pixels_BHWC).permute(0, 3, 1, 2) / 255 - 0.5) / 0.25
    with torch.inference_mode():
        expected_BN = net(x_BCHW).numpy()
    (found_BN,) = onnxruntime.InferenceSession(model).run(["logits"], {"images": pixels_BHWC})
    np.testing.assert_allclose(found_BN, expected_BN, atol=1e-3 * np.abs(expected_BN).max())
    if name == "repvgg_a0":
        convolutions = sum(node.op_type == "Conv" for node in onnx.load_from_string(model).graph.node)
        assert convolutions == sum(type(module).__name__ == "RepVggBlock" for module in net.modules()) > 20


def test_the_nearest_of_a_family_is_taken():
    """By the parameters that PyTorch counts: wider networks have a larger peer."""
    family = ("resnet10t", "resnet18", "resnet34")
    counts = [sum(p.numel() for p in timm.create_model(name, num_classes=10).parameters()) for name in family]
    for wanted, near in zip(counts, family):
        config = TimmModel(timm=near)
        assert cost(config, 32, 32)[0] == wanted
        assert _nearest(family, METADATA.model_copy(update={"config": config})) == near
    assert _nearest(family, METADATA) == "resnet10t"


@pytest.fixture
def one_thread():
    """On a busy machine the threads of an engine wait for each other, and a call takes many times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.nightly  # half a minute: four networks are exported
def test_peers_are_in_the_table(expertgrid, tmp_path, monkeypatch):
    file = tmp_path / "model.onnx"
    file.write_bytes(two_block(32))

    def exported(name, metadata):
        if name == "resnet10t":
            raise InputError("too small")
        return _exported(name, metadata)

    monkeypatch.setattr(peers, "FAMILIES", (("mobilenetv3_small_050", "mobilenetv3_small_100"), ("resnet10t",)))
    monkeypatch.setattr(peers, "_exported", exported)
    record = tmp_path / "record.json"
    short = "--batch", 1, "--seconds", 0.02
    outcome = expertgrid("bench", file, "--peers", *short, "--format", "json", "--json", record)
    assert outcome.status == 0, outcome.err
    table = json.loads(outcome.out)
    assert [(row["file"], row["engine"]) for row in table] == [
        ("model.onnx", "onnxruntime cpu"), ("model.onnx", "pytorch eager cpu"),
        ("mobilenetv3_small_050.onnx", "onnxruntime cpu"),
    ]  # fmt: skip
    own = describe(file.read_bytes(), "model")
    assert (table[0]["params"], table[0]["MACs"]) == (own.parameters, own.macs)
    assert table[2]["MACs"] > 0
    assert table[2]["verdict"] in ("faster", "slower", "can't tell")
    assert "resnet10t: left out: too small" in outcome.err
    assert json.loads(record.read_text())["file"] == "model.onnx"
    for arguments, reason in (
        ([file, file, "--peers"], "--peers: is for one file"),
        ([file, "--peers", "--baseline", record, "--fail-if-slower", "5%"], "--fail-if-slower: does not go with"),
    ):
        outcome = expertgrid("bench", *arguments)
        assert (outcome.status, reason in outcome.complaint) == (2, True), outcome.complaint
    proto = onnx.load(file)
    del proto.metadata_props[:]
    onnx.save(proto, file)
    with pytest.raises(InputError, match="model.onnx: does not say for which images and classes it is"):
        peers_of(file)
