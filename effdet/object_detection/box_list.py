"""Boxes of one image with further tensors that belong to them."""

from __future__ import annotations

import torch
from torch import Tensor


class BoxList:
    """Boxes [N, 4] yxyx under the field 'boxes', and other fields of N rows."""

    def __init__(self, boxes: Tensor) -> None:
        """Hold boxes, float32 [N, 4] yxyx; a ValueError for others."""
        if boxes.dtype != torch.float32:
            raise ValueError(f"boxes are {boxes.dtype}: must be float32")
        self.data: dict[str, Tensor] = {}
        self.set_boxes(boxes)

    def boxes(self) -> Tensor:
        """Return the boxes [N, 4]."""
        return self.data["boxes"]

    def set_boxes(self, boxes: Tensor) -> None:
        """Replace the boxes; a ValueError for a shape other than [N, 4]."""
        if boxes.dim() != 2 or boxes.shape[-1] != 4:
            raise ValueError(f"boxes have the shape {list(boxes.shape)}: must be [N, 4]")
        self.data["boxes"] = boxes

    def num_boxes(self) -> int:
        """Return N."""
        return len(self.boxes())

    def has_field(self, field: str) -> bool:
        """Tell whether there is such a field."""
        return field in self.data

    def add_field(self, field: str, field_data: Tensor) -> None:
        """Add a field, or replace it."""
        self.data[field] = field_data

    def get_field(self, field: str) -> Tensor:
        """Return a field; a ValueError where it is absent."""
        if field not in self.data:
            raise ValueError(f"there is no field {field!r}, only {', '.join(self.data)}")
        return self.data[field]
