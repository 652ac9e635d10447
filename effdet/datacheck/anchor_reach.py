"""Which boxes the anchors can learn: those that an anchor overlaps with IoU 0.5 or more; and settings that reach more.

A box below that is matched with its best anchor all the same, but with that one only, and poorly. Boxes here are where
the letterbox of the evaluation puts them; a training that scales images at random sees them smaller and larger.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from effdet.anchors import Anchors
from effdet.config.model_spec import ModelSpec
from effdet.ops.boxes import box_area, letterbox_scale
from effdet.ops.labels import MATCH_IOU
from effdet.ops.labels_cpu import SparseMatcher
from effdet.ops.sizes import IMAGE_STRIDE

SIDE_EDGES_PX = (0, 4, 8, 16, 32, 64, 128, 256, 512, np.inf)  # of the square root of a box's area
_CHUNK = 4096  # boxes matched at a time
_SCALES = (1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0)
_SIZE_FACTORS = (1.25, 1.5, 2.0)
_LARGEST_SIDE_PX = 1536  # of a square input; others may have as many pixels, and as long a side as the images
_OTHER_SHAPE = 0.1  # of the input: how much less padding makes another shape worth a try
_STRIDES = (
    128,
    64,
    IMAGE_STRIDE,
)  # of sides to offer: the pyramid's coarsest, or what is small enough beside the input
_ENOUGH = 0.98  # share from which on nothing else is tried
_WORTH = 0.02  # points of share that make a change worth it, and a larger input worth a line
_EQUAL = 0.005  # shares this close count as equal


@dataclass(frozen=True)
class Candidate:
    """A setting that was tried: the share of boxes it reaches, and its arithmetic relative to the present setting's."""

    flags: str  # of train.py; empty for the present setting
    share: float
    cost: float = 1.0
    settings: dict[str, Any] = field(default_factory=dict)  # the same as fields of the model section


@dataclass(frozen=True)
class Suggestion:
    """The present setting, what was tried and is better (cheapest first), and the one without cost to take, if any.

    `padding` is the share of the input that is padding, the mean over the images of the boxes; `fitting_size` is height
    and width of an input at equal cost that has clearly less of it, empty when there is none.
    """

    present: Candidate
    better: tuple[Candidate, ...]
    take: Candidate | None
    boxes: int  # how many each was tried on
    padding: float
    fitting_size: tuple[int, ...]


def letterbox_boxes(boxes_yxyx: np.ndarray, sizes_wh: np.ndarray, input_hw: Sequence[int]) -> np.ndarray:
    """Scale boxes as the letterbox does: boxes [n, 4] and their images' sizes [n, 2] in, float32 [n, 4] out."""
    scale = letterbox_scale((sizes_wh[:, 1], sizes_wh[:, 0]), input_hw)
    return (boxes_yxyx * scale[:, None]).astype(np.float32)


def sides_px(boxes_yxyx: np.ndarray) -> np.ndarray:
    """Return the square root of each box's area."""
    return np.sqrt(box_area(boxes_yxyx))


def find_reached(boxes_yxyx: np.ndarray, config: Any) -> np.ndarray:
    """Tell for each box [n, 4] in pixels of the network input whether an anchor of a model config reaches it."""
    anchors = Anchors.from_config(config)
    matcher = SparseMatcher(anchors.boxes, anchors.level_sizes, anchors.get_anchors_per_location())
    parts = [matcher.reached(boxes_yxyx[at : at + _CHUNK], MATCH_IOU) for at in range(0, len(boxes_yxyx), _CHUNK)]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=bool)


def suggest_anchors(boxes_yxyx: np.ndarray, sizes_wh: np.ndarray, config: Any, keep_shape: bool = False) -> Suggestion:
    """Try other anchor sizes and aspect ratios, then other inputs if need be, and say which reach more boxes.

    Args:
        boxes_yxyx: float [n, 4], n >= 1, pixels of the original images; two thousand are enough.
        sizes_wh: width and height of the image of each box, [n, 2].
        config: the model config.
        keep_shape: offer no input of the same cost but another shape.
    """

    def try_setting(image_size: Sequence[int], scale: Any, ratios: Sequence[Any]) -> float:
        tried = ModelSpec({**config, "image_size": image_size, "anchor_scale": scale, "aspect_ratios": ratios})
        return float(find_reached(letterbox_boxes(boxes_yxyx, sizes_wh, image_size), tried).mean())

    def best_scale(image_size: Sequence[int], ratios: Sequence[Any]) -> tuple[float, Any]:
        """Return share and scale: of those about as good as the best, the one nearest to the present scale."""
        now = config.anchor_scale
        scales = _SCALES
        if isinstance(now, (int, float)):  # one number for all levels
            scales = sorted(_SCALES, key=lambda scale: abs(np.log(scale / now)))
        shares = [(try_setting(image_size, scale, ratios), scale) for scale in (now, *scales)]
        return next(pair for pair in shares if pair[0] >= max(shares)[0] - _EQUAL)

    size, ratios = tuple(config.image_size), list(config.aspect_ratios)
    fitted = fit_ratios(boxes_yxyx, len(ratios))
    shape = () if keep_shape else fit_shape(sizes_wh, size)
    present = take = Candidate("", try_setting(size, config.anchor_scale, ratios))
    tried: list[Candidate] = []

    def add_tried(image_size: tuple[int, ...], new_ratios: Sequence[float]) -> None:
        share, scale = best_scale(image_size, new_ratios or ratios)
        cost = image_size[0] * image_size[1] / (size[0] * size[1])
        tried.append(_candidate(config, share, scale, new_ratios, image_size if image_size != size else (), cost))

    if present.share < _ENOUGH:
        for image_size in (size, shape) if shape else (size,):
            for new_ratios in ([], fitted) if fitted else ([],):
                add_tried(image_size, new_ratios)
    for candidate in tried:  # the simpler change first
        if candidate.share >= take.share + _WORTH:
            take = candidate
    if take.share < _ENOUGH:
        longest = max(_LARGEST_SIDE_PX, float(np.median(sizes_wh.max(axis=1))))
        for larger in _larger_sizes(size, longest):
            add_tried(larger, [])
        for larger in _larger_shapes(sizes_wh, size, longest) if shape else ():
            add_tried(larger, fitted)
    better: list[Candidate] = []
    for one in sorted(tried, key=lambda one: round(one.cost, 1)):  # what reaches no more than cheaper ones is no line
        cheaper = max([present.share, *(other.share for other in better)])
        if one.share > cheaper + (_WORTH if one.cost > 1 else _EQUAL):
            better.append(one)
    padding = padding_share(sizes_wh, size)
    return Suggestion(present, tuple(better), take if take.flags else None, len(boxes_yxyx), padding, shape)


def padding_share(sizes_wh: np.ndarray, input_hw: Sequence[int]) -> float:
    """Return the share of the network's input that the letterbox fills up, the mean over images [n, 2]."""
    scale = letterbox_scale((sizes_wh[:, 1], sizes_wh[:, 0]), input_hw)
    return float(1 - (sizes_wh.prod(axis=1) * scale**2).mean() / (input_hw[0] * input_hw[1]))


def fit_shape(sizes_wh: np.ndarray, input_hw: Sequence[int]) -> tuple[int, ...]:
    """Return the height and width of about as many pixels that have the shape of most images, if that is another one.

    Args:
        sizes_wh: width and height of the images, [n, 2].
        input_hw: the present height and width.
    """
    area = input_hw[0] * input_hw[1]
    stride = _stride_of(area)
    height = max(1, round(np.sqrt(area / _aspect(sizes_wh)) / stride)) * stride
    shape = height, max(1, int(area / height / stride)) * stride
    gain = padding_share(sizes_wh, input_hw) - padding_share(sizes_wh, shape)
    return shape if gain >= _OTHER_SHAPE else ()


def _aspect(sizes_wh: np.ndarray) -> float:
    return float(np.exp(np.median(np.log(sizes_wh[:, 0] / sizes_wh[:, 1]))))


def _stride_of(area: float) -> int:
    return next((stride for stride in _STRIDES if 4 * stride <= np.sqrt(area)), IMAGE_STRIDE)


def fit_ratios(boxes_yxyx: np.ndarray, count: int) -> list[float]:
    """Return the width / height in the middle of each of `count` equal parts of the boxes; empty if two are equal."""
    sides = boxes_yxyx[:, 2:] - boxes_yxyx[:, :2]
    logs = np.log(sides[:, 1] / sides[:, 0])
    ratios = [round(float(np.exp(value)), 2) for value in np.quantile(logs, (np.arange(count) + 0.5) / count)]
    return ratios if len(set(ratios)) == count and min(ratios) > 0 else []


def _larger_sizes(size: tuple[int, ...], longest: float) -> list[tuple[int, ...]]:
    sizes = [tuple(round(side * factor / IMAGE_STRIDE) * IMAGE_STRIDE for side in size) for factor in _SIZE_FACTORS]
    return [
        larger
        for larger in dict.fromkeys(sizes)
        if larger > size and max(larger) <= longest + IMAGE_STRIDE and np.prod(larger) <= _LARGEST_SIDE_PX**2
    ]


def _larger_shapes(sizes_wh: np.ndarray, size: tuple[int, ...], longest: float) -> list[tuple[int, ...]]:
    """Return larger inputs of the images' shape, height and width."""
    aspect, found = _aspect(sizes_wh), []
    for factor in _SIZE_FACTORS:
        area = size[0] * size[1] * factor**2
        stride = _stride_of(area)
        height = max(1, round(np.sqrt(area / aspect) / stride)) * stride
        shape = height, max(1, round(height * aspect / stride)) * stride
        if np.prod(size) < np.prod(shape) <= _LARGEST_SIDE_PX**2 and max(shape) <= longest + stride:
            found.append(shape)
    return list(dict.fromkeys(found))


def _candidate(
    config: Any, share: float, scale: Any, ratios: Sequence[float] = (), size: Sequence[int] = (), cost: float = 1.0
) -> Candidate:
    words, settings = [], {}
    if size:
        settings["image_size"] = list(size)
        words.append("--image-size " + (f"{size[0]}" if size[0] == size[1] else f"{size[0]} {size[1]}"))
    if scale != config.anchor_scale:
        settings["anchor_scale"] = scale
        words.append(f"--anchor-scale {scale:g}")
    if ratios:
        settings["aspect_ratios"] = list(ratios)
        words.append("--aspect-ratios " + ",".join(f"{ratio:g}" for ratio in ratios))
    return Candidate(" ".join(words), share, cost, settings)
