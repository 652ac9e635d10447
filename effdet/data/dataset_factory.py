"""Open data sets: `create_dataset` by effdet's names, `open_coco` for everything our own scripts do."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .categories import CategoryMap, resolve_category_map
from .coco import UNLABELED_SPLITS, CocoParser, CocoParserCfg, coco_paths
from .dataset import DetectionDatset
from .parsers import create_parser

_logger = logging.getLogger(__name__)


def _cfg(img_dir: Path, ann_path: Path, split: str, crowd: str) -> CocoParserCfg:
    """Small images are left out of training, as in effdet; evaluation keeps every image, or it would score another
    data set."""
    return CocoParserCfg(
        ann_filename=str(ann_path),
        img_dir=img_dir,
        crowd=crowd,
        has_labels=split not in UNLABELED_SPLITS,
        min_img_size=32 if split == "train" else 0,
    )


def open_coco(
    root: str | Path | None = None,
    split: str = "train",
    *,
    images: str | Path | None = None,
    ann: str | Path | None = None,
    num_classes: int | None = None,
    stored: CategoryMap | dict[str, Any] | None = None,
    crowd: str = "drop",
    seed: int | None = None,
) -> DetectionDatset:
    """Open one split of a COCO-format data set and log what the check found.

    Args:
        root: a directory in COCO's layout; or leave it out and give `images` and `ann`.
        split: train, val, test or testdev. With `images` and `ann` it only tells training from evaluation.
        images: image directory.
        ann: annotation json.
        num_classes: class count asked for, see `resolve_category_map`.
        stored: the category map of a checkpoint, see `resolve_category_map`.
        crowd: 'drop' or 'ignore', see `CocoParserCfg`.
        seed: see `DetectionDatset`.

    Returns:
        The data set, labelled by the resolved category map (`dataset.parser.category_map`).

    Raises:
        ValueError: contradicting arguments, class counts or category ids; DatasetError, a kind of it, for errors in
            the data.
        FileNotFoundError: something is absent; the text says what is expected.
    """
    if (images is None) != (ann is None) or (root is None) == (images is None):
        raise ValueError(
            f"give either the root of a data set in COCO's layout, or an image directory and its json; "
            f"got root={root}, images={images}, ann={ann}"
        )
    img_dir, ann_path = coco_paths(root, split) if images is None else (Path(images), Path(ann))
    parser = CocoParser(_cfg(img_dir, ann_path, split, crowd))
    if parser.categories:
        parser.category_map = resolve_category_map(parser.categories, num_classes, stored)
    for line in parser.report.lines():
        _logger.info(line)
    return DetectionDatset(img_dir, parser, seed=seed)


def create_dataset(
    name: str, root: str | Path, splits: str | Sequence[str] = ("train", "val"), crowd: str = "drop"
) -> DetectionDatset | list[DetectionDatset]:
    """Open splits of a data set by effdet's names. Category ids are numbered as `create_parser` says.

    Args:
        name: 'coco', 'coco2017' or 'coco2014'.
        root: directory in COCO's layout.
        splits: one or several of train, val, test, testdev.
        crowd: 'drop' or 'ignore', see `CocoParserCfg`.

    Returns:
        The data set, or a list of them when there are several splits.

    Raises:
        ValueError: unknown name or split; DatasetError, a kind of it, for errors in the data.
        FileNotFoundError: something is absent; the text says what is expected.
    """
    if not name.lower().startswith("coco"):
        raise ValueError(f"data set {name!r} is unknown, available: coco (2017), coco2017, coco2014")
    year = "2014" if "coco2014" in name.lower() else "2017"
    datasets = []
    for split in [splits] if isinstance(splits, str) else splits:
        img_dir, ann_path = coco_paths(root, split, year)
        parser = create_parser("coco", cfg=_cfg(img_dir, ann_path, split, crowd))
        for line in parser.report.lines():
            _logger.info(line)
        datasets.append(DetectionDatset(img_dir, parser))
    return datasets if len(datasets) > 1 else datasets[0]
