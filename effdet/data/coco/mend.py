"""Bring what other tools write into COCO's form, where it can mean one thing only; each change is counted.

The rule of ids: a whole number is a whole number, written as 1, 1.0 or "1". Where "images" and "annotations" write an
image's id differently, the images' way counts. Category ids become numbers; where one of them is no number, all are
numbered in the order of the list. What is wrong and cannot be mended is `check.py`'s business.
"""

import itertools
import operator
import re
from typing import Any

from .read import NAME_KEYS, POLYGON_KEY
from .report import DatasetReport
from .rows import IDS, NUMBERS, Columns, column, dicts, four_numbers, sound_columns
from .shapes import box_of_object, box_of_outline, box_of_text

# Kinds of the report that tell of a change to the json.
MENDED = frozenset(
    "respelled_id numbered_category repeated_category placeholder_category name_from_url text_size text_bbox "
    "polygon_bbox".split()
)
_SPELLED = frozenset((int, float, str))  # types an id may be written in
_WHOLE = re.compile(r"\s*[+-]?\d{1,18}(\.0*)?\s*", re.ASCII)


def mend_json(data: dict[str, Any], report: DatasetReport) -> Columns | None:
    """Mend the lists of a parsed json in place.

    Args:
        data: has the list 'images', and maybe 'annotations' and 'categories'.
        report: counts what was changed.

    Returns:
        The columns of the annotations when nothing is wrong with any of them, as `sound_columns` gives them.
    """
    images, annotations, categories = (_listed(data, key) for key in ("images", "annotations", "categories"))
    numbers = _mend_category_ids(dicts(categories), report)
    _mend_images(dicts(images), report)
    image_ids = {row.get("id") for row in dicts(images) if type(row.get("id")) in IDS}
    category_ids = {row.get("id") for row in dicts(categories) if type(row.get("id")) is int}
    columns = None if numbers is not None else sound_columns(annotations, image_ids, category_ids)
    if columns is None:
        annotations = dicts(annotations)
        _mend_annotations(annotations, image_ids, category_ids, numbers, report)
    _note_rotations(annotations, report)
    if categories:
        categories = _without_repeats(categories, report)
        data["categories"] = _without_placeholder(categories, annotations, report)
    return columns


def _listed(data: dict[str, Any], key: str) -> list:
    rows = data.get(key)
    return rows if isinstance(rows, list) else []


def whole(value: Any) -> int | None:
    """Return the whole number that a json value is, None when it is none."""
    if type(value) is int:
        return value
    if type(value) is float and value.is_integer() and abs(value) < 2**53:
        return int(value)
    if type(value) is str and _WHOLE.fullmatch(value):
        return int(value.strip().partition(".")[0])
    return None


def _spelling(value: Any) -> Any:
    number = whole(value)
    return number if number is not None else value


def _mend_category_ids(rows: list[dict[str, Any]], report: DatasetReport) -> dict[Any, int] | None:
    """Make the categories' ids whole numbers; return the number given to each id where they had to be numbered."""
    ids = column(rows, "id")
    if {int}.issuperset(map(type, ids)):
        return None
    texts = [value for value in ids if type(value) is str and value and whole(value) is None]
    if texts and all(whole(value) is not None or (type(value) is str and value) for value in ids):
        numbers: dict[Any, int] = {}
        for row, value in zip(rows, map(_spelling, ids), strict=True):
            row.setdefault("name", str(value))
            row["id"] = numbers.setdefault(value, len(numbers) + 1)
            report.add("numbered_category", f"{value!r} is {row['id']}")
        return numbers
    for row, value in zip(rows, ids, strict=True):
        row["id"] = _respelled(value, f"id {value!r} of a category", report)
    return None


def _respelled(value: Any, example: str, report: DatasetReport) -> Any:
    """Return an id as the whole number it is, counted when that is another type."""
    number = whole(value)
    if number is None:
        return value
    if type(value) is not int:
        report.add("respelled_id", example)
    return number


def _mend_images(rows: list[dict[str, Any]], report: DatasetReport) -> None:
    ids, names, widths, heights = (column(rows, key) for key in ("id", "file_name", "width", "height"))
    if float not in set(map(type, ids)) and all(names) and str not in {*map(type, widths), *map(type, heights)}:
        return
    for row, img_id, name, *sides in zip(rows, ids, names, widths, heights, strict=True):
        if type(img_id) is float:
            row["id"] = _respelled(img_id, f"id {img_id!r} of an image", report)
        if not name:
            name = next((row[key] for key in NAME_KEYS if isinstance(row.get(key), str) and row[key]), None)
            if name is not None:
                row["file_name"] = name
                report.add("name_from_url", name)
        if str in map(type, sides):
            _mend_size(row, report)


def _mend_size(row: dict[str, Any], report: DatasetReport) -> None:
    size = [whole(row.get(key)) for key in ("width", "height")]
    if None not in size:
        row["width"], row["height"] = size
        report.add("text_size", f"image {row.get('id')}")


def _mend_annotations(
    rows: list[dict[str, Any]],
    image_ids: set,
    category_ids: set,
    numbers: dict[Any, int] | None,
    report: DatasetReport,
) -> None:
    by_number: dict[Any, Any] = {}
    for img_id in image_ids:
        number = whole(img_id)
        by_number[number] = None if number in by_number else img_id  # written both ways: no telling which is meant
    for row in rows:
        ann_id, img_id, cat_id, box = (row.get(key) for key in ("id", "image_id", "category_id", "bbox"))
        if type(ann_id) is float:
            row["id"] = _spelling(ann_id)
        if (type(img_id) is float or (type(img_id) in IDS and img_id not in image_ids)) and whole(img_id) is not None:
            known = by_number.get(whole(img_id))
            if known is not None:
                row["image_id"] = known
                report.add("respelled_id", f"image_id {img_id!r} of annotation {ann_id} is image {known!r}")
        if numbers is not None:
            # An id that the list did not have is none of the numbers given, even if it looks like one.
            row["category_id"] = numbers.get(_spelling(cat_id), str(cat_id)) if type(cat_id) in _SPELLED else cat_id
        elif type(cat_id) in _SPELLED and type(cat_id) is not int and whole(cat_id) in category_ids:
            row["category_id"] = _respelled(cat_id, f"category_id {cat_id!r} of annotation {ann_id}", report)
        if four_numbers(box):
            continue
        read = box_of_text(box) or box_of_object(box)
        around = None if box else box_of_outline(row.get(POLYGON_KEY))
        if read is not None:
            row["bbox"] = read
            report.add("text_bbox", f"{box!r} of annotation {ann_id}"[:99])
        elif around is not None:
            row["bbox"] = around
            report.add("polygon_bbox", f"annotation {ann_id}")


def _note_rotations(rows: list[dict[str, Any]], report: DatasetReport) -> None:
    for row in rows if any(map(operator.contains, rows, itertools.repeat("attributes"))) else ():
        attributes = row.get("attributes")
        rotation = attributes.get("rotation") if isinstance(attributes, dict) else None
        if type(rotation) in NUMBERS and rotation % 180:
            report.add("rotated_bbox", f"annotation {row.get('id')}, {rotation:g} degrees")


def _without_repeats(rows: list, report: DatasetReport) -> list:
    seen: dict[int, Any] = {}
    kept = []
    for row in rows:
        cat_id = row.get("id") if isinstance(row, dict) else None
        if type(cat_id) is int and cat_id in seen and seen[cat_id] == row.get("name"):
            report.add("repeated_category", f"{cat_id} {row.get('name')!r}")
            continue
        if type(cat_id) is int:
            seen.setdefault(cat_id, row.get("name"))
        kept.append(row)
    return kept


def _without_placeholder(rows: list, annotations: list[dict[str, Any]], report: DatasetReport) -> list:
    """Leave out what Roboflow puts before the classes: a class without boxes whose supercategory is "none"."""
    marked = [row for row in dicts(rows) if row.get("supercategory") == "none"]
    if not marked or len(marked) == len(rows):
        return rows
    used = {cat_id for cat_id in column(annotations, "category_id") if type(cat_id) is int}
    unused = [row for row in marked if type(row.get("id")) is int and row["id"] not in used]
    for row in unused:
        report.add("placeholder_category", f"{row['id']} {row.get('name')!r}")
    return [row for row in rows if not any(row is one for one in unused)]
