"""Numbers of a data set for a report: images, boxes by class, their sizes as the network sees them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from effdet.ops.boxes import letterbox_scale

SIZE_EDGES_PX = tuple(2.0 ** (k / 2) for k in range(4, 23))  # 4, 5.7, 8 ... 2048; two bins for each doubling


def describe_dataset(dataset: Any, image_size: Sequence[int]) -> dict[str, Any]:
    """Count what a data set holds.

    Args:
        dataset: a DetectionDatset, or a subset of one, with a `parser`.
        image_size: height and width of the network's input in pixels.

    Returns:
        'images', 'empty' (without a box), 'boxes', 'crowd' (regions), 'per_image' (counts of images with 0, 1,
        2 ... boxes, the last entry for 20 and more), 'sizes' (boxes by the square root of their area after resizing,
        between SIZE_EDGES_PX, beyond them in the first and last bin), 'boxes_of' (by category id), 'image_sizes'
        (smallest, median and largest width and height).
    """
    parser = dataset.parser
    table = parser.box_table()
    infos = parser.img_infos
    sizes_wh = np.array([(info["width"], info["height"]) for info in infos], dtype=np.float64).reshape(-1, 2)
    single = ~table["crowd"]
    image_of, boxes = table["img_idx"][single], table["bbox"][single].astype(np.float64)
    per_image = np.bincount(image_of, minlength=len(sizes_wh)) if len(sizes_wh) else np.zeros(0, dtype=np.int64)
    factor = letterbox_scale((sizes_wh[:, 1], sizes_wh[:, 0]), image_size)
    sides_px = np.sqrt(np.prod(boxes[:, 2:] - boxes[:, :2], axis=1).clip(0)) * factor[image_of]
    bins = np.clip(np.searchsorted(SIZE_EDGES_PX, sides_px, side="right") - 1, 0, len(SIZE_EDGES_PX) - 2)
    ids, counts = np.unique(table["category_id"][single], return_counts=True)
    return {
        "images": len(sizes_wh),
        "empty": int((per_image == 0).sum()),
        "boxes": len(boxes),
        "crowd": int(table["crowd"].sum()),
        "per_image": np.bincount(per_image.clip(max=20), minlength=21).tolist(),
        "sizes": np.bincount(bins, minlength=len(SIZE_EDGES_PX) - 1).tolist(),
        "boxes_of": dict(zip(ids.tolist(), counts.tolist(), strict=True)),
        "image_sizes": [
            [int(value) for value in part]
            for part in (sizes_wh.min(axis=0), np.median(sizes_wh, axis=0), sizes_wh.max(axis=0))
        ]
        if len(sizes_wh)
        else [],
    }
