"""Programs as users of effdet 0.4.1 write them, against what effdet 0.4.1 gave (test/golden/client_programs.py)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from effdet import (
    DetBenchPredict,
    DetBenchTrain,
    EfficientDet,
    create_evaluator,
    create_parser,
    get_efficientdet_config,
    load_checkpoint,
    load_pretrained,
)
from effdet.anchors import AnchorLabeler
from effdet.data.loader import DetectionFastCollate
from effdet.data.parsers import CocoParserCfg
from effdet.data.parsers.parser import Parser
from effdet.evaluator import CocoEvaluator
from effdet.loss import DetectionLoss

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
sys.path.insert(0, str(GOLDEN))
import client_programs  # noqa: E402  (test/golden/client_programs.py)

EXPECTED = json.loads((GOLDEN / "client_programs.json").read_text(encoding="utf-8"))


def near(value):
    """Return a value that compares to numbers with a tolerance, at any depth; ours rounds pixels to a thousandth."""
    if isinstance(value, dict):
        return {key: near(item) for key, item in value.items()}
    if isinstance(value, list):
        return [near(item) for item in value]
    return pytest.approx(value, abs=1e-3 if abs(value) > 1 else 1e-4) if isinstance(value, float) else value


@pytest.mark.parametrize("program", client_programs.PROGRAMS, ids=lambda program: program.__name__)
def test_a_program_gives_what_effdet_gave(program, tmp_path):
    found = json.loads(json.dumps(program(tmp_path)))
    expected = EXPECTED[program.__name__]
    assert found.keys() == expected.keys()
    for key in expected:
        assert found[key] == near(expected[key]), key


# ---- what has no number of effdet's ----------------------------------------------------------------------------------


def test_one_number_for_the_image_size():
    """As the model table documents it; under the omegaconf of today effdet 0.4.1 itself refuses the assignment."""
    config = get_efficientdet_config("tf_efficientdet_d0")
    config.image_size = 512
    config.image_size = 64
    config.num_classes, config.fpn_cell_repeats, config.box_class_repeats = 3, 1, 1
    bench = DetBenchPredict(EfficientDet(config, pretrained_backbone=False)).eval()
    assert bench.anchors.image_size == (64, 64) and bench(torch.zeros(1, 3, 64, 64)).shape == (1, 100, 6)
    lite = get_efficientdet_config("tf_efficientdet_lite0")
    lite.mean, lite.anchor_scale = 0.5, [3.0] * 5
    assert lite.mean == 0.5


def test_an_unknown_model_is_both_errors():
    for kind in (KeyError, ValueError):
        with pytest.raises(kind) as error:
            get_efficientdet_config("tf_efficientdet_d9")
        assert "tf_efficientdet_d0" in str(error.value) and not str(error.value).startswith("'")


@pytest.mark.parametrize("ids", [(0, 3), (1, 2**40)], ids=["from 0", "huge"])
def test_ids_that_cannot_be_labels_are_numbered(tmp_path, ids):
    """effdet trained the class of id 0 as background."""
    boxes = [{"id": k, "image_id": 1, "category_id": i, "bbox": [2, 2, 20, 20]} for k, i in enumerate(ids, start=1)]
    content = {
        "images": [{"id": 1, "file_name": "1.png", "width": 64, "height": 64}],
        "annotations": boxes,
        "categories": [{"id": i, "name": f"kind {i}"} for i in ids],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    parser = create_parser("coco", cfg=CocoParserCfg(ann_filename=str(tmp_path / "a.json")))
    assert parser.max_label == 2 and parser.get_ann_info(0)["cls"].tolist() == [1, 2]
    evaluator = CocoEvaluator(SimpleNamespace(parser=parser))
    evaluator.add_predictions(
        torch.tensor([[[2.0, 2, 22, 22, 0.9, 1], [2, 2, 22, 22, 0.8, 2]]]), {"img_idx": torch.tensor([0])}
    )
    assert {row["category_id"] for row in evaluator._coco_predictions()[0]} == set(ids)
    assert evaluator.evaluate() == pytest.approx(1.0)


def test_more_boxes_than_slots_are_kept():
    """effdet cut off what is beyond 100."""
    collate = DetectionFastCollate()
    image = np.zeros((3, 8, 8), dtype=np.uint8)
    widths = []
    for count in (3, 100, 130):
        target = {"bbox": np.ones((count, 4), dtype=np.float32), "cls": np.full(count, 5), "img_size": (8, 8)}
        _, batch = collate([(image, target)])
        assert (batch["cls"] == 5).sum() == count
        widths.append(batch["cls"].shape[1])
    assert widths[:2] == [100, 100] and widths[2] >= 130


class TextParser(Parser):
    """A parser of another format, without a json, whose category ids are names."""

    def __init__(self):
        super().__init__(bbox_yxyx=True)
        self.cat_names, self.cat_ids, self.cat_id_to_label = ["cat", "dog"], ["c", "d"], {"c": 1, "d": 2}
        self.img_ids, self.img_infos = [7, 9], [{"file_name": f"{k}.png", "width": 64, "height": 64} for k in (7, 9)]

    def get_ann_info(self, idx):
        return {"bbox": np.array([[0, 0, 20, 30]], dtype=np.float32), "cls": np.array([idx + 1])}


def test_a_parser_of_ones_own_is_evaluated():
    """One of two objects found: as effdet's Pascal evaluator, which asks the parser for its targets."""
    evaluator = create_evaluator("mine", SimpleNamespace(parser=TextParser()))
    rows = torch.zeros(2, 3, 6)
    rows[0, 0] = torch.tensor([0.0, 0, 30, 20, 0.9, 1])
    evaluator.add_predictions(rows, {"img_idx": torch.tensor([0, 1])})
    assert evaluator.evaluate() == pytest.approx(0.5)


@pytest.mark.parametrize("labels", ["in the bench", "in the loader", "in a loop of one's own"])
def test_a_label_above_num_classes_says_what_to_do(labels):
    net = client_programs.small_net()
    bench = DetBenchTrain(net, create_labeler=labels == "in the bench")
    box = torch.tensor([[8.0, 8, 40, 50]])
    targets = AnchorLabeler(bench.anchors, 3).batch_label_anchors(box.repeat(2, 1, 1), torch.tensor([[2], [4]]))
    images = torch.zeros(2, 3, 64, 64)
    with pytest.raises(ValueError, match="a label is 4, but the model has 3 classes.*num_classes=4"):
        if labels == "in a loop of one's own":
            DetectionLoss(net.config)(*net(images), *targets)
        elif labels == "in the bench":
            bench(images, {"bbox": [box, box], "cls": [torch.tensor([2]), torch.tensor([4])]})
        else:
            made = {f"label_cls_{k}": level for k, level in enumerate(targets[0])}
            made |= {f"label_bbox_{k}": level for k, level in enumerate(targets[1])}
            bench(images, made | {"label_num_positives": targets[2]})


def test_torchscript_is_pointed_to_the_export():
    bench = DetBenchPredict(client_programs.small_net())
    bench.model.toggle_head_bn_level_first()
    for module in (bench, bench.model):
        with pytest.raises(RuntimeError, match="effdet.export"):
            torch.jit.script(module)


def test_a_file_of_the_cache_with_other_content(tmp_path, monkeypatch):
    """A stand-in under the name of published weights is loaded where that is asked for."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    source, model = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    torch.save(source.state_dict(), tmp_path / "checkpoints/stand_in-12345678.pth")
    url = "https://example.invalid/stand_in-12345678.pth"
    with pytest.raises(ValueError, match="EFFDET_CHECK_HASH=0"):
        load_pretrained(model, url)
    monkeypatch.setenv("EFFDET_CHECK_HASH", "0")
    load_pretrained(model, url)
    assert torch.equal(model.weight, source.weight)


def test_what_load_checkpoint_returns_can_be_unpacked(tmp_path):
    source = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 2)})
    torch.save(source.state_dict(), tmp_path / "w.pth")
    missing, unexpected = load_checkpoint(
        torch.nn.ModuleDict({"b": torch.nn.Linear(2, 2)}), tmp_path / "w.pth", strict=False
    )
    assert missing == [] and unexpected == ["a.weight", "a.bias"]
    with pytest.raises(ValueError, match="same sizes in the same order"):
        load_checkpoint(torch.nn.Linear(2, 2), tmp_path / "w.pth", remap=True)
    with pytest.raises(ValueError, match="weights_only"):
        load_checkpoint(source, tmp_path / "w.pth", weights_only=False)
