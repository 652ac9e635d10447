"""What kinds of errors cost how much AP: TIDE's analysis of detection errors, by hotcoco."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from .coco import can_match_by_hotcoco, match_by_hotcoco
from .errors import spread

_KINDS = {
    "Cls": "right place, wrong class",
    "Loc": "right class, poor box (IoU .1 to .5)",
    "Both": "wrong class and poor box",
    "Dupe": "one more for an object that is found",
    "Bkg": "nothing there",
    "Miss": "objects that nothing points at",
}


class ErrorType(NamedTuple):
    """One kind of error: what it is, the AP50 that would be won without it, how often it occurs."""

    text: str
    ap_lost: float
    count: int


def weigh_errors(truth: Any, rows: Sequence[Mapping[str, Any]], img_ids: Collection[Any]) -> list[ErrorType]:
    """Return the kinds of errors, costliest first; none without hotcoco, or where there is nothing to match.

    Each kind is mended alone, so the losses do not add up to what AP50 lacks.

    Args:
        truth: see `coco.score_rows`, also for the next ones.
        rows: COCO results.
        img_ids: the images that count.

    Source: Bolya et al., TIDE: A General Toolbox for Identifying Object Detection Errors (2020), section 2.
    """
    chosen = set(spread(sorted(img_ids)))
    rows = [row for row in rows if row["image_id"] in chosen]
    if not can_match_by_hotcoco(truth, rows, chosen):
        return []
    found = match_by_hotcoco(truth, rows, chosen, ious=[0.5], all_sizes_together=True).tide_errors()
    types = [ErrorType(text, found["delta_ap"][kind], found["counts"][kind]) for kind, text in _KINDS.items()]
    return sorted(types, key=lambda one: -one.ap_lost)
