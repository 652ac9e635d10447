"""Labelling one image step by step, under effdet's names; `anchors.AnchorLabeler` does it for a batch at once.

Nothing of ours uses these: they are thin, over ops/boxes.py, for programs that put their own labeler together.
"""

from .argmax_matcher import ArgMaxMatcher
from .box_coder import FasterRcnnBoxCoder
from .box_list import BoxList
from .matcher import Match
from .region_similarity_calculator import IouSimilarity
from .target_assigner import TargetAssigner

__all__ = ["ArgMaxMatcher", "BoxList", "FasterRcnnBoxCoder", "IouSimilarity", "Match", "TargetAssigner"]
