"""Presets as networks of timm, and networks from their configs."""

import sys

import timm
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from model.config import Conv, ModelConfig, Network, Whiten
from model.net import ExpertNet
from model.presets import PRESETS


def build(config: Network) -> nn.Module:
    """The module that `config` describes, with fresh weights from torch's global generator, in training mode."""
    if isinstance(config, ModelConfig):
        return ExpertNet(config)
    return timm.create_model(config.timm, in_chans=config.in_chans, num_classes=config.num_classes)


def _first_convs(config: ModelConfig) -> str | tuple[str, ...]:
    first = config.layers[0]
    if isinstance(first, Conv | Whiten):
        return "layers.0.conv"
    return tuple(f"layers.0.experts.{k}.conv" for k in range(len(first.kernels)))


def _default_cfg(config: ModelConfig) -> dict:
    return {
        "url": "",
        "num_classes": config.num_classes,
        "input_size": (config.in_chans, 32, 32),
        "pool_size": config.output_size(32, 32),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": (0.4914, 0.4822, 0.4465),  # of CIFAR-10's train images
        "std": (0.2470, 0.2435, 0.2616),
        "first_conv": _first_convs(config),
        "classifier": "head.classifier",
    }


default_cfgs = generate_default_cfgs({f"expertnet_{name}.untrained": _default_cfg(c) for name, c in PRESETS.items()})


def _register(name: str, config: ModelConfig) -> None:
    def build(pretrained: bool = False, **kwargs) -> ExpertNet:
        features = {"out_indices": tuple(range(len(ExpertNet(config).feature_info))), "feature_cls": "getter"}
        return build_model_with_cfg(
            ExpertNet, f"expertnet_{name}", pretrained, model_cfg=config, feature_cfg=features, **kwargs
        )

    build.__name__ = build.__qualname__ = f"expertnet_{name}"
    build.__doc__ = f"The reference network `{name}`; see `PRESETS`."
    setattr(sys.modules[__name__], build.__name__, register_model(build))


for _name, _config in PRESETS.items():
    _register(_name, _config)
