"""Soft-NMS of one image under the names and argument orders of effdet: results of as many rows as boxes are kept.

Lives here: adapters for callers who bring their own boxes. The batched, fixed-shape core that the benches run is in
nms.py; unlike it, these functions wait for the device, because the length of their result depends on the data.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effdet.ops import nms
from effdet.ops.boxes import pairwise_iou

__all__ = ["batched_soft_nms", "pairwise_iou", "soft_nms"]


def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    method_gaussian: bool = True,
    sigma: float = nms.SOFT_NMS_SIGMA,
    iou_threshold: float = nms.IOU_THRESHOLD,
    score_threshold: float = 0.005,
) -> tuple[Tensor, Tensor]:
    """Order the boxes of one class by score, lowering the scores of those that overlap a better one.

    Args:
        boxes: float [N, 4] xyxy.
        scores: float [N].
        method_gaussian: multiply by exp(-iou^2 / sigma); otherwise by 1 - iou where the IoU is above `iou_threshold`.
        sigma: width of the Gaussian, > 0.
        iou_threshold: of the linear method, in 0..1.
        score_threshold: boxes whose score falls to this or below are left out; the best box never is.

    Returns:
        index of the kept boxes int64 [n] by falling lowered score, and those scores float32 [n]; both are empty
        without boxes.

    Source:
        Soft-NMS, https://arxiv.org/abs/1704.04503.
    """
    return batched_soft_nms(
        boxes,
        scores,
        torch.zeros_like(scores, dtype=torch.int64),
        method_gaussian,
        sigma,
        iou_threshold,
        score_threshold,
    )


def batched_soft_nms(
    boxes: Tensor,
    scores: Tensor,
    idxs: Tensor,
    method_gaussian: bool = True,
    sigma: float = nms.SOFT_NMS_SIGMA,
    iou_threshold: float = nms.IOU_THRESHOLD,
    score_threshold: float = nms.SOFT_NMS_MIN_SCORE,
) -> tuple[Tensor, Tensor]:
    """Order the boxes of one image by score as `soft_nms` does; boxes of different classes leave each other alone.

    Args:
        boxes: float [N, 4] xyxy.
        scores: float [N].
        idxs: class of each box [N], at least 0.
        method_gaussian: see `soft_nms`.
        sigma: see `soft_nms`.
        iou_threshold: see `soft_nms`.
        score_threshold: see `soft_nms`.

    Returns:
        As `soft_nms`, all classes in one order.
    """
    if boxes.numel() == 0:
        return (
            torch.zeros(0, dtype=torch.int64, device=boxes.device),
            torch.zeros(0, dtype=torch.float32, device=scores.device),
        )
    # Scores only fall, so no more boxes than these can be kept; the best one is, whatever its score.
    most = max(1, int((scores > score_threshold).sum()))
    index, kept = nms.batched_soft_nms(
        boxes.unsqueeze(0),
        scores.unsqueeze(0),
        idxs.unsqueeze(0),
        most,
        sigma,
        score_threshold,
        method_gaussian,
        iou_threshold,
    )
    count = 1 + int((kept[0, 1:] >= 0).sum())
    return index[0, :count], kept[0, :count].float()
