"""The annotations of a json as columns, and which of them can be used at all. Numbers in boxes are `boxes.py`'s."""

import itertools
from collections.abc import Iterable, Set
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .report import DatasetReport

# What json makes of numbers, and what may be an id; a bool is of another type.
NUMBERS = frozenset((int, float))
IDS = frozenset((int, str))


@dataclass
class Refused:
    """What "images" and "categories" list, but errors take out: annotations of it are no errors of their own.

    Attributes:
        images: ids of such images.
        unknown_images: some images have no usable id, so that any id may be one of theirs.
        unknown_categories: the same of categories.
    """

    images: set = field(default_factory=set)
    unknown_images: bool = False
    unknown_categories: bool = False


def four_numbers(value: Any) -> bool:
    """Tell whether a json value is a list of four numbers (NaN and infinity count as numbers)."""
    return isinstance(value, (list, tuple)) and len(value) == 4 and NUMBERS.issuperset(map(type, value))


def is_set(flag: Any) -> bool:
    """Tell whether a flag such as `iscrowd` is set: 1, 1.0, true or "1", while NaN and "0" say nothing."""
    if type(flag) is str:
        return flag.strip().lower() not in ("", "0", "0.0", "false", "no", "none", "null", "nan")
    return bool(flag) and flag == flag


def column(rows: list[dict[str, Any]], key: str) -> list:
    """Return one value of each row, None where it has no such key."""
    return list(map(dict.get, rows, itertools.repeat(key)))


def dicts(rows: list) -> list[dict[str, Any]]:
    """Return those rows that are objects."""
    if {dict}.issuperset(map(type, rows)):
        return rows
    return [row for row in rows if isinstance(row, dict)]


class Columns(NamedTuple):
    """What is used of annotations in which nothing is wrong, a list for each key."""

    image_ids: list[int | str]
    category_ids: list[int]
    boxes: list[list[float]]


def sound_columns(rows: list, image_ids: Set, cat_ids: Set) -> Columns | None:
    """Return the columns where `sound_rows` would give all rows and find nothing, else None; several times as fast."""
    if not {dict}.issuperset(map(type, rows)):
        return None
    ids, images, cats, boxes = (column(rows, key) for key in ("id", "image_id", "category_id", "bbox"))
    sound = (
        IDS.issuperset(map(type, ids))
        and len(set(ids)) == len(ids)
        and IDS.issuperset(map(type, images))
        and image_ids >= set(images)
        and {int}.issuperset(map(type, cats))
        and cat_ids >= set(cats)
        and {list}.issuperset(map(type, boxes))
        and {4}.issuperset(map(len, boxes))
        and NUMBERS.issuperset(map(type, itertools.chain.from_iterable(boxes)))
    )
    return Columns(images, cats, boxes) if sound else None


def sound_rows(
    rows: list, image_ids: Set, cat_ids: Set, report: DatasetReport, refused: Refused | None = None
) -> list[dict[str, Any]]:
    """Return the annotations with four numbers as bbox, of a known image and category; the rest goes to the report.

    Those of a refused image or category are left out unsaid, as its own error says it.
    """
    refused = refused or Refused()
    seen_ids: set = set()
    sound = []
    for row in rows:
        if not isinstance(row, dict):
            report.add("no_bbox", repr(row)[:60])
            continue
        ann_id, img_id, cat_id = row.get("id"), row.get("image_id"), row.get("category_id")
        if type(ann_id) not in IDS or ann_id in seen_ids:
            report.add("duplicate_annotation_id", f"id {ann_id}")
        else:
            seen_ids.add(ann_id)
        known_category = type(cat_id) is int and cat_id in cat_ids
        if type(img_id) not in IDS or (type(cat_id) is not int and not refused.unknown_categories):
            report.add("annotation_fields", f"annotation {ann_id}: image_id {img_id!r}, category_id {cat_id!r}"[:99])
        elif img_id not in image_ids:
            if img_id not in refused.images and not refused.unknown_images:
                report.add("orphan_annotation", f"annotation {ann_id} of image {img_id!r}")
        elif not known_category:
            if not refused.unknown_categories:
                report.add("unknown_category", f"annotation {ann_id} of image {img_id}: category {cat_id}")
        elif not four_numbers(row.get("bbox")):
            report.add("no_bbox", f"annotation {ann_id} of image {img_id}")
        else:
            sound.append(row)
    if "unknown_category" in report.errors:
        used = {row.get("category_id") for row in dicts(rows) if type(row.get("category_id")) is int}
        shift = min(used) - min(cat_ids, default=0)
        report.remarks["unknown_category"] = f'"categories" has the ids {_few(cat_ids)}, the annotations {_few(used)}'
        if shift and {cat_id - shift for cat_id in used} <= cat_ids:
            report.remarks["unknown_category"] += f": do they count from {min(used)}, and that from {min(cat_ids)}?"
    return sound


def _few(ids: Iterable[int]) -> str:
    ordered = sorted(ids)
    return ", ".join(map(str, ordered[:12])) + (", ..." if len(ordered) > 12 else "")
