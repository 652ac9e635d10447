"""Candidate selection and hard NMS of nms.py on a CPU: equal results, with as little work as the image needs.

Reading a value costs a CPU nothing, so work stops as soon as the answer is known; accelerators need the fixed shapes of
nms.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .boxes import pairwise_iou

_FIRST_BLOCK = 256  # candidates compared at a time; most images need no second block
_BLOCK = 512


def select_candidates(
    cls_outputs: Sequence[Tensor], box_outputs: Sequence[Tensor], num_classes: int, max_detection_points: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keep the (anchor, class) pairs with the largest logits; arguments and result of nms.select_candidates.

    A pair among the k best belongs to one of the k anchors with the largest maxima over classes, and is not below the
    smallest of those maxima: all others are looked at once, for the maximum.
    """
    batch = cls_outputs[0].shape[0]
    levels = [_Level(level, num_classes) for level in cls_outputs]
    deltas = torch.cat([level.permute(0, 2, 3, 1).reshape(batch, -1, 4) for level in box_outputs], 1)
    level_maxima = [level.maxima() for level in levels]
    starts = [0]
    for of_level in level_maxima:
        starts.append(starts[-1] + of_level.shape[1])
    maxima = torch.cat(level_maxima, 1)
    count = min(max_detection_points, starts[-1] * num_classes)
    found = []
    for image in range(batch):
        values, anchors = maxima[image].topk(min(count, starts[-1]), sorted=False)
        anchors = anchors.sort().values
        cuts = torch.searchsorted(anchors, torch.tensor(starts)).tolist()
        rows = torch.cat(
            [
                level.rows(image, anchors[low:high] - start)
                for level, start, low, high in zip(levels, starts, cuts[:-1], cuts[1:], strict=False)
            ]
        ).reshape(-1)
        # Fewer anchors than pairs wanted: then all pairs are in question.
        places = (rows >= values.min()).nonzero().squeeze(1) if len(anchors) == count else torch.arange(len(rows))
        best, order = rows[places].topk(count)
        place = places[order]
        found.append((best, anchors[torch.div(place, num_classes, rounding_mode="floor")], place % num_classes))
    logits, anchors, classes = (torch.stack(parts) for parts in zip(*found, strict=True))
    return logits, deltas.gather(1, anchors.unsqueeze(2).expand(-1, -1, 4)), anchors, classes


class _Level:
    """The logits of one level, [B, A * K, height, width], by anchor, without a copy in either memory layout."""

    def __init__(self, logits: Tensor, num_classes: int) -> None:
        self.by_cell = logits.is_contiguous(memory_format=torch.channels_last)
        if self.by_cell:
            self.logits = logits.permute(0, 2, 3, 1).reshape(len(logits), -1, num_classes)  # [B, cells * A, K]
        else:
            self.logits = logits.flatten(2).unflatten(1, (-1, num_classes))  # [B, A, K, cells]

    def maxima(self) -> Tensor:
        """Return the largest logit of each anchor [B, cells * A]."""
        return self.logits.amax(2) if self.by_cell else self.logits.amax(2).transpose(1, 2).flatten(1)

    def rows(self, image: int, anchors: Tensor) -> Tensor:
        """Return the logits [n, K] of some anchors of an image."""
        if self.by_cell:
            return self.logits[image].index_select(0, anchors)
        per_cell = self.logits.shape[1]
        return self.logits[image][anchors % per_cell, :, torch.div(anchors, per_cell, rounding_mode="floor")]


def batched_nms(
    boxes_xyxy: Tensor, scores: Tensor, classes: Tensor, max_det: int, iou_threshold: float
) -> tuple[Tensor, Tensor]:
    """Drop boxes that overlap a better one of their class; arguments and result of nms.batched_nms."""
    kept_indices = torch.zeros(scores.shape[0], min(max_det, scores.shape[1]), dtype=torch.int64)
    kept_scores = scores.new_full(kept_indices.shape, -1.0)
    for image, (image_boxes, image_scores, image_classes) in enumerate(zip(boxes_xyxy, scores, classes, strict=True)):
        order = image_scores.argsort(descending=True, stable=True)
        kept = order[_greedy(image_boxes[order], image_classes[order], kept_indices.shape[1], iou_threshold)]
        kept_indices[image, : len(kept)] = kept
        kept_scores[image, : len(kept)] = image_scores[kept]
    return kept_indices, kept_scores


def _greedy(boxes: Tensor, classes: Tensor, max_det: int, iou_threshold: float) -> Tensor:
    """Return the first `max_det` boxes that no kept earlier one suppresses; boxes come by falling score."""

    def suppresses(first: Tensor, second: Tensor) -> Tensor:
        same_class = classes[first].unsqueeze(1) == classes[second]
        return (pairwise_iou(boxes[first], boxes[second]) > iou_threshold) & same_class

    kept = torch.zeros(0, dtype=torch.int64)
    start, size = 0, _FIRST_BLOCK
    while start < len(boxes) and len(kept) < max_det:
        block = torch.arange(start, min(start + size, len(boxes)))
        if len(kept):
            block = block[~suppresses(kept, block).any(0)]
        block = _survivors(suppresses(block, block).triu_(1), block)
        kept = torch.cat((kept, block))
        start, size = start + size, _BLOCK
    return kept[:max_det]


def _survivors(suppresses: Tensor, block: Tensor) -> Tensor:
    """Return the boxes of a block that stay, [n, m] saying that an earlier one n would drop m.

    The kept boxes are the only set that holds exactly those boxes which none of its members drops. It is reached by
    repeating that rule: each round decides at least one box more, in chains of overlaps one link.
    """
    matrix = suppresses.float()
    keep = torch.ones(len(block))
    while True:
        new = (keep @ matrix == 0).float()
        if torch.equal(new, keep):
            return block[keep.bool()]
        keep = new
