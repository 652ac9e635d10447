"""Depthwise convolution on CPUs with a quick gradient of the weight, for channels-last float32.

oneDNN has depthwise kernels for the output and the gradient of the input of any size. For the gradient of the weight
it has one for kernels of up to three columns; with more it computes 16 x 16 channels for each 16 that are wanted. Here
such kernels are taken three columns at a time, from a copy of a few padded images that stays in the cache. That takes
about a third of the time, copies included (benchmarks/README.md). SAME padding costs no padded activation: see
plan_conv in padding.py.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .conv2d_same import extend_kernel

COLUMNS = 3  # of a kernel, that oneDNN's gradient of depthwise weights takes
PIECE = 1 << 20  # elements of the input to copy at a time, in whole images


def depthwise_conv2d(
    x: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int], lead: tuple[int, int] = (0, 0)
) -> Tensor:
    """Convolve each channel by itself. Gradients of gradients raise an error.

    Args:
        x: float32 [B, C, H, W], channels-last, not empty.
        weight: float32 [C, 1, kh, kw].
        stride: of rows and columns.
        padding: zeros on both sides of rows and columns.
        lead: zeros to put before the kernel's first row and column, for lopsided padding (`ConvPlan` in padding.py).

    Returns:
        [B, C, (H + 2 padding - kh - lead) // stride + 1, likewise] in channels-last layout.
    """
    return _DepthwiseConv2d.apply(x, weight, stride, padding, lead)


class _DepthwiseConv2d(torch.autograd.Function):
    """The convolution and its gradients; see `depthwise_conv2d`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int], lead: tuple[int, int]
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.plan = stride, padding, lead
        return F.conv2d(x, extend_kernel(weight, lead), None, stride, padding, groups=x.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        stride, padding, lead = ctx.plan
        dy, dx, dweight = grad_output.contiguous(memory_format=torch.channels_last), None, None
        if ctx.needs_input_grad[0]:
            dx = _gradients(dy, x, extend_kernel(weight, lead), stride, padding, (True, False, False))[0]
        if ctx.needs_input_grad[1] and weight.shape[3] <= COLUMNS and not any(lead):
            dweight = _gradients(dy, x, weight, stride, padding, (False, True, False))[1]
        elif ctx.needs_input_grad[1]:
            before = padding[0] - lead[0], padding[1] - lead[1]
            dweight = torch.cat(
                [
                    _weight_columns(dy, x, weight[..., first : first + COLUMNS], stride, (before[0], before[1] - first))
                    for first in range(0, weight.shape[3], COLUMNS)
                ],
                dim=3,
            )
        return dx, dweight, None, None, None


def _weight_columns(dy: Tensor, x: Tensor, weight: Tensor, stride: tuple[int, int], before: tuple[int, int]) -> Tensor:
    """Return the gradient of these columns of the weight.

    `before` is how far before the input's first row and column the first window of these columns starts; below zero
    it starts inside.
    """
    height, width = (
        (out - 1) * step + kernel for out, step, kernel in zip(dy.shape[2:], stride, weight.shape[2:], strict=True)
    )
    rows, columns = (_overlap(*axis) for axis in zip(x.shape[2:], (height, width), before, strict=True))
    images = min(len(x), max(1, PIECE // x[0].numel()))
    windows = x.new_zeros(images, height, width, x.shape[1]).permute(0, 3, 1, 2)
    total = torch.zeros_like(weight, memory_format=torch.contiguous_format)
    for piece, grad in zip(x[:, :, rows[1], columns[1]].split(images), dy.split(images), strict=True):
        taken = windows[: len(piece)]
        taken[:, :, rows[0], columns[0]] = piece
        total += _gradients(grad, taken, weight, stride, (0, 0), (False, True, False))[1]
    return total


def _overlap(size: int, length: int, before: int) -> tuple[slice, slice]:
    """Return which cells of a stretch of `length` cells are cells of an axis, and which of the axis they are.

    The stretch begins `before` cells before the first of the `size` cells of the axis.
    """
    first, last = max(0, -before), max(0, min(size, length - before))
    return slice(first + before, max(first, last) + before), slice(first, max(first, last))


def _gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor, ...]:
    return torch.ops.aten.convolution_backward(
        dy, x, weight, None, stride, padding, (1, 1), False, (0, 0), x.shape[1], wanted
    )
