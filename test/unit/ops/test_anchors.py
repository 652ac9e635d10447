"""The anchor grid by hand and by numbers of the public reference; the labeler against a loop over everything."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import effdet.anchors as anchors_module
from effdet.anchors import AnchorLabeler, Anchors, decode_box_outputs, get_feat_sizes
from effdet.config import get_efficientdet_config
from effdet.ops.sizes import check_image_size

ASPECTS = [(1.0, 1.0), (1.4, 0.7), (0.7, 1.4)]
ROOTS = [1.0, 2.0, 0.5]


# ---- the grid


def test_two_levels_by_hand():
    anchors = Anchors(3, 4, 1, [(1.0, 1.0)], 2.0, (16, 32))
    assert anchors.feat_sizes == [(16, 32), (8, 16), (4, 8), (2, 4), (1, 2)] and anchors.level_sizes == [(2, 4), (1, 2)]
    assert anchors.boxes.dtype == torch.float32
    assert anchors.boxes.tolist() == [  # stride 8: squares of 16 around the cells' centres, row by row
        [-4, -4, 12, 12],
        [-4, 4, 12, 20],
        [-4, 12, 12, 28],
        [-4, 20, 12, 36],
        [4, -4, 20, 12],
        [4, 4, 20, 20],
        [4, 12, 20, 28],
        [4, 20, 20, 36],
        [-8, -8, 24, 24],
        [-8, 8, 24, 40],
    ]  # stride 16: squares of 32


def test_order_within_a_cell_is_scale_then_aspect():
    anchors = Anchors(3, 3, 2, [(1.0, 1.0), (2.0, 0.5)], 4.0, (8, 8))
    root = math.sqrt(2)
    expected = [
        [4 - h / 2, 4 - w / 2, 4 + h / 2, 4 + w / 2]
        for h, w in ((32, 32), (16, 64), (32 * root, 32 * root), (16 * root, 64 * root))
    ]
    torch.testing.assert_close(anchors.boxes, torch.tensor(expected))
    assert anchors.get_anchors_per_location() == 4


def test_number_as_aspect_is_width_over_height():
    (box,) = Anchors(3, 3, 1, [4.0], 4.0, (8, 8)).boxes.tolist()
    assert box == [4 - 8, 4 - 32, 4 + 8, 4 + 32]  # 64 wide, 16 high: the area of the square is kept


def test_scale_for_each_level():
    anchors = Anchors(3, 4, 1, [(1.0, 1.0)], [1.0, 3.0], (16, 16))
    sides = anchors.boxes[:, 2] - anchors.boxes[:, 0]
    assert sides.tolist() == [8.0] * 4 + [48.0]
    with pytest.raises(ValueError, match=r"3 values for the 2 levels 3\.\.4"):
        Anchors(3, 4, 1, [(1.0, 1.0)], [1.0, 2.0, 3.0], (16, 16))


def test_from_config_reads_every_field():
    config = get_efficientdet_config("tf_efficientdet_d0")
    config.image_size, config.num_scales, config.aspect_ratios = (64, 96), 2, [1.0, 3.0]
    config.anchor_scale, config.min_level, config.max_level = [1.0, 2.0], 4, 5
    expected = Anchors(4, 5, 2, [1.0, 3.0], [1.0, 2.0], (64, 96)).boxes
    assert torch.equal(Anchors.from_config(config).boxes, expected) and len(expected) == (4 * 6 + 2 * 3) * 4


# Per case: cells of levels 3..7, then over all coordinates of the public reference's anchors: sum of absolutes, sum
# weighted by column 1..4, sum of y_min and of x_max weighted by row 1..N; the middle and the last anchor.
REFERENCE = [
    (
        (320, 320),
        ASPECTS,
        [(40, 40), (20, 20), (10, 10), (5, 5), (3, 3)],
        (12512972.402685642, 33111123.029310465, 28159989853.46199, 36913773748.13639),
        (196.0, 204.0, 228.0, 236.0),
        (-207.43711853027344, 29.614776611328125, 740.7704467773438, 503.71856689453125),
    ),
    (
        (448, 448),
        ASPECTS,
        [(56, 56), (28, 28), (14, 14), (7, 7), (4, 4)],
        (34026912.08493519, 88948196.02076578, 162549300013.85162, 186946235153.23517),
        (285.8888854980469, 119.77777099609375, 314.1111145019531, 176.22222900390625),
        (-105.80896759033203, 143.09552001953125, 889.8089599609375, 640.9044799804688),
    ),
    (
        (96, 736),
        ASPECTS,
        [(12, 92), (6, 46), (3, 23), (2, 12), (1, 6)],
        (11320456.180773318, 33608886.39909947, 1649170492.644206, 36770947303.667305),
        (53.888885498046875, -0.22223152220249176, 82.11111450195312, 56.222232818603516),
        (-378.6933898925781, 402.0570068359375, 474.6933898925781, 947.2763671875),
    ),
    (
        (32, 256),
        ROOTS,
        [(4, 32), (2, 16), (1, 8), (1, 4), (1, 2)],
        (520956.8559114933, 1508885.649310112, -23211850.302476406, 223349403.91529465),
        (4.0, 172.0, 36.0, 204.0),
        (-127.67514038085938, -95.35028076171875, 159.67514038085938, 479.35028076171875),
    ),
]


@pytest.mark.parametrize(
    "size, aspects, cells, sums, middle, last", REFERENCE, ids=[f"{case[0][0]}x{case[0][1]}" for case in REFERENCE]
)
def test_grid_equals_the_reference(size, aspects, cells, sums, middle, last):
    """Sizes whose stride at some level is not a power of two (320 / 3 cells, 736 / 6) or differs between the axes."""
    anchors = Anchors(3, 7, 3, aspects, 4.0, size)
    boxes = anchors.boxes.double()
    rows = torch.arange(1, len(boxes) + 1, dtype=torch.float64)
    assert anchors.level_sizes == cells and len(boxes) == 9 * sum(height * width for height, width in cells)
    actual = (boxes.abs().sum(), (boxes * torch.arange(1, 5)).sum(), boxes[:, 0] @ rows, boxes[:, 3] @ rows)
    np.testing.assert_allclose(torch.stack(actual).numpy(), sums, rtol=1e-8)
    np.testing.assert_allclose(boxes[len(boxes) // 2].numpy(), middle, rtol=1e-6)
    np.testing.assert_allclose(boxes[-1].numpy(), last, rtol=1e-6)


def test_feat_sizes_round_up():
    assert get_feat_sizes((320, 96), 7) == [(320, 96), (160, 48), (80, 24), (40, 12), (20, 6), (10, 3), (5, 2), (3, 1)]
    assert get_feat_sizes((5, 1), 3) == [(5, 1), (3, 1), (2, 1), (1, 1)]


@pytest.mark.parametrize("size", [(320, 320), (32, 256), (96, 736), [512, 512], np.array([64, 128])], ids=str)
def test_valid_sizes(size):
    checked = check_image_size(size)
    assert checked == tuple(int(side) for side in size) and all(type(side) is int for side in checked)


@pytest.mark.parametrize(
    "size, words",
    [
        ((500, 500), ("(500, 500)", "multiple of 32", "(480, 480)", "(512, 512)")),
        ((512, 700), ("(512, 700)", "(512, 672)", "(512, 704)")),  # the good side stays
        ((20, 64), ("(20, 64)", "(32, 64)")),  # never 0
        ((0, 64), ("two positive numbers", "(0, 64)")),
        ((-32, 64), ("two positive numbers", "(-32, 64)")),
        ((512,), ("two positive numbers", "(512,)")),
        ((3, 512, 512), ("two positive numbers", "(3, 512, 512)")),
    ],
)
def test_refused_sizes(size, words):
    with pytest.raises(ValueError) as error:
        check_image_size(size)
    for word in words:
        assert word in str(error.value)
    assert "(0," not in str(error.value) or size[0] == 0


# ---- the labeler


@pytest.fixture(autouse=True, scope="module", params=["CPU's way", "accelerator's way"])
def way(request):
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "accelerator's way":
            patch.setattr(anchors_module, "is_host", lambda device: False)
        yield


def label_slowly(
    anchors: Anchors,
    boxes: Tensor,
    classes: Tensor,
    threshold: float = 0.5,
    filter_valid: bool = True,
    ignore_regions: bool = False,
) -> tuple[list, list, list]:
    """Label each image, ground truth by ground truth and anchor by anchor, in float32 like the fast one.

    Returns:
        class targets, box deltas (None where an anchor has none) and number of positives, as nested lists.
    """
    all_classes, all_codes, counts = [], [], []
    for image_boxes, image_classes in zip(boxes.float().numpy(), classes.numpy(), strict=True):
        grid = anchors.boxes.numpy()
        best = [(np.float32(-1), -1)] * len(grid)  # IoU and ground truth of each anchor so far
        forced: dict[int, int] = {}
        ignored = [False] * len(grid)
        for slot, (box, number) in enumerate(zip(image_boxes, image_classes, strict=True)):
            counts_as_object = number > -1 if filter_valid else number != -2
            area = (box[2] - box[0]) * (box[3] - box[1])
            best_anchor = (np.float32(-1), -1)
            for index, anchor in enumerate(grid):
                height = max(min(box[2], anchor[2]) - max(box[0], anchor[0]), np.float32(0))
                width = max(min(box[3], anchor[3]) - max(box[1], anchor[1]), np.float32(0))
                intersection, own_area = height * width, (anchor[2] - anchor[0]) * (anchor[3] - anchor[1])
                iou = intersection / (area + own_area - intersection) if intersection > 0 else np.float32(0)
                if counts_as_object:
                    best[index] = max(best[index], (iou, slot), key=lambda pair: pair[0])  # the first on a tie
                    best_anchor = max(best_anchor, (iou, index), key=lambda pair: pair[0])
                elif number == -2 and ignore_regions and intersection > np.float32(0.5) * own_area:
                    ignored[index] = True
            if counts_as_object:
                forced.setdefault(best_anchor[1], slot)
        image_targets, image_codes = [], []
        for index, (iou, slot) in enumerate(best):
            match = forced.get(index, slot if iou >= threshold else -1)
            image_targets.append(int(image_classes[match]) - 1 if match >= 0 else -2 if ignored[index] else -1)
            image_codes.append(encode_slowly(image_boxes[match], grid[index]) if match >= 0 else None)
        all_classes.append(image_targets)
        all_codes.append(image_codes)
        counts.append(sum(code is not None for code in image_codes))
    return all_classes, all_codes, counts


def encode_slowly(box: np.ndarray, anchor: np.ndarray) -> list[float]:
    y_min, x_min, y_max, x_max = box.astype(np.float64)
    top, left, bottom, right = anchor.astype(np.float64)
    height, width = bottom - top, right - left
    return [
        (y_min + y_max - top - bottom) / 2 / height,
        (x_min + x_max - left - right) / 2 / width,
        math.log((y_max - y_min + 1e-7) / height),
        math.log((x_max - x_min + 1e-7) / width),
    ]


def assert_equals_slow(labeler: AnchorLabeler, boxes: Tensor, classes: Tensor, filter_valid: bool = True) -> Tensor:
    """Compare one call with the slow twin; return the class targets."""
    targets, deltas, num_positives = labeler.assign(boxes, classes, filter_valid)
    expected_targets, expected_codes, expected_counts = label_slowly(
        labeler.anchors, boxes, classes, labeler.match_threshold, filter_valid, labeler.ignore_regions
    )
    assert targets.dtype == torch.int64 and targets.tolist() == expected_targets
    assert num_positives.dtype == torch.float32 and num_positives.tolist() == expected_counts
    rows = np.array([code or [0.0] * 4 for image in expected_codes for code in image])
    np.testing.assert_allclose(deltas.reshape(-1, 4).numpy(), rows, rtol=1e-4, atol=1e-5)
    return targets


GRID = Anchors(3, 5, 2, [(1.0, 1.0), (1.4, 0.7)], 2.0, (32, 64))  # 168 anchors


def make_case(kind: str, seed: int, images: int = 2, slots: int = 6) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    places = rng.uniform(-8, 1, (images, slots, 2)) + rng.uniform(0, 1, (images, slots, 2)) * [32, 64]
    boxes = np.concatenate((places, places + np.exp(rng.uniform(0, 4, (images, slots, 2)))), 2)
    classes = rng.integers(1, 6, (images, slots))
    if kind == "tied":
        boxes = np.round(boxes / 8) * 8
        boxes[..., 2:] += 8
    elif kind == "duplicated":
        boxes[:, slots // 2 :] = boxes[:, : slots - slots // 2]
    elif kind == "equal to anchors":
        boxes = GRID.boxes.numpy()[rng.integers(0, len(GRID.boxes), (images, slots))]
    elif kind == "tiny":
        boxes[..., 2:] = boxes[..., :2] + rng.uniform(0.01, 0.5, (images, slots, 2))
    elif kind == "points and lines":
        boxes[:, ::2, 2:] = boxes[:, ::2, :2]
        boxes[:, 1::2, 2] = boxes[:, 1::2, 0]
    elif kind == "outside":
        boxes[:, ::2] += 500
    elif kind == "padded":
        classes[0, 2:], boxes[0, 2:] = -1, 0
        classes[1, ::2], boxes[1, ::2] = -1, -1
    elif kind == "class 0 counts, as in the reference":
        classes[:, ::2] = 0
    elif kind == "some images empty":
        classes[0], boxes[0] = -1, 0
    return torch.tensor(boxes, dtype=torch.float32), torch.tensor(classes)


KINDS = [
    "random",
    "tied",
    "duplicated",
    "equal to anchors",
    "tiny",
    "points and lines",
    "outside",
    "padded",
    "class 0 counts, as in the reference",
    "some images empty",
]


@pytest.mark.parametrize("kind", KINDS)
def test_labels_equal_the_loop(kind):
    for seed in range(5):
        targets = assert_equals_slow(AnchorLabeler(GRID, 5), *make_case(kind, seed))
        assert (targets >= 0).any() and (targets == -1).any()


@pytest.mark.parametrize("threshold", [0.3, 0.9])
def test_threshold(threshold):
    boxes, classes = make_case("random", 7)
    few = assert_equals_slow(AnchorLabeler(GRID, 5, threshold), boxes, classes)
    assert (few >= 0).sum() != (AnchorLabeler(GRID, 5).assign(boxes, classes)[0] >= 0).sum()


COORDINATE = st.floats(-16, 80, width=32) | st.sampled_from([0.0, 8.0, 16.0, 24.0, 32.0])
LENGTH = st.floats(0, 64, width=32) | st.sampled_from([0.0, 8.0, 16.0, 32.0])
OBJECT = st.tuples(COORDINATE, COORDINATE, LENGTH, LENGTH, st.sampled_from([-2, -1, 1, 2, 5]))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(OBJECT, min_size=1, max_size=4), st.booleans())
def test_labels_of_any_boxes_equal_the_loop(objects, ignore_regions):
    boxes = torch.tensor([[[y, x, y + height, x + width] for y, x, height, width, _ in objects]])
    classes = torch.tensor([[entry[4] for entry in objects]])
    anchors = Anchors(3, 4, 2, [(1.0, 1.0)], 2.0, (32, 32))
    assert_equals_slow(AnchorLabeler(anchors, 5, ignore_regions=ignore_regions), boxes, classes)


@pytest.mark.parametrize("elements", [1, 2 * 168 * 2, 2 * 168 * 5])
def test_chunks_change_nothing(monkeypatch, elements):
    """40 slots in chunks of 1, 2 and 5, with duplicates and ignore regions in different chunks."""
    boxes, classes = make_case("tied", 3, slots=40)
    boxes[:, 30:] = boxes[:, :10]
    classes[:, 5:8] = -2
    classes[0, 20:26] = -1
    labeler = AnchorLabeler(GRID, 5, ignore_regions=True)
    whole = labeler.assign(boxes, classes)
    assert (whole[0] == -2).any() and (whole[0] >= 0).any()
    monkeypatch.setattr(anchors_module, "_MAX_OVERLAP_ELEMENTS", elements)
    for part, expected in zip(labeler.assign(boxes, classes), whole, strict=True):
        assert torch.equal(part, expected)


def test_chunked_labels_equal_the_loop(monkeypatch):
    monkeypatch.setattr(anchors_module, "_MAX_OVERLAP_ELEMENTS", 2 * 168 * 3)
    assert_equals_slow(AnchorLabeler(GRID, 5), *make_case("duplicated", 1, slots=10))


def test_no_objects():
    labeler = AnchorLabeler(GRID, 5, ignore_regions=True)
    none = torch.zeros(2, 0, 4), torch.zeros(2, 0, dtype=torch.int64)
    padding = torch.zeros(2, 3, 4), torch.full((2, 3), -1)
    for boxes, classes in (none, padding):
        targets, deltas, num_positives = labeler.assign(boxes, classes)
        assert targets.shape == (2, 168) and (targets == -1).all()
        assert deltas.shape == (2, 168, 4) and (deltas == 0).all() and num_positives.tolist() == [0.0, 0.0]


def test_padding_changes_nothing():
    boxes, classes = make_case("random", 4)
    expected = AnchorLabeler(GRID, 5).assign(boxes, classes)
    more_boxes = torch.cat((boxes, torch.full((2, 7, 4), -1.0), torch.zeros(2, 2, 4)), 1)
    more_classes = torch.cat((classes, torch.full((2, 9), -1)), 1)
    for order in (torch.arange(15), torch.arange(15).roll(9)):  # padding behind and in front
        for part, other in zip(
            AnchorLabeler(GRID, 5).assign(more_boxes[:, order], more_classes[:, order]), expected, strict=True
        ):
            assert torch.equal(part, other)


def test_ignore_regions():
    """One object and one region: unmatched anchors mostly inside the region are left out, matched ones stay."""
    boxes = torch.tensor([[[8.0, 8.0, 24.0, 24.0], [0.0, 0.0, 32.0, 40.0]]])
    classes = torch.tensor([[3, -2]])
    targets = assert_equals_slow(AnchorLabeler(GRID, 5, ignore_regions=True), boxes, classes)
    plain = assert_equals_slow(AnchorLabeler(GRID, 5), boxes, classes)
    positive = plain >= 0
    assert positive.any() and torch.equal(targets[positive], plain[positive]) and (plain != -2).all()
    centres = (GRID.boxes[:, 1] + GRID.boxes[:, 3]) / 2
    assert (targets[0, centres > 56] == -1).all() and (targets == -2).sum() > 50
    only_region = assert_equals_slow(AnchorLabeler(GRID, 5, ignore_regions=True), boxes[:, 1:], classes[:, 1:])
    assert (only_region < 0).all() and (only_region == -2).any()


def test_region_boundary_is_half_the_anchor():
    anchors = Anchors(3, 3, 1, [(1.0, 1.0)], 1.0, (8, 8))  # one anchor, 0..8
    labeler = AnchorLabeler(anchors, 5, ignore_regions=True)
    for right, expected in ((4.0, -1), (4.01, -2)):
        targets, _, _ = labeler.assign(torch.tensor([[[0.0, 0.0, 8.0, right]]]), torch.tensor([[-2]]))
        assert targets.tolist() == [[expected]]


def test_filter_valid_off_counts_all_but_regions():
    boxes, classes = make_case("padded", 5)
    classes[0, 1] = -2
    targets = assert_equals_slow(AnchorLabeler(GRID, 5), boxes, classes, filter_valid=False)
    assert (targets == -2).any(), "rows of class -1 are objects now, and their target is the class minus 1"


def test_forced_match_takes_the_first_box_and_the_first_anchor():
    far = [100.0, 100.0, 101.0, 101.0]  # overlaps nothing: all anchors tie at 0
    targets, _, num_positives = AnchorLabeler(GRID, 5).assign(torch.tensor([[far, far]]), torch.tensor([[4, 2]]))
    assert targets[0, 0] == 3 and (targets[0, 1:] == -1).all() and num_positives.tolist() == [1.0]


def test_levels_and_single_images_are_the_batch():
    labeler = AnchorLabeler(GRID, 5)
    boxes, classes = make_case("random", 6, images=3)
    targets, deltas, counts = labeler.batch_label_anchors(boxes, classes)
    assert [tuple(level.shape) for level in targets] == [(3, 4, 8, 4), (3, 2, 4, 4), (3, 1, 2, 4)]
    assert [tuple(level.shape) for level in deltas] == [(3, 4, 8, 16), (3, 2, 4, 16), (3, 1, 2, 16)]
    flat_targets, flat_codes, _ = labeler.assign(boxes, classes)
    assert torch.equal(torch.cat([level.flatten(1) for level in targets], 1), flat_targets)
    assert torch.equal(torch.cat([level.reshape(3, -1, 4) for level in deltas], 1), flat_codes)
    for image in range(3):
        for given_classes in (classes[image], classes[image].unsqueeze(1).float()):
            one_targets, one_codes, count = labeler.label_anchors(boxes[image].double(), given_classes)
            assert count == counts[image]
            assert all(torch.equal(one, all_[image]) for one, all_ in zip(one_targets, targets, strict=True))
            assert all(torch.equal(one, all_[image]) for one, all_ in zip(one_codes, deltas, strict=True))


def test_codes_decode_to_the_matched_boxes():
    labeler = AnchorLabeler(GRID, 5)
    boxes, _ = make_case("random", 8, images=1)
    targets, deltas, _ = labeler.assign(boxes, torch.arange(1, 7).unsqueeze(0))
    rows = (targets[0] >= 0).nonzero().squeeze(1)
    decoded = decode_box_outputs(deltas[0, rows], GRID.boxes[rows])
    torch.testing.assert_close(decoded, boxes[0, targets[0, rows]], rtol=1e-4, atol=1e-3)


def test_the_cpus_way_is_the_accelerators_way_on_a_full_grid(monkeypatch):
    """All anchors of a network, boxes of every size and shape, also such that no anchor fits."""
    anchors = Anchors(3, 7, 3, [(1.0, 1.0), (1.4, 0.7), (0.7, 1.4)], 4.0, (128, 192))
    rng = np.random.default_rng(5)
    for threshold in (0.5, 0.35):
        sides = np.exp(rng.uniform(0, 5.3, (4, 60, 2)))
        low = rng.uniform(-10, 1, (4, 60, 2)) + rng.uniform(0, 1, (4, 60, 2)) * [128, 192]
        boxes = torch.tensor(np.concatenate((low, low + sides), 2), dtype=torch.float32)
        classes = torch.tensor(rng.integers(-1, 6, (4, 60)))
        labeler = AnchorLabeler(anchors, 5, threshold)
        results = []
        for host in (True, False):
            monkeypatch.setattr(anchors_module, "is_host", lambda device, host=host: host)
            results.append(labeler.assign(boxes, classes))
        for mine, theirs in zip(*results, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
        assert (results[0][0] >= 0).sum() > 300
