"""Checkpoints: what is written comes back, and what is none or damaged is named."""

import json

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file

from expertgrid.model.checkpoint import Checkpoint, Trained, load
from expertgrid.model.config import TimmModel
from expertgrid.model.pixels import RESIZE
from expertgrid.model.presets import PRESETS
from expertgrid.model.registry import build
from expertgrid.model.system.errors import InputError
from expertgrid.model.variants import vary

TRAINED = Trained(
    trial="abc", model="two_block", data="digits", fingerprint="0123abcd", classes=("a", "b"), image_size=(8, 8),
    mean=(0.5,), std=(0.25,),
)  # fmt: skip
SMALL = vary(PRESETS["two_block"], "width", 0.125).change(num_classes=2, in_chans=1)


@pytest.fixture
def checkpoint() -> Checkpoint:
    torch.manual_seed(0)
    return Checkpoint(SMALL, TRAINED, build(SMALL).state_dict())


@pytest.mark.parametrize("config", [*PRESETS.values(), TimmModel(timm="resnet10t")])
def test_what_is_written_comes_back(config, tmp_path):
    net = build(config).eval()
    path = tmp_path / "model.safetensors"
    for layout in (torch.contiguous_format, torch.channels_last):
        path.write_bytes(Checkpoint(config, TRAINED, net.to(memory_format=layout).state_dict()).to_bytes())
        loaded = load(path)
        assert (loaded.config, loaded.trained, loaded.network().training) == (config, TRAINED, False)
        torch.testing.assert_close(loaded.network().state_dict(), net.state_dict(), rtol=0, atol=0)


def test_equal_networks_give_equal_files(checkpoint):
    """safetensors alone orders the metadata at random."""
    orders = [dict(order(checkpoint.weights.items())) for order in (list, reversed, sorted)] * 10
    (file,) = {Checkpoint(SMALL, TRAINED, weights).to_bytes() for weights in orders}
    length = int.from_bytes(file[:8], "little")
    assert length % 8 == 0
    assert list(json.loads(file[8 : 8 + length])["__metadata__"]) == ["config", "format", "trained"]


def test_an_image_of_another_size_is_brought_to_the_networks_in_one_way():
    fields = json.loads(TRAINED.model_dump_json())
    assert fields["resize"] == RESIZE
    with pytest.raises(ValidationError, match="accepted: 'shorter side"):
        Trained.model_validate({**fields, "resize": "stretched"})


def wrong(path) -> str:
    with pytest.raises(InputError) as error:
        load(path)
    assert str(path) in str(error.value)
    return str(error.value)


def test_files_that_are_no_checkpoint(checkpoint, tmp_path):
    path = tmp_path / "model.safetensors"
    assert "there is no such checkpoint" in wrong(path)
    whole = checkpoint.to_bytes()
    for damaged in (b"", b"no safetensors", whole[:-100], whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        assert "not a safetensors file, or a damaged one" in wrong(path)
    save_file({"x": torch.zeros(3)}, path)
    assert "format is None; expertgrid checkpoints have 'expertgrid-2'" in wrong(path)


def test_checkpoint_of_another_config(checkpoint, tmp_path):
    path = tmp_path / "model.safetensors"
    for variant, message in (
        ("experts", "weights of another config: layers.1.experts.2.conv.weight is 8x8x3x3, its config needs absent"),
        ("width", "head.classifier.weight is 2x8, its config needs 2x16"),
    ):
        path.write_bytes(Checkpoint(vary(SMALL, variant, 2), TRAINED, checkpoint.weights).to_bytes())
        assert message in wrong(path)


@pytest.mark.parametrize(
    ("field", "text", "message"),
    [
        ("config", "{", "config is not JSON"),
        ("config", "[]", "config"),
        ("config", json.dumps({"layers": []}), "config.layers"),
        ("config", json.dumps({"timm": "nope"}), "model 'nope': unknown to timm; --import MODULE registers networks"),
        ("trained", "{}", "trained.trial: is missing"),
    ],
)
def test_wrong_metadata(field, text, message, checkpoint, tmp_path):
    path = tmp_path / "model.safetensors"
    about = {"format": "expertgrid-2", "config": SMALL.model_dump_json(), "trained": TRAINED.model_dump_json()}
    save_file(checkpoint.weights, path, {**about, field: text})
    assert message in wrong(path)
