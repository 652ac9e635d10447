"""EfficientDet: a timm backbone, a feature pyramid and two heads.

Anchors, loss and post-processing are not part of the model: bench.py adds them.

Source: EfficientDet, https://arxiv.org/abs/1911.09070.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from numbers import Integral
from typing import Any, NoReturn

from timm import create_model
from torch import Tensor, nn

from effdet.config import get_fpn_config, set_config_readonly, set_config_writeable
from effdet.config.model_spec import change_config
from effdet.network.bifpn import BiFpn, BiFpnLayer, Fnode, FpnCombine, SequentialList
from effdet.network.layers import (
    ConvBnAct2d,
    Interpolate2d,
    ResampleFeatureMap,
    SeparableConv2d,
    get_activation,
    get_norm_layer,
    init_weight,
    init_weight_alt,
)
from effdet.ops.sizes import check_image_size, get_feat_sizes
from effdet.runtime.sync_batchnorm import FusedSyncBatchNorm, normalize_together


def get_feature_info(backbone: nn.Module) -> list[dict[str, int]]:
    """Return {'num_chs', 'reduction'} of each feature map of a timm features_only backbone, finest first."""
    return backbone.feature_info.get_dicts(keys=["num_chs", "reduction"])


def _create_backbone(config: Any, pretrained: bool) -> nn.Module:
    options = dict(config.backbone_args or {})
    try:
        return create_model(
            config.backbone_name,
            features_only=True,
            pretrained=pretrained,
            out_indices=tuple(config.backbone_indices or (2, 3, 4)),
            **options,
        )
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise
        raise RuntimeError(
            f"The ImageNet weights of the backbone '{config.backbone_name}' could not be fetched: {error}. Pass "
            "pretrained_backbone=False for random weights, or a checkpoint of the whole model."
        ) from error


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
            features = [conv(level) for level in features]
            norms = self._batch_norms(repeat)
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


class EfficientDet(nn.Module):
    """The network: images to class logits and box deltas for each anchor of each level."""

    def __init__(self, config: Any, pretrained_backbone: bool = True, alternate_init: bool = False) -> None:
        """Build the network of a model config.

        Args:
            config: a node of `get_efficientdet_config`, which is made read-only, and an `image_size` of one number the
                square it stands for; or a ModelSpec.
            pretrained_backbone: start from timm's ImageNet weights, fetched when not in the cache.
            alternate_init: initialise FPN and heads as EfficientNet does instead of as the original.

        Raises:
            ValueError: the image size does not fit the network's stride, or the backbone's maps are not those of the
                levels asked for.
            RuntimeError: the backbone's weights cannot be fetched.
        """
        super().__init__()
        self.image_size = self.input_size = check_image_size(config.image_size)
        if isinstance(config.image_size, Integral):
            set_config_writeable(config)
            config = change_config(config, image_size=self.image_size)
        set_config_readonly(config)
        self.config = config
        self.backbone = _create_backbone(config, pretrained_backbone)
        feature_info = get_feature_info(self.backbone)
        reductions = [entry["reduction"] for entry in feature_info]
        expected = [2 ** (config.min_level + index) for index in range(len(reductions))]
        if reductions != expected:
            raise ValueError(
                f"Backbone '{config.backbone_name}' has feature maps at strides {reductions}; levels from "
                f"{config.min_level} need {expected}: set backbone_indices to the maps at these strides."
            )
        self.fpn = BiFpn(config, feature_info)
        self.class_net = HeadNet(config, num_outputs=config.num_classes)
        self.box_net = HeadNet(config, num_outputs=4)
        for part in ("fpn", "class_net", "box_net"):
            self._init_part(part, alternate_init)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take a pickled state over; one of effdet 0.4.1, with other attributes, is built anew with its weights."""
        super().__setstate__(state)
        if "input_size" in state:
            return
        training, weights, level_first = self.training, self.state_dict(), self.class_net.bn_level_first
        EfficientDet.__init__(self, self.config, pretrained_backbone=False)
        if self.class_net.bn_level_first != level_first:
            self.toggle_head_bn_level_first()
        self.load_state_dict(weights)
        first = next(iter(weights.values()))
        self.to(first.device, first.dtype).train(training)

    def _init_part(self, part: str, alternate_init: bool) -> None:
        init = init_weight_alt if alternate_init else init_weight
        for name, module in getattr(self, part).named_modules(prefix=part):
            init(module, name)

    def reset_head(
        self,
        num_classes: int | None = None,
        aspect_ratios: Sequence[Any] | None = None,
        num_scales: int | None = None,
        alternate_init: bool = False,
    ) -> None:
        """Replace heads by newly initialised ones, which are in training mode.

        Args:
            num_classes: a new class head with this many classes.
            aspect_ratios: new anchor shapes; both heads are replaced, as both have an output for each anchor.
            num_scales: new number of anchor sizes; both heads are replaced.
            alternate_init: see the constructor.
        """
        changes = {"num_classes": num_classes, "aspect_ratios": aspect_ratios, "num_scales": num_scales}
        set_config_writeable(self.config)
        self.config = change_config(self.config, **{key: new for key, new in changes.items() if new is not None})
        set_config_readonly(self.config)
        new_anchors = aspect_ratios is not None or num_scales is not None
        device = next(self.parameters()).device
        if num_classes is not None or new_anchors:
            self.class_net = HeadNet(self.config, num_outputs=self.config.num_classes).to(device)
            self._init_part("class_net", alternate_init)
        if new_anchors:
            self.box_net = HeadNet(self.config, num_outputs=4).to(device)
            self._init_part("box_net", alternate_init)

    def toggle_head_bn_level_first(self) -> None:
        """Change the state dict's order of the heads' batch norms; the function computed stays the same."""
        self.class_net.toggle_bn_level_first()
        self.box_net.toggle_bn_level_first()

    def set_input_size(self, image_size: Sequence[int]) -> None:
        """Take images of another size from now on; no weight depends on it, only the size that feature maps grow to.

        Args:
            image_size: (height, width) in pixels; config.image_size and self.image_size stay what they are.

        Raises:
            ValueError: a side that does not fit the network's stride, or so small that two levels have maps of one
                size, where the network is another one.
        """
        image_size = check_image_size(image_size)
        level = self.config.max_level
        old, new = get_feat_sizes(self.input_size, level), get_feat_sizes(image_size, level)
        for size in (self.input_size, image_size):
            if min(size) <= 2 ** (level - 1):
                raise ValueError(
                    f"A network for images of {size} (height, width) cannot change its input size, nor be "
                    f"changed to it: each side must be more than {2 ** (level - 1)}."
                )
        for module in self.fpn.modules():
            if isinstance(module, ResampleFeatureMap):
                module.input_size, module.output_size = (
                    new[old.index(size)] for size in (module.input_size, module.output_size)
                )
                for layer in module.children():
                    if isinstance(layer, Interpolate2d):
                        layer.size = module.output_size
        self.input_size = image_size

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Compute the heads' outputs.

        Args:
            x: float [B, 3, H, W], normalised; (H, W) is the image_size the network was built for, or the one of
                `set_input_size`.

        Returns:
            class logits [B, A * K, h, w] and box deltas [B, A * 4, h, w], a list over levels for each, finest first.

        Raises:
            ValueError: another height or width than that.
        """
        if tuple(x.shape[-2:]) != self.input_size:
            raise ValueError(
                f"This model was built for images of {self.input_size} (height, width) and got "
                f"{tuple(x.shape[-2:])}: resize the images, or set config.image_size before building it."
            )
        features = self.fpn(self.backbone(x))
        return self.class_net(features), self.box_net(features)


_init_weight, _init_weight_alt = init_weight, init_weight_alt  # effdet's names

__all__ = [
    "BiFpn",
    "BiFpnLayer",
    "ConvBnAct2d",
    "EfficientDet",
    "Fnode",
    "FpnCombine",
    "HeadNet",
    "Interpolate2d",
    "ResampleFeatureMap",
    "SeparableConv2d",
    "SequentialList",
    "get_feature_info",
    "get_fpn_config",
]
