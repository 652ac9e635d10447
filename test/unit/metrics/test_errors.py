"""What is right, mixed up, missed and alarmed for nothing, on boxes a reader can check by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effdet.metrics import errors
from effdet.metrics.coco import index_ground_truth
from effdet.metrics.errors import CONFUSED, RIGHT, WRONG, analyse, match_image

A, B, C = [0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]  # xyxy, far apart


def match(objects, classes, predicted, predicted_classes, crowds=None):
    return match_image(
        np.array(objects, float).reshape(-1, 4),
        np.array(classes, int),
        np.array(predicted, float).reshape(-1, 4),
        np.array(predicted_classes, int),
        None if crowds is None else np.array(crowds, float),
    )


def test_each_kind_once():
    matches = match([A, B, C], [0, 1, 2], [A, B, [70, 0, 80, 10]], [0, 2, 1])
    assert matches.object_of.tolist() == [0, 1, -1]
    assert matches.prediction_state.tolist() == [RIGHT, CONFUSED, WRONG]
    assert matches.object_state.tolist() == [RIGHT, CONFUSED, WRONG]


def test_the_right_class_goes_first_and_an_object_is_found_once():
    matches = match([A], [0], [A, [0, 0, 10, 9], A], [1, 0, 0])  # the other class has the highest score
    assert matches.prediction_state.tolist() == [WRONG, RIGHT, WRONG] and matches.object_state.tolist() == [RIGHT]


@pytest.mark.parametrize(("x", "state"), [(3.3, RIGHT), (3.4, WRONG)])
def test_boxes_match_from_half_overlap_on(x, state):
    matches = match([A], [0], [[x, 0, x + 10, 10]], [0])  # (10 - x) / (10 + x) is 0.504 and 0.493
    assert matches.prediction_state.tolist() == [state]


def test_predictions_in_a_crowd_do_not_count():
    matches = match([A], [0], [A, [21, 1, 24, 4], C], [0, 0, 0], crowds=[B])
    assert matches.prediction_state.tolist() == [RIGHT, -1, WRONG]


@pytest.mark.parametrize(("objects", "predicted"), [([], []), ([A], []), ([], [A])])
def test_empty_sides(objects, predicted):
    matches = match(objects, [0] * len(objects), predicted, [0] * len(predicted))
    assert matches.object_state.tolist() == [WRONG] * len(objects)
    assert matches.prediction_state.tolist() == [WRONG] * len(predicted)


corner = st.integers(0, 6)
boxes = st.lists(st.tuples(corner, corner, st.integers(1, 6), st.integers(1, 6), st.integers(0, 2)), max_size=6)


@settings(max_examples=60, deadline=None)
@given(boxes, boxes)
def test_both_sides_tell_the_same_story(objects, predicted):
    def split(rows):
        return [[x, y, x + w, y + h] for x, y, w, h, _ in rows], [k for *_, k in rows]

    matches = match(*split(objects), *split(predicted))
    taken = matches.object_of[matches.object_of >= 0]
    assert len(set(taken.tolist())) == len(taken), "an object is found once"
    for state in (RIGHT, CONFUSED):
        assert (matches.object_state == state).sum() == (matches.prediction_state == state).sum()
    assert ((matches.object_of < 0) == (matches.prediction_state == WRONG)).all()
    for n, m in enumerate(matches.object_of.tolist()):
        if m >= 0:
            assert (predicted[n][4] == objects[m][4]) == (matches.prediction_state[n] == RIGHT)


def truth_of(images: int) -> dict:
    """Every image has A of category 5 and B of category 9."""
    annotations = [
        {"image_id": k, "category_id": c, "bbox": [box[0], box[1], 10, 10], "area": 100, "iscrowd": 0}
        for k in range(images)
        for c, box in ((5, A), (9, B))
    ]
    return index_ground_truth(
        {
            "images": [{"id": k} for k in range(images)],
            "annotations": annotations,
            "categories": [{"id": 9, "name": "nine"}, {"id": 5, "name": "five"}],
        }
    )


def rows_of(*rows) -> np.ndarray:
    return np.array([[*box, score, label] for box, score, label in rows], dtype=np.float32).reshape(-1, 6)


def test_confusion_counts_and_the_worst_images():
    predictions = {
        0: rows_of((A, 0.9, 1), (B, 0.8, 2)),  # all right
        1: rows_of((B, 0.5, 1), (A, 0.9, 1)),  # nine taken for five
        2: rows_of((C, 0.9, 2), (A, 0.2, 1)),  # both missed (one below the threshold), and an alarm
        3: rows_of((A, 0.7, 1), (B, 0.6, 3)),  # a label without a category does not count
    }
    found = analyse(truth_of(4), predictions, [0, 1, -1], threshold=0.3)
    assert found.confusion.tolist() == [[3, 0, 1], [1, 1, 2], [0, 1, 0]] and found.images == 4
    assert [image.image_id for image in found.worst] == [2, 1, 3]
    worst = found.worst[0]
    assert (worst.missed, worst.confused, worst.false_alarms) == (2, 0, 1) and worst.wrongness == pytest.approx(2.9)
    assert [image.wrongness for image in found.worst[1:]] == [0.5, 0.5]


def test_of_many_images_an_even_part_is_looked_at(monkeypatch):
    monkeypatch.setattr(errors, "MAX_IMAGES", 10)
    monkeypatch.setattr(errors, "NUM_WORST", 3)
    predictions = {k: rows_of((A, 0.9, 1)) for k in range(100)}
    found = analyse(truth_of(100), predictions, [0, 1])
    assert found.images == 10 and found.confusion.tolist() == [[10, 0, 0], [0, 0, 10], [0, 0, 0]]
    assert [image.image_id for image in found.worst] == [0, 11, 22]
    empty = analyse(truth_of(1), {}, [0, 1])
    assert empty.images == 0 and empty.worst == [] and not empty.confusion.any()
