"""Anchor labels of a batch on a GPU, in two kernels: IoUs are computed where they are needed and never written.

The results are those of the dense way in anchors.py, ties included: the same operations in the same order.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from effdet.ops.boxes import ENCODE_EPSILON

_TILE, _TILES = 1024, 4  # anchors of a step of the search, and its steps
_BLOCK = 256  # anchors of a program that labels
_UNFUSED = {"enable_fp_fusion": False}  # a fused multiply-add rounds once where the dense way rounds twice


@triton.jit
def _iou(y_min, x_min, y_max, x_max, area, gt_y_min, gt_x_min, gt_y_max, gt_x_max):
    """Return IoU and intersection of anchors and one box."""
    height = tl.maximum(tl.minimum(gt_y_max, y_max) - tl.maximum(gt_y_min, y_min), 0.0)
    width = tl.maximum(tl.minimum(gt_x_max, x_max) - tl.maximum(gt_x_min, x_min), 0.0)
    intersection = height * width
    union = (gt_y_max - gt_y_min) * (gt_x_max - gt_x_min) + area - intersection
    return tl.div_rn(intersection, union), intersection


@triton.jit
def _search_kernel(anchors, boxes, best_ious, best_anchors, num_anchors, chunks, TILE: tl.constexpr,
                   TILES: tl.constexpr):
    """Write the largest IoU of a box with this chunk of anchors, and the first anchor that has it."""
    slot = tl.program_id(0)
    gt_y_min, gt_x_min = tl.load(boxes + 4 * slot), tl.load(boxes + 4 * slot + 1)
    gt_y_max, gt_x_max = tl.load(boxes + 4 * slot + 2), tl.load(boxes + 4 * slot + 3)
    best = tl.full((TILE,), -2.0, tl.float32)
    best_anchor = tl.zeros((TILE,), tl.int32)
    for tile in range(TILES):
        anchor = (tl.program_id(1) * TILES + tile) * TILE + tl.arange(0, TILE)
        inside = anchor < num_anchors
        y_min = tl.load(anchors + 4 * anchor, mask=inside, other=0.0)
        x_min = tl.load(anchors + 4 * anchor + 1, mask=inside, other=0.0)
        y_max = tl.load(anchors + 4 * anchor + 2, mask=inside, other=1.0)
        x_max = tl.load(anchors + 4 * anchor + 3, mask=inside, other=1.0)
        area = (y_max - y_min) * (x_max - x_min)
        iou, _ = _iou(y_min, x_min, y_max, x_max, area, gt_y_min, gt_x_min, gt_y_max, gt_x_max)
        iou = tl.where(inside, iou, -2.0)
        best_anchor = tl.where(iou > best, anchor, best_anchor)
        best = tl.maximum(iou, best)
    largest = tl.max(best, 0)
    first = tl.min(tl.where(best == largest, best_anchor, num_anchors), 0)
    tl.store(best_ious + slot * chunks + tl.program_id(1), largest)
    tl.store(best_anchors + slot * chunks + tl.program_id(1), first)


@triton.jit(do_not_specialize=["slots"])
def _label_kernel(anchors, boxes, classes, valid, best_anchors, class_targets, box_targets, positives, num_anchors,
                  slots, threshold, EPSILON: tl.constexpr, REGIONS: tl.constexpr, BLOCK: tl.constexpr):
    """Write class targets and box codes of a block of anchors of one image, and how many are positive."""
    image = tl.program_id(1)
    anchor = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = anchor < num_anchors
    y_min = tl.load(anchors + 4 * anchor, mask=inside, other=0.0)
    x_min = tl.load(anchors + 4 * anchor + 1, mask=inside, other=0.0)
    y_max = tl.load(anchors + 4 * anchor + 2, mask=inside, other=1.0)
    x_max = tl.load(anchors + 4 * anchor + 3, mask=inside, other=1.0)
    area = (y_max - y_min) * (x_max - x_min)
    best = tl.full((BLOCK,), -2.0, tl.float32)
    best_slot = tl.zeros((BLOCK,), tl.int32)
    forced = tl.full((BLOCK,), -1, tl.int32)
    ignored = tl.zeros((BLOCK,), tl.int32)
    for slot in range(0, slots):
        at = image * slots + slot
        iou, intersection = _iou(y_min, x_min, y_max, x_max, area, tl.load(boxes + 4 * at),
                                 tl.load(boxes + 4 * at + 1), tl.load(boxes + 4 * at + 2), tl.load(boxes + 4 * at + 3))
        counts = tl.load(valid + at) != 0
        iou = tl.where(counts, iou, -1.0)
        best_slot = tl.where(iou > best, slot, best_slot)
        best = tl.maximum(iou, best)
        forces = counts & (tl.load(best_anchors + at) == anchor) & (forced < 0)
        forced = tl.where(forces, slot, forced)
        if REGIONS:
            covers = (tl.load(classes + at) == -2) & (intersection > 0.5 * area)
            ignored = tl.where(covers, 1, ignored)
    match = tl.where(forced >= 0, forced, tl.where(best >= threshold, best_slot, -1))
    positive = (match >= 0) & inside
    own = image * slots + tl.maximum(match, 0)
    target = tl.load(classes + own, mask=positive, other=0).to(tl.int32) - 1
    if REGIONS:
        target = tl.where((ignored != 0) & (match < 0), -2, target)
    gt_y_min = tl.load(boxes + 4 * own, mask=positive, other=0.0)
    gt_x_min = tl.load(boxes + 4 * own + 1, mask=positive, other=0.0)
    gt_y_max = tl.load(boxes + 4 * own + 2, mask=positive, other=1.0)
    gt_x_max = tl.load(boxes + 4 * own + 3, mask=positive, other=1.0)
    height, width = gt_y_max - gt_y_min, gt_x_max - gt_x_min
    anchor_height, anchor_width = y_max - y_min, x_max - x_min
    y_shift = (gt_y_min + height / 2) - (y_min + anchor_height / 2)
    x_shift = (gt_x_min + width / 2) - (x_min + anchor_width / 2)
    height, width = height + EPSILON, width + EPSILON
    anchor_height, anchor_width = anchor_height + EPSILON, anchor_width + EPSILON
    out = image.to(tl.int64) * num_anchors + anchor
    tl.store(class_targets + out, target.to(tl.int64), mask=inside)
    tl.store(box_targets + 4 * out, tl.where(positive, tl.div_rn(y_shift, anchor_height), 0.0), mask=inside)
    tl.store(box_targets + 4 * out + 1, tl.where(positive, tl.div_rn(x_shift, anchor_width), 0.0), mask=inside)
    tl.store(box_targets + 4 * out + 2, tl.where(positive, tl.log(tl.div_rn(height, anchor_height)), 0.0), mask=inside)
    tl.store(box_targets + 4 * out + 3, tl.where(positive, tl.log(tl.div_rn(width, anchor_width)), 0.0), mask=inside)
    tl.store(positives + image * tl.num_programs(0) + tl.program_id(0), tl.sum(positive.to(tl.int32), 0))


def label(anchors_yxyx: Tensor, boxes_yxyx: Tensor, classes: Tensor, valid: Tensor, match_threshold: float,
          ignore_regions: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Make the targets of a batch.

    Args:
        anchors_yxyx: float32 [N, 4].
        boxes_yxyx: float32 [B, M, 4], M at least 1.
        classes: int64 [B, M]: 1..K, -1 for padding, -2 for an ignore region.
        valid: bool [B, M]: which slots are objects.
        match_threshold: IoU from which an anchor is positive.
        ignore_regions: give anchors that lie more than half in an ignore region the target -2.

    Returns:
        class targets int64 [B, N], box codes float32 [B, N, 4], number of positive anchors float32 [B].
    """
    batch, slots = classes.shape
    count, device = len(anchors_yxyx), anchors_yxyx.device
    anchors, boxes = anchors_yxyx.contiguous(), boxes_yxyx.contiguous()
    chunks = triton.cdiv(count, _TILE * _TILES)
    best_ious = torch.empty((batch, slots, chunks), dtype=torch.float32, device=device)
    best_anchors = torch.empty((batch, slots, chunks), dtype=torch.int32, device=device)
    _search_kernel[(batch * slots, chunks)](anchors, boxes, best_ious, best_anchors, count, chunks, TILE=_TILE,
                                            TILES=_TILES, **_UNFUSED)
    best_anchors = best_anchors.gather(2, best_ious.argmax(2, keepdim=True)).squeeze(2)
    class_targets = torch.empty((batch, count), dtype=torch.int64, device=device)
    box_targets = torch.empty((batch, count, 4), dtype=torch.float32, device=device)
    blocks = triton.cdiv(count, _BLOCK)
    positives = torch.empty((batch, blocks), dtype=torch.int32, device=device)
    _label_kernel[(blocks, batch)](anchors, boxes, classes.contiguous(), valid.contiguous().view(torch.uint8),
                                   best_anchors, class_targets, box_targets, positives, count, slots, match_threshold,
                                   EPSILON=ENCODE_EPSILON, REGIONS=ignore_regions, BLOCK=_BLOCK, **_UNFUSED)
    return class_targets, box_targets, positives.sum(1, dtype=torch.float32)
