"""How far AP, and the difference of two, would move with other images: a bootstrap over images, by hotcoco."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from .coco import can_match_by_hotcoco, hotcoco, match_by_hotcoco

_NORMAL_95 = 1.96


class Interval(NamedTuple):
    """A number, and half the width of its 95 % interval."""

    value: float
    half: float


def match_for_intervals(truth: Any, rows: Sequence[Mapping[str, Any]], img_ids: Collection[Any]) -> Any | None:
    """Match detections once, for the functions below; None where nothing can be matched, or without hotcoco.

    Args:
        truth: see `coco.score_rows`, also for the next ones.
        rows: COCO results.
        img_ids: the images that count.
    """
    if not can_match_by_hotcoco(truth, rows, img_ids):
        return None
    return match_by_hotcoco(truth, rows, img_ids, all_sizes_together=True)


def find_interval(matched: Any, nothing: Any, resamples: int, seed: int) -> Interval:
    """Return the AP of an evaluation, as its difference to one that found nothing; see `find_difference`."""
    return find_difference(nothing, matched, resamples, seed)


def find_difference(one: Any, other: Any, resamples: int, seed: int) -> Interval:
    """Return what the other's AP has more, with the interval that images drawn again and again with replacement give.

    Both evaluations see the same draws, so what is hard for both does not widen the interval. It is 1.96 standard
    errors to either side: percentiles lean upwards where classes are rare in a draw.

    Args:
        one: of `match_for_intervals`, with the same ground truth and images as the other.
        other: the same.
        resamples: draws.
        seed: of the draws.
    """
    found = hotcoco.compare(one, other, n_bootstrap=resamples, seed=seed)
    return Interval(float(found["deltas"]["AP"]), _NORMAL_95 * float(found["ci"]["AP"]["std_err"]))
