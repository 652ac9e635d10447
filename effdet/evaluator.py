"""Evaluation of detections, exact on any number of processes: collect per batch, gather on rank 0, score, broadcast.

What lives here: what is kept of a batch, and who computes on which rank. What must not: the metrics themselves
(metrics/), what a dataset knows of its ground truth (data/coco/truth.py), the model, reading of images.

What counts is what counted in effdet 0.4.1: the images that were predicted, and of COCO's results those from a score of
.001. train.py and validate.py ask for all images and all scores.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from pycocotools.coco import COCO

from effdet.checkpoint.io import write_json
from effdet.data.coco.truth import category_ids, covered_img_ids, find_parser, load_ground_truth, plain_id
from effdet.data.corrupt import BadImageWatch, find_bad_images
from effdet.evaluation.base import Evaluator
from effdet.evaluation.detection_evaluator import PascalDetectionEvaluator
from effdet.metrics.coco import (
    ClassMetrics,
    CocoScores,
    index_ground_truth,
    make_result_rows,
    plain_number,
    score_rows,
)
from effdet.metrics.error_types import ErrorType, weigh_errors
from effdet.metrics.thresholds import ScoreCurves, trace_scores
from effdet.metrics.voc import VocScores, score_voc
from effdet.runtime.distributed import is_primary
from effdet.runtime.progress import IN_LINES

from .distributed import all_gather_container, is_main_process, synchronize  # noqa: F401  (effdet has them here)

__all__ = [
    "ClassMetrics",
    "CocoEvaluator",
    "Evaluator",
    "OpenImagesEvaluator",
    "PascalEvaluator",
    "TfmEvaluator",
    "create_evaluator",
]

_logger = logging.getLogger(__name__)

MIN_SCORE = 0.001  # below it a detection is not in COCO's results. Source: effdet 0.4.1


class CocoEvaluator(Evaluator):
    """Evaluate boxes by COCO's metric against the json of a dataset.

    Classes become category ids by `parser.category_map.idx_to_id`, or by turning round `parser.cat_id_to_label`; in a
    dataset of one's own that has neither they are category ids. A predicted class without a category in the json is
    dropped and counted in the log: weights with 90 outputs for COCO's 80 classes have such.

    An image that could not be read counts as one in which nothing was found, where the dataset puts up with such
    (`bad_images`, data/corrupt.py): its objects are missed, and the log names it.

    `stats` holds the last evaluation: AP, AP50, AP75, AP_small, AP_medium, AP_large, AR1, AR10, AR100, AR_small,
    AR_medium, AR_large. A number is NaN where there is no ground truth for it (pycocotools says -1). It is empty
    before the first evaluation.

    Args:
        dataset: has `.parser` (see above) with `img_ids` and the ground truth as `coco_dict()`, `coco` or `ann_path`.
        distributed, pred_yxyx: see Evaluator.
        max_det: best detections per image and class that count. Above 100 it takes the place of COCO's 100 in all
            numbers, AR100 included, though that keeps its name; below, COCO's 100 stays.
        all_images: count all images of the json, so that the objects of one that was never predicted are missed; of a
            subset (anything with `.indices` over `.dataset`, such as SkipSubset, or with an `img_ids` of its own) all
            of the subset's. False counts those that were predicted.
        min_score: detections below this score do not count.
    """

    metric = "AP"  # the one of `stats` that `evaluate` returns

    def __init__(
        self,
        dataset: Any,
        distributed: bool = False,
        pred_yxyx: bool = False,
        max_det: int = 100,
        *,
        all_images: bool = False,
        min_score: float = MIN_SCORE,
    ) -> None:
        super().__init__(distributed, pred_yxyx)
        self.max_det = max_det
        self.all_images = all_images
        self.min_score = min_score
        self._parser = find_parser(dataset)
        self._covered = covered_img_ids(dataset, self._parser)
        found = find_bad_images(dataset)
        self._watch = None if found is None else BadImageWatch(found[0], "validation")
        self._scores: CocoScores | VocScores | None = None
        self._truth: COCO | None = None  # rank 0 only, at the first evaluation
        self._last: dict[Any, np.ndarray] = {}  # rank 0 only: what the last evaluate() scored, for save()
        self._scored_ids: set[Any] = set()  # rank 0 only: the images that counted
        self._curves: ScoreCurves | None = None

    @property
    def stats(self) -> dict[str, float]:
        """The 12 COCO numbers of the last evaluation by name, empty before the first."""
        return dict(self._scores.stats) if self._scores else {}

    @property
    def scores(self) -> CocoScores | VocScores | None:
        """All numbers of the last evaluation, None before the first."""
        return self._scores

    @property
    def scored_predictions(self) -> Mapping[Any, np.ndarray]:
        """What the last evaluation scored, by image id, on rank 0; empty on the other ranks.

        Float32 [n, 6]: x_min, y_min, x_max, y_max in the image's pixels, score, class from 1.
        """
        return self._last

    @property
    def score_curves(self) -> ScoreCurves:
        """Precision, recall and F1 over the score in the last evaluation, and the best thresholds; for rank 0."""
        if self._curves is None:
            self._curves = trace_scores(self.ground_truth, self._last, self.class_of_label, self._scored_ids)
        return self._curves

    def error_types(self) -> list[ErrorType]:
        """Return which kinds of errors cost how much AP50 in the last evaluation; for rank 0."""
        return weigh_errors(self.ground_truth, self.scored_rows(), self._scored_ids)

    def scored_rows(self) -> list[dict[str, Any]]:
        """Return what the last evaluation scored as COCO result rows; on rank 0, empty on the other ranks."""
        return self._result_rows(self._last)

    @property
    def class_of_label(self) -> list[int]:
        """The position in the ground truth's sorted category ids of each label, from label 1 on; -1 for none."""
        known_ids = sorted(self._ground_truth().getCatIds())
        position = {category_id: k for k, category_id in enumerate(known_ids)}
        return [position.get(category_id, -1) for category_id in category_ids(self._parser, known_ids).tolist()]

    @property
    def ground_truth(self) -> COCO:
        """The pycocotools index of the ground truth, made at first use; annotations are numbered anew from 1."""
        return self._ground_truth()

    @property
    def coco_api(self) -> COCO:
        """The ground truth: effdet's name."""
        return self._ground_truth()

    def evaluate(self, output_result_file: str | os.PathLike[str] = "") -> float:
        """Score everything added since the last call, and start anew.

        Args:
            output_result_file: where to write the predictions as COCO result json; '' for nowhere.

        Returns:
            AP over IoU .50:.95 as a float in [0, 1], the same on all ranks. Without predictions it is 0.0; without any
            ground truth it is 0.0 too and all of `stats` is NaN; both are logged as warnings.

        Raises:
            ValueError: ground truth or category ids are not to be had from the dataset's parser, or a predicted
                image is not in the ground truth. Raised on rank 0; the others raise RuntimeError with its text.
            BadImagesError: more images could not be read than the dataset puts up with; raised on all ranks.
        """
        shards = self._gather()  # before the exchange, which begins a new count of bad images
        if self._watch is not None:
            self._watch.exchange(together=self._spread)
        self._scores = self._on_primary(lambda: self._score(shards, output_result_file), interruptible=True)
        self.reset()
        ap = self._scores.stats[self.metric]
        return 0.0 if math.isnan(ap) else ap

    def save(self, result_file: str | os.PathLike[str]) -> None:
        """Write the predictions as a COCO result json: those not evaluated yet, else those of the last evaluation.

        Args:
            result_file: path, written by rank 0; its folder is made. Without predictions it holds an empty list.
        """
        shards = self._gather()
        self._on_primary(lambda: write_json(result_file, self._result_rows(self._merge(shards) or self._last)))

    def summary(self) -> str:
        """Return the 12 COCO numbers of the last evaluation as a text table of 12 lines.

        Raises:
            RuntimeError: nothing has been evaluated yet.
        """
        return self._evaluated().table()

    def per_class(self) -> list[ClassMetrics]:
        """Return category id, name, AP, AP50 and count of ground-truth boxes per category, by ascending id.

        Raises:
            RuntimeError: nothing has been evaluated yet.
        """
        return list(self._evaluated().per_class)

    def write_metrics(self, path: str | os.PathLike[str], run: Mapping[str, Any] | None = None) -> None:
        """Write the last evaluation's numbers as json, undefined ones as null; rank 0 writes, the others do nothing.

        Args:
            path: its folder is made.
            run: plain values by name that go in under `run`; what the run came to that ends with this evaluation.

        Raises:
            RuntimeError: nothing has been evaluated yet.
        """
        scores = self._evaluated()
        if self._spread and not is_primary():
            return
        content = scores.to_json()
        for row, best in zip(content["per_class"], self.score_curves.best, strict=False):
            row.update(F1=plain_number(best.F1), threshold=plain_number(best.threshold))
        together = {name: plain_number(value) for name, value in self.score_curves.best[-1]._asdict().items()}
        content["score_threshold"] = together
        write_json(path, content if run is None else {**content, "run": dict(run)})

    def _evaluated(self) -> CocoScores | VocScores:
        if self._scores is None:
            raise RuntimeError("there are no numbers yet: call evaluate() first")
        return self._scores

    def _image_id(self, index: int) -> Any:
        return plain_id(self._parser.img_ids[index])

    @property
    def is_hopeless(self) -> bool:
        """True once more images could not be read than are allowed."""
        return self._watch is not None and self._watch.bad.too_many

    def _is_bad(self, index: int) -> bool:
        return self._watch is not None and index in self._watch.bad

    def _detections(self, index: int, rows: np.ndarray) -> np.ndarray:
        kept = super()._detections(index, rows)
        return kept[kept[:, 4] >= self.min_score]

    def _check_indices(self, indices: np.ndarray) -> None:
        super()._check_indices(indices)
        image_count = len(self._parser.img_ids)
        if len(indices) and indices.max() >= image_count:
            raise ValueError(
                f"target['img_idx'] has {indices.max()}, but the dataset's parser has {image_count} "
                "images: must be below that; was the evaluator made for another dataset?"
            )

    def _ground_truth(self) -> COCO:
        if self._truth is None:
            self._truth = index_ground_truth(load_ground_truth(self._parser))
        return self._truth

    def _coco_predictions(self) -> tuple[list[dict[str, Any]], list[Any]]:
        """Return COCO result rows and image ids of this process's predictions so far: effdet's name."""
        images = {
            self._image_id(k): self._detections(k, rows)
            for k, rows in zip(self.img_indices, self.predictions, strict=True)
        }
        return self._result_rows(images), list(images)

    def _result_rows(self, images: Mapping[Any, np.ndarray]) -> list[dict[str, Any]]:
        """Turn predictions by image id into COCO result rows."""
        known_ids = self._ground_truth().getCatIds()
        return make_result_rows(images, category_ids(self._parser, known_ids), known_ids)

    def _score(self, shards: list[Any], output_result_file: str | os.PathLike[str]) -> CocoScores | VocScores:
        """Compute all numbers from the gathered predictions; runs on rank 0 only."""
        images = self._last = self._merge(shards)
        self._curves = None
        truth = self._ground_truth()
        rows = self._result_rows(images)
        if output_result_file:
            write_json(output_result_file, rows)
        covered = set(truth.getImgIds())
        if not self.all_images:
            covered &= images.keys()
        elif self._covered is not None:
            covered &= self._covered
        self._scored_ids = covered
        scores = self._compute(truth, rows, covered)
        if not images and not self.all_images:
            _logger.warning("no image was predicted: nothing can be scored; AP is reported as 0.0")
        elif not any(line.count for line in scores.per_class):
            _logger.warning(
                "the ground truth of these %d images has no boxes: nothing can be scored; AP is reported "
                "as 0.0, and undefined (NaN) in the statistics",
                len(covered),
            )
        elif not rows:
            _logger.warning(
                "no predictions to evaluate: AP is 0.0. A model that has barely learned, or an EMA that "
                "has barely moved, predicts nothing"
            )
        elif covered - images.keys():
            _logger.warning(
                "%d of %d images were not predicted; their objects count as missed",
                len(covered - images.keys()),
                len(covered),
            )
        table = scores.table()
        _logger.info("Evaluation of %d boxes in %d images\n%s", len(rows), len(covered), table, extra=IN_LINES)
        return scores

    def _compute(self, truth: COCO, rows: list[dict[str, Any]], covered: set[Any]) -> CocoScores | VocScores:
        return score_rows(truth, rows, covered, self.max_det)


class TfmEvaluator(CocoEvaluator):
    """Evaluate boxes by Pascal VOC's metric, mAP at IoU 0.5; everything but the numbers is CocoEvaluator's.

    `evaluate` returns the mean over the classes that have objects, and `stats` holds it as AP50. Group boxes (crowd
    regions) are never missed, and detections inside them are ignored. All scores count.

    Args:
        dataset, distributed, pred_yxyx: see CocoEvaluator. A parser of one's own without a json needs `get_ann_info`,
            with boxes as yxyx, and `cat_dicts`.
        evaluator_cls: PascalDetectionEvaluator, the only one there is.
        ignore_difficult: objects marked as difficult count neither way, as in VOC's development kit. False counts what
            the parser gives for training: all of them, none where it leaves them out.
        all_images: see CocoEvaluator.
    """

    metric = "AP50"

    def __init__(
        self,
        dataset: Any,
        distributed: bool = False,
        pred_yxyx: bool = False,
        evaluator_cls: type = PascalDetectionEvaluator,
        *,
        ignore_difficult: bool = False,
        all_images: bool = False,
    ) -> None:
        if evaluator_cls is not PascalDetectionEvaluator:
            raise ValueError(f"evaluator_cls is {evaluator_cls}: here it can only be PascalDetectionEvaluator")
        super().__init__(dataset, distributed, pred_yxyx, all_images=all_images, min_score=0.0)
        self.ignore_difficult = ignore_difficult

    def _ground_truth(self) -> COCO:
        if self._truth is None:
            source = load_ground_truth(self._parser)
            if not self.ignore_difficult:
                source = {
                    **source,
                    "annotations": [a | {"difficult": 0} for a in source["annotations"] if _is_trained(a)],
                }
            self._truth = index_ground_truth(source)
        return self._truth

    def _compute(self, truth: COCO, rows: list[dict[str, Any]], covered: set[Any]) -> VocScores:
        return score_voc(truth, rows, covered)


def _is_trained(annotation: Mapping[str, Any]) -> bool:
    """Tell whether effdet trains on an object: one that is not marked to be left out, with sides from 1 px."""
    return not annotation.get("ignore") and min((annotation.get("bbox") or [1] * 4)[2:]) >= 1


class PascalEvaluator(TfmEvaluator):
    """Evaluate boxes on Pascal VOC."""


class OpenImagesEvaluator(TfmEvaluator):
    """Evaluate boxes on Open Images. Image-level labels are not considered, as in effdet."""


def create_evaluator(
    name: str, dataset: Any, distributed: bool = False, pred_yxyx: bool = False, **options: Any
) -> CocoEvaluator:
    """Build the evaluator that fits a dataset's name.

    Args:
        name: name of the dataset: one with 'coco' in it gets CocoEvaluator, one with 'openimages' OpenImagesEvaluator,
            any other PascalEvaluator.
        dataset: see CocoEvaluator, also for the next ones.
        distributed: gather the detections of all processes.
        pred_yxyx: boxes come as yxyx instead of xyxy.
        options: further arguments of the class.

    Returns:
        A fresh evaluator.
    """
    name = name.lower()
    cls = CocoEvaluator if "coco" in name else OpenImagesEvaluator if "openimages" in name else PascalEvaluator
    return cls(dataset, distributed, pred_yxyx, **options)
