"""Settle how images reach the model, from the command line and the model's config."""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

from .transforms import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, _size_tuple

_CHANNELS = 3


def _channels(values: Sequence[float], name: str) -> tuple[float, ...]:
    values = tuple(values)
    if len(values) not in (1, _CHANNELS):
        raise ValueError(f"{name} has {len(values)} numbers {values}, give 1 or {_CHANNELS}")
    return values * _CHANNELS if len(values) == 1 else values


def resolve_input_config(
    args: Mapping[str, Any] | Namespace, model_config: Mapping[str, Any] | None = None, model: Any = None
) -> dict[str, Any]:
    """Choose input size, interpolation, mean, std and fill colour.

    What `args` gives comes first, then the model's config, then the default. The size comes from the model alone,
    because the model is built for it.

    Args:
        args: options; read are interpolation, mean, std and fill_color, where present and not None.
        model_config: the model's config, any mapping; default is `model.config`.
        model: asked for its config when `model_config` is not given.

    Returns:
        {'input_size': (3, height, width), 'interpolation', 'mean', 'std', 'fill_color'}.

    Raises:
        ValueError: mean or std with another number of channels than 1 or 3.
    """
    options = args if isinstance(args, Mapping) else vars(args)
    config = model_config or getattr(model, "config", None) or {}

    def choose(key: str, default: Any) -> Any:
        if options.get(key) not in (None, ""):
            return options[key]
        return config[key] if key in config and config[key] is not None else default

    if "input_size" in config:
        input_size = tuple(config["input_size"])
    else:
        input_size = (_CHANNELS, *_size_tuple(config["image_size"] if "image_size" in config else 512))
    return {
        "input_size": input_size,
        "interpolation": choose("interpolation", "bicubic"),
        "mean": _channels(choose("mean", IMAGENET_DEFAULT_MEAN), "mean"),
        "std": _channels(choose("std", IMAGENET_DEFAULT_STD), "std"),
        "fill_color": choose("fill_color", "mean"),
    }
