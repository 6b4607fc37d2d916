"""Networks that are not ours: their arguments, what they are built of, and what they give."""

import random
import warnings

import numpy as np
import pytest
import timm
import torch
from torch import nn

from expertgrid.model.config import TimmModel
from expertgrid.model.cost import cost
from expertgrid.model.foreign import described
from expertgrid.model.probe import probe_of
from expertgrid.model.registry import build
from expertgrid.model.system.errors import InputError

SIZE = (16, 16)


class Net(nn.Module):
    """A user's network, whose outputs `give` changes."""

    def __init__(self, classes, give=lambda logits: logits, scale=1.0):
        super().__init__()
        self.head, self.give, self.scale = nn.Linear(3, classes), give, scale

    def forward(self, x):
        return self.give(self.scale * self.head(x.mean((2, 3))))


@pytest.fixture
def register(monkeypatch):
    """Registers a function as `user_net`, as a module of a user does."""

    def registered(function) -> TimmModel:
        monkeypatch.setitem(timm.models._registry._model_entrypoints, "user_net", function)
        return TimmModel(timm="user_net")

    return registered


def test_arguments_are_those_of_timm():
    config = described(TimmModel(timm="resnet10t", arguments={"layers": [1, 2, 1, 1], "stem_width": 8}), SIZE, "data")
    net = timm.create_model("resnet10t", layers=[1, 2, 1, 1], stem_width=8, num_classes=10)
    assert config.structure.parameters == {name: tuple(value.shape) for name, value in net.named_parameters()}
    assert (sum(value.numel() for value in net.parameters()), config.structure.macs) == cost(config, *SIZE)
    assert described(TimmModel(timm="resnet10t"), SIZE, "data") == TimmModel(timm="resnet10t")


def test_a_network_of_a_fixed_size_gets_that_of_the_data():
    small = {"patch_size": 4, "depth": 1, "embed_dim": 12, "num_heads": 2}
    config = described(TimmModel(timm="vit_tiny_patch16_224", arguments=small), SIZE, "data")
    assert config.arguments == {**small, "img_size": 16}
    assert build(config)(torch.zeros(2, 3, *SIZE)).shape == (2, 10)


@pytest.mark.parametrize(
    ("give", "message"),
    [
        (
            lambda logits: (logits, logits),
            "gives a tuple of 2 in evaluation; logits are needed, a tensor of images",
        ),
        (lambda logits: logits[:, :, None, None], "gives a feature map 2x10x1x1 for 2 images in evaluation"),
        (lambda logits: logits.repeat(1, 100), "gives 1,000 outputs for 10 classes in evaluation"),
        (lambda logits: logits.argmax(1), "gives a tensor 2 for 2 images in evaluation"),
        (lambda logits: logits.round().int(), "gives outputs of torch.int32 in evaluation"),
        (lambda logits: {}["head"], "does not take the 16x16 images of data: KeyError: 'head'"),
    ],
)
def test_outputs_that_are_no_logits(register, give, message):
    config = register(lambda pretrained=False, num_classes=10, **_: Net(num_classes, give))
    with pytest.raises(InputError, match="model user_net") as error:
        described(config, SIZE, "data")
    assert message in str(error.value)


def test_outputs_are_looked_at_in_training_too(register):
    class Auxiliary(Net):
        def forward(self, x):
            return (super().forward(x),) * 2 if self.training else super().forward(x)

    with pytest.raises(InputError, match="gives a tuple of 2 in training"):
        described(register(lambda pretrained=False, num_classes=10, **_: Auxiliary(num_classes)), SIZE, "data")


def test_arguments_that_are_not_used(register):
    """What a network swallows is an error; what it only compares, passes on to be used, or tests with `is` is not."""

    def function(pretrained=False, num_classes=10, scale=1.0, **more):
        if more.get("mode") == "other":
            return Net(num_classes + 1)
        return Net(num_classes, scale=scale + (more.get("twice") is True))

    def problem(**arguments) -> str:
        try:
            described(register(function).change(arguments=arguments), SIZE, "data")
        except InputError as error:
            return str(error)
        return ""

    assert problem(scale=1.0) == problem(mode="first") == problem(twice=False) == problem(scale=1, twice=True) == ""
    assert problem(scael=2.0).startswith(
        "unknown argument of user_net: 'scael'; did you mean 'scale'? Accepted: scale, "
    )
    config = register(lambda pretrained=False, num_classes=10, scale=1.0, **_: Net(num_classes))
    with pytest.raises(InputError, match=r"model.scale = 2.0: user_net does not use this argument"):
        described(config.change(arguments={"scale": 2.0}), SIZE, "data")


def test_networks_that_load_weights_do_so_without_warnings(register):
    weights = Net(10).state_dict()

    def function(pretrained=False, **_):
        net = Net(10)
        net.load_state_dict(weights)
        return net

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cost(described(register(function), SIZE, "data"), *SIZE)


def test_a_probe_leaves_all_random_numbers_as_they_are(register):
    def function(pretrained=False, **_):
        return Net(10, lambda logits: logits * random.random() * np.random.rand() + nn.functional.dropout(logits))

    config = register(function)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    first, again = probe_of(config, SIZE), probe_of(config, SIZE)
    assert (first, first.dtype, torch.get_default_dtype()) == (again, "float64", torch.float32)
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(states[0], after[0]) and states[1:] == after[1:]


def test_code_that_needs_float32_is_compared_in_float32(register):
    def scaled(by):
        return register(lambda pretrained=False, **_: Net(10, lambda logits: by * logits @ torch.eye(10).float()))

    probe = probe_of(scaled(1.0), SIZE)
    assert probe.dtype == "float32"
    assert not probe.difference(probe_of(scaled(1.00001), SIZE))
    assert probe.difference(probe_of(scaled(1.01), SIZE)) == "outputs in training"


def test_ours_and_those_of_timm_have_no_probe():
    assert probe_of(TimmModel(timm="resnet10t"), SIZE) is None
    assert probe_of(TimmModel(timm="resnet10t"), SIZE, of_timm=True) is not None
