"""The prediction heads: convolutions shared by all levels, with batch norms of their own for each level."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NoReturn

from torch import Tensor, nn

from effdet.runtime.sync_batchnorm import FusedSyncBatchNorm, normalize_together

from .layers import ConvBnAct2d, SeparableConv2d, get_activation, get_norm_layer


class HeadNet(nn.Module):
    """Map each level's features to `num_outputs` values for each anchor.

    `model.class_net = HeadNet(config, num_outputs=K)` gives a model another number of classes; `config.num_classes`
    must be set to K too. The state dict orders the batch norms by repeat, then level, or with `head_bn_level_first` by
    level, then repeat.
    """

    def __init__(self, config: Any, num_outputs: int) -> None:
        """Build a head from a model config.

        Args:
            config: the model config, any object with its fields.
            num_outputs: values for each anchor: K for classes, 4 for boxes.
        """
        super().__init__()
        self.num_levels = config.num_levels
        self.bn_level_first = bool(getattr(config, "head_bn_level_first", False))
        norm_layer = get_norm_layer(config)
        channels, repeats = config.fpn_channels, config.box_class_repeats
        conv = SeparableConv2d if config.separable_conv else ConvBnAct2d
        options = {"kernel_size": 3, "padding": config.pad_type, "norm_layer": None, "act_layer": None}
        self.conv_rep = nn.ModuleList(
            conv(channels, channels, bias=config.redundant_bias, **options) for _ in range(repeats)
        )
        if self.bn_level_first:
            self.bn_rep = nn.ModuleList(
                nn.ModuleList(norm_layer(channels) for _ in range(repeats)) for _ in range(self.num_levels)
            )
        else:
            self.bn_rep = nn.ModuleList(
                nn.ModuleList(_named_bn(norm_layer(channels)) for _ in range(self.num_levels)) for _ in range(repeats)
            )
        self.act = get_activation(getattr(config, "head_act_type", None) or config.act_type)(inplace=True)
        num_anchors = len(config.aspect_ratios) * config.num_scales
        self.predict = conv(channels, num_outputs * num_anchors, bias=True, **options)

    def toggle_bn_level_first(self) -> None:
        """Change the state dict's order of batch norms to the other one; the function computed stays the same."""
        flipped = nn.ModuleList()
        for column in zip(*(row.children() for row in self.bn_rep), strict=True):
            flipped.append(
                nn.ModuleList(_named_bn(bn) if self.bn_level_first else bn.get_submodule("bn") for bn in column)
            )
        self.bn_level_first = not self.bn_level_first
        self.bn_rep = flipped

    def __prepare_scriptable__(self) -> NoReturn:
        """Say what to do instead of torch.jit.script, which asks this of each part of a model."""
        raise RuntimeError(
            "torch.jit.script does not take this network: trace it (torch.jit.trace), or have "
            "`python -m effdet.export --format torchscript` write network and post-processing as TorchScript."
        )

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        """Map [B, C, H, W] of each level to [B, A * num_outputs, H, W] of each level."""
        features = list(x)
        for repeat, conv in enumerate(self.conv_rep):
            features, norms = [conv(level) for level in features], self._batch_norms(repeat)
            if isinstance(norms[0], FusedSyncBatchNorm):
                features = normalize_together(norms, features)
            else:
                features = [norm(level) for norm, level in zip(norms, features, strict=True)]
            features = [self.act(level) for level in features]
        return [self.predict(level) for level in features]

    def _batch_norms(self, repeat: int) -> list[nn.Module]:
        """Return the levels' batch norms behind one convolution."""
        if self.bn_level_first:
            return [level.get_submodule(str(repeat)) for level in self.bn_rep]
        return [level.get_submodule("bn") for level in self.bn_rep[repeat].children()]


def _named_bn(bn: nn.Module) -> nn.Sequential:
    """Wrap a batch norm as the repeat-first state dicts have it: under the name 'bn'."""
    return nn.Sequential(OrderedDict([("bn", bn)]))
