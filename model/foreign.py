"""Networks that are not ours, before anything is trained: what they are built of, and what they take and give."""

import copy
import inspect
import json
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn

from expertgrid.model.config import DECIDED_ELSEWHERE, Structure, TimmModel
from expertgrid.model.cost import Size, counted
from expertgrid.model.probe import Probe
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
            raise _refusal(config, error) from None
        for name, value in config.arguments.items():
            if not _is_used(config, name, size):
                if name not in (accepted := _accepted(config, net)):
                    raise unknown(f"argument of {config.timm}:", name, accepted)
                raise InputError(f"model.{name} = {json.dumps(value)}: {config.timm} does not use this argument")
        images_BCHW = torch.zeros(2, config.in_chans, *size)
        try:
            _, macs = counted(net, images_BCHW[:1])
            with torch.no_grad():
                wrong = {mode: _no_logits(net.train(mode)(images_BCHW), config.num_classes) for mode in (False, True)}
        except Exception as error:  # a user's network may fail in any way
            if "img_size" in config.arguments or "img_size" not in _accepted(config, net):
                text = f"model {config.timm} does not take the {size[0]}x{size[1]} images of {data}"
                raise InputError(f"{text}: {reason_of(error)}") from None
            fitting: Any = size[0] if size[0] == size[1] else list(size)
            return described(config.change(arguments={**config.arguments, "img_size": fitting}), size, data)
        for mode, found in wrong.items():
            if found:
                when = "in training" if mode else "in evaluation"
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


def _without(config: TimmModel, name: str) -> TimmModel:
    return config.change(arguments={other: value for other, value in config.arguments.items() if other != name})


def _refusal(config: TimmModel, error: InputError) -> InputError:
    """Why a network is not made, with the argument to blame."""
    if not config.arguments:
        return error

    def made(other: TimmModel) -> nn.Module | None:
        try:
            return build(other)
        except InputError:
            return None

    cause = error.__cause__ or error
    accepted = _accepted(config, made(config.change(arguments={})))
    if isinstance(cause, TypeError):
        for name in config.arguments:
            if name not in accepted:
                return unknown(f"argument of {config.timm}:", name, accepted)
    blamed = [name for name in config.arguments if made(_without(config, name))] or list(config.arguments)
    values = ", ".join(f"model.{name} = {json.dumps(config.arguments[name])}" for name in blamed)
    return InputError(f"{values}: {config.timm} does not take it: {reason_of(cause)}")


class _Touched(Exception):
    """Raised where code looks at the value that stands for an argument."""


def _is_used(config: TimmModel, name: str, size: Size) -> bool:
    """Whether a network looks at an argument, or is another one where its value is true, false or the one given.

    The argument is first an object that notices whatever is done with it, but for `is` and passing it on.
    """
    touched = False

    def touch(*_: object, **__: object) -> None:
        nonlocal touched
        touched = True
        raise _Touched

    kept = {"__new__", "__init__", "__class__", "__doc__", "__init_subclass__", "__subclasshook__", "__setattr__"}
    special = {method for kind in (int, float, str, list, dict) for method in dir(kind) if method.startswith("__")}
    watched = type("Watched", (), dict.fromkeys(special - kept | {"__call__"}, touch))()

    def given(value: object) -> Iterator[Tensor]:
        """Parameters, buffers and outputs with this value of the argument; without it where the value is `_Touched`."""
        rest = copy.deepcopy(_without(config, name).arguments)
        torch.manual_seed(0)
        net = create(config, rest if value is _Touched else {**rest, name: value})
        yield from net.state_dict().values()
        for mode in (True, False):
            yield net.train(mode)(torch.rand(2, config.in_chans, *size))

    with torch.device("cpu"), torch.no_grad():
        try:
            list(given(watched))
            plain = list(given(_Touched))
            for value in (config.arguments[name], True, False):
                other = list(given(value))
                if len(other) != len(plain) or not all(map(torch.equal, other, plain)):
                    return True
        except Exception:  # a network that fails with another value has looked at it
            return True
    return touched


def probe(config: TimmModel, size: Size) -> Probe:
    """What the code that is imported now computes on images of `size`. Raises InputError where it fails.

    The random weights are moved a little after they are read, so that no part is silent as it begins at zero.
    """
    try:
        return _probe(config, size, "float64")
    except Exception:  # such as code that makes float32 tensors itself
        pass
    try:
        return _probe(config, size, "float32")
    except Exception as error:
        raise InputError(f"model {config.timm}: cannot be trained: {reason_of(error)}") from error


def _probe(config: TimmModel, size: Size, number: Literal["float64", "float32"]) -> Probe:
    dtype = getattr(torch, number)
    random = partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=dtype)
    values: dict[str, list[float]] = {}

    def enter(kind: str, tensors: list[Tensor | None], whole: bool = False) -> None:
        """Enters the norm and a projection of each tensor, or all its values."""
        there = [torch.zeros(1) if tensor is None else tensor.detach() for tensor in tensors]
        pairs = [
            tensor if whole else torch.stack([tensor.norm(), (tensor * random(tensor.shape)).sum()]) for tensor in there
        ]
        values[kind] = torch.cat([pair.flatten() for pair in pairs]).nan_to_num(0, 0, 0).tolist()

    before = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.enable_grad():
        torch.set_default_dtype(dtype)
        try:
            torch.default_generator.manual_seed(0)
            net = build(config).to(dtype)
            images_BCHW = random(4, config.in_chans, *size)
            parameters = [parameter for _, parameter in sorted(net.named_parameters())]
            enter("first weights", list(parameters))
            with torch.no_grad():
                for parameter in parameters:
                    parameter += 0.02 * random(parameter.shape)
            for mode, when in ((True, "in training"), (False, "in evaluation")):
                net.zero_grad()
                outputs_BN = net.train(mode)(images_BCHW)
                (outputs_BN * random(outputs_BN.shape)).sum().backward()
                enter(f"outputs {when}", [outputs_BN], whole=True)
                enter(f"gradients {when}", [parameter.grad for parameter in parameters])
        finally:
            torch.set_default_dtype(before)
    return Probe(dtype=number, values=values)
