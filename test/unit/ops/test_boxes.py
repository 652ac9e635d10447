"""Box arithmetic against one-pair-at-a-time Python, and numbers a reader can check by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from effdet.ops.boxes import (
    ENCODE_EPSILON,
    MAX_LOG_SIDE_RATIO,
    box_area,
    clip_boxes_xyxy,
    decode_boxes,
    encode_boxes,
    pairwise_common,
    pairwise_iou,
)

ANCHOR = (10.0, 20.0, 30.0, 100.0)  # y_min, x_min, y_max, x_max: 20 high, 80 wide, centre (20, 60)


def iou_slowly(a: list[float], b: list[float]) -> float:
    """Compute the IoU of two boxes from the definition."""
    height = min(a[2], b[2]) - max(a[0], b[0])
    width = min(a[3], b[3]) - max(a[1], b[1])
    if height <= 0 or width <= 0:
        return 0.0
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - height * width
    return height * width / union


def encode_slowly(box: list[float], anchor: list[float]) -> list[float]:
    """Code one box from the definition, with the epsilon on each side."""
    height, width = box[2] - box[0], box[3] - box[1]
    anchor_height, anchor_width = anchor[2] - anchor[0], anchor[3] - anchor[1]
    return [
        ((box[0] + box[2]) / 2 - (anchor[0] + anchor[2]) / 2) / (anchor_height + ENCODE_EPSILON),
        ((box[1] + box[3]) / 2 - (anchor[1] + anchor[3]) / 2) / (anchor_width + ENCODE_EPSILON),
        math.log((height + ENCODE_EPSILON) / (anchor_height + ENCODE_EPSILON)),
        math.log((width + ENCODE_EPSILON) / (anchor_width + ENCODE_EPSILON)),
    ]


def make_boxes(count: int, seed: int, largest: float = 60.0) -> Tensor:
    """Draw boxes that overlap often; each fifth is a point, each seventh a line."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, generator=generator) * 100 - 10
    sides = torch.rand(count, 2, generator=generator) * largest
    sides[::5] = 0
    sides[::7, 0] = 0
    return torch.cat((corners, corners + sides), 1)


def encode(boxes: Tensor, anchors: Tensor) -> Tensor:
    return torch.stack(encode_boxes(boxes.unbind(-1), anchors.unbind(-1)), -1)


def test_iou_equals_the_loop_over_pairs():
    first, second = make_boxes(40, 0), make_boxes(30, 1)
    second[3], second[6] = first[11], first[10]  # equal boxes, equal points
    expected = torch.tensor([[iou_slowly(a, b) for b in second.tolist()] for a in first.tolist()])
    assert 0.05 < (expected > 0).float().mean() < 0.9 and expected[11, 3] == 1 and expected[10, 6] == 0
    torch.testing.assert_close(pairwise_iou(first, second), expected, rtol=1e-5, atol=1e-6)


def test_iou_of_batches_is_the_iou_of_each():
    first, second = torch.stack([make_boxes(9, 2), make_boxes(9, 3)]), torch.stack([make_boxes(5, 4), make_boxes(5, 5)])
    iou = pairwise_iou(first, second)
    assert iou.shape == (2, 9, 5)
    for index in range(2):
        assert torch.equal(iou[index], pairwise_iou(first[index], second[index]))


@pytest.mark.parametrize(
    "a, b, expected",
    [
        ((0, 0, 4, 4), (0, 0, 4, 4), 1.0),
        ((0, 0, 4, 4), (2, 2, 6, 6), 4 / 28),
        ((0, 0, 4, 4), (1, 1, 3, 3), 4 / 16),  # one inside the other
        ((0, 0, 4, 4), (0, 4, 4, 8), 0.0),  # they share an edge
        ((0, 0, 4, 4), (9, 9, 12, 12), 0.0),
        ((0, 0, 4, 4), (2, 2, 2, 2), 0.0),  # a point inside
        ((2, 2, 2, 2), (2, 2, 2, 2), 0.0),  # 0 / 0 is no overlap
        ((1, 1, 1, 5), (1, 1, 1, 5), 0.0),
    ],
)
def test_iou_by_hand(a, b, expected):
    for first, second in ((a, b), (b, a)):
        iou = pairwise_iou(torch.tensor([first], dtype=torch.float32), torch.tensor([second], dtype=torch.float32))
        assert iou.item() == pytest.approx(expected, abs=1e-7)


def test_numpy_arrays_give_the_same_bits_as_tensors():
    first, second = make_boxes(40, 6), make_boxes(30, 7)
    second[5] = first[5]  # equal points: 0 / 0 without a warning
    for dtype in (torch.float32, torch.float64):
        one, other = first.to(dtype), second.to(dtype)
        for function in (pairwise_iou, pairwise_common):
            found = function(one.numpy(), other.numpy())
            assert isinstance(found, np.ndarray)
            assert torch.equal(torch.from_numpy(found), function(one, other))
        assert torch.equal(torch.from_numpy(box_area(one.numpy())), box_area(one))


def test_iou_of_no_boxes():
    assert pairwise_iou(torch.zeros(0, 4), make_boxes(3, 0)).shape == (0, 3)
    assert pairwise_iou(make_boxes(3, 0), torch.zeros(0, 4)).shape == (3, 0)


def test_area():
    boxes = torch.tensor([[1.0, 2.0, 4.0, 10.0], [5.0, 5.0, 5.0, 9.0]])
    assert box_area(boxes).tolist() == [24.0, 0.0]


def test_clip_to_one_size_and_to_a_size_for_each_image():
    boxes = torch.tensor([[-5.0, -1.0, 12.0, 7.0], [3.0, 2.0, 4.0, 4.0], [40.0, 30.0, 50.0, 60.0]])
    kept = boxes.clone()
    wide = clip_boxes_xyxy(boxes, torch.tensor([10.0, 6.0]))  # width 10, height 6
    assert wide.tolist() == [[0, 0, 10, 6], [3, 2, 4, 4], [10, 6, 10, 6]]
    sizes = torch.tensor([[10.0, 6.0], [45.0, 50.0]])
    batch = clip_boxes_xyxy(torch.stack((boxes, boxes)), sizes)
    assert torch.equal(batch[0], wide)
    assert batch[1].tolist() == [[0, 0, 12, 7], [3, 2, 4, 4], [40, 30, 45, 50]]
    assert torch.equal(boxes, kept), "the argument was changed"


def test_encode_equals_the_loop():
    boxes, anchors = make_boxes(25, 6), torch.tensor([ANCHOR, (-16.0, -8.0, 16.0, 8.0), (0.0, 0.0, 400.0, 3.0)])
    deltas = encode(boxes.unsqueeze(1), anchors.unsqueeze(0))
    expected = torch.tensor([[encode_slowly(box, anchor) for anchor in anchors.tolist()] for box in boxes.tolist()])
    assert torch.isfinite(deltas).all(), "points and lines must have finite deltas"
    assert deltas.min() < -15  # log(1e-7 / side): they are in there
    torch.testing.assert_close(deltas, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    "code, expected",
    [
        ((0.0, 0.0, 0.0, 0.0), ANCHOR),
        ((1.0, 0.0, 0.0, 0.0), (30.0, 20.0, 50.0, 100.0)),  # down by one anchor height
        ((0.0, -0.5, 0.0, 0.0), (10.0, -20.0, 30.0, 60.0)),  # left by half an anchor width
        ((0.0, 0.0, math.log(2), 0.0), (0.0, 20.0, 40.0, 100.0)),
        ((0.0, 0.0, 0.0, math.log(0.5)), (10.0, 40.0, 30.0, 80.0)),
        ((0.0, 0.0, -200.0, -200.0), (20.0, 60.0, 20.0, 60.0)),  # shrinks to its centre
        ((0.0, 0.0, 1e4, 0.0), (20 - 625.0, 20.0, 20 + 625.0, 100.0)),  # 1000 / 16 times as high at most
        ((0.0, 0.0, 0.0, math.inf), (10.0, 60 - 2500.0, 30.0, 60 + 2500.0)),
    ],
)
def test_decode_by_hand(code, expected):
    box = decode_boxes(torch.tensor(code), torch.tensor(ANCHOR))
    torch.testing.assert_close(box, torch.tensor(expected), rtol=1e-5, atol=1e-4)
    assert torch.equal(decode_boxes(torch.tensor(code), torch.tensor(ANCHOR), output_xyxy=True), box[[1, 0, 3, 2]])


def test_clamp_is_where_it_is_said_to_be():
    deltas = torch.tensor([[0, 0, MAX_LOG_SIDE_RATIO - 0.1, 0], [0, 0, MAX_LOG_SIDE_RATIO, 0], [0, 0, 5.0, 0]])
    heights = decode_boxes(deltas, torch.tensor(ANCHOR))[:, 2] - decode_boxes(deltas, torch.tensor(ANCHOR))[:, 0]
    assert heights[0].item() == pytest.approx(20 * 62.5 * math.exp(-0.1), rel=1e-5)
    assert heights[1].item() == pytest.approx(20 * 62.5, rel=1e-5) and heights[2] == heights[1]


SIDE = st.floats(1, 512, width=32)
PLACE = st.floats(-256, 1024, width=32)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(PLACE, PLACE, SIDE, SIDE, PLACE, PLACE, st.floats(9, 512, width=32), st.floats(9, 512, width=32))
def test_decode_undoes_encode(y, x, height, width, anchor_y, anchor_x, anchor_height, anchor_width):
    box = torch.tensor([y, x, y + height, x + width])
    anchor = torch.tensor([anchor_y, anchor_x, anchor_y + anchor_height, anchor_x + anchor_width])
    # Coordinates up to 1536 have a float32 spacing of 1.2e-4; a few roundings are allowed.
    torch.testing.assert_close(decode_boxes(encode(box, anchor), anchor), box, rtol=0, atol=2e-3)
