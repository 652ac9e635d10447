"""Pascal VOC's metric: average precision at IoU 0.5 for each class, and its mean.

What lives here: COCO-style ground truth and result rows in, numbers out, on plain arrays in one process.

Source: the rules of the VOC development kit from 2010 on (area under the precision envelope, difficult objects
ignored); group boxes as in Open Images' detection challenge: what lies inside one of its class is ignored.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools.coco import COCO

from effdet.ops.boxes import iou_from_areas, pairwise_common

from .coco import ClassMetrics, plain_number

MATCH_IOU = 0.5  # VOC's: from which a detection has found an object; also the share of it inside a group box


@dataclass(frozen=True)
class VocScores:
    """The numbers of one evaluation, at the IoU asked for; `per_class` has the AP in both of its columns.

    Args:
        stats: {'AP50': the mean over the classes that have objects}; NaN without any.
        per_class: one line per category, by ascending id.
        image_count: images that counted.
    """

    stats: dict[str, float]
    per_class: list[ClassMetrics]
    image_count: int

    def table(self) -> str:
        """Return the mean as a line of text."""
        return f"mAP at IoU 0.50 (Pascal VOC)  {self.stats['AP50']:6.3f}"

    def class_rows(self) -> list[dict[str, Any]]:
        """Return the per-class table as json values; undefined numbers are None."""
        return [{**row._asdict(), "AP": plain_number(row.AP), "AP50": plain_number(row.AP50)} for row in self.per_class]

    def to_json(self) -> dict[str, Any]:
        """Return everything as json values; undefined numbers are None."""
        return {
            "stats": {name: plain_number(value) for name, value in self.stats.items()},
            "per_class": self.class_rows(),
            "image_count": self.image_count,
        }


def score_voc(
    truth: COCO, rows: Sequence[Mapping[str, Any]], img_ids: Collection[Any], match_iou: float = MATCH_IOU
) -> VocScores:
    """Compute VOC's numbers for result rows.

    Args:
        truth: from `index_ground_truth`; `difficult` objects are ignored, `iscrowd` ones are group boxes.
        rows: COCO results: image_id, category_id, bbox (xywh), score; may be empty.
        img_ids: the images that count; rows and ground truth of others do not.
        match_iou: above 0, at most 1; VOC's own is the default.
    """
    found: dict[Any, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["image_id"] in img_ids:
            found[row["category_id"]].append(row)
    objects: dict[Any, dict[Any, list[Mapping[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for annotation in truth.dataset["annotations"]:
        if annotation["image_id"] in img_ids:
            objects[annotation["category_id"]][annotation["image_id"]].append(annotation)
    lines = []
    for category_id in sorted(truth.getCatIds()):
        counted = [a for image in objects[category_id].values() for a in image if not a["difficult"] | a["iscrowd"]]
        ap = _average_precision(_match(found[category_id], objects[category_id], match_iou), len(counted))
        name = str(truth.cats[category_id].get("name", category_id))
        lines.append(ClassMetrics(category_id, name, ap, ap, len(counted)))
    defined = [line.AP50 for line in lines if line.count]
    return VocScores({"AP50": float(np.mean(defined)) if defined else math.nan}, lines, len(img_ids))


def _match(
    rows: Sequence[Mapping[str, Any]], objects: Mapping[Any, Sequence[Mapping[str, Any]]], match_iou: float
) -> np.ndarray:
    """Return whether each detection of a class is right, by falling score; ignored ones are left out.

    Each detection is compared with the object it overlaps most: the first to find an object is right, later ones are
    wrong.
    """
    rows = sorted(rows, key=lambda row: -row["score"])
    in_image: dict[Any, list[int]] = defaultdict(list)
    for at, row in enumerate(rows):
        in_image[row["image_id"]].append(at)
    hits, counts = np.zeros(len(rows), dtype=bool), np.ones(len(rows), dtype=bool)
    for image_id in in_image.keys() & objects.keys():
        present, places, taken = objects[image_id], in_image[image_id], set()
        is_group = np.array([a["iscrowd"] for a in present], dtype=bool)
        overlaps, shares = _overlaps([rows[at]["bbox"] for at in places], [a["bbox"] for a in present])
        overlaps[:, is_group], shares[:, ~is_group] = 0.0, 0.0
        for at, overlap, share in zip(places, overlaps, shares, strict=True):
            best = int(overlap.argmax())
            if overlap[best] >= match_iou:
                counts[at] = not present[best]["difficult"]
                hits[at] = best not in taken
                taken.add(best)
            else:
                counts[at] = share.max() < match_iou
    return hits[counts]


def _overlaps(
    found_xywh: Sequence[Sequence[float]], present_xywh: Sequence[Sequence[float]]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the IoU of each detection with each object, and the share of the detection inside it: [n, m] both."""
    found, present = (np.array(boxes, dtype=np.float64) for boxes in (found_xywh, present_xywh))
    areas, present_areas = found[:, None, 2] * found[:, None, 3], present[:, 2] * present[:, 3]
    for boxes in (found, present):
        boxes[:, 2:] += boxes[:, :2]
    common = pairwise_common(found, present)
    with np.errstate(invalid="ignore", divide="ignore"):  # boxes without an area
        overlaps, shares = iou_from_areas(common, areas, present_areas), common / areas
    return np.where(common > 0, overlaps, 0.0), np.where(common > 0, shares, 0.0)


def _average_precision(hits: np.ndarray, num_objects: int) -> float:
    if num_objects == 0:
        return math.nan
    right = np.cumsum(hits)
    return average_precision(right / np.arange(1, len(hits) + 1), right / num_objects)


def average_precision(precision: np.ndarray, recall: np.ndarray) -> float:
    """Return the area under the precision envelope over recall; both [n] by falling score, 0.0 where n is 0."""
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float((np.diff(recall, prepend=0.0) * envelope).sum())
