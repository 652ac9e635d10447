"""Which boxes the anchors reach, which settings reach more, and what is advised."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from effdet.anchors import Anchors
from effdet.config import get_efficientdet_config
from effdet.data.transforms import ResizePad
from effdet.datacheck.anchor_reach import (
    Candidate,
    Suggestion,
    find_reached,
    fit_ratios,
    letterbox_boxes,
    padding_share,
    suggest_anchors,
)
from effdet.datacheck.judge import judge_anchors
from effdet.ops.boxes import pairwise_iou


def config_of(size: int = 128, scale: float | None = None):
    config = get_efficientdet_config("tf_efficientdet_d0")
    config.image_size = (size, size)
    config.anchor_scale = scale or config.anchor_scale
    return config


def test_reached_boxes_are_those_of_a_full_search():
    rng = np.random.default_rng(0)
    low, sides = rng.uniform(0, 120, (400, 2)), np.exp(rng.uniform(0.5, 5, (400, 2)))
    boxes = np.concatenate((low, np.minimum(low + sides, 128)), 1).astype(np.float32)
    config = config_of()
    best = pairwise_iou(torch.from_numpy(boxes), Anchors.from_config(config).boxes).amax(1).numpy()
    reached = find_reached(boxes, config)
    assert 50 < reached.sum() < 350
    assert (reached == (best >= 0.5)).all()


def test_boxes_are_put_where_the_evaluation_puts_them():
    target = {"bbox": np.array([[10, 20, 60, 100]], dtype=np.float32), "cls": np.array([1])}
    moved = ResizePad((128, 192))(Image.new("RGB", (300, 100)), target)[1]["bbox"]
    ours = letterbox_boxes(np.array([[10, 20, 60, 100]]), np.array([[300, 100]]), (128, 192))
    np.testing.assert_allclose(ours, moved)


def squares(side: float, count: int = 60) -> tuple[np.ndarray, np.ndarray]:
    low = np.random.default_rng(1).uniform(0, 128 - side, (count, 2))
    return np.concatenate((low, low + side), 1), np.full((count, 2), 128)


def test_smaller_anchors_are_suggested_for_small_boxes_and_nothing_for_good_ones():
    found = suggest_anchors(*squares(16.0), config_of())
    assert found.present.share == 0.0 and found.boxes == 60
    assert found.take.flags == "--anchor-scale 1.25" and found.take.share > 0.9 and found.take.cost == 1.0
    assert found.better[0] == found.take
    fine = suggest_anchors(*squares(32.0), config_of())
    assert (fine.present.share, fine.better, fine.take) == (1.0, (), None)


def test_the_share_of_a_suggestion_is_what_its_flags_reach():
    rng = np.random.default_rng(2)
    boxes, sizes = squares(6.0, 200)
    boxes[:, 3] = boxes[:, 1] + rng.uniform(20, 40, 200)
    found = suggest_anchors(boxes, sizes, config_of())
    for one in found.better:
        words = one.flags.split()
        flags = dict(zip(words[::2], words[1::2], strict=True))
        tried = config_of(int(flags.get("--image-size", 128)), float(flags.get("--anchor-scale", 4)))
        if "--aspect-ratios" in flags:
            tried.aspect_ratios = [float(ratio) for ratio in flags["--aspect-ratios"].split(",")]
        assert find_reached(letterbox_boxes(boxes, sizes, tried.image_size), tried).mean() == one.share
        assert one.cost == (tried.image_size[0] / 128) ** 2
    shares = [one.share for one in found.better]
    assert shares == sorted(shares) and found.take.share > found.present.share + 0.3
    assert "--aspect-ratios" in found.take.flags  # these boxes are five times as wide as high


def rectangles(side: float, image_wh: tuple[int, int], spread: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(4)
    sides = side * np.exp(rng.normal(0, spread, (300, 1)))
    low = rng.uniform(0, 1, (300, 2)) * (np.array(image_wh[::-1]) - sides)
    return np.concatenate((low, low + sides), 1), np.full((300, 2), image_wh, dtype=np.float64)


@pytest.mark.parametrize("wide", [True, False])
def test_wide_images_get_a_wide_input(wide):
    image_wh = (1920, 1080) if wide else (1080, 1920)
    boxes, sizes = rectangles(60.0, image_wh)
    config = config_of(512)
    found = suggest_anchors(boxes, sizes, config)
    offered = [one.settings["image_size"] for one in (found.take, *found.better)]
    assert found.fitting_size == ((384, 640) if wide else (640, 384)) == tuple(found.take.settings["image_size"])
    assert ([512, 896] if wide else [896, 512]) in offered
    for height, width in offered:
        assert height % 128 == width % 128 == 0
    # pixels, not only aspects: what is offered at equal cost is no larger, and shows the objects larger
    assert found.take.cost <= 1.0 and found.take.share > found.present.share + 0.3
    assert padding_share(sizes, found.fitting_size) < 0.1 < 0.4 < padding_share(sizes, (512, 512))
    assert suggest_anchors(boxes, sizes, config, keep_shape=True).fitting_size == ()


def test_an_input_of_the_images_shape_is_left_alone():
    boxes, sizes = rectangles(60.0, (1920, 1080))
    config = get_efficientdet_config("tf_efficientdet_d0")
    config.image_size = (384, 640)
    assert suggest_anchors(boxes, sizes, config).fitting_size == ()


def candidate(share: float, cost: float = 1.0, flags: str = "") -> Candidate:
    return Candidate(flags or f"--cost {cost:g}", share, cost)


@pytest.mark.parametrize(
    ("present", "take", "better", "level", "advised"),
    [
        (0.99, None, [], "note", []),
        (0.85, 0.99, [], "warning", ["--take"]),
        (0.10, 0.99, [], "warning", ["--take"]),
        (0.85, None, [], "note", []),
        (0.75, None, [], "warning", ["cut"]),
        (0.05, None, [], "error", ["cut"]),
        (0.05, 0.15, [], "error", ["--take", "cut"]),
        (0.05, 0.50, [(0.9, 2)], "warning", ["--take", "--cost 2"]),
        (0.05, 0.50, [(0.85, 2), (0.99, 4)], "warning", ["--take", "--cost 2"]),  # the cheapest that is enough
        (0.05, 0.50, [(0.61, 2), (0.78, 4)], "warning", ["--take", "--cost 4"]),  # none is
        (0.05, 0.50, [(0.55, 4)], "warning", ["--take", "cut"]),  # four times the cost for nothing
        (0.05, 0.90, [(0.99, 4)], "warning", ["--take"]),  # nor is it needed
    ],
)
def test_the_level_is_that_of_what_stays_out_of_reach(present, take, better, level, advised):
    taken = candidate(take, flags="--take") if take else None
    tried = tuple(([taken] if taken else []) + [candidate(share, cost) for share, cost in better])
    (finding,) = judge_anchors(Suggestion(candidate(present), tried, taken, 100, 0.1, ()), (512, 512))
    assert finding.level == level
    assert [word for word in ("--take", "--cost 2", "--cost 4", "cut") if word in finding.text] == advised


def test_padding_is_named_unless_the_anchors_advice_has_it_mended():
    def levels(padding: float, shape: tuple[int, ...], settings: dict) -> list[str]:
        take = Candidate("--flags", 0.99, 1.0, settings)
        suggestion = Suggestion(candidate(0.5), (take,), take, 100, padding, shape)
        return [finding.level for finding in judge_anchors(suggestion, (512, 512))][1:]

    assert levels(0.44, (384, 640), {"anchor_scale": 2}) == ["note"]
    assert levels(0.44, (384, 640), {"image_size": [384, 640]}) == levels(0.2, (), {}) == []
    assert levels(0.95, (128, 2048), {"image_size": [128, 2048]}) == ["warning"]


def test_ratios_are_those_in_the_middle_of_each_third():
    boxes = np.array([[0, 0, 10, 10 * ratio] for ratio in (0.5, 0.5, 1.0, 1.0, 3.0, 3.0)])
    assert fit_ratios(boxes, 3) == [0.5, 1.0, 3.0]
    assert fit_ratios(boxes[:2], 3) == []
