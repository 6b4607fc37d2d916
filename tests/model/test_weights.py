"""Weights to start from: against what timm itself loads, from each kind of source, and what is refused."""

import re

import pytest
import timm
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load, save_file
from timm.models import register_model, save_for_hf
from torch import nn

from expertgrid.model.config import TimmModel
from expertgrid.model.presets import PRESETS
from expertgrid.model.registry import build
from expertgrid.model.system.errors import InputError
from expertgrid.model.weights import read_weights

TEN = tuple("0123456789")
RESNET = "test_resnet.r160_in1k"


class Code:
    def __reduce__(self):
        return print, ("run",)


@register_model
def plain_net(pretrained=False, in_chans=3, num_classes=10, **kwargs):
    """As a user writes it: `pretrained` is not looked at, and a part has weights of its own."""
    nn.Linear(1, 1).load_state_dict({"weight": torch.ones(1, 1), "bias": torch.ones(1)})
    return nn.Sequential(nn.Conv2d(in_chans, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(3600, num_classes))


@pytest.fixture
def trained(tmp_path) -> nn.Module:
    """A network of 1,000 classes whose weights no seed gives, as safetensors, with pickle, and as the Hub has it."""
    net = timm.create_model("test_resnet")
    with torch.no_grad():
        for tensor in net.state_dict().values():
            tensor.add_(1)
    net.pretrained_cfg |= {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "label_names": None}
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    torch.save({"state_dict": net.state_dict(), "epoch": 3}, tmp_path / "net.pth")
    save_for_hf(net, tmp_path / "hub", safe_serialization=True)
    return net


@pytest.fixture
def hub(tmp_path, trained, monkeypatch) -> None:
    """The Hub has the folder of `trained` under any name."""

    def download(*names, **options):
        return str(tmp_path / "hub" / (options.get("filename") or names[1]))

    monkeypatch.setattr("timm.models._hub.hf_hub_download", download)


def test_timm_fits_weights_to_channels_and_classes(tmp_path, trained, hub):
    config, file = TimmModel(timm=RESNET, in_chans=1), tmp_path / "net.pth"
    expected = timm.create_model(
        RESNET, pretrained=True, pretrained_cfg_overlay={"file": str(file)}, in_chans=1, num_classes=10
    ).state_dict()
    prints = set()
    for source in (str(file), str(tmp_path / "net.safetensors"), "hf-hub:some/net", "timm"):
        initial = read_weights(source, config, TEN)
        loaded = load(initial.file)
        assert set(initial.weights.new) == {"fc.weight", "fc.bias"} == expected.keys() - loaded.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.items())
        prints.add(initial.weights.fingerprint)
        own = {"hf-hub:some/net": ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)), "timm": ((0.5,) * 3, (0.5,) * 3)}
        assert initial.normalisation == own.get(source)
    assert len(prints) == 1
    many = read_weights(str(file), TimmModel(timm=RESNET, num_classes=1000), tuple(map(str, range(1000))))
    assert many.weights.new == ()
    assert torch.equal(load(many.file)["fc.weight"], trained.fc.weight)


def test_a_network_starts_from_its_own_weights(tmp_path):
    """One of ours, a user's, and one of timm for other images, trained on seven classes: all but the classifier."""
    vit = {"timm": "test_vit", "arguments": {"img_size": 32}}
    for config, head in (
        (PRESETS["segmented"].change(num_classes=7), "head.classifier"),
        (TimmModel(timm="plain_net", num_classes=7), "3"),
        (TimmModel(**vit, num_classes=7), "head"),
    ):
        expected, file = build(config).state_dict(), tmp_path / "net.safetensors"
        save_file(expected, file)
        initial = read_weights(str(file), config.model_copy(update={"num_classes": 10}), TEN)
        assert initial.weights.new == (f"{head}.bias", f"{head}.weight")
        loaded = load(initial.file)
        assert loaded.keys() == expected.keys() - set(initial.weights.new)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.items())


def test_wrong_weights_are_one_line(tmp_path, trained, capsys):
    (tmp_path / "broken.safetensors").write_bytes(b"no tensors")
    torch.save({"layer": Code()}, tmp_path / "code.pth")
    for source, config, problem in (
        ("net.pth", TimmModel(timm="test_vit"), r"of another network: \d+ of \d+ keys differ: (\S+, ){3}\.\.\.$"),
        ("net.pth", PRESETS["speed"], r"of another network: \d+ of \d+ keys differ: bn1.bias, "),
        ("code.pth", TimmModel(timm=RESNET), "are not tensors alone .code in it is never run."),
        ("broken.safetensors", TimmModel(timm=RESNET), "are not tensors alone"),
        ("none.pth", TimmModel(timm=RESNET), "there is no file"),
    ):
        with pytest.raises(InputError, match=problem):
            read_weights(str(tmp_path / source), config, TEN)
    for source in ("imagenet", "net.onnx"):
        with pytest.raises(InputError, match="accepted: none, timm, hf-hub:OWNER/NAME, DIR@TRIAL, or a file"):
            read_weights(source, TimmModel(timm=RESNET), TEN)
    assert "run" not in capsys.readouterr().out


@pytest.mark.parametrize("source", ["timm", "hf-hub:some/net"])
def test_without_a_network_it_is_one_line(source, monkeypatch):
    def download(*names, **options):
        raise LocalEntryNotFoundError("offline\nand not in the cache")

    monkeypatch.setattr("timm.models._hub.hf_hub_download", download)
    with pytest.raises(InputError, match=f"^weights {re.escape(source)}: cannot be loaded: .* no network$") as error:
        read_weights(source, TimmModel(timm=RESNET), TEN)
    assert "\n" not in str(error.value)
