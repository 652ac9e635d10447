"""Build models: a name or a config to a network, with weights, a head of the right size, and a bench."""

from __future__ import annotations

import logging
import os
from typing import Any, TypeVar

import torch
from timm.models import model_entrypoint
from torch import nn

from effdet.checkpoint.backbone import BackboneSource, load_backbone
from effdet.checkpoint.manager import extract_state_dict, load_checkpoint_file, load_state_dict_report
from effdet.config import get_efficientdet_config
from effdet.config.model_config import find_model_spec
from effdet.config.model_spec import ModelSpec, change_config
from effdet.config.schema import LossConfig, ModelConfig
from effdet.ops.sizes import check_image_size
from effdet.runtime import device as device_layer
from timm_patches.fused_layers import convert_fused_layers
from timm_patches.same_padding import convert_same_padding

from .bench import DetBenchPredict, DetBenchTrain
from .efficientdet import EfficientDet, HeadNet  # noqa: F401  (effdet has HeadNet here)
from .helpers import load_checkpoint, load_pretrained

_logger = logging.getLogger(__name__)

_ModuleT = TypeVar("_ModuleT", bound=nn.Module)

PAD_TYPES = ("same", "symmetric")

# Keyword arguments of create_model that change the config.
_OVERRIDES = (
    "redundant_bias",
    "label_smoothing",
    "legacy_focal",
    "jit_loss",
    "soft_nms",
    "max_det_per_image",
    "max_detection_points",
    "image_size",
    "anchor_scale",
    "aspect_ratios",
)

# timm modules whose models take the keyword pad_type; the others pad symmetrically.
_BACKBONES_WITH_PAD_TYPE = ("timm.models.efficientnet", "timm.models.mobilenetv3", "timm.models.hardcorenas")


def set_pad_type(config: Any, pad_type: str) -> Any:
    """Give backbone, FPN and heads of a config the same padding; return it, see `change_config`.

    Args:
        config: a model config.
        pad_type: 'same' (TensorFlow's; the default of the tf_ models) or 'symmetric' (checkpoints of the original
            Ascend port, which had replaced SAME by symmetric padding, need it).

    Raises:
        ValueError: another value, or a backbone that cannot pad as TensorFlow does.
    """
    if pad_type not in PAD_TYPES:
        raise ValueError(f"pad_type '{pad_type}' is none of {', '.join(PAD_TYPES)}.")
    value = "same" if pad_type == "same" else ""
    takes_pad_type = model_entrypoint(config.backbone_name).__module__ in _BACKBONES_WITH_PAD_TYPE
    if takes_pad_type:
        config = change_config(config, backbone_args={**(config.backbone_args or {}), "pad_type": value})
    elif value:
        raise ValueError(f"Backbone '{config.backbone_name}' has no SAME padding: use pad_type symmetric.")
    return change_config(config, pad_type=value)


def create_model(
    model_name: str,
    bench_task: str = "",
    num_classes: int | None = None,
    pretrained: bool | str | os.PathLike[str] = False,
    checkpoint_path: str | os.PathLike[str] = "",
    checkpoint_ema: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """Build a model by name; see `create_model_from_config`."""
    return create_model_from_config(
        get_efficientdet_config(model_name),
        bench_task,
        num_classes,
        pretrained,
        checkpoint_path,
        checkpoint_ema,
        **kwargs,
    )


def create_model_from_config(
    config: Any,
    bench_task: str = "",
    num_classes: int | None = None,
    pretrained: bool | str | os.PathLike[str] = False,
    checkpoint_path: str | os.PathLike[str] = "",
    checkpoint_ema: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """Build a model from a config.

    Args:
        config: a node of `get_efficientdet_config`, which the overrides change and which is read-only then; or a
            ModelSpec.
        bench_task: 'train' or 'predict' for the bench of that task, '' for the bare network.
        num_classes: number of classes K; another one than the config's resets the class head after the published
            weights were loaded.
        pretrained: True for the published weights (torch.hub's cache, else fetched, hash checked), or a path: every
            tensor of the file that fits is loaded, the rest is logged, and the network is never asked.
        checkpoint_path: a checkpoint of exactly this model, loaded last and strictly.
        checkpoint_ema: load the averaged weights of the checkpoint.
        kwargs: `pretrained_backbone` (default True; False once other weights are given), `bench_labeler` (make the
            training bench label anchors), `pad_type` ('same' or 'symmetric'), `alternate_init`, and the config fields
            redundant_bias, label_smoothing, legacy_focal, jit_loss, soft_nms, max_det_per_image, max_detection_points,
            image_size ((height, width) in pixels, or one number for a square), anchor_scale, aspect_ratios.

    Returns:
        The network or its bench.

    Raises:
        ValueError: an unknown task, image size, padding, or weights that do not fit.
    """
    if bench_task not in ("", "train", "predict", None):
        raise ValueError(f"bench_task '{bench_task}' is none of 'train', 'predict', ''.")
    bench_labeler = kwargs.pop("bench_labeler", False)
    model = build_network(config, num_classes, pretrained, checkpoint_path, checkpoint_ema, **kwargs)
    if bench_task == "train":
        return DetBenchTrain(model, create_labeler=bench_labeler)
    return DetBenchPredict(model) if bench_task == "predict" else model


def build_network(
    config: Any,
    num_classes: int | None = None,
    pretrained: bool | str | os.PathLike[str] = False,
    checkpoint_path: str | os.PathLike[str] = "",
    checkpoint_ema: bool = False,
    **kwargs: Any,
) -> EfficientDet:
    """Build the bare network of a config; arguments and errors are those of `create_model_from_config`."""
    pretrained_backbone = kwargs.pop("pretrained_backbone", True) and not (pretrained or checkpoint_path)
    changes = {key: value for key in _OVERRIDES if (value := kwargs.pop(key, None)) is not None}
    if "image_size" in changes:
        changes["image_size"] = check_image_size(changes["image_size"])
    config = change_config(config, **changes)
    pad_type = kwargs.pop("pad_type", None)
    if pad_type is not None:
        config = set_pad_type(config, pad_type)

    model = EfficientDet(config, pretrained_backbone=pretrained_backbone, **kwargs)
    from_path = isinstance(pretrained, (str, os.PathLike))
    if pretrained and not from_path:
        load_pretrained(model, config.get("url") or "")
    if num_classes is not None and num_classes != config.num_classes:
        model.reset_head(num_classes=num_classes)
    if pretrained and from_path:
        load_pretrained(model, pretrained, strict=False)
    if checkpoint_path:
        load_checkpoint(model, checkpoint_path, use_ema=checkpoint_ema)
    return model


# ---- from the settings of a run ----


def apply_settings(spec: ModelSpec, model: Any, loss: LossConfig | None = None) -> ModelSpec:
    """Put what the model and loss sections of a run set (not None) over a model's fields."""
    changes = {
        "image_size": model.image_size,
        "soft_nms": model.soft_nms,
        "max_det_per_image": model.max_det,
        "redundant_bias": getattr(model, "redundant_bias", None),
        "anchor_scale": getattr(model, "anchor_scale", None),
        "aspect_ratios": getattr(model, "aspect_ratios", None),
    }
    if loss is not None:
        changes |= {
            "label_smoothing": loss.label_smoothing,
            "legacy_focal": loss.legacy_focal,
            "alpha": loss.alpha,
            "gamma": loss.gamma,
            "delta": loss.delta,
            "box_loss_weight": loss.box_loss_weight,
        }
    if getattr(model, "drop_path", None) is not None:
        changes["backbone_args"] = {**(spec.backbone_args or {}), "drop_path_rate": model.drop_path}
    return spec.replace(**{key: value for key, value in changes.items() if value is not None})


def resolve_model_config(model: Any, loss: LossConfig | None = None) -> ModelSpec:
    """Return the model table's fields with what the model and loss sections of a run set over them."""
    return apply_settings(find_model_spec(model.name), model, loss)


def build_model(
    model: ModelConfig, loss: LossConfig, num_classes: int, backbone: BackboneSource | None = None
) -> EfficientDet:
    """Build the network of a training run with the weights it starts from.

    Args:
        model: the model section.
        loss: the loss section.
        num_classes: K, from the data.
        backbone: weights for the backbone, where no others are named; None for random ones.

    Returns:
        The network on the CPU.

    Raises:
        ValueError: a setting or a weight file does not fit the model.
    """
    config = resolve_model_config(model, loss)
    network = build_network(
        config,
        num_classes=num_classes,
        pretrained=True if model.pretrained == "url" else model.pretrained,
        pretrained_backbone=False,
        pad_type=model.pad_type,
    )
    if backbone is not None:
        load_backbone(network.backbone, backbone)
    if model.initial_checkpoint:
        state = extract_state_dict(load_checkpoint_file(model.initial_checkpoint), use_ema=None)
        load_state_dict_report(network, state, strict=True)
        _logger.info("weights of %s loaded", model.initial_checkpoint)
    if model.bn_momentum is not None:
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.momentum = model.bn_momentum
    return network


def place_model(
    model: _ModuleT, device: torch.device, same_padding: str = "auto", channels_last: bool = False
) -> _ModuleT:
    """Move a network to a device and have it pad in the way that suits the device; both keep its numbers.

    Args:
        model: changed in place.
        device: where it will run.
        same_padding: 'pad', 'kernel', or 'auto' for the device's own; see timm_patches.same_padding.
        channels_last: memory layout of its weights.

    Returns:
        The same network.
    """
    mode = same_padding
    if mode == "auto":
        mode = "kernel" if device_layer.avoids_pad_operators(device) else "pad"
    convert_fused_layers(model, fused=False)
    report = convert_same_padding(model, mode)
    if mode == "kernel" and (report.converted or report.left):
        _logger.debug("setting: layers pad by themselves instead of calling a pad operator: %s", report)
    if device_layer.is_host(device):
        convert_fused_layers(model)
    return model.to(device, memory_format=torch.channels_last if channels_last else torch.preserve_format)
