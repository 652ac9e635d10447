"""Build models: a name or a config to a network, with weights, a head of the right size, and a bench."""
from __future__ import annotations

import os
from typing import Any

from timm.models import model_entrypoint
from torch import nn

from .anchors import check_image_size
from .bench import DetBenchPredict, DetBenchTrain
from .config import get_efficientdet_config
from .efficientdet import EfficientDet
from .helpers import load_checkpoint, load_pretrained

PAD_TYPES = ("same", "symmetric")

# Keyword arguments of create_model that change the config.
_OVERRIDES = ("redundant_bias", "label_smoothing", "legacy_focal", "jit_loss", "soft_nms", "max_det_per_image",
              "max_detection_points", "image_size", "anchor_scale", "aspect_ratios")

# timm modules whose models take the keyword pad_type; the others pad symmetrically.
_BACKBONES_WITH_PAD_TYPE = ("timm.models.efficientnet", "timm.models.mobilenetv3", "timm.models.hardcorenas")


def set_pad_type(config: Any, pad_type: str) -> None:
    """Give backbone, FPN and heads of a config the same padding.

    Args:
        config: a writeable model config; changed in place.
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
        config.backbone_args = {**(config.backbone_args or {}), "pad_type": value}
    elif value:
        raise ValueError(f"Backbone '{config.backbone_name}' has no SAME padding: use pad_type symmetric.")
    config.pad_type = value


def create_model(model_name: str, bench_task: str = "", num_classes: int | None = None,
                 pretrained: bool | str | os.PathLike[str] = False,
                 checkpoint_path: str | os.PathLike[str] = "", checkpoint_ema: bool = False,
                 **kwargs: Any) -> nn.Module:
    """Build a model by name; see `create_model_from_config`."""
    return create_model_from_config(get_efficientdet_config(model_name), bench_task, num_classes, pretrained,
                                    checkpoint_path, checkpoint_ema, **kwargs)


def create_model_from_config(config: Any, bench_task: str = "", num_classes: int | None = None,
                             pretrained: bool | str | os.PathLike[str] = False,
                             checkpoint_path: str | os.PathLike[str] = "", checkpoint_ema: bool = False,
                             **kwargs: Any) -> nn.Module:
    """Build a model from a config.

    Args:
        config: a node of `get_efficientdet_config`; changed by the overrides, then read-only.
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
    pretrained_backbone = kwargs.pop("pretrained_backbone", True) and not (pretrained or checkpoint_path)
    for key in _OVERRIDES:
        value = kwargs.pop(key, None)
        if value is not None:
            config[key] = check_image_size(value) if key == "image_size" else value
    pad_type = kwargs.pop("pad_type", None)
    if pad_type is not None:
        set_pad_type(config, pad_type)
    bench_labeler = kwargs.pop("bench_labeler", False)

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

    if bench_task == "train":
        return DetBenchTrain(model, create_labeler=bench_labeler)
    return DetBenchPredict(model) if bench_task == "predict" else model
