"""The arithmetic of TensorFlow's SAME padding along one axis, and how operators with symmetric padding reproduce it.

Lives here: pure functions of Python ints. Nothing touches a tensor, so choosing by input size costs no device time.

SAME pads so that there is one output cell per `stride` input cells, rounded up. It puts the odd cell, if any, behind:
a kernel of 3 with stride 2 on an even size is padded by (0, 1). torch's operators pad both sides alike, so timm lets a
pad operator copy the whole activation first. The plans below reach the same cells without that copy.

Source: "SAME" in https://www.tensorflow.org/api_docs/python/tf/nn#notes_on_padding_2.
"""

from __future__ import annotations

from typing import NamedTuple


class ConvPlan(NamedTuple):
    """How a convolution with symmetric padding does SAME along one axis."""

    padding: int  # on both sides
    lead: int  # zero cells to put before the kernel's first cell: 0 or 1
    length: int  # output cells to keep, from the first; more come out only where dilation > stride


class MaxPoolPlan(NamedTuple):
    """How a max pool with symmetric padding does SAME along one axis."""

    padding: int  # on both sides
    ceil_mode: bool  # needs windows that hang over the end; harmless to the other axis
    skip: int  # output cells to drop in front: 0 or 1


def same_length(size: int, stride: int) -> int:
    """Return the number of output cells of SAME padding: size / stride, rounded up."""
    return -(-size // stride)


def same_padding(size: int, kernel: int, stride: int = 1, dilation: int = 1) -> tuple[int, int]:
    """Return how many cells SAME padding adds before and after an axis; `after` is `before` or one more.

    Args:
        size: input cells along the axis, >= 1.
        kernel: kernel cells, >= 1.
        stride: >= 1.
        dilation: distance of neighbouring kernel cells, >= 1.
    """
    reach = (same_length(size, stride) - 1) * stride + dilation * (kernel - 1) + 1
    total = max(reach - size, 0)
    return total // 2, total - total // 2


def plan_conv(size: int, kernel: int, stride: int = 1, dilation: int = 1) -> ConvPlan:
    """Plan a convolution along one axis; arguments as in `same_padding`.

    Where SAME is lopsided, one zero cell before the kernel moves all its other cells `dilation` further along. Padding
    of `before + dilation` on both sides moves the windows back by as much, and is never less than `after`.
    """
    before, after = same_padding(size, kernel, stride, dilation)
    lopsided = after > before
    return ConvPlan(before + dilation if lopsided else before, int(lopsided), same_length(size, stride))


def plan_max_pool(size: int, kernel: int, stride: int = 1) -> MaxPoolPlan:
    """Plan a max pool without dilation along one axis; arguments as in `same_padding`.

    Where SAME is lopsided with a stride above 1, the last window hangs over the end by one cell, which is less than a
    stride: ceil_mode computes just that window more. With stride 1, padding both sides by `after` gives one window too
    many, the first. Both stay within half the kernel, the most that a max pool's own padding may be.
    """
    before, after = same_padding(size, kernel, stride)
    if after == before:
        return MaxPoolPlan(before, False, 0)
    return MaxPoolPlan(before, True, 0) if stride > 1 else MaxPoolPlan(after, False, 1)
