"""Pascal VOC's metric, image by image from dicts of arrays."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from effdet.metrics.coco import index_ground_truth
from effdet.metrics.voc import MATCH_IOU, score_voc


class PascalDetectionEvaluator:
    """Collect objects and detections of images, and compute VOC's AP of each class and its mean."""

    def __init__(self, categories: Sequence[Mapping[str, Any]], matching_iou_threshold: float = MATCH_IOU) -> None:
        """Make an evaluator.

        Args:
            categories: {'id', 'name'} of each class.
            matching_iou_threshold: from which a detection has found an object, above 0, at most 1; VOC's is 0.5.

        Raises:
            ValueError: the threshold is out of range.
        """
        if not 0 < matching_iou_threshold <= 1:
            raise ValueError(f"matching_iou_threshold is {matching_iou_threshold}: must be above 0 and at most 1")
        self._match_iou = float(matching_iou_threshold)
        self._categories = [dict(category) for category in categories]
        self.clear()

    def clear(self) -> None:
        """Forget all images."""
        self._objects: dict[Any, list[dict[str, Any]]] = {}
        self._found: dict[Any, list[dict[str, Any]]] = {}

    def add_single_ground_truth_image_info(self, image_id: Any, gt_dict: Mapping[str, np.ndarray]) -> None:
        """Add the objects of an image; only the first time counts.

        Args:
            image_id: tells the image from others.
            gt_dict: 'bbox' [n, 4] yxyx in pixels, 'cls' [n] category ids and, where known, 'difficult' [n].
        """
        difficult = gt_dict.get("difficult")
        rows = _rows(image_id, gt_dict, "difficult", np.zeros(len(gt_dict["cls"])) if difficult is None else difficult)
        self._objects.setdefault(image_id, rows)

    def add_single_detected_image_info(self, image_id: Any, detections_dict: Mapping[str, np.ndarray]) -> None:
        """Add the detections in an image; only the first time counts, and boxes without an area do not.

        Args:
            image_id: tells the image from others.
            detections_dict: 'bbox' [n, 4] yxyx in pixels, 'cls' [n] category ids, 'score' [n].
        """
        rows = _rows(image_id, detections_dict, "score", detections_dict["score"])
        self._found.setdefault(image_id, [row for row in rows if min(row["bbox"][2:]) > 0])

    def evaluate(self) -> dict[str, float]:
        """Compute the metric.

        Returns:
            'PascalBoxes_Precision/mAP@0.5IOU', with the threshold in place of 0.5: the mean over the classes that have
            objects; then the AP of each class as 'PascalBoxes_PerformanceByCategory/AP@0.5IOU/NAME'. NaN without
            objects.
        """
        objects, found = ([row for rows in image.values() for row in rows] for image in (self._objects, self._found))
        truth = index_ground_truth({"annotations": objects, "categories": self._categories})
        scores = score_voc(truth, found, self._objects.keys() | self._found.keys(), self._match_iou)
        metrics = {f"PascalBoxes_Precision/mAP@{self._match_iou}IOU": scores.stats["AP50"]}
        for line in scores.per_class:
            name = unicodedata.normalize("NFKD", line.name)
            metrics[f"PascalBoxes_PerformanceByCategory/AP@{self._match_iou}IOU/{name}"] = line.AP50
        return metrics


def _rows(image_id: Any, arrays: Mapping[str, np.ndarray], key: str, values: np.ndarray) -> list[dict[str, Any]]:
    """Return COCO's form of an image's boxes, with a further value of each."""
    y_min, x_min, y_max, x_max = np.asarray(arrays["bbox"], dtype=np.float64).reshape(-1, 4).T
    boxes_xywh = np.stack([x_min, y_min, x_max - x_min, y_max - y_min], 1).tolist()
    return [
        {"image_id": image_id, "category_id": int(category), "bbox": box, key: float(value)}
        for category, box, value in zip(arrays["cls"], boxes_xywh, values, strict=True)
    ]
