"""Presets as networks of timm, and networks from their configs.

Importing this module registers the presets with timm. `import expertgrid.model` has it imported as soon as timm is
there, possibly while `model.net` itself imports timm: so the modules are imported when a network is built.
"""

import copy
import inspect
import logging
import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any

import timm
from pydantic import ValidationError
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from expertgrid.model.config import Block, Conv, ModelConfig, Network, TimmModel, Whiten
from expertgrid.model.presets import PRESETS
from expertgrid.model.system.errors import InputError, invalid, reason_of

if TYPE_CHECKING:
    from torch import nn

    from expertgrid.model.net import ExpertNet


CLASSES: dict[str, dict[str, type["nn.Module"]]] = {}  # networks of users' modules: by name, then by module

# A user's network needs no entry of weights to load, which timm would say for each network that is built.
logging.getLogger("timm.models._builder").addFilter(
    lambda record: not str(record.msg).startswith("No pretrained configuration")
)


def build(config: Network) -> "nn.Module":
    """The module that `config` describes, with fresh weights from torch's global generator, in training mode.

    Raises InputError for a network that is not registered with timm, and for one that timm does not make so.
    """
    if isinstance(config, ModelConfig):
        from expertgrid.model.net import ExpertNet

        return ExpertNet(config)
    if not timm.is_model(config.timm):
        raise InputError(f"model {config.timm!r}: unknown to timm; --import MODULE registers networks")
    try:
        return create(config, copy.deepcopy(config.arguments))
    except (MemoryError, InputError):
        raise
    except Exception as error:  # of a tag, of what a network needs, or of a user's code
        raise InputError(f"model {config.timm!r}: it cannot be made: {reason_of(error)}") from error


def create(config: TimmModel, arguments: Mapping[str, Any]) -> "nn.Module":
    """timm's network of this name with these arguments. Raises whatever its code raises."""
    return timm.create_model(config.timm, in_chans=config.in_chans, num_classes=config.num_classes, **arguments)


def classifiers(net: "nn.Module") -> tuple[str, ...]:
    """The names of a network's classifiers, as timm knows them; else of its last linear layer."""
    from torch.nn import Linear

    known = getattr(net, "pretrained_cfg", {}).get("classifier")
    linear = [name for name, part in net.named_modules() if isinstance(part, Linear)]
    return (known,) if isinstance(known, str) else tuple(known or linear[-1:])


def is_users(config: Network) -> bool:
    """Whether the network is one that a user's module registers: its code can change while its name stays."""
    if isinstance(config, ModelConfig) or not timm.is_model(config.timm):
        return False
    function = timm.model_entrypoint(config.timm.partition(".")[0])
    return function.__module__.partition(".")[0] not in ("timm", "expertgrid")


def register_networks(module: ModuleType) -> None:
    """Registers the classes of networks in a user's module with timm, which then makes them by their names.

    A class gets `in_chans` and `num_classes` where it takes them. A name that timm has already is left alone.
    """
    from torch import nn

    for name, network in list(vars(module).items()):
        if not isinstance(network, type) or not issubclass(network, nn.Module):
            continue
        if network.__module__.partition(".")[0] in ("torch", "torchvision", "timm", "expertgrid"):
            continue
        if not timm.is_model(name):
            _register_class(name, module.__name__, inspect.signature(network))
        if name in CLASSES:
            CLASSES[name][network.__module__] = network


def _register_class(name: str, module: str, signature: inspect.Signature) -> None:
    takes = signature.parameters.values()
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes)
    left_out: Any = () if takes_all else tuple({"in_chans", "num_classes"} - signature.parameters.keys())

    def create(pretrained: bool = False, **arguments: Any) -> "nn.Module":
        if len(homes := CLASSES[name]) > 1:
            raise InputError(f"model {name!r}: {' and '.join(homes)} both have a class of this name")
        (network,) = homes.values()
        return build_model_with_cfg(network, name, pretrained, kwargs_filter=left_out, **arguments)

    CLASSES[name] = {}
    create.__name__, create.__signature__ = name, signature  # ty: ignore[missing-attribute]
    register_model(create).__module__ = module  # which `is_users` reads


@contextmanager
def for_shapes(config: Network) -> Generator[None]:
    """Where a network is made to be looked at: on the device "meta", which has no memory; a user's on the CPU.

    Users' networks may load or compute weights as they are made. The state of torch's random numbers is kept.
    """
    import torch

    with torch.random.fork_rng(devices=[]), torch.device("cpu" if is_users(config) else "meta"):
        yield


def _first_convs(config: ModelConfig) -> str | tuple[str, ...] | None:
    """The convolutions that see the image; None for a network that begins with another layer, as no preset does."""
    first = config.layers[0]
    match first:
        case Conv() | Whiten():
            return "layers.0.conv"
        case Block():
            return tuple(f"layers.0.experts.{k}.conv" for k in range(len(first.kernels)))
    return None


def _default_cfg(config: ModelConfig) -> dict[str, Any]:
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


def _create(name: str, config: ModelConfig, pretrained: bool, **kwargs: Any) -> "ExpertNet":
    from expertgrid.model.net import ExpertNet

    features = {"out_indices": tuple(range(sum(layer.has_weights for layer in config.layers))), "feature_cls": "getter"}
    return build_model_with_cfg(ExpertNet, name, pretrained, model_cfg=config, feature_cfg=features, **kwargs)


@register_model
def expertnet(pretrained: bool = False, config: Mapping[str, Any] | None = None, **kwargs: Any) -> "ExpertNet":
    """The network that `config` describes: a `ModelConfig` as JSON has it, as in a published folder's `model_args`.

    Without a config, as in a loop over timm's models, it is the preset `two_block`. Raises InputError for a config that
    describes no network.
    """
    try:
        described = PRESETS["two_block"] if config is None else ModelConfig.model_validate(config)
    except ValidationError as error:
        raise invalid("model 'expertnet': config", error) from None
    kwargs["pretrained_cfg"] = kwargs.get("pretrained_cfg") or {  # timm's own defaults have 1,000 classes
        "num_classes": described.num_classes,
        "input_size": (described.in_chans, 32, 32),
        "first_conv": _first_convs(described),
        "classifier": "head.classifier",
    }
    return _create("expertnet", described, pretrained, **kwargs)


def _register(name: str, config: ModelConfig) -> None:
    def create(pretrained: bool = False, **kwargs: Any) -> "ExpertNet":
        return _create(f"expertnet_{name}", config, pretrained, **kwargs)

    create.__name__ = create.__qualname__ = f"expertnet_{name}"
    create.__doc__ = f"The preset `{name}`; see `model.presets.PRESETS`."
    setattr(sys.modules[__name__], create.__name__, register_model(create))


for _name, _config in PRESETS.items():
    _register(_name, _config)
