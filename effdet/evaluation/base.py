"""Predictions of all processes, collected batch by batch: what every evaluator is made of.

What must not live here: the metrics (metrics/), what a data set knows of its ground truth (evaluator.py).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
import torch

from effdet.runtime.distributed import gather_object, is_distributed, run_on_primary

_logger = logging.getLogger("effdet.evaluator")
_T = TypeVar("_T")

# Image indices ride in the float32 tensor of the detections; above this a float32 skips integers.
_MAX_EXACT_INDEX = 2**24


class Evaluator:
    """Collect predictions batch by batch, and gather them on rank 0.

    `evaluate` and `save` of a distributed evaluator are collectives: call them on every rank.

    Args:
        distributed: whether the batches are spread over the ranks of the running process group. Ranks may hold
            any number of images, also none; an image that several ranks predicted counts once.
        pred_yxyx: whether predicted boxes are y_min, x_min, y_max, x_max instead of x first.
    """

    stats: Mapping[str, float] = {}  # what the last evaluation came to, by name
    is_hopeless = False  # True: there are no numbers to be had any more, evaluate() will say why

    def __init__(self, distributed: bool = False, pred_yxyx: bool = False) -> None:
        self.distributed = distributed
        self.pred_yxyx = pred_yxyx
        self.img_indices: list[int] = []
        self.predictions: list[np.ndarray] = []  # per image: float32 [D, 6] as it was given, padding included

    def reset(self) -> None:
        """Forget the collected predictions; the numbers of the last evaluation stay readable."""
        self.img_indices = []
        self.predictions = []

    def add_predictions(self, detections: torch.Tensor, target: Mapping[str, Any]) -> None:
        """Add one batch, with one copy from the device to the host and no communication.

        Args:
            detections: [B, D, 6] rows of box (pixels of the original image), score, class (1-based); rows with a
                score of 0 are padding and never count, rows that are not finite do not either, with a warning.
            target: has 'img_idx', [B] integers: each image's place in `dataset.parser.img_ids`.

        Raises:
            ValueError: shapes that do not fit the above.
        """
        if detections.dim() != 3 or detections.size(2) != 6:
            raise ValueError(
                f"detections have shape {list(detections.shape)}: must be [batch, detections, 6] with "
                "rows x_min, y_min, x_max, y_max, score, class"
            )
        indices = torch.as_tensor(target["img_idx"]).reshape(-1)
        if len(indices) != len(detections):
            raise ValueError(
                f"target['img_idx'] has {len(indices)} entries for {len(detections)} images of "
                "detections: must be one per image"
            )
        flat = detections.detach().flatten(1).to(torch.float32)
        if indices.device == flat.device:
            packed = torch.cat([flat, indices.to(torch.float32)[:, None]], dim=1).cpu().numpy()
            flat, indices = packed[:, :-1], packed[:, -1].astype(np.int64)
        else:  # one of the two is on the host already
            flat, indices = flat.cpu().numpy(), indices.cpu().numpy()
        self._check_indices(indices)
        for index, rows in zip(indices.tolist(), flat.reshape(detections.shape), strict=True):
            self.img_indices.append(index)
            self.predictions.append(rows)
        bad = int(len(flat) * detections.size(1) - np.isfinite(flat.reshape(-1, 6)).all(axis=1).sum())
        if bad:
            _logger.warning("%d predicted rows are NaN or infinite and do not count: check the weights", bad)

    def evaluate(self, output_result_file: str | os.PathLike[str] = "") -> float:
        """Compute the metric over all that was added since the last call."""
        raise NotImplementedError(f"{type(self).__name__} must define evaluate")

    def save(self, result_file: str | os.PathLike[str]) -> None:
        """Write the collected predictions to a file."""
        raise NotImplementedError(f"{type(self).__name__} must define save")

    def _check_indices(self, indices: np.ndarray) -> None:
        """Refuse image indices that no dataset can have; a subclass knows the dataset and checks more."""
        if len(indices) and (indices.min() < 0 or indices.max() >= _MAX_EXACT_INDEX):
            raise ValueError(
                f"target['img_idx'] spans {indices.min()}..{indices.max()}: must be within 0..{_MAX_EXACT_INDEX - 1}"
            )

    def _image_id(self, index: int) -> Any:
        """Return what tells one image from another; a subclass that knows the dataset returns its image id."""
        return index

    def _is_bad(self, index: int) -> bool:
        """Tell whether an image could not be read, so that nothing counts as found in it."""
        return False

    def _detections(self, index: int, rows: np.ndarray) -> np.ndarray:
        """Return what counts of an image's predictions: float32 [n, 6] with x first, no padding."""
        kept = rows[np.isfinite(rows).all(axis=1) & (rows[:, 4] > 0)]
        if self._is_bad(index):
            kept = kept[:0]
        if self.pred_yxyx:
            kept[:, :4] = kept[:, [1, 0, 3, 2]]
        return kept

    def _gather(self) -> list[Any]:
        """Collect (img_indices, detections that count) of every rank on rank 0, in rank order; empty on the others."""
        shard = (self.img_indices, list(map(self._detections, self.img_indices, self.predictions)))
        return (gather_object(shard) or []) if self._spread else [shard]

    def _merge(self, shards: list[Any]) -> dict[Any, np.ndarray]:
        """Return the predictions by image id, each image once."""
        merged: dict[Any, np.ndarray] = {}
        for indices, predictions in shards:
            for index, rows in zip(indices, predictions, strict=True):
                merged.setdefault(self._image_id(index), rows)
        repeats = sum(len(indices) for indices, _ in shards) - len(merged)
        if repeats:
            _logger.info("%d images were predicted more than once; their first prediction counts", repeats)
        return merged

    @property
    def _spread(self) -> bool:
        return self.distributed and is_distributed()

    def _on_primary(self, fn: Callable[[], _T], interruptible: bool = False) -> _T:
        return run_on_primary(fn, interruptible) if self._spread or not is_distributed() else fn()
