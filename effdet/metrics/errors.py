"""Which objects a detector finds, mixes up or misses at one score threshold: confusions, worst images, label errors.

Lives here: numpy on plain arrays in one process. Boxes are xyxy in an image's pixels; classes are positions in the
sorted list of category ids.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from effdet.ops.boxes import box_area, pairwise_common, pairwise_iou

from .voc import MATCH_IOU

MAX_IMAGES = 2000  # looked at: a report must cost little
NUM_WORST, NUM_SUSPECTS = 8, 24  # images and predictions that are shown
SURE = 0.5  # score from which a prediction may know better than the annotations
APART = 0.1  # IoU below which there is no object where one was predicted, as TIDE has it
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
    same_class_only: bool = False,
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
        same_class_only: leave the second step out, so that nothing is CONFUSED.
    """
    object_of = np.full(len(predicted_xyxy), -1)
    taken = np.zeros(len(objects_xyxy), dtype=bool)
    state = np.full(len(predicted_xyxy), WRONG)
    if len(objects_xyxy) and len(predicted_xyxy):
        overlap = pairwise_iou(predicted_xyxy, objects_xyxy)
        overlap[overlap < MATCH_IOU] = 0.0
        same = np.where(predicted_classes[:, None] == object_classes[None, :], overlap, 0.0)
        for found_state, table in ((RIGHT, same), (CONFUSED, overlap))[: 1 if same_class_only else 2]:
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


@dataclass(frozen=True)
class Suspect:
    """A sure prediction that the annotations contradict: the label may be missing, or of the wrong class.

    Args:
        image_id: the image.
        box_xyxy: the prediction, [4].
        predicted_class: of it.
        score: of it.
        object_class: what the object there is called; None: no object is there.
    """

    image_id: Any
    box_xyxy: np.ndarray
    predicted_class: int
    score: float
    object_class: int | None


@dataclass
class Analysis:
    """What `analyse` found.

    Args:
        confusion: int [K + 1, K + 1]: objects of class (row) predicted as class (column); the last column are missed
            objects, the last row predictions without an object.
        worst: the images with the most errors, worst first.
        images: how many were looked at.
        threshold: the score from which predictions counted.
        suspects: what may be wrong with the annotations, the surest first.
    """

    confusion: np.ndarray
    worst: list[ImageErrors]
    images: int
    threshold: float
    suspects: list[Suspect]


class LabelTable(NamedTuple):
    """From category ids, and from a network's labels, to positions in the sorted list of category ids."""

    class_of_id: dict[Any, int]
    class_of_label: np.ndarray  # int64, from label 1 on, -1 for none; one more -1 at the end

    @classmethod
    def of(cls, truth: Any, class_of_label: Sequence[int]) -> LabelTable:
        """Make the table; arguments as for `analyse`."""
        ids = {category_id: k for k, category_id in enumerate(sorted(truth.getCatIds()))}
        return cls(ids, np.asarray([*class_of_label, -1], dtype=np.int64))

    @property
    def count(self) -> int:
        """How many classes there are."""
        return len(self.class_of_id)


def spread(image_ids: Sequence[Any]) -> Sequence[Any]:
    """Return at most MAX_IMAGES of the images, evenly spread."""
    if len(image_ids) <= MAX_IMAGES:
        return image_ids
    return [image_ids[at] for at in np.linspace(0, len(image_ids) - 1, MAX_IMAGES).round().astype(int).tolist()]


def analyse(
    truth: Any,
    predictions: Mapping[Any, np.ndarray],
    class_of_label: Sequence[int],
    threshold: float = 0.3,
) -> Analysis:
    """Match the predictions of an evaluation with its ground truth.

    Args:
        truth: pycocotools index of the ground truth.
        predictions: by image id float32 [n, 6], xyxy, score, label from 1.
        class_of_label: position in the sorted category ids of each label, from label 1 on; -1 for none.
        threshold: predictions with a lower score do not count.

    Returns:
        The analysis; an empty one for no predictions.
    """
    table = LabelTable.of(truth, class_of_label)
    count = table.count
    ids = spread(list(predictions))
    suspects: list[Suspect] = []
    cells: list[np.ndarray] = [np.zeros(0, dtype=np.int64)]
    ranked: list[tuple[float, int, ImageErrors]] = []
    for number, image_id in enumerate(ids):
        image = match_one(truth, image_id, predictions[image_id], table, threshold)
        matches = image.matches
        classes = np.append(image.object_classes, count)  # -1, no object, is the last
        counted = matches.prediction_state >= 0
        cells.append(classes[matches.object_of[counted]] * (count + 1) + image.predicted_classes[counted])
        cells.append(image.object_classes[matches.object_state == WRONG] * (count + 1) + count)
        wrongness = image.wrongness
        if wrongness > 0:
            ranked.append((-wrongness, number, image))
        suspects += _suspects(image)
    confusion = np.bincount(np.concatenate(cells), minlength=(count + 1) ** 2).reshape(count + 1, count + 1)
    worst = [image for _, _, image in heapq.nsmallest(NUM_WORST, ranked, key=lambda entry: entry[:2])]
    surest = heapq.nlargest(NUM_SUSPECTS, suspects, key=lambda suspect: suspect.score)
    return Analysis(confusion, worst, len(ids), threshold, surest)


def _suspects(image: ImageErrors) -> Iterator[Suspect]:
    state, object_of = image.matches.prediction_state, image.matches.object_of
    for n in np.flatnonzero((image.scores >= SURE) & ((state == WRONG) | (state == CONFUSED))).tolist():
        if state[n] == WRONG and len(image.objects_xyxy):
            if pairwise_iou(image.predicted_xyxy[n : n + 1], image.objects_xyxy).max() >= APART:
                continue  # a poor box, or one more for an object that is found
        called = int(image.object_classes[object_of[n]]) if state[n] == CONFUSED else None
        yield Suspect(
            image.image_id, image.predicted_xyxy[n], int(image.predicted_classes[n]), float(image.scores[n]), called
        )


def match_one(
    truth: Any,
    image_id: Any,
    rows: np.ndarray,
    table: LabelTable,
    threshold: float = 0.0,
    same_class_only: bool = False,
) -> ImageErrors:
    """Match the predictions of one image, from a score on, with its objects; see `analyse` and `match_image`."""
    class_of_id, label_to_class = table
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
        match_image(objects_xyxy, classes, predicted, found, crowds, same_class_only),
    )


def _to_xyxy(boxes_xywh: Sequence[Sequence[float]]) -> np.ndarray:
    boxes = np.array(boxes_xywh, dtype=np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return boxes
