"""Candidate selection, NMS, soft-NMS and the detections made of them, against loops over single boxes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from effdet import anchors as anchors_module
from effdet import loss
from effdet.anchors import AnchorLabeler, Anchors
from effdet.loss import loss_fn
from effdet.ops import focal, nms, nms_blocks, nms_cpu
from effdet.ops.nms import (
    batched_nms,
    batched_soft_nms,
    generate_detections,
    make_detections,
    npu_nms,
    select_candidates,
)

ZERO = np.float32(0)


@pytest.fixture(autouse=True, scope="module", params=["CPU's way", "accelerator's way"])
def way(request):
    with pytest.MonkeyPatch.context() as patch:
        if request.param != "CPU's way":
            patch.setattr(nms, "is_host", lambda device: False)
        # Blocks so small that most cases need several.
        patch.setattr(nms_cpu, "_FIRST_BLOCK", 3)
        patch.setattr(nms_cpu, "_BLOCK", 5)
        patch.setattr(nms_blocks, "_BLOCK", 7)
        patch.setattr(nms_blocks, "_ROUNDS", 2)
        yield


def iou_slowly(a: np.ndarray, b: np.ndarray) -> np.float32:
    """Compute the IoU of two xyxy boxes in float32; 0 where both are empty."""
    width = max(min(a[2], b[2]) - max(a[0], b[0]), ZERO)
    height = max(min(a[3], b[3]) - max(a[1], b[1]), ZERO)
    intersection = width * height
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - intersection
    return intersection / union if intersection > 0 else ZERO


def nms_slowly(
    boxes: np.ndarray, scores: np.ndarray, classes: np.ndarray, max_det: int, threshold: float = 0.5
) -> list[int]:
    """Go through the boxes by falling score and keep each that no kept one of its class overlaps too much."""
    kept: list[int] = []
    for index in sorted(range(len(scores)), key=lambda i: (-scores[i], i)):
        rivals = [other for other in kept if classes[other] == classes[index]]
        if len(kept) < max_det and all(iou_slowly(boxes[other], boxes[index]) <= threshold for other in rivals):
            kept.append(index)
    return kept


def soft_nms_slowly(
    boxes: np.ndarray,
    scores: np.ndarray,
    classes: np.ndarray,
    max_det: int,
    gaussian: bool = True,
    sigma: float = 0.5,
    minimum: float = 0.001,
    threshold: float = 0.5,
) -> tuple[list[int], list[float]]:
    """Take the best box, lower the scores of its class's others, drop those that fall to `minimum`; repeat."""
    left = {index: float(score) for index, score in enumerate(scores)}
    kept, kept_scores = [], []
    while left and len(kept) < max_det:
        best = max(left, key=lambda index: (left[index], -index))
        kept.append(best)
        kept_scores.append(left.pop(best))
        for index in list(left):
            iou = float(iou_slowly(boxes[best], boxes[index])) if classes[index] == classes[best] else 0.0
            if gaussian:
                left[index] *= math.exp(-iou * iou / sigma)
            elif iou > threshold:
                left[index] *= 1 - iou
            if left[index] <= minimum:
                del left[index]
    return kept, kept_scores


def make_boxes(
    kind: str, seed: int, images: int = 2, count: int = 40, num_classes: int = 3
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw crowded xyxy boxes inside 0..80, scores and classes."""
    rng = np.random.default_rng(seed)
    corners = rng.uniform(0, 40, (images, count, 2))
    boxes = np.concatenate((corners, corners + rng.uniform(2, 40, (images, count, 2))), 2)
    scores = rng.uniform(0, 1, (images, count))
    classes = rng.integers(0, num_classes, (images, count))
    if kind == "on a grid":  # IoUs of exactly 0.5, and equal scores
        boxes = np.round(boxes / 10) * 10
        boxes[..., 2:] = np.maximum(boxes[..., 2:], boxes[..., :2] + 10)
        scores = np.round(scores * 8) / 8
    elif kind == "duplicates":
        boxes[:, count // 2 :] = boxes[:, : count // 2]
        classes[:, count // 2 :] = classes[:, : count // 2]
    elif kind == "equal scores":
        scores[:] = 0.25
    elif kind == "empty boxes":
        boxes[:, ::3, 2:] = boxes[:, ::3, :2]  # points
        boxes[:, 1::3, 3] = boxes[:, 1::3, 1]  # lines
        boxes[:, 9] = boxes[:, 0]  # the same point twice
        classes[:, 9] = classes[:, 0]
    elif kind == "scores of 0":
        scores[:, ::2] = 0
    return (torch.tensor(boxes, dtype=torch.float32), torch.tensor(scores, dtype=torch.float32), torch.tensor(classes))


def assert_nms_equals_slow(boxes: Tensor, scores: Tensor, classes: Tensor, max_det: int) -> int:
    """Compare one call with the slow twin; return how many boxes were kept."""
    index, kept_scores = batched_nms(boxes, scores, classes, max_det)
    rows = min(max_det, boxes.shape[1])
    assert index.shape == kept_scores.shape == (len(boxes), rows)
    total = 0
    for image in range(len(boxes)):
        expected = nms_slowly(boxes[image].numpy(), scores[image].numpy(), classes[image].numpy(), max_det)
        count = len(expected)
        assert index[image, :count].tolist() == expected
        assert torch.equal(kept_scores[image, :count], scores[image, expected])
        assert kept_scores[image, count:].tolist() == [-1.0] * (rows - count)
        total += count
    return total


KINDS = ["random", "on a grid", "duplicates", "equal scores", "empty boxes", "scores of 0"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_det", [1, 10, 40, 100, 300])
def test_nms_equals_the_loop(kind, max_det):
    for seed, num_classes in ((0, 3), (1, 1)):
        case = make_boxes(kind, seed, num_classes=num_classes)
        kept = assert_nms_equals_slow(*case, max_det)
        if kind != "empty boxes":  # those overlap nothing, not even their equals
            assert kept < 80, "something must be suppressed"


@pytest.mark.parametrize("kind", KINDS)
def test_nms_in_a_graph_equals_the_loop(kind, monkeypatch):
    monkeypatch.setattr(nms, "is_host", lambda device: False)
    monkeypatch.setattr(nms, "is_recorded", lambda: True)
    assert_nms_equals_slow(*make_boxes(kind, 0), 40)


PLACE = st.integers(0, 12) | st.floats(0, 12, width=32)
BOX = st.tuples(
    PLACE, PLACE, PLACE, PLACE, st.sampled_from([0.0, 0.25, 0.5, 1.0]) | st.floats(0, 1, width=32), st.integers(0, 1)
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(BOX, min_size=1, max_size=12))
def test_nms_of_any_boxes_equals_the_loop(rows):
    table = torch.tensor(rows, dtype=torch.float32).unsqueeze(0)
    boxes = torch.cat((table[..., :2], table[..., :2] + table[..., 2:4]), -1)
    assert_nms_equals_slow(boxes, table[..., 4], table[..., 5].long(), 12)


def test_a_chain_of_overlaps_longer_than_a_look_is_decided_to_its_end():
    """Box n drops box n + 1 only where box n - 1 does not drop it first: as many rounds as there are boxes."""
    x = torch.arange(60.0) * 3
    boxes = torch.stack((x, torch.zeros(60), x + 10, torch.full((60,), 10.0)), -1).unsqueeze(0)  # IoU 7/13, then 4/16
    index, _ = batched_nms(boxes, torch.linspace(0.9, 0.1, 60).unsqueeze(0), torch.zeros(1, 60), 100)
    assert index[0, :30].tolist() == list(range(0, 60, 2))


def test_threshold_is_exclusive():
    """IoU of exactly 0.5 keeps both, a little more suppresses."""
    scores, classes = torch.tensor([[0.9, 0.8]]), torch.zeros(1, 2, dtype=torch.int64)
    for height, expected in ((5.0, 0.8), (5.01, -1.0)):
        boxes = torch.tensor([[[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, height]]])
        assert batched_nms(boxes, scores, classes)[1][0, 1].item() == pytest.approx(expected)
    index, _ = batched_nms(boxes, scores, torch.tensor([[0, 1]]))
    assert index.tolist() == [[0, 1]], "another class never suppresses"


def operator_slowly(
    boxes: Tensor, scores: Tensor, score_threshold: float, iou_threshold: float, per_class: int, total: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Stand in for npu_batch_nms: [B, k, 1, 4], [B, k, K] -> boxes, scores, classes, counts; zeros as padding."""
    batch, _, num_classes = scores.shape
    out = [torch.zeros(batch, total, 4), torch.zeros(batch, total), torch.zeros(batch, total)]
    counts = torch.zeros(batch, dtype=torch.int32)
    for image in range(batch):
        found = []
        for number in range(num_classes):
            rows = (scores[image, :, number] > score_threshold).nonzero().flatten()
            flat, own = boxes[image, rows, 0], scores[image, rows, number]
            kept = nms_slowly(flat.numpy(), own.numpy(), np.zeros(len(rows)), per_class, iou_threshold)
            found += [(float(own[index]), number, flat[index]) for index in kept]
        found = sorted(found, key=lambda row: -row[0])[:total]
        counts[image] = len(found)
        for row, (score, number, box) in enumerate(found):
            out[0][image, row], out[1][image, row], out[2][image, row] = box, score, number
    return *out, counts


@pytest.mark.parametrize("max_det", [1, 10, 100])
def test_an_operator_by_class_keeps_what_the_exact_one_keeps(max_det):
    boxes, scores, classes = make_boxes("random", seed=5, num_classes=4)
    index, expected_scores = batched_nms(boxes, scores, classes, max_det)
    kept, kept_scores, kept_classes = npu_nms(operator_slowly, 4, boxes, scores, classes, max_det)
    rows = index.shape[1]
    assert torch.equal(kept_scores[:, :rows], expected_scores)
    assert (kept_scores[:, rows:] == -1).all() and kept_classes.dtype == classes.dtype
    there = expected_scores >= 0
    assert there.any()
    assert torch.equal(kept[:, :rows][there], boxes.gather(1, index.unsqueeze(-1).expand(-1, -1, 4))[there])
    assert torch.equal(kept_classes[:, :rows][there], classes.gather(1, index)[there])


@pytest.mark.parametrize("gaussian", [True, False], ids=["gaussian", "linear"])
@pytest.mark.parametrize("kind", ["random", "duplicates", "empty boxes", "scores of 0"])
@pytest.mark.parametrize("max_det", [1, 100])
def test_soft_nms_equals_the_loop(kind, gaussian, max_det):
    lowered = False
    for seed, num_classes in ((0, 3), (1, 1)):
        boxes, scores, classes = make_boxes(kind, seed, num_classes=num_classes)
        index, kept_scores = batched_soft_nms(boxes, scores, classes, max_det, method_gaussian=gaussian)
        for image in range(len(boxes)):
            expected, expected_scores = soft_nms_slowly(
                boxes[image].numpy(), scores[image].numpy(), classes[image].numpy(), max_det, gaussian
            )
            count = len(expected)
            assert index[image, :count].tolist() == expected
            np.testing.assert_allclose(kept_scores[image, :count].numpy(), expected_scores, rtol=1e-4, atol=1e-7)
            assert (kept_scores[image, count:] == -1).all()
            lowered |= bool(np.any(np.array(expected_scores) < scores[image, expected].numpy() * 0.99))
    assert lowered or max_det == 1 or not gaussian and kind == "empty boxes", "no score was lowered"


def test_soft_nms_by_hand():
    """Two boxes of IoU 0.6, one of another class, one below the limit from the start, one lowered below it."""
    boxes = torch.tensor([[[0.0, 0.0, 10, 10], [0, 0, 10, 6], [0, 0, 10, 10], [60, 60, 70, 70], [0, 0, 10, 9.9]]])
    scores, classes = torch.tensor([[0.9, 0.8, 0.7, 0.0005, 0.002]]), torch.tensor([[0, 0, 1, 0, 0]])
    index, kept = batched_soft_nms(boxes, scores, classes)
    assert index[0, :3].tolist() == [0, 2, 1] and kept[0, 3:].tolist() == [-1, -1]
    assert kept[0, :3].tolist() == pytest.approx([0.9, 0.7, 0.8 * math.exp(-0.36 / 0.5)], rel=1e-5)
    index, kept = batched_soft_nms(boxes, scores, classes, sigma=1.0, score_threshold=0.75)
    assert index[0, 0] == 0 and kept[0].tolist() == [pytest.approx(0.9), -1, -1, -1, -1]
    _, linear = batched_soft_nms(boxes, scores, classes, method_gaussian=False, iou_threshold=0.55)
    assert linear[0, :3].tolist() == pytest.approx([0.9, 0.7, 0.8 * 0.4], rel=1e-5)
    _, untouched = batched_soft_nms(boxes, scores, classes, method_gaussian=False, iou_threshold=0.65)
    assert untouched[0, :3].tolist() == pytest.approx([0.9, 0.8, 0.7])
    _, equal = batched_soft_nms(boxes[:, [0, 3]], torch.tensor([[0.5, 0.25]]), classes[:, :2], score_threshold=0.25)
    assert equal.tolist() == [[0.5, -1]], "a score at the limit is dropped"
    _, best = batched_soft_nms(boxes[:, 3:4], scores[:, 3:4], classes[:, 3:4])
    assert best.tolist() == [[pytest.approx(0.0005)]], "the best box is kept whatever its score"


# ---- candidates


def make_heads(
    num_classes: int, size: tuple[int, int], seed: int = 0, anchors: int = 9
) -> tuple[list[Tensor], list[Tensor]]:
    """Draw head outputs of levels 3..7: logits that never tie, and deltas."""
    generator = torch.Generator().manual_seed(seed)
    cells = [(math.ceil(size[0] / 2**level), math.ceil(size[1] / 2**level)) for level in range(3, 8)]
    total = sum(2 * anchors * num_classes * height * width for height, width in cells)
    values = (torch.randperm(total, generator=generator).float() / total * 10 - 8).split(
        [2 * anchors * num_classes * height * width for height, width in cells]
    )
    logits = [part.reshape(2, anchors * num_classes, *cell) for part, cell in zip(values, cells, strict=True)]
    return logits, [torch.randn(2, anchors * 4, *cell, generator=generator) * 0.3 for cell in cells]


def candidates_slowly(
    logits: list[Tensor], deltas: list[Tensor], image: int, num_classes: int, limit: int
) -> list[tuple[float, list[float], int, int]]:
    """List (logit, code, anchor, class) of every anchor and class by falling logit."""
    found, number = [], 0
    for level_logits, level_codes in zip(logits, deltas, strict=True):
        values, boxes = level_logits[image].numpy(), level_codes[image].numpy()
        for row, column, anchor in np.ndindex(*values.shape[1:], len(boxes) // 4):
            code = boxes[anchor * 4 : anchor * 4 + 4, row, column].tolist()
            for class_idx in range(num_classes):
                found.append((values[anchor * num_classes + class_idx, row, column].item(), code, number, class_idx))
            number += 1
    return sorted(found, key=lambda entry: -entry[0])[:limit]


@pytest.mark.parametrize(
    "num_classes, size, limit, expected_count",
    [(3, (32, 64), 50, 50), (3, (32, 64), 1, 1), (1, (128, 128), 5000, 3069), (7, (32, 64), 5000, 44 * 9 * 7)],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_candidates_equal_the_sorted_list(num_classes, size, limit, expected_count, layout):
    logits, deltas = make_heads(num_classes, size)
    logits = [level.contiguous(memory_format=layout) for level in logits]
    top_logits, top_codes, anchors, classes = select_candidates(logits, deltas, num_classes, limit)
    assert top_logits.shape == anchors.shape == classes.shape == (2, expected_count)
    for image in range(2):
        expected = candidates_slowly(logits, deltas, image, num_classes, limit)
        assert top_logits[image].tolist() == [entry[0] for entry in expected]
        assert top_codes[image].tolist() == [entry[1] for entry in expected]
        assert anchors[image].tolist() == [entry[2] for entry in expected]
        assert classes[image].tolist() == [entry[3] for entry in expected]


# ---- detections

GRID = Anchors(3, 7, 3, [(1.0, 1.0), (1.4, 0.7), (0.7, 1.4)], 4.0, (64, 96))


def make_candidates(num_classes: int = 3, limit: int = 60) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return logits, deltas, anchors' boxes and classes as `make_detections` takes them."""
    logits, deltas, indices, classes = select_candidates(*make_heads(num_classes, (64, 96)), num_classes, limit)
    return logits, deltas, GRID.boxes[indices], classes


def detections_slowly(
    logits: Tensor,
    deltas: Tensor,
    anchors: Tensor,
    classes: Tensor,
    scale: Tensor | None,
    size: Tensor | None,
    max_det: int,
    soft: bool,
) -> np.ndarray:
    """Make one image's rows from the definition."""
    factor = 1.0 if scale is None else scale.item()
    boxes = []
    for (ty, tx, th, tw), (y_min, x_min, y_max, x_max) in zip(deltas.tolist(), anchors.tolist(), strict=True):
        y, x = (y_min + y_max) / 2 + ty * (y_max - y_min), (x_min + x_max) / 2 + tx * (x_max - x_min)
        height = (y_max - y_min) * math.exp(min(th, math.log(62.5)))
        width = (x_max - x_min) * math.exp(min(tw, math.log(62.5)))
        box = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
        if size is not None:
            box = [min(max(value, 0.0), size[axis % 2].item() / factor) for axis, value in enumerate(box)]
        boxes.append(box)
    scores = 1 / (1 + np.exp(-logits.double().numpy()))
    table = np.array(boxes, dtype=np.float32)
    if soft:
        kept, kept_scores = soft_nms_slowly(table, scores, classes.numpy(), max_det)
    else:
        kept = nms_slowly(table, scores, classes.numpy(), max_det)
        kept_scores = scores[kept]
    rows = np.zeros((max_det, 6))
    for row, (index, score) in enumerate(zip(kept, kept_scores, strict=True)):
        rows[row] = [*(table[index] * factor), score, classes[index].item() + 1]
    return rows


SCALES, SIZES = torch.tensor([2.5, 0.5]), torch.tensor([[200.0, 130.0], [48.0, 20.0]])


@pytest.mark.parametrize("max_det", [1, 20, 100])
@pytest.mark.parametrize("info", ["none", "scale", "scale and size"])
@pytest.mark.parametrize("soft", [False, True], ids=["nms", "soft_nms"])
def test_detections_equal_the_loop(max_det, info, soft):
    candidates = make_candidates()
    if info != "scale and size":  # soft-NMS moves classes apart by the largest coordinate: none may be negative
        candidates[2].add_(1000)
    scale, size = SCALES if "scale" in info else None, SIZES if "size" in info else None
    rows = make_detections(*candidates, scale, size, max_det, soft)
    assert rows.shape == (2, max_det, 6) and rows.dtype == torch.float32
    for image in range(2):
        expected = detections_slowly(
            *(part[image] for part in candidates),
            None if scale is None else scale[image],
            None if size is None else size[image],
            max_det,
            soft,
        )
        np.testing.assert_allclose(rows[image].numpy(), expected, rtol=2e-4, atol=1e-3)
        if max_det == 100:
            assert (rows[image, -30:] == 0).all() and rows[image, 0, 4] > 0.5


@pytest.mark.parametrize("soft", [False, True], ids=["nms", "soft_nms"])
def test_suppression_on_the_host_gives_the_same_detections(soft):
    logits, deltas, anchors, classes = make_candidates()
    scale, size = torch.tensor([0.7, 1.3]), torch.tensor([[50.0, 40.0], [60.0, 30.0]])
    for info in ((None, None), (scale, None), (scale, size)):
        arguments = (logits, deltas, anchors, classes, *info, 20, soft)
        assert torch.equal(make_detections(*arguments, on_host=True), make_detections(*arguments))


def test_clipping_takes_the_original_size():
    rows = make_detections(*make_candidates(limit=5000), SCALES, SIZES)
    for image in range(2):
        boxes = rows[image, rows[image, :, 5] > 0, :4]
        assert boxes.min() == 0
        assert boxes.amax(0).tolist() == pytest.approx(SIZES[image].tolist() * 2, rel=1e-5)


@pytest.mark.parametrize("soft", [False, True], ids=["nms", "soft_nms"])
def test_a_batch_is_its_images(soft):
    candidates = make_candidates(limit=200)
    batch = make_detections(*candidates, SCALES, SIZES, 30, soft)
    for image in range(2):
        one = make_detections(
            *(part[image : image + 1] for part in candidates), SCALES[image], SIZES[image : image + 1], 30, soft
        )
        torch.testing.assert_close(one[0], batch[image], rtol=1e-5, atol=1e-5)


def test_wild_codes_stay_finite():
    logits, deltas, anchors, classes = make_candidates()
    deltas[:, ::2] = 1e4
    deltas[:, 1::4] = -1e4
    rows = make_detections(logits, deltas, anchors, classes)
    assert torch.isfinite(rows).all()
    clipped = make_detections(logits, deltas, anchors, classes, SCALES, SIZES)
    assert torch.isfinite(clipped).all() and (clipped[..., 2] <= SIZES[:, :1]).all()


@pytest.mark.parametrize("soft", [False, True], ids=["nms", "soft_nms"])
def test_single_image_form(soft):
    """Candidates may come in any order, and indices point into all anchors."""
    logits, deltas, indices, classes = select_candidates(*make_heads(3, (64, 96)), 3, 80)
    expected = make_detections(logits, deltas, GRID.boxes[indices], classes, SCALES, SIZES, 50, soft)
    shuffled = torch.randperm(80, generator=torch.Generator().manual_seed(0))
    for order in (torch.arange(80), shuffled):
        rows = generate_detections(
            logits[1, order].unsqueeze(1),
            deltas[1, order],
            GRID.boxes,
            indices[1, order],
            classes[1, order],
            SCALES[1],
            SIZES[1],
            50,
            soft,
        )
        torch.testing.assert_close(rows, expected[1], rtol=1e-5, atol=1e-5)
    plain = generate_detections(
        logits[1].unsqueeze(1), deltas[1], GRID.boxes, indices[1], classes[1], None, None, soft_nms=soft
    )
    torch.testing.assert_close(
        plain, make_detections(logits, deltas, GRID.boxes[indices], classes, soft_nms=soft)[1], rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize("soft", [False, True], ids=["nms", "soft_nms"])
def test_no_candidates(soft):
    none = torch.zeros(0, dtype=torch.int64)
    rows = generate_detections(
        torch.zeros(0, 1), torch.zeros(0, 4), GRID.boxes, none, none, SCALES[0], SIZES[0], 7, soft
    )
    assert rows.shape == (7, 6) and (rows == 0).all()


# ---- fixed shapes, nothing read back


@contextmanager
def no_values() -> Iterator[None]:
    """Run on tensors without values: whatever needs one on the host, or for its result's shape, raises."""
    with FakeTensorMode():
        yield


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: x.unique(),
        lambda x: x.tolist(),
    ],
)
def test_the_guard_sees_reads(read):
    with no_values(), pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        read(torch.ones(4))


@pytest.mark.parametrize("soft", [False, True], ids=["nms", "soft_nms"])
def test_nothing_is_read_back(soft, monkeypatch):
    """As accelerators and graphs run them: labels, loss, backward pass and detections need no value of any tensor."""
    for module in (anchors_module, focal, loss, nms):
        monkeypatch.setattr(module, "is_host", lambda device: False)
    monkeypatch.setattr(nms, "is_recorded", lambda: not soft)  # an accelerator's hard NMS looks whether it is done
    with no_values():
        anchors = Anchors(3, 7, 3, [(1.0, 1.0), (1.4, 0.7), (0.7, 1.4)], 4.0, (64, 96))
        cells = anchors.level_sizes
        logits = [torch.zeros(2, 27, *cell, requires_grad=True) for cell in cells]
        deltas = [torch.zeros(2, 36, *cell, requires_grad=True) for cell in cells]
        labeler = AnchorLabeler(anchors, 3, ignore_regions=True)
        targets = labeler.batch_label_anchors(torch.zeros(2, 5, 4), torch.ones(2, 5, dtype=torch.int64))
        total, _, _ = loss_fn(logits, deltas, *targets, 3, 0.25, 1.5, 0.1, 50.0, 0.1)
        total.backward()
        top_logits, top_codes, indices, classes = select_candidates(logits, deltas, 3)
        rows = make_detections(
            top_logits, top_codes, anchors.boxes[indices], classes, torch.ones(2), torch.ones(2, 2), 100, soft
        )
    assert total.shape == () and logits[0].grad.shape == logits[0].shape and deltas[0].grad.shape == deltas[0].shape
    assert targets[2].shape == (2,) and rows.shape == (2, 100, 6)
