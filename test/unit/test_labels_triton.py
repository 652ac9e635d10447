"""Anchor labels as Triton kernels, against the dense way."""
from __future__ import annotations

import os

import pytest
import torch

from effdet.anchors import AnchorLabeler, Anchors

pytest.importorskip("triton")
DEVICE = os.environ.get("EFFDET_TEST_DEVICE", "cpu")


@pytest.fixture
def anchors():
    return Anchors(3, 7, 3, [(1.0, 1.0), (1.4, 0.7), (0.7, 1.4)], 4.0, (64, 64)).to(DEVICE)


def make_objects(slots, seed, batch=2, size=64.0):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand((batch, slots, 2), generator=generator) * size * 1.2 - size * 0.1
    sides = torch.exp(torch.rand((batch, slots, 2), generator=generator) * 4) * 2
    classes = torch.randint(-2, 6, (batch, slots), generator=generator)
    classes[classes == 0] = -1
    return torch.cat((corner, corner + sides), 2).to(DEVICE), classes.to(DEVICE)


def check(anchors, boxes, classes, regions=False, threshold=0.5):
    from effdet.labels_triton import label
    labeler = AnchorLabeler(anchors, 5, threshold, ignore_regions=regions)
    labeler._may_search = lambda classes: False
    expected = labeler.assign(boxes, classes)
    actual = label(anchors.boxes, boxes, classes, classes > -1, threshold, regions)
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[2], expected[2])
    torch.testing.assert_close(actual[1], expected[1], rtol=1e-6, atol=1e-6)
    return actual


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("slots", [1, 9])
@pytest.mark.parametrize("seed", range(2))
def test_random_boxes(anchors, slots, seed, regions):
    targets, _, positives = check(anchors, *make_objects(slots, seed), regions=regions)
    assert torch.equal((targets >= 0).sum(1).float(), positives)


def test_anchors_in_a_region_are_left_out_but_for_those_of_objects(anchors):
    boxes = torch.tensor([[[0.0, 0, 64, 64], [10, 10, 30, 40]]], device=DEVICE)
    targets, _, positives = check(anchors, boxes, torch.tensor([[-2, 4]], device=DEVICE), regions=True)
    assert (targets == -2).sum() > 100 and (targets == 3).sum() == positives > 0


def test_equal_boxes_and_boxes_equal_to_anchors(anchors):
    boxes = anchors.boxes[torch.tensor([5, 5, 300, 300, 400, 401, 402, 40])].reshape(2, 4, 4)
    boxes[:, 1] = boxes[:, 0]
    classes = torch.tensor([[3, 1, 2, 4], [5, 4, -1, 1]], device=DEVICE)
    targets, _, _ = check(anchors, boxes, classes)
    assert targets[0, 5] == 2  # the first of two equal boxes


def test_an_invalid_box_forces_nothing(anchors):
    boxes = anchors.boxes[torch.tensor([5, 5])].reshape(1, 2, 4)
    targets, _, _ = check(anchors, boxes, torch.tensor([[-1, 3]], device=DEVICE))
    assert targets[0, 5] == 2
    targets, codes, positives = check(anchors, boxes, torch.tensor([[-1, -1]], device=DEVICE))
    assert (targets == -1).all() and not codes.any() and positives == 0


def test_boxes_without_area_and_outside_of_the_picture(anchors):
    boxes = torch.tensor([[[10.0, 10, 10, 40], [300, 300, 400, 400], [-50, -60, -5, -5], [0, 0, 0, 0]]], device=DEVICE)
    targets, _, _ = check(anchors, boxes, torch.tensor([[1, 2, 3, 4]], device=DEVICE))
    assert targets[0, 0] == 0  # no anchor overlaps the first and the last: both want the first, and one can have it


def test_a_low_threshold_and_several_chunks_of_anchors(monkeypatch):
    from effdet import labels_triton
    monkeypatch.setattr(labels_triton, "_TILES", 1)
    anchors = Anchors(3, 7, 3, [(1.0, 1.0), (1.4, 0.7), (0.7, 1.4)], 4.0, (128, 128)).to(DEVICE)
    assert len(anchors.boxes) > 2 * labels_triton._TILE
    check(anchors, *make_objects(5, 9, size=128.0), threshold=0.2)
