"""The stats that a data check reports: counted, measured and judged. How they are shown is not known here."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from effdet.data.coco.categories import CategoryMap, resolve_category_map
from effdet.data.coco.check import CocoArrays, check_coco
from effdet.data.coco.read import collector_paused, read_json
from effdet.data.coco.report import MAX_EXAMPLES, DatasetReport

from .anchor_reach import SIDE_EDGES_PX, Suggestion, find_reached, letterbox_boxes, sides_px, suggest_anchors
from .scan import BROKEN, ImageScan, repeats_within, scan_images, shared_between

_TESTED_BOXES = 50_000  # boxes whose anchors are looked for: a share is then known to about 0.2 points
_TRIED_BOXES = 2_000  # of them, boxes that other settings are tried on
_SMALLEST_TRAINING_SIDE_PX = 32  # as dataset_factory.py
_GAIN_WORTH_A_WARNING = 0.05
_HARMLESS = ("crowd", "crowd_ignored", "clipped_bbox", "size_from_file", "small_image")


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
    """

    name: str
    img_dir: Path
    arrays: CocoArrays
    report: DatasetReport
    sides_px: np.ndarray
    tested: np.ndarray
    reached: np.ndarray
    scan: ImageScan = field(default_factory=ImageScan)

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
    """Return each image's width and height, [images, 2]; unknown ones as 1."""
    sizes = [(info["width"] or 1, info["height"] or 1) for info in arrays.img_infos]
    return np.array(sizes, dtype=np.float64).reshape(-1, 2)


def gather_stats(
    paths: dict[str, tuple[Path, Path] | Exception], config: Any, num_classes: int | None, processes: int, seed: int = 0
) -> DataStats:
    """Check the splits of a data set.

    Args:
        paths: image folder and annotation file of 'train' and 'val', or the error that stands in their place.
        config: the model config, for input size and anchors.
        num_classes: asked for by the user, or None.
        processes: worker processes that decode images; 0 works in this one.
        seed: of the samples.
    """
    stats = DataStats()
    for name, where in paths.items():
        try:
            if isinstance(where, Exception):
                raise where
            stats.splits.append(read_split(name, *where, config, seed))
        except (ValueError, OSError) as error:
            stats.add("error", f"{name}: {error}")
            continue
        split = stats.splits[-1]
        there = [info for info in split.arrays.img_infos if (split.img_dir / info["file_name"]).is_file()]
        split.scan = scan_images(split.img_dir, there, len(there), processes)
        stats.findings += judge_split(split, config.max_det_per_image)
    judge_categories(stats, num_classes)
    judge_repeats(stats)
    train = stats.split("train")
    if train is not None and len(train.sides_px):
        stats.suggestion = suggest_for(train, config, seed)
        stats.findings += judge_anchors(stats.suggestion)
    return stats


def read_split(name: str, img_dir: Path, ann: Path, config: Any, seed: int) -> SplitStats:
    """Read a split's annotations and measure its boxes.

    Raises:
        DatasetError: the json is not in COCO's form; FileNotFoundError: no json, or no image folder.
    """
    if not img_dir.is_dir():
        raise FileNotFoundError(f"image directory {img_dir} does not exist")
    with collector_paused():
        arrays, report = check_coco(read_json(ann), str(ann), img_dir, has_labels=True, keep_crowd=False)
    if name == "train":
        for info in arrays.img_infos:
            if 0 < min(info["width"], info["height"]) < _SMALLEST_TRAINING_SIDE_PX:
                report.add("small_image", f"image {info['id']} {info['width']}x{info['height']}")
    boxes = letterbox_boxes(arrays.boxes_yxyx, image_sizes(arrays)[box_images(arrays)], config.image_size)
    sides = sides_px(boxes)
    sample = draw_sample(len(boxes), _TESTED_BOXES, seed)
    reached = find_reached(boxes[sample], config)
    tested = np.histogram(sides[sample], SIDE_EDGES_PX)[0]
    return SplitStats(
        name, img_dir, arrays, report, sides, tested, np.histogram(sides[sample][reached], SIDE_EDGES_PX)[0]
    )


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


def judge_split(split: SplitStats, max_det: int) -> Iterator[Finding]:
    """Turn what was counted in one split into findings."""
    for level, text, kind in split.report.entries():
        level = "note" if level == "warning" and kind in _HARMLESS else level
        yield Finding(level, f"{split.name}: {text}")
    for kind, count in split.scan.broken.items():
        yield Finding(
            "error",
            f"{split.name}: {count} {BROKEN[kind]} ({'; '.join(split.scan.examples[kind])}"
            f"{'; ...' if count > MAX_EXAMPLES else ''}): replace them or take them out of the json",
        )
    if not len(split.arrays.img_infos):
        yield Finding("error", f"{split.name}: there are no images")
    elif not len(split.sides_px):
        yield Finding("error", f"{split.name}: there are no boxes")
    crowded = int((split.boxes_per_image > max_det).sum())
    if crowded and split.name == "val":
        yield Finding(
            "warning",
            f"{split.name}: {crowded} images have more than {max_det} boxes, and no more are "
            f"predicted in one: give --max-det {split.boxes_per_image.max()}",
        )
    if split.report.num_images_without_boxes:
        yield Finding(
            "note",
            f"{split.name}: {split.report.num_images_without_boxes} of {split.report.num_images} "
            "images have no boxes; they teach what background looks like",
        )


def judge_categories(stats: DataStats, num_classes: int | None) -> None:
    """Settle the classes as training does, and compare those of the two splits."""
    train, val = stats.split("train"), stats.split("val")
    base = train or val
    if base is None or not base.arrays.categories or "duplicate_category_id" in base.report.errors:
        return
    try:
        stats.categories = resolve_category_map(base.arrays.categories, num_classes)
        if train and val and val.arrays.categories and "duplicate_category_id" not in val.report.errors:
            resolve_category_map(val.arrays.categories, None, stats.categories)
    except ValueError as error:
        stats.add("error", f"classes: {error}")
        return
    if not (train and val):
        return
    names = dict(zip(stats.categories.ids, stats.categories.names, strict=True))
    renamed = [
        f"{row['id']}: {names[row['id']]!r} in train, {row['name']!r} in val"
        for row in val.arrays.categories
        if row["id"] in names and names[row["id"]] != row["name"]
    ]
    if renamed:
        stats.add(
            "warning",
            f"classes: {len(renamed)} ids have other names in val than in train: {_some(renamed)}; the ids count",
        )
    only_val = [names[i] for i in val.class_counts if i not in train.class_counts]
    only_train = [names[i] for i in train.class_counts if i not in val.class_counts]
    if only_val:
        stats.add("warning", f"classes: {_some(only_val)}: boxes in val but none in train, so their AP will be 0")
    if only_train:
        stats.add("note", f"classes: {_some(only_train)}: boxes in train but none in val, so nothing measures them")


def judge_repeats(stats: DataStats) -> None:
    """Look for images that occur twice: in train and val, or within one of them."""
    train, val = stats.split("train"), stats.split("val")
    if train and val:
        shared = shared_between(train.scan, val.scan)
        if shared:
            same = sum(equal for _, _, equal in shared)
            pairs = _some([f"{first} = {second}" for first, second, _ in shared])
            stats.add(
                "warning",
                f"{len(shared)} of {len(val.scan.names)} val images are in train too ({same} with "
                f"equal files, {len(shared) - same} with equal pixels in another file; train = val: "
                f"{pairs}): they make the AP look better than it is; take them out of one split",
            )
    for split in stats.splits:
        repeats = repeats_within(split.scan.pixel_hashes, split.scan.names)
        if repeats:
            pairs = _some([f"{first} = {later}" for first, later in repeats])
            stats.add("note", f"{split.name}: {len(repeats)} images repeat an earlier one ({pairs})")


def judge_anchors(found: Suggestion) -> Iterator[Finding]:
    """Turn the search for better anchors into a finding."""
    present, take = found.present.share, found.take
    missed = f"anchors: {100 * (1 - present):.1f} % of the train boxes overlap no anchor with IoU 0.5"
    if take is None:
        yield Finding("note", missed)
        return
    level = "warning" if take.share >= present + _GAIN_WORTH_A_WARNING else "note"
    yield Finding(
        level,
        f"{missed}; {take.flags} would leave {100 * (1 - take.share):.1f} % at equal cost (class and "
        "box heads of published weights were trained with the present anchors)",
    )


def _some(texts: Sequence[str]) -> str:
    return ", ".join(texts[:MAX_EXAMPLES]) + (f", ... ({len(texts)} in all)" if len(texts) > MAX_EXAMPLES else "")
