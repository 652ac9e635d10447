"""Check a COCO json before anything is trained on it.

`check_coco` turns the parsed json into plain arrays and puts every defect into a `DatasetReport`. Defects never stop it
half way: the caller raises once, with all of them. Reading files and serving items is `coco.py`'s job.
"""

import itertools
import math
import os
import posixpath
from collections.abc import Iterable, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..images import ImageError, read_size
from .report import MAX_EXAMPLES, MIN_BOX_PX, DatasetError, DatasetReport, shown


@dataclass
class CocoArrays:
    """The used part of an annotation file, images sorted by id.

    `boxes_yxyx` float32 [n, 4], `category_ids` int64 [n] and `is_crowd` bool [n] hold the rows of image k at
    offsets[k]:offsets[k + 1].
    """

    categories: list[dict[str, Any]]
    img_infos: list[dict[str, Any]]
    offsets: np.ndarray
    boxes_yxyx: np.ndarray
    category_ids: np.ndarray
    is_crowd: np.ndarray


def check_coco(
    data: Any, source: str, img_dir: Path | None, has_labels: bool, keep_crowd: bool
) -> tuple[CocoArrays, DatasetReport]:
    """Check a parsed COCO json and pack its boxes into arrays.

    Args:
        data: the parsed json.
        source: its name, for messages.
        img_dir: where the images are; None skips the checks that need files.
        has_labels: False for a file that lists images only.
        keep_crowd: keep crowd regions as rows with is_crowd set, instead of dropping them.

    Returns:
        The arrays (not usable when the report has errors) and the report.

    Raises:
        DatasetError: the json is not in COCO's form at all.
    """
    lists = ("images", "annotations", "categories") if has_labels else ("images",)
    absent = [k for k in lists if not isinstance(data, dict) or not isinstance(data.get(k), list)]
    if absent:
        got = f"keys {sorted(map(shown, data))[:8]}" if isinstance(data, dict) else f"a {type(data).__name__}"
        raise DatasetError(
            f"{source} is not a COCO annotation file: it needs the lists {', '.join(lists)}; "
            f"{', '.join(absent)} missing, found {got}"
        )
    report = DatasetReport(source=source)
    rows = data.get("categories")
    categories = _check_categories(rows if isinstance(rows, list) else [], report, has_labels)
    infos = _check_images(data["images"], report, img_dir)
    annotations = data["annotations"] if has_labels else []
    packed = _pack_annotations(annotations, categories, infos, report, keep_crowd)
    arrays = CocoArrays(categories, infos, *packed)
    report.num_images, report.num_annotations, report.num_categories = len(infos), len(annotations), len(categories)
    report.num_boxes = int((~arrays.is_crowd).sum())
    report.num_images_without_boxes = len(infos) - len(np.unique(_row_images(arrays)[~arrays.is_crowd]))
    return arrays, report


def _row_images(arrays: CocoArrays) -> np.ndarray:
    return np.repeat(np.arange(len(arrays.img_infos)), np.diff(arrays.offsets))


def _check_categories(rows: list, report: DatasetReport, has_labels: bool) -> list[dict[str, Any]]:
    if has_labels and not rows:
        report.add("no_categories", "")
    seen: dict[int, dict[str, Any]] = {}
    for row in rows:
        cat_id = row.get("id") if isinstance(row, dict) else None
        if type(cat_id) is not int or not -(2**63) <= cat_id < 2**63:
            report.add("category_fields", repr(row)[:60])
        elif cat_id in seen:
            report.add("duplicate_category_id", f"id {cat_id}: {seen[cat_id]['name']!r} and {row.get('name')!r}")
        else:
            seen[cat_id] = {"id": cat_id, "name": shown(str(row.get("name", cat_id)))}
    return [seen[k] for k in sorted(seen)]


def _is_side(value: Any) -> bool:
    return type(value) in _NUMBERS and 1 <= value < 2**31


def _check_images(rows: list, report: DatasetReport, img_dir: Path | None) -> list[dict[str, Any]]:
    infos: dict[Any, dict[str, Any]] = {}
    sizeless = []
    for row in rows:
        img_id, name = (row.get("id"), row.get("file_name")) if isinstance(row, dict) else (None, None)
        if type(img_id) not in _IDS or not isinstance(name, str) or not name:
            report.add("image_fields", repr(row)[:60])
            continue
        if img_id in infos:
            report.add("duplicate_image_id", f"id {img_id}: {infos[img_id]['file_name']} and {name}")
            continue
        if _escapes(name):
            report.add("escaping_file_name", f"{name!r} of image {img_id}")
            continue
        info = {"id": img_id, "file_name": name, "width": row.get("width"), "height": row.get("height")}
        infos[img_id] = info
        if _is_side(info["width"]) and _is_side(info["height"]):
            info["width"], info["height"] = int(info["width"]), int(info["height"])
        else:
            info["width"], info["height"] = 0, 0
            sizeless.append(info)
    missing = check_files(infos.values(), img_dir, report) if img_dir is not None else set()
    for info in sizeless:
        if info["id"] not in missing:
            _fill_size(info, img_dir, report)
    return [infos[k] for k in sorted(infos, key=lambda k: (isinstance(k, str), k))]


def _escapes(name: str) -> bool:
    if name.isalnum() or name.replace(".", "0", 1).isalnum():  # the usual kind, 000000000009.jpg
        return False
    parts = name.replace("\\", "/").split("/")
    return parts[0] == "" or ".." in parts or (len(parts[0]) == 2 and parts[0][1] == ":")


def _fill_size(info: dict[str, Any], img_dir: Path | None, report: DatasetReport) -> None:
    example = f"image {info['id']} {info['file_name']}"
    if img_dir is None:
        report.add("no_size", example)
        return
    try:
        info["width"], info["height"] = read_size(img_dir / info["file_name"])
    except ImageError:
        report.add("unreadable_image", example)
    else:
        report.add("size_from_file", example)


def check_files(infos: Iterable[dict[str, Any]], img_dir: Path, report: DatasetReport) -> set:
    """Look for every image's file, listing each directory once, and add those missing to the report.

    Returns:
        The ids of the missing.

    Raises:
        DatasetError: a directory may not be read.
    """
    listings: dict[str, set[str]] = {}
    missing = set()
    for info in infos:
        name = info["file_name"]
        folder, base = posixpath.split(posixpath.normpath(name)) if "/" in name else ("", name)
        if folder not in listings:
            try:
                with os.scandir(img_dir / folder) as entries:
                    listings[folder] = {e.name for e in entries}
            except PermissionError as e:
                raise DatasetError(
                    f"image directory {img_dir / folder} may not be read: permission denied. Change its "
                    "permissions, or run as a user who may."
                ) from e
            except (OSError, ValueError):  # ValueError: no file can have this name
                listings[folder] = set()
        if base not in listings[folder]:
            missing.add(info["id"])
            report.add("missing_image", f"image {info['id']} {info['file_name']}")
    return missing


# What json makes of numbers, and what may be an id; a bool is of another type.
_NUMBERS = frozenset((int, float))
_IDS = frozenset((int, str))


def four_numbers(value: Any) -> bool:
    """Tell whether a json value is a list of four numbers (NaN and infinity count as numbers)."""
    return isinstance(value, (list, tuple)) and len(value) == 4 and _NUMBERS.issuperset(map(type, value))


def _pack_annotations(
    rows: list, categories: list[dict[str, Any]], infos: list[dict[str, Any]], report: DatasetReport, keep_crowd: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns (offsets, boxes_yxyx, category_ids, is_crowd) of CocoArrays."""
    image_at = {info["id"]: k for k, info in enumerate(infos)}
    cat_ids = {c["id"] for c in categories}
    if not _all_sound(rows, image_at.keys(), cat_ids):
        rows = _sound_rows(rows, image_at.keys(), cat_ids, report)
    xywh = _to_array(_column(rows, "bbox"))
    image = np.array([image_at[img_id] for img_id in _column(rows, "image_id")], dtype=np.int64)
    cats = np.array(_column(rows, "category_id"), dtype=np.int64)
    crowds = zip(_column(rows, "iscrowd"), _column(rows, "ignore"), strict=True)
    is_crowd = np.array([bool(iscrowd or ignore) for iscrowd, ignore in crowds], dtype=bool)
    yxyx, keep = _check_boxes(xywh, image, is_crowd, infos, rows, report, keep_crowd)
    order = np.flatnonzero(keep)
    order = order[np.argsort(image[order], kind="stable")]
    offsets = np.zeros(len(infos) + 1, dtype=np.int64)
    np.cumsum(np.bincount(image[order], minlength=len(infos)), out=offsets[1:])
    return offsets, yxyx[order].astype(np.float32), cats[order], is_crowd[order]


def _all_sound(rows: list, image_ids: Set, cat_ids: Set) -> bool:
    """Tell whether `_sound_rows` would give all rows and find nothing; a column at a time, several times as fast."""
    if not {dict}.issuperset(map(type, rows)):
        return False
    ids, images, cats, boxes = (_column(rows, key) for key in ("id", "image_id", "category_id", "bbox"))
    return (
        _IDS.issuperset(map(type, ids))
        and len(set(ids)) == len(ids)
        and _IDS.issuperset(map(type, images))
        and image_ids >= set(images)
        and {int}.issuperset(map(type, cats))
        and cat_ids >= set(cats)
        and {list}.issuperset(map(type, boxes))
        and {4}.issuperset(map(len, boxes))
        and _NUMBERS.issuperset(map(type, itertools.chain.from_iterable(boxes)))
    )


def _column(rows: list[dict[str, Any]], key: str) -> list:
    return list(map(dict.get, rows, itertools.repeat(key)))


def _sound_rows(rows: list, image_ids: Set, cat_ids: Set, report: DatasetReport) -> list[dict[str, Any]]:
    """Return the annotations with four numbers as bbox, of a known image and category; the rest goes to the report."""
    seen_ids: set = set()
    sound = []
    for row in rows:
        if not isinstance(row, dict):
            report.add("no_bbox", repr(row)[:60])
            continue
        ann_id, img_id, cat_id = row.get("id"), row.get("image_id"), row.get("category_id")
        if type(ann_id) not in _IDS or ann_id in seen_ids:
            report.add("duplicate_annotation_id", f"id {ann_id}")
        else:
            seen_ids.add(ann_id)
        if type(img_id) not in _IDS or type(cat_id) is not int:
            report.add("annotation_fields", f"annotation {ann_id}: image_id {img_id!r}, category_id {cat_id!r}"[:99])
        elif img_id not in image_ids:
            report.add("orphan_annotation", f"annotation {ann_id} of image {img_id!r}")
        elif cat_id not in cat_ids:
            report.add("unknown_category", f"annotation {ann_id} of image {img_id}: category {cat_id}")
        elif not four_numbers(row.get("bbox")):
            report.add("no_bbox", f"annotation {ann_id} of image {img_id}")
        else:
            sound.append(row)
    return sound


def _to_array(boxes: list[list]) -> np.ndarray:
    """Return boxes of four json numbers as float64 [n, 4]; integers beyond float64 become inf."""
    try:
        flat = np.fromiter(itertools.chain.from_iterable(boxes), dtype=np.float64, count=4 * len(boxes))
    except OverflowError:
        flat = np.array([v if abs(v) < 1e300 else math.inf for box in boxes for v in box], dtype=np.float64)
    return flat.reshape(-1, 4)


def _check_boxes(
    xywh: np.ndarray,
    image: np.ndarray,
    is_crowd: np.ndarray,
    infos: list[dict[str, Any]],
    rows: list[dict[str, Any]],
    report: DatasetReport,
    keep_crowd: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Sort the boxes [n, 4] into kinds, each into the first that fits.

    Returns:
        The boxes clipped, yxyx, and which ones to keep, bool [n].
    """
    sizes = np.array([(i["width"], i["height"]) for i in infos], dtype=np.float64).reshape(-1, 2)
    width, height = sizes[image].T if len(image) else (np.zeros(0), np.zeros(0))
    with np.errstate(invalid="ignore", over="ignore"):
        x0, y0, w, h = xywh.T
        x1, y1 = x0 + w, y0 + h
        finite = np.isfinite(xywh).all(axis=1) & np.isfinite(x1) & np.isfinite(y1)
        in_x0, in_x1 = np.clip(x0, 0, width), np.clip(x1, 0, width)
        in_y0, in_y1 = np.clip(y0, 0, height), np.clip(y1, 0, height)
        empty = (w <= 0) | (h <= 0)
        outside = (x1 <= 0) | (y1 <= 0) | (x0 >= width) | (y0 >= height)
        tiny = (in_x1 - in_x0 < MIN_BOX_PX) | (in_y1 - in_y0 < MIN_BOX_PX)
        partly = (
            np.maximum.reduce([-x0, -y0, x1 - width, y1 - height]) > 1e-3 if len(image) else np.zeros(0, dtype=bool)
        )

    left = np.ones(len(image), dtype=bool)
    steps = [("bad_bbox", ~finite), ("empty_bbox", empty), ("outside_bbox", outside), ("tiny_bbox", tiny)]
    for kind, mask in steps + ([] if keep_crowd else [("crowd", is_crowd)]):
        _add_rows(report, kind, left & mask, rows, image, infos)
        left &= ~mask
    if keep_crowd:
        _add_rows(report, "crowd_ignored", left & is_crowd, rows, image, infos)
    _add_rows(report, "clipped_bbox", left & partly, rows, image, infos)
    return np.stack([in_y0, in_x0, in_y1, in_x1], axis=1), left


def _add_rows(
    report: DatasetReport,
    kind: str,
    mask: np.ndarray,
    rows: list[dict[str, Any]],
    image: np.ndarray,
    infos: list[dict[str, Any]],
) -> None:
    at = np.flatnonzero(mask)
    for n, k in enumerate(at[:MAX_EXAMPLES]):
        last = n == min(MAX_EXAMPLES, len(at)) - 1
        example = f"annotation {rows[k].get('id')} of image {infos[image[k]]['id']}"
        report.add(kind, example, len(at) - n if last else 1)
