"""Check the numbers of boxes: which can be used, and what they look like where they are not x, y, width, height."""

import itertools
import math
from typing import Any

import numpy as np

from .report import MAX_EXAMPLES, MIN_BOX_PX, DatasetReport
from .rows import NUMBERS

_SUSPICIOUS_SHARE = 0.2  # of boxes that reach beyond their images; of real sets with 20 boxes or more, 9 % is the most
_WITNESSES = 2000  # boxes whose areas are asked, too
_AGREED = 0.9  # share of boxes from which a reading of their numbers is taken for theirs
_TOLERANCE_PX = 1.0
_RELATIVE_SLACK = 0.05  # by which boxes within 0..1 may reach beyond
_RELATIVE_SHARE = 0.8  # of boxes within 0..1 from which on they are no small objects
_FEWEST_RELATIVE = 4  # boxes; fewer may be tiny by chance

# What four numbers may be instead of x, y, width, height: where to find x_min, y_min, x_max, y_max.
_CORNERS = {
    "x1, y1, x2, y2": (0, 1, 2, 3),
    "x2, y2, x1, y1": (2, 3, 0, 1),
    "y1, x1, y2, x2": (1, 0, 3, 2),
    "y2, x2, y1, x1": (3, 2, 1, 0),
    "x1, x2, y1, y2": (0, 2, 1, 3),
}


def to_array(boxes: list[list]) -> np.ndarray:
    """Return boxes of four json numbers as float64 [n, 4]; integers beyond float64 become inf."""
    try:
        flat = np.fromiter(itertools.chain.from_iterable(boxes), dtype=np.float64, count=4 * len(boxes))
    except OverflowError:
        flat = np.array([v if abs(v) < 1e300 else math.inf for box in boxes for v in box], dtype=np.float64)
    return flat.reshape(-1, 4)


def check_boxes(
    xywh: np.ndarray,
    image: np.ndarray,
    category: np.ndarray,
    is_crowd: np.ndarray,
    infos: list[dict[str, Any]],
    rows: list[dict[str, Any]],
    report: DatasetReport,
    keep_crowd: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Sort the boxes [n, 4] into kinds, each into the first that fits.

    Args:
        xywh: float64 [n, 4].
        image: index of each box's image in `infos`, int64 [n].
        category: category id of each box, int64 [n].
        is_crowd: bool [n].
        infos: of the images; a size of 0 is unknown, and limits no box.
        rows: the annotations, for messages.
        report: gets what was found.
        keep_crowd: crowd regions are used.

    Returns:
        The boxes clipped, yxyx, and which ones to keep, bool [n].
    """
    sizes = np.array([(i["width"] or np.inf, i["height"] or np.inf) for i in infos], dtype=np.float64).reshape(-1, 2)
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
    real = finite & ~empty
    if np.count_nonzero(tiny & real) >= max(_FEWEST_RELATIVE, _RELATIVE_SHARE * np.count_nonzero(real)):
        within = np.maximum.reduce([-x0, -y0, w - 1, h - 1]) <= _RELATIVE_SLACK
        relative = within & (np.maximum(x0, y0) < 1) & real
        if np.count_nonzero(relative) >= max(_FEWEST_RELATIVE, _RELATIVE_SHARE * np.count_nonzero(real)):
            steps.insert(0, ("relative_bbox", relative))
    for kind, mask in steps + ([] if keep_crowd else [("crowd", is_crowd)]):
        _add_rows(report, kind, left & mask, rows, image, infos)
        left &= ~mask
    if keep_crowd:
        _add_rows(report, "crowd_ignored", left & is_crowd, rows, image, infos)
    _add_rows(report, "clipped_bbox", left & partly, rows, image, infos)
    if "relative_bbox" not in report.errors:
        _judge_numbers(xywh, np.stack([width, height], 1), rows, real, real & (partly | outside), report)
    repeated = left.copy()
    repeated[left] = _repeats(xywh[left], image[left], category[left])
    _add_rows(report, "repeated_bbox", repeated, rows, image, infos)
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


def _judge_numbers(
    boxes: np.ndarray,
    sizes_wh: np.ndarray,
    rows: list[dict[str, Any]],
    real: np.ndarray,
    beyond: np.ndarray,
    report: DatasetReport,
) -> None:
    """Say what the four numbers are likely to be where they fit neither the images nor the areas given."""
    count, total = np.count_nonzero(beyond), np.count_nonzero(real)
    suspicious = total > 0 and count >= _SUSPICIOUS_SHARE * total
    chosen = np.flatnonzero(real)[:: 1 if suspicious else max(1, total // _WITNESSES)]
    area = np.array([_area(rows[k].get("area")) for k in chosen])
    disagree = len(area) > 0 and _agreement(boxes[chosen, 2:].prod(1), area) < 1 - _AGREED
    if not suspicious and (not disagree or np.isnan(area).all()):
        return
    found = _readings(boxes[chosen], sizes_wh[chosen], area)
    _, fits, agree = best = max(found, key=lambda reading: reading[1:])
    names = " or ".join(reading[0] for reading in found if reading[1:] == best[1:])
    witnessed = disagree and agree >= _AGREED and fits >= _AGREED
    if not suspicious and not witnessed:
        return
    kind = "clipped_bbox" if "clipped_bbox" in report.noted else "outside_bbox" if count else "odd_area"
    if kind == "odd_area":
        report.add(kind, "", total)
    report.suspicious.add(kind)
    remark = f"{count} of {total} boxes reach beyond their images as x, y, width, height, which COCO's bbox is"
    if fits >= _AGREED:
        remark += f"; read as {names}, {round(100 * fits)} % would lie inside"
        if witnessed:
            remark += f', and {round(100 * agree)} % would have the "area" given'
        remark += ": if that is what they are, convert them"
    report.remarks[kind] = remark


def _area(value: Any) -> float:
    return value if type(value) in NUMBERS and abs(value) < 1e300 else math.nan


def _readings(boxes: np.ndarray, sizes_wh: np.ndarray, area: np.ndarray) -> list[tuple[str, float, float]]:
    """Return other readings of four numbers: name, share of boxes inside their images, share with the area given."""
    readings = {name: boxes[:, places] for name, places in _CORNERS.items()}
    centre, half = boxes[:, :2], boxes[:, 2:] / 2
    readings["centre x, centre y, width, height"] = np.concatenate([centre - half, centre + half], axis=1)
    readings["y, x, height, width"] = np.concatenate([centre, centre + boxes[:, 2:]], axis=1)[:, [1, 0, 3, 2]]
    found = []
    for name, xyxy in readings.items():
        sides = xyxy[:, 2:] - xyxy[:, :2]
        inside = (sides > 0).all(1) & (xyxy[:, :2] >= -_TOLERANCE_PX).all(1)
        inside &= (xyxy[:, 2:] <= sizes_wh + _TOLERANCE_PX).all(1)
        found.append((name, float(inside.mean()), _agreement(sides.prod(1), area)))
    return found


def _agreement(ours: np.ndarray, area: np.ndarray) -> float:
    """Return the share of boxes whose area is the one given, within a percent."""
    return float((np.abs(ours - area) <= 0.01 * np.abs(area)).mean())  # NaN, where none is given, agrees with nothing


def _repeats(xywh: np.ndarray, image: np.ndarray, category: np.ndarray) -> np.ndarray:
    """Tell which boxes an earlier one equals, with its image and category: bool [n]."""
    repeated = np.zeros(len(xywh), dtype=bool)
    columns = [image.astype(np.uint64), category.astype(np.uint64), *np.ascontiguousarray(xywh.T).view(np.uint64)]
    mixed = np.zeros(len(xywh), dtype=np.uint64)
    for values in columns:
        mixed = (mixed ^ (values + (mixed >> np.uint64(29)))) * np.uint64(0x9E3779B97F4A7C15)
    ordered = np.sort(mixed)
    if not (ordered[1:] == ordered[:-1]).any():  # nearly always; a sort of numbers is much faster than one of rows
        return repeated
    _, first, inverse = np.unique(mixed, return_index=True, return_inverse=True)
    at = np.flatnonzero(first[inverse] != np.arange(len(mixed)))
    earlier = first[inverse[at]]
    same = np.logical_and.reduce([values[at] == values[earlier] for values in columns])
    repeated[at[same]] = True
    return repeated
