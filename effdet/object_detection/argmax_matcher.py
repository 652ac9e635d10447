"""Match each anchor with the ground-truth box it is most similar to."""

from __future__ import annotations

import torch
from torch import Tensor

from .matcher import Match

__all__ = ["ArgMaxMatcher", "Match"]


class ArgMaxMatcher:
    """Match each column of a similarity matrix with its best row, by two thresholds.

    Source:
        google/automl, efficientdet/object_detection/argmax_matcher.py.
    """

    def __init__(
        self,
        matched_threshold: float,
        unmatched_threshold: float | None = None,
        negatives_lower_than_unmatched: bool = True,
        force_match_for_each_row: bool = False,
    ) -> None:
        """Make a matcher.

        Args:
            matched_threshold: similarity from which a column is matched.
            unmatched_threshold: similarity below which it is not; default is the other threshold.
            negatives_lower_than_unmatched: columns between the two are ignored; otherwise those below both are.
            force_match_for_each_row: each row also gets its best column, whatever the similarity.

        Raises:
            ValueError: thresholds in the wrong order, or without a span between them where one is needed.
        """
        low = matched_threshold if unmatched_threshold is None else unmatched_threshold
        if low > matched_threshold or (low == matched_threshold and not negatives_lower_than_unmatched):
            raise ValueError(
                f"unmatched_threshold {low} must be at most matched_threshold {matched_threshold}, and "
                "below it where negatives lie between the two"
            )
        self._thresholds = matched_threshold, low
        self._negatives_lower_than_unmatched = negatives_lower_than_unmatched
        self._force_match_for_each_row = force_match_for_each_row

    def match(self, similarity_matrix: Tensor) -> Match:
        """Return the match of a matrix [M rows, N columns]; without rows nothing is matched."""
        num_rows, num_columns = similarity_matrix.shape
        if num_rows == 0:
            return Match(torch.full((num_columns,), -1, device=similarity_matrix.device))
        matched, unmatched = self._thresholds
        below, between = (-1, -2) if self._negatives_lower_than_unmatched else (-2, -1)
        best, rows = similarity_matrix.max(0)
        rows = rows.masked_fill(best < matched, between).masked_fill(best < unmatched, below)
        if self._force_match_for_each_row:
            columns = torch.arange(num_columns, device=similarity_matrix.device)
            forced, forced_rows = (similarity_matrix.argmax(1, keepdim=True) == columns).int().max(0)
            rows = torch.where(forced > 0, forced_rows, rows)
        return Match(rows)
