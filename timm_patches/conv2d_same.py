"""Convolution with TensorFlow's SAME padding and no pad operator on the activation.

Lives here: the function and the layer that stands in for timm's Conv2dSame. Which layers are exchanged is decided in
same_padding.py, how much is padded in padding.py.
"""

from __future__ import annotations

import torch.nn.functional as F
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor

from .padding import plan_conv


def conv2d_same(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """Convolve with SAME padding, lopsided where TensorFlow's is.

    Where the padding of an axis is lopsided, the kernel is extended by a row or column of zeros: a copy of
    out * in / groups * (kh + 1) * (kw + 1) elements per call, instead of one of the padded activation. The zeros meet
    one more row or column of input, so an inf or NaN there shows one window earlier than with explicit padding.

    Args:
        x: [B, C, H, W] or [C, H, W].
        weight: [O, C / groups, kh, kw].
        bias: [O] or None.
        stride: of rows and columns.
        dilation: of rows and columns.
        groups: C for a depthwise convolution.

    Returns:
        [B, O, ceil(H / stride), ceil(W / stride)].
    """
    rows, columns = (plan_conv(*axis) for axis in zip(x.shape[-2:], weight.shape[-2:], stride, dilation, strict=True))
    weight = extend_kernel(weight, (rows.lead, columns.lead))
    x = F.conv2d(x, weight, bias, stride, (rows.padding, columns.padding), dilation, groups)
    if x.shape[-2:] != (rows.length, columns.length):
        x = x[..., : rows.length, : columns.length]
    return x


def extend_kernel(weight: Tensor, lead: tuple[int, int]) -> Tensor:
    """Put zeros before the first row and column of a kernel, as `ConvPlan` in padding.py asks for.

    Args:
        weight: [O, C / groups, kh, kw].
        lead: how many rows and columns.

    Returns:
        [O, C / groups, kh + lead rows, kw + lead columns]; `weight` itself where there is nothing to put.
    """
    return F.pad(weight, (lead[1], 0, lead[0], 0)) if any(lead) else weight


class Conv2dSameNoPad(Conv2dSame):
    """timm's Conv2dSame, same parameters and results, computed by `conv2d_same` of this file."""

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, H, W] to [B, O, ceil(H / stride), ceil(W / stride)]."""
        return conv2d_same(x, self.weight, self.bias, self.stride, self.dilation, self.groups)
