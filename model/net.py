"""The modules of a soft-expert convolutional network, as its config describes them.

Shapes: B images, K experts, C channels, H x W pixels, F features after pooling, N classes.
"""

from typing import cast

import torch
from timm.layers import SelectAdaptivePool2d, register_notrace_function
from timm.models import checkpoint, checkpoint_seq
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from expertgrid.model.config import (
    Block,
    Conv,
    Dropout,
    GateConfig,
    HeadConfig,
    Layer,
    ModelConfig,
    NormConfig,
    Pool,
    Residual,
    Whiten,
)

SMALLEST_VARIANCE = 5e-4  # added to the variances that whitening divides by: patches hardly vary in some directions


def _fix(module: nn.Module, *names: str) -> None:
    """Makes buffers of parameters, under their names: they are saved and moved with the network, and never trained."""
    for name in names:
        value = getattr(module, name).detach()
        delattr(module, name)
        module.register_buffer(name, value)


def _batch_norm(channels: int, config: NormConfig) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels, momentum=config.momentum)
    if not config.scale:
        _fix(norm, "weight")
    return norm


class WhiteningStem(nn.Sequential):
    """Patches whitened by fixed filters, with a learned bias, and ReLU: (B, C, H, W) to (B, 2Ckk, H - k + 1, ...).

    The filters are a buffer: `fit` sets them, and training does not change them.
    """

    def __init__(self, config: Whiten, in_chs: int):
        super().__init__()
        self.conv = nn.Conv2d(in_chs, config.out_channels(in_chs), config.kernel)
        _fix(self.conv, "weight")
        self.act = nn.ReLU(inplace=True)

    @torch.no_grad()
    def fit(self, x_BCHW: Tensor) -> None:
        """Sets the filters to the eigenvectors of the patches' covariance, each over its standard deviation."""
        kernel = self.conv.kernel_size[0]
        patches_PCkk = x_BCHW.unfold(2, kernel, 1).unfold(3, kernel, 1).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
        patches_PF = patches_PCkk.flatten(1)
        eigenvalues_F, eigenvectors_FF = torch.linalg.eigh((patches_PF.T @ patches_PF / len(patches_PF)).double())
        filters_FF = (eigenvectors_FF / (eigenvalues_F + SMALLEST_VARIANCE).sqrt()).T.flip(0)  # largest first
        filters_FCkk = filters_FF.unflatten(1, patches_PCkk.shape[1:])
        self.conv.weight.copy_(torch.cat([filters_FCkk, -filters_FCkk]))
        assert self.conv.bias is not None  # nn.Conv2d makes one, unless it is told not to
        self.conv.bias.zero_()


class ConvNormAct(nn.Sequential):
    """A convolution; with `norm_act` without bias and followed by batch norm and ReLU. (B, C, H, W) to the same."""

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        kernel: int,
        stride: int,
        padding: int,
        norm: NormConfig | None,
        pool: int = 1,
    ):
        super().__init__()
        self.conv = nn.Conv2d(in_chs, out_chs, kernel, stride, padding, bias=norm is None)
        if pool > 1:
            self.pool = nn.MaxPool2d(pool)
        if norm is not None:
            self.norm = _batch_norm(out_chs, norm)
            self.act = nn.ReLU(inplace=True)

    # ty: it has another name than in nn.Sequential; modules are called with their input by its position
    def forward(self, x_BCHW: Tensor) -> Tensor:  # ty: ignore[lost-keyword-for-regular-parameter]
        # Not left to nn.Sequential: torch 2.11 does not compile a module whose forward is PyTorch's own.
        for part in self:
            x_BCHW = part(x_BCHW)
        return x_BCHW


@register_notrace_function  # torch.fx then has one node of it in training and in evaluation
def pixel_mean(x_BCHW: Tensor, training: bool) -> Tensor:
    """The mean of each image's pixels: (B, C, H, W) to (B, C).

    In training it is a sum, whose gradient is a view of its output's. That of a mean would be written as a map, and not
    in channels-last. The sum's type is named, as CUDA's autocast would sum in float32, and then write a map too.
    """
    if not training:
        return x_BCHW.mean((2, 3))
    return x_BCHW.sum((2, 3), dtype=x_BCHW.dtype) / (x_BCHW.shape[2] * x_BCHW.shape[3])


class Gate(nn.Module):
    """The mixing weights of a block: one for each expert and image, (B, C, H, W) to (B, K). Each row sums to 1.

    The weights of a frozen gate are buffers.
    """

    def __init__(self, config: GateConfig, in_chs: int, experts: int):
        super().__init__()
        self.experts = experts
        self.temperature = config.temperature
        self.shuffled = config.shuffled
        self.mlp = None
        self.logits_K = nn.Parameter(torch.zeros(experts)) if config.kind == "constant" else None
        if config.kind in ("linear", "mlp"):
            sizes = (in_chs, *config.hidden)
            layers = [part for a, b in zip(sizes, sizes[1:]) for part in (nn.Linear(a, b), nn.ReLU(inplace=True))]
            self.mlp = nn.Sequential(*layers, nn.Linear(sizes[-1], experts))
        if config.frozen:
            for part in self.modules():
                _fix(part, *[name for name, _ in part.named_parameters(recurse=False)])

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if self.logits_K is not None:
            return torch.softmax(self.logits_K / self.temperature, dim=0).expand(x_BCHW.shape[0], -1)  # (B, K)
        if self.mlp is None:
            size, dtype = (x_BCHW.shape[0], self.experts), torch.float32  # in bfloat16 three thirds are 1.002
            return torch.full(size, 1 / self.experts, dtype=dtype, device=x_BCHW.device)  # (B, K)
        return self.routed(pixel_mean(x_BCHW, self.training))

    def routed(self, features_BC: Tensor) -> Tensor:
        """The mixing weights (B, K) for the features (B, C) of a linear or mlp gate."""
        assert self.mlp is not None, "a uniform or constant gate does not look at the features"
        if self.shuffled:
            features_BC = features_BC.roll(1, dims=0)
        logits_BK = self.mlp(features_BC)
        return torch.softmax(logits_BK if self.temperature == 1 else logits_BK / self.temperature, dim=1)  # (B, K)


class ExpertBlock(nn.Module):
    """K experts on the same input, mixed by a gate: (B, C, H, W) to (B, channels, H / stride, W / stride)."""

    def __init__(self, config: Block, in_chs: int, norm: NormConfig):
        super().__init__()
        self.config = config
        in_expert = norm if config.norm_act == "expert" else None
        experts = [
            ConvNormAct(in_chs, config.channels, kernel, config.stride, kernel // 2, in_expert)
            for kernel in config.kernels
        ]
        self.experts = nn.ModuleList(experts)
        self.gate = Gate(config.gate, in_chs, len(config.kernels)) if config.gate is not None else None
        self.norm_act = nn.Identity()
        if config.norm_act == "mix":
            self.norm_act = nn.Sequential(_batch_norm(config.channels, norm), nn.ReLU(inplace=True))
            for expert in experts:
                expert.conv.bias = None  # the norm after the mix would take it away again

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if self.gate is None:
            return self.norm_act(self.experts[0](x_BCHW))
        mix_BCHW = self.experts[0](x_BCHW)
        # In the experts' type: under autocast softmax gives float32, which would make float32 of all that follows.
        gate_KB111 = self.gate(x_BCHW).T[:, :, None, None, None].to(mix_BCHW.dtype).unbind()
        for k, expert in enumerate(self.experts):  # a loop that torch.fx and torch.jit can unroll
            mix_BCHW = gate_KB111[k] * mix_BCHW if k == 0 else mix_BCHW + gate_KB111[k] * expert(x_BCHW)
        return self.norm_act(mix_BCHW)

    def typed_experts(self) -> list[ConvNormAct]:
        """The experts with their type, which nn.ModuleList does not keep."""
        return [cast(ConvNormAct, expert) for expert in self.experts]


class MacroBlock(nn.Module):
    """Several layers whose input, projected by a 1x1 conv where it must be, is added to their output."""

    def __init__(self, config: Residual, in_chs: int, norm: NormConfig):
        super().__init__()
        self.layers = _sequence(config.layers, in_chs, norm)
        self.shortcut: nn.Module = nn.Identity()
        if config.has_projection(in_chs):
            self.shortcut = nn.Conv2d(in_chs, config.out_channels(in_chs), 1, config.reduction)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.layers(x_BCHW) + self.shortcut(x_BCHW)


def _module(layer: Layer, in_chs: int, norm: NormConfig) -> nn.Module:
    match layer:
        case Whiten():
            return WhiteningStem(layer, in_chs)
        case Conv(channels=channels, kernel=kernel, stride=stride, padding=padding, pool=pool):
            assert padding is not None  # Conv's validator fills it in
            return ConvNormAct(in_chs, channels, kernel, stride, padding, norm if layer.norm_act else None, pool)
        case Block():
            return ExpertBlock(layer, in_chs, norm)
        case Residual():
            return MacroBlock(layer, in_chs, norm)
        case Pool():
            return nn.MaxPool2d(layer.size) if layer.op == "max" else nn.AvgPool2d(layer.size)
        case Dropout():
            return nn.Dropout(layer.p)


def _sequence(layers: tuple[Layer, ...], channels: int, norm: NormConfig) -> nn.Sequential:
    modules = []
    for layer in layers:
        modules.append(_module(layer, channels, norm))
        channels = layer.out_channels(channels)
    return nn.Sequential(*modules)


class Head(nn.Module):
    """Feature map (B, C, H, W) to logits (B, N), or to what is before the classifier where `num_classes` is 0."""

    def __init__(self, config: HeadConfig, in_chs: int, num_classes: int):
        super().__init__()
        # timm's "fast" maximum is that of amax, which all exporters know.
        pool = config.pool if config.pool in ("", "avg") else f"fast{config.pool}"
        self.pool = SelectAdaptivePool2d(pool_type=pool, flatten=bool(pool))
        sizes = (in_chs, *(config.hidden if config.pool else ()))
        parts = []
        for i, (a, b) in enumerate(zip(sizes, sizes[1:])):
            parts += [nn.Dropout(config.dropout)] if i else []
            parts += [nn.Linear(a, b), nn.ReLU(inplace=True)]
        self.hidden = nn.Sequential(*parts)
        self.out_size = sizes[-1]
        self.dropout = nn.Dropout(config.dropout)
        self.scale = config.scale if config.pool else 1.0
        self.classifier = nn.Linear(self.out_size, num_classes) if num_classes else nn.Identity()

    def forward(self, x_BCHW: Tensor, pre_logits: bool = False) -> Tensor:
        x_BF = self.dropout(self.hidden(self.pool(x_BCHW)))
        if self.scale != 1:
            x_BF = self.scale * x_BF
        return x_BF if pre_logits else self.classifier(x_BF)  # (B, N)


class ExpertNet(nn.Module):
    """The network that a `ModelConfig` describes, with the behaviour of a timm model.

    Images (B, in_chans, H, W), normalised floats, to logits (B, num_classes). `in_chans`, `num_classes`,
    `global_pool` and `drop_rate` (the head's dropout), where given, replace what the config says, as in
    `timm.create_model`.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        in_chans: int | None = None,
        num_classes: int | None = None,
        global_pool: str | None = None,
        drop_rate: float | None = None,
    ):
        super().__init__()
        fields = {"in_chans": in_chans, "num_classes": num_classes}
        head = {"pool": global_pool, "dropout": drop_rate}
        self.config = cfg.change(
            **{name: value for name, value in fields.items() if value is not None},
            head=cfg.head.change(**{name: value for name, value in head.items() if value is not None}),
        )
        self.num_classes = self.config.num_classes
        self.global_pool = self.config.head.pool
        self.grad_checkpointing = False
        self.layers = _sequence(self.config.layers, self.config.in_chans, self.config.norm)
        self.feature_info, self.num_features = self._describe_features()
        self.head = Head(self.config.head, self.num_features, self.num_classes)
        self.head_hidden_size = self.head.out_size
        (_init_kaiming if self.config.init == "kaiming" else _init_dirac)(self)

    def fit_stem(self, x_BCHW: Tensor) -> None:
        """Sets the filters of a whitening stem from normalised train images; a network without one has none to set."""
        if isinstance(self.layers[0], WhiteningStem):
            self.layers[0].fit(x_BCHW)

    def _describe_features(self) -> tuple[list[dict], int]:
        """timm's `feature_info`, an entry for each layer that has weights, and the channels of the last one."""
        channels, reduction, info = self.config.in_chans, 1, []
        for i, layer in enumerate(self.config.layers):
            channels, reduction = layer.out_channels(channels), reduction * layer.reduction
            if layer.has_weights:
                info.append({"num_chs": channels, "reduction": reduction, "module": f"layers.{i}"})
        return info, channels

    def group_matcher(self, coarse: bool = False) -> dict:
        """timm's grouping of parameters by depth: the layers in order; `coarse`: those of one resolution together."""
        stem = r"^layers\.0\."
        if not coarse:
            return {"stem": stem, "blocks": r"^layers\.(\d+)\."}
        stages: dict[int, list[str]] = {}
        for info in self.feature_info[1:]:
            stages.setdefault(info["reduction"], []).append(info["module"].removeprefix("layers."))
        blocks = [(rf"^layers\.(?:{'|'.join(layers)})\.", (stage,)) for stage, layers in enumerate(stages.values())]
        return {"stem": stem, "blocks": blocks}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        return self.head.classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier for `num_classes` (0: none); the layers before it keep their weights."""
        pool = self.global_pool if global_pool is None else global_pool
        head_config = self.config.head.change(pool=pool)
        self.config = self.config.change(num_classes=num_classes, head=head_config)
        self.num_classes, self.global_pool = num_classes, pool
        weight = next(self.parameters())
        head = Head(head_config, self.num_features, num_classes).to(weight.device, weight.dtype)
        if len(head.hidden) == len(self.head.hidden):
            head.hidden = self.head.hidden
        self.head = head.train(self.training)
        self.head_hidden_size = head.out_size

    def forward_features(self, x_BCHW: Tensor) -> Tensor:
        if not torch.jit.is_scripting() and self.grad_checkpointing and self.training:
            return checkpoint_seq(self.layers, x_BCHW)
        return self.layers(x_BCHW)

    def forward_head(self, x_BCHW: Tensor, pre_logits: bool = False) -> Tensor:
        return self.head(x_BCHW, pre_logits=pre_logits)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x_BCHW))  # (B, N)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The outputs of the layers in `feature_info` that `indices` choose (all; an int: the last so many).

        Returns the list of (B, C, H, W), after the final features unless `intermediates_only`. `norm` has no effect
        here, as there is no final norm; `stop_early` leaves out the layers after the last chosen one.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt is {output_fmt!r}; accepted: 'NCHW'")
        take, last = feature_take_indices(len(self.feature_info), indices)
        modules = [int(info["module"].removeprefix("layers.")) for info in self.feature_info]
        taken = {modules[i] for i in take}
        stop = modules[last] + 1 if stop_early and intermediates_only else len(self.layers)
        intermediates = []
        for i, layer in enumerate(self.layers[:stop]):
            x = checkpoint(layer, x) if self.grad_checkpointing and self.training else layer(x)
            if i in taken:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drops the layers after the last that `indices` choose, and the head; returns the indices as a list.

        Without `prune_head` the head stays as it is. It then fits only features of as many channels.
        """
        take, last = feature_take_indices(len(self.feature_info), indices)
        layers = int(self.feature_info[last]["module"].removeprefix("layers.")) + 1
        self.layers = self.layers[:layers]
        self.config = self.config.change(layers=self.config.layers[:layers])
        self.feature_info, self.num_features = self._describe_features()
        if prune_head:
            self.reset_classifier(0, "")
        return take


def _init_kaiming(net: nn.Module) -> None:
    """Kaiming normal for convolutions (`macro_residual` states it, the other reports no other), PyTorch's otherwise."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _init_dirac(net: nn.Module) -> None:
    """Convolutions that start as the identity on their input channels (1706.00388), PyTorch's default otherwise.

    Of a block's experts the first does: where all are equal, the gate has no gradient.
    """
    others = {expert.conv for block in net.modules() if isinstance(block, ExpertBlock) for expert in block.experts[1:]}
    for module in net.modules():
        if isinstance(module, nn.Conv2d) and module not in others:
            nn.init.dirac_(module.weight.data[: module.in_channels])
            if module.bias is not None:
                nn.init.zeros_(module.bias)
