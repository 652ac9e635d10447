"""Open data sets: `create_dataset` by effdet's names, `open_coco` for everything our own scripts do."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .coco.annotations import UNLABELED_SPLITS, CocoParser, coco_paths
from .coco.categories import CategoryMap, resolve_category_map
from .dataset import DetectionDatset
from .dataset_config import (
    Coco2014Cfg,
    Coco2017Cfg,
    CocoCfg,
    OpenImagesCfg,
    OpenImagesObjCfg,
    OpenImagesObjChallenge2019Cfg,
    OpenImagesObjV5Cfg,
    OpenImagesSegCfg,
    OpenImagesSegChallenge2019Cfg,
    OpenImagesSegV5Cfg,
    Voc0712Cfg,
    Voc2007Cfg,
    Voc2012Cfg,
    VocCfg,
)
from .parsers import CocoParserCfg, OpenImagesParserCfg, VocParserCfg, create_parser

__all__ = [
    "Coco2014Cfg",
    "Coco2017Cfg",
    "CocoCfg",
    "CocoParserCfg",
    "OpenImagesCfg",
    "OpenImagesObjCfg",
    "OpenImagesObjChallenge2019Cfg",
    "OpenImagesObjV5Cfg",
    "OpenImagesParserCfg",
    "OpenImagesSegCfg",
    "OpenImagesSegChallenge2019Cfg",
    "OpenImagesSegV5Cfg",
    "Voc0712Cfg",
    "Voc2007Cfg",
    "Voc2012Cfg",
    "VocCfg",
    "VocParserCfg",
    "create_dataset",
    "create_parser",
    "open_coco",
]

_logger = logging.getLogger(__name__)

_VOC = {"voc2007": Voc2007Cfg, "voc2012": Voc2012Cfg, "voc0712": Voc0712Cfg}
_OPEN_IMAGES = {"openimages": OpenImagesObjV5Cfg, "openimages-challenge2019": OpenImagesObjChallenge2019Cfg}


SMALLEST_SIDE_PX = 32  # images with a shorter side are left out, as in effdet; our scripts evaluate on them


def _cfg(
    img_dir: Path,
    ann_path: Path,
    split: str,
    crowd: str,
    smallest: int = SMALLEST_SIDE_PX,
    unlabeled: bool = False,
    max_bad: int | None = 0,
) -> CocoParserCfg:
    """Make the parser's settings for one split of a COCO data set, `unlabeled`: also of a json without annotations."""
    return CocoParserCfg(
        ann_filename=str(ann_path),
        img_dir=img_dir,
        crowd=crowd,
        has_labels=None if unlabeled else split not in UNLABELED_SPLITS,
        min_img_size=smallest,
        max_bad=max_bad,
        keep_json=split != "train",
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
    match: str = "name",
    owner: str = "the checkpoint",
    max_bad: int | None = 0,
    unlabeled: bool = False,
) -> DetectionDatset:
    """Open one split of a COCO-format data set and log what the check found.

    Args:
        root: a directory in COCO's layout; or leave it out and give `images` and `ann`.
        split: train, val, test or testdev. With `images` and `ann` it only tells training from evaluation.
        images: image directory.
        ann: annotation json.
        num_classes: class count asked for, see `resolve_category_map`.
        stored: the category map of a checkpoint, see `resolve_category_map`; also of the next two.
        crowd: 'drop' or 'ignore', see `CocoParserCfg`.
        seed: see `DetectionDatset`.
        match: 'name' or 'id': what tells which class of `stored` a category is.
        owner: whose map `stored` is, for messages.
        max_bad: images that may be absent, see `check_coco`.
        unlabeled: take a json without annotations too.

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
    smallest = SMALLEST_SIDE_PX if split == "train" else 0
    parser = CocoParser(_cfg(img_dir, ann_path, split, crowd, smallest, unlabeled, max_bad))
    if parser.categories:
        try:
            parser.category_map = resolve_category_map(parser.categories, num_classes, stored, match, owner)
        except ValueError as error:
            raise ValueError(f"{ann_path}: {error}") from error
    parser.report.log(_logger)
    return DetectionDatset(img_dir, parser, seed=seed)


def create_dataset(
    name: str, root: str | Path, splits: str | Sequence[str] = ("train", "val"), crowd: str = "drop"
) -> DetectionDatset | list[DetectionDatset]:
    """Open splits of a data set by effdet's names. Labels are category ids, as in effdet (`effdet_category_map`).

    Args:
        name: 'coco', 'coco2017', 'coco2014', 'voc2007', 'voc2012', 'voc0712' (2007 and 2012 together, tested on 2007's
            test set), 'openimages' or 'openimages-challenge2019'.
        root: directory in COCO's layout; for VOC the one that holds VOC2007/ and VOC2012/; for Open Images the one that
            holds annotations/, train/ and validation/.
        splits: one or several of train, val, test, testdev, as far as the data set has them.
        crowd: 'drop' or 'ignore', see `CocoParserCfg`; for COCO.

    Returns:
        The data set, or a list of them when there are several splits.

    Raises:
        ValueError: unknown name or split; DatasetError, a kind of it, for errors in the data.
        FileNotFoundError: something is absent; the text says what is expected.
    """
    datasets = []
    for split in [splits] if isinstance(splits, str) else splits:
        img_dir, parser = _open_split(name.lower(), Path(root), split, crowd)
        parser.report.log(_logger)
        datasets.append(DetectionDatset(img_dir, parser))
    return datasets if len(datasets) > 1 else datasets[0]


def _open_split(name: str, root: Path, split: str, crowd: str) -> tuple[Path, CocoParser]:
    if name.startswith("coco"):
        img_dir, ann_path = coco_paths(root, split, "2014" if "coco2014" in name else "2017")
        return img_dir, create_parser("coco", cfg=_cfg(img_dir, ann_path, split, crowd))
    if name.startswith("voc"):
        year = next((key for key in ("voc0712", "voc2007") if key in name), "voc2012")
        layout = _VOC[year]()
        part = _named_split(layout.splits, year, split)
        lists, annotations, folders = (
            [part[key]] if isinstance(part[key], str) else part[key]
            for key in ("split_filename", "ann_filename", "img_dir")
        )
        cfg = VocParserCfg(
            [str(root / path) for path in lists],
            [str(root / path) for path in annotations],
            [f"{folder}/{layout.img_filename}" for folder in folders],
            min_img_size=SMALLEST_SIDE_PX,
        )
        return root, create_parser("voc", cfg=cfg)
    if name.startswith("openimages"):
        key = "openimages-challenge2019" if "challenge2019" in name else "openimages"
        layout = _OPEN_IMAGES[key]()
        part = _named_split(layout.splits, key, split)
        cfg = OpenImagesParserCfg(
            str(root / layout.categories_map),
            str(root / part["img_info"]),
            str(root / part["ann_bbox"]) if part["has_labels"] else "",
            img_filename=layout.img_filename,
            prefix_levels=part["prefix_levels"],
            has_labels=part["has_labels"],
            min_img_size=SMALLEST_SIDE_PX,
        )
        return root / part["img_dir"], create_parser("openimages", cfg=cfg)
    raise ValueError(
        f"data set {name!r} is unknown, available: coco (2017), coco2017, coco2014, {', '.join([*_VOC, *_OPEN_IMAGES])}"
    )


def _named_split(splits: dict[str, Any], name: str, split: str) -> Any:
    if split not in splits:
        raise ValueError(f"{name} has no split {split!r}, choose one of {', '.join(splits)}")
    return splits[split]
