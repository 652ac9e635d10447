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
from effdet.ops.boxes import box_area
from effdet.ops.labels import MATCH_IOU
from effdet.ops.labels_cpu import SparseMatcher
from effdet.ops.sizes import IMAGE_STRIDE, letterbox_scale

SIDE_EDGES_PX = (0, 4, 8, 16, 32, 64, 128, 256, 512, np.inf)  # of the square root of a box's area
_CHUNK = 4096  # boxes matched at a time
_SCALES = (1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0)
_SIZE_FACTORS = (1.25, 1.5, 2.0)
_LARGEST_SIDE_PX = 1536
_ENOUGH = 0.98  # share from which on nothing else is tried
_WORTH = 0.02  # points of share that make a change worth it
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
    """The present setting, what was tried and is better (cheapest first), and the one without cost to take, if any."""

    present: Candidate
    better: tuple[Candidate, ...]
    take: Candidate | None
    boxes: int  # how many each was tried on


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


def suggest_anchors(boxes_yxyx: np.ndarray, sizes_wh: np.ndarray, config: Any) -> Suggestion:
    """Try other anchor sizes and aspect ratios, then larger inputs if need be, and say which reach more boxes.

    Args:
        boxes_yxyx: float [n, 4], n >= 1, pixels of the original images; two thousand are enough.
        sizes_wh: width and height of the image of each box, [n, 2].
        config: the model config.
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
    present = take = Candidate("", try_setting(size, config.anchor_scale, ratios))
    tried = []
    if present.share < _ENOUGH:
        share, scale = best_scale(size, ratios)
        tried.append(_candidate(config, share, scale))
        fitted = fit_ratios(boxes_yxyx, len(ratios))
        if fitted:
            share, scale = best_scale(size, fitted)
            tried.append(_candidate(config, share, scale, fitted))
    for candidate in tried:  # the simpler change first
        if candidate.share >= take.share + _WORTH:
            take = candidate
    for larger in _larger_sizes(size) if take.share < _ENOUGH else ():
        share, scale = best_scale(larger, ratios)
        cost = larger[0] * larger[1] / (size[0] * size[1])
        tried.append(_candidate(config, share, scale, size=larger, cost=cost))
    better = []
    for one in tried:  # cheapest and simplest first; what reaches no more than the ones before is not worth a line
        if one.share > max([present.share, *(other.share for other in better)]) + _EQUAL:
            better.append(one)
    return Suggestion(present, tuple(better), take if take.flags else None, len(boxes_yxyx))


def fit_ratios(boxes_yxyx: np.ndarray, count: int) -> list[float]:
    """Return the width / height in the middle of each of `count` equal parts of the boxes; empty if two are equal."""
    sides = boxes_yxyx[:, 2:] - boxes_yxyx[:, :2]
    logs = np.log(sides[:, 1] / sides[:, 0])
    ratios = [round(float(np.exp(value)), 2) for value in np.quantile(logs, (np.arange(count) + 0.5) / count)]
    return ratios if len(set(ratios)) == count and min(ratios) > 0 else []


def _larger_sizes(size: tuple[int, int]) -> list[tuple[int, int]]:
    sizes = [tuple(round(side * factor / IMAGE_STRIDE) * IMAGE_STRIDE for side in size) for factor in _SIZE_FACTORS]
    return [larger for larger in dict.fromkeys(sizes) if larger > size and max(larger) <= _LARGEST_SIDE_PX]


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
