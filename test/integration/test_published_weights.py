"""Weights that are nothing but weights: 90 classes indexed by COCO's category id, as the published files are."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import validate
from effdet import create_model

COCO_LIKE = [
    {"id": 1, "name": "person"},
    {"id": 18, "name": "dog"},
    {"id": 44, "name": "bottle"},
    {"id": 90, "name": "toothbrush"},
]


@pytest.fixture
def coco_root(tmp_path):
    """Write three images with one dog each, in COCO's layout and with COCO's ids."""
    images, annotations = [], []
    (tmp_path / "val2017").mkdir()
    for number in range(3):
        noise = np.random.default_rng(number).integers(0, 255, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "val2017" / f"{number}.jpg")
        images.append({"id": 100 + number, "file_name": f"{number}.jpg", "width": 80, "height": 60})
        annotations.append(
            {
                "id": 1 + number,
                "image_id": 100 + number,
                "category_id": 18,
                "bbox": [10, 10, 30, 30],
                "area": 900,
                "iscrowd": 0,
            }
        )
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_val2017.json").write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": COCO_LIKE})
    )
    return tmp_path


def save_weights(path, favourite_id: int) -> None:
    """Save weights of a 90-class model that finds the category `favourite_id` everywhere."""
    torch.manual_seed(0)
    model = create_model("tf_efficientdet_d0", pretrained_backbone=False, image_size=(64, 64))
    bias = model.class_net.predict.conv_pw.bias.detach().view(9, 90)
    bias[:, favourite_id - 1] = 8.0
    torch.save(model.state_dict(), path)


def run_validate(root, weights, *flags: str) -> list[dict]:
    results = root / "results.json"
    code = validate.main(
        [
            "--root",
            str(root),
            "--checkpoint",
            str(weights),
            "--image-size",
            "64",
            "-j",
            "0",
            "-b",
            "3",
            "--device",
            "cpu",
            "--output",
            "",
            "--results",
            str(results),
            *flags,
        ]
    )
    assert code == 0
    return json.loads(results.read_text())


@pytest.mark.parametrize("favourite_id", [18, 90])
def test_class_n_is_category_n(coco_root, favourite_id):
    weights = coco_root / "weights.pth"
    save_weights(weights, favourite_id)
    rows = run_validate(coco_root, weights, "--model", "tf_efficientdet_d0")
    best = {}
    for row in rows:
        if row["image_id"] not in best or row["score"] > best[row["image_id"]]["score"]:
            best[row["image_id"]] = row
    assert sorted(best) == [100, 101, 102]
    assert {row["category_id"] for row in best.values()} == {favourite_id}
    assert {row["category_id"] for row in rows} <= {category["id"] for category in COCO_LIKE}


def test_weights_without_a_model_name_ask_for_it(coco_root):
    weights = coco_root / "weights.pth"
    save_weights(weights, 18)
    with pytest.raises(SystemExit, match="does not say of which model: give --model NAME"):
        run_validate(coco_root, weights)


def test_a_class_count_that_fits_neither_way_names_both_sides(coco_root):
    weights = coco_root / "weights.pth"
    save_weights(weights, 18)
    content = json.loads((coco_root / "annotations" / "instances_val2017.json").read_text())
    content["categories"].append({"id": 1000, "name": "beyond"})
    (coco_root / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    with pytest.raises(SystemExit, match=r"(?s)90.*5|5.*90"):
        run_validate(coco_root, weights, "--model", "tf_efficientdet_d0")
