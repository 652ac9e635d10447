"""The anchor labels of anchors.py on a CPU: equal values, from the few anchors that can matter.

An anchor whose IoU with a box reaches the threshold has a similar size and a centre close by. On a grid those anchors
are a small window of cells at some levels, a few hundred in place of all. For a box that no anchor matches, the IoU
with the nearest anchor of each size makes a second window, for the one it overlaps best. Lists of changing length cost
a CPU nothing; accelerators need the fixed shapes of anchors.py.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .boxes import box_area, common_area, encode_boxes, iou_from_areas
from .labels import BACKGROUND


class SparseMatcher:
    """Find the matches of boxes with one grid of anchors."""

    def __init__(self, boxes_yxyx: Tensor, level_sizes: list[tuple[int, int]], per_cell: int) -> None:
        """Read the grid.

        Args:
            boxes_yxyx: all anchors, float32 [N, 4]; order: level, row, column, size.
            level_sizes: (rows, columns) of each level.
            per_cell: sizes at each cell.
        """
        self.boxes_yxyx = boxes_yxyx
        self.boxes = boxes_yxyx.numpy()
        self.areas = box_area(self.boxes)
        sizes = np.repeat(np.array(level_sizes), per_cell, 0)  # one row for each level and size at a cell
        self.ends = sizes
        self.rows, self.columns = sizes.T
        starts = np.cumsum([0] + [rows * columns * per_cell for rows, columns in level_sizes])[:-1]
        self.offset = np.repeat(starts, per_cell) + np.tile(np.arange(per_cell), len(level_sizes))
        self.step = per_cell
        first, boxes = self.offset, self.boxes.astype(np.float64)
        self.sides = boxes[first, 2:] - boxes[first, :2]  # [S, 2] height, width
        self.centre = (boxes[first, 2:] + boxes[first, :2]) / 2  # of the first cell
        below = first + np.where(self.rows > 1, per_cell * self.columns, 0)
        right = first + np.where(self.columns > 1, per_cell, 0)
        self.stride = np.stack((boxes[below, 0] - boxes[first, 0], boxes[right, 1] - boxes[first, 1]), 1)
        self.stride[self.stride == 0] = np.inf  # one cell along this axis: it is in reach or not, wherever the box is

    def match(
        self, gt_boxes: np.ndarray, image: np.ndarray, threshold: float
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Match boxes with anchors; see anchors.AnchorLabeler for the rules.

        Args:
            gt_boxes: float32 [G, 4] yxyx, those of one image together and in order.
            image: index of each box's image, int64 [G], ascending.
            threshold: IoU from which an anchor is positive, above 0.

        Returns:
            image [P], anchor [P] and box (row of `gt_boxes`) [P] of the positive anchors, each anchor of an image once.
        """
        box, anchor = self._windows(gt_boxes, threshold)
        iou = self._iou(gt_boxes, box, anchor)
        enough = iou >= threshold
        box, anchor, iou = box[enough], anchor[enough], iou[enough]

        best_anchor = self._best_of(box, anchor, iou, len(gt_boxes))
        left = (best_anchor < 0).nonzero()[0]
        if len(left):
            best_anchor[left] = self._search(gt_boxes[left])
        # An anchor takes the box it overlaps best, the first of equal ones; a box's best anchor takes the first such.
        forced = np.arange(len(gt_boxes))
        box, anchor = np.concatenate((forced, box)), np.concatenate((best_anchor, anchor))
        rank = np.concatenate((np.full(len(forced), -2.0), -iou))
        key = image[box] * len(self.boxes) + anchor
        order = np.lexsort((box, rank, key))
        first = np.ones(len(order), dtype=bool)
        first[1:] = key[order][1:] != key[order][:-1]
        chosen = order[first]
        return image[box[chosen]], anchor[chosen], box[chosen]

    def reached(self, gt_boxes: np.ndarray, threshold: float) -> np.ndarray:
        """Tell which boxes some anchor overlaps with at least this IoU.

        Args:
            gt_boxes: float32 [G, 4] yxyx.
            threshold: above 0.

        Returns:
            bool [G].
        """
        box, anchor = self._windows(gt_boxes, threshold)
        found = np.zeros(len(gt_boxes), dtype=bool)
        found[box[self._iou(gt_boxes, box, anchor) >= threshold]] = True
        return found

    def _windows(self, gt_boxes: np.ndarray, threshold: float | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (box, anchor) for a superset of the pairs that reach the threshold, one for all or for each box.

        The overlap along an axis is at most the shorter side, so IoU >= t needs an overlap of t times the longer side
        along each: with the sides a and b, the centres differ by at most (a + b) / 2 - t max(a, b).
        """
        boxes = gt_boxes.astype(np.float64)
        threshold = np.broadcast_to(threshold, len(boxes))[:, None]
        sides = (boxes[:, 2:] - boxes[:, :2])[:, None]  # [G, 1, 2]
        centre = ((boxes[:, 2:] + boxes[:, :2]) / 2)[:, None]
        longer = np.maximum(sides, self.sides)  # [G, S, 2]
        reach = (sides + self.sides) / 2 - threshold[..., None] * longer
        smaller = np.minimum(sides, self.sides).prod(2)  # area of the overlap where the centres agree
        similar = smaller >= 0.999 * threshold * np.maximum(sides.prod(2), self.sides.prod(1))
        number, shape = (similar & (reach > -1e-3).all(2) & (sides > 0).all(2)).nonzero()
        # A hundredth of a cell on each side makes up for rounding.
        middle = (centre[number, 0] - self.centre[shape]) / self.stride[shape]
        reach = reach[number, shape] / self.stride[shape] + 0.01
        ends = self.ends[shape]
        low = np.clip(np.ceil(middle - reach), 0, ends).astype(np.int64)
        high = np.clip(np.floor(middle + reach), -1, ends - 1).astype(np.int64)
        count = np.maximum(high - low + 1, 0)
        cells = count.prod(1)
        which = np.repeat(np.arange(len(cells)), cells)
        place = np.arange(len(which)) - np.repeat(np.cumsum(cells) - cells, cells)
        row = low[which, 0] + place // count[which, 1]
        column = low[which, 1] + place % count[which, 1]
        return number[which], self._anchor_at(shape[which], row, column)

    def _anchor_at(self, shape: np.ndarray | slice, row: np.ndarray, column: np.ndarray) -> np.ndarray:
        """Return the numbers of the anchors of a level and size, `shape`, at cells."""
        return self.offset[shape] + (row * self.columns[shape] + column) * self.step

    def _iou(self, gt_boxes: np.ndarray, box: np.ndarray, anchor: np.ndarray) -> np.ndarray:
        """Return the IoU of pairs, in float32: the same bits as anchors.AnchorLabeler's."""
        boxes = gt_boxes[box]
        return iou_from_areas(common_area(boxes.T, self.boxes[anchor].T), box_area(boxes), self.areas[anchor])

    def _best_of(self, box: np.ndarray, anchor: np.ndarray, iou: np.ndarray, count: int) -> np.ndarray:
        """Return the anchor of the highest IoU, the first of equal ones, for each of `count` boxes; -1 without a pair.

        `box` is ascending.
        """
        best = np.full(count, -1)
        if len(box):
            start = np.flatnonzero(np.diff(box, prepend=-1))
            highest = np.repeat(np.maximum.reduceat(iou, start), np.diff(start, append=len(box)))
            best[box[start]] = np.minimum.reduceat(np.where(iou == highest, anchor, len(self.boxes)), start)
        return best

    def _search(self, gt_boxes: np.ndarray) -> np.ndarray:
        """Return the anchor that each box overlaps best: what the nearest anchor of each size has bounds the search."""
        middle = ((gt_boxes[:, 2:] + gt_boxes[:, :2]) / 2)[:, None]
        cell = np.clip(np.rint((middle - self.centre) / self.stride), 0, self.ends - 1).astype(np.int64)
        nearest = self._anchor_at(slice(None), cell[..., 0], cell[..., 1])  # [G, S]
        each = np.repeat(np.arange(len(gt_boxes)), nearest.shape[1])
        reached = self._iou(gt_boxes, each, nearest.ravel()).reshape(nearest.shape).max(1)
        box, anchor = self._windows(gt_boxes, reached)
        best = self._best_of(box, anchor, self._iou(gt_boxes, box, anchor), len(gt_boxes))
        everywhere = np.arange(len(self.boxes))
        for number in (reached <= 0).nonzero()[0]:  # beside all anchors, or without an area
            best[number] = self._iou(gt_boxes, np.full(len(everywhere), number), everywhere).argmax()
        return best

    def targets(
        self, gt_boxes: Tensor, gt_classes: Tensor, valid: Tensor, threshold: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Make the targets of a batch; arguments and result as of anchors.AnchorLabeler.assign, without ignore regions.

        Args:
            gt_boxes: float32 [B, M, 4].
            gt_classes: int64 [B, M].
            valid: the rows that count, bool [B, M].
            threshold: IoU from which an anchor is positive, above 0.
        """
        batch, count = len(gt_boxes), len(self.boxes)
        class_targets = torch.full((batch, count), BACKGROUND)
        box_targets = torch.zeros(batch, count, 4)
        image, slot = valid.nonzero().unbind(1)
        boxes, classes = gt_boxes[image, slot], gt_classes[image, slot]
        rows = [torch.from_numpy(part) for part in self.match(boxes.numpy(), image.numpy(), threshold)]
        class_targets[rows[0], rows[1]] = classes[rows[2]] - 1
        deltas = encode_boxes(boxes[rows[2]].unbind(1), self.boxes_yxyx[rows[1]].unbind(1))
        box_targets[rows[0], rows[1]] = torch.stack(deltas, 1)
        return class_targets, box_targets, torch.bincount(rows[0], minlength=batch).float()
