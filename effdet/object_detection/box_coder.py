"""Boxes to deltas relative to anchors, and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from effdet.ops.boxes import ENCODE_EPSILON as EPS
from effdet.ops.boxes import decode_boxes, encode_boxes

from .box_list import BoxList

__all__ = ["EPS", "BoxList", "FasterRcnnBoxCoder"]


class FasterRcnnBoxCoder:
    """Deltas ty, tx, th, tw as `ops.boxes.encode_boxes` computes them, scaled on request."""

    def __init__(self, scale_factors: Sequence[float] | None = None) -> None:
        """Make a coder; `scale_factors`: four positive numbers that ty, tx, th, tw are multiplied by."""
        if scale_factors is not None and (len(scale_factors) != 4 or min(scale_factors) <= 0):
            raise ValueError(f"scale_factors are {scale_factors}: must be four positive numbers")
        self._scale_factors = list(scale_factors or [1.0] * 4)

    def code_size(self) -> int:
        """Return the number of deltas of a box, 4."""
        return 4

    def encode(self, boxes: BoxList, anchors: BoxList) -> Tensor:
        """Return the deltas [N, 4] of N boxes relative to N anchors."""
        deltas = torch.stack(encode_boxes(boxes.boxes().unbind(1), anchors.boxes().unbind(1)), 1)
        return deltas * deltas.new_tensor(self._scale_factors)

    def decode(self, rel_codes: Tensor, anchors: BoxList) -> BoxList:
        """Return the boxes of deltas [N, 4]; th and tw are limited as in `ops.boxes.decode_boxes`."""
        return BoxList(decode_boxes(rel_codes / rel_codes.new_tensor(self._scale_factors), anchors.boxes()))
