"""The stats that a data check reports: counted and measured. `judge.py` says what they mean, others show them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from effdet.data.coco.categories import CategoryMap
from effdet.data.coco.check import CocoArrays, check_coco
from effdet.data.coco.read import collector_paused, read_json
from effdet.data.coco.report import DatasetReport
from effdet.data.dataset_factory import SMALLEST_SIDE_PX

from .anchor_reach import SIDE_EDGES_PX, Suggestion, find_reached, letterbox_boxes, sides_px, suggest_anchors
from .scan import ImageScan, scan_images

_TESTED_BOXES = 50_000  # boxes whose anchors are looked for: a share is then known to about 0.2 points
_TRIED_BOXES = 2_000  # of them, boxes that other settings are tried on


@dataclass(frozen=True)
class Finding:
    """One thing to know: its level ('error', 'warning' or 'note') and a sentence."""

    level: str
    text: str


@dataclass
class SplitStats:
    """What is known of one split.

    Attributes:
        name: 'train' or 'val'.
        img_dir, arrays, report: images and annotations; small images are still in.
        sides_px: square root of each box's area in the network's input, [n].
        tested, reached: for each bin of SIDE_EDGES_PX, how many boxes were tested, and how many of them an anchor
            reaches.
        scan: of the image files.
        scanned: index of each of them among the images, in the order of the scan.
        hidden: images without boxes that have some under another id or name.
    """

    name: str
    img_dir: Path
    arrays: CocoArrays
    report: DatasetReport
    sides_px: np.ndarray = field(default_factory=lambda: np.zeros(0))
    tested: np.ndarray = field(default_factory=lambda: np.zeros(len(SIDE_EDGES_PX) - 1))
    reached: np.ndarray = field(default_factory=lambda: np.zeros(len(SIDE_EDGES_PX) - 1))
    scan: ImageScan = field(default_factory=ImageScan)
    scanned: list[int] = field(default_factory=list)
    hidden: int = 0

    @property
    def side_counts(self) -> np.ndarray:
        """Boxes in each bin of SIDE_EDGES_PX."""
        return np.histogram(self.sides_px, SIDE_EDGES_PX)[0]

    @functools.cached_property
    def class_counts(self) -> dict[int, tuple[int, int]]:
        """Boxes and images by category id, crowd regions aside; (0, 0) of a category without boxes is left out."""
        ids, which, boxes = np.unique(self.arrays.category_ids, return_inverse=True, return_counts=True)
        images = max(1, len(self.arrays.img_infos))
        with_class = np.bincount(np.unique(which * images + box_images(self.arrays)) // images, minlength=len(ids))
        return {int(i): (int(n), int(m)) for i, n, m in zip(ids, boxes, with_class, strict=True)}

    @property
    def is_trained_on(self) -> np.ndarray:
        """Tell which images are large enough for a training, bool [images]."""
        return image_sizes(self.arrays).min(axis=1, initial=np.inf) >= SMALLEST_SIDE_PX

    @property
    def boxes_per_image(self) -> np.ndarray:
        """Boxes of each image, [images]."""
        return np.diff(self.arrays.offsets)


@dataclass
class DataStats:
    """All that the check found."""

    splits: list[SplitStats] = field(default_factory=list)
    categories: CategoryMap | None = None
    suggestion: Suggestion | None = None
    findings: list[Finding] = field(default_factory=list)

    def add(self, level: str, text: str) -> None:
        """Add a finding."""
        self.findings.append(Finding(level, text))

    def split(self, name: str) -> SplitStats | None:
        """Return the stats of a split by its name, or None."""
        return next((split for split in self.splits if split.name == name), None)


def box_images(arrays: CocoArrays) -> np.ndarray:
    """Return the index of each box's image, [n]."""
    return np.repeat(np.arange(len(arrays.img_infos)), np.diff(arrays.offsets))


def image_sizes(arrays: CocoArrays) -> np.ndarray:
    """Return each image's width and height, [images, 2]."""
    sizes = [(info["width"], info["height"]) for info in arrays.img_infos]
    return np.array(sizes, dtype=np.float64).reshape(-1, 2)


def read_splits(paths: Mapping[str, tuple[Path, Path] | Exception], max_bad: int | None = 0) -> DataStats:
    """Read the annotations of 'train' and 'val'.

    Args:
        paths: folder and json of each, or the error in their place, which is a finding.
        max_bad: images that may be absent without being an error, see `check_coco`.
    """
    stats = DataStats()
    for name, where in paths.items():
        try:
            if isinstance(where, Exception):
                raise where
            stats.splits.append(read_split(name, *where, max_bad))
        except (ValueError, OSError) as error:
            stats.add("error", f"{name}: {error}")
    return stats


def read_split(name: str, img_dir: Path, ann: Path, max_bad: int | None = 0) -> SplitStats:
    """Read a split's annotations; for `max_bad` see `read_splits`.

    Raises:
        DatasetError: the json is not in COCO's form; FileNotFoundError: no json, or no image folder.
    """
    if not img_dir.is_dir():
        raise FileNotFoundError(f"image directory {img_dir} does not exist")
    with collector_paused():
        arrays, report = check_coco(read_json(ann), str(ann), img_dir, True, keep_crowd=False, max_bad=max_bad)
    split = SplitStats(name, img_dir, arrays, report)
    if name == "train":
        for k in np.flatnonzero(~split.is_trained_on):
            info = arrays.img_infos[k]
            report.add("small_image", f"image {info['id']} {info['width']}x{info['height']}")
    return split


def measure_split(split: SplitStats, config: Any, processes: int, seed: int = 0) -> None:
    """Measure a split's boxes, and decode its images.

    Args:
        split: of `read_split`.
        config: the model config, for input size and anchors.
        processes: worker processes that decode images; 0 works in this one.
        seed: of the sample of boxes.
    """
    arrays, infos = split.arrays, split.arrays.img_infos
    boxes = letterbox_boxes(arrays.boxes_yxyx, image_sizes(arrays)[box_images(arrays)], config.image_size)
    split.sides_px = sides_px(boxes)
    sample = draw_sample(len(boxes), _TESTED_BOXES, seed)
    reached = find_reached(boxes[sample], config)
    split.tested = np.histogram(split.sides_px[sample], SIDE_EDGES_PX)[0]
    split.reached = np.histogram(split.sides_px[sample][reached], SIDE_EDGES_PX)[0]
    split.scanned = [k for k, info in enumerate(infos) if (split.img_dir / info["file_name"]).is_file()]
    split.scan = scan_images(split.img_dir, [infos[k] for k in split.scanned], len(split.scanned), processes)


def draw_sample(total: int, most: int, seed: int) -> np.ndarray:
    """Return at most `most` of the indices 0..total-1, ascending."""
    if total <= most:
        return np.arange(total)
    return np.sort(np.random.default_rng(seed).choice(total, most, replace=False))


def suggest_for(split: SplitStats, config: Any, seed: int) -> Suggestion:
    """Look for better anchors on a sample of a split's boxes."""
    sample = draw_sample(len(split.arrays.boxes_yxyx), _TRIED_BOXES, seed)
    sizes = image_sizes(split.arrays)[box_images(split.arrays)[sample]]
    return suggest_anchors(split.arrays.boxes_yxyx[sample], sizes, config)
