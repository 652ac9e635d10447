"""Pooling with TensorFlow's SAME padding and no pad operator on the activation.

Lives here: the functions and the layers that stand in for timm's MaxPool2dSame and AvgPool2dSame.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers.pool2d_same import AvgPool2dSame, MaxPool2dSame
from torch import Tensor

from .conv2d_same import conv2d_same
from .padding import plan_max_pool, same_padding


def max_pool2d_same(x: Tensor, kernel_size: tuple[int, int], stride: tuple[int, int]) -> Tensor:
    """Take the maximum of each window of SAME padding, by the pool's own padding and ceil_mode.

    Padded cells never win, and the gradient goes to the first of equal maxima, as with explicit padding by -inf.

    There is no dilation: NPUs have none in pools, and where a dilated window misses the input altogether, torch's CPU
    kernel (seen in 2.13.0) writes the gradient of its own padding outside the tensor.

    Args:
        x: [B, C, H, W] or [C, H, W].
        kernel_size: rows, columns.
        stride: of rows and columns.

    Returns:
        [B, C, ceil(H / stride), ceil(W / stride)].
    """
    rows, columns = (plan_max_pool(*axis) for axis in zip(x.shape[-2:], kernel_size, stride, strict=True))
    x = F.max_pool2d(
        x, kernel_size, stride, (rows.padding, columns.padding), ceil_mode=rows.ceil_mode or columns.ceil_mode
    )
    return x[..., rows.skip :, columns.skip :] if rows.skip or columns.skip else x


def avg_pool2d_same(x: Tensor, kernel_size: tuple[int, int], stride: tuple[int, int]) -> Tensor:
    """Average each window of SAME padding; padded cells count as zeros, so every window is divided by its full size.

    A padded pool is computed as a depthwise convolution with one constant kernel. The average pool itself would need
    ceil_mode together with divisor_override, which torch_npu's older operators (acl_op; read in op-plugin's source of
    2026) drop in the backward pass; docs/ascend_port.md says more. It can go when torch_npu has no acl_op avg_pool2d.

    Args:
        x: [B, C, H, W] or [C, H, W].
        kernel_size: rows, columns.
        stride: of rows and columns.

    Returns:
        [B, C, ceil(H / stride), ceil(W / stride)], of x's dtype also under autocast, as a pool's result is.
    """
    if not any(sum(same_padding(*axis)) for axis in zip(x.shape[-2:], kernel_size, stride, strict=True)):
        return F.avg_pool2d(x, kernel_size, stride)
    channels = x.shape[-3]
    weight = x.new_full((channels, 1, *kernel_size), 1 / (kernel_size[0] * kernel_size[1]))
    with torch.autocast(x.device.type, enabled=False):
        return conv2d_same(x, weight, stride=stride, groups=channels)


class MaxPool2dSameNoPad(MaxPool2dSame):
    """timm's MaxPool2dSame of dilation 1, same results, computed by `max_pool2d_same` of this file.

    Its ceil_mode changes nothing under SAME padding: every window already starts inside the input.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, H, W] to [B, C, ceil(H / stride), ceil(W / stride)]."""
        return max_pool2d_same(x, self.kernel_size, self.stride)


class AvgPool2dSameNoPad(AvgPool2dSame):
    """timm's AvgPool2dSame, same results, computed by `avg_pool2d_same` of this file.

    Its ceil_mode changes nothing under SAME padding, nor does its count_include_pad: timm pads before the pool, which
    then counts every cell.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, H, W] to [B, C, ceil(H / stride), ceil(W / stride)]."""
        return avg_pool2d_same(x, self.kernel_size, self.stride)
