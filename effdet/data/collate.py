"""Samples to a batch: pad what there is per box, stack the rest."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from effdet.anchors import AnchorLabeler
from effdet.ops.labels import PADDING

MAX_NUM_INSTANCES = 100  # the number of slots that effdet padded to

_PAD_STEP = 128


def padded_instances(most: int) -> int:
    """Choose the number of target slots for a batch whose fullest image has `most` boxes: 32, 64, 128, 256, 384, ...

    Few steps, because compiled graphs and graph capture pay for every new shape.
    """
    return next((m for m in (32, 64) if most <= m), -(-most // _PAD_STEP) * _PAD_STEP)


class DetectionFastCollate:
    """Put samples (image [3, H, W], target dict) together into a batch.

    Per-box entries (`instance_keys`) are padded to M slots, float32; others are stacked: numbers to [B] (int64 or
    float32), sequences to [B, n] (int32 or float32), arrays as they are.

    Args:
        instance_keys: names of per-box entries; default bbox, bbox_ignore, cls.
        instance_shapes: their shapes (M, ...); the default takes M from `max_instances` and the rest from the data.
        instance_fill: value of unused slots.
        max_instances: least M. A batch with an image of more boxes has more slots (`padded_instances`); no box is ever
            cut off. None takes M from the batch alone.
        anchor_labeler: computes the anchor targets here, in the worker, with its `batch_label_anchors(gt_boxes [B, M,
            4], gt_classes [B, M])`, or an image at a time with its `label_anchors` where a subclass has its own. They
            go into label_cls_L, label_bbox_L (L counts the levels from 0) and label_num_positives; boxes and classes
            are left out.
    """

    def __init__(
        self,
        instance_keys: set[str] | None = None,
        instance_shapes: dict[str, tuple[int, ...]] | None = None,
        instance_fill: float = PADDING,
        max_instances: int | None = MAX_NUM_INSTANCES,
        anchor_labeler: Any = None,
    ) -> None:
        self.instance_keys = set(instance_keys or ("bbox", "bbox_ignore", "cls"))
        self.instance_shapes = dict(instance_shapes or {})
        self.instance_fill = instance_fill
        self.max_instances = max_instances
        self.anchor_labeler = anchor_labeler

    def __call__(self, batch: Sequence[tuple[Any, dict[str, Any]]]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Stack samples (image, target) to a batch: images [B, C, H, W], and a tensor [B, ...] for each key."""
        images = _stack_images([sample[0] for sample in batch])
        target = {}
        for key in batch[0][1]:
            values = [sample[1][key] for sample in batch]
            if key not in self.instance_keys:
                target[key] = _stack(key, values)
            elif self.anchor_labeler is None:
                target[key] = self._pad(key, values)
        if self.anchor_labeler is not None:
            target.update(self._make_labels([sample[1] for sample in batch]))
        return images, target

    def _make_labels(self, targets: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        boxes, classes = (
            [torch.as_tensor(target[key], dtype=torch.float32) for target in targets] for key in ("bbox", "cls")
        )
        cls_targets: Sequence[torch.Tensor]
        box_targets: Sequence[torch.Tensor]
        if getattr(type(self.anchor_labeler), "label_anchors", None) in (None, AnchorLabeler.label_anchors):
            cls_targets, box_targets, num_positives = self.anchor_labeler.batch_label_anchors(boxes, classes)
        else:  # effdet's collate calls this one
            labels = [
                self.anchor_labeler.label_anchors(*pair, filter_valid=False)
                for pair in zip(boxes, classes, strict=True)
            ]
            cls_targets, box_targets = (
                [torch.stack(level) for level in zip(*(image[part] for image in labels), strict=True)]
                for part in (0, 1)
            )
            num_positives = torch.tensor([float(image[2]) for image in labels])
        made = {f"label_cls_{level}": cls_target for level, cls_target in enumerate(cls_targets)}
        made |= {f"label_bbox_{level}": box_target for level, box_target in enumerate(box_targets)}
        return made | {"label_num_positives": num_positives}

    def _pad(self, key: str, values: list) -> torch.Tensor:
        rows = [torch.as_tensor(v) for v in values]
        most = max(len(r) for r in rows)
        shape = self.instance_shapes.get(key)
        least = shape[0] if shape else self.max_instances or 0
        tail = tuple(shape[1:]) if shape else tuple(rows[0].shape[1:])
        slots = least if most <= least else padded_instances(most)
        padded = torch.full((len(rows), slots, *tail), self.instance_fill, dtype=torch.float32)
        for slot, row in zip(padded, rows, strict=True):
            slot[: len(row)] = row
        return padded


def _stack_images(images: list) -> torch.Tensor:
    shapes = {tuple(i.shape) for i in images}
    if len(shapes) > 1:
        raise ValueError(
            f"images of one batch have different shapes {sorted(shapes)}; the transform must give all the same size"
        )
    if all(isinstance(i, np.ndarray) and i.strides[0] < i.strides[-1] for i in images):
        # Views of [H, W, 3]: copied row by row, they become a batch in channels_last order. The device turns it round
        # where that is wanted.
        return torch.from_numpy(np.stack([i.transpose(1, 2, 0) for i in images])).permute(0, 3, 1, 2)
    return torch.stack([torch.as_tensor(i) for i in images])


def _stack(key: str, values: list) -> torch.Tensor:
    try:
        stacked = torch.as_tensor(np.stack([np.asarray(v) for v in values]))
    except (TypeError, ValueError) as e:
        raise TypeError(
            f"target entry {key!r} cannot be batched: numbers, sequences of numbers and arrays of one shape can. "
            "Name per-box entries in instance_keys."
        ) from e
    if stacked.is_floating_point():
        return stacked.float()
    return stacked.to(torch.int32 if isinstance(values[0], (tuple, list)) else torch.int64)
