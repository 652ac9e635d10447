"""What an evaluation asks of a dataset: its parser, the images it covers, the ground truth, the category ids.

Datasets of one's own are read too: attributes are looked for, classes are not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def find_parser(dataset: Any) -> Any:
    """Return the annotation parser of a dataset, looking through subset wrappers."""
    layer = dataset
    while layer is not None:
        if getattr(layer, "parser", None) is not None:
            return layer.parser
        layer = getattr(layer, "dataset", None)
    raise ValueError(
        f"{type(dataset).__name__} has no `parser`: the evaluator needs dataset.parser with `img_ids` (image id of "
        "each img_idx) and the ground truth as `coco_dict()`, `coco` or `ann_path`"
    )


def covered_img_ids(dataset: Any, parser: Any) -> set[Any] | None:
    """Return the image ids a subset (SkipSubset, torch's Subset, nested) holds, None for a whole dataset."""
    own_ids = getattr(dataset, "img_ids", None)
    if own_ids is not None:
        return {plain_id(image_id) for image_id in own_ids}
    indices: list[int] | None = None
    while hasattr(dataset, "indices") and hasattr(dataset, "dataset"):
        layer = list(dataset.indices)
        indices = layer if indices is None else [layer[i] for i in indices]
        dataset = dataset.dataset
    return None if indices is None else {plain_id(parser.img_ids[i]) for i in indices}


def plain_id(value: Any) -> Any:
    """Turn a numpy or torch scalar (an id, usually) into the Python value that json can write."""
    return value.item() if isinstance(value, (np.generic, torch.Tensor)) else value


def load_ground_truth(parser: Any) -> Mapping[str, Any]:
    """Return the parsed COCO json behind a parser, from whichever of its attributes has it."""
    if callable(getattr(parser, "coco_dict", None)):
        return parser.coco_dict()
    if getattr(parser, "coco", None) is not None:
        return parser.coco.dataset
    if getattr(parser, "ann_path", None):
        with open(parser.ann_path, encoding="utf-8") as file:
            return json.load(file)
    raise ValueError(
        f"{type(parser).__name__} has no ground truth: give it `coco_dict()` (the parsed COCO json), `coco` "
        "(a pycocotools COCO object) or `ann_path` (path of the json)"
    )


def category_ids(parser: Any) -> np.ndarray:
    """Return the category id of each class_idx as an integer array."""
    category_map = getattr(parser, "category_map", None)
    if category_map is not None:
        return np.asarray(category_map.idx_to_id)
    cat_ids = getattr(parser, "cat_ids", None)
    if cat_ids is None:
        raise ValueError(
            f"{type(parser).__name__} has neither `category_map` nor `cat_ids`: the evaluator cannot tell "
            "the category ids of the predicted classes"
        )
    if getattr(parser, "cat_ids_as_labels", False):
        return np.arange(1, max(cat_ids, default=0) + 1)
    return np.array(sorted(cat_ids), dtype=np.int64)
