"""Batch norm with SiLU, and squeeze-and-excitation, of channels-last tensors in few passes over them: Triton kernels.

Lives here: the kernels and the autograd functions that call them. Which layers use them is decided in fused_layers.py.

A tensor [B, C, H, W] in channels-last layout is read as rows. As few channel counts are powers of two, several pixels
make one row of `width` numbers, a multiple of the columns that a program works on; column j holds channel j modulo C.
Sums are taken by each program over its rows, then over programs: the order, and so the result, is always the same.

Source of the formulas: Ioffe & Szegedy 2015, "Batch Normalization", section 3; Chan et al. 1979, "Updating Formulae and
a Pairwise Algorithm for Computing Sample Variances"; Hu et al. 2018, "Squeeze-and-Excitation Networks", section 3.
"""
from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_COLUMNS, _ROWS = 128, 32  # the tile of a program
_SUM = {"COLUMNS": _COLUMNS, "ROWS": 16}  # that of a program that keeps two sums for each of its elements
_PROGRAMS = 1056  # enough for the largest GPUs: some for each of their multiprocessors
_LAST = torch.channels_last


@triton.jit
def _silu_slope(z):
    sigmoid = tl.sigmoid(z)
    return sigmoid * (1 + z * (1 - sigmoid))


@triton.jit
def _statistics_kernel(x, means, squares, rows, width, per_split, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """Write mean and sum of squared deviations of each column over this program's rows."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    first = tl.program_id(1) * per_split
    end = tl.minimum(first + per_split, rows)
    # Differences to some number of the column: squares of large numbers would lose the digits of small deviations.
    pivot = tl.load(x + first.to(tl.int64) * width + column, mask=inside, other=0.0).to(tl.float32)
    totals = tl.zeros((ROWS, COLUMNS), tl.float32)
    products = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(first, end, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < end)[:, None] & inside[None, :]
        value = tl.load(x + row.to(tl.int64)[:, None] * width + column[None, :], mask=mask, other=0.0).to(tl.float32)
        value = tl.where(mask, value - pivot[None, :], 0.0)
        totals += value
        products += value * value
    count = (end - first).to(tl.float32)
    total = tl.sum(totals, 0)
    mean = pivot + total / count
    square = tl.maximum(tl.sum(products, 0) - total * total / count, 0.0)
    tl.store(means + tl.program_id(1) * width + column, mean, mask=inside)
    tl.store(squares + tl.program_id(1) * width + column, square, mask=inside)


@triton.jit
def _combine_statistics_kernel(means, squares, weight, bias, running_mean, running_var, saved, total, parts, repeats,
                               rows, per_split, channels, momentum, eps, CHANNELS: tl.constexpr, PARTS: tl.constexpr):
    """From the parts' statistics make those of each channel: mean, 1 / deviation, scale, shift; move the running ones.

    `saved` is [4, channels]; a part is one split's column of the channel, and holds as many numbers as the split rows.
    """
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    mean = tl.zeros((CHANNELS,), tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        first = (part // repeats) * per_split
        count = tl.maximum(tl.minimum(rows - first, per_split), 0).to(tl.float32)
        mask = (part < parts)[:, None] & inside[None, :]
        value = tl.load(means + part[:, None] * channels + channel[None, :], mask=mask, other=0.0)
        mean += tl.sum(value * (count / total)[:, None], 0)
    square = tl.zeros((CHANNELS,), tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        first = (part // repeats) * per_split
        count = tl.maximum(tl.minimum(rows - first, per_split), 0).to(tl.float32)
        mask = (part < parts)[:, None] & inside[None, :]
        at = part[:, None] * channels + channel[None, :]
        value = tl.load(means + at, mask=mask, other=0.0)
        deviation = tl.where(mask, value - mean[None, :], 0.0)
        own = tl.load(squares + at, mask=mask, other=0.0)
        square += tl.sum(own + deviation * deviation * count[:, None], 0)
    variance = square / total
    inverse = 1 / tl.sqrt(variance + eps)
    scale = tl.load(weight + channel, mask=inside, other=0.0) * inverse
    shift = tl.load(bias + channel, mask=inside, other=0.0) - mean * scale
    tl.store(saved + channel, mean, mask=inside)
    tl.store(saved + channels + channel, inverse, mask=inside)
    tl.store(saved + 2 * channels + channel, scale, mask=inside)
    tl.store(saved + 3 * channels + channel, shift, mask=inside)
    old = tl.load(running_mean + channel, mask=inside, other=0.0)
    tl.store(running_mean + channel, old + momentum * (mean - old), mask=inside)
    old = tl.load(running_var + channel, mask=inside, other=0.0)
    unbiased = square / tl.maximum(total - 1, 1.0)
    tl.store(running_var + channel, old + momentum * (unbiased - old), mask=inside)


@triton.jit
def _apply_kernel(x, saved, y, rows, width, channels, ACTIVATE: tl.constexpr, COLUMNS: tl.constexpr,
                  ROWS: tl.constexpr):
    """Write x * scale + shift, or SiLU of it."""
    tiles = tl.cdiv(width, COLUMNS)
    column = tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    scale = tl.load(saved + 2 * channels + column % channels, mask=inside, other=0.0)
    shift = tl.load(saved + 3 * channels + column % channels, mask=inside, other=0.0)
    row = tl.program_id(0) // tiles * ROWS + tl.arange(0, ROWS)
    mask = (row < rows)[:, None] & inside[None, :]
    at = row.to(tl.int64)[:, None] * width + column[None, :]
    z = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) * scale[None, :] + shift[None, :]
    if ACTIVATE:
        z = z * tl.sigmoid(z)
    tl.store(y + at, z.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _gradient_sums_kernel(x, incoming, saved, totals, weighted, rows, width, channels, per_split,
                          ACTIVATE: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """Write the sums over this program's rows of the normalised input's gradient, and of it times x - mean."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    mean = tl.load(saved + column % channels, mask=inside, other=0.0)
    scale = tl.load(saved + 2 * channels + column % channels, mask=inside, other=0.0)
    shift = tl.load(saved + 3 * channels + column % channels, mask=inside, other=0.0)
    first = tl.program_id(1) * per_split
    end = tl.minimum(first + per_split, rows)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    product = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(first, end, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < end)[:, None] & inside[None, :]
        at = row.to(tl.int64)[:, None] * width + column[None, :]
        value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        gradient = tl.load(incoming + at, mask=mask, other=0.0).to(tl.float32)
        if ACTIVATE:
            gradient = gradient * _silu_slope(value * scale[None, :] + shift[None, :])
        total += gradient
        product += gradient * (value - mean[None, :])
    tl.store(totals + tl.program_id(1) * width + column, tl.sum(total, 0), mask=inside)
    tl.store(weighted + tl.program_id(1) * width + column, tl.sum(product, 0), mask=inside)


@triton.jit
def _combine_gradients_kernel(totals, weighted, saved, gradients, total_count, parts, channels,
                              CHANNELS: tl.constexpr, PARTS: tl.constexpr):
    """Add the parts up: rows 0 and 1 of `gradients` become those of weight and bias, 2 and 3 slope and constant."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    total = tl.zeros((CHANNELS,), tl.float32)
    product = tl.zeros((CHANNELS,), tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        mask = (part < parts)[:, None] & inside[None, :]
        at = part[:, None] * channels + channel[None, :]
        total += tl.sum(tl.load(totals + at, mask=mask, other=0.0), 0)
        product += tl.sum(tl.load(weighted + at, mask=mask, other=0.0), 0)
    mean = tl.load(saved + channel, mask=inside, other=0.0)
    inverse = tl.load(saved + channels + channel, mask=inside, other=0.0)
    scale = tl.load(saved + 2 * channels + channel, mask=inside, other=0.0)
    product *= inverse
    slope = -scale * inverse * product / total_count
    tl.store(gradients + channel, product, mask=inside)
    tl.store(gradients + channels + channel, total, mask=inside)
    tl.store(gradients + 2 * channels + channel, slope, mask=inside)
    tl.store(gradients + 3 * channels + channel, -scale * total / total_count - slope * mean, mask=inside)


@triton.jit
def _input_gradient_kernel(x, incoming, saved, gradients, out, rows, width, channels, ACTIVATE: tl.constexpr,
                           COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """Write scale * (gradient of the normalised input) + slope * x + constant."""
    tiles = tl.cdiv(width, COLUMNS)
    column = tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    channel = column % channels
    scale = tl.load(saved + 2 * channels + channel, mask=inside, other=0.0)
    shift = tl.load(saved + 3 * channels + channel, mask=inside, other=0.0)
    slope = tl.load(gradients + 2 * channels + channel, mask=inside, other=0.0)
    constant = tl.load(gradients + 3 * channels + channel, mask=inside, other=0.0)
    row = tl.program_id(0) // tiles * ROWS + tl.arange(0, ROWS)
    mask = (row < rows)[:, None] & inside[None, :]
    at = row.to(tl.int64)[:, None] * width + column[None, :]
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    gradient = tl.load(incoming + at, mask=mask, other=0.0).to(tl.float32)
    if ACTIVATE:
        gradient = gradient * _silu_slope(value * scale[None, :] + shift[None, :])
    gradient = gradient * scale[None, :] + value * slope[None, :] + constant[None, :]
    tl.store(out + at, gradient.to(out.dtype.element_ty), mask=mask)


class _Rows:
    """How [B, C, H, W] is cut: `rows` of `width` numbers, in `splits` of `per_split` rows for sums."""

    def __init__(self, x: Tensor, images: int = 1) -> None:
        """Cut a channels-last tensor; with `images`, each of so many parts by itself."""
        channels = x.shape[1]
        pixels = x.numel() // channels // images
        repeats = math.lcm(channels, _COLUMNS) // channels
        self.repeats = repeats if pixels % repeats == 0 else 1
        self.channels, self.images = channels, images
        self.rows, self.width = pixels // self.repeats, channels * self.repeats
        self.columns = triton.cdiv(self.width, _COLUMNS)
        most = triton.cdiv(self.rows, _ROWS)
        splits = max(1, min(most, _PROGRAMS // (self.columns * images)))
        self.per_split = triton.cdiv(most, splits) * _ROWS
        self.splits = triton.cdiv(self.rows, self.per_split)
        self.parts = self.splits * self.repeats

    @property
    def tiles(self) -> tuple[int]:
        """Return the grid of a kernel that does every row by itself; one number, as only the first may be large."""
        return (self.columns * triton.cdiv(self.rows, _ROWS),)

    def partial(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return two tensors for the programs' sums."""
        return tuple(torch.empty((2, self.images, self.splits, self.width), dtype=torch.float32, device=x.device))


class BatchNormAct(torch.autograd.Function):
    """Training-mode batch norm, then SiLU where `activate`; keeps its input and four numbers for each channel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor,
                momentum: float, eps: float, activate: bool) -> Tensor:
        """Normalise channels-last [B, C, H, W] of any float dtype; the rest is float32 [C]."""
        cut = _Rows(x)
        channels = cut.channels
        means, squares = cut.partial(x)
        _statistics_kernel[(cut.columns, cut.splits)](x, means, squares, cut.rows, cut.width, cut.per_split,
                                                      **_SUM)
        saved = torch.empty((4, channels), dtype=torch.float32, device=x.device)
        _combine_statistics_kernel[(triton.cdiv(channels, 16),)](
            means, squares, weight, bias, running_mean, running_var, saved, float(x.numel() // channels), cut.parts,
            cut.repeats, cut.rows, cut.per_split, channels, momentum, eps, CHANNELS=16, PARTS=128)
        y = torch.empty_like(x, memory_format=_LAST)
        _apply_kernel[cut.tiles](x, saved, y, cut.rows, cut.width, channels, ACTIVATE=activate, COLUMNS=_COLUMNS,
                                 ROWS=_ROWS)
        ctx.save_for_backward(x, saved)
        ctx.activate = activate
        return y

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of input, weight and bias."""
        x, saved = ctx.saved_tensors
        incoming, cut = grad_output.contiguous(memory_format=_LAST), _Rows(x)
        channels, activate = cut.channels, ctx.activate
        totals, weighted = cut.partial(x)
        _gradient_sums_kernel[(cut.columns, cut.splits)](x, incoming, saved, totals, weighted, cut.rows, cut.width,
                                                         channels, cut.per_split, ACTIVATE=activate, **_SUM)
        gradients = torch.empty_like(saved)
        _combine_gradients_kernel[(triton.cdiv(channels, 16),)](
            totals, weighted, saved, gradients, float(x.numel() // channels), cut.parts, channels, CHANNELS=16,
            PARTS=128)
        result = torch.empty_like(x, memory_format=_LAST)
        _input_gradient_kernel[cut.tiles](x, incoming, saved, gradients, result, cut.rows, cut.width, channels,
                                          ACTIVATE=activate, COLUMNS=_COLUMNS, ROWS=_ROWS)
        return result, gradients[0], gradients[1], None, None, None, None, None


@triton.jit
def _gate_kernel(x, gate, mean_gradient, out, rows, width, channels, factor, SHIFTED: tl.constexpr,
                 COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """Write x times the gate of its image and channel; SHIFTED: plus `factor` times the mean's gradient."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    image = tl.program_id(2)
    at_gate = image * channels + column % channels
    scale = tl.load(gate + at_gate, mask=inside, other=0.0).to(tl.float32)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    mask = (row < rows)[:, None] & inside[None, :]
    at = (image.to(tl.int64) * rows + row)[:, None] * width + column[None, :]
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) * scale[None, :]
    if SHIFTED:
        shift = tl.load(mean_gradient + at_gate, mask=inside, other=0.0).to(tl.float32) * factor
        value += shift[None, :]
    tl.store(out + at, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _gate_gradient_kernel(x, incoming, sums, rows, width, per_split, splits, COLUMNS: tl.constexpr,
                          ROWS: tl.constexpr):
    """Write the sum of x times the incoming gradient over this program's rows of one image."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    image = tl.program_id(2)
    first = tl.program_id(1) * per_split
    end = tl.minimum(first + per_split, rows)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(first, end, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < end)[:, None] & inside[None, :]
        at = (image.to(tl.int64) * rows + row)[:, None] * width + column[None, :]
        value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        total += value * tl.load(incoming + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(sums + (image * splits + tl.program_id(1)) * width + column, tl.sum(total, 0), mask=inside)


class Squeeze(torch.autograd.Function):
    """Channels-last [B, C, H, W] to itself and its mean over H and W, float [B, C, 1, 1].

    `Excite` multiplies the first result by a gate computed from the second. Its backward pass hands the gradient of the
    product on as it is, and the one here multiplies it by the gate: one pass over both gradients instead of two.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, shared: list) -> tuple[Tensor, Tensor]:
        """Return x and its mean; `shared` is an empty list, the same for `Excite`."""
        ctx.shared = shared
        return x.view_as(x), x.mean((2, 3), keepdim=True)

    @staticmethod
    def backward(ctx: Any, product_gradient: Tensor, mean_gradient: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of x."""
        (gate,) = ctx.shared
        ctx.shared.clear()
        return _gate(product_gradient, gate, mean_gradient), None


class Excite(torch.autograd.Function):
    """The product of channels-last [B, C, H, W] and a gate [B, C, 1, 1]; see `Squeeze`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, shared: list) -> Tensor:
        """Return the product in the dtype of x."""
        ctx.save_for_backward(x, gate)
        ctx.shared = shared
        return _gate(x, gate)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, None]:
        """Return the gradients of the product, for `Squeeze`, and of the gate."""
        x, gate = ctx.saved_tensors
        ctx.shared.append(gate)
        incoming, cut = grad_output.contiguous(memory_format=_LAST), _Rows(x, len(x))
        sums = torch.empty((len(x), cut.parts, cut.channels), dtype=torch.float32, device=x.device)
        _gate_gradient_kernel[(cut.columns, cut.splits, len(x))](
            x, incoming, sums, cut.rows, cut.width, cut.per_split, cut.splits, **_SUM)
        return incoming, sums.sum(1)[:, :, None, None].to(gate.dtype), None


def _gate(x: Tensor, gate: Tensor, mean_gradient: Tensor | None = None) -> Tensor:
    cut, out = _Rows(x, len(x)), torch.empty_like(x, memory_format=_LAST)
    shifted = mean_gradient is not None
    _gate_kernel[cut.columns, triton.cdiv(cut.rows, _ROWS), len(x)](
        x, gate.contiguous(), mean_gradient.contiguous() if shifted else gate, out, cut.rows, cut.width, cut.channels,
        1 / (x.shape[2] * x.shape[3]), SHIFTED=shifted, COLUMNS=_COLUMNS, ROWS=_ROWS)
    return out
