"""IoU of box lists."""

from __future__ import annotations

from torch import Tensor

from effdet.ops.boxes import pairwise_iou

from .box_list import BoxList


class IouSimilarity:
    """IoU as the similarity that a TargetAssigner asks for."""

    def compare(self, boxlist1: BoxList, boxlist2: BoxList) -> Tensor:
        """Return the IoU of each pair of boxes [N, M]."""
        return pairwise_iou(boxlist1.boxes(), boxlist2.boxes())
