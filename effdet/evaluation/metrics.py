"""Average precision of one class."""

from __future__ import annotations

import math

import numpy as np

from effdet.metrics.voc import average_precision


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
