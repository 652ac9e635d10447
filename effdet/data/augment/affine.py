"""Move an image by an affine map, and its boxes with it."""

import math
from typing import Any

import numpy as np
from PIL import Image

Matrix = tuple[float, float, float, float, float, float]
"""(a, b, c, d, e, f): the output's point (x, y) shows the input's point (a x + b y + c, d x + e y + f)."""


def translation(dx: float, dy: float) -> Matrix:
    """Show at each point what was (dx, dy) pixels to the right and below."""
    return 1, 0, dx, 0, 1, dy


def shear_x(amount: float) -> Matrix:
    """Shift each row by `amount` times its distance from the top."""
    return 1, amount, 0, 0, 1, 0


def shear_y(amount: float) -> Matrix:
    """Shift each column by `amount` times its distance from the left."""
    return 1, 0, 0, amount, 1, 0


def rotation(degrees: float, size_wh: tuple[int, int]) -> Matrix:
    """Turn an image of this size around its middle."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = size_wh[0] / 2, size_wh[1] / 2
    return cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y


def warp_image(img: Image.Image, matrix: Matrix, fill_color: tuple[int, int, int]) -> Image.Image:
    """Return the image after the map, of the same size; `fill_color` is where the map leads out of it."""
    whole_pixels = matrix[:2] == (1, 0) and matrix[3:5] == (0, 1) and all(float(v).is_integer() for v in matrix)
    method = Image.Resampling.NEAREST if whole_pixels else Image.Resampling.BILINEAR
    return img.transform(img.size, Image.Transform.AFFINE, matrix, method, fillcolor=fill_color)


def warp_boxes(boxes_yxyx: np.ndarray, matrix: Matrix, size_wh: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Move boxes as `warp_image` moves what they hold.

    Args:
        boxes_yxyx: float32 [n, 4] in pixels; n may be 0.
        matrix: the map.
        size_wh: (width, height) of the image.

    Returns:
        float32 [n, 4], around what of each moved box is inside the image; bool [n], False where nothing is.
    """
    a, b, c, d, e, f = matrix
    back = np.linalg.inv(np.array([[a, b], [d, e]]))
    y0, x0, y1, x1 = boxes_yxyx.astype(np.float64).T
    corners = np.stack([np.stack([x0, x1, x1, x0], 1), np.stack([y0, y0, y1, y1], 1)], -1)  # [n, 4, xy]
    moved = (corners - (c, f)) @ back.T
    limits = np.array(size_wh, dtype=np.float64)
    low, high = moved.min(1), moved.max(1)
    for k in np.flatnonzero(((low < 0) | (high > limits)).any(1)):
        part = _clip_polygon(moved[k].tolist(), size_wh)
        low[k], high[k] = (np.min(part, 0), np.max(part, 0)) if part else (0, 0)
    boxes = np.concatenate([low[:, ::-1], high[:, ::-1]], 1).astype(np.float32).reshape(-1, 4)
    return boxes, (boxes[:, :2] < boxes[:, 2:]).all(1)


def _clip_polygon(points: list[list[float]], size_wh: tuple[int, int]) -> list[list[float]]:
    """Cut a convex polygon to an image, side by side of the image.

    Source: Sutherland and Hodgman, Reentrant polygon clipping, 1974.
    """
    for axis in (0, 1):
        for sign, limit in ((1, 0.0), (-1, -float(size_wh[axis]))):  # keep where sign * coordinate >= limit
            kept = []
            for start, end in zip(points, points[1:] + points[:1], strict=True):
                from_limit, to_limit = sign * start[axis] - limit, sign * end[axis] - limit
                if from_limit >= 0:
                    kept.append(start)
                if (from_limit < 0) != (to_limit < 0):
                    share = from_limit / (from_limit - to_limit)
                    crossing = [s + share * (t - s) for s, t in zip(start, end, strict=True)]
                    crossing[axis] = sign * limit
                    kept.append(crossing)
            points = kept
    return points


def warp(
    img: Image.Image, target: dict[str, Any], matrix: Matrix, fill_color: tuple[int, int, int]
) -> tuple[Image.Image, dict[str, Any]]:
    """Move an image and the boxes of its target; boxes of which nothing is left go, with their labels."""
    if "bbox" in target:
        boxes, keep = warp_boxes(target["bbox"], matrix, img.size)
        target = dict(target, bbox=boxes[keep], cls=target["cls"][keep])
    return warp_image(img, matrix, fill_color), target
