"""The 47 models, each as its differences from the base config.

Sources: EfficientDet, https://arxiv.org/abs/1911.09070, table 1 (sizes, channels, repeats); google/automl (the tf_
models); the release page of rwightman/efficientdet-pytorch (weights, and the models that exist only there).
"""

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from .model_spec import ModelSpec
from .options import similar_names

_RELEASE = "https://github.com/rwightman/efficientdet-pytorch/releases/download/v0.1/"

_BASE: dict[str, Any] = {
    "name": "tf_efficientdet_d1",
    "backbone_name": "tf_efficientnet_b1",
    "backbone_args": None,  # keyword arguments of timm.create_model
    "backbone_indices": None,  # which feature maps of the backbone; None is (2, 3, 4)
    "image_size": (640, 640),  # height, width
    "num_classes": 90,
    "min_level": 3,
    "max_level": 7,
    "num_levels": 5,
    "num_scales": 3,
    # (w, h) factors with w * h about 1, or single numbers r read as (sqrt(r), 1 / sqrt(r))
    "aspect_ratios": [(1.0, 1.0), (1.4, 0.7), (0.7, 1.4)],
    "anchor_scale": 4.0,  # anchor side of the first scale, in strides of its level
    "pad_type": "same",  # 'same' is TensorFlow's padding, '' is symmetric
    "act_type": "swish",
    "norm_layer": None,  # None is BatchNorm2d
    "norm_kwargs": {"eps": 0.001, "momentum": 0.01},
    "box_class_repeats": 3,
    "fpn_cell_repeats": 3,
    "fpn_channels": 88,
    "separable_conv": True,
    "apply_resample_bn": True,
    "conv_bn_relu_pattern": False,  # activation after the convolution of an FPN node instead of before it
    "downsample_type": "max",
    "upsample_type": "nearest",
    "redundant_bias": True,  # biases before batch norm: no use, but the tf_ checkpoints have them
    "head_bn_level_first": False,  # order of the heads' batch norms in the state dict
    "head_act_type": None,  # None is act_type
    "fpn_name": None,
    "fpn_config": None,
    "fpn_drop_path_rate": 0.0,  # part of effdet's config; no published model uses it
    "alpha": 0.25,
    "gamma": 1.5,
    "label_smoothing": 0.0,
    "legacy_focal": False,
    "jit_loss": False,  # part of effdet's config; the loss has one implementation
    "delta": 0.1,
    "box_loss_weight": 50.0,
    "soft_nms": False,
    "max_detection_points": 5000,
    "max_det_per_image": 100,
}


def default_detection_model_configs() -> DictConfig:
    """Return the base config that every model's differences are applied to."""
    return OmegaConf.create(ModelSpec(_BASE).to_plain())


# What the lite models have in common.
tf_efficientdet_lite_common: dict[str, Any] = {
    "fpn_name": "bifpn_sum",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "act_type": "relu6",
}


def _entry(
    name: str,
    backbone: str,
    size: int,
    channels: int,
    cells: int = 3,
    head: int = 3,
    drop_path: float = 0.2,
    weights: str = "",
    **differences: Any,
) -> dict[str, Any]:
    """Return one model's differences: image side in px, FPN channels and cells, head repeats, file name of weights."""
    backbone_args = {"drop_path_rate": drop_path, **differences.pop("backbone_args", {})}
    return {
        "name": name,
        "backbone_name": backbone,
        "image_size": (size, size),
        "fpn_channels": channels,
        "fpn_cell_repeats": cells,
        "box_class_repeats": head,
        "backbone_args": backbone_args,
        "url": _RELEASE + weights if weights else "",
        **differences,
    }


def _table() -> dict[str, dict[str, Any]]:
    """Return all models by name."""
    square_roots = [1.0, 2.0, 0.5]
    symmetric: dict[str, Any] = {"pad_type": "", "redundant_bias": False}
    level_first = {**symmetric, "head_bn_level_first": True}
    sqrt_level_first = {**level_first, "aspect_ratios": square_roots}
    dense = {**sqrt_level_first, "separable_conv": False}
    leaky = {**dense, "act_type": "leaky_relu"}
    bilinear: dict[str, Any] = {"downsample_type": "bilinear", "upsample_type": "bilinear"}
    quad: dict[str, Any] = {"fpn_name": "qufpn_fa"}
    plain_sum: dict[str, Any] = {"fpn_name": "bifpn_sum"}
    inception: dict[str, Any] = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    adversarial = {**inception, "fill_color": 0}
    lite = tf_efficientdet_lite_common
    effnet, tf_effnet, tf_lite = "efficientnet_b{}", "tf_efficientnet_b{}", "tf_efficientnet_lite{}"

    rows = [  # a model a row, not an argument a line
        # Trained in PyTorch, symmetric padding.
        _entry("efficientdet_d0", effnet.format(0), 512, 64, 3, drop_path=0.1,
               weights="efficientdet_d0-f3276ba8.pth", **symmetric),
        _entry("efficientdet_d1", effnet.format(1), 640, 88, 4, weights="efficientdet_d1-bb7e98fe.pth", **symmetric),
        _entry("efficientdet_d2", effnet.format(2), 768, 112, 5, **symmetric),
        _entry("efficientdet_d3", effnet.format(3), 896, 160, 6, 4, **symmetric),
        _entry("efficientdet_d4", effnet.format(4), 1024, 224, 7, 4),
        _entry("efficientdet_d5", effnet.format(5), 1280, 288, 7, 4),
        # Other backbones.
        _entry("resdet50", "resnet50", 640, 88, 4, weights="resdet50_416-08676892.pth", act_type="relu",
               separable_conv=False, **symmetric),
        _entry("cspresdet50", "cspresnet50", 768, 88, 4, weights="cspresdet50b-386da277.pth", head_act_type="silu",
               **bilinear, **leaky),
        _entry("cspresdext50", "cspresnext50", 640, 88, 4, **leaky),
        _entry("cspresdext50pan", "cspresnext50", 640, 88, 3, weights="cspresdext50pan-92fdd094.pth",
               fpn_name="pan_fa", **leaky),
        _entry("cspdarkdet53", "cspdarknet53", 640, 88, 4, backbone_indices=(3, 4, 5), **leaky),
        _entry("cspdarkdet53m", "cspdarknet53", 768, 96, 4, weights="cspdarkdet53m-79062b2d.pth",
               backbone_indices=(3, 4, 5), head_act_type="mish", **quad, **bilinear, **leaky),
        _entry("mixdet_m", "mixnet_m", 512, 64, 3, drop_path=0.1, **sqrt_level_first),
        _entry("mixdet_l", "mixnet_l", 640, 88, 4, **sqrt_level_first),
        _entry("mobiledetv2_110d", "mobilenetv2_110d", 384, 48, 3, drop_path=0.05, act_type="relu6",
               **sqrt_level_first),
        _entry("mobiledetv2_120d", "mobilenetv2_120d", 512, 56, 3, drop_path=0.1, act_type="relu6",
               **sqrt_level_first),
        _entry("mobiledetv3_large", "mobilenetv3_large_100", 512, 64, 3, drop_path=0.1, act_type="hard_swish",
               **sqrt_level_first),
        # Variants of the head and the FPN on EfficientNets.
        _entry("efficientdet_q0", effnet.format(0), 512, 64, 3, drop_path=0.1,
               weights="efficientdet_q0-bdf1bdb5.pth", **quad, **level_first),
        _entry("efficientdet_q1", effnet.format(1), 640, 88, 3, weights="efficientdet_q1b-d0612140.pth", **quad,
               **bilinear, **level_first),
        _entry("efficientdet_q2", effnet.format(2), 768, 112, 4, weights="efficientdet_q2-0f7564e5.pth", **quad,
               **level_first),
        _entry("efficientdet_w0", effnet.format(0), 512, 80, 3, drop_path=0.1,
               backbone_args={"feature_location": "depthwise"}, **sqrt_level_first),
        _entry("efficientdet_es", "efficientnet_es", 512, 72, 3, drop_path=0.1, act_type="relu", **dense),
        _entry("efficientdet_em", "efficientnet_em", 640, 96, 4, act_type="relu", **dense),
        _entry("efficientdet_lite0", "efficientnet_lite0", 384, 64, 3, drop_path=0.1, act_type="relu6",
               redundant_bias=False, head_bn_level_first=True),
        _entry("efficientdetv2_dt", "efficientnetv2_rw_t", 768, 128, 5,
               weights="efficientdetv2_rw_dt_agc-ad8b8c96.pth", **bilinear, **sqrt_level_first),
        _entry("efficientdetv2_ds", "efficientnetv2_rw_s", 1024, 256, 7, 4,
               weights="efficientnetv2_rw_ds_agc-cf589293.pth", **bilinear, **sqrt_level_first),
        # Weights of the paper's authors, TensorFlow padding.
        _entry("tf_efficientdet_d0", tf_effnet.format(0), 512, 64, 3, weights="tf_efficientdet_d0_34-f153e0cf.pth"),
        _entry("tf_efficientdet_d1", tf_effnet.format(1), 640, 88, 4, weights="tf_efficientdet_d1_40-a30f94af.pth"),
        _entry("tf_efficientdet_d2", tf_effnet.format(2), 768, 112, 5, weights="tf_efficientdet_d2_43-8107aa99.pth"),
        _entry("tf_efficientdet_d3", tf_effnet.format(3), 896, 160, 6, 4,
               weights="tf_efficientdet_d3_47-0b525f35.pth"),
        _entry("tf_efficientdet_d4", tf_effnet.format(4), 1024, 224, 7, 4,
               weights="tf_efficientdet_d4_49-f56376d9.pth"),
        _entry("tf_efficientdet_d5", tf_effnet.format(5), 1280, 288, 7, 4,
               weights="tf_efficientdet_d5_51-c79f9be6.pth"),
        _entry("tf_efficientdet_d6", tf_effnet.format(6), 1280, 384, 8, 5,
               weights="tf_efficientdet_d6_52-4eda3773.pth", **plain_sum),
        _entry("tf_efficientdet_d7", tf_effnet.format(6), 1536, 384, 8, 5,
               weights="tf_efficientdet_d7_53-6d1d7a95.pth", anchor_scale=5.0, **plain_sum),
        _entry("tf_efficientdet_d7x", tf_effnet.format(7), 1536, 384, 8, 5,
               weights="tf_efficientdet_d7x-f390b87c.pth", max_level=8, **plain_sum),
        # The same with AdvProp pre-training.
        _entry("tf_efficientdet_d0_ap", tf_effnet.format(0), 512, 64, 3,
               weights="tf_efficientdet_d0_ap-d0cdbd0a.pth", **adversarial),
        _entry("tf_efficientdet_d1_ap", tf_effnet.format(1), 640, 88, 4,
               weights="tf_efficientdet_d1_ap-7721d075.pth", **adversarial),
        _entry("tf_efficientdet_d2_ap", tf_effnet.format(2), 768, 112, 5,
               weights="tf_efficientdet_d2_ap-a2995c19.pth", **adversarial),
        _entry("tf_efficientdet_d3_ap", tf_effnet.format(3), 896, 160, 6, 4,
               weights="tf_efficientdet_d3_ap-e4a2feab.pth", **adversarial),
        _entry("tf_efficientdet_d4_ap", tf_effnet.format(4), 1024, 224, 7, 4,
               weights="tf_efficientdet_d4_ap-f601a5fc.pth", **adversarial),
        _entry("tf_efficientdet_d5_ap", tf_effnet.format(5), 1280, 288, 7, 4,
               weights="tf_efficientdet_d5_ap-3673ae5d.pth", **adversarial),
        # The lite series, for small devices.
        _entry("tf_efficientdet_lite0", tf_lite.format(0), 320, 64, 3, drop_path=0.0, anchor_scale=3.0,
               weights="tf_efficientdet_lite0-dfacfc78.pth", **lite),
        _entry("tf_efficientdet_lite1", tf_lite.format(1), 384, 88, 4, anchor_scale=3.0,
               weights="tf_efficientdet_lite1-6dc7ab30.pth", **lite),
        _entry("tf_efficientdet_lite2", tf_lite.format(2), 448, 112, 5, anchor_scale=3.0,
               weights="tf_efficientdet_lite2-86c5d55b.pth", **lite),
        _entry("tf_efficientdet_lite3", tf_lite.format(3), 512, 160, 6, 4,
               weights="tf_efficientdet_lite3-506852cb.pth", **lite),
        _entry("tf_efficientdet_lite3x", tf_lite.format(3), 640, 200, 6, 4, anchor_scale=3.0,
               weights="tf_efficientdet_lite3x-8404c57b.pth", **lite),
        _entry("tf_efficientdet_lite4", tf_lite.format(4), 640, 224, 7, 4,
               weights="tf_efficientdet_lite4-391ddabc.pth", **lite),
    ]  # fmt: skip
    return {row["name"]: row for row in rows}


# Users add their own entries: efficientdet_model_param_dict['mine'] = dict(name='mine', backbone_name=..., ...)
efficientdet_model_param_dict: dict[str, dict[str, Any]] = _table()


class UnknownModelError(KeyError, ValueError):
    """A name that is not in the table of models; a KeyError as in effdet, and a ValueError."""

    def __str__(self) -> str:
        return str(self.args[0])


def find_model_spec(model_name: str) -> ModelSpec:
    """Return the fields of a model of the table.

    Raises:
        UnknownModelError: the table has no such model; the nearest names are given.
    """
    if model_name not in efficientdet_model_param_dict:
        nearest = similar_names(model_name, efficientdet_model_param_dict)[:3]
        raise UnknownModelError(
            f"Unknown model '{model_name}'. Nearest: {', '.join(nearest) or 'none'}. All names: "
            "effdet.config.model_config.efficientdet_model_param_dict."
        )
    spec = ModelSpec({**_BASE, **efficientdet_model_param_dict[model_name]})
    return spec.replace(num_levels=spec.max_level - spec.min_level + 1)


def get_efficientdet_config(model_name: str = "tf_efficientdet_d1") -> DictConfig:
    """Return `find_model_spec` as an omegaconf node of its own; set `num_classes`, `image_size` and others on it."""
    return OmegaConf.create(find_model_spec(model_name).to_plain())


def published_model_name(file_name: str) -> str | None:
    """Return the model whose published weights have this file name; None for any other name."""
    urls = {row["name"]: row.get("url") or "" for row in efficientdet_model_param_dict.values()}
    return next((name for name, url in urls.items() if url and url.rpartition("/")[2] == file_name), None)


def stored_model_spec(fields: Mapping[str, Any]) -> ModelSpec:
    """Return the model config that a checkpoint holds (`ModelSpec.to_plain`); fields it lacks keep their defaults."""
    return ModelSpec({**_BASE, **fields})
