"""Fused Triton kernels for the training pass of convolutions, norm, activation and mix on CUDA.

Batch norm needs the statistics of a whole batch, so the work takes four passes over memory: the statistics of the
experts' outputs; norm, ReLU and mix; backwards, the sums for the norm's gradient; then all gradients. PyTorch's own
operators read and write the experts' outputs several times more, and torch.compile compiles each network anew. Where
the norm is after the mix, the weighted sum is one pass before these and one after them. The experts of one kernel size
are one convolution of K x C channels, which sums their input gradients. What a gate does after its pooling is one
kernel, and backwards one and one more for each of its layers.

Legend: B images of S pixels each, P = B x S pixels, K experts of C channels, F = K x C, T tiles of pixels; J hidden
units of a gate, or a layer of N inputs and M outputs. Maps are channels-last, so that a map (B, F, H, W) is a matrix
(P, F). All sums are in float32, but for the gate's over an image's pixels, which is rounded to the maps' type.
"""

from collections.abc import Iterator, Sequence
from typing import cast

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from expertgrid.model.config import Block
from expertgrid.model.fast.compiled import apply_tested, blocks_and_convs
from expertgrid.model.net import ConvNormAct, ExpertBlock, Gate

MOST_EXPERTS = 8  # in a block that the kernels support: their code has a copy for each expert
TILE = 4096  # elements that a program holds of one expert's map
MOST_COLUMNS = 128
MOST_PROGRAMS = 512  # along the pixels, in the pass that gathers statistics
STATISTICS_COLUMNS = 8  # that a program holds at once of the statistics of all tiles
LAYER_IMAGES, LAYER_ROWS, LAYER_COLUMNS = 32, 16, 64  # that a program holds of a linear layer for its gradient
GATE_WEIGHTS = 2**14  # at most, of a hidden layer in the gate's kernel, where each image's program reads them all


@triton.jit
def _tile_of_all(pixels, channels, ROWS: tl.constexpr, COLS: tl.constexpr):
    """This program's rows and columns of a map of all images, masks of those that exist, and the rows' offsets."""
    rows, cols = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * COLS + tl.arange(0, COLS)
    known = cols < channels
    return rows, cols, known, (rows < pixels)[:, None] & known[None, :], rows[:, None].to(tl.int64)


@triton.jit
def _tile_of_image(image, tiles_an_image, channels, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The same for a tile within one image, after the indices of the tile and of the image."""
    tile, cols = tl.program_id(0), tl.program_id(1) * COLS + tl.arange(0, COLS)
    number, known = tile // tiles_an_image, cols < channels
    rows = tile % tiles_an_image * ROWS + tl.arange(0, ROWS)
    inside = (rows < image)[:, None] & known[None, :]
    return tile, number, cols, known, inside, (number.to(tl.int64) * image + rows)[:, None]


@triton.jit(do_not_specialize=["steps"])  # nothing in it depends on their number, so it is compiled once for all
def _tile_statistics(
    y_PF, count_T, mean_TF, square_TF, pixels, channels, steps, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """Count, mean and sum of squared distances from it of steps x ROWS pixels, for each channel.

    Distances are taken from the first pixel, so that a mean far from 0 costs no digits; they are summed over rows once.
    """
    tile = tl.program_id(0)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    known = cols < channels
    first = tile * steps * ROWS
    origin = tl.load(y_PF + first.to(tl.int64) * channels + cols, mask=known, other=0.0).to(tl.float32)
    total = tl.zeros((ROWS, COLS), tl.float32)
    square = tl.zeros((ROWS, COLS), tl.float32)
    for step in range(steps):
        rows = first + step * ROWS + tl.arange(0, ROWS)
        inside = (rows < pixels)[:, None] & known[None, :]
        places = rows[:, None].to(tl.int64) * channels + cols[None, :]
        y = tl.load(y_PF + places, mask=inside, other=0.0).to(tl.float32)
        distance = tl.where(inside, y - origin[None, :], 0.0)
        total += distance
        square += distance * distance
    count = tl.minimum(pixels - first, steps * ROWS).to(tl.float32)
    shift = tl.sum(total, 0) / count
    tl.store(count_T + tile, count)
    tl.store(mean_TF + tile * channels + cols, origin + shift, mask=known)
    tl.store(square_TF + tile * channels + cols, tl.sum(square, 0) - count * shift * shift, mask=known)


@triton.jit
def _statistics(
    count_T, mean_TF, square_TF, mean_F, rstd_F, variance_F, tiles, pixels, eps, channels,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Mean, 1 / standard deviation and unbiased variance of each channel, from the statistics of at most ROWS tiles."""
    rows, cols = tl.arange(0, ROWS), tl.program_id(0) * COLS + tl.arange(0, COLS)
    known = cols < channels
    inside = (rows < tiles)[:, None] & known[None, :]
    places = rows[:, None] * channels + cols[None, :]
    count = tl.load(count_T + rows, mask=rows < tiles, other=0.0)[:, None]
    means = tl.load(mean_TF + places, mask=inside, other=0.0)
    mean = tl.sum(means * count, 0) / pixels
    shift = means - mean[None, :]
    square = tl.sum(tl.load(square_TF + places, mask=inside, other=0.0) + count * shift * shift, 0)
    tl.store(mean_F + cols, mean, mask=known)
    tl.store(rstd_F + cols, 1 / tl.sqrt(square / pixels + eps), mask=known)
    tl.store(variance_F + cols, square / tl.maximum(pixels - 1, 1), mask=known)


@triton.jit
def _mix(
    y_PF, mean_F, rstd_F, scale_F, shift_F, gate_BK, out_PC, pixels, image, channels,
    K: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """out = sum over k of gate_k * relu(norm(y_k))."""
    rows, cols, known, inside, row_starts = _tile_of_all(pixels, channels, ROWS, COLS)
    total = tl.zeros((ROWS, COLS), tl.float32)
    for k in tl.static_range(K):
        f = k * channels + cols
        slope = tl.load(scale_F + f, mask=known, other=0.0) * tl.load(rstd_F + f, mask=known, other=0.0)
        offset = tl.load(shift_F + f, mask=known, other=0.0) - tl.load(mean_F + f, mask=known, other=0.0) * slope
        y = tl.load(y_PF + row_starts * (K * channels) + f[None, :], mask=inside, other=0.0).to(tl.float32)
        act = tl.maximum(y * slope[None, :] + offset[None, :], 0.0, propagate_nan=tl.PropagateNan.ALL)
        if GATED:
            act *= tl.load(gate_BK + rows // image * K + k, mask=rows < pixels, other=0.0)[:, None]
        total += act
    tl.store(out_PC + row_starts * channels + cols[None, :], total.to(out_PC.dtype.element_ty), mask=inside)


@triton.jit
def _gradient_sums(
    y_PF, mean_F, rstd_F, scale_F, shift_F, gate_BK, dout_PC, sums_2TF, gate_sums_TGK, image, tiles_an_image, tiles,
    channels, K: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """For each tile of an image: the sums for the norm's gradient, and for the gate's in G groups of columns."""
    tile, number, cols, known, inside, row_starts = _tile_of_image(image, tiles_an_image, channels, ROWS, COLS)
    dout = tl.load(dout_PC + row_starts * channels + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    for k in tl.static_range(K):
        f = k * channels + cols
        mean, rstd = tl.load(mean_F + f, mask=known, other=0.0), tl.load(rstd_F + f, mask=known, other=0.0)
        scale, shift = tl.load(scale_F + f, mask=known, other=0.0), tl.load(shift_F + f, mask=known, other=0.0)
        y = tl.load(y_PF + row_starts * (K * channels) + f[None, :], mask=inside, other=0.0).to(tl.float32)
        normed = (y - mean[None, :]) * rstd[None, :]
        dz = tl.where(normed * scale[None, :] + shift[None, :] > 0, dout, 0.0)
        of_scale, of_shift = tl.sum(dz * normed, 0), tl.sum(dz, 0)
        if GATED:  # the sum of dz * z, from those of its two terms
            place = (tile * tl.num_programs(1) + tl.program_id(1)) * K + k
            tl.store(gate_sums_TGK + place, tl.sum(of_scale * scale + of_shift * shift, 0))
            gate = tl.load(gate_BK + number * K + k)
            of_scale, of_shift = of_scale * gate, of_shift * gate
        places = tile * (K * channels) + f
        tl.store(sums_2TF + places, of_scale, mask=known)
        tl.store(sums_2TF + tiles * (K * channels) + places, of_shift, mask=known)


@triton.jit
def _gradient(
    y_PF, mean_F, rstd_F, scale_F, shift_F, gate_BK, dout_PC, sums_2F, dy_PF, pixels, image, channels,
    K: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """The gradient of the experts' outputs before the norm, as slope * dz - part * y + rest with what a channel has."""
    rows, cols, known, inside, row_starts = _tile_of_all(pixels, channels, ROWS, COLS)
    dout = tl.load(dout_PC + row_starts * channels + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    for k in tl.static_range(K):
        f = k * channels + cols
        mean, rstd = tl.load(mean_F + f, mask=known, other=0.0), tl.load(rstd_F + f, mask=known, other=0.0)
        slope = tl.load(scale_F + f, mask=known, other=0.0) * rstd
        offset = tl.load(shift_F + f, mask=known, other=0.0) - mean * slope
        part = slope * rstd * tl.load(sums_2F + f, mask=known, other=0.0) / pixels
        rest = part * mean - slope * tl.load(sums_2F + K * channels + f, mask=known, other=0.0) / pixels
        places = row_starts * (K * channels) + f[None, :]
        y = tl.load(y_PF + places, mask=inside, other=0.0).to(tl.float32)
        dz = tl.where(y * slope[None, :] + offset[None, :] > 0, dout, 0.0)
        if GATED:
            dz *= tl.load(gate_BK + rows // image * K + k, mask=rows < pixels, other=0.0)[:, None]
        dy = slope[None, :] * dz - part[None, :] * y + rest[None, :]
        tl.store(dy_PF + places, dy.to(dy_PF.dtype.element_ty), mask=inside)


@triton.jit
def _weighted_sum(
    y_PF, z_PF, gate_BK, out_PC, pixels, image, channels,
    Y: tl.constexpr, Z: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """out = sum over k of gate_k * map_k, where Y maps are side by side in `y` and then Z in `z`."""
    rows, cols, known, inside, row_starts = _tile_of_all(pixels, channels, ROWS, COLS)
    gates = gate_BK + rows // image * (Y + Z)
    total = tl.zeros((ROWS, COLS), tl.float32)
    for k in tl.static_range(Y):
        places = row_starts * (Y * channels) + k * channels + cols[None, :]
        gate = tl.load(gates + k, mask=rows < pixels, other=0.0)
        total += gate[:, None] * tl.load(y_PF + places, mask=inside, other=0.0).to(tl.float32)
    for k in tl.static_range(Z):
        places = row_starts * (Z * channels) + k * channels + cols[None, :]
        gate = tl.load(gates + Y + k, mask=rows < pixels, other=0.0)
        total += gate[:, None] * tl.load(z_PF + places, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_PC + row_starts * channels + cols[None, :], total.to(out_PC.dtype.element_ty), mask=inside)


@triton.jit
def _weighted_sum_gradient(
    y_PF, z_PF, gate_BK, dout_PC, dy_PF, dz_PF, gate_sums_TGK, image, tiles_an_image, channels,
    Y: tl.constexpr, Z: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """For each tile of an image: the gradients of the maps, and the sums for the gate's in G groups of columns."""
    tile, number, cols, known, inside, row_starts = _tile_of_image(image, tiles_an_image, channels, ROWS, COLS)
    dout = tl.load(dout_PC + row_starts * channels + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    gates = gate_BK + number * (Y + Z)
    sums = gate_sums_TGK + (tile * tl.num_programs(1) + tl.program_id(1)) * (Y + Z)
    for k in tl.static_range(Y):
        places = row_starts * (Y * channels) + k * channels + cols[None, :]
        y = tl.load(y_PF + places, mask=inside, other=0.0).to(tl.float32)
        tl.store(sums + k, tl.sum(tl.sum(dout * y, 1), 0))
        tl.store(dy_PF + places, (tl.load(gates + k) * dout).to(dy_PF.dtype.element_ty), mask=inside)
    for k in tl.static_range(Z):
        places = row_starts * (Z * channels) + k * channels + cols[None, :]
        z = tl.load(z_PF + places, mask=inside, other=0.0).to(tl.float32)
        tl.store(sums + Y + k, tl.sum(tl.sum(dout * z, 1), 0))
        tl.store(dz_PF + places, (tl.load(gates + Y + k) * dout).to(dz_PF.dtype.element_ty), mask=inside)


@triton.jit
def _gate(
    x_BC, weight_JC, bias_J, weight_KJ, bias_K, hidden_BJ, gate_BK, scale, over_temperature, inputs, hidden,
    K: tl.constexpr, HIDDEN: tl.constexpr, KS: tl.constexpr, JS: tl.constexpr, CS: tl.constexpr,
):  # fmt: skip
    """One image's softmax of the last linear layer, which has `inputs` or, after a layer with ReLU, `hidden` inputs."""
    image, ks = tl.program_id(0), tl.arange(0, KS)
    known = ks < K
    logits = tl.load(bias_K + ks, mask=known, other=0.0)
    if HIDDEN:
        for first in range(0, hidden, JS):
            js = first + tl.arange(0, JS)
            units = tl.load(bias_J + js, mask=js < hidden, other=0.0)
            for start in range(0, inputs, CS):
                cs = start + tl.arange(0, CS)
                x = tl.load(x_BC + image * inputs + cs, mask=cs < inputs, other=0.0).to(tl.float32) * scale
                inside = (js < hidden)[:, None] & (cs < inputs)[None, :]
                weight = tl.load(weight_JC + js[:, None] * inputs + cs[None, :], mask=inside, other=0.0)
                units += tl.sum(weight * x[None, :], 1)
            units = tl.maximum(units, 0.0, propagate_nan=tl.PropagateNan.ALL)
            tl.store(hidden_BJ + image * hidden + js, units, mask=js < hidden)
            inside = known[:, None] & (js < hidden)[None, :]
            weight = tl.load(weight_KJ + ks[:, None] * hidden + js[None, :], mask=inside, other=0.0)
            logits += tl.sum(weight * units[None, :], 1)
    else:
        for start in range(0, inputs, CS):
            cs = start + tl.arange(0, CS)
            x = tl.load(x_BC + image * inputs + cs, mask=cs < inputs, other=0.0).to(tl.float32) * scale
            inside = known[:, None] & (cs < inputs)[None, :]
            weight = tl.load(weight_KJ + ks[:, None] * inputs + cs[None, :], mask=inside, other=0.0)
            logits += tl.sum(weight * x[None, :], 1)
    logits = tl.where(known, logits * over_temperature, float("-inf"))
    share = tl.exp(logits - tl.max(logits, 0))
    tl.store(gate_BK + image * K + ks, share / tl.sum(share, 0), mask=known)


@triton.jit
def _gate_gradient(
    weight_JC, weight_KJ, hidden_BJ, gate_BK, dgate_BK, dlogits_BK, dhidden_BJ, dx_BC, scale, over_temperature, inputs,
    hidden, K: tl.constexpr, HIDDEN: tl.constexpr, KS: tl.constexpr, JS: tl.constexpr, CS: tl.constexpr,
):  # fmt: skip
    """The gradients of one image's logits, hidden units and input."""
    image, ks = tl.program_id(0), tl.arange(0, KS)
    known = ks < K
    gate = tl.load(gate_BK + image * K + ks, mask=known, other=0.0)
    dgate = tl.load(dgate_BK + image * K + ks, mask=known, other=0.0)
    dlogits = gate * (dgate - tl.sum(gate * dgate, 0)) * over_temperature
    tl.store(dlogits_BK + image * K + ks, dlogits, mask=known)
    if HIDDEN:
        for first in range(0, hidden, JS):
            js = first + tl.arange(0, JS)
            inside = known[:, None] & (js < hidden)[None, :]
            weight = tl.load(weight_KJ + ks[:, None] * hidden + js[None, :], mask=inside, other=0.0)
            units = tl.load(hidden_BJ + image * hidden + js, mask=js < hidden, other=0.0)
            dunits = tl.where(units > 0, tl.sum(weight * dlogits[:, None], 0), 0.0)
            tl.store(dhidden_BJ + image * hidden + js, dunits, mask=js < hidden)
        tl.debug_barrier()  # the units' gradients are read by other threads than wrote them
    for start in range(0, inputs, CS):
        cs = start + tl.arange(0, CS)
        dx = tl.zeros((CS,), tl.float32)
        if HIDDEN:
            for first in range(0, hidden, JS):
                js = first + tl.arange(0, JS)
                inside = (js < hidden)[:, None] & (cs < inputs)[None, :]
                weight = tl.load(weight_JC + js[:, None] * inputs + cs[None, :], mask=inside, other=0.0)
                dunits = tl.load(dhidden_BJ + image * hidden + js, mask=js < hidden, other=0.0)
                dx += tl.sum(weight * dunits[:, None], 0)
        else:
            inside = known[:, None] & (cs < inputs)[None, :]
            weight = tl.load(weight_KJ + ks[:, None] * inputs + cs[None, :], mask=inside, other=0.0)
            dx += tl.sum(weight * dlogits[:, None], 0)
        tl.store(dx_BC + image * inputs + cs, (dx * scale).to(dx_BC.dtype.element_ty), mask=cs < inputs)


@triton.jit
def _layer_gradient(
    x_BN, dout_BM, dweight_MN, dbias_M, scale, images, outputs, inputs,
    BS: tl.constexpr, MS: tl.constexpr, NS: tl.constexpr,
):  # fmt: skip
    """The gradients of a linear layer's weights and bias, whose input is `scale` times x."""
    ms, ns = tl.program_id(0) * MS + tl.arange(0, MS), tl.program_id(1) * NS + tl.arange(0, NS)
    total = tl.zeros((MS, NS), tl.float32)
    bias = tl.zeros((MS,), tl.float32)
    for first in range(0, images, BS):
        rows = first + tl.arange(0, BS)
        inside = (rows < images)[None, :] & (ms < outputs)[:, None]
        dout = tl.load(dout_BM + rows[None, :] * outputs + ms[:, None], mask=inside, other=0.0)
        inside = (rows < images)[:, None] & (ns < inputs)[None, :]
        x = tl.load(x_BN + rows[:, None] * inputs + ns[None, :], mask=inside, other=0.0).to(tl.float32)
        total += tl.dot(dout, x, input_precision="ieee")
        bias += tl.sum(dout, 1)
    inside = (ms < outputs)[:, None] & (ns < inputs)[None, :]
    tl.store(dweight_MN + ms[:, None] * inputs + ns[None, :], total * scale, mask=inside)
    if tl.program_id(1) == 0:
        tl.store(dbias_M + ms, bias, mask=ms < outputs)


def _tile(channels: int, rows: int) -> tuple[int, int]:
    """Rows and columns (powers of two) of a tile, for maps of so many channels; at most about `rows` rows."""
    columns = min(MOST_COLUMNS, triton.next_power_of_2(channels))
    return min(max(1, TILE // columns), triton.next_power_of_2(rows)), columns


class NormActMix(torch.autograd.Function):
    """Batch norm, ReLU and the sum weighted by the gate, of K maps side by side.

    `apply(y_BFHW, gate_BK, affine_2F, eps)` gives (B, C, H, W), and the mean and unbiased variance (F) of each channel,
    which have no gradients. Without a gate (None) there is one expert, and no sum. `y_BFHW` is channels-last in
    bfloat16, float16 or float32; the gate, and the norms' scale and shift `affine_2F`, are in float32.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, y_BFHW: Tensor, gate_BK: Tensor | None, affine_2F: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        scale_F, shift_F = affine_2F.contiguous()
        y_BFHW = y_BFHW.contiguous(memory_format=torch.channels_last)
        batch, wide, height, width = y_BFHW.shape
        experts = 1 if gate_BK is None else gate_BK.shape[1]
        pixels, channels = batch * height * width, wide // experts
        rows, columns = _tile(wide, pixels)
        steps = triton.cdiv(pixels, rows * MOST_PROGRAMS)
        tiles = triton.cdiv(pixels, rows * steps)
        count_T = scale_F.new_empty(tiles)
        mean_TF, square_TF = scale_F.new_empty(2, tiles, wide)
        mean_F, rstd_F, variance_F = scale_F.new_empty(3, wide)
        _tile_statistics[tiles, triton.cdiv(wide, columns)](
            y_BFHW, count_T, mean_TF, square_TF, pixels, wide, steps, ROWS=rows, COLS=columns
        )
        _statistics[triton.cdiv(wide, STATISTICS_COLUMNS),](
            count_T, mean_TF, square_TF, mean_F, rstd_F, variance_F, tiles, pixels, eps, wide,
            ROWS=triton.next_power_of_2(tiles), COLS=STATISTICS_COLUMNS,
        )  # fmt: skip
        out_BCHW = torch.empty_like(y_BFHW[:, :channels], memory_format=torch.channels_last)
        gate_BK = None if gate_BK is None else gate_BK.contiguous()
        rows, columns = _tile(channels, pixels)
        _mix[triton.cdiv(pixels, rows), triton.cdiv(channels, columns)](
            y_BFHW, mean_F, rstd_F, scale_F, shift_F, gate_BK, out_BCHW, pixels, height * width, channels,
            K=experts, GATED=gate_BK is not None, ROWS=rows, COLS=columns,
        )  # fmt: skip
        ctx.save_for_backward(y_BFHW, gate_BK, scale_F, shift_F, mean_F, rstd_F)
        ctx.mark_non_differentiable(mean_F, variance_F)
        return out_BCHW, mean_F, variance_F

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dout_BCHW: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        y_BFHW, gate_BK, scale_F, shift_F, mean_F, rstd_F = ctx.saved_tensors
        dout_BCHW = dout_BCHW.contiguous(memory_format=torch.channels_last)
        batch, channels, height, width = dout_BCHW.shape
        wide, image = y_BFHW.shape[1], height * width
        pixels, gated = batch * image, gate_BK is not None
        forms = {"K": wide // channels, "GATED": gated}
        rows, columns = _tile(channels, image)
        across, tiles_an_image = triton.cdiv(channels, columns), triton.cdiv(image, rows)
        tiles = batch * tiles_an_image
        sums_2TF = scale_F.new_empty(2, tiles, wide)
        gate_sums_TGK = gate_BK.new_empty(tiles, across, gate_BK.shape[1]) if gated else None
        known = y_BFHW, mean_F, rstd_F, scale_F, shift_F, gate_BK, dout_BCHW
        _gradient_sums[tiles, across](
            *known, sums_2TF, gate_sums_TGK, image, tiles_an_image, tiles, channels, **forms, ROWS=rows, COLS=columns
        )
        sums_2F = sums_2TF.sum(1)
        dy_BFHW = torch.empty_like(y_BFHW)
        rows, columns = _tile(channels, pixels)
        _gradient[triton.cdiv(pixels, rows), across](
            *known, sums_2F, dy_BFHW, pixels, image, channels, **forms, ROWS=rows, COLS=columns
        )
        if gate_sums_TGK is None:
            return dy_BFHW, None, sums_2F, None
        dgate_BK = gate_sums_TGK.view(batch, tiles_an_image * across, -1).sum(1)
        return dy_BFHW, dgate_BK, sums_2F, None


class WeightedSum(torch.autograd.Function):
    """The sum of maps weighted by the gate: `apply(gate_BK, y_BFHW, z_BFHW)`, where `z_BFHW` may be None.

    The maps are side by side in one or two tensors, channels-last; what comes out is (B, C, H, W). The gate is in
    float32.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, gate_BK: Tensor, y_BFHW: Tensor, z_BFHW: Tensor | None) -> Tensor:
        y_BFHW = y_BFHW.contiguous(memory_format=torch.channels_last)
        z_BFHW = None if z_BFHW is None else z_BFHW.contiguous(memory_format=torch.channels_last)
        gate_BK = gate_BK.contiguous()
        batch, wide, height, width = y_BFHW.shape
        channels = (wide + (0 if z_BFHW is None else z_BFHW.shape[1])) // gate_BK.shape[1]
        ctx.counts = {"Y": wide // channels, "Z": gate_BK.shape[1] - wide // channels}
        out_BCHW = torch.empty_like(y_BFHW[:, :channels], memory_format=torch.channels_last)
        pixels = batch * height * width
        rows, columns = _tile(channels, pixels)
        _weighted_sum[triton.cdiv(pixels, rows), triton.cdiv(channels, columns)](
            y_BFHW, z_BFHW, gate_BK, out_BCHW, pixels, height * width, channels, **ctx.counts, ROWS=rows, COLS=columns
        )
        ctx.save_for_backward(gate_BK, y_BFHW, z_BFHW)
        return out_BCHW

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dout_BCHW: Tensor) -> tuple[Tensor | None, ...]:
        gate_BK, y_BFHW, z_BFHW = ctx.saved_tensors
        dout_BCHW = dout_BCHW.contiguous(memory_format=torch.channels_last)
        batch, channels, height, width = dout_BCHW.shape
        rows, columns = _tile(channels, height * width)
        across, tiles_an_image = triton.cdiv(channels, columns), triton.cdiv(height * width, rows)
        gate_sums_TGK = gate_BK.new_empty(batch * tiles_an_image, across, gate_BK.shape[1])
        dy_BFHW, dz_BFHW = (None if part is None else torch.empty_like(part) for part in (y_BFHW, z_BFHW))
        _weighted_sum_gradient[batch * tiles_an_image, across](
            y_BFHW, z_BFHW, gate_BK, dout_BCHW, dy_BFHW, dz_BFHW, gate_sums_TGK, height * width, tiles_an_image,
            channels, **ctx.counts, ROWS=rows, COLS=columns,
        )  # fmt: skip
        return gate_sums_TGK.view(batch, tiles_an_image * across, -1).sum(1), dy_BFHW, dz_BFHW


class GateWeights(torch.autograd.Function):
    """The last layers of a gate: `apply(x_BC, weight_JC, bias_J, weight_KJ, bias_K, scale, temperature)` gives (B, K).

    It is the softmax of a linear layer's output over the temperature. The layer's input is `scale` times x or, where
    there are `weight_JC` and `bias_J` (else None), what a hidden layer with ReLU makes of that. Weights are in float32.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, x_BC: Tensor, weight_JC: Tensor | None, bias_J: Tensor | None, weight_KJ: Tensor,
        bias_K: Tensor, scale: float, temperature: float,
    ) -> Tensor:  # fmt: skip
        x_BC, (images, inputs), experts = x_BC.contiguous(), x_BC.shape, len(bias_K)
        hidden = 0 if bias_J is None else len(bias_J)
        columns = min(MOST_COLUMNS, triton.next_power_of_2(inputs))
        units = min(TILE // columns, triton.next_power_of_2(hidden)) if hidden else 1
        forms = {"K": experts, "HIDDEN": hidden > 0, "KS": triton.next_power_of_2(experts), "JS": units, "CS": columns}
        hidden_BJ, gate_BK = bias_K.new_empty(images, hidden) if hidden else None, bias_K.new_empty(images, experts)
        ctx.forms, ctx.factors = forms, (scale, 1 / temperature)
        _gate[images,](
            x_BC, weight_JC, bias_J, weight_KJ, bias_K, hidden_BJ, gate_BK, *ctx.factors, inputs, hidden, **forms
        )
        ctx.save_for_backward(x_BC, weight_JC, weight_KJ, hidden_BJ, gate_BK)
        return gate_BK

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dgate_BK: Tensor) -> tuple[Tensor | None, ...]:
        x_BC, weight_JC, weight_KJ, hidden_BJ, gate_BK = ctx.saved_tensors
        images, inputs = x_BC.shape
        hidden = 0 if hidden_BJ is None else hidden_BJ.shape[1]
        dlogits_BK, dx_BC = torch.empty_like(gate_BK), torch.empty_like(x_BC)
        dhidden_BJ = None if hidden_BJ is None else torch.empty_like(hidden_BJ)
        _gate_gradient[images,](
            weight_JC, weight_KJ, hidden_BJ, gate_BK, dgate_BK.contiguous(), dlogits_BK, dhidden_BJ, dx_BC,
            *ctx.factors, inputs, hidden, **ctx.forms,
        )  # fmt: skip
        scale, first, last = ctx.factors[0], (None, None), (None, None)
        if hidden_BJ is not None and ctx.needs_input_grad[1]:
            first = _linear_gradient(x_BC, dhidden_BJ, scale)
        if ctx.needs_input_grad[3]:
            last = _linear_gradient(*((x_BC, dlogits_BK, scale) if hidden_BJ is None else (hidden_BJ, dlogits_BK, 1.0)))
        return dx_BC, *first, *last, None, None


def _linear_gradient(x_BN: Tensor, dout_BM: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The gradients of the weights (M, N) and the bias (M) of a linear layer whose input is `scale` times x."""
    (images, inputs), outputs = x_BN.shape, dout_BM.shape[1]
    dweight_MN, dbias_M = dout_BM.new_empty(outputs, inputs), dout_BM.new_empty(outputs)
    _layer_gradient[triton.cdiv(outputs, LAYER_ROWS), triton.cdiv(inputs, LAYER_COLUMNS)](
        x_BN, dout_BM, dweight_MN, dbias_M, scale, images, outputs, inputs,
        BS=LAYER_IMAGES, MS=LAYER_ROWS, NS=LAYER_COLUMNS,
    )  # fmt: skip
    return dweight_MN, dbias_M


def _experts_by_kernel(block: ExpertBlock) -> list[list[ConvNormAct]]:
    """The experts of a block in groups of one kernel size, the largest first."""
    kernels, parts = block.config.kernels, block.typed_experts()
    return [[part for part, kernel in zip(parts, kernels) if kernel == size] for size in dict.fromkeys(kernels)]


def _wide_conv(x_BCHW: Tensor, parts: Sequence[ConvNormAct]) -> Tensor:
    """The outputs (B, F, H, W) of several convolutions of one kernel size and without bias, computed as one."""
    conv = parts[0].conv
    weight_FCkk = torch.cat([part.conv.weight for part in parts]) if len(parts) > 1 else conv.weight
    return F.conv2d(x_BCHW, weight_FCkk, None, conv.stride, conv.padding)


def _tracked(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor, Tensor]:
    """The running mean (C) and variance (C) of a norm, and the number of batches that it has seen."""
    mean_C, variance_C, batches = norm.running_mean, norm.running_var, norm.num_batches_tracked
    assert mean_C is not None and variance_C is not None and batches is not None  # PyTorch's default is to track
    return mean_C, variance_C, batches


def _norm_act_mix(y_BFHW: Tensor, norms: Sequence[nn.BatchNorm2d], gate_BK: Tensor | None = None) -> Tensor:
    """Norm, ReLU and mix of maps that are side by side in one tensor. Updates the norms' running statistics."""
    affine_2F = torch.cat([norm.weight for norm in norms] + [norm.bias for norm in norms]).view(2, -1)
    out_BCHW, mean_F, variance_F = NormActMix.apply(y_BFHW, gate_BK, affine_2F, norms[0].eps)
    momentum = norms[0].momentum
    assert momentum is not None  # NormConfig has a number
    with torch.no_grad():
        means, variances, batches = map(list, zip(*map(_tracked, norms)))
        of_batch = [*mean_F.chunk(len(norms)), *variance_F.chunk(len(norms))]
        torch._foreach_lerp_([*means, *variances], of_batch, momentum)
        torch._foreach_add_(batches, 1)
    return out_BCHW


class FusedBlock(ExpertBlock):
    """An expert block that trains with the fused kernels. Its evaluation is ExpertBlock's."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x_BCHW)
        gate_BK = None if self.gate is None else _gate_weights(self.gate, x_BCHW)
        if self.config.norm_act == "expert":
            parts = self.typed_experts()
            return _norm_act_mix(_wide_conv(x_BCHW, parts), [part.norm for part in parts], gate_BK)
        assert isinstance(self.norm_act, nn.Sequential)  # the norm and activation after the mix
        maps = [_wide_conv(x_BCHW, parts) for parts in _experts_by_kernel(self)]
        return _norm_act_mix(WeightedSum.apply(gate_BK, *maps, *[None] * (2 - len(maps))), self.norm_act[:1])


def _gate_weights(gate: Gate, x_BCHW: Tensor) -> Tensor:
    """The mixing weights (B, K) in float32: the gate's matrices are small, and casting them would take longer."""
    if gate.mlp is None:
        return gate(x_BCHW).float()
    with torch.autocast(x_BCHW.device.type, enabled=False):
        x_BC, scale = x_BCHW.sum((2, 3)), 1 / (x_BCHW.shape[2] * x_BCHW.shape[3])
        if gate.shuffled:
            x_BC = x_BC.roll(1, dims=0)
        *hidden, last = (cast(nn.Linear, layer) for layer in gate.mlp[::2])  # between them is ReLU
        first = hidden.pop() if hidden and hidden[-1].weight.numel() <= GATE_WEIGHTS else None
        for layer in hidden:  # of large matrices, for which PyTorch has the better kernels
            x_BC, scale = F.relu(layer(x_BC.float() * scale)), 1.0
        inner = (None, None) if first is None else (first.weight, first.bias)
        return GateWeights.apply(x_BC, *inner, last.weight, last.bias, scale, gate.temperature)


class FusedConv(ConvNormAct):
    """A convolution with norm and activation that trains with the fused kernels."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x_BCHW)
        y_BCHW = self.conv(x_BCHW)
        return _norm_act_mix(self.pool(y_BCHW) if hasattr(self, "pool") else y_BCHW, [self.norm])


def has_kernels(block: Block) -> bool:
    """Whether the fused kernels support a block.

    They support one kernel size where each expert has its norm and activation, and up to two where these are after the
    mix.
    """
    most = {"expert": 1, "mix": 2, "none": 0}[block.norm_act]
    return len(set(block.kernels)) <= most and len(block.kernels) <= MOST_EXPERTS


def _with_kernels(net: nn.Module) -> Iterator[tuple[nn.Module, type[nn.Module]]]:
    """The modules of `net` that fused kernels support, each with its class that uses them."""
    for part in blocks_and_convs(net):
        if type(part) is ConvNormAct and hasattr(part, "norm"):
            yield part, FusedConv
        elif type(part) is ExpertBlock and has_kernels(part.config):
            yield part, FusedBlock


def fuse(net: nn.Module) -> None:
    """Makes the modules of `net` train with fused kernels where there are some. Weights and names do not change."""
    for part, fused in list(_with_kernels(net)):
        part.__class__ = fused


def use_kernels(net: nn.Module, batches: Sequence[Tensor], bfloat16: bool) -> float:
    """Makes `net` train with fused kernels on batches (B, C, H, W) like these. Returns the seconds of compiling them.

    That is 0 where no module of `net` has kernels. If compilation fails, the error is raised and `net` is unchanged.
    """
    return apply_tested(net, fuse, batches, bfloat16) if any(_with_kernels(net)) else 0.0
