"""The presets: their parameters, counted by hand, and the behaviour of a timm model."""

import copy
import math

import pytest
import timm
import torch
from timm.models import group_parameters

from expertgrid.model.config import Block, Pool, TimmModel
from expertgrid.model.net import ExpertNet
from expertgrid.model.presets import PRESETS, network
from expertgrid.model.registry import build
from expertgrid.model.system.errors import InputError
from expertgrid.model.variants import matched_difference, vary

PARAMETERS = {  # counted by hand, from the reports' descriptions
    "two_block": 300_658,
    "eight_block": 894_690,
    "segmented": 3_577_573,
    "macro_residual": 10_223_262,
    "mixed_kernel": 7_676_660,
    "speed": 2_107_688,
    "speed_matched_params": 2_118_946,
    "speed_matched_macs": 2_088_402,
    "accuracy": 10_771_502,
    "accuracy_matched_params": 10_772_874,
    "accuracy_matched_macs": 10_318_202,
}


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_are_as_counted_by_hand(name):
    assert sum(p.numel() for p in build(PRESETS[name]).parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("equal", ["params", "macs"])
@pytest.mark.parametrize("name", ["speed", "accuracy"])
def test_matched_presets_are_the_matched_baselines(name, equal):
    assert PRESETS[f"{name}_matched_{equal}"] == vary(PRESETS[name], "matched", equal)
    assert abs(matched_difference(PRESETS[name], equal)) < 0.006


NAMES = timm.list_models("expertnet_*")


def test_all_presets_are_registered():
    assert {f"expertnet_{name}" for name in PRESETS} == set(NAMES)
    assert timm.create_model("expertnet", num_classes=3).config == PRESETS["two_block"].change(num_classes=3)


@pytest.fixture(params=[name for name in NAMES if not name.endswith("_matched_macs")])
def name(request) -> str:
    """The name of a preset; baselines of as many MACs are those of as many parameters, but for their widths."""
    return request.param


X = torch.randn(2, 3, 32, 32)


def test_timm_creates_it_for_other_data(name):
    net = timm.create_model(name, num_classes=7, in_chans=1, drop_rate=0.3)
    assert net(torch.randn(2, 1, 32, 32)).shape == (2, 7)
    assert (net.config.num_classes, net.config.in_chans, net.config.head.dropout) == (7, 1, 0.3)
    assert ExpertNet(net.config).state_dict().keys() == net.state_dict().keys()


def test_features_and_head_make_the_output(name):
    net = timm.create_model(name).eval()
    features = net.forward_features(X)
    assert features.shape[1] == net.num_features
    pre_logits = net.forward_head(features, pre_logits=True)
    assert pre_logits.shape == (2, net.head_hidden_size)
    torch.testing.assert_close(net.get_classifier()(pre_logits), net(X))
    torch.testing.assert_close(net.forward_head(features), net(X))


def test_classifier_is_reset(name):
    net = timm.create_model(name).eval()
    before = net.forward_head(net.forward_features(X), pre_logits=True)
    net.reset_classifier(0)
    torch.testing.assert_close(net(X), before)
    net.reset_classifier(3, "max")
    assert net(X).shape == (2, 3)
    assert net.num_classes == net.config.num_classes == 3
    assert net.global_pool == "max"
    net.reset_classifier(0, "")
    torch.testing.assert_close(net(X), net.forward_features(X))


def test_intermediates_are_the_layers_outputs(name):
    net = timm.create_model(name).eval()
    final, features = net.forward_intermediates(X)
    torch.testing.assert_close(final, net.forward_features(X))
    assert [f.shape[1] for f in features] == [info["num_chs"] for info in net.feature_info]
    reductions = [2 ** round(math.log2(32 / f.shape[2])) for f in features[:-1]]
    assert reductions == [info["reduction"] for info in net.feature_info[:-1]]
    last = net.forward_intermediates(X, indices=1, intermediates_only=True)
    torch.testing.assert_close(last, features[-1:])
    early = net.forward_intermediates(X, indices=[0, 1], stop_early=True, intermediates_only=True, norm=True)
    torch.testing.assert_close(early, features[:2])
    with pytest.raises(ValueError, match="NCHW"):
        net.forward_intermediates(X, output_fmt="NLC")


@pytest.mark.parametrize("kind", ["getter", "fx"])
def test_features_only(name, kind):
    net = timm.create_model(name).eval()
    wrapped = timm.create_model(name, features_only=True, out_indices=(0, 1), feature_cls=kind).eval()
    weights = net.state_dict()
    wrapped.load_state_dict({key: weights[key.partition(".")[2]] for key in wrapped.state_dict()})
    features = wrapped(X)
    torch.testing.assert_close(features, net.forward_intermediates(X, indices=[0, 1], intermediates_only=True))
    assert [f.shape[1] for f in features] == wrapped.feature_info.channels()
    assert len(wrapped.state_dict()) < len(net.state_dict())


def test_layers_are_pruned(name):
    net = timm.create_model(name).eval()
    expected = net.forward_intermediates(X, indices=[1], intermediates_only=True)[0]
    with_head = copy.deepcopy(net)
    with_head.prune_intermediate_layers([1], prune_head=False)
    assert with_head.head.classifier.out_features == 10
    parts = len(net.feature_info)
    assert net.prune_intermediate_layers([1 - parts]) == [1]
    torch.testing.assert_close(net(X), expected)
    assert net.num_features == expected.shape[1]
    assert len(net.feature_info) == 2
    assert ExpertNet(net.config).state_dict().keys() == net.state_dict().keys()
    (last,) = net.forward_intermediates(X, indices=1, intermediates_only=True)
    torch.testing.assert_close(last, expected)


TRACERS = {
    "fx": torch.fx.symbolic_trace,
    "script": torch.jit.script,
    "export": lambda net: torch.export.export(net, (X,)).module(),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")
@pytest.mark.parametrize("tracer", TRACERS)
def test_traced_networks_compute_the_same(name, tracer):
    net = timm.create_model(name).eval()
    torch.testing.assert_close(TRACERS[tracer](net)(X), net(X))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")
@pytest.mark.parametrize(
    ("variant", "level"),
    [("gate", "shuffled"), ("gate", "frozen"), ("gate", "uniform"), ("gate", "constant")]
    + [("gate", {"kind": "linear", "temperature": 2.0}), ("norm_act", "none"), ("norm_act", "mix"), ("experts", 1)],
)
def test_traced_variants_compute_the_same(variant, level):
    small = PRESETS["segmented"].change(layers=(Block(channels=8), Pool(), Block(channels=8)))
    net = build(vary(small, variant, level)).eval()
    for tracer, trace in TRACERS.items():
        torch.testing.assert_close(trace(net)(X), net(X), msg=lambda text, tracer=tracer: f"{tracer}: {text}")


def test_a_traced_network_trains_as_the_network_does():
    torch.manual_seed(0)
    net = timm.create_model("expertnet_macro_residual", drop_rate=0.0)
    traced, gradients = torch.fx.symbolic_trace(copy.deepcopy(net)), []
    for module in (net, traced):
        module(X).logsumexp(1).sum().backward()
        gradients.append({name: parameter.grad for name, parameter in module.named_parameters()})
    torch.testing.assert_close(*gradients)


def test_gradient_checkpointing_changes_nothing_but_memory(name):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        net = timm.create_model(name)
        net.set_grad_checkpointing(checkpointing)
        torch.manual_seed(1)
        net(X).sum().backward()
        gradients.append([p.grad for p in net.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


def test_groups_hold_every_parameter_once(name):
    net = timm.create_model(name)
    counts = []
    for coarse in (False, True):
        groups = group_parameters(net, net.group_matcher(coarse), reverse=False)
        named = [parameter for group in groups.values() for parameter in group]
        assert sorted(named) == sorted(n for n, _ in net.named_parameters())
        layers = [{name.split(".")[1] for name in group if name.startswith("layers")} for group in groups.values()]
        assert [group for group in layers[1:] if "0" in group] == []
        counts.append(len(groups))
    reductions = {info["reduction"] for info in net.feature_info[1:]}
    assert counts == [len(net.feature_info) + 1, len(reductions) + 2]  # the first layer, the others, and the head


def test_default_cfg_names_the_layers_that_timm_changes(name):
    net = timm.create_model(name)
    cfg = net.default_cfg
    modules = dict(net.named_modules())
    first = cfg["first_conv"] if isinstance(cfg["first_conv"], tuple) else (cfg["first_conv"],)
    assert all(modules[conv].in_channels == 3 for conv in first)
    assert modules[cfg["classifier"]].out_features == cfg["num_classes"]
    assert net.forward_features(X).shape[2:] == cfg["pool_size"]


def test_networks_are_found_by_name():
    assert network("expertnet_two_block") == network("two_block") == PRESETS["two_block"]
    assert network("resnet18") == TimmModel(timm="resnet18")
    assert build(TimmModel(timm="resnet18", in_chans=1, num_classes=4))(torch.randn(2, 1, 32, 32)).shape == (2, 4)
    with pytest.raises(InputError, match="unknown model 'eigth_block'; did you mean 'eight_block'?"):
        network("eigth_block")
