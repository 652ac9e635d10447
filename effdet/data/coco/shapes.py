"""Boxes from what other tools write in place of COCO's four numbers: texts, objects, polygons, masks."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from .rows import NUMBERS, four_numbers

_KEYS = (("x", "y", "width", "height"), ("x", "y", "w", "h"), ("left", "top", "width", "height"))
_CORNER_KEYS = (("xmin", "ymin", "xmax", "ymax"), ("x1", "y1", "x2", "y2"), ("x_min", "y_min", "x_max", "y_max"))
_MOST_PIXELS = 2**31  # of a mask


def box_of_text(value: Any) -> list[float] | None:
    """Return x, y, width, height that are written as text, one by one or together; None when they are not."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, str):
        value = re.split(r"[\s,;]+", value.strip(" \t\n[]()"))
    if not isinstance(value, (list, tuple)) or len(value) != 4:
        return None
    if not all(type(part) is str or type(part) in NUMBERS for part in value):
        return None
    try:
        return [float(part) for part in value]
    except (ValueError, OverflowError):
        return None


def box_of_object(value: Any) -> list[float] | None:
    """Return the box of an object whose keys say what its four numbers are, or of a list around four numbers."""
    if isinstance(value, list) and len(value) == 1 and four_numbers(value[0]):
        return value[0]
    if not isinstance(value, dict):
        return None
    for keys in (*_KEYS, *_CORNER_KEYS):
        box = box_of_text([value.get(key) for key in keys])
        if box is not None:
            return box if keys in _KEYS else [box[0], box[1], box[2] - box[0], box[3] - box[1]]
    return None


def box_of_outline(value: Any) -> list[float] | None:
    """Return the box around a `segmentation`: polygons, or a mask in COCO's run lengths; None if it has none."""
    return box_of_mask(value) if isinstance(value, dict) else box_of_polygons(value)


def box_of_polygons(value: Any) -> list[float] | None:
    """Return the box around one or several polygons: lists of x, y, x, y, ..., or of points."""
    if not isinstance(value, list) or not value:
        return None
    parts = value if all(isinstance(part, list) for part in value) else [value]
    flat = [number for part in parts for number in part]
    if all(isinstance(point, dict) for point in flat):
        flat = [[point.get("x"), point.get("y")] for point in flat]
    points = [number for pair in flat for number in pair] if all(isinstance(pair, list) for pair in flat) else flat
    if len(points) < 6 or len(points) % 2 or not NUMBERS.issuperset(map(type, points)):
        return None
    try:
        points = list(map(float, points))
    except OverflowError:
        return None
    x, y = points[::2], points[1::2]
    return [min(x), min(y), max(x) - min(x), max(y) - min(y)]


def box_of_mask(value: dict[str, Any]) -> list[float] | None:
    """Return the box around a mask in COCO's run lengths, plain or compressed; None when it is empty or none.

    Source: the format is COCO's (cocodataset.org, maskApi): `size` is height, width; `counts` are lengths of runs of
    pixels down the columns, background and object in turn, the first background.
    """
    size, counts = value.get("size"), value.get("counts")
    if not isinstance(size, list) or len(size) != 2 or not {int}.issuperset(map(type, size)):
        return None
    height, width = size
    if not 0 < height * width < _MOST_PIXELS or height < 0:
        return None
    runs = _uncompress(counts) if isinstance(counts, str) else counts
    if not isinstance(runs, list) or not {int}.issuperset(map(type, runs)):
        return None
    if any(run < 0 for run in runs) or sum(runs) != height * width:
        return None
    ends = np.cumsum(runs, dtype=np.int64)
    first, last = ends[:-1:2], ends[1::2] - 1  # of each run of the object
    first, last = first[first <= last], last[first <= last]
    if not len(first):
        return None
    left, right = int(first[0] // height), int(last[-1] // height)
    whole = first // height != last // height  # goes on in the next column
    top = 0 if whole.any() else int((first % height).min())
    bottom = height - 1 if whole.any() else int((last % height).max())
    return [left, top, right - left + 1, bottom - top + 1]


def _uncompress(text: str) -> Sequence[int] | None:
    """Read run lengths of 5 bits a letter, from the fourth on as the difference from the last but one."""
    runs: list[int] = []
    number = shift = 0
    for letter in text:
        code = ord(letter) - 48
        if not 0 <= code < 64 or shift > 60:
            return None
        number |= (code & 31) << shift
        shift += 5
        if code & 32:
            continue
        if code & 16:
            number -= 1 << shift
        runs.append(number + (runs[-2] if len(runs) > 2 else 0))
        number = shift = 0
    return None if shift else runs
