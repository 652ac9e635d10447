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

from .coco import ClassMetrics, plain_number

MATCH_IOU = 0.5


@dataclass(frozen=True)
class VocScores:
    """The numbers of one evaluation; `per_class` has AP at IoU 0.5 in both of its columns.

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
        return {"stats": {name: plain_number(value) for name, value in self.stats.items()},
                "per_class": self.class_rows(), "image_count": self.image_count}


def score_voc(truth: COCO, rows: Sequence[Mapping[str, Any]], img_ids: Collection[Any]) -> VocScores:
    """Compute VOC's numbers for result rows.

    Args:
        truth: from `index_ground_truth`; `difficult` objects are ignored, `iscrowd` ones are group boxes.
        rows: COCO results: image_id, category_id, bbox (xywh), score; may be empty.
        img_ids: the images that count; rows and ground truth of others do not.
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
        ap = _average_precision(_match(found[category_id], objects[category_id]), len(counted))
        name = str(truth.cats[category_id].get("name", category_id))
        lines.append(ClassMetrics(category_id, name, ap, ap, len(counted)))
    defined = [line.AP50 for line in lines if line.count]
    return VocScores({"AP50": float(np.mean(defined)) if defined else math.nan}, lines, len(img_ids))


def _match(rows: Sequence[Mapping[str, Any]], objects: Mapping[Any, Sequence[Mapping[str, Any]]]) -> np.ndarray:
    """Return whether each detection of a class is right, by falling score; ignored ones are left out.

    Each detection is compared with the object it overlaps most: the first to find an object is right, later ones are
    wrong.
    """
    hits, taken = [], set()
    for row in sorted(rows, key=lambda row: -row["score"]):
        present = objects.get(row["image_id"], ())
        single = [a for a in present if not a["iscrowd"]]
        overlaps = [_iou(row["bbox"], a["bbox"]) for a in single]
        best = int(np.argmax(overlaps)) if overlaps else -1
        if best >= 0 and overlaps[best] >= MATCH_IOU:
            if single[best]["difficult"]:
                continue
            hits.append(single[best]["id"] not in taken)
            taken.add(single[best]["id"])
        elif not any(_share_inside(row["bbox"], a["bbox"]) >= MATCH_IOU for a in present if a["iscrowd"]):
            hits.append(False)
    return np.array(hits, dtype=bool)


def _common(a: Sequence[float], b: Sequence[float]) -> float:
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    return max(width, 0.0) * max(height, 0.0)


def _iou(a: Sequence[float], b: Sequence[float]) -> float:
    common = _common(a, b)
    union = a[2] * a[3] + b[2] * b[3] - common
    return common / union if union > 0 else 0.0


def _share_inside(box: Sequence[float], region: Sequence[float]) -> float:
    area = box[2] * box[3]
    return _common(box, region) / area if area > 0 else 0.0


def _average_precision(hits: np.ndarray, num_objects: int) -> float:
    if num_objects == 0:
        return math.nan
    right = np.cumsum(hits)
    return average_precision(right / np.arange(1, len(hits) + 1), right / num_objects)


def average_precision(precision: np.ndarray, recall: np.ndarray) -> float:
    """Return the area under the precision envelope over recall; both [n] by falling score, 0.0 where n is 0."""
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float((np.diff(recall, prepend=0.0) * envelope).sum())
