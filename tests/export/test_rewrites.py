"""Rewritten networks compute what the networks they come from compute; pruned ones are described by their config."""

import copy
import math
from collections import Counter

import numpy as np
import onnx
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_networks import trained
from torch import nn

from expertgrid.export import rewrites as rewriting
from expertgrid.export.prune import largest_gate_weights, prune_gates
from expertgrid.export.rewrites import REWRITES, rewrite
from expertgrid.export.session import open_session
from expertgrid.export.to_onnx import to_onnx
from expertgrid.model.checkpoint import Checkpoint
from expertgrid.model.config import Block, Conv, GateConfig, HeadConfig, ModelConfig, NormConfig, Pool, Residual, Whiten
from expertgrid.model.net import ExpertBlock, ExpertNet, Gate
from expertgrid.model.system.errors import InputError

SIZE = (9, 8)
FEW = settings(max_examples=12, derandomize=True, deadline=None)

kernels = st.lists(st.sampled_from([1, 3, 5]), min_size=1, max_size=4).map(tuple)
temperatures = st.sampled_from([0.3, 1.0, 4.0])
gates = st.one_of(
    st.builds(GateConfig, temperature=temperatures),
    st.builds(GateConfig, kind=st.just("mlp"), hidden=st.sampled_from([(5,), (4, 3)]), temperature=temperatures),
    st.just(GateConfig(kind="uniform")),
    st.builds(GateConfig, kind=st.just("constant"), temperature=temperatures),
)
channels, strides = st.sampled_from([3, 8]), st.sampled_from([1, 2])
places = st.sampled_from(["expert", "mix", "none"])
blocks = st.builds(Block, channels=channels, kernels=kernels, stride=strides, norm_act=places, gate=gates)
conv_fields = {"channels": channels, "kernel": st.sampled_from([1, 3]), "stride": strides, "norm_act": st.booleans()}
convs = st.builds(Conv, **conv_fields)
pooled = st.builds(Conv, **{**conv_fields, "stride": st.just(1)}, pool=st.just(2))
plain = st.one_of(blocks, blocks, convs)
residuals = st.builds(Residual, layers=st.lists(plain, min_size=1, max_size=2).map(tuple))
configs = st.builds(
    ModelConfig,
    in_chans=st.just(4),
    num_classes=st.just(5),
    layers=st.lists(st.one_of(plain, residuals, pooled), min_size=1, max_size=3).map(tuple),
).filter(lambda config: math.prod(layer.reduction for layer in config.layers) < min(SIZE))


def random_net(config: ModelConfig, seed: int = 0) -> ExpertNet:
    """A network whose batch norms and biases are not what they are at the start, so that they do something."""
    torch.manual_seed(seed)
    net = ExpertNet(config)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, -0.5, 1.5)
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.Linear) and module.bias is not None:
            nn.init.normal_(module.bias)
        if isinstance(module, Gate) and module.logits_K is not None:
            nn.init.normal_(module.logits_K)
    return net


def config_of(*layers, **fields) -> ModelConfig:
    return ModelConfig(in_chans=4, num_classes=5, layers=layers, **fields)


def only(**fields) -> ModelConfig:
    return config_of(*(Block(channels=8, **fields),) * 2)


def images(batch: int) -> torch.Tensor:
    return torch.randn(batch, 4, *SIZE, generator=torch.Generator().manual_seed(batch))


@torch.no_grad()
def distance(net: nn.Module, other: nn.Module, batch: int = 3) -> float:
    """The largest difference of logits, relative to the largest logit."""
    expected = copy.deepcopy(net).eval()(images(batch))
    return ((other(images(batch)) - expected).abs().max() / expected.abs().max()).item()


def operators(net: nn.Module) -> Counter[str]:
    """The operators of the graph that the exporter of PyTorch starts from."""
    graph = torch.export.export(net, (images(2),)).graph
    return Counter(node.target.__name__.split(".")[0] for node in graph.nodes if node.op == "call_function")


@FEW
@given(configs, st.integers(0, 99))
def test_a_rewritten_network_has_the_same_logits(config, seed):
    net = random_net(config, seed)
    for batch in (1, 3):
        assert distance(net, rewrite(net), batch) < 1e-4
    assert distance(net, rewrite(net, ()), 3) < 1e-6


@pytest.mark.parametrize("name", REWRITES)
@settings(FEW, max_examples=6)
@given(config=configs)
def test_each_rewrite_alone_and_all_others(name, config):
    net = random_net(config)
    assert distance(net, rewrite(net, {name})) < 1e-4
    assert distance(net, rewrite(net, set(REWRITES) - {name})) < 1e-4


@FEW
@given(blocks.filter(lambda block: block.norm_act != "expert"), st.booleans())
def test_linear_experts_as_one_kernel_per_image(block, with_others):
    net = random_net(config_of(block))
    if len(block.kernels) > 1 or block.norm_act == "none":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rewriting, "LEAST_SAVING", 0.0)
            assert distance(net, rewrite(net, REWRITES if with_others else {"one_kernel"})) < 1e-4


@pytest.mark.parametrize("scale", [1.0, -1.0])
def test_norm_is_folded_through_pooling_where_it_does_not_turn_the_order_round(scale):
    net = random_net(config_of(Conv(channels=8, pool=2)))
    norm = net.layers[0].norm
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    with torch.no_grad():
        norm.weight[3] *= scale
    rewritten = rewrite(net)
    assert any(isinstance(module, nn.BatchNorm2d) for module in rewritten.modules()) == (scale < 0)
    assert distance(net, rewritten) < 1e-5


NETS = {
    "whiten": config_of(
        *(Whiten(), Conv(channels=8, pool=2), Block(channels=8, kernels=(3, 3), norm_act="mix")),
        head=HeadConfig(pool="max", scale=0.5),
        norm=NormConfig(momentum=0.4, scale=False),
        init="dirac",
    ),
    "experts": only(kernels=(5, 3, 3), gate=GateConfig(kind="mlp", hidden=(4,), temperature=3.0)),
    "mix": only(kernels=(5, 5, 5, 3), norm_act="mix"),
    "stride": config_of(
        Conv(channels=8),
        Residual(layers=(Block(channels=8, kernels=(3,) * 6, stride=2, norm_act="mix"), Block(channels=8))),
        Block(channels=8, gate=GateConfig(kind="uniform")),
        Pool(),
        head=HeadConfig(hidden=(6,)),
    ),
}


@pytest.mark.parametrize("name", NETS)
def test_onnx_runtime_agrees_at_each_batch_size(name):
    net = random_net(NETS[name])
    dynamic = ({0: torch.export.Dim("batch")},)
    program = torch.onnx.export(rewrite(net), (images(2),), dynamo=True, dynamic_shapes=dynamic, verbose=False)
    session = open_session(program.model_proto.SerializeToString(), "cpu", name)
    (given,) = session.get_inputs()
    assert given.shape[0] == "batch"
    for batch in (1, 2, 7):
        (logits,) = session.run(None, {given.name: images(batch).numpy()})
        expected = net.eval()(images(batch)).detach().numpy()
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("name", "operator", "before", "after"),
    [("experts", "conv2d", 6, 4), ("experts", "mul", 6, 0), ("mix", "conv2d", 8, 0), ("mix", "batch_norm", 2, 0)],
)
def test_the_graph_has_fewer_nodes(name, operator, before, after):
    """Of experts, those of one kernel size are one convolution; kernels that are mixed need none."""
    net = random_net(NETS[name]).eval()
    assert (operators(net)[operator], operators(rewrite(net))[operator]) == (before, after)


@pytest.mark.parametrize(("place", "convs", "adds"), [("none", 2, 0), ("mix", 2, 0), ("expert", 6, 4)])
def test_a_constant_gate_is_gone(place, convs, adds):
    """Linear experts are one convolution, others a plain sum; a trained gate that learnt nothing is constant too."""
    learnt_nothing = random_net(only(norm_act=place))
    for block in learnt_nothing.layers:
        nn.init.zeros_(block.gate.mlp[-1].weight)
    for net in (random_net(only(norm_act=place, gate=GateConfig(kind="uniform"))), learnt_nothing):
        assert distance(net, rewrite(net)) < 1e-5
        found = operators(rewrite(net))
        assert [found[name] for name in ("conv2d", "add", "mul", "matmul", "softmax")] == [convs, adds, 0, 0, 0]
    before = operators(random_net(only(norm_act=place)).eval())
    assert min(before["mul"] + before["add"], before["softmax"]) > 0  # these are their names


def test_the_given_network_is_left_as_it_is():
    net = random_net(NETS["stride"])
    before = copy.deepcopy(net.state_dict())
    rewritten = rewrite(net)
    for parameter in rewritten.parameters():
        nn.init.zeros_(parameter)
    assert net.training
    assert not any(module.training for module in rewritten.modules())
    assert [name for name, tensor in net.state_dict().items() if not torch.equal(tensor, before[name])] == []
    assert sum(isinstance(module, ExpertBlock) for module in net.modules()) == 3


def test_what_is_refused():
    net = random_net(NETS["stride"])
    with pytest.raises(InputError, match="unknown rewrite 'matmull'; did you mean 'matmul'?"):
        rewrite(net, {"matmull"})


def test_a_timm_model_is_copied():
    net = timm.create_model("resnet10t", num_classes=3)
    rewritten = rewrite(net)
    x_BCHW = torch.randn(2, 3, 32, 32)
    assert net.training and not rewritten.training
    torch.testing.assert_close(rewritten(x_BCHW), net.eval()(x_BCHW))


def largest(net: ExpertNet) -> dict[str, torch.Tensor]:
    return largest_gate_weights(net, images(80).numpy())


def test_largest_gate_weights_by_hand():
    """Over all batches of the images."""
    net = random_net(NETS["stride"]).eval()
    weights = largest(net)
    assert {name: tuple(largest_K.shape) for name, largest_K in weights.items()} == {
        "layers.1.layers.0": (6,), "layers.1.layers.1": (3,), "layers.2": (3,),
    }  # fmt: skip
    gate_BK = net.layers[1].layers[0].gate(net.layers[0](images(80)))
    torch.testing.assert_close(weights["layers.1.layers.0"], gate_BK.amax(0))


@pytest.mark.parametrize("place", ["expert", "mix", "none"])
def test_an_expert_without_weight_is_dropped(place):
    gate = GateConfig(kind="mlp", hidden=(6,), temperature=2.0)
    gated = Residual(layers=(Block(channels=8, kernels=(5, 3, 1), norm_act=place, gate=gate),))
    net = random_net(config_of(gated, Block(channels=8, norm_act=place))).eval()
    block = net.layers[0].layers[0]
    nn.init.constant_(block.gate.mlp[-1].bias[1:2], -60)
    pruned, dropped = prune_gates(net, largest(net), 1e-6)
    assert dropped == ["layers.0.layers.0.experts.1"]
    assert [block.kernels for block in pruned.config.blocks()] == [(5, 1), (3, 3, 3)]
    assert distance(net, pruned, 80) < 1e-5
    assert not pruned.training
    rebuilt = ExpertNet(pruned.config)
    rebuilt.load_state_dict(pruned.state_dict())
    assert distance(pruned, rebuilt.eval()) == 0


def test_an_expert_of_a_constant_gate_is_dropped():
    net = random_net(only(gate=GateConfig(kind="constant"))).eval()
    with torch.no_grad():
        for block in net.layers:
            block.gate.logits_K[1] = -60
    pruned, dropped = prune_gates(net, largest(net), 1e-6)
    assert dropped == ["layers.0.experts.1", "layers.1.experts.1"]
    assert distance(net, pruned, 80) < 1e-5


@pytest.mark.parametrize("place", ["expert", "mix", "none"])
@pytest.mark.parametrize("kind", ["linear", "uniform"])
def test_one_expert_that_is_left_has_no_gate(place, kind):
    net = random_net(only(norm_act=place, gate=GateConfig(kind=kind))).eval()
    if kind == "linear":
        for block in net.layers:
            nn.init.constant_(block.gate.mlp[-1].bias[2:], 80)
    pruned, dropped = prune_gates(net, largest(net), 1e-3 if kind == "linear" else 0.9)
    assert len(dropped) == 4
    assert all(block.kernels == (3,) and block.gate is None for block in pruned.config.blocks())
    assert pruned.config == ExpertNet(pruned.config).config
    if kind == "linear":
        assert distance(net, pruned, 80) < 1e-5


def test_threshold_0_changes_nothing():
    net = random_net(NETS["stride"])
    before = torch.get_rng_state()
    pruned, dropped = prune_gates(net, largest(net), 0)
    assert torch.equal(torch.get_rng_state(), before)
    assert (dropped, pruned.config) == ([], net.config)
    assert distance(net, pruned.eval()) == 0
    pruned.head.classifier.bias.data += 1
    assert distance(net, pruned) > 0  # nothing is shared


def test_a_pruned_network_is_exported():
    config = ModelConfig(layers=(Block(channels=4), Block(channels=4)), num_classes=2)
    net = random_net(config).eval()
    pruned, dropped = prune_gates(net, {"layers.1": torch.tensor([0.1, 0.9, 0.9])}, 0.5)
    checkpoint = Checkpoint(pruned.config, trained(classes=("x", "y"), image_size=(8, 8)), pruned.state_dict())
    model = onnx.load_from_string(to_onnx(checkpoint, "float"))
    assert dropped == ["layers.1.experts.0"]
    assert Counter(node.op_type for node in model.graph.node)["Conv"] == 5
