"""Samples to a batch: pad what there is per box, stack the rest."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from effdet.ops.labels import PADDING

MAX_NUM_INSTANCES = 100  # what effdet padded to; give it as max_instances for its shapes

_PAD_STEP = 128


def padded_instances(most: int) -> int:
    """Choose the number of target slots for a batch whose fullest image has `most` boxes: 32, 64, 128, 256, 384, ...

    Few steps, because compiled graphs and graph capture pay for every new shape.
    """
    return next((m for m in (32, 64) if most <= m), -(-most // _PAD_STEP) * _PAD_STEP)


class DetectionFastCollate:
    """Put samples (image [3, H, W], target dict) together into a batch.

    Per-box entries (`instance_keys`) are padded to M slots; others are stacked: numbers to [B], sequences to [B, n],
    arrays as they are.

    Args:
        instance_keys: names of per-box entries; default bbox, bbox_ignore, cls.
        instance_shapes: their shapes (M, ...); the default takes M from `max_instances` and the rest from the data.
        instance_fill: value of unused slots.
        max_instances: M. None takes it from the batch in steps (`padded_instances`); no box is ever cut off.
        anchor_labeler: computes the anchor targets here, in the worker, with its `batch_label_anchors(gt_boxes [B, M,
            4], gt_classes [B, M])`. They go into label_cls_L, label_bbox_L (L counts the levels from 0) and
            label_num_positives; boxes and classes are left out.
    """

    def __init__(
        self,
        instance_keys: set[str] | None = None,
        instance_shapes: dict[str, tuple[int, ...]] | None = None,
        instance_fill: float = PADDING,
        max_instances: int | None = None,
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
            target[key] = self._pad(key, values) if key in self.instance_keys else _stack(key, values)
        if self.anchor_labeler is not None:
            boxes, classes = target.pop("bbox"), target.pop("cls")
            target.pop("bbox_ignore", None)
            cls_targets, box_targets, num_positives = self.anchor_labeler.batch_label_anchors(boxes, classes)
            for level, (cls_target, box_target) in enumerate(zip(cls_targets, box_targets, strict=True)):
                target[f"label_cls_{level}"] = cls_target
                target[f"label_bbox_{level}"] = box_target
            target["label_num_positives"] = num_positives
        return images, target

    def _pad(self, key: str, values: list) -> torch.Tensor:
        rows = [torch.as_tensor(v) for v in values]
        most = max(len(r) for r in rows)
        shape = self.instance_shapes.get(key)
        limit = shape[0] if shape else self.max_instances
        if limit is not None and most > limit:
            raise ValueError(
                f"an image of the batch has {most} boxes, more than max_instances={limit}. "
                "Raise it, or leave it out to pad to what each batch needs."
            )
        # Integer labels stay exact; everything else is float32, whatever the transform made of it.
        dtype = torch.int64 if key == "cls" else torch.float32
        tail = tuple(shape[1:]) if shape else tuple(rows[0].shape[1:])
        padded = torch.full(
            (len(rows), padded_instances(most) if limit is None else limit, *tail), self.instance_fill, dtype=dtype
        )
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
    if stacked.is_floating_point() or key == "img_size":
        return stacked.float()
    return stacked.long()
