"""Networks rewritten for inference: the same logits from fewer and faster operators.

Each rewrite is a pure function from the parts of a block to the parts of an equal block, and says when it is exact.

Shapes: B images, K experts, C channels in, O channels out, H x W pixels, k x k the largest kernel.
"""

import copy
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from expertgrid.model.net import ConvNormAct, ExpertBlock, ExpertNet, Gate
from expertgrid.model.system.errors import unknown

# Speed of a block with merged kernels, relative to the block as trained, at batch sizes 1 and 64 and three image sizes:
# 1.8 to 2.5 where the experts have 4 times the work, 1.0 to 1.8 at 3 times, 0.75 to 1.2 at twice.
LEAST_SAVING = 3.0

Scaled = TypeVar("Scaled", nn.Conv2d, nn.Linear, nn.BatchNorm2d)


@dataclass(frozen=True)
class Parts:
    """An expert block taken apart: act(norm(sum_k a_k * inner_act(norm_k(conv_k(x))))), where a part may be missing.

    Without a gate the experts are summed as they are.
    """

    convs: tuple[nn.Conv2d, ...]
    norms: tuple[nn.BatchNorm2d, ...]  # one for each expert, or none
    inner_act: bool
    gate: Gate | None
    norm: nn.BatchNorm2d | None  # after the mix
    act: bool
    one_kernel: bool = False
    one_conv: bool = False
    matmul: bool = False

    @property
    def linear(self) -> bool:
        """Whether a weighted sum of the experts is a convolution with the weighted sum of their kernels."""
        return not self.inner_act and not self.norms


def take_apart(block: ExpertBlock) -> Parts:
    """The parts of a block in eval mode, copied."""
    block = copy.deepcopy(block).eval()
    experts = block.typed_experts()
    norms = tuple(expert.norm for expert in experts if hasattr(expert, "norm"))
    after = block.norm_act[0] if isinstance(block.norm_act, nn.Sequential) else None
    assert after is None or isinstance(after, nn.BatchNorm2d)  # so ExpertBlock builds it
    return Parts(
        convs=tuple(expert.conv for expert in experts),
        norms=norms,
        inner_act=bool(norms),
        gate=block.gate,
        norm=after,
        act=after is not None,
    )


def fold_norms(parts: Parts) -> Parts:
    """Batch norms folded into the convolutions before them.

    Exact in eval mode, where a batch norm is x * scale + shift: an expert's own norm always; the norm after the mix
    where the experts are linear, as their weights sum to 1: each expert takes the scale and the whole shift. Where a
    constant gate is folded in already the weights are in the kernels, and only a single one takes the norm.
    """
    if parts.norms:
        return replace(parts, convs=tuple(map(fuse_conv_bn_eval, parts.convs, parts.norms)), norms=())
    if parts.norm is None or not parts.linear or (parts.gate is None and len(parts.convs) > 1):
        return parts
    return replace(parts, convs=tuple(fuse_conv_bn_eval(conv, parts.norm) for conv in parts.convs), norm=None)


@torch.no_grad()
def constant_weights(gate: Gate, in_chs: int) -> Tensor | None:
    """The weights (K,) of a gate that is the same for all images: uniform, constant, or its last matrix is zero."""
    if gate.mlp is not None and _last_layer(gate.mlp).weight.any():
        return None
    return gate(torch.zeros(1, in_chs, 1, 1))[0]


def _last_layer(mlp: nn.Sequential) -> nn.Linear:
    last = mlp[-1]
    assert isinstance(last, nn.Linear)  # so Gate builds it
    return last


def fold_constant_gate(parts: Parts) -> Parts:
    """A gate that is the same for all images folded into the convolutions or norms, as their plain sum.

    Exact for linear experts, which become one convolution, and for experts that end in a ReLU, as
    a * relu(z) = relu(a * z) for a >= 0. A block with another gate is left as it is.
    """
    weights_K = None if parts.gate is None else constant_weights(parts.gate, parts.convs[0].in_channels)
    if weights_K is None:
        return parts
    if parts.linear:
        kernel = max(conv.kernel_size[0] for conv in parts.convs)
        weight_OCkk = sum(a * padded(conv.weight, kernel) for a, conv in zip(weights_K, parts.convs))
        bias_O = sum(a * bias_of(conv) for a, conv in zip(weights_K, parts.convs))
        return replace(parts, convs=(conv_of(weight_OCkk, bias_O, parts.convs[0].stride),), gate=None)
    if parts.norms:
        return replace(parts, norms=tuple(map(scaled, parts.norms, weights_K)), gate=None)
    return replace(parts, convs=tuple(map(scaled, parts.convs, weights_K)), gate=None)


def fold_temperature(parts: Parts) -> Parts:
    """The gate's temperature folded into its last linear layer. Always exact: (W x + b) / t = (W / t) x + b / t."""
    gate = copy.deepcopy(parts.gate)
    if gate is None or gate.mlp is None:
        return parts
    gate.mlp[-1] = scaled(_last_layer(gate.mlp), 1 / gate.temperature)
    gate.temperature = 1.0
    return replace(parts, gate=gate)


def merge_kernels(parts: Parts) -> Parts:
    """The experts' kernels mixed before the convolution: one kernel for each image.

    Exact where the experts are linear, as conv(x, W) is linear in W. Applied where it is exact and faster: where the
    merged convolution is at most 1 / `LEAST_SAVING` of the experts' work. It is a matrix product of patches, which
    reaches less of the device's peak than a convolution with fixed weights, and it computes the rows that a stride then
    drops.
    """
    kernels = [conv.kernel_size[0] for conv in parts.convs]
    merged = max(kernels) ** 2 * parts.convs[0].stride[0]
    if parts.gate is None or not parts.linear or sum(kernel**2 for kernel in kernels) < LEAST_SAVING * merged:
        return parts
    return replace(parts, one_kernel=True)


def one_conv_per_size(parts: Parts) -> Parts:
    """The experts of one kernel size as one convolution with the channels of all of them.

    Always exact. A block without gate is left as it is, as separate convolutions are faster there, and so is a block
    that still has norms.
    """
    return replace(parts, one_conv=parts.gate is not None and not parts.norms)


def sum_by_matmul(parts: Parts) -> Parts:
    """The weighted sum as a matrix product over the experts, (B, 1, K) @ (B, K, O * H * W). Always exact."""
    return replace(parts, matmul=parts.gate is not None)


REWRITES: dict[str, Callable[[Parts], Parts]] = {
    "batch_norm": fold_norms,
    "constant_gate": fold_constant_gate,
    "temperature": fold_temperature,
    "one_kernel": merge_kernels,
    "one_conv": one_conv_per_size,
    "matmul": sum_by_matmul,
}
"""The rewrites by name, in the order in which they are applied."""


def bias_of(conv: nn.Conv2d) -> Tensor:
    """The bias (O,) of a convolution, zeros where it has none."""
    return conv.weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias.detach()


def padded(weight_OCkk: Tensor, kernel: int) -> Tensor:
    """A kernel with zeros around it, so that it is `kernel` pixels wide: (O, C, kernel, kernel)."""
    return F.pad(weight_OCkk.detach(), [(kernel - weight_OCkk.shape[-1]) // 2] * 4)


def conv_of(weight_OCkk: Tensor, bias_O: Tensor, stride: tuple[int, ...]) -> nn.Conv2d:
    """The convolution with these weights that keeps the image size but for its stride."""
    out_chs, in_chs, kernel, _ = weight_OCkk.shape
    conv = nn.utils.skip_init(nn.Conv2d, in_chs, out_chs, kernel, stride, kernel // 2)
    conv.weight, conv.bias = nn.Parameter(weight_OCkk), nn.Parameter(bias_O)
    return conv


def scaled(layer: Scaled, factor: Tensor | float) -> Scaled:
    """A copy of a convolution, linear layer or batch norm whose output is `factor` times as large."""
    layer = copy.deepcopy(layer)
    with torch.no_grad():
        layer.weight.mul_(factor)
        if layer.bias is not None:
            layer.bias.mul_(factor)
    return layer


class RewrittenBlock(nn.Module):
    """The block that some parts describe: (B, C, H, W) to (B, O, H / stride, W / stride)."""

    def __init__(self, parts: Parts):
        super().__init__()
        self.gate = parts.gate
        self.mix = mix_of(parts)
        self.norm = nn.Identity() if parts.norm is None else parts.norm
        self.act = nn.ReLU() if parts.act else nn.Identity()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        mix_BOHW = self.mix(x_BCHW) if self.gate is None else self.mix(x_BCHW, self.gate(x_BCHW))
        return self.act(self.norm(mix_BOHW))


def mix_of(parts: Parts) -> nn.Module:
    """The experts and their sum as a module of the input (B, C, H, W) and, with a gate, its weights (B, K)."""
    if parts.one_kernel:
        return MergedConv(parts.convs)
    convs = parts.convs
    if parts.one_conv:
        sizes = sorted({conv.kernel_size for conv in convs}, reverse=True)
        convs = tuple(side_by_side([conv for conv in convs if conv.kernel_size == size]) for size in sizes)
    norms = parts.norms or [nn.Identity()] * len(convs)
    act = nn.ReLU() if parts.inner_act else nn.Identity()
    experts = [nn.Sequential(conv, norm, act) for conv, norm in zip(convs, norms)]
    if parts.matmul:
        return MatmulSum(experts, len(parts.convs))
    return LoopSum(experts, parts.convs[0].out_channels)


def side_by_side(convs: list[nn.Conv2d]) -> nn.Conv2d:
    """Convolutions of one kernel size as one, their channels one after the other."""
    weight, bias = (torch.cat(tensors) for tensors in zip(*((conv.weight.detach(), bias_of(conv)) for conv in convs)))
    return conv_of(weight, bias, convs[0].stride)


class LoopSum(nn.Module):
    """The sum of experts, one after the other; with gate weights, their weighted sum: (B, C, H, W) to (B, O, H, W).

    A module may hold several experts, as blocks of `channels` channels.
    """

    def __init__(self, experts: Sequence[nn.Module], channels: int):
        super().__init__()
        self.experts = nn.ModuleList(experts)
        self.channels = channels

    def forward(self, x_BCHW: Tensor, gate_BK: Tensor | None = None) -> Tensor:
        outputs = [expert(x_BCHW) for expert in self.experts]
        if gate_BK is not None:
            outputs = [part for output in outputs for part in output.split(self.channels, dim=1)]  # K (B, O, H, W)
            outputs = [gate_B111 * out_BOHW for gate_B111, out_BOHW in zip(gate_BK.T[:, :, None, None, None], outputs)]
        return reduce(torch.add, outputs)


class MatmulSum(nn.Module):
    """The weighted sum of experts as a matrix product. A module may hold several experts, as blocks of channels."""

    def __init__(self, experts: Sequence[nn.Module], count: int):
        super().__init__()
        self.experts = nn.ModuleList(experts)
        self.count = count

    def forward(self, x_BCHW: Tensor, gate_BK: Tensor) -> Tensor:
        experts_BKOHW = torch.cat([expert(x_BCHW) for expert in self.experts], dim=1).unflatten(1, (self.count, -1))
        return (gate_BK[:, None] @ experts_BKOHW.flatten(2)).unflatten(2, experts_BKOHW.shape[2:]).squeeze(1)


class MergedConv(nn.Module):
    """A convolution whose kernel is mixed for each image: (B, C, H, W) and (B, K) to (B, O, H / s, W / s), stride s.

    It has two stages, as patches of k x k pixels would be k times as large in memory: one matrix product with patches
    of 1 x k pixels gives each of the k rows of the kernel its own output, and these are shifted and added.
    """

    def __init__(self, convs: tuple[nn.Conv2d, ...]):
        super().__init__()
        self.kernel = max(conv.kernel_size[0] for conv in convs)
        self.stride = convs[0].stride[0]
        self.out_chs = convs[0].out_channels
        weight_KOCkk = torch.stack([padded(conv.weight, self.kernel) for conv in convs])
        self.weight_KkOkC = nn.Parameter(weight_KOCkk.permute(0, 3, 1, 4, 2).flatten(1))  # (K, k * O * k * C)
        self.bias_KO = nn.Parameter(torch.stack([bias_of(conv) for conv in convs]))

    def forward(self, x_BCHW: Tensor, gate_BK: Tensor) -> Tensor:
        k, s, (channels, height, width) = self.kernel, self.stride, x_BCHW.shape[1:]
        x_BCHW = F.pad(x_BCHW, [k // 2] * 4)
        columns = [x_BCHW[..., j : j + width : s] for j in range(k)]
        patches_BkCHW = torch.cat(columns, dim=1)  # (B, k * C, H + k - 1, W / s)
        weight_BkOkC = (gate_BK @ self.weight_KkOkC).reshape(-1, k * self.out_chs, k * channels)
        rows_BkOHW = (weight_BkOkC @ patches_BkCHW.flatten(2)).unflatten(2, patches_BkCHW.shape[2:])
        rows_BkOHW = rows_BkOHW.unflatten(1, (k, -1))  # (B, k, O, H + k - 1, W / s)
        mix_BOHW = (gate_BK @ self.bias_KO)[:, :, None, None]
        for i in range(k):
            mix_BOHW = mix_BOHW + rows_BkOHW[:, i, :, i : i + height : s]
        return mix_BOHW


def rewrite(net: nn.Module, rewrites: Collection[str] = tuple(REWRITES)) -> nn.Module:
    """A network in eval mode with the same logits (B, N) from fewer and faster operators; `net` is left as it is.

    `rewrites` names those of `REWRITES` that are applied. Its weights have other names and shapes than those of `net`:
    it is there to be exported, not to be saved. A network that is not an `ExpertNet` is only copied: what is exact for
    any network is a batch norm directly after a convolution, which ONNX Runtime folds itself when it loads the file.
    Raises InputError for an unknown rewrite.
    """
    for name in rewrites:
        if name not in REWRITES:
            raise unknown("rewrite", name, REWRITES)
    net = copy.deepcopy(net).eval()
    return _rewrite_layers(net, rewrites).eval() if isinstance(net, ExpertNet) else net


def _rewrite_layers(module: nn.Module, rewrites: Collection[str]) -> nn.Module:
    """The module with the blocks and convolutions below it replaced."""
    for name, layer in module.named_children():
        if isinstance(layer, ExpertBlock):
            parts = take_apart(layer)
            for change in (REWRITES[name] for name in REWRITES if name in rewrites):
                parts = change(parts)
            setattr(module, name, RewrittenBlock(parts))
        elif isinstance(layer, ConvNormAct):
            if "batch_norm" in rewrites:
                setattr(module, name, fold_norm(layer))
        else:
            _rewrite_layers(layer, rewrites)
    return module


def fold_norm(layer: ConvNormAct) -> nn.Sequential:
    """A convolution layer in eval mode with its batch norm, where it has one, folded into the convolution.

    Always exact where norm follows convolution. Where max pooling is between them it is exact for scales that are not
    negative, as the maximum of a growing function is at the same place; a layer with a negative scale is left as it is.
    """
    if not hasattr(layer, "norm"):
        return layer
    pools = [layer.pool] if hasattr(layer, "pool") else []
    if pools and (layer.norm.weight < 0).any():
        return layer
    return nn.Sequential(fuse_conv_bn_eval(layer.conv, layer.norm), *pools, layer.act)
