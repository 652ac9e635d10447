"""Areas and IoU of box lists."""

from __future__ import annotations

from torch import Tensor

from effdet.ops.boxes import box_area, pairwise_common, pairwise_iou

from .box_list import BoxList


def area(boxlist: BoxList) -> Tensor:
    """Return the areas [N]."""
    return box_area(boxlist.boxes())


def intersection(boxlist1: BoxList, boxlist2: BoxList) -> Tensor:
    """Return the area that each pair of boxes has in common [N, M]."""
    return pairwise_common(boxlist1.boxes(), boxlist2.boxes())


def iou(boxlist1: BoxList, boxlist2: BoxList) -> Tensor:
    """Return the IoU of each pair of boxes [N, M]."""
    return pairwise_iou(boxlist1.boxes(), boxlist2.boxes())


class IouSimilarity:
    """IoU as the similarity that a TargetAssigner asks for."""

    def compare(self, boxlist1: BoxList, boxlist2: BoxList) -> Tensor:
        """Return the IoU of each pair of boxes [N, M]."""
        return iou(boxlist1, boxlist2)
