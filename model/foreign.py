"""Networks that are not ours, before anything is trained: what they are built of, and what they take and give."""

import copy
import inspect
import json
from typing import Any

import timm
import torch
from torch import Tensor, nn

from expertgrid.model.config import DECIDED_ELSEWHERE, Structure, TimmModel
from expertgrid.model.cost import Size, counted
from expertgrid.model.registry import build, create, for_shapes, is_users
from expertgrid.model.system.errors import InputError, reason_of, unknown


def described(config: TimmModel, size: Size, data: str) -> TimmModel:
    """`config` with its structure, where a name alone does not say what is built; and with `img_size` where needed.

    `size` is height and width of the images of `data`. Raises InputError for arguments that the network refuses or
    does not use, for images that it does not take, and for outputs that are no logits.
    """
    with for_shapes(config):
        try:
            net = build(config)
        except InputError as error:
            raise _refusal(config, error) if config.arguments and error.__cause__ else error from None
        for name, value in config.arguments.items():
            if not _is_used(config, name, size):
                if name not in (accepted := _accepted(config, net)):
                    raise unknown(f"argument of {config.timm}:", name, accepted)
                raise InputError(f"model.{name} = {json.dumps(value)}: {config.timm} does not use this argument")
        try:
            images_BCHW = torch.zeros(2, config.in_chans, *size)
            _, macs = counted(net, images_BCHW[:1])
            with torch.no_grad():
                evaluated, trained = (net.train(training)(images_BCHW) for training in (False, True))
        except Exception as error:  # a user's network may fail in any way
            if "img_size" in config.arguments or "img_size" not in _accepted(config, net):
                text = f"model {config.timm} does not take the {size[0]}x{size[1]} images of {data}"
                raise InputError(f"{text}: {reason_of(error)}") from None
            fitting: Any = size[0] if size[0] == size[1] else list(size)
            return described(config.change(arguments={**config.arguments, "img_size": fitting}), size, data)
        for outputs, when in ((evaluated, "in evaluation"), (trained, "in training")):
            if found := _no_logits(outputs, config.num_classes):
                text = f"model {config.timm} gives {found} {when}"
                raise InputError(f"{text}; logits are needed, a tensor of images x {config.num_classes} classes")
        if not config.arguments and not is_users(config):
            return config
        shapes = {name: tuple(parameter.shape) for name, parameter in net.named_parameters()}
        return config.change(structure=Structure(parameters=shapes, macs=macs))


def _no_logits(outputs: object, classes: int) -> str:
    """What the outputs for 2 images are, where they are no logits; "" for logits."""
    if not isinstance(outputs, Tensor):
        return f"a {type(outputs).__name__}{f' of {len(outputs)}' if isinstance(outputs, tuple | list | dict) else ''}"
    if outputs.ndim != 2 or len(outputs) != 2:
        return f"a {'feature map' if outputs.ndim == 4 else 'tensor'} {'x'.join(map(str, outputs.shape))} for 2 images"
    if outputs.shape[1] != classes:
        return f"{outputs.shape[1]:,} outputs for {classes} classes"
    return "" if outputs.is_floating_point() else f"outputs of {outputs.dtype}"


def _without(config: TimmModel, name: str) -> TimmModel:
    return config.change(arguments={other: value for other, value in config.arguments.items() if other != name})


def _accepted(config: TimmModel, net: nn.Module | None) -> list[str]:
    """The arguments that the signatures name: of the function that timm calls, and of the network's classes."""
    functions = [timm.model_entrypoint(config.timm.partition(".")[0])]
    functions += [kind.__init__ for kind in type(net).__mro__ if "__init__" in vars(kind)] if net else []
    names: list[str] = []
    for function in functions:
        parameters = list(inspect.signature(function).parameters.values())
        names += [one.name for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
        if not any(one.kind is one.VAR_KEYWORD for one in parameters):
            break
    return [name for name in dict.fromkeys(names) if name not in DECIDED_ELSEWHERE and name != "self"]


def _refusal(config: TimmModel, error: InputError) -> InputError:
    """Why a network is not made, with the argument to blame: the one without which it is made, or all."""

    def made(other: TimmModel) -> nn.Module | None:
        try:
            return build(other)
        except InputError:
            return None

    cause = error.__cause__ or error
    if isinstance(cause, TypeError):
        accepted = _accepted(config, made(config.change(arguments={})))
        for name in config.arguments.keys() - set(accepted):
            return unknown(f"argument of {config.timm}:", name, accepted)
    blamed = [name for name in config.arguments if made(_without(config, name))] or list(config.arguments)
    values = ", ".join(f"model.{name} = {json.dumps(config.arguments[name])}" for name in blamed)
    return InputError(f"{values}: {config.timm} does not take it: {reason_of(cause)}")


def _is_used(config: TimmModel, name: str, size: Size) -> bool:
    """Whether a network looks at an argument, or is another one with its value, true or false than without it.

    The value is replaced by an object that notices whatever is done with it, but for `is` and passing it on.
    """
    touched = False

    def touch(*_: object, **__: object) -> None:
        nonlocal touched
        touched = True
        raise TypeError("looked at")

    special = {name for kind in (int, float, str, list, dict) for name in dir(kind) if name.startswith("__")}
    special -= {"__new__", "__init__", "__class__", "__doc__", "__init_subclass__", "__subclasshook__", "__setattr__"}
    watched = type("Watched", (), dict.fromkeys([*special, "__call__"], touch))()

    def computed(**argument: object) -> list[Tensor]:
        torch.manual_seed(0)
        net = create(config, {**copy.deepcopy(_without(config, name).arguments), **argument})
        outputs = [net.train(training)(torch.rand(2, config.in_chans, *size)) for training in (True, False)]
        return [*net.state_dict().values(), *outputs]

    with torch.device("cpu"), torch.no_grad():
        try:
            computed(**{name: watched})
            without = computed()
            for value in (config.arguments[name], True, False):
                tensors = computed(**{name: value})
                if len(tensors) != len(without) or not all(map(torch.equal, tensors, without)):
                    return True
        except Exception:  # a network that fails with another value has looked at it
            return True
    return touched
