"""Pascal VOC and Open Images as effdet's users have them on disk, and VOC's metric by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from effdet import PascalEvaluator, create_dataset, create_evaluator, create_parser
from effdet.data import create_loader, open_coco
from effdet.data.coco.report import DatasetError
from effdet.data.formats.__main__ import main as convert
from effdet.data.parsers import OpenImagesParserCfg, VocParserCfg
from effdet.data.parsers.parser_factory import CocoParser
from effdet.metrics.coco import index_ground_truth
from effdet.metrics.voc import score_voc

OBJECT = """<object><name>{name}</name><difficult>{difficult}</difficult><bndbox><xmin>{0}</xmin><ymin>{1}</ymin>
<xmax>{2}</xmax><ymax>{3}</ymax></bndbox></object>"""
IMAGES = {
    "000005": [("dog", (11, 21, 51, 61), 0), ("cat", (31, 11, 71, 51), 1)],
    "000007": [],
    "000012": [("person", (2, 3, 42.5, 63), 0)],
}


def write_voc(root, year: str, splits: dict[str, list[str]]):
    base = root / f"VOC{year}"
    for folder in ("ImageSets/Main", "Annotations", "JPEGImages"):
        (base / folder).mkdir(parents=True)
    for split, names in splits.items():
        (base / "ImageSets/Main" / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
        for name in names:
            items = "".join(OBJECT.format(*box, name=kind, difficult=hard) for kind, box, hard in IMAGES[name])
            (base / "Annotations" / f"{name}.xml").write_text(
                f"<annotation><size><width>100</width><height>80</height></size>{items}</annotation>"
            )
            Image.new("RGB", (100, 80), (int(name), 0, 0)).save(base / "JPEGImages" / f"{name}.jpg")
    return root


def test_a_voc_split_has_effdets_boxes_and_labels(tmp_path):
    root = write_voc(tmp_path, "2007", {"train": ["000005", "000007"], "val": ["000012"]})
    train, val = create_dataset("voc2007", root)
    assert train.parser.img_ids == ["000005", "000007"] and val.parser.img_ids == ["000012"]
    image, target = train[0]
    assert image.size == (100, 80) and target["cls"].tolist() == [12, 8]  # by VOC's alphabetical list, from 1
    np.testing.assert_array_equal(target["bbox"], np.array([[20, 10, 60, 50], [10, 30, 50, 70]], dtype=np.float32))
    assert train[1][1]["cls"].tolist() == []
    np.testing.assert_array_equal(val[0][1]["bbox"], np.array([[2, 1, 62, 41.5]], dtype=np.float32))
    assert train.parser.max_label == 20 and train.parser.cat_dicts[11] == {"name": "dog", "id": 12}
    assert isinstance(train.parser, CocoParser) and len(train.parser.coco.getAnnIds()) == 2
    with pytest.raises(ValueError, match="voc2007 has no split 'test', choose one of train, val"):
        create_dataset("voc2007", root, "test")


def test_voc0712_joins_both_years_and_tests_on_2007(tmp_path):
    write_voc(tmp_path, "2007", {"trainval": ["000005"], "test": ["000007"]})
    write_voc(tmp_path, "2012", {"trainval": ["000005", "000012"]})  # names may repeat
    train, val = create_dataset("VOC0712", tmp_path)
    files = [info["file_name"] for info in train.parser.img_infos]
    assert files == ["VOC2007/JPEGImages/000005.jpg", "VOC2012/JPEGImages/000005.jpg", "VOC2012/JPEGImages/000012.jpg"]
    assert [len(train[index][1]["cls"]) for index in range(3)] == [2, 2, 1] and len(val) == 1


def test_difficult_objects_can_be_left_out_of_the_targets(tmp_path):
    base = write_voc(tmp_path, "2012", {"train": ["000005"]}) / "VOC2012"
    cfg = VocParserCfg(
        base / "ImageSets/Main/train.txt",
        str(base / "Annotations/%s.xml"),
        keep_difficult=False,
        classes=["dog", "cat"],
    )
    assert create_parser("voc", cfg=cfg).get_ann_info(0)["cls"].tolist() == [1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<annotation><size>", r"no valid xml \(.*000005\.xml\)"),
        ("<annotation><size><width>100</width></size></annotation>", r"without a width and height.*000005\.xml"),
        (
            "<annotation><size><width>9</width><height>9</height></size>"
            f"{OBJECT.format(1, 2, 3, 4, name='dragon', difficult=0)}</annotation>",
            r"none of aeroplane, .*\('dragon' in .*000005\.xml\)",
        ),
    ],
)
def test_broken_annotations_are_named(tmp_path, text, message):
    base = write_voc(tmp_path, "2012", {"train": ["000005"]}) / "VOC2012"
    (base / "Annotations/000005.xml").write_text(text)
    with pytest.raises(DatasetError, match=message):
        create_dataset("voc2012", tmp_path, "train")


def test_absent_files_and_unknown_names(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train\.txt does not exist"):
        create_dataset("voc2012", tmp_path, "train")
    with pytest.raises(FileNotFoundError, match=r"class-descriptions-boxable\.csv does not exist"):
        create_dataset("openimages", tmp_path, "train")
    with pytest.raises(ValueError, match=r"'kitti' is unknown, available: coco.*voc2007.*openimages-challenge2019"):
        create_dataset("kitti", tmp_path)


def write_open_images(root):
    (root / "annotations").mkdir()
    (root / "annotations/class-descriptions-boxable.csv").write_text('/m/1,Dog\n/m/2,"Cat, big"\n')
    boxes = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsGroupOf\n"
    for split, folder in (("train", "train/a"), ("validation", "validation")):
        (root / folder).mkdir(parents=True)
        Image.new("RGB", (200, 100)).save(root / folder / "ab12.jpg")
        Image.new("RGB", (60, 40)).save(root / folder / "ac34.jpg")
        (root / f"annotations/{split}-info.csv").write_text("id,width,height\nac34,60,40\nab12,200,100\nzz,50,50\n")
        (root / f"annotations/{split}-annotations-bbox.csv").write_text(
            boxes + "ab12,x,/m/2,1,0.1,0.5,0.2,0.8,0,0\nab12,x,/m/1,1,0.5,1,0,1,0,1\nac34,x,/m/1,1,0,0.5,0,0.5,0,0\n"
        )
    return root


def test_open_images_has_effdets_boxes_and_labels(tmp_path):
    train, val = create_dataset("openimages", write_open_images(tmp_path))
    assert train.parser.img_ids == ["ab12", "ac34"], "images without boxes are not part of it, as in effdet"
    assert [info["file_name"] for info in train.parser.img_infos] == ["a/ab12.jpg", "a/ac34.jpg"]
    image, target = train[0]
    assert image.size == (200, 100) and target["cls"].tolist() == [2]  # the group box is no target
    np.testing.assert_allclose(target["bbox"], [[20, 20, 80, 100]], rtol=1e-6)
    assert val[1][1]["cls"].tolist() == [1] and val.parser.cat_names == ["Dog", "Cat, big"]
    (tmp_path / "annotations/train-info.csv").write_text("id,width,height\nac34,60,40\n")
    with pytest.raises(DatasetError, match=r"box of the image ab12, which is not in .*train-info\.csv"):
        create_dataset("openimages", tmp_path, "train")
    (tmp_path / "annotations/train-info.csv").write_text("ImageID,width,height\nac34,60,40\n")
    with pytest.raises(DatasetError, match="lacks the columns id; it has"):
        create_dataset("openimages", tmp_path, "train")


def test_what_effdets_parsers_took_and_ours_do_not_is_refused():
    with pytest.raises(ValueError, match="add_background=False is not supported"):
        create_parser("voc", cfg=VocParserCfg("a.txt", "%s.xml", add_background=False))
    with pytest.raises(ValueError, match="only boxes are read"):
        create_parser("openimages", cfg=OpenImagesParserCfg("c", "i", "b", task="seg"))
    with pytest.raises(ValueError, match="list 2, 1, 1 entries"):
        create_parser("voc", cfg=VocParserCfg(["a.txt", "b.txt"], "%s.xml"))


# ---- the metric ----


def row(image, box, score, category=1):
    return {"image_id": image, "category_id": category, "bbox": list(box), "score": score}


def truth(*objects):
    keys = ("image_id", "category_id", "bbox", "difficult", "iscrowd")
    return index_ground_truth(
        {
            "images": [{"id": n} for n in range(3)],
            "categories": [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}],
            "annotations": [dict(zip(keys, (*values, 0, 0)[:5], strict=True)) for values in objects],
        }
    )


def test_average_precision_by_hand():
    """Hits in the order right, wrong (a second box on the same dog), right, of 4 dogs: 1/4 * 1 + 1/4 * 2/3."""
    dogs = truth((0, 1, [0, 0, 10, 10]), (0, 1, [50, 0, 10, 10]), (1, 1, [0, 0, 10, 10]), (2, 1, [0, 0, 10, 10]))
    rows = [row(0, (0, 0, 10, 10), 0.9), row(0, (1, 0, 10, 10), 0.8), row(1, (0, 0, 10, 9), 0.7)]
    scores = score_voc(dogs, rows, {0, 1, 2})
    assert scores.stats["AP50"] == pytest.approx(1 / 4 + 1 / 4 * 2 / 3)
    assert [line.count for line in scores.per_class] == [4, 0] and math.isnan(scores.per_class[1].AP50)
    assert score_voc(dogs, rows, {0}).stats["AP50"] == pytest.approx(1 / 2)
    assert score_voc(dogs, [], {0, 1, 2}).stats["AP50"] == 0.0
    assert math.isnan(score_voc(truth(), rows, {0}).stats["AP50"])


def test_the_envelope_lifts_precision_and_an_iou_below_one_half_is_wrong():
    """Wrong, then two right of two: precision 1/2 and 2/3, the envelope 2/3 over the whole recall."""
    dogs = truth((0, 1, [0, 0, 10, 10]), (1, 1, [0, 0, 10, 10]))
    rows = [row(2, (0, 0, 5, 5), 0.9), row(0, (0, 0, 10, 5), 0.8), row(1, (0, 0, 10, 10), 0.7)]  # IoU 1/2 is enough
    assert score_voc(dogs, rows, {0, 1, 2}).stats["AP50"] == pytest.approx(2 / 3)
    rows[1]["bbox"] = [0, 0, 10, 4.9]
    assert score_voc(dogs, rows, {0, 1, 2}).stats["AP50"] == pytest.approx(1 / 2 * 1 / 3)


def test_difficult_objects_and_group_boxes_count_neither_way():
    objects = truth((0, 1, [0, 0, 10, 10]), (0, 1, [50, 0, 10, 10], 1), (1, 1, [0, 0, 50, 50], 0, 1))
    rows = [row(0, (50, 0, 10, 10), 0.9), row(1, (5, 5, 10, 10), 0.8), row(0, (0, 0, 10, 10), 0.7)]
    scores = score_voc(objects, rows, {0, 1})
    assert scores.stats["AP50"] == 1.0 and scores.per_class[0].count == 1
    outside = score_voc(objects, [row(1, (46, 46, 10, 10), 0.8), *rows], {0, 1})
    assert outside.stats["AP50"] == pytest.approx(1 / 2)


def test_the_evaluator_scores_a_perfect_detector_of_a_voc_data_set(tmp_path):
    dataset = create_dataset("voc2007", write_voc(tmp_path, "2007", {"val": ["000005", "000012"]}), "val")
    loader = create_loader(dataset, (3, 128, 128), 2, use_prefetcher=False, num_workers=0)
    evaluator = create_evaluator("voc2007", loader.dataset, ignore_difficult=True)
    assert type(evaluator) is PascalEvaluator
    for _, target in loader:
        rows = torch.zeros(*target["cls"].shape, 6)
        rows[..., :4] = target["bbox"][..., [1, 0, 3, 2]] * target["img_scale"].view(-1, 1, 1)
        rows[..., 4], rows[..., 5] = 0.9, target["cls"]
        rows[target["cls"] < 0] = 0
        evaluator.add_predictions(rows, target)
    assert evaluator.evaluate(tmp_path / "results.json") == 1.0 and evaluator.stats == {"AP50": 1.0}
    counts = {line.name: line.count for line in evaluator.per_class() if line.count}
    assert counts == {"dog": 1, "person": 1}, "the difficult cat is not asked for"
    assert "mAP at IoU 0.50" in evaluator.summary()
    evaluator.write_metrics(tmp_path / "metrics.json")


def test_the_scripts_read_the_converted_json(tmp_path):
    root = write_voc(tmp_path / "in", "2012", {"train": ["000005", "000007"], "val": ["000012"]})
    convert([str(root), "--out", str(tmp_path / "coco")])
    train = open_coco(None, "train", images=root, ann=tmp_path / "coco" / "train.json")
    assert len(train) == 2 and train.parser.cat_names == ["cat", "dog", "person"]
    np.testing.assert_array_equal(train[0][1]["bbox"], np.array([[20, 10, 60, 50], [10, 30, 50, 70]], np.float32))
    assert train[0][1]["cls"].tolist() == [2, 1]
    assert len(open_coco(None, "val", images=root, ann=tmp_path / "coco" / "val.json")) == 1
    with pytest.raises(SystemExit, match="effdet.data.formats: error: --val-split divides training data"):
        convert([str(root), "--out", str(tmp_path / "coco"), "--val-split", "0.5"])
