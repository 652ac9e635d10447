"""Precision, recall and F1 over the score at IoU 0.5, and the score threshold with the best F1.

Lives here: numpy on plain arrays in one process. Matching is that of errors.py: by falling score, each prediction takes
the free object of its class that it overlaps most, so a lower threshold changes nothing above it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from .errors import RIGHT, LabelTable, match_one, spread

GRID = np.linspace(0.0, 1.0, 101)
FEWEST_OBJECTS = 10  # a class with fewer has no threshold of its own: it would be that of single objects


class BestPoint(NamedTuple):
    """Where F1 is best, between the last score that is taken and the first that is not; NaN where nothing was found."""

    threshold: float
    precision: float
    recall: float
    F1: float


class ScoreCurves(NamedTuple):
    """What `trace_scores` found, for each class by ascending category id, and for all detections together.

    Args:
        curves: float32 [K + 1, 3, 101]: precision, recall and F1 of detections with at least each score of GRID; the
            last row is that of all classes; NaN where undefined.
        best: K + 1.
        objects: of each class, K.
        class_of_label: as `trace_scores` got it.
    """

    curves: np.ndarray
    best: list[BestPoint]
    objects: list[int]
    class_of_label: list[int]

    def to_plain(self) -> dict[str, Any] | None:
        """Return what a checkpoint keeps: the threshold of `all`, and those of `classes` in the network's order.

        A class is None where `all` holds for it, for want of objects; None altogether where nothing was found.
        """
        if np.isnan(self.best[-1].threshold):
            return None
        own = [
            best.threshold if count >= FEWEST_OBJECTS and best.F1 > 0 else None
            for best, count in zip(self.best, self.objects, strict=False)
        ]
        return {
            "all": self.best[-1].threshold,
            "classes": [own[k] if k >= 0 else None for k in self.class_of_label],
        }


def trace_scores(
    truth: Any,
    predictions: Mapping[Any, np.ndarray],
    class_of_label: Sequence[int],
    img_ids: Collection[Any],
) -> ScoreCurves:
    """Count right and wrong detections over the score.

    Args:
        truth: see `errors.analyse`, also for the next ones.
        predictions: by image id.
        class_of_label: position in the sorted category ids of each label.
        img_ids: the images that count, whether anything was predicted for them or not.
    """
    table = LabelTable.of(truth, class_of_label)
    scores: list[np.ndarray] = [np.zeros(0, dtype=np.float32)]
    classes: list[np.ndarray] = [np.zeros(0, dtype=np.int64)]
    hits: list[np.ndarray] = [np.zeros(0, dtype=bool)]
    objects = np.zeros(table.count, dtype=np.int64)
    nothing = np.zeros((0, 6), dtype=np.float32)
    for image_id in spread(sorted(img_ids)):
        image = match_one(truth, image_id, predictions.get(image_id, nothing), table, same_class_only=True)
        objects += np.bincount(image.object_classes, minlength=table.count)
        counted = image.matches.prediction_state >= 0
        scores.append(image.scores[counted])
        classes.append(image.predicted_classes[counted])
        hits.append(image.matches.prediction_state[counted] == RIGHT)
    score, of_class, hit = np.concatenate(scores), np.concatenate(classes), np.concatenate(hits)
    order = np.argsort(-score, kind="stable")
    score, of_class, hit = score[order].astype(np.float64), of_class[order], hit[order]
    curves, best = [], []
    for k in range(table.count + 1):
        part = of_class == k if k < table.count else slice(None)
        total = int(objects[k] if k < table.count else objects.sum())
        curves.append(_curves(score[part], hit[part], total))
        best.append(_best(score[part], hit[part], total))
    return ScoreCurves(np.array(curves, dtype=np.float32), best, objects.tolist(), list(class_of_label))


def _curves(scores: np.ndarray, hits: np.ndarray, objects: int) -> np.ndarray:
    """Return precision, recall and F1 [3, 101]; scores [n] fall."""
    taken = np.searchsorted(-scores, -GRID, side="right")
    right = np.append(0, np.cumsum(hits))[taken]
    with np.errstate(invalid="ignore", divide="ignore"):
        precision, recall = right / taken, right / objects if objects else np.full(len(GRID), np.nan)
        f1 = 2 * right / (taken + objects) if objects else np.full(len(GRID), np.nan)
    return np.stack([precision, recall, f1])


def _best(scores: np.ndarray, hits: np.ndarray, objects: int) -> BestPoint:
    if not objects or not hits.any():
        return BestPoint(np.nan, np.nan, np.nan, np.nan)
    lower = np.append(scores[1:], 0.0)
    right, taken = np.cumsum(hits), np.arange(1, len(hits) + 1)
    f1 = np.where(scores > lower, 2 * right / (taken + objects), 0.0)  # equal scores are taken together
    at = int(f1.argmax())
    threshold = round(float(scores[at] + lower[at]) / 2, 6)
    return BestPoint(threshold, float(right[at] / taken[at]), float(right[at] / objects), float(f1[at]))
