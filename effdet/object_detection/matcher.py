"""What a matcher found."""

from __future__ import annotations

import torch
from torch import Tensor


class Match:
    """A row (ground-truth box) for each column (anchor).

    Attributes:
        match_results: int [N]: the row of each column, -1 for none, -2 for a column to ignore.
    """

    def __init__(self, match_results: Tensor) -> None:
        """Hold the results; a ValueError for a tensor of another shape or type."""
        if match_results.dim() != 1 or match_results.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"match_results are {match_results.dtype} {list(match_results.shape)}: must be int [N]")
        self.match_results = match_results

    def matched_column_indicator(self) -> Tensor:
        """Return which columns have a row: bool [N]."""
        return self.match_results >= 0

    def matched_column_indices(self) -> Tensor:
        """Return the columns that have a row, ascending: int64 [n]."""
        return self.matched_column_indicator().nonzero().flatten()

    def num_matched_columns(self) -> int:
        """Return how many columns have a row."""
        return len(self.matched_column_indices())

    def matched_row_indices(self) -> Tensor:
        """Return the rows of `matched_column_indices`: int64 [n]."""
        return self.match_results[self.matched_column_indicator()].long()

    def gather_based_on_match(
        self, input_tensor: Tensor, unmatched_value: Tensor | float, ignored_value: Tensor | float
    ) -> Tensor:
        """Return the row of `input_tensor` [M, ...] for each column, or the value for those without one: [N, ...]."""
        fill = [
            torch.as_tensor(value, dtype=input_tensor.dtype, device=input_tensor.device).expand(
                1, *input_tensor.shape[1:]
            )
            for value in (ignored_value, unmatched_value)
        ]
        return torch.cat([*fill, input_tensor])[self.match_results + 2]
