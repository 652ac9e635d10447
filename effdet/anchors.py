"""The anchor grid and the labeler that turns ground-truth boxes into training targets.

Batched, fixed shapes, no loop over images and no host synchronisation. Post-processing is in nms.py; the names
effdet's users import from here (`generate_detections` and others) are re-exported at the end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from effdet.object_detection import (  # noqa: F401  (effdet has them here)
    ArgMaxMatcher,
    BoxList,
    FasterRcnnBoxCoder,
    IouSimilarity,
    TargetAssigner,
)
from effdet.ops.boxes import box_area, clip_boxes_xyxy, common_area, decode_boxes, encode_boxes, iou_from_areas
from effdet.ops.labels import BACKGROUND, IGNORE, MATCH_IOU, PADDING
from effdet.ops.labels_cpu import SparseMatcher
from effdet.ops.nms import generate_detections
from effdet.ops.sizes import get_feat_sizes, to_height_width
from effdet.runtime.device import is_host

from .soft_nms import batched_soft_nms  # noqa: F401  (effdet has it here)

MIN_CLASS_SCORE = -5.0  # kept for imports; nothing here reads them
_DUMMY_DETECTION_SCORE = -1e5

# The [B, slots, N] overlaps are computed for as many ground-truth slots at a time as keep them below this size.
_MAX_OVERLAP_ELEMENTS = 1 << 24


class Anchors(nn.Module):
    """The boxes that predictions are relative to: `num_scales` x `aspect_ratios` at each cell of each level.

    Attributes:
        boxes: float32 buffer [N, 4] yxyx in pixels; order: level (finest first), row, column, scale, aspect.
        feat_sizes: (height, width) of the feature map at each level, from level 0.

    Source:
        RetinaNet, https://arxiv.org/abs/1708.02002, section 4; google/automl, efficientdet/anchors.py.
    """

    def __init__(
        self,
        min_level: int,
        max_level: int,
        num_scales: int,
        aspect_ratios: Sequence[Any],
        anchor_scale: float | Sequence[float],
        image_size: int | Sequence[int],
    ) -> None:
        """Make the grid.

        Args:
            min_level: level of the finest feature map; its stride is 2**min_level.
            max_level: level of the coarsest feature map.
            num_scales: sizes per level, at 2**(i / num_scales) times the first one.
            aspect_ratios: pairs (w, h) of side factors, or numbers r read as (sqrt(r), 1 / sqrt(r)).
            anchor_scale: side of the first size in strides; one number, or one for each level.
            image_size: (height, width) of the network input in pixels, or one number for a square.

        Raises:
            ValueError: `anchor_scale` is a sequence of the wrong length, or `image_size` is no size.
        """
        super().__init__()
        num_levels = max_level - min_level + 1
        self.min_level = min_level
        self.max_level = max_level
        self.num_scales = num_scales
        self.aspect_ratios = aspect_ratios
        self.anchor_scales = list(anchor_scale) if isinstance(anchor_scale, Sequence) else [anchor_scale] * num_levels
        if len(self.anchor_scales) != num_levels:
            raise ValueError(
                f"anchor_scale has {len(self.anchor_scales)} values for the {num_levels} levels "
                f"{min_level}..{max_level}: give one number, or one for each level."
            )
        self.image_size = to_height_width(image_size)
        self.feat_sizes = get_feat_sizes(self.image_size, max_level)
        self.register_buffer("boxes", self._make_boxes())
        self.boxes: Tensor

    @classmethod
    def from_config(cls, config: Any, image_size: Sequence[int] | None = None) -> Anchors:
        """Make the grid of a model config; `image_size` (height, width) goes before the config's."""
        return cls(
            config.min_level,
            config.max_level,
            config.num_scales,
            config.aspect_ratios,
            config.anchor_scale,
            image_size or config.image_size,
        )

    def get_anchors_per_location(self) -> int:
        """Return the number of anchors at each cell."""
        return self.num_scales * len(self.aspect_ratios)

    @property
    def config(self) -> dict[int, list[tuple[tuple[float, float], float, Any, float]]]:
        """(stride (y, x) in pixels, octave, aspect, anchor_scale) of each anchor at a cell, by level: effdet's form."""
        height, width = self.image_size
        return {
            level: [
                ((height / rows, width / columns), scale / self.num_scales, aspect, anchor_scale)
                for scale in range(self.num_scales)
                for aspect in self.aspect_ratios
            ]
            for level, (rows, columns), anchor_scale in zip(
                range(self.min_level, self.max_level + 1), self.level_sizes, self.anchor_scales, strict=True
            )
        }

    @property
    def level_sizes(self) -> list[tuple[int, int]]:
        """(height, width) of the feature maps in use, finest first."""
        return self.feat_sizes[self.min_level :]

    def _make_boxes(self) -> Tensor:
        factors = []  # (height, width) of each anchor at a cell, in anchor_scale strides
        for scale in range(self.num_scales):
            octave = 2 ** (scale / float(self.num_scales))
            for aspect in self.aspect_ratios:
                w, h = aspect if isinstance(aspect, Sequence) else (math.sqrt(aspect), 1.0 / math.sqrt(aspect))
                factors.append((octave * h, octave * w))
        half_sides = np.array(factors) / 2.0  # [A, 2]

        levels = []
        for (rows, columns), scale in zip(self.level_sizes, self.anchor_scales, strict=True):
            stride = np.array((self.image_size[0] / rows, self.image_size[1] / columns))
            centres = np.stack(
                np.meshgrid((np.arange(rows) + 0.5) * stride[0], (np.arange(columns) + 0.5) * stride[1], indexing="ij"),
                -1,
            )[:, :, None, :]  # [rows, columns, 1, 2]
            half = half_sides * (scale * stride)
            levels.append(np.concatenate((centres - half, centres + half), -1).reshape(-1, 4))
        return torch.from_numpy(np.concatenate(levels)).float()


class AnchorLabeler:
    """Assign each anchor a class and a box: the ground truth it overlaps best, if IoU >= `match_threshold`.

    Each ground-truth box also gets the anchor it overlaps best, whatever the IoU, so that none goes unlearned. Ties go
    to the first box and the first anchor.

    Source:
        google/automl, efficientdet/object_detection (argmax matcher with force_match_for_each_row).
    """

    def __init__(
        self, anchors: Anchors, num_classes: int, match_threshold: float = MATCH_IOU, ignore_regions: bool = False
    ) -> None:
        """Make a labeler.

        Args:
            anchors: the grid; its buffer's device is where `assign` runs.
            num_classes: number of classes K, for callers that ask; labels are not checked against it.
            match_threshold: IoU in 0..1 from which an anchor is positive.
            ignore_regions: honour rows of class -2 (regions whose content is unknown): unmatched anchors with more
                than half their area in one get the target -2, which the loss leaves out.
        """
        self.anchors = anchors
        self.num_classes = num_classes
        self.match_threshold = match_threshold
        self.ignore_regions = ignore_regions
        self._sparse: SparseMatcher | None = None

    def assign(
        self, gt_boxes_yxyx: Tensor | Sequence[Any], gt_classes: Tensor | Sequence[Any], filter_valid: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Make the targets of a batch: the one way to labels, for every device.

        Args:
            gt_boxes_yxyx: float [B, M, 4], pixels of the network input, or for each image its own boxes [n_i, 4], n_i
                from 0 on.
            gt_classes: [B, M], or for each image its own classes [n_i]: 1..K, -1 for padding, -2 for an ignore region.
            filter_valid: leave rows with a class <= -1 out; otherwise all but ignore regions count.

        Returns:
            class targets int64 [B, N] (0..K-1, -1 background, -2 ignore), box deltas float32 [B, N, 4] (zero where not
            positive), number of positive anchors float32 [B]. Images without objects get background everywhere.

        Raises:
            ValueError: boxes and classes of different numbers of images, or of objects in an image.
        """
        anchors = self.anchors.boxes
        if not (isinstance(gt_boxes_yxyx, Tensor) and isinstance(gt_classes, Tensor)):
            gt_boxes_yxyx, gt_classes = _pad_objects(gt_boxes_yxyx, gt_classes, anchors.device)
        if gt_boxes_yxyx.shape[1] == 0:  # one padding row keeps the reductions below defined
            gt_boxes_yxyx = gt_boxes_yxyx.new_zeros((gt_boxes_yxyx.shape[0], 1, 4))
            gt_classes = gt_classes.new_full((gt_classes.shape[0], 1), IGNORE)  # left out also without filter_valid
        boxes = gt_boxes_yxyx.to(device=anchors.device, dtype=torch.float32)
        classes = gt_classes.to(device=anchors.device, dtype=torch.int64)
        valid = classes > PADDING if filter_valid else classes != IGNORE
        if self._may_search(classes):
            return self._matcher().targets(boxes, classes, valid, self.match_threshold)

        best_iou, best_slot, best_anchor, ignored = self._overlaps(boxes, classes, valid)
        matches = torch.where(best_iou >= self.match_threshold, best_slot, torch.full_like(best_slot, BACKGROUND))
        forced = self._forced_matches(best_anchor, valid)
        matches = torch.where(forced >= 0, forced, matches)

        positive = matches >= 0
        slots = matches.clamp(min=0)
        class_targets = torch.where(positive, classes.gather(1, slots) - 1, torch.full_like(matches, BACKGROUND))
        if ignored is not None:
            class_targets = torch.where(ignored & ~positive, torch.full_like(matches, IGNORE), class_targets)
        matched = boxes.transpose(1, 2).gather(2, slots.unsqueeze(1).expand(-1, 4, -1))  # [B, 4, N]
        deltas = torch.stack(encode_boxes(matched.unbind(1), anchors.unbind(1)), -1)
        box_targets = torch.where(positive.unsqueeze(-1), deltas, torch.zeros_like(deltas))
        return class_targets, box_targets, positive.sum(1, dtype=torch.float32)

    def _may_search(self, classes: Tensor) -> bool:
        """Return whether the CPU's way gives these targets: it knows no ignore regions."""
        return (
            is_host(classes.device)
            and self.anchors.boxes.dtype == torch.float32
            and self.match_threshold > 0
            and not (self.ignore_regions and bool((classes == IGNORE).any()))
        )

    def _matcher(self) -> SparseMatcher:
        if self._sparse is None or self._sparse.boxes_yxyx is not self.anchors.boxes:
            self._sparse = SparseMatcher(
                self.anchors.boxes, self.anchors.level_sizes, self.anchors.get_anchors_per_location()
            )
        return self._sparse

    def _overlaps(self, boxes: Tensor, classes: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return best IoU and slot for each anchor [B, N], best anchor for each slot [B, M], and ignored [B, N]."""
        batch, num_slots, _ = boxes.shape
        anchors = [side.view(1, 1, -1) for side in self.anchors.boxes.unbind(1)]
        areas = box_area(self.anchors.boxes).view(1, 1, -1)
        gt_areas = box_area(boxes).unsqueeze(-1)
        corners = [corner.unsqueeze(-1) for corner in boxes.unbind(-1)]  # each [B, M, 1]

        best_iou = best_slot = ignored = None
        best_anchor = []
        step = max(1, _MAX_OVERLAP_ELEMENTS // max(1, batch * areas.shape[-1]))
        for start in range(0, num_slots, step):
            part = slice(start, start + step)
            intersection = common_area([corner[:, part] for corner in corners], anchors)
            # A degenerate box has no intersection: 0 / union is 0 without a special case, as no anchor is empty.
            iou = iou_from_areas(intersection, gt_areas[:, part], areas)
            iou = torch.where(valid[:, part].unsqueeze(-1), iou, -torch.ones_like(iou))
            best_anchor.append(iou.argmax(2))
            part_iou, part_slot = iou.max(1)
            part_slot = part_slot + start
            if best_iou is None:
                best_iou, best_slot = part_iou, part_slot
            else:
                better = part_iou > best_iou
                best_iou = torch.where(better, part_iou, best_iou)
                best_slot = torch.where(better, part_slot, best_slot)
            if self.ignore_regions:
                inside = (intersection * (classes[:, part] == IGNORE).unsqueeze(-1)).amax(1) > 0.5 * areas.squeeze(1)
                ignored = inside if ignored is None else ignored | inside
        return best_iou, best_slot, torch.cat(best_anchor, 1), ignored

    def _forced_matches(self, best_anchor: Tensor, valid: Tensor) -> Tensor:
        """Return for each anchor the first valid slot whose best anchor it is, or -1: int64 [B, N]."""
        batch, num_slots = best_anchor.shape
        num_anchors = self.anchors.boxes.shape[0]
        same = (best_anchor.unsqueeze(2) == best_anchor.unsqueeze(1)) & valid.unsqueeze(1)  # [B, slot, other slot]
        earlier = torch.ones(num_slots, num_slots, dtype=torch.bool, device=valid.device).tril(-1)
        first = valid & ~(same & earlier).any(2)
        # Slots that force nothing write to one column past the end; the rest write to distinct columns.
        columns = torch.where(first, best_anchor, torch.full_like(best_anchor, num_anchors))
        # int32: an accelerator may scatter int64 on a slow core of its own only.
        slots = torch.arange(num_slots, dtype=torch.int32, device=valid.device).expand(batch, -1)
        forced = torch.full((batch, num_anchors + 1), -1, dtype=torch.int32, device=valid.device)
        return forced.scatter(1, columns, slots)[:, :num_anchors].long()

    def split_levels(self, flat: Tensor) -> list[Tensor]:
        """Split [B, N] or [B, N, C] into one [B, height, width, anchors (x C)] for each level."""
        per_cell = self.anchors.get_anchors_per_location()
        sizes = self.anchors.level_sizes
        parts = flat.split([height * width * per_cell for height, width in sizes], 1)
        return [
            part.reshape(flat.shape[0], height, width, -1) for part, (height, width) in zip(parts, sizes, strict=True)
        ]

    def batch_label_anchors(
        self, gt_boxes: Tensor | Sequence[Any], gt_classes: Tensor | Sequence[Any], filter_valid: bool = True
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Make the targets of a batch, one tensor for each level, as effdet does.

        Args and errors are those of `assign`.

        Returns:
            class targets int64 [B, height, width, A] for each level, box deltas [B, height, width, A * 4] for each
            level, number of positive anchors float32 [B].
        """
        class_targets, box_targets, num_positives = self.assign(gt_boxes, gt_classes, filter_valid)
        return self.split_levels(class_targets), self.split_levels(box_targets), num_positives

    def label_anchors(
        self, gt_boxes: Tensor, gt_classes: Tensor, filter_valid: bool = True
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Make the targets of one image.

        Args:
            gt_boxes: float [M, 4] yxyx.
            gt_classes: [M] or [M, 1].
            filter_valid: as in `assign`.

        Returns:
            As `batch_label_anchors`, without the batch dimension.
        """
        classes, deltas, num_positives = self.assign(gt_boxes.unsqueeze(0), gt_classes.reshape(1, -1), filter_valid)
        classes_by_level, deltas_by_level = (
            [level[0] for level in self.split_levels(flat)] for flat in (classes, deltas)
        )
        return classes_by_level, deltas_by_level, num_positives[0]


def _pad_objects(gt_boxes: Sequence[Any], gt_classes: Sequence[Any], device: torch.device) -> tuple[Tensor, Tensor]:
    """Stack each image's boxes [n_i, 4] and classes [n_i] to float32 [B, M, 4] and int64 [B, M], M the largest n_i."""
    boxes = [torch.as_tensor(rows, dtype=torch.float32, device=device).reshape(-1, 4) for rows in gt_boxes]
    classes = [torch.as_tensor(row, device=device).reshape(-1).long() for row in gt_classes]
    counts = [len(rows) for rows in boxes], [len(row) for row in classes]
    if counts[0] != counts[1] or not counts[0]:
        raise ValueError(
            f"The images have {counts[0]} boxes and {counts[1]} classes: give as many classes as boxes "
            "for each image, and at least one image."
        )
    # An ignore region without an area touches nothing, and unlike -1 it is left out whatever filter_valid says.
    return (
        nn.utils.rnn.pad_sequence(boxes, batch_first=True),
        nn.utils.rnn.pad_sequence(classes, batch_first=True, padding_value=IGNORE),
    )


def decode_box_outputs(rel_codes: Tensor, anchors: Tensor, output_xyxy: bool = False) -> Tensor:
    """Turn deltas into boxes: effdet's name of boxes.decode_boxes."""
    return decode_boxes(rel_codes, anchors, output_xyxy)


__all__ = [
    "AnchorLabeler",
    "Anchors",
    "MIN_CLASS_SCORE",
    "clip_boxes_xyxy",
    "decode_box_outputs",
    "generate_detections",
    "get_feat_sizes",
]
