"""The feature pyramid: cells of nodes that each sum resampled feature maps with learned weights.

Source: EfficientDet, https://arxiv.org/abs/1911.09070, section 3. The layouts are in config/fpn_config.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from effdet.config import get_fpn_config
from effdet.config.model_spec import ModelSpec
from effdet.ops.sizes import get_feat_sizes
from effdet.runtime.device import few_launches_pay

from .layers import ConvBnAct2d, LayerMaker, ResampleFeatureMap, SeparableConv2d, get_activation, get_norm_layer


class SequentialList(nn.Sequential):
    """A sequence of modules that map a list of feature maps to a list of feature maps."""

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        """Apply the modules in order."""
        for module in self:
            x = module(x)
        return x


class FpnCombine(nn.Module):
    """Sum the feature maps at some offsets, each resampled to the node's level, with one weight for each."""

    def __init__(
        self,
        feature_info: Sequence[dict],
        fpn_channels: int,
        inputs_offsets: Sequence[int],
        output_size: tuple[int, int],
        pad_type: str = "",
        downsample: str | None = None,
        upsample: str | None = None,
        norm_layer: LayerMaker = nn.BatchNorm2d,
        apply_resample_bn: bool = False,
        redundant_bias: bool = False,
        weight_method: str = "attn",
    ) -> None:
        super().__init__()
        if weight_method not in ("attn", "fastattn", "sum"):
            raise ValueError(f"Unknown weight_method '{weight_method}': choose attn, fastattn or sum.")
        self.inputs_offsets = tuple(inputs_offsets)
        self.weight_method = weight_method
        self.resample = nn.ModuleDict(
            {
                str(offset): ResampleFeatureMap(
                    feature_info[offset]["num_chs"],
                    fpn_channels,
                    feature_info[offset]["size"],
                    output_size,
                    pad_type,
                    downsample,
                    upsample,
                    norm_layer,
                    apply_resample_bn,
                    redundant_bias,
                )
                for offset in self.inputs_offsets
            }
        )
        self.edge_weights = None if weight_method == "sum" else nn.Parameter(torch.ones(len(self.inputs_offsets)))

    def forward(self, x: list[Tensor], weights: Sequence[Tensor] | None = None) -> Tensor:
        """Combine the feature maps of the cell so far into one [B, C, H, W], without a stacked copy of them.

        Args:
            x: the feature maps.
            weights: a factor without dimensions for each input, where they are known already (`normalize_together`).
        """
        nodes = [
            resample(x[offset]) for offset, resample in zip(self.inputs_offsets, self.resample.values(), strict=True)
        ]
        if self.edge_weights is None:
            total = nodes[0]
            for node in nodes[1:]:
                total = total + node
            return total
        if weights is None:
            weights = _normalize(self.edge_weights, self.weight_method).unbind(0)
        # A scalar tensor does not change the dtype of the map it scales.
        total = nodes[0] * weights[0]
        for node, weight in zip(nodes[1:], weights[1:], strict=True):
            total = total + node * weight
        return total


def _normalize(edge_weights: Tensor, method: str) -> Tensor:
    """Turn learned edge weights [..., n] into the factors of n feature maps."""
    if method == "attn":
        return torch.softmax(edge_weights, -1)
    positive = edge_weights.relu()
    return positive / (positive.sum(-1, keepdim=True) + 0.0001)


def normalize_together(nodes: Sequence[FpnCombine], dtype: torch.dtype) -> dict[FpnCombine, Sequence[Tensor]]:
    """Compute the factors of all nodes in a few operations instead of a few for each node.

    Args:
        nodes: those that have no weights are left out.
        dtype: of the feature maps.

    Returns:
        What `FpnCombine.forward` takes, for each node.
    """
    alike: dict[tuple[str, int], list[FpnCombine]] = {}
    for node in nodes:
        if node.edge_weights is not None:
            alike.setdefault((node.weight_method, len(node.edge_weights)), []).append(node)
    factors: dict[FpnCombine, Sequence[Tensor]] = {}
    for (method, inputs), group in alike.items():
        weights: list[Tensor] = [each for node in group if (each := node.edge_weights) is not None]
        table = _normalize(torch.stack(weights), method).to(dtype)
        scalars = table.flatten().unbind(0)  # taken apart at once, as each part would have a gradient of the whole
        factors.update({node: scalars[index * inputs : (index + 1) * inputs] for index, node in enumerate(group)})
    return factors


class Fnode(nn.Module):
    """One node: combine, then activation and convolution."""

    def __init__(self, combine: nn.Module, after_combine: nn.Module) -> None:
        super().__init__()
        self.combine = combine
        self.after_combine = after_combine

    def forward(self, x: list[Tensor], weights: Sequence[Tensor] | None = None) -> Tensor:
        """Map the feature maps of the cell so far to the node's output; `weights` as in FpnCombine."""
        return self.after_combine(self.combine(x) if weights is None else self.combine(x, weights))


class BiFpnLayer(nn.Module):
    """One cell of the pyramid."""

    def __init__(
        self,
        feature_info: Sequence[dict],
        feat_sizes: Sequence[tuple[int, int]],
        fpn_config: Any,
        fpn_channels: int,
        num_levels: int = 5,
        pad_type: str = "",
        downsample: str | None = None,
        upsample: str | None = None,
        norm_layer: LayerMaker = nn.BatchNorm2d,
        act_layer: LayerMaker = nn.SiLU,
        apply_resample_bn: bool = False,
        pre_act: bool = True,
        separable_conv: bool = True,
        redundant_bias: bool = False,
    ) -> None:
        super().__init__()
        self.num_levels = num_levels
        nodes_info = [{"num_chs": fpn_channels, "size": feat_sizes[node["feat_level"]]} for node in fpn_config.nodes]
        cell_info = [*feature_info, *nodes_info]
        conv = SeparableConv2d if separable_conv else ConvBnAct2d
        self.fnode = nn.ModuleList()
        for node in fpn_config.nodes:
            combine = FpnCombine(
                cell_info,
                fpn_channels,
                node["inputs_offsets"],
                feat_sizes[node["feat_level"]],
                pad_type,
                downsample,
                upsample,
                norm_layer,
                apply_resample_bn,
                redundant_bias,
                node["weight_method"],
            )
            after_combine = nn.Sequential()
            if pre_act:
                after_combine.add_module("act", act_layer(inplace=True))
            after_combine.add_module(
                "conv",
                conv(
                    fpn_channels,
                    fpn_channels,
                    kernel_size=3,
                    padding=pad_type,
                    bias=redundant_bias and pre_act,
                    norm_layer=norm_layer,
                    act_layer=None if pre_act else act_layer,
                ),
            )
            self.fnode.append(Fnode(combine, after_combine))
        self.feature_info = cell_info[-num_levels:]

    def forward(self, x: list[Tensor], factors: Mapping[nn.Module, Sequence[Tensor]] | None = None) -> list[Tensor]:
        """Map one feature map for each level to one for each level, finest first.

        Args:
            x: the feature maps.
            factors: of `normalize_together`; None has each node compute its own.
        """
        maps = list(x)
        for node in cast("Iterable[Fnode]", self.fnode):
            maps.append(node(maps, (factors or {}).get(node.combine)))
        return maps[-self.num_levels :]


class BiFpn(nn.Module):
    """The whole pyramid: extra coarse levels from the backbone's last map, then the cells."""

    def __init__(self, config: Any, feature_info: Sequence[dict]) -> None:
        """Build from a model config and the backbone's maps, a list of {'num_chs', ...}, finest first."""
        super().__init__()
        self.num_levels = config.num_levels
        norm_layer = get_norm_layer(config)
        layout = ModelSpec(config.fpn_config or get_fpn_config(config.fpn_name, config.min_level, config.max_level))
        feat_sizes = get_feat_sizes(config.image_size, config.max_level)
        info = [
            {"num_chs": entry["num_chs"], "size": feat_sizes[config.min_level + index]}
            for index, entry in enumerate(feature_info)
        ]

        self.resample = nn.ModuleDict()
        for index in range(len(info), config.num_levels):
            size = feat_sizes[config.min_level + index]
            # Only the first extra level has a convolution: from then on the channels agree.
            self.resample[str(index)] = ResampleFeatureMap(
                info[-1]["num_chs"],
                config.fpn_channels,
                info[-1]["size"],
                size,
                config.pad_type,
                config.downsample_type,
                config.upsample_type,
                norm_layer,
                config.apply_resample_bn,
                config.redundant_bias,
            )
            info.append({"num_chs": config.fpn_channels, "size": size})

        self.cell = SequentialList()
        for repeat in range(config.fpn_cell_repeats):
            layer = BiFpnLayer(
                info,
                feat_sizes,
                layout,
                config.fpn_channels,
                config.num_levels,
                config.pad_type,
                config.downsample_type,
                config.upsample_type,
                norm_layer,
                get_activation(config.act_type),
                config.apply_resample_bn,
                not config.conv_bn_relu_pattern,
                config.separable_conv,
                config.redundant_bias,
            )
            self.cell.add_module(str(repeat), layer)
            info = layer.feature_info

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        """Map the backbone's feature maps to `num_levels` maps of `fpn_channels` channels, finest first."""
        maps = list(x)
        for resample in self.resample.values():
            maps.append(resample(maps[-1]))
        if not few_launches_pay(maps[0].device):
            return self.cell(maps)
        cells = cast("Iterable[BiFpnLayer]", self.cell)
        nodes = [cast(FpnCombine, node.combine) for cell in cells for node in cast("Iterable[Fnode]", cell.fnode)]
        factors = normalize_together(nodes, maps[0].dtype)
        for cell in self.cell:
            maps = cell(maps, factors)
        return maps
