"""Depthwise convolution with TensorFlow's SAME padding on CUDA, for channels-last tensors.

Lives here: the function and the layer that stands in for timm's Conv2dSame where it pays. The kernels are in
depthwise_kernels.py, how much is padded in padding.py. Triton is imported when the function is first called.

cuDNN is slow on depthwise layers of stride 2, and timm's layer copies the whole padded input besides. Here the input
and the gradient are read as they are, with masks for the padding, and sums are in float32. Sums have a fixed order, so
that equal inputs give equal bits.
"""
from __future__ import annotations

import functools
from types import ModuleType
from typing import Any, NamedTuple

import torch
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .padding import same_length, same_padding
from .triton_switch import uses_triton

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
KERNELS = (3, 5)  # rows and columns that a layer's kernel may have
_TILE = 1024  # elements of one program forward and of one accumulator of the input's gradient: 8 of each thread
_WEIGHT_TILE = 4096  # accumulators of one program of the weight's gradient: 32 of each thread
_WEIGHT_CHANNELS = 32  # channels of one program of the weight's gradient
_WEIGHT_PROGRAMS = 1056  # of the weight's gradient, about: 8 for each multiprocessor of a large GPU
_WARPS = 4


class _Geometry(NamedTuple):
    """The arguments that all kernels share, in their order."""

    channels: int
    height: int
    width: int
    out_height: int
    out_width: int
    pad_top: int
    pad_left: int


class _DepthwiseSame(torch.autograd.Function):
    """The convolution of x [B, C, H, W], channels-last, with weight [C, 1, kh, kw] rounded to the dtype of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        taps = x.new_empty(weight.shape[2] * weight.shape[3], x.shape[1])
        taps.copy_(weight.flatten(1).t())
        ctx.save_for_backward(x, taps)
        ctx.weight_shape, ctx.weight_dtype, ctx.stride = weight.shape, weight.dtype, stride
        return _forward(x, taps, weight.shape[2:], stride)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, taps = ctx.saved_tensors
        dy = grad_output.contiguous(memory_format=torch.channels_last)
        kernel, dx, dweight = ctx.weight_shape[2:], None, None
        if ctx.needs_input_grad[0]:
            dx = _grad_input(dy, taps, x.shape, kernel, ctx.stride)
        if ctx.needs_input_grad[1]:
            dweight = _grad_weight(x, dy, kernel, ctx.stride).t().reshape(ctx.weight_shape).to(ctx.weight_dtype)
        return dx, dweight, None


def _forward(x: Tensor, taps: Tensor, kernel: tuple[int, int], stride: int) -> Tensor:
    """Return the output; taps is [kh * kw, C]."""
    geometry = _geometry(x.shape, kernel, stride)
    y = _empty((x.shape[0], geometry.channels, geometry.out_height, geometry.out_width), x)
    block_w, block_c = _tile(geometry.out_width, geometry.channels)
    rows = x.shape[0] * geometry.out_height
    programs = rows * _blocks(geometry.out_width, block_w) * _blocks(geometry.channels, block_c)
    with torch.cuda.device_of(x):
        _kernels().forward_kernel[(programs,)](x, taps, y, *geometry, KH=kernel[0], KW=kernel[1], STRIDE=stride,
                                               BLOCK_W=block_w, BLOCK_C=block_c, num_warps=_WARPS)
    return y


def _grad_input(dy: Tensor, taps: Tensor, shape: torch.Size, kernel: tuple[int, int], stride: int) -> Tensor:
    """Return the gradient of the input of this shape."""
    geometry = _geometry(shape, kernel, stride)
    dx = _empty(shape, dy)
    # Cells of stride * stride elements of the padded input, from the first to the last that touch the input.
    row_cells, col_cells = ((size - 1 + pad) // stride - pad // stride + 1
                            for size, pad in zip(shape[2:], geometry[-2:], strict=True))
    block_w, block_c = _tile(col_cells, geometry.channels)
    programs = shape[0] * row_cells * _blocks(col_cells, block_w) * _blocks(geometry.channels, block_c)
    with torch.cuda.device_of(dy):
        _kernels().grad_input_kernel[(programs,)](dy, taps, dx, *geometry, row_cells, col_cells, KH=kernel[0],
                                                  KW=kernel[1], STRIDE=stride, BLOCK_W=block_w, BLOCK_C=block_c,
                                                  num_warps=_WARPS)
    return dx


def _grad_weight(x: Tensor, dy: Tensor, kernel: tuple[int, int], stride: int) -> Tensor:
    """Return the gradient of the weight, float32 [kh * kw, C]."""
    geometry = _geometry(x.shape, kernel, stride)
    taps = _power_of_two(kernel[0] * kernel[1])
    block_w = max(1, _WEIGHT_TILE // (taps * _WEIGHT_CHANNELS))
    units = x.shape[0] * geometry.out_height * _blocks(geometry.out_width, block_w)
    channel_blocks = _blocks(geometry.channels, _WEIGHT_CHANNELS)
    units_per_split = max(1, _blocks(units * channel_blocks, _WEIGHT_PROGRAMS))
    splits = _blocks(units, units_per_split)
    partial = x.new_empty(splits, kernel[0] * kernel[1], geometry.channels, dtype=torch.float32)
    with torch.cuda.device_of(x):
        _kernels().grad_weight_kernel[(splits * channel_blocks,)](
            x, dy, partial, *geometry, units, units_per_split, KH=kernel[0], KW=kernel[1], STRIDE=stride, TAPS=taps,
            BLOCK_W=block_w, BLOCK_C=_WEIGHT_CHANNELS, num_warps=_WARPS)
    return partial.sum(0)


def _geometry(shape: torch.Size, kernel: tuple[int, int], stride: int) -> _Geometry:
    _, channels, height, width = shape
    return _Geometry(channels, height, width, same_length(height, stride), same_length(width, stride),
                     same_padding(height, kernel[0], stride)[0], same_padding(width, kernel[1], stride)[0])


def _empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _tile(columns: int, channels: int) -> tuple[int, int]:
    """Return the columns and channels of one program; 32 channels where 64 would leave many threads idle."""
    block_c = 64 if _blocks(channels, 64) * 64 * 8 <= channels * 9 else 32
    return min(_TILE // block_c, _power_of_two(columns)), block_c


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def _power_of_two(size: int) -> int:
    """Return the smallest power of two that is not below size >= 1."""
    return 1 << (size - 1).bit_length()


@functools.cache
def _kernels() -> ModuleType:
    from . import depthwise_kernels

    return depthwise_kernels


def _compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which a convolution of x takes place."""
    if x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def depthwise_conv2d_same(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Convolve each channel by itself with SAME padding, lopsided where TensorFlow's is.

    Under autocast it works as F.conv2d does: input and output in autocast's dtype, the weight rounded to it, gradients
    in the dtypes of x and weight. Gradients of gradients raise an error.

    Args:
        x: [B, C, H, W] on CUDA, best in channels-last layout, another one is copied; not empty.
        weight: [C, 1, kh, kw], kh and kw from `KERNELS`.
        stride: of rows and columns, 1 or 2.

    Returns:
        [B, C, ceil(H / stride), ceil(W / stride)] in channels-last layout.

    Raises:
        ValueError: a shape, stride or dtype that the kernels do not know.
    """
    dtype = _compute_dtype(x)
    if not (x.ndim == weight.ndim == 4 and weight.shape[:2] == (x.shape[1], 1) and stride in (1, 2) and x.numel() > 0
            and set(weight.shape[2:]) <= set(KERNELS) and dtype in DTYPES):
        raise ValueError(f"No depthwise kernel for an input {tuple(x.shape)} of {dtype}, a weight "
                         f"{tuple(weight.shape)} and stride {stride}.")
    return _DepthwiseSame.apply(x.to(dtype), weight, stride)


def is_depthwise(layer: nn.Conv2d) -> bool:
    """Tell whether a layer convolves each channel by itself, without bias and dilation."""
    return (layer.groups == layer.in_channels == layer.out_channels and layer.dilation == (1, 1)
            and layer.bias is None)


class DepthwiseConv2dSame(Conv2dSame):
    """timm's Conv2dSame, computed by `depthwise_conv2d_same` where it pays."""

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, H, W] to [B, O, ceil(H / stride), ceil(W / stride)]."""
        if not self.pays(x):
            return super().forward(x)
        return depthwise_conv2d_same(x, self.weight, self.stride[0])

    def pays(self, x: Tensor) -> bool:
        """Tell whether the kernels take this layer and its input, and are faster."""
        return uses_triton(x.device) and not torch.jit.is_tracing() and self._fits() and self._takes(x)

    def _fits(self) -> bool:
        return is_depthwise(self) and self.stride == (2, 2) and set(self.kernel_size) <= set(KERNELS)

    def _takes(self, x: Tensor) -> bool:
        """Tell whether the kernels take x; what F.conv2d has an error for is left to it."""
        dtype = _compute_dtype(x)
        same = x.dtype == self.weight.dtype or (dtype in DTYPES and self.weight.dtype in DTYPES
                                                and torch.is_autocast_enabled(x.device.type))
        return (dtype in DTYPES and same and x.ndim == 4 and x.shape[1] == self.in_channels and x.numel() > 0
                and x.device == self.weight.device and x.is_contiguous(memory_format=torch.channels_last))
