"""What an evaluation asks of a dataset: its parser, the images it covers, the ground truth, the category ids.

Datasets of one's own are read too: attributes are looked for, classes are not.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
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
    """Return the parsed COCO json behind a parser, from whichever of its attributes has it.

    The targets of a parser without one, as of another format than COCO's, are put into that form.
    """
    if callable(getattr(parser, "coco_dict", None)):
        return parser.coco_dict()
    if getattr(parser, "coco", None) is not None:
        return parser.coco.dataset
    if getattr(parser, "ann_path", None):
        with open(parser.ann_path, encoding="utf-8") as file:
            return json.load(file)
    if hasattr(parser, "get_ann_info") and hasattr(parser, "cat_dicts"):
        return _read_targets(parser)
    raise ValueError(
        f"{type(parser).__name__} has no ground truth: give it `coco_dict()` (the parsed COCO json), `coco` "
        "(a pycocotools COCO object), `ann_path` (path of the json), or `get_ann_info(idx)` and `cat_dicts`"
    )


def _read_targets(parser: Any) -> dict[str, Any]:
    ids = category_ids(parser, [row["id"] for row in parser.cat_dicts]).tolist()
    annotations = []
    for index, image_id in enumerate(parser.img_ids):
        target = parser.get_ann_info(index)
        boxes = np.asarray(target["bbox"], dtype=np.float64).reshape(-1, 4)
        if getattr(parser, "yxyx", True):
            boxes = boxes[:, [1, 0, 3, 2]]
        boxes_xywh = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
        annotations += [
            {"image_id": plain_id(image_id), "category_id": ids[int(label) - 1], "bbox": box}
            for label, box in zip(target["cls"], boxes_xywh.tolist(), strict=True)
            if label > 0
        ]
    categories = [{"id": ids[row["id"] - 1], "name": row["name"]} for row in parser.cat_dicts]
    images = [{"id": plain_id(image_id)} for image_id in parser.img_ids]
    return {"images": images, "annotations": annotations, "categories": categories}


def category_ids(parser: Any, known_ids: Collection[int]) -> np.ndarray:
    """Return the category id of each class_idx as an integer array.

    By the parser's `category_map`, else by turning round its `cat_id_to_label`, where the ids are numbers; a parser
    with neither has category ids as labels, as effdet has.

    Args:
        parser: see `find_parser`.
        known_ids: category ids of the ground truth.
    """
    category_map = getattr(parser, "category_map", None)
    if category_map is not None:
        return np.asarray(category_map.idx_to_id)
    label_of = getattr(parser, "cat_id_to_label", None) or {}
    if not label_of or not all(isinstance(category_id, (int, np.integer)) for category_id in label_of):
        return np.arange(1, max(label_of.values() or known_ids, default=0) + 1)
    ids = np.full(max(label_of.values()), -1, dtype=np.int64)
    ids[np.array(list(label_of.values())) - 1] = list(label_of)
    return ids
