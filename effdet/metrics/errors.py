"""Which objects a detector finds, mixes up or misses at one score threshold: confusion matrix and worst images.

Lives here: numpy on plain arrays in one process. Boxes are xyxy in an image's pixels; classes are positions in the
sorted list of category ids.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from effdet.ops.boxes import box_area, pairwise_common, pairwise_iou

from .voc import MATCH_IOU

RIGHT, CONFUSED, WRONG = 0, 1, 2  # of a prediction: class and place, place only, neither; of an object: WRONG = missed


class Matches(NamedTuple):
    """How the predictions of one image meet its objects.

    Args:
        object_of: int [N], for each prediction the object it was matched with, -1 for none.
        prediction_state: int [N], RIGHT, CONFUSED or WRONG; -1 for one inside a crowd region, which does not count.
        object_state: int [M], RIGHT, CONFUSED or WRONG (missed).
    """

    object_of: np.ndarray
    prediction_state: np.ndarray
    object_state: np.ndarray


def match_image(
    objects_xyxy: np.ndarray,
    object_classes: np.ndarray,
    predicted_xyxy: np.ndarray,
    predicted_classes: np.ndarray,
    crowds_xyxy: np.ndarray | None = None,
) -> Matches:
    """Match predictions with objects at IoU 0.5, each at most once.

    First, by falling score, each prediction takes the free object of its class that it overlaps most; what is left of
    both sides is then matched without regard to classes.

    Args:
        objects_xyxy: [M, 4].
        object_classes: [M].
        predicted_xyxy: [N, 4], by falling score.
        predicted_classes: [N].
        crowds_xyxy: [C, 4], regions in which predictions without an object do not count; None for none.
    """
    object_of = np.full(len(predicted_xyxy), -1)
    taken = np.zeros(len(objects_xyxy), dtype=bool)
    state = np.full(len(predicted_xyxy), WRONG)
    if len(objects_xyxy) and len(predicted_xyxy):
        overlap = pairwise_iou(predicted_xyxy, objects_xyxy)
        overlap[overlap < MATCH_IOU] = 0.0
        same = np.where(predicted_classes[:, None] == object_classes[None, :], overlap, 0.0)
        for found_state, table in ((RIGHT, same), (CONFUSED, overlap)):
            for n in np.flatnonzero(table.any(axis=1)):
                if object_of[n] >= 0:
                    continue
                row = np.where(taken, 0.0, table[n])
                best = int(row.argmax())
                if row[best] > 0:
                    object_of[n], taken[best], state[n] = best, True, found_state
    if crowds_xyxy is not None and len(crowds_xyxy) and (state == WRONG).any():
        inside = pairwise_common(predicted_xyxy, crowds_xyxy) / np.maximum(box_area(predicted_xyxy), 1e-9)[:, None]
        state[(state == WRONG) & (inside.max(axis=1) >= MATCH_IOU)] = -1
    object_state = np.full(len(objects_xyxy), WRONG)
    matched = object_of >= 0
    object_state[object_of[matched]] = state[matched]
    return Matches(object_of, state, object_state)


@dataclass
class ImageErrors:
    """One image's objects and predictions, with what became of them."""

    image_id: Any
    objects_xyxy: np.ndarray
    object_classes: np.ndarray
    predicted_xyxy: np.ndarray
    predicted_classes: np.ndarray
    scores: np.ndarray
    matches: Matches

    @property
    def missed(self) -> int:
        """Objects that no prediction found."""
        return int((self.matches.object_state == WRONG).sum())

    @property
    def confused(self) -> int:
        """Objects found under the name of another class."""
        return int((self.matches.object_state == CONFUSED).sum())

    @property
    def false_alarms(self) -> int:
        """Predictions without an object."""
        return int((self.matches.prediction_state == WRONG).sum())

    @property
    def wrongness(self) -> float:
        """Errors times their share of all: many errors count, and so does that little is right. 0 without errors."""
        alarms = float(self.scores[self.matches.prediction_state == WRONG].sum())  # sure ones weigh more
        errors = self.missed + self.confused + alarms
        right = int((self.matches.object_state == RIGHT).sum())
        return errors * errors / (errors + right) if errors else 0.0


@dataclass
class Analysis:
    """What `analyse` found.

    Args:
        confusion: int [K + 1, K + 1]: objects of class (row) predicted as class (column); the last column are missed
            objects, the last row predictions without an object.
        worst: the images with the most errors, worst first.
        images: how many were looked at.
        threshold: the score from which predictions counted.
    """

    confusion: np.ndarray
    worst: list[ImageErrors]
    images: int
    threshold: float


def analyse(
    truth: Any,
    predictions: Mapping[Any, np.ndarray],
    class_of_label: Sequence[int],
    threshold: float = 0.3,
    num_worst: int = 8,
    max_images: int = 2000,
) -> Analysis:
    """Match the predictions of an evaluation with its ground truth.

    Args:
        truth: pycocotools index of the ground truth.
        predictions: by image id float32 [n, 6], xyxy, score, label from 1.
        class_of_label: position in the sorted category ids of each label, from label 1 on; -1 for none.
        threshold: predictions with a lower score do not count.
        num_worst: images to return.
        max_images: of more images than that, as many are looked at, evenly spread: a report must cost little.

    Returns:
        The analysis; an empty one for no predictions.
    """
    class_of_id = {category_id: k for k, category_id in enumerate(sorted(truth.getCatIds()))}
    label_to_class = np.asarray([*class_of_label, -1], dtype=np.int64)
    count = len(class_of_id)
    ids = list(predictions)
    if len(ids) > max_images:
        ids = [ids[at] for at in np.linspace(0, len(ids) - 1, max_images).round().astype(int).tolist()]
    cells: list[np.ndarray] = [np.zeros(0, dtype=np.int64)]
    ranked: list[tuple[float, int, ImageErrors]] = []
    for number, image_id in enumerate(ids):
        image = _image(truth, image_id, predictions[image_id], class_of_id, label_to_class, threshold)
        matches = image.matches
        classes = np.append(image.object_classes, count)  # -1, no object, is the last
        counted = matches.prediction_state >= 0
        cells.append(classes[matches.object_of[counted]] * (count + 1) + image.predicted_classes[counted])
        cells.append(image.object_classes[matches.object_state == WRONG] * (count + 1) + count)
        wrongness = image.wrongness
        if wrongness > 0:
            ranked.append((-wrongness, number, image))
    confusion = np.bincount(np.concatenate(cells), minlength=(count + 1) ** 2).reshape(count + 1, count + 1)
    worst = [image for _, _, image in heapq.nsmallest(num_worst, ranked, key=lambda entry: entry[:2])]
    return Analysis(confusion, worst, len(ids), threshold)


def _image(
    truth: Any,
    image_id: Any,
    rows: np.ndarray,
    class_of_id: Mapping[Any, int],
    label_to_class: np.ndarray,
    threshold: float,
) -> ImageErrors:
    annotations = [a for a in truth.imgToAnns.get(image_id, ()) if a["category_id"] in class_of_id]
    single = [a for a in annotations if not a["iscrowd"]]
    objects_xyxy = _to_xyxy([a["bbox"] for a in single])
    classes = np.array([class_of_id[a["category_id"]] for a in single], dtype=np.int64)
    labels = rows[:, 5].astype(np.int64) - 1
    found = label_to_class[np.where((labels >= 0) & (labels < len(label_to_class)), labels, -1)]
    keep = np.flatnonzero((rows[:, 4] >= threshold) & (found >= 0))
    keep = keep[np.argsort(-rows[keep, 4], kind="stable")]
    predicted, found = rows[keep, :4].astype(np.float64), found[keep]
    crowds = _to_xyxy([a["bbox"] for a in annotations if a["iscrowd"]])
    return ImageErrors(
        image_id,
        objects_xyxy,
        classes,
        predicted,
        found,
        rows[keep, 4],
        match_image(objects_xyxy, classes, predicted, found, crowds),
    )


def _to_xyxy(boxes_xywh: Sequence[Sequence[float]]) -> np.ndarray:
    boxes = np.array(boxes_xywh, dtype=np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return boxes
