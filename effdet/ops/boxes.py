"""Boxes: areas, intersections, IoU, clipping, the code of a box relative to an anchor, and the letterbox.

The only place that computes an IoU; it takes tensors and numpy arrays alike. Pure functions, in either `_yxyx` (y_min,
x_min, y_max, x_max) or `_xyxy` order; the order is in the name where it matters. Coordinates are pixels, continuous: a
box's width is x_max - x_min. No models, no I/O.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

# A decoded side is at most this many times its anchor's: exp() of an untrained network's output would overflow.
# The limit is detectron2's, box_regression.py: exp(x) <= 1000 / 16.
MAX_LOG_SIDE_RATIO = math.log(1000.0 / 16.0)

# Keeps the logarithm of a degenerate box finite. Source: google/automl, object_detection/faster_rcnn_box_coder.py,
# with the value of rwightman/efficientdet-pytorch.
ENCODE_EPSILON = 1e-7

Array = TypeVar("Array", Tensor, np.ndarray)


def box_area(boxes: Array) -> Array:
    """Return the areas [...] of boxes [..., 4] in either order; negative sides are not corrected."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def common_area(planes1: Sequence[Array], planes2: Sequence[Array]) -> Array:
    """Compute the areas that boxes have in common.

    Args:
        planes1: four arrays, the coordinates of the first boxes, yxyx or xyxy; planes beyond the fourth are not read.
        planes2: those of the second boxes in the same order, of a shape that broadcasts with the first.

    Returns:
        The broadcast shape; 0 where the boxes do not overlap.
    """
    area = _common_side(planes1[0], planes1[2], planes2[0], planes2[2])
    area *= _common_side(planes1[1], planes1[3], planes2[1], planes2[3])
    return area


def _common_side(low1: Array, high1: Array, low2: Array, high2: Array) -> Array:
    if isinstance(low1, Tensor):
        return (torch.minimum(high1, high2) - torch.maximum(low1, low2)).clamp_(min=0)
    return np.maximum(np.minimum(high1, high2) - np.maximum(low1, low2), 0)


def iou_from_areas(common: Array, areas1: Array, areas2: Array) -> Array:
    """Return the IoU of boxes with these areas and this area in common; NaN for two boxes without an area."""
    return common / (areas1 + areas2 - common)


def pairwise_common(boxes1: Array, boxes2: Array) -> Array:
    """Return the area that each pair of boxes has in common: [..., N, 4] and [..., M, 4] in, [..., N, M] out."""
    return common_area([boxes1[..., :, None, k] for k in range(4)], [boxes2[..., None, :, k] for k in range(4)])


@np.errstate(invalid="ignore")  # 0 / 0 of two boxes without an area
def pairwise_iou(boxes1: Array, boxes2: Array) -> Array:
    """Compute the IoU of each pair of boxes; both sets are in the same order, yxyx or xyxy.

    Args:
        boxes1: float [..., N, 4].
        boxes2: float [..., M, 4].

    Returns:
        [..., N, M] in 0..1; 0 where the boxes do not overlap, degenerate boxes included.
    """
    common = pairwise_common(boxes1, boxes2)
    iou = iou_from_areas(common, box_area(boxes1)[..., :, None], box_area(boxes2)[..., None, :])
    library: Any = torch if isinstance(iou, Tensor) else np
    return library.where(common > 0, iou, library.zeros_like(iou))


def clip_boxes_xyxy(boxes: Tensor, size: Tensor) -> Tensor:
    """Clip xyxy boxes to an image.

    Args:
        boxes: float [N, 4] (or [B, N, 4]).
        size: float [2] (or [B, 2]): width, height in pixels.

    Returns:
        A new tensor of the same shape.
    """
    limit = torch.cat((size, size), -1)
    if boxes.dim() == limit.dim() + 1:
        limit = limit.unsqueeze(-2)
    return torch.minimum(boxes.clamp(min=0), limit)


def encode_boxes(
    boxes_yxyx: tuple[Tensor, ...], anchors_yxyx: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Code boxes relative to anchors, coordinate by coordinate.

    Args:
        boxes_yxyx: four broadcastable float tensors y_min, x_min, y_max, x_max.
        anchors_yxyx: the same for the anchors.

    Returns:
        ty, tx, th, tw: the offset of the centres in anchor sides, and the logarithm of the ratio of the sides.

    Source:
        R-CNN, https://arxiv.org/abs/1311.2524, appendix C.
    """
    y_min, x_min, y_max, x_max = boxes_yxyx
    anchor_y_min, anchor_x_min, anchor_y_max, anchor_x_max = anchors_yxyx
    height, width = y_max - y_min, x_max - x_min
    anchor_height, anchor_width = anchor_y_max - anchor_y_min, anchor_x_max - anchor_x_min
    y_shift = (y_min + height / 2) - (anchor_y_min + anchor_height / 2)
    x_shift = (x_min + width / 2) - (anchor_x_min + anchor_width / 2)
    height, width = height + ENCODE_EPSILON, width + ENCODE_EPSILON
    anchor_height, anchor_width = anchor_height + ENCODE_EPSILON, anchor_width + ENCODE_EPSILON
    return (
        y_shift / anchor_height,
        x_shift / anchor_width,
        torch.log(height / anchor_height),
        torch.log(width / anchor_width),
    )


def decode_boxes(deltas: Tensor, anchors_yxyx: Tensor, output_xyxy: bool = False) -> Tensor:
    """Turn deltas relative to anchors back into boxes, the inverse of `encode_boxes`.

    Args:
        deltas: float [..., 4]: ty, tx, th, tw; th and tw are clamped to MAX_LOG_SIDE_RATIO.
        anchors_yxyx: float [..., 4], pixels.
        output_xyxy: return xyxy instead of yxyx.

    Returns:
        [..., 4], pixels.
    """
    anchor_y_min, anchor_x_min, anchor_y_max, anchor_x_max = anchors_yxyx.unbind(-1)
    anchor_height, anchor_width = anchor_y_max - anchor_y_min, anchor_x_max - anchor_x_min
    ty, tx, th, tw = deltas.unbind(-1)
    y_centre = ty * anchor_height + (anchor_y_min + anchor_y_max) / 2
    x_centre = tx * anchor_width + (anchor_x_min + anchor_x_max) / 2
    half_height = torch.exp(th.clamp(max=MAX_LOG_SIDE_RATIO)) * anchor_height / 2
    half_width = torch.exp(tw.clamp(max=MAX_LOG_SIDE_RATIO)) * anchor_width / 2
    y_min, x_min = y_centre - half_height, x_centre - half_width
    y_max, x_max = y_centre + half_height, x_centre + half_width
    return torch.stack((x_min, y_min, x_max, y_max) if output_xyxy else (y_min, x_min, y_max, x_max), -1)


def letterbox_scale(image_hw: tuple[Any, Any], input_hw: Sequence[float]) -> Any:
    """Return the largest scale at which images fit into an input.

    Args:
        image_hw: height and width in pixels: numbers, or arrays [n] for many images.
        input_hw: height and width of the input in pixels.

    Returns:
        Input pixels per image pixel: a number, or an array [n].
    """
    by_height, by_width = input_hw[0] / image_hw[0], input_hw[1] / image_hw[1]
    return np.minimum(by_height, by_width) if isinstance(by_height, np.ndarray) else min(by_height, by_width)


def scaled_hw(image_hw: tuple[int, int], scale: float) -> tuple[int, int]:
    """Return the height and width of a scaled image; a side never becomes 0, whatever the aspect ratio."""
    return max(1, int(image_hw[0] * scale)), max(1, int(image_hw[1] * scale))
