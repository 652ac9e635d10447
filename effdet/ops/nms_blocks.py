"""Hard NMS of nms.py on an accelerator, where each operator has to be launched: exact, without a turn for each box.

The candidates go by falling score in blocks. Within a block the kept boxes are the only set that holds exactly those
boxes which none of its members suppresses; repeating that rule for all boxes at once reaches it in as many rounds as
the longest chain of overlaps has links, usually fewer than ten. The host reads one pair of numbers for each few rounds:
whether the set still changes, and whether every image has its detections, so that the other blocks need no look.

Source: Zheng et al. 2020, "Enhancing Geometric Factors in Model Learning and Inference" (Cluster-NMS).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .boxes import box_area, common_area, iou_from_areas

_BLOCK = 1000  # candidates compared at a time: [B, 1000, 1000] overlaps
_ROUNDS = 6  # between two looks of the host


def batched_nms(
    boxes_xyxy: Tensor, scores: Tensor, classes: Tensor, max_det: int, iou_threshold: float
) -> tuple[Tensor, Tensor]:
    """Drop boxes that overlap a better one of their class; arguments and result of nms.batched_nms."""
    batch, count = scores.shape
    max_det = min(max_det, count)
    order = scores.sort(dim=1, descending=True, stable=True).indices
    scores = scores.gather(1, order)  # the first Ascend 910 has sort's own values in float16
    planes = torch.stack((*boxes_xyxy.unbind(-1), box_area(boxes_xyxy), classes.to(boxes_xyxy.dtype)), 1)  # [B, 6, k]
    planes = planes.gather(2, order.unsqueeze(1).expand(-1, 6, -1))
    decided: list[Tensor] = []  # of each block, 1 for the boxes that stay; half precision holds these numbers exactly
    for start in range(0, count, _BLOCK):
        block = planes[:, :, start : start + _BLOCK]
        alive = torch.ones((batch, block.shape[2]), dtype=torch.float16, device=scores.device)
        if decided:
            place, is_kept = _first_kept(torch.cat(decided, 1), max_det)
            earlier = planes.gather(2, place.unsqueeze(1).expand(-1, 6, -1))
            alive = (_suppresses(earlier, block, iou_threshold) & is_kept.unsqueeze(2)).any(1).logical_not().half()
        matrix = _suppresses(block, block, iou_threshold).triu(1).half()
        decided.append(alive)
        while True:
            for _ in range(_ROUNDS):
                before = decided[-1]
                decided[-1] = alive * (before.unsqueeze(1) @ matrix == 0).squeeze(1)
            kept = torch.stack([part.sum(1, dtype=torch.float32) for part in decided]).sum(0)
            changes, fewest = torch.stack(((decided[-1] - before).abs().amax().float(), kept.amin())).tolist()
            if not changes:
                break
        if fewest >= max_det:
            break
    keep = torch.cat(decided, 1)
    place, is_kept = _first_kept(keep, max_det)
    return order.gather(1, place), torch.where(is_kept, scores.gather(1, place), scores.new_full((), -1.0))


def _suppresses(first: Tensor, second: Tensor, iou_threshold: float) -> Tensor:
    """Return [B, n, m]: box n of [B, 6, n] (corners, area, class) is of the class of m and overlaps it too much."""
    rows, columns = first.unsqueeze(3).unbind(1), second.unsqueeze(2).unbind(1)  # 6 x [B, n, 1], 6 x [B, 1, m]
    iou = iou_from_areas(common_area(rows, columns), rows[4], columns[4])
    # Two empty boxes give NaN: the comparison is false and neither suppresses the other.
    return (iou > iou_threshold) & (rows[5] == columns[5])


def _first_kept(keep: Tensor, max_det: int) -> tuple[Tensor, Tensor]:
    """Return the places of the first `max_det` ones in a row of ones and zeros [B, n], and which of them are ones."""
    values, places = keep.sort(dim=1, descending=True, stable=True)
    return places[:, :max_det], values[:, :max_det] > 0
