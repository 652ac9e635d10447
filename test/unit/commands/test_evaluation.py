"""Evaluate images without annotations, as the test splits of COCO are: predictions are written, there is no metric."""

import json

import pytest
import torch

from effdet import create_model
from effdet.commands import validate
from effdet.data.synthetic.dataset import make_synthetic_dataset

IMAGES = 3


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """Return a folder in COCO's layout whose test images are its validation images, and weights for it."""
    root = make_synthetic_dataset(tmp_path_factory.mktemp("data") / "coco", num_train=1, num_val=IMAGES)
    (root / "test2017").symlink_to(root / "val2017")
    torch.manual_seed(0)
    model = create_model("tf_efficientdet_lite0", num_classes=6, image_size=(64, 64), pretrained_backbone=False)
    torch.save(model.state_dict(), root / "weights.pth")
    content = json.loads((root / "annotations/instances_val2017.json").read_text())
    del content["annotations"]
    (root / "annotations/image_info_test-dev2017.json").write_text(json.dumps(content))
    return root


@pytest.fixture(scope="module")
def scored(coco, tmp_path_factory):
    """Return what is predicted for the same images where they have annotations."""
    path = tmp_path_factory.mktemp("scored") / "results.json"
    assert evaluate(coco, "--root", coco, "--results", path, "--output", "") == 0
    return json.loads(path.read_text())


def evaluate(coco, *more):
    argv = ["-m", "tf_efficientdet_lite0", "--num-classes", 6, "--checkpoint", coco / "weights.pth", *more]
    argv += ["--image-size", 64, "-b", 2, "-j", 0, "--device", "cpu"] if "--split" not in more else ["--img-size", 64]
    return validate.main([str(word) for word in argv])


@pytest.mark.parametrize("line", ["ours", "effdet's"])
def test_predictions_of_a_test_split_are_those_of_the_same_images_with_annotations(
    line, coco, scored, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    if line == "ours":
        ann = coco / "annotations/image_info_test-dev2017.json"
        named = ["--val-images", coco / "test2017", "--val-ann", ann]
    else:
        named = [coco, "--split", "testdev", "-b", "2", "-j", "0"]
    assert evaluate(coco, *named, "--results", "results.json") == 0
    assert json.loads((tmp_path / "results.json").read_text()) == scored and len(scored) > IMAGES
    said = capsys.readouterr().out
    assert "no metric" in said and "AP" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_without_annotations_and_a_file_for_the_predictions_there_is_nothing_to_do(coco, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        evaluate(coco, coco, "--split", "testdev")
    assert "--results" in str(stop.value.code) + capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_json_of_images_alone_takes_the_classes_of_the_checkpoint(coco, scored, tmp_path, capsys):
    content = json.loads((coco / "annotations/image_info_test-dev2017.json").read_text())
    classes = content.pop("categories")
    bare = tmp_path / "bare.json"
    bare.write_text(json.dumps(content))
    named = ["--val-images", coco / "test2017", "--val-ann", bare, "--results", tmp_path / "r.json", "--output", ""]
    with pytest.raises(SystemExit) as stop:  # these weights do not name the classes
        evaluate(coco, *named)
    assert "categories" in str(stop.value.code) + capsys.readouterr().err
    ids = [row["id"] for row in classes]
    payload = {
        "state_dict": torch.load(coco / "weights.pth"),
        "category_map": {"ids": ids, "names": [row["name"] for row in classes], "num_classes": 6},
    }
    torch.save(payload, tmp_path / "named.pth.tar")
    assert evaluate(coco, *named, "--checkpoint", tmp_path / "named.pth.tar") == 0
    rows = json.loads((tmp_path / "r.json").read_text())
    assert rows == scored and {row["category_id"] for row in rows} <= set(ids)
