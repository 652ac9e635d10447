"""What was found in one image, and the forms in which other programs want it."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from effdet.checkpoint.io import replacing
from effdet.data.images import read_image
from effdet.ops.nms import IOU_THRESHOLD, batched_nms
from effdet.report.draw import draw_detections

_SHOWN = 5  # objects in a repr


@dataclass(frozen=True, eq=False)
class Detections:
    """The objects found in one image, by falling score; the first four fields have the same length, 0 for no object.

    Args:
        boxes_xyxy: float32 [n, 4], x_min, y_min, x_max, y_max in the image's pixels.
        scores: float32 [n], in 0..1.
        names: class names.
        category_ids: int64 [n], the data set's numbers of the classes.
        size_wh: the image's width and height in pixels.
        path: the image's file; None for one that came without.
    """

    boxes_xyxy: np.ndarray
    scores: np.ndarray
    names: list[str]
    category_ids: np.ndarray
    size_wh: tuple[int, int]
    path: str | None = None

    def __len__(self) -> int:
        return len(self.scores)

    def __repr__(self) -> str:
        where = f"{self.path or 'image'}, {self.size_wh[0]}x{self.size_wh[1]}"
        if not len(self):
            return f"<Detections of {where}: none>"
        rows = zip(
            self.names[:_SHOWN], self.scores.tolist(), self.boxes_xyxy.round().astype(int).tolist(), strict=False
        )
        shown = "; ".join(f"{name} {score:.2f} {box}" for name, score, box in rows)
        return f"<Detections of {where}: {len(self)}: {shown}{'; ...' if len(self) > _SHOWN else ''}>"

    def take(self, which: Any) -> Detections:
        """Return some of the objects, chosen by an index, a slice, or a mask over all of them."""
        rows = np.arange(len(self))[which]
        names = [self.names[row] for row in rows]
        return Detections(
            self.boxes_xyxy[rows], self.scores[rows], names, self.category_ids[rows], self.size_wh, self.path
        )

    def suppress_across_classes(self, iou_threshold: float = IOU_THRESHOLD) -> Detections:
        """Return the objects without those that overlap a better one of whatever class by more than a threshold."""
        boxes, scores = torch.from_numpy(self.boxes_xyxy)[None], torch.from_numpy(self.scores)[None]
        kept, kept_scores = batched_nms(boxes, scores, torch.zeros_like(scores), max(1, len(self)), iou_threshold)
        return self.take(kept[kept_scores >= 0].numpy())

    def draw(self, image: Image.Image | None = None) -> Image.Image:
        """Return the image, RGB, with labelled boxes; None reads it again from `path`.

        Raises:
            ValueError: there is no image: it did not come from a file.
        """
        if image is None and self.path is None:
            raise ValueError("these detections are not of a file: give the image to draw on")
        image = read_image(str(self.path), upright=True) if image is None else image
        return draw_detections(image, self.boxes_xyxy, self.names, self.scores.tolist())

    def save(self, path: str | PathLike[str], image: Image.Image | None = None) -> None:
        """Write what `draw` gives; the suffix, .jpg or .png, says in which format."""
        drawn = self.draw(image)
        with replacing(Path(path)) as temporary:
            drawn.save(temporary, Image.registered_extensions()[Path(path).suffix.lower()])

    def to_coco(self, image_id: int) -> list[dict[str, Any]]:
        """Return rows of a COCO result list; `bbox` is x, y, width, height in pixels."""
        sides = self.boxes_xyxy[:, 2:] - self.boxes_xyxy[:, :2]
        boxes = np.concatenate([self.boxes_xyxy[:, :2], sides], axis=1).astype(float).round(2).tolist()
        rows = zip(self.category_ids.tolist(), boxes, self.scores.tolist(), strict=True)
        return [
            {"image_id": image_id, "category_id": category, "bbox": box, "score": score}
            for category, box, score in rows
        ]

    def to_yolo(self, class_names: list[str], with_scores: bool = True) -> list[str]:
        """Return lines of a YOLO label file: class number, centre x and y, width, height in 0..1, score.

        Args:
            class_names: all classes in the order of their numbers, as `Predictor.class_names` has them.
            with_scores: False leaves the last column out, which files to train on do not have.
        """
        width, height = self.size_wh
        numbers = {name: number for number, name in enumerate(class_names)}
        corners = self.boxes_xyxy.astype(float) / [width, height, width, height]
        centres, sides = (corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]
        values = np.concatenate([centres, sides, self.scores[:, None]], axis=1)[:, : 5 if with_scores else 4]
        return [
            " ".join([str(numbers[name]), *(f"{value:.6f}" for value in row)])
            for name, row in zip(self.names, values, strict=True)
        ]

    def to_supervision(self) -> Any:
        """Return a supervision.Detections, with class names in its data; needs the package supervision."""
        import supervision

        return supervision.Detections(
            xyxy=self.boxes_xyxy.reshape(-1, 4),
            confidence=self.scores,
            class_id=self.category_ids.astype(int),
            data={"class_name": np.array(self.names, dtype=object)},
        )
