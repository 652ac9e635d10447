"""Precision, recall and average precision of one class."""

from __future__ import annotations

import math

import numpy as np

from effdet.metrics.voc import average_precision


def compute_precision_recall(
    scores: np.ndarray, labels: np.ndarray, num_gt: float
) -> tuple[np.ndarray, np.ndarray] | tuple[None, None]:
    """Compute precision and recall after each detection, by falling score.

    Args:
        scores: [n].
        labels: [n], bool or weights: above 0 where the detection is right.
        num_gt: number of objects.

    Returns:
        precision and recall [n], or None twice without objects.

    Raises:
        ValueError: as many scores as labels are needed, and at least as many objects as right detections.
    """
    if len(scores) != len(labels) or labels.sum() > num_gt:
        raise ValueError(
            f"{len(scores)} scores for {len(labels)} labels, {labels.sum()} of them right, of {num_gt} "
            "objects: there must be as many scores as labels, and no fewer objects than right ones"
        )
    if num_gt == 0:
        return None, None
    right = labels[np.argsort(scores)[::-1]]
    found = np.cumsum(right.astype(float))
    return found / (found + np.cumsum(right <= 0)), found / num_gt


def compute_average_precision(precision: np.ndarray | None, recall: np.ndarray | None) -> float:
    """Compute the area under the precision envelope over recall.

    Args:
        precision: [n] in 0..1, by falling score; None without objects.
        recall: [n] in 0..1, not falling; None with it.

    Returns:
        A float in 0..1: 0 without detections, NaN without objects.

    Raises:
        ValueError: one of the two is None, lengths differ, numbers are out of range, or recall falls.
    """
    if precision is None and recall is None:
        return math.nan
    if precision is None or recall is None or len(precision) != len(recall):
        raise ValueError("precision and recall must be of one length, or both None")
    if len(recall) and not (
        0 <= min(precision.min(), recall.min())
        and max(precision.max(), recall.max()) <= 1
        and (np.diff(recall) >= 0).all()
    ):
        raise ValueError("precision and recall must be in 0..1, and recall must not fall")
    return average_precision(precision, recall)
