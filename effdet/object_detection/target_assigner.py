"""Class and box targets of the anchors of one image."""

from __future__ import annotations

from torch import Tensor

from .argmax_matcher import ArgMaxMatcher
from .box_coder import FasterRcnnBoxCoder
from .box_list import BoxList
from .matcher import Match
from .region_similarity_calculator import IouSimilarity

__all__ = ["ArgMaxMatcher", "BoxList", "FasterRcnnBoxCoder", "IouSimilarity", "Match", "TargetAssigner"]


class TargetAssigner:
    """Compare, match, and encode: what `anchors.AnchorLabeler` does for whole batches."""

    def __init__(
        self,
        similarity_calc: IouSimilarity,
        matcher: ArgMaxMatcher,
        box_coder: FasterRcnnBoxCoder,
        negative_class_weight: float = 1.0,
        unmatched_cls_target: float | None = None,
    ) -> None:
        """Put an assigner together.

        Args:
            similarity_calc: compares two box lists, [M, N].
            matcher: turns the comparison into a Match.
            box_coder: encodes boxes relative to anchors.
            negative_class_weight: not used, as in effdet.
            unmatched_cls_target: class target of anchors without a box; default 0.
        """
        self._similarity_calc, self._matcher, self._box_coder = similarity_calc, matcher, box_coder
        self._unmatched_cls_target = unmatched_cls_target or 0.0

    def assign(
        self,
        anchors: BoxList,
        groundtruth_boxes: BoxList,
        groundtruth_labels: Tensor,
        groundtruth_weights: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Match]:
        """Make the targets of an image.

        Args:
            anchors: N anchors.
            groundtruth_boxes: M boxes, M from 0 on.
            groundtruth_labels: [M, ...], their labels.
            groundtruth_weights: not used, as in effdet.

        Returns:
            class targets [N, ...], box deltas [N, 4] (zero without a box), and the match.
        """
        match = self._matcher.match(self._similarity_calc.compare(groundtruth_boxes, anchors))
        classes = match.gather_based_on_match(
            groundtruth_labels, self._unmatched_cls_target, self._unmatched_cls_target
        )
        boxes = match.gather_based_on_match(groundtruth_boxes.boxes(), 0.0, 0.0)
        deltas = self._box_coder.encode(BoxList(boxes), anchors)
        return classes, deltas.masked_fill(~match.matched_column_indicator().unsqueeze(1), 0.0), match

    def box_coder(self) -> FasterRcnnBoxCoder:
        """Return the coder."""
        return self._box_coder
