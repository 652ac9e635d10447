"""What happens to a training image, from the settings: the order of the steps is decided here.

The image as it was read -> the user's transform -> AutoAugment -> colour jitter -> flip -> scale jitter and crop,
or a quarter of a mosaic -> mixup. Random erasing follows on the device (`random_erasing.py`). Everything but flip and
scale jitter is off by default.
"""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from effdet.config.schema import DataConfig

from ..images import ImageError
from ..transforms import transforms_coco_train
from .autoaugment import AutoAugment, ColorJitter
from .mosaic import MosaicMixup, read_item
from .user_transform import load_transform


def build_train_transform(dataset: Any, data: DataConfig, inputs: Mapping[str, Any]) -> Callable:
    """Build the training transform of a run, which ends in uint8 numpy [3, H, W].

    Args:
        dataset: the training set; mosaic and mixup take further images from it.
        data: the data section.
        inputs: of `resolve_input_config`.

    Raises:
        ValueError: the user's transform cannot be loaded, or gives something unusable for the first image.
    """
    before: list[Callable] = []
    if data.transform:
        before.append(load_transform(data.transform))
        with contextlib.suppress(ImageError):
            before[0](*read_item(dataset, 0))  # a mistake in it shows now, not in a loader process
    if data.aa:
        before.append(AutoAugment(data.aa))
    if data.color_jitter > 0:
        before.append(ColorJitter(data.color_jitter))
    plain = transforms_coco_train(
        inputs["input_size"][1:],
        data.train_interpolation,
        True,
        inputs["fill_color"],
        inputs["mean"],
        inputs["std"],
        scale=(data.scale_min, data.scale_max),
        hflip=data.hflip,
        before=before,
    )
    if not (data.mosaic or data.mixup):
        return plain
    return MosaicMixup(plain, dataset, data.mosaic, data.mixup)


def describe_augmentation(data: DataConfig) -> str:
    """Say in one line what is done to the training images."""
    parts = [f"scale {data.scale_min:g} to {data.scale_max:g}", f"flip {data.hflip:g}"]
    named = {
        "transform": data.transform,
        "AutoAugment": data.aa,
        "colour jitter": data.color_jitter,
        "mosaic": data.mosaic,
        "mixup": data.mixup,
        "random erasing": data.reprob,
        "sizes": ", ".join(map(str, data.multi_scale)),
    }
    parts += [
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in named.items() if value
    ]
    return ", ".join(parts)
