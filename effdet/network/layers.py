"""The convolution blocks that the feature pyramid and the heads are made of, and their initialisation.

Attribute names are those of the published state dicts. Convolutions and pools come from timm, which knows
TensorFlow's SAME padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn.functional as F
from timm.layers import create_conv2d, create_pool2d, get_act_layer
from timm.layers.pool2d_same import AvgPool2dSame, MaxPool2dSame
from torch import Tensor, nn

LayerMaker = Callable[..., nn.Module]

# A detector starts out predicting this probability for each class, so that background does not swamp the first steps.
# Source: RetinaNet, https://arxiv.org/abs/1708.02002, section 4.1.
PRIOR_PROBABILITY = 0.01


def get_norm_layer(config: Any) -> LayerMaker:
    """Return the maker of norm layers of a model config: a function of the number of channels."""
    norm_layer = config.norm_layer or nn.BatchNorm2d
    return partial(norm_layer, **config.norm_kwargs) if config.norm_kwargs else norm_layer


def get_activation(name: str | None) -> LayerMaker:
    """Return the activation class timm knows by `name`, such as 'swish', 'relu6' or 'hard_swish'; None is SiLU.

    Raises:
        ValueError: timm knows no such activation.
    """
    try:
        return get_act_layer(name or "silu")
    except KeyError as error:
        raise ValueError(
            f"Unknown activation '{name}': use a name of timm.layers.get_act_layer, such as silu, relu, "
            "relu6, leaky_relu, hard_swish or mish."
        ) from error


class ConvBnAct2d(nn.Module):
    """Convolution, then batch norm and activation where asked for."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        dilation: int = 1,
        padding: str = "",
        bias: bool = False,
        norm_layer: LayerMaker | None = nn.BatchNorm2d,
        act_layer: LayerMaker | None = nn.SiLU,
    ) -> None:
        super().__init__()
        self.conv = create_conv2d(
            in_channels, out_channels, kernel_size, stride=stride, dilation=dilation, padding=padding, bias=bias
        )
        self.bn = None if norm_layer is None else norm_layer(out_channels)
        self.act = None if act_layer is None else act_layer(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, in_channels, H, W] to [B, out_channels, H', W']."""
        x = self.conv(x)
        if self.bn is not None:
            x = self.bn(x)
        return x if self.act is None else self.act(x)


class SeparableConv2d(nn.Module):
    """Depthwise convolution, pointwise convolution, then batch norm and activation where asked for."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        dilation: int = 1,
        padding: str = "",
        bias: bool = False,
        channel_multiplier: float = 1.0,
        pw_kernel_size: int = 1,
        norm_layer: LayerMaker | None = nn.BatchNorm2d,
        act_layer: LayerMaker | None = nn.SiLU,
    ) -> None:
        super().__init__()
        mid_channels = int(in_channels * channel_multiplier)
        self.conv_dw = create_conv2d(
            in_channels, mid_channels, kernel_size, stride=stride, dilation=dilation, padding=padding, depthwise=True
        )
        self.conv_pw = create_conv2d(mid_channels, out_channels, pw_kernel_size, padding=padding, bias=bias)
        self.bn = None if norm_layer is None else norm_layer(out_channels)
        self.act = None if act_layer is None else act_layer(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, in_channels, H, W] to [B, out_channels, H', W']."""
        x = self.conv_pw(self.conv_dw(x))
        if self.bn is not None:
            x = self.bn(x)
        return x if self.act is None else self.act(x)


class Interpolate2d(nn.Module):
    """F.interpolate as a module: give either `size` (height, width) or `scale_factor`."""

    def __init__(
        self,
        size: int | tuple[int, ...] | None = None,
        scale_factor: float | tuple[float, float] | None = None,
        mode: str = "nearest",
        align_corners: bool = False,
    ) -> None:
        super().__init__()
        self.size = size
        self.scale_factor = scale_factor
        self.mode = mode
        self.align_corners = None if mode == "nearest" else align_corners

    def forward(self, input: Tensor) -> Tensor:
        """Resize [B, C, H, W]."""
        return F.interpolate(input, self.size, self.scale_factor, self.mode, self.align_corners)


def _make_pool(kind: str, input_size: tuple[int, int], output_size: tuple[int, int], pad_type: str) -> nn.Module:
    """Make the pool that maps one feature size to a smaller one: kernel stride + 1 on each axis that shrinks."""
    strides = [(size - 1) // out + 1 for size, out in zip(input_size, output_size, strict=True)]
    if strides[0] == strides[1]:
        return create_pool2d(kind, kernel_size=strides[0] + 1, stride=strides[0], padding=pad_type)
    # An axis that is down to one cell stays as it is.
    height, width = (stride + 1 if stride > 1 else 1 for stride in strides)
    kernel, stride_hw = (height, width), (strides[0], strides[1])
    if pad_type == "same":
        return (MaxPool2dSame if kind == "max" else AvgPool2dSame)(kernel, stride_hw)
    return (nn.MaxPool2d if kind == "max" else nn.AvgPool2d)(kernel, stride_hw, (height // 2, width // 2))


class ResampleFeatureMap(nn.Sequential):
    """Bring a feature map to another level: 1x1 convolution if the channels differ, then pool or interpolate."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        input_size: tuple[int, int],
        output_size: tuple[int, int],
        pad_type: str = "",
        downsample: str | None = None,
        upsample: str | None = None,
        norm_layer: LayerMaker = nn.BatchNorm2d,
        apply_bn: bool = False,
        redundant_bias: bool = False,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.input_size = input_size
        self.output_size = output_size
        if in_channels != out_channels:
            self.add_module(
                "conv",
                ConvBnAct2d(
                    in_channels,
                    out_channels,
                    kernel_size=1,
                    padding=pad_type,
                    bias=not apply_bn or redundant_bias,
                    norm_layer=norm_layer if apply_bn else None,
                    act_layer=None,
                ),
            )
        downsample, upsample = downsample or "max", upsample or "nearest"
        if input_size[0] > output_size[0] or input_size[1] > output_size[1]:
            pooled = downsample in ("max", "avg")
            self.add_module(
                "downsample",
                _make_pool(downsample, input_size, output_size, pad_type)
                if pooled
                else Interpolate2d(size=tuple(output_size), mode=downsample),
            )
        elif input_size[0] < output_size[0] or input_size[1] < output_size[1]:
            self.add_module("upsample", Interpolate2d(size=tuple(output_size), mode=upsample))


def _glorot_uniform_(weight: Tensor, groups: int = 1) -> None:
    field = math.prod(weight.shape[2:])
    fan_average = (weight.shape[1] * field + weight.shape[0] * field // groups) / 2
    limit = math.sqrt(3 / max(1.0, fan_average))
    nn.init.uniform_(weight, -limit, limit)


def _fan_in_normal_(weight: Tensor) -> None:
    nn.init.normal_(weight, std=1 / math.sqrt(max(1, math.prod(weight.shape[1:]))))


def _init_bias_(bias: Tensor | None, name: str) -> None:
    if bias is not None:
        nn.init.constant_(
            bias, -math.log((1 - PRIOR_PROBABILITY) / PRIOR_PROBABILITY) if "class_net.predict" in name else 0.0
        )


def init_weight(module: nn.Module, name: str = "") -> None:
    """Initialise one block of the FPN or the heads as the TensorFlow original does.

    Args:
        module: a block of this file or a batch norm; others are left alone.
        name: its dotted name in the model; heads and FPN differ, and the class head's last bias is special.

    Source: google/automl, efficientdet/efficientdet_arch.py.
    """
    in_head = "box_net" in name or "class_net" in name
    if isinstance(module, SeparableConv2d):
        for conv in (module.conv_dw, module.conv_pw):
            if in_head:
                _fan_in_normal_(conv.weight)
            else:
                _glorot_uniform_(conv.weight, conv.groups)
        _init_bias_(module.conv_pw.bias, name)
    elif isinstance(module, ConvBnAct2d):
        if in_head:
            nn.init.normal_(module.conv.weight, std=0.01)
        else:
            _glorot_uniform_(module.conv.weight)
        _init_bias_(module.conv.bias, name)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


def init_weight_alt(module: nn.Module, name: str = "") -> None:
    """Initialise as EfficientNet's backbones do: normal with variance 2 / fan_out; see `init_weight`."""
    if isinstance(module, nn.Conv2d):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
        _init_bias_(module.bias, name)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
