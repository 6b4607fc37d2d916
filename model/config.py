"""The config of a soft-expert convolutional network: plain data that says which modules a network has.

A block runs K convolution experts on the same input and mixes their outputs with one weight per expert and image:

    o = sum_k a_k * expert_k(x),    a = softmax(g(mean over H, W of x) / temperature)

`model.net` builds the modules. This file imports no torch, so a plan or a table is read without it.
"""

import json
from collections.abc import Callable, Iterator
from functools import reduce
from typing import Annotated, Any, ClassVar, Literal, Self

import pydantic
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from expertgrid.model.system.errors import InputError, invalid


def _odd(kernel: int) -> int:
    if kernel % 2 == 0:
        raise ValueError("kernel sizes are odd, so that a padding of kernel // 2 keeps the image size")
    return kernel


WIDEST = 4096  # channels or hidden units of a layer
LARGE = 2**400  # pixels: a height or width beside which borders are nothing

Count = Annotated[int, Field(ge=1, le=WIDEST, strict=True)]
Kernel = Annotated[int, Field(ge=1, le=15, strict=True), AfterValidator(_odd)]
Stride = Annotated[int, Field(ge=1, le=4, strict=True)]
Probability = Annotated[float, Field(ge=0, lt=1)]
NormAct = Literal["expert", "mix", "none"]

SMALLEST_HIDDEN = 8  # a bottleneck of one or two ReLU units would often be dead from the start


class Spec(BaseModel):
    """A part of a network as data: frozen, compared by value, and without unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def change(self, **fields: Any) -> Self:
        """This part with other fields. They are validated again."""
        return type(self)(**{**dict(self), **fields})


class LayerSpec(Spec):
    """A layer, and what it does to the channels and to the height and width of an image."""

    has_weights: ClassVar[bool] = True  # its output is one of the features that timm's interface gives

    def out_channels(self, channels: int) -> int:
        """The channels after this layer, given those before it."""
        return channels

    def out_pixels(self, pixels: int) -> int:
        """The height or width after this layer, given the one before it. Below 1, no pixel is left."""
        return pixels

    @property
    def reduction(self) -> int:
        """The factor by which this layer divides height and width, but for what happens at the border."""
        return round(LARGE / self.out_pixels(LARGE))


class GateConfig(Spec):
    """How the K mixing weights come from the mean of the block's input.

    `linear` is one linear layer, `mlp` has hidden layers with ReLU, `uniform` is 1 / K for each expert and has no
    parameters, `constant` is one learned weight for each expert, the same for all images. The hidden sizes are given
    as `hidden`, or as `reduction`: one hidden layer of max(8, channels // reduction), which `ModelConfig` works out.

    Two controls ask whether routing matters. A `frozen` gate keeps its random initial weights. A `shuffled` gate sees
    the features of another image of the batch, the image before it. A network with shuffled gates cannot be exported.
    """

    kind: Literal["linear", "mlp", "uniform", "constant"] = "linear"
    hidden: tuple[Count, ...] = ()
    reduction: Count | None = None
    temperature: float = Field(1.0, gt=0, le=1000)
    frozen: bool = False
    shuffled: bool = False

    @model_validator(mode="after")
    def _sizes_belong_to_an_mlp(self) -> Self:
        sizes = len(self.hidden) > 0, self.reduction is not None
        if self.kind == "mlp" and sum(sizes) != 1:
            raise ValueError("an mlp gate needs its hidden sizes, or a reduction, and not both")
        if self.kind != "mlp" and any(sizes):
            raise ValueError(f"a {self.kind} gate has no hidden layers")
        if self.kind == "uniform" and self.temperature != 1:
            raise ValueError("a uniform gate has no temperature")
        if self.kind in ("uniform", "constant") and (self.frozen or self.shuffled):
            raise ValueError(f"a {self.kind} gate is the same for all images: it is not frozen or shuffled")
        return self


class NormConfig(Spec):
    """The batch norms of a network: how much a batch counts in the running statistics, and whether they scale.

    Training in few steps needs a large momentum. Without `scale` a norm only shifts: its weight stays 1.
    """

    momentum: float = Field(0.1, gt=0, le=1)
    scale: bool = True


class Whiten(LayerSpec):
    """The stem of the CIFAR speed runs: filters that whiten the patches of the train images, and their negatives.

    Only its bias is learned; `ExpertNet.fit_stem` sets the filters. It has 2 x input channels x kernel x kernel
    channels, no padding, and an activation. (github.com/KellerJordan/cifar10-airbench; 2404.00498)
    """

    kind: Literal["whiten"] = "whiten"
    kernel: Annotated[int, Field(ge=2, le=5, strict=True)] = 2

    def out_channels(self, channels: int) -> int:
        return 2 * channels * self.kernel**2

    def out_pixels(self, pixels: int) -> int:
        return pixels - self.kernel + 1


class Conv(LayerSpec):
    """A plain convolution; with `norm_act` without bias and followed by batch norm and ReLU.

    `pool` is max pooling between the convolution and its norm, which then have fewer pixels to work on.
    """

    kind: Literal["conv"] = "conv"
    channels: Count
    kernel: Kernel = 3
    stride: Stride = 1
    padding: int | None = Field(None, ge=0, le=7, validate_default=True, description="kernel // 2 where not given")
    norm_act: bool = True
    pool: Annotated[int, Field(ge=1, le=8, strict=True)] = 1

    @field_validator("padding")
    @classmethod
    def _same_by_default(cls, padding: int | None, info: ValidationInfo) -> int | None:
        return info.data["kernel"] // 2 if padding is None and "kernel" in info.data else padding

    def out_channels(self, channels: int) -> int:
        return self.channels

    def conv_pixels(self, pixels: int) -> int:
        """The height or width after the convolution, before the pooling."""
        return (pixels + 2 * (self.padding or 0) - self.kernel) // self.stride + 1

    def out_pixels(self, pixels: int) -> int:
        return self.conv_pixels(pixels) // self.pool


class Block(LayerSpec):
    """K parallel convolution experts, one for each of `kernels`, and the gate that mixes them.

    `norm_act` says where batch norm and ReLU are: in each expert, after the mix, or nowhere (experts then have a bias).
    The experts are a set, so `kernels` is kept sorted, largest first. One expert alone needs no gate, and norm and
    activation after "the mix" are then its own: these fields are brought to one form, so that equal networks are
    equal configs.
    """

    kind: Literal["block"] = "block"
    channels: Count
    kernels: Annotated[tuple[Kernel, ...], Field(min_length=1, max_length=64)] = (3, 3, 3)
    stride: Stride = 1
    norm_act: NormAct = Field("expert", validate_default=True)
    gate: GateConfig | None = Field(GateConfig(), validate_default=True)

    @field_validator("kernels")
    @classmethod
    def _experts_are_a_set(cls, kernels: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted(kernels, reverse=True))

    @field_validator("norm_act")
    @classmethod
    def _one_expert_is_the_mix(cls, norm_act: NormAct, info: ValidationInfo) -> NormAct:
        return "expert" if norm_act == "mix" and len(info.data.get("kernels", ())) == 1 else norm_act

    @field_validator("gate")
    @classmethod
    def _one_expert_has_no_gate(cls, gate: GateConfig | None, info: ValidationInfo) -> GateConfig | None:
        if len(info.data.get("kernels", ())) == 1:
            return None
        if gate is None:
            raise ValueError("a block of several experts needs a gate")
        return gate

    def out_channels(self, channels: int) -> int:
        return self.channels

    def out_pixels(self, pixels: int) -> int:
        return (pixels - 1) // self.stride + 1

    def resolved(self, channels: int) -> "Block":
        """This block after `channels` channels: its gate's `reduction` is written as `hidden`."""
        if self.gate is None or self.gate.reduction is None:
            return self
        hidden = max(SMALLEST_HIDDEN, channels // self.gate.reduction)
        return self.change(gate=self.gate.change(hidden=(hidden,), reduction=None))


class Residual(LayerSpec):
    """A macro block: its input is added to the output of `layers`, through a 1x1 convolution where shapes differ."""

    kind: Literal["residual"] = "residual"
    layers: Annotated[
        tuple[Annotated["Conv | Block | Residual", Field(discriminator="kind")], ...], Field(min_length=1)
    ]

    @field_validator("layers")
    @classmethod
    def _keep_the_size(cls, layers: tuple["Layer", ...]) -> tuple["Layer", ...]:
        for layer in layers:
            if isinstance(layer, Conv) and (layer.padding != layer.kernel // 2 or layer.pool > 1):
                raise ValueError("inside a residual macro block a conv has padding kernel // 2 and no pooling")
        return layers

    def out_channels(self, channels: int) -> int:
        return reduce(lambda before, layer: layer.out_channels(before), self.layers, channels)

    def out_pixels(self, pixels: int) -> int:
        return reduce(lambda before, layer: layer.out_pixels(before), self.layers, pixels)

    def has_projection(self, channels: int) -> bool:
        """Whether the input, of `channels` channels, needs a 1x1 convolution to have the shape of the output."""
        return self.out_channels(channels) != channels or self.reduction > 1


class Pool(LayerSpec):
    """Pooling over non-overlapping size x size windows."""

    has_weights: ClassVar[bool] = False

    kind: Literal["pool"] = "pool"
    op: Literal["max", "avg"] = "max"
    size: Annotated[int, Field(ge=2, le=8)] = 2

    def out_pixels(self, pixels: int) -> int:
        return pixels // self.size


class Dropout(LayerSpec):
    """Dropout of single activations."""

    has_weights: ClassVar[bool] = False

    kind: Literal["dropout"] = "dropout"
    p: Probability


Layer = Annotated[Whiten | Conv | Block | Residual | Pool | Dropout, Field(discriminator="kind")]


def _blocks(layers: tuple[Layer, ...]) -> Iterator[Block]:
    for layer in layers:
        if isinstance(layer, Residual):
            yield from _blocks(layer.layers)
        elif isinstance(layer, Block):
            yield layer


def _map_blocks(layers: tuple[Layer, ...], channels: int, change: Callable[[Block, int], Block]) -> tuple[Layer, ...]:
    """Layers after `channels` channels, with `change` applied to each expert block and the channels before it."""
    changed = []
    for layer in layers:
        if isinstance(layer, Residual):
            changed.append(layer.change(layers=_map_blocks(layer.layers, channels, change)))
        else:
            changed.append(change(layer, channels) if isinstance(layer, Block) else layer)
        channels = layer.out_channels(channels)
    return tuple(changed)


class HeadConfig(Spec):
    """Global pooling, hidden linear layers with ReLU, and the classifier; dropout is before the last linear layers.

    `pool` is one of timm's global pools, or "" for a network that returns its feature map (`num_classes` 0). What
    enters the classifier is multiplied by `scale`: below 1 the first steps are small and the loss starts near log N.
    """

    pool: Literal["avg", "max", "avgmax", ""] = "avg"
    hidden: tuple[Count, ...] = ()
    dropout: Probability = 0.0
    scale: float = Field(1.0, gt=0, le=1000)


class ModelConfig(Spec):
    """A whole network. Two configs that describe the same network are equal.

    Its convolutions start from Kaiming normal weights, or with `init` "dirac" as the identity on their first input
    channels; a block's experts, of which only the first does so, and what is left start from PyTorch's default.
    """

    in_chans: Count = 3
    num_classes: int = Field(10, ge=0, le=100_000)
    layers: Annotated[tuple[Layer, ...], Field(min_length=1)]
    head: HeadConfig = HeadConfig()
    norm: NormConfig = NormConfig()
    init: Literal["kaiming", "dirac"] = "kaiming"

    @field_validator("layers")
    @classmethod
    def _sizes_from_reductions(cls, layers: tuple[Layer, ...], info: ValidationInfo) -> tuple[Layer, ...]:
        if any(isinstance(layer, Whiten) for layer in layers[1:]):
            raise ValueError("only the first layer can be a whitening stem")
        return _map_blocks(layers, info.data["in_chans"], Block.resolved) if "in_chans" in info.data else layers

    @model_validator(mode="after")
    def _no_pool_no_classifier(self) -> Self:
        if self.head.pool == "" and self.num_classes:
            raise ValueError("a head without pooling returns the feature map: num_classes must be 0")
        return self

    def blocks(self) -> Iterator[Block]:
        """Every expert block, macro blocks opened, in order."""
        return _blocks(self.layers)

    def map_blocks(self, change: Callable[[Block], Block]) -> "ModelConfig":
        """This network with `change` applied to each expert block."""
        return self.change(layers=_map_blocks(self.layers, self.in_chans, lambda block, _: change(block)))

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the feature map before the head. Raises ValueError where a layer is left no pixel."""
        for layer in self.layers:
            size = height, width
            height, width = map(layer.out_pixels, size)
            if min(height, width) < 1:
                raise ValueError(f"its {layer.kind} layer gets {size[0]}x{size[1]} pixels and leaves none")
        return height, width


class Structure(Spec):
    """What a network that is not ours is built of, as far as it can be counted."""

    parameters: dict[str, tuple[int, ...]]  # their shapes by name
    macs: int  # multiply-accumulates of one image of the study


# Keyword arguments of `timm.create_model` that are no arguments of the network, and where each is decided.
DECIDED_ELSEWHERE = {
    **dict.fromkeys(("in_chans", "num_classes"), "it follows from the data"),
    **dict.fromkeys(
        ("pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "pretrained_strict"),
        "`weights` says what a network starts from",
    ),
    **dict.fromkeys(("features_only", "out_indices", "feature_cfg"), "a study trains classifiers"),
    **dict.fromkeys(("scriptable", "exportable", "no_jit"), "`expertgrid export` makes a network that can be exported"),
    **dict.fromkeys(("device", "dtype"), "--device and the recipe's bfloat16 say where and how a network is computed"),
}


class TimmModel(Spec):
    """A network of timm's registry, untrained: one of timm, or one that a user's module has registered.

    `arguments` are keyword arguments of `timm.create_model`. `structure` is that of a user's network, and of one of
    timm with arguments: it is part of the id, as a name does not say what the code behind it builds.
    """

    timm: str
    in_chans: Count = 3
    num_classes: Count = 10
    arguments: dict[str, Any] = {}  # values as JSON has them
    structure: Structure | None = None

    @field_validator("arguments")
    @classmethod
    def _are_of_the_network(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        for name in arguments.keys() & DECIDED_ELSEWHERE.keys():
            raise ValueError(f"{name} cannot be set: {DECIDED_ELSEWHERE[name]}")
        return arguments

    def __hash__(self) -> int:
        return hash((self.timm, self.in_chans, self.num_classes))


Network = ModelConfig | TimmModel


def parse_config(text: str, where: str) -> Network:
    """A network's config from JSON. Raises InputError, naming `where`, for text that describes no network."""
    try:
        fields = json.loads(text)
        kind = TimmModel if isinstance(fields, dict) and "timm" in fields else ModelConfig
        return kind.model_validate(fields)
    except pydantic.ValidationError as error:
        raise invalid(f"{where}: config", error) from None
    except (ValueError, RecursionError):  # ValueError: a number of thousands of digits, too
        raise InputError(f"{where}: the network's config is not JSON") from None
