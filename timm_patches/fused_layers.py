"""Large layers of EfficientNet's blocks in few passes over memory.

Lives here: a BatchNormAct2d that does batch norm and SiLU in one and keeps its input only (the activation's input is
computed again in the backward pass: a third less memory), a SqueezeExcite whose backward pass writes no product of
the size of its input, and depthwise convolutions (depthwise_cpu.py). They are for CPUs, where they work in pieces that
stay in the cache. Small layers, other devices, dtypes and memory layouts and eval mode go timm's way. The results are
timm's up to the order of sums.

Source of the formulas: Ioffe & Szegedy 2015, "Batch Normalization", section 3; Hu et al. 2018, "Squeeze-and-Excitation
Networks", section 3.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import BatchNormAct2d
from timm.layers.conv2d_same import Conv2dSame
from timm.models._efficientnet_blocks import SqueezeExcite
from torch import Tensor, nn

from .depthwise_cpu import COLUMNS, depthwise_conv2d
from .exchange import exchange_layers
from .padding import plan_conv

# Elements. Below, everything is in the cache anyhow, and calls would cost more than they save.
SMALLEST_NORM = 1 << 22
SMALLEST_SQUEEZE = 1 << 20
SMALLEST_STRIDED = 1 << 20  # of depthwise convolutions that differ by their padding only
PIECE = 1 << 17  # elements of one piece


class _BatchNormSiLU(torch.autograd.Function):
    """Training-mode batch norm over [B, C, H, W] in channels-last layout, then SiLU."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        momentum: float,
        eps: float,
    ) -> Tensor:
        mean, var = torch.ops.aten.batch_norm_update_stats(x, running_mean, running_var, momentum)
        inverse_std = (var + eps).rsqrt()
        scale = weight * inverse_std
        shift = bias - mean * scale
        result = torch.empty_like(x)
        for piece, out in zip(_pieces(_rows(x)), _pieces(_rows(result)), strict=True):
            torch._C._nn.silu(torch.addcmul(shift, piece, scale), out=out)
        ctx.save_for_backward(x, mean, inverse_std, scale, shift)
        return result

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, inverse_std, scale, shift = ctx.saved_tensors
        rows, gradient = _rows(x), torch.empty_like(x)
        incoming = _rows(grad_output.contiguous(memory_format=torch.channels_last))
        total, weighted = torch.zeros_like(mean), torch.zeros_like(mean)  # of the gradient of the normalised input
        for piece, grad, out in zip(_pieces(rows), _pieces(incoming), _pieces(_rows(gradient)), strict=True):
            activation_input = torch.addcmul(shift, piece, scale)
            torch.ops.aten.silu_backward.grad_input(grad, activation_input, grad_input=out)
            total += out.sum(0)
            weighted += torch.sub(piece, mean, out=activation_input).mul_(out).sum(0)
        weighted *= inverse_std
        slope = -scale * inverse_std * weighted / len(rows)
        constant = -scale * total / len(rows) - slope * mean
        for piece, out in zip(_pieces(rows), _pieces(_rows(gradient)), strict=True):
            torch.addcmul(constant, out, scale, out=out).addcmul_(piece, slope)
        return gradient, weighted, total, None, None, None, None


class _Excite(torch.autograd.Function):
    """The product of [B, C, H, W] in channels-last layout and a gate [B, C, 1, 1]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(x, gate)
        return x * gate

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        x, gate = ctx.saved_tensors
        incoming, gradient = grad_output.contiguous(memory_format=torch.channels_last), torch.empty_like(x)
        gate_gradient = torch.zeros_like(gate)
        for image in range(len(x)):
            factor, total = gate[image].flatten(), gate_gradient[image].flatten()
            rows = (_pieces(_rows(tensor[image : image + 1])) for tensor in (x, incoming, gradient))
            for piece, grad, out in zip(*rows, strict=True):
                total += torch.mul(piece, grad, out=out).sum(0)
                torch.mul(grad, factor, out=out)
        return gradient, gate_gradient


def _rows(x: Tensor) -> Tensor:
    """View channels-last [B, C, H, W] as [B * H * W, C]."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def _pieces(rows: Tensor) -> tuple[Tensor, ...]:
    return rows.split(max(1, PIECE // rows.shape[1]))


def _pays(x: Tensor, smallest: int) -> bool:
    return (
        not torch.jit.is_tracing()
        and x.device.type == "cpu"
        and x.numel() >= smallest
        and x.dtype == torch.float32
        and x.is_contiguous(memory_format=torch.channels_last)
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )


class FusedBatchNormAct2d(BatchNormAct2d):
    """timm's BatchNormAct2d, with the ways above where they pay."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise and activate [B, C, H, W]."""
        if not (self._can_fuse() and _pays(x, SMALLEST_NORM)):
            return super().forward(x)
        self.num_batches_tracked.add_(1)
        return _BatchNormSiLU.apply(
            x, self.weight, self.bias, self.running_mean, self.running_var, self.momentum, self.eps
        )

    def _can_fuse(self) -> bool:
        return (
            self.training
            and type(self.act) is nn.SiLU
            and type(self.drop) is nn.Identity
            and self.affine
            and self.weight.dtype == torch.float32
            and self.track_running_stats
            and self.momentum is not None
        )


class FusedSqueezeExcite(SqueezeExcite):
    """timm's SqueezeExcite of EfficientNets, with the ways above where they pay."""

    def forward(self, x: Tensor) -> Tensor:
        """Scale the channels of [B, C, H, W]."""
        if not _pays(x, SMALLEST_SQUEEZE):
            return super().forward(x)
        # The gradient of a mean is as large as its input, that of a sum is one number for each channel.
        mean = x.sum((2, 3), keepdim=True) / (x.shape[2] * x.shape[3])
        return _Excite.apply(x, self.gate(self.conv_expand(self.act1(self.conv_reduce(mean)))))


class FusedConv2dSame(Conv2dSame):
    """timm's Conv2dSame, with the ways above where they pay."""

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, H, W] to [B, O, ceil(H / stride), ceil(W / stride)]."""
        smallest = 0 if self.kernel_size[1] > COLUMNS else SMALLEST_STRIDED
        if not (is_depthwise(self) and _conv_pays(x, self.weight, smallest)):
            return super().forward(x)
        plans = [plan_conv(*axis) for axis in zip(x.shape[2:], self.kernel_size, self.stride, strict=True)]
        return depthwise_conv2d(
            x, self.weight, self.stride, tuple(plan.padding for plan in plans), tuple(plan.lead for plan in plans)
        )


class FusedConv2d(nn.Conv2d):
    """A depthwise convolution of more than three columns, with the ways above where they pay."""

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, H, W] to [B, C, OH, OW]."""
        if not _conv_pays(x, self.weight, smallest=0):
            return super().forward(x)
        return depthwise_conv2d(x, self.weight, self.stride, self.padding)


def _conv_pays(x: Tensor, weight: Tensor, smallest: int) -> bool:
    return (
        _pays(x, smallest)
        and x.ndim == 4
        and x.numel() > 0
        and x.shape[1] == len(weight) > 1
        and weight.requires_grad
        and weight.dtype == torch.float32
        and weight.device == x.device
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.cpu.get_cpu_capability().startswith("AVX")
    )


_FUSED = {
    BatchNormAct2d: FusedBatchNormAct2d,
    SqueezeExcite: FusedSqueezeExcite,
    Conv2dSame: FusedConv2dSame,
    nn.Conv2d: FusedConv2d,
}
_TIMMS = {fused: timms for timms, fused in _FUSED.items()}


def is_depthwise(layer: nn.Conv2d) -> bool:
    """Tell whether a layer convolves each channel by itself, without bias and dilation."""
    return layer.groups == layer.in_channels == layer.out_channels and layer.dilation == (1, 1) and layer.bias is None


def _gains(layer: nn.Conv2d) -> bool:
    return (
        is_depthwise(layer)
        and layer.kernel_size[1] > COLUMNS
        and layer.padding_mode == "zeros"
        and isinstance(layer.padding, tuple)
    )


def convert_fused_layers(model: nn.Module, fused: bool = True) -> int:
    """Choose how BatchNormAct2d, SqueezeExcite and depthwise layers work; in place, reversible, idempotent.

    Args:
        model: any module; only layers inside it take part, of exactly these classes.
        fused: False to undo.

    Returns:
        The number of layers changed by this call.
    """
    classes = _FUSED if fused else _TIMMS
    return len(
        exchange_layers(
            model, lambda layer: None if type(layer) is nn.Conv2d and not _gains(layer) else classes.get(type(layer))
        )
    )
