"""From the data section of a run's config to data sets and loaders."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from effdet.config.schema import DataConfig, EvalDataConfig
from effdet.ops.sizes import check_image_size, nearest_image_size
from effdet.runtime import signals

from .augment.autoaugment import AutoAugment, ColorJitter
from .augment.mosaic import MosaicMixup, read_item
from .augment.user_transform import load_transform
from .coco.annotations import coco_paths
from .coco.report import DatasetError
from .corrupt import BadImages, default_limit
from .dataset import SkipSubset
from .dataset_factory import SMALLEST_SIDE_PX, open_coco
from .images import ImageError
from .input_config import resolve_input_config
from .loader import create_loader
from .settle import settle_data
from .transforms import transforms_coco_train

_logger = logging.getLogger(__name__)


def build_dataset(
    data: DataConfig | EvalDataConfig,
    split: str,
    num_classes: int | None = None,
    stored: Mapping[str, Any] | None = None,
    crowd: str = "drop",
    seed: int | None = None,
    owner: str = "the checkpoint",
    unlabeled: bool = False,
) -> Any:
    """Open the training or the validation split that the config names; its unreadable images are put up with.

    Args:
        data: the data section.
        split: 'train' or 'val'.
        num_classes: class count asked for, checked against the json.
        stored: category map that is in force already, checked against the json.
        crowd: 'drop' or 'ignore'.
        seed: of the augmentations.
        owner: whose map `stored` is, for messages.
        unlabeled: take a json without annotations too, for predictions alone.

    Raises:
        ValueError: the config names no data, or the data contradict it; FileNotFoundError: something is absent.
    """
    images, ann = split_paths(data, split)
    dataset = open_coco(
        None,
        split,
        images=images,
        ann=ann,
        num_classes=num_classes,
        stored=stored,
        crowd=crowd,
        seed=seed,
        match=data.match_classes,
        owner=owner,
        max_bad=data.max_bad_images,
        unlabeled=unlabeled,
    )
    report = dataset.parser.report
    if split == "train" and not len(dataset) and report.dropped.get("small_image"):
        examples = ", ".join(report.dropped.examples["small_image"])
        raise DatasetError(
            f"the training set has 0 images: all {report.num_images} of {report.source} are under "
            f"{SMALLEST_SIDE_PX} px wide or high ({examples}), too small to find something in. Enlarge them."
        )
    if split == "train" and len(dataset) and not report.num_boxes:
        dropped = "".join(f", {reason}" for reason in report.reasons())
        raise DatasetError(
            f"{report.source} has no box to train on: {report.num_images} images, "
            f"{report.num_annotations} annotations{dropped}. Annotate the images, or name another "
            "file."
        )
    limit = default_limit(len(dataset)) if data.max_bad_images is None else data.max_bad_images
    dataset.bad_images = BadImages(len(dataset), limit, replace=split == "train")
    return dataset


def split_paths(data: DataConfig | EvalDataConfig, split: str) -> tuple[Path, Path]:
    """Return the image folder and the annotation file of a split, as `build_dataset` uses them.

    Of a config that `settle_data` has not seen, all processes of a run must ask together.

    Raises:
        ValueError: the config names no data; FileNotFoundError: something is absent in the root.
    """
    settled, lines = settle_data(data, (split,))
    for line in lines if settled is not data else ():
        _logger.info("data: %s", line)
    data = settled
    images, ann = (data.train_images, data.train_ann) if split == "train" else (data.val_images, data.val_ann)
    if not (images and ann):
        images_in_root, ann_in_root = coco_paths(data.root, split)
        images, ann = images or images_in_root, ann or ann_in_root  # one of the two may be given instead of the root's
    return Path(images), Path(ann)


def build_loader(
    dataset: Any,
    data: DataConfig | EvalDataConfig,
    model_config: Any,
    batch_size: int,
    num_workers: int,
    device: torch.device,
    seed: int = 0,
    channels_last: bool = False,
    *,
    is_training: bool = False,
    val_skip: int = 0,
) -> Any:
    """Make the loader of a split: augmented and shuffled in training, else letterboxed, in order and each image once.

    Args:
        dataset: of `build_dataset`; its transform is set.
        data: the data section, a DataConfig in training.
        model_config: gives input size, mean and std.
        batch_size: images a step of this process.
        num_workers: loading processes of this process.
        device: where batches go.
        seed: of shuffling and augmentation, the same on all ranks.
        channels_last: memory layout of the batches.
        is_training: which of the two.
        val_skip: without training, take every Nth image; 0 and 1: all.
    """
    asked = {"fill_color": _fill_color(data), "interpolation": None if is_training else data.interpolation}
    inputs = resolve_input_config(asked, model_config)
    options: dict[str, Any] = {"interpolation": inputs["interpolation"], "fill_color": inputs["fill_color"]}
    if is_training:
        assert isinstance(data, DataConfig)
        options = {
            "transform_fn": build_train_transform(dataset, data, inputs),
            "re_prob": data.reprob,
            "re_mode": data.remode,
            "re_count": data.recount,
            "drop_last": True,
            "multi_scale": multi_scale_sizes(data, inputs["input_size"][1:]),
        }
    elif val_skip > 1:
        dataset = SkipSubset(dataset, val_skip)
    loader = create_loader(
        dataset,
        inputs["input_size"],
        batch_size,
        is_training=is_training,
        mean=inputs["mean"],
        std=inputs["std"],
        num_workers=num_workers,
        distributed=True,
        pin_mem=True,
        device=device,
        persistent_workers=True,
        seed=seed,
        channels_last=channels_last,
        max_instances=None,
        **options,
    )
    loader.loader.worker_init_fn = signals.ignore_in_worker
    return loader


def build_train_transform(dataset: Any, data: DataConfig, inputs: Mapping[str, Any]) -> Callable:
    """Build the training transform of a run, which ends in uint8 numpy [3, H, W].

    The image as it was read -> the user's transform -> AutoAugment -> colour jitter -> flip -> scale jitter and crop,
    or a quarter of a mosaic -> mixup. Random erasing follows on the device (`random_erasing.py`). Everything but flip
    and scale jitter is off by default.

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


def multi_scale_sizes(data: DataConfig, image_size: Sequence[int]) -> list[tuple[int, int]]:
    """Return the input sizes (height, width) to train at besides evaluating at `image_size`; none: only that one.

    Raises:
        ValueError: a number that does not fit the network's stride.
    """
    for longer in data.multi_scale:
        try:
            check_image_size(longer)
        except ValueError as error:
            raise ValueError(f"--multi-scale {longer}: {error}") from error
    return [nearest_image_size(image_size, longer / max(image_size)) for longer in data.multi_scale]


def _fill_color(data: EvalDataConfig) -> Any:
    """Return the padding colour asked for, None to leave it to the model."""
    if data.fill_color == "mean":
        return None
    return (int(data.fill_color),) * 3
