"""Sizes in pixels: of the network's input and of its feature maps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral

IMAGE_STRIDE = 32  # the coarsest feature map of the backbones


def to_height_width(image_size: int | Sequence[int]) -> tuple[int, int]:
    """Return (height, width); one number, as in older code for effdet, is a square."""
    sides = [image_size, image_size] if isinstance(image_size, (int, Integral)) else list(image_size)
    if len(sides) != 2 or min(sides) <= 0:
        raise ValueError(
            "image_size must be (height, width), two positive numbers of pixels, or one for a square; got "
            f"{image_size}."
        )
    return int(sides[0]), int(sides[1])


def get_feat_sizes(image_size: int | Sequence[int], max_level: int) -> list[tuple[int, int]]:
    """Return (height, width) of the feature map at each level 0..max_level; each halves the one before, rounding up."""
    sizes = [to_height_width(image_size)]
    for _ in range(max_level):
        height, width = sizes[-1]
        sizes.append(((height - 1) // 2 + 1, (width - 1) // 2 + 1))
    return sizes


def check_image_size(image_size: int | Sequence[int]) -> tuple[int, int]:
    """Return (height, width) of a network input after checking that it fits the backbone's stride.

    Args:
        image_size: (height, width) in pixels, or one number for a square.

    Raises:
        ValueError: not two positive integers, or a side that is not a multiple of IMAGE_STRIDE; the nearest valid
            sizes are named.
    """
    sides = to_height_width(image_size)
    if any(side % IMAGE_STRIDE for side in sides):
        lower = tuple(max(IMAGE_STRIDE, side // IMAGE_STRIDE * IMAGE_STRIDE) for side in sides)
        upper = tuple(math.ceil(side / IMAGE_STRIDE) * IMAGE_STRIDE for side in sides)
        raise ValueError(
            f"image_size {sides} (height, width) does not fit the network's stride: each side must "
            f"be a multiple of {IMAGE_STRIDE}. The nearest valid sizes are {lower} and {upper}."
        )
    return sides


def nearest_image_size(image_size: Sequence[int], scale: float) -> tuple[int, int]:
    """Return the valid input size nearest to `scale` times the given one, both (height, width) in pixels."""
    height, width = (max(IMAGE_STRIDE, round(side * scale / IMAGE_STRIDE) * IMAGE_STRIDE) for side in image_size)
    return height, width
