"""The stats that a data check reports: counted, measured and judged. How they are shown is not known here."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from effdet.data.coco.categories import CategoryMap, resolve_category_map
from effdet.data.coco.check import CocoArrays, boxes_of, check_coco
from effdet.data.coco.read import collector_paused, read_json
from effdet.data.coco.report import MAX_EXAMPLES, DatasetReport
from effdet.data.dataset_factory import SMALLEST_SIDE_PX

from .anchor_reach import SIDE_EDGES_PX, Suggestion, find_reached, letterbox_boxes, sides_px, suggest_anchors
from .scan import BROKEN, ImageScan, repeats_within, scan_images, shared_between

_TESTED_BOXES = 50_000  # boxes whose anchors are looked for: a share is then known to about 0.2 points
_TRIED_BOXES = 2_000  # of them, boxes that other settings are tried on
_MUCH_UNREACHED = 0.2  # share of boxes without an anchor, after the best setting offered, that is a warning
_MOST_UNREACHED = 0.8  # and the share from which a training is of little use
_MUCH_PADDING = 0.5  # of the network's input
_GAIN_WORTH_A_WARNING = 0.05
_CLASS_ERRORS = {"category_fields", "duplicate_category_id", "no_categories"}
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
        scanned: index of each of them among the images, in the order of the scan.
        hidden: images without boxes that have some under another id or name.
    """

    name: str
    img_dir: Path
    arrays: CocoArrays
    report: DatasetReport
    sides_px: np.ndarray
    tested: np.ndarray
    reached: np.ndarray
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


def gather_stats(
    paths: dict[str, tuple[Path, Path] | Exception],
    config: Any,
    num_classes: int | None,
    processes: int,
    seed: int = 0,
    match: str = "name",
) -> DataStats:
    """Check the splits of a data set.

    Args:
        paths: image folder and annotation file of 'train' and 'val', or the error that stands in their place.
        config: the model config, for input size and anchors.
        num_classes: asked for by the user, or None.
        processes: worker processes that decode images; 0 works in this one.
        seed: of the samples.
        match: what tells which class of the training a category of val is: its 'name' or its 'id'.
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
        infos = split.arrays.img_infos
        split.scanned = [k for k, info in enumerate(infos) if (split.img_dir / info["file_name"]).is_file()]
        split.scan = scan_images(split.img_dir, [infos[k] for k in split.scanned], len(split.scanned), processes)
        stats.findings += [*judge_repeated_images(split), *judge_split(split, config.max_det_per_image)]
    judge_categories(stats, num_classes, match)
    judge_shared_images(stats)
    train = stats.split("train")
    if train is not None and len(train.sides_px):
        stats.suggestion = suggest_for(train, config, seed)
        stats.findings += judge_anchors(stats.suggestion, config.image_size)
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
            if 0 < min(info["width"], info["height"]) < SMALLEST_SIDE_PX:
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
    """Turn what was counted in one split into findings; none of them follows from another."""
    report, infos = split.report, split.arrays.img_infos
    for level, text, kind in report.entries():
        harmless = level == "warning" and kind in _HARMLESS and kind not in report.suspicious
        if kind not in split.scan.broken:  # the same, found by reading all files
            yield Finding("note" if harmless else level, f"{split.name}: {text}")
    for kind, count in split.scan.broken.items():
        remedy = "run: git lfs pull" if kind == "lfs_pointer" else "replace them or take them out of the json"
        yield Finding(
            "error",
            f"{split.name}: {count} {BROKEN[kind]} ({'; '.join(split.scan.examples[kind])}"
            f"{'; ...' if count > MAX_EXAMPLES else ''}): {remedy}",
        )
    if not len(infos) and not report.errors:
        yield Finding("error", f"{split.name}: there are no images")
    elif not len(split.sides_px) and not report.errors:
        yield Finding("error", f"{split.name}: there are no boxes")
    if len(infos) and report.dropped.get("small_image") == len(infos):
        yield Finding(
            "error",
            f"{split.name}: all {len(infos)} images are under {SMALLEST_SIDE_PX} px wide or high, too small "
            "to find something in, so none is left to train on: enlarge them",
        )
    crowded = int((split.boxes_per_image > max_det).sum())
    if crowded and split.name == "val":
        yield Finding(
            "warning",
            f"{split.name}: {crowded} images have more than {max_det} boxes, and no more are "
            f"predicted in one: give --max-det {split.boxes_per_image.max()}",
        )
    background = report.num_images_without_boxes - split.hidden
    if background > 0 and not report.errors:  # annotations may be among what the errors are about
        yield Finding(
            "note",
            f"{split.name}: {background} of {report.num_images} images have no boxes; they teach what background "
            "looks like",
        )


def judge_repeated_images(split: SplitStats) -> Iterator[Finding]:
    """Compare the boxes of images of a split that are equal, pixel by pixel, under different names."""
    arrays = split.arrays
    names = [info["file_name"] for info in arrays.img_infos]
    pairs = [(split.scanned[a], split.scanned[b]) for a, b in repeats_within(split.scan.pixel_hashes)]
    boxes = {k: boxes_of(arrays, k) for pair in pairs for k in pair}
    other = [(a, b) for a, b in pairs if names[a] != names[b]]  # the same name: the report has it
    unlike = [(a, b) for a, b in other if boxes[a] != boxes[b]]
    alike = [(a, b) for a, b in other if boxes[a] == boxes[b]]
    unseen = len({k for a, b in pairs for k in (a, b) if not boxes[k] and boxes[a] | boxes[b]})
    split.hidden = max(unseen, split.report.hidden_images)  # files that cannot be read have no pixels to compare
    for level, some, text in (
        (
            "warning",
            unlike,
            ", with other boxes: merge each pair, as the objects of one image are trained as background in the other",
        ),
        ("note", alike, ""),
    ):
        if some:
            named = _some([f"{names[a]} = {names[b]}" for a, b in some])
            yield Finding(level, f"{split.name}: {len(some)} images repeat an earlier one ({named}){text}")


def judge_categories(stats: DataStats, num_classes: int | None, match: str) -> None:
    """Settle the classes as training does, and compare those of the two splits."""
    train, val = (
        split if split is not None and not _CLASS_ERRORS & split.report.errors.keys() else None
        for split in (stats.split("train"), stats.split("val"))
    )
    base = train or val
    if base is None or not base.arrays.categories:
        return
    val_map = None
    try:
        stats.categories = resolve_category_map(base.arrays.categories, num_classes)
        if train and val and val.arrays.categories:
            val_map = resolve_category_map(val.arrays.categories, None, stats.categories, match, "the training split")
    except ValueError as error:
        stats.add("error", f"classes: {val.name if stats.categories and val else base.name}: {error}")
        return
    if val_map is not None and val:  # from here on under the ids of train
        val.arrays.category_ids = stats.categories.idx_to_id[val_map.to_idx(val.arrays.category_ids)]
        _compare_names(stats, val, val_map, match)
    names = dict(zip(stats.categories.ids, stats.categories.names, strict=True))
    if base.report.errors or (val and val.report.errors):  # boxes may be among what the errors are about
        return
    counted = {split.name: set(split.class_counts) for split in (train, val) if split}
    empty = [f"{i} {name!r}" for i, name in names.items() if not any(i in ids for ids in counted.values())]
    if empty:
        stats.add("note", f"classes: {len(empty)} have no boxes anywhere, and never will be found: {_some(empty)}")
    if len(counted) < 2:
        return
    only_val = [names[i] for i in names if i in counted["val"] - counted["train"]]
    only_train = [names[i] for i in names if i in counted["train"] - counted["val"]]
    if only_val:
        stats.add("warning", f"classes: {_some(only_val)}: boxes in val but none in train, so their AP will be 0")
    if only_train:
        stats.add("note", f"classes: {_some(only_train)}: boxes in train but none in val, so nothing measures them")


def _compare_names(stats: DataStats, val: SplitStats, val_map: CategoryMap, match: str) -> None:
    """Say where val gives a class another id, or with match 'id' another name."""
    theirs = stats.categories
    assert theirs is not None
    index = {row["id"]: val_map.id_to_idx[row["id"]] for row in val.arrays.categories}
    if match == "id":
        renamed = [
            f"{row['id']}: {theirs.class_names[index[row['id']]]!r} in train, {row['name']!r} in val"
            for row in val.arrays.categories
            if theirs.class_names[index[row["id"]]] != row["name"]
        ]
        if renamed:
            stats.add(
                "warning",
                f"classes: {len(renamed)} ids have other names in val than in train: {_some(renamed)}; the ids count",
            )
        return
    moved = [
        f"{row['name']!r} is {theirs.idx_to_id[index[row['id']]]} in train, {row['id']} in val"
        for row in val.arrays.categories
        if theirs.idx_to_id[index[row["id"]]] != row["id"]
    ]
    if moved:
        stats.add(
            "note", f"classes: {len(moved)} names have other ids in val than in train: {_some(moved)}; the names count"
        )


def judge_shared_images(stats: DataStats) -> None:
    """Look for images that are in train and in val."""
    train, val = stats.split("train"), stats.split("val")
    shared = shared_between(train.scan, val.scan) if train and val else []
    if shared and val:
        same = sum(equal for _, _, equal in shared)
        pairs = _some([f"{first} = {second}" for first, second, _ in shared])
        stats.add(
            "warning",
            f"{len(shared)} of {len(val.scan.names)} val images are in train too ({same} with "
            f"equal files, {len(shared) - same} with equal pixels in another file; train = val: "
            f"{pairs}): they make the AP look better than it is; take them out of one split",
        )


def judge_anchors(found: Suggestion, image_size: Sequence[int]) -> Iterator[Finding]:
    """Turn the search for better anchors into findings: how serious one is depends on what stays out of reach."""
    present, take = found.present.share, found.take
    left = 1 - (take.share if take else present)
    level = "error" if left >= _MOST_UNREACHED else "warning" if left >= _MUCH_UNREACHED else "note"
    text = f"anchors: {100 * (1 - present):.1f} % of the train boxes overlap no anchor with IoU 0.5"
    if take is not None:
        if level == "note" and take.share >= present + _GAIN_WORTH_A_WARNING:
            level = "warning"
        text += (
            f"; {take.flags} would leave {100 * left:.1f} % at equal cost (class and "
            "box heads of published weights were trained with the present anchors)"
        )
    dearer = found.better[-1] if found.better and found.better[-1].share > 1 - left else None
    if level != "note" and dearer is not None:
        text += f"; {dearer.flags} would leave {100 * (1 - dearer.share):.1f} % at {dearer.cost:.1f} times the cost"
    elif level != "note" and take is None:
        text += (
            "; no setting tried reaches more: the objects are too small or too long in this input, so cut the images up"
        )
    yield Finding(level, text)
    if found.padding >= _MUCH_PADDING:
        fitting = found.fitting_size
        offered = f"; --image-size {fitting[0]} {fitting[1]} has their shape at equal cost" if fitting else ""
        yield Finding(
            "warning",
            f"images: {100 * found.padding:.0f} % of the {image_size[0]} x {image_size[1]} (height x width) input is "
            f"padding, as the images have another shape{offered}",
        )


def _some(texts: Sequence[str]) -> str:
    return ", ".join(texts[:MAX_EXAMPLES]) + (f", ... ({len(texts)} in all)" if len(texts) > MAX_EXAMPLES else "")
