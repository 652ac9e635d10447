"""Precision, recall, F1 and the best threshold by hand, and against scoring everything anew at each score."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effdet.metrics.coco import hotcoco, index_ground_truth
from effdet.metrics.error_types import weigh_errors
from effdet.metrics.errors import analyse
from effdet.metrics.thresholds import GRID, trace_scores

A, B, C = [0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]  # xyxy, far apart


def truth_of(*images: list[tuple[list[float], int]]) -> dict:
    """Objects of each image as box and category id; the categories are 5 and 9."""
    annotations = [
        {"image_id": k, "category_id": c, "bbox": [x0, y0, x1 - x0, y1 - y0], "area": 100, "iscrowd": 0}
        for k, objects in enumerate(images)
        for (x0, y0, x1, y1), c in objects
    ]
    categories = [{"id": 9, "name": "nine"}, {"id": 5, "name": "five"}]
    return index_ground_truth(
        {"images": [{"id": k} for k in range(len(images))], "annotations": annotations, "categories": categories}
    )


def rows_of(*rows) -> np.ndarray:
    return np.array([[*box, score, label] for box, score, label in rows], dtype=np.float32).reshape(-1, 6)


def test_the_best_threshold_by_hand():
    truth = truth_of([(A, 5), (B, 9)], [(A, 5)], [(A, 5)])
    predictions = {
        0: rows_of((A, 0.9, 1), (B, 0.5, 2), (C, 0.7, 1)),  # two right, an alarm
        1: rows_of((A, 0.8, 1), (A, 0.6, 1)),  # right, and once more
    }  # nothing was predicted in image 2
    found = trace_scores(truth, predictions, [0, 1], {0, 1, 2})
    five, nine, both = found.best
    assert five == pytest.approx((0.75, 1.0, 2 / 3, 0.8)), "between the scores .8 and .7"
    assert nine == pytest.approx((0.25, 1.0, 1.0, 1.0)), "between .5 and nothing"
    assert both == pytest.approx((0.75, 1.0, 0.5, 2 / 3)), "3 of 5 and 3 of 4 at .5 are F1 2/3 too: the higher score"
    at = {score: k for k, score in enumerate(GRID.round(2).tolist())}
    precision, recall, f1 = found.curves[0]
    assert precision[at[0.65]] == pytest.approx(2 / 3) and recall[at[0.65]] == pytest.approx(2 / 3)
    assert f1[at[0.85]] == pytest.approx(0.5) and math.isnan(precision[at[0.95]]) and recall[at[0.95]] == 0
    assert found.to_plain() == {"all": pytest.approx(0.75), "classes": [None, None]}, "too few objects"


def test_only_a_class_with_enough_objects_has_a_threshold_of_its_own():
    truth = truth_of(*[[(A, 9), (B, 5)]] * 9, [(A, 9)])
    predictions = {k: rows_of((A, 0.8, 1), (B, 0.4, 3)) for k in range(10)}  # labels in the network's order
    found = trace_scores(truth, predictions, [1, -1, 0], range(10))
    assert found.objects == [9, 10] and found.best[0].threshold == pytest.approx(0.2)
    assert found.to_plain() == {
        "all": pytest.approx(0.2),
        "classes": [pytest.approx(0.4), None, None],
    }, "one more detection of five than there are objects is worth it"


@pytest.mark.parametrize("predictions", [{}, {0: rows_of((C, 0.9, 1))}], ids=["nothing", "nothing right"])
def test_where_nothing_is_found_nothing_is_recommended(predictions):
    found = trace_scores(truth_of([(A, 5)]), predictions, [0, 1], {0})
    assert found.to_plain() is None and all(math.isnan(best.threshold) for best in found.best)


detection = st.tuples(st.sampled_from([A, B, C, [1, 0, 11, 10]]), st.integers(1, 9), st.integers(1, 2))


@settings(max_examples=50, deadline=None)
@given(st.lists(detection, min_size=1, max_size=12))
def test_no_other_threshold_is_better(detections):
    """The slow twin: F1 from the confusions of `analyse` at every score."""
    truth = truth_of([(A, 5), (B, 9), (C, 9)])
    rows = rows_of(*[(box, score / 10, label) for box, score, label in detections])
    found = trace_scores(truth, {0: rows}, [0, 1], {0})

    def f1_at(threshold: float) -> float:
        confusion = analyse(truth, {0: rows}, [0, 1], threshold).confusion
        return 2 * np.trace(confusion[:2, :2]) / (int((rows[:, 4] >= threshold).sum()) + 3)

    best = max(f1_at(score) for score in rows[:, 4])
    if best == 0:
        assert found.to_plain() is None
    else:
        assert found.best[-1].F1 == pytest.approx(best) == pytest.approx(f1_at(found.best[-1].threshold))


def test_labels_to_look_at_are_sure_and_apart_from_all_objects():
    truth = truth_of([(A, 5), (B, 9)])
    rows = rows_of(
        (A, 0.95, 2),  # a five called nine
        (C, 0.9, 1),  # nothing there
        ([22, 0, 32, 10], 0.8, 2),  # right
        ([25, 0, 35, 10], 0.7, 2),  # a poor box beside it
        ([60, 0, 70, 10], 0.4, 1),  # not sure
    )
    found = analyse(truth, {0: rows}, [0, 1]).suspects
    assert [(one.predicted_class, round(one.score, 2), one.object_class) for one in found] == [
        (1, 0.95, 0),
        (0, 0.9, None),
    ]
    assert found[1].box_xyxy.tolist() == C


@pytest.mark.skipif(hotcoco is None, reason="hotcoco is not installed")
def test_error_types_cost_what_mending_them_wins():
    truth = truth_of(*[[(A, 5), (B, 9)]] * 4)
    # every nine is called five, at a score above that of the right fives
    results = [
        {"image_id": k, "category_id": 5, "bbox": [x0, y0, x1 - x0, y1 - y0], "score": score}
        for k in range(4)
        for (x0, y0, x1, y1), score in ((A, 0.5), (B, 0.9))
    ]
    found = weigh_errors(truth, results, range(4))
    assert found[0].text == "right place, wrong class" and found[0].count == 4 and found[0].ap_lost > 0.5
    assert sum(one.count for one in found[1:]) == 0
    assert weigh_errors(truth, [], range(4)) == []
