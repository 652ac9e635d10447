"""Every module and name of effdet 0.4.1 can be imported, or docs/library.md names it; and what the thin ones compute.

Numbers were computed with effdet 0.4.1 (test/golden), or follow by hand.
"""

from __future__ import annotations

import importlib
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from effdet import distributed
from effdet.anchors import AnchorLabeler, Anchors, BoxList, FasterRcnnBoxCoder, IouSimilarity, TargetAssigner
from effdet.bench import _batch_detection, _post_process
from effdet.config import get_efficientdet_config
from effdet.config.model_config import efficientdet_model_param_dict, tf_efficientdet_lite_common
from effdet.data import DetectionDatset, dataset_factory
from effdet.data.coco.annotations import CocoParser
from effdet.data.dataset_config import Coco2017Cfg, OpenImagesObjChallenge2019Cfg, Voc0712Cfg
from effdet.data.parsers.parser import Parser
from effdet.evaluation.detection_evaluator import PascalDetectionEvaluator
from effdet.evaluation.metrics import compute_average_precision
from effdet.loss import _box_loss, loss_fn, loss_jit
from effdet.object_detection import ArgMaxMatcher, Match

TEST = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TEST / "golden"))
import weights  # noqa: E402  (test/golden/weights.py)

NAMES = json.loads((TEST / "golden/effdet_names.json").read_text())
PAGE = re.sub(r"```.*?```", "", (TEST.parent / "docs/library.md").read_text(encoding="utf-8"), flags=re.DOTALL)

# Private names, and those that the list lacks because they are functions of torch.jit there.
FURTHER = {
    "effdet.bench": ["_batch_detection"],
    "effdet.efficientdet": ["_init_weight", "_init_weight_alt"],
    "effdet.loss": ["loss_jit"],
}

# What is gone, each named in docs/library.md with its successor.
GONE_MODULES = {
    f"effdet.evaluation.{name}"
    for name in ("fields", "np_box_list", "np_mask_list", "object_detection_evaluation", "per_image_evaluation")
}
GONE_NAMES = {
    "effdet.evaluation.detection_evaluator": {
        "DetectionEvaluator",
        "DetectionResultFields",
        "InputDataFields",
        "ObjectDetectionEvaluation",
        "ObjectDetectionEvaluator",
        "OpenImagesChallengeEvaluator",
        "OpenImagesDetectionEvaluator",
        "PrecisionAtRecallDetectionEvaluator",
        "WeightedPascalDetectionEvaluator",
        "create_category_index",
    },
    "effdet.evaluation.metrics": {
        "compute_cor_loc",
        "compute_median_rank_at_k",
        "compute_precision_recall",
        "compute_recall_at_k",
    },
    "effdet.object_detection.argmax_matcher": {"one_hot_bool"},
    "effdet.object_detection.box_coder": {"FASTER_RCNN", "KEYPOINT", "MEAN_STDDEV", "SQUARE", "batch_decode"},
    "effdet.object_detection.region_similarity_calculator": {"area", "intersection", "iou"},
    "effdet.object_detection.target_assigner": {"KEYPOINTS_FIELD_NAME"},
}


@pytest.mark.parametrize("module", NAMES)
def test_every_name_can_be_imported_or_is_on_the_page(module):
    if module in GONE_MODULES:
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(module)
        assert f"`{module}`" in PAGE
        return
    found = importlib.import_module(module)
    gone = GONE_NAMES.get(module, set())
    assert {name for name in [*NAMES[module], *FURTHER.get(module, [])] if not hasattr(found, name)} == gone
    on_page = {word for text in re.findall(r"`([^`]+)`", PAGE) for word in text.split(", ")}
    assert gone <= on_page


def test_the_list_is_whole():
    assert len(NAMES) == 46 and sum(map(len, NAMES.values())) == 392
    assert GONE_MODULES | set(GONE_NAMES) | set(FURTHER) <= set(NAMES)


# ---- anchors, bench, loss --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("soft_nms", [False, True], ids=["nms", "soft_nms"])
def test_the_two_halves_of_post_processing_give_the_reference_detections(soft_nms):
    golden = np.load(TEST / "golden/detections_tf_efficientdet_d0_256x384_3.npz")
    config = get_efficientdet_config("tf_efficientdet_d0")
    config.image_size = (256, 384)
    anchors = Anchors.from_config(config).boxes
    cls_outputs, box_outputs = weights.make_head_outputs(256, 384, 3)
    logits, deltas, indices, classes = _post_process(cls_outputs, box_outputs, 5, 3)
    assert logits.shape == (2, 5000, 1) and deltas.shape == (2, 5000, 4) and indices.shape == classes.shape == (2, 5000)
    by_anchor = torch.cat([level.permute(0, 2, 3, 1).reshape(2, -1, 3) for level in cls_outputs], 1)
    for image in range(2):  # each candidate's logit is that of its anchor and class
        assert torch.equal(logits[image, :, 0], by_anchor[image, indices[image], classes[image]])
    kind = "soft_nms" if soft_nms else "nms"
    raw = _batch_detection(2, logits, deltas, anchors, indices, classes, soft_nms=soft_nms)
    scaled = _batch_detection(
        2,
        logits,
        deltas,
        anchors,
        indices,
        classes,
        torch.from_numpy(golden["img_scale"]),
        torch.from_numpy(golden["img_size_wh"]),
        100,
        soft_nms,
    )
    torch.testing.assert_close(raw, torch.from_numpy(golden[f"det_{kind}_raw"]), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(scaled, torch.from_numpy(golden[f"det_{kind}_scaled"]), rtol=1e-4, atol=1e-3)
    first_two = _post_process(cls_outputs, box_outputs, 2, 3, 7)
    assert first_two[0].shape == (2, 7, 1) and first_two[2].max() < 9 * (32 * 48 + 16 * 24)


def test_box_loss_by_hand():
    targets = torch.tensor([[0.0, 0.05, 0.0, 1.0]])  # zeros are left out
    outputs = torch.tensor([[9.0, 0.0, 9.0, 0.5]])
    # 0.5 * 0.05^2, and 0.1 * (0.5 - 0.05), over 2 positives * 4 coordinates
    assert _box_loss(outputs, targets, torch.tensor(2.0)).item() == pytest.approx((0.00125 + 0.045) / 8)
    assert _box_loss(outputs, targets, 2.0, delta=1.0).item() == pytest.approx((0.00125 + 0.125) / 8)
    assert loss_jit is loss_fn


def test_the_anchors_config_describes_the_boxes():
    anchors = Anchors(3, 4, 2, [(1.0, 1.0), (1.4, 0.7)], [4.0, 3.0], (64, 96))
    assert anchors.config == {
        3: [
            ((8.0, 8.0), 0.0, (1.0, 1.0), 4.0),
            ((8.0, 8.0), 0.0, (1.4, 0.7), 4.0),
            ((8.0, 8.0), 0.5, (1.0, 1.0), 4.0),
            ((8.0, 8.0), 0.5, (1.4, 0.7), 4.0),
        ],
        4: [
            ((16.0, 16.0), 0.0, (1.0, 1.0), 3.0),
            ((16.0, 16.0), 0.0, (1.4, 0.7), 3.0),
            ((16.0, 16.0), 0.5, (1.0, 1.0), 3.0),
            ((16.0, 16.0), 0.5, (1.4, 0.7), 3.0),
        ],
    }


def test_the_lite_models_are_made_of_what_they_have_in_common():
    lite = [entry for name, entry in efficientdet_model_param_dict.items() if name.startswith("tf_efficientdet_lite")]
    assert len(lite) == 6 and tf_efficientdet_lite_common["fpn_name"] == "bifpn_sum"
    assert all(entry.items() >= tf_efficientdet_lite_common.items() for entry in lite)


# ---- object_detection ------------------------------------------------------------------------------------------------

ANCHORS = torch.tensor([[0.0, 0, 10, 10], [0, 10, 10, 20], [10, 0, 20, 10], [100, 100, 110, 110]])


def test_box_lists():
    boxes = BoxList(ANCHORS)
    boxes.add_field("labels", torch.arange(4))
    assert boxes.num_boxes() == 4 and torch.equal(boxes.boxes(), ANCHORS)
    assert boxes.get_field("labels").tolist() == [0, 1, 2, 3]
    assert boxes.has_field("labels") and not boxes.has_field("masks")
    for wrong in (ANCHORS.double(), ANCHORS[0], ANCHORS[:, :3]):
        with pytest.raises(ValueError):
            BoxList(wrong)
    with pytest.raises(ValueError):
        boxes.get_field("masks")


def test_iou_by_hand():
    similarity = IouSimilarity().compare(BoxList(torch.tensor([[0.0, 5, 10, 15]])), BoxList(ANCHORS))
    torch.testing.assert_close(similarity, torch.tensor([[1 / 3, 1 / 3, 0, 0]]))


@pytest.mark.parametrize("scale_factors", [None, [10.0, 10.0, 5.0, 5.0]])
def test_box_coder_by_hand_and_back(scale_factors):
    coder = FasterRcnnBoxCoder(scale_factors)
    boxes = BoxList(torch.tensor([[1.0, 2, 11, 12], [0, 10, 20, 20], [10, 0, 20, 10], [100, 100, 115, 120]]))
    deltas = coder.encode(boxes, BoxList(ANCHORS))
    factors = torch.tensor(scale_factors or [1.0] * 4)
    torch.testing.assert_close(
        deltas,
        factors
        * torch.tensor(
            [[0.1, 0.2, 0, 0], [0.5, 0, math.log(2), 0], [0, 0, 0, 0], [0.25, 0.5, math.log(1.5), math.log(2)]]
        ),
    )
    torch.testing.assert_close(coder.decode(deltas, BoxList(ANCHORS)).boxes(), boxes.boxes())
    assert coder.code_size() == 4
    with pytest.raises(ValueError):
        FasterRcnnBoxCoder([1.0, 1.0, 0.0, 1.0])


SIMILARITY = torch.tensor([[0.9, 0.4, 0.1, 0.0], [0.2, 0.45, 0.3, 0.2]])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0, -1, -1, -1]),
        ({"unmatched_threshold": 0.3}, [0, -2, -2, -1]),
        ({"unmatched_threshold": 0.3, "negatives_lower_than_unmatched": False}, [0, -1, -1, -2]),
        ({"force_match_for_each_row": True}, [0, 1, -1, -1]),
    ],
)
def test_argmax_matcher_by_hand(settings, expected):
    assert ArgMaxMatcher(0.5, **settings).match(SIMILARITY).match_results.tolist() == expected


def test_argmax_matcher_at_its_ends():
    assert ArgMaxMatcher(0.5).match(torch.zeros(0, 3)).match_results.tolist() == [-1, -1, -1]
    same_column = torch.tensor([[0.3, 0.1], [0.4, 0.2]])  # both rows' best: the first row has it
    assert ArgMaxMatcher(0.5, force_match_for_each_row=True).match(same_column).match_results.tolist() == [0, -1]
    for wrong in ({"unmatched_threshold": 0.6}, {"negatives_lower_than_unmatched": False}):
        with pytest.raises(ValueError):
            ArgMaxMatcher(0.5, **wrong)


def test_match_by_hand():
    match = Match(torch.tensor([3, -1, -2, 0]))
    assert match.matched_column_indices().tolist() == [0, 3] and match.matched_row_indices().tolist() == [3, 0]
    assert match.matched_column_indicator().tolist() == [True, False, False, True] and match.num_matched_columns() == 2
    assert match.gather_based_on_match(torch.tensor([5.0, 6, 7, 8]), -1.0, -9.0).tolist() == [8, -1, -9, 5]
    rows = match.gather_based_on_match(ANCHORS, torch.zeros(1, 4), torch.ones(1, 4))
    assert torch.equal(rows, torch.stack([ANCHORS[3], torch.zeros(4), torch.ones(4), ANCHORS[0]]))
    for wrong in (torch.zeros(2), torch.zeros(1, 2, dtype=torch.int64)):
        with pytest.raises(ValueError):
            Match(wrong)


@pytest.mark.parametrize("count", [0, 1, 6])
def test_target_assigner_gives_what_the_labeler_gives(count):
    """Step by step over one image, against the batched labeler, which is held to the reference's labels."""
    anchors = Anchors(3, 7, 3, [(1.0, 1.0), (1.4, 0.7), (0.7, 1.4)], 4.0, (64, 96))
    corners = torch.rand(count, 2, generator=torch.manual_seed(0)) * 50
    boxes = torch.cat([corners, corners + 12], 1)
    labels = torch.arange(1.0, count + 1)
    assigner = TargetAssigner(IouSimilarity(), ArgMaxMatcher(0.5, 0.5, True, True), FasterRcnnBoxCoder())
    classes, deltas, match = assigner.assign(BoxList(anchors.boxes), BoxList(boxes), labels)
    by_level, deltas_by_level, positives = AnchorLabeler(anchors, 6).label_anchors(boxes, labels)
    assert torch.equal(classes.long() - 1, torch.cat([level.flatten() for level in by_level]))
    torch.testing.assert_close(deltas, torch.cat([level.reshape(-1, 4) for level in deltas_by_level]))
    assert match.num_matched_columns() == positives and (count == 0) == (positives == 0)
    assert assigner.box_coder().code_size() == 4


# ---- evaluation ------------------------------------------------------------------------------------------------------


def test_average_precision_by_hand():
    """Right, wrong, right by falling score, of 4 objects."""
    precision, recall = np.array([1, 1 / 2, 2 / 3]), np.array([1 / 4, 1 / 4, 1 / 2])
    assert compute_average_precision(precision, recall) == pytest.approx(1 / 4 + 1 / 4 * 2 / 3)
    assert compute_average_precision(np.zeros(0), np.zeros(0)) == 0.0
    assert math.isnan(compute_average_precision(None, None))
    for wrong in ((None, recall), (precision[:2], recall), (precision * 2, recall), (precision, recall[::-1])):
        with pytest.raises(ValueError):
            compute_average_precision(*wrong)


def test_pascal_detection_evaluator_by_hand():
    """A cat found, one missed, a wrong box with a better score; a difficult dog; no bird."""
    names = {1: "cat", 2: "dog", 5: "bird"}
    evaluator = PascalDetectionEvaluator([{"id": key, "name": name} for key, name in names.items()])
    box, other = [10.0, 20, 30, 60], [50.0, 50, 70, 70]
    for _ in range(2):  # an image that is added again changes nothing
        evaluator.add_single_ground_truth_image_info(
            "a", {"bbox": np.array([box, other, other]), "cls": np.array([1, 2, 2]), "difficult": np.array([0, 1, 0])}
        )
    evaluator.add_single_ground_truth_image_info("b", {"bbox": np.array([box]), "cls": np.array([1])})
    evaluator.add_single_detected_image_info(
        "a",
        {
            "bbox": np.array([[11.0, 21, 30, 60], other, [50, 50, 50, 70]]),
            "cls": np.array([1, 1, 1]),
            "score": np.array([0.5, 0.8, 0.9]),
        },
    )  # the last has no area
    evaluator.add_single_detected_image_info("b", {"bbox": np.zeros((0, 4)), "cls": np.zeros(0), "score": np.zeros(0)})
    metrics = evaluator.evaluate()
    by_name = {name: metrics.pop(f"PascalBoxes_PerformanceByCategory/AP@0.5IOU/{name}") for name in names.values()}
    assert by_name["cat"] == pytest.approx(1 / 2 * 1 / 2) and by_name["dog"] == 0.0 and math.isnan(by_name["bird"])
    assert metrics == {"PascalBoxes_Precision/mAP@0.5IOU": pytest.approx(1 / 8)}
    evaluator.clear()
    assert math.isnan(evaluator.evaluate()["PascalBoxes_Precision/mAP@0.5IOU"])
    for wrong in (0.0, 1.1):
        with pytest.raises(ValueError):
            PascalDetectionEvaluator([], matching_iou_threshold=wrong)


# ---- data ------------------------------------------------------------------------------------------------------------


def test_the_layouts_of_data_sets():
    coco, voc, images = Coco2017Cfg(), Voc0712Cfg(), OpenImagesObjChallenge2019Cfg()
    assert coco.splits["val"] == {
        "ann_filename": "annotations/instances_val2017.json",
        "img_dir": "val2017",
        "has_labels": True,
    }
    assert coco.splits["testdev"] == {
        "ann_filename": "annotations/image_info_test-dev2017.json",
        "img_dir": "test2017",
        "has_labels": False,
    }
    assert voc.splits["train"]["ann_filename"] == ["VOC2007/Annotations/%s.xml", "VOC2012/Annotations/%s.xml"]
    assert voc.splits["val"]["split_filename"] == "VOC2007/ImageSets/Main/test.txt"
    folder = "annotations/challenge-2019/challenge-2019"
    assert images.splits["val"] == {
        "img_dir": "validation",
        "img_info": "annotations/validation-info.csv",
        "has_labels": True,
        "prefix_levels": 0,
        "ann_bbox": f"{folder}-validation-detection-bbox.csv",
        "ann_img_label": f"{folder}-validation-detection-human-imagelabels.csv",
    }
    assert images.splits["train"]["prefix_levels"] == 1 and images.num_classes == 500
    coco.splits["val"]["img_dir"] = "mine"
    assert Coco2017Cfg().splits["val"]["img_dir"] == "val2017", "each has its own paths"


def test_a_layout_of_ones_own(tmp_path, monkeypatch):
    """A subclass as clients write it, in the place of the one that create_dataset reads."""

    class Mine(dataset_factory.Voc2007Cfg):
        def __init__(self):
            super().__init__(img_filename="%s.png")
            self.splits["extra"] = {"split_filename": "names.txt", "ann_filename": "xml/%s.xml", "img_dir": "png"}

    monkeypatch.setitem(dataset_factory._VOC, "voc2007", Mine)
    (tmp_path / "png").mkdir()
    (tmp_path / "xml").mkdir()
    (tmp_path / "names.txt").write_text("one\n")
    (tmp_path / "xml/one.xml").write_text("<annotation><size><width>70</width><height>50</height></size></annotation>")
    (tmp_path / "png/one.png").write_bytes(b"")
    (info,) = dataset_factory.create_dataset("voc2007", tmp_path, "extra").parser.img_infos
    assert info["file_name"] == "png/one.png" and (info["width"], info["height"]) == (70, 50)


class TextParser(Parser):
    """A parser as a client writes it: names and boxes from memory."""

    def __init__(self):
        super().__init__(bbox_yxyx=True)
        self.cat_names, self.cat_ids, self.cat_id_to_label = ["cat", "dog"], ["c", "d"], {"c": 1, "d": 2}
        self.img_ids, self.img_infos = [4], [{"file_name": "4.png", "width": 8, "height": 6}]

    def get_ann_info(self, idx):
        return {"bbox": np.array([[1, 2, 3, 4]], dtype=np.float32), "cls": np.array([2])}


def test_a_parser_of_ones_own(tmp_path):
    Image.new("RGB", (8, 6)).save(tmp_path / "4.png")
    parser = TextParser()
    assert parser.max_label == 2 and parser.cat_dicts == [{"name": "cat", "id": 1}, {"name": "dog", "id": 2}]
    assert (parser.yxyx, parser.has_labels, parser.min_img_size, parser.label_offset) == (True, True, 32, 1)
    image, target = DetectionDatset(tmp_path, parser)[0]
    assert image.size == target["img_size"] == (8, 6) and target["cls"].tolist() == [2]
    parser.cat_ids, parser.cat_id_to_label = [3, 7], {}  # ids as labels, as in COCO's 91
    assert parser.max_label == 7 and parser.cat_dicts[1] == {"name": "dog", "id": 7}
    assert issubclass(CocoParser, Parser) and Parser().img_ids == [] and not Parser().yxyx


# ---- distributed, in one process; on two ranks: integration/test_distributed_cpu.py ----------------------------------


def test_without_a_group_collectives_return_what_they_were_given():
    values = {"b": torch.tensor(2.0), "a": torch.tensor([1.0])}
    assert distributed.all_gather("x") == ["x"] and distributed.gather("x", dst=0) == ["x"]
    assert distributed.reduce_dict(values) is values and distributed.all_gather_container(values) is values
    assert distributed.gather_container(values, 0) is values
    assert (distributed.get_rank(), distributed.get_world_size(), distributed.is_main_process()) == (0, 1, True)
    np.random.seed(0)
    seeds = [distributed.shared_random_seed() for _ in range(2)]
    np.random.seed(0)
    assert seeds == [np.random.randint(2**31) for _ in range(2)]
