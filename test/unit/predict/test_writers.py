"""What is found is written as tables and as data sets that other programs, and our own, read."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import yaml
from PIL import Image
from pycocotools.coco import COCO

from effdet.predict.detections import Detections
from effdet.predict.sources import Item
from effdet.predict.writers import Classes, Drawings, Result, Results

CLASSES = Classes(["star", "bäll"], [7, 3])


def found(*objects):
    """Return detections of (x_min, y_min, x_max, y_max, score, class number)."""
    rows = np.array(objects, dtype=np.float32).reshape(-1, 6)
    index = rows[:, 5].astype(int)
    names = [CLASSES.names[k] for k in index]
    return Detections(rows[:, :4], rows[:, 4], names, np.array([3 if k else 7 for k in index]), (100, 50))


@pytest.fixture
def results(tmp_path):
    """Three results: two of files, one without objects; one of a video."""
    image = Image.new("RGB", (100, 50), "blue")
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "b.jpg")
    files = [Item(str(tmp_path / name), name[0], lambda: image, tmp_path / name) for name in ("a.png", "b.jpg")]
    frame = Item("clip.mp4", "clip/000012", lambda: image, None, 12, 0.5)
    two = found((10, 20, 30, 40, 0.9, 1), (0, 0, 50, 25, 0.5, 0))
    return [
        Result(files[0], image, two, tmp_path / "drawn.png"),
        Result(files[1], image, found()),
        Result(frame, image, found((1, 2, 3, 4, 0.25, 0))),
    ]


def write(folder, kinds, *batches):
    written = Results(folder, kinds, CLASSES)
    for batch in batches:
        written.add(batch)
    written.close()


def test_json_and_lines_have_the_same_rows(tmp_path, results):
    write(tmp_path / "out", ["json", "jsonl"], results[:1], [], results[1:])
    rows = json.loads((tmp_path / "out/detections.json").read_text())
    assert [json.loads(line) for line in (tmp_path / "out/detections.jsonl").read_text().splitlines()] == rows
    assert [len(row["objects"]) for row in rows] == [2, 0, 1]
    assert rows[0]["objects"][0] | {"score": 0} == {
        "category_id": 3,
        "name": "bäll",
        "score": 0,
        "bbox": [10, 20, 20, 20],
    }
    assert rows[0]["drawn"] == str(tmp_path / "drawn.png") and rows[1]["drawn"] is None
    assert "frame" not in rows[0] and (rows[2]["file"], rows[2]["frame"], rows[2]["time_s"]) == ("clip.mp4", 12, 0.5)


def test_csv_has_a_row_for_each_object(tmp_path, results):
    write(tmp_path / "out", ["csv"], results)
    with open(tmp_path / "out/detections.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["file"], row["name"], row["frame"]) for row in rows] == [
        (str(tmp_path / "a.png"), "bäll", ""),
        (str(tmp_path / "a.png"), "star", ""),
        ("clip.mp4", "star", "12"),
    ]
    assert [float(rows[1][key]) for key in ("category_id", "score", "x", "y", "width", "height")] == [
        7,
        0.5,
        0,
        0,
        50,
        25,
    ]


def test_coco_is_a_data_set_with_scores(tmp_path, results):
    write(tmp_path / "out", ["coco"], results[:1], results[1:])
    coco = COCO(str(tmp_path / "out/detections.coco.json"))
    assert [(one["id"], one["name"]) for one in coco.loadCats(coco.getCatIds())] == [(3, "bäll"), (7, "star")]
    assert [one["file_name"] for one in coco.dataset["images"]] == ["a.png", "b.jpg", "clip/000012.jpg"]
    for one in coco.dataset["images"]:
        with Image.open(tmp_path / "out/images" / one["file_name"]) as image:
            assert image.size == (one["width"], one["height"])
    rows = coco.dataset["annotations"]
    assert [row["id"] for row in rows] == [1, 2, 3] and [row["image_id"] for row in rows] == [1, 1, 3]
    assert rows[1]["bbox"] == [0, 0, 50, 25] and rows[1]["area"] == 1250 and rows[1]["score"] == 0.5
    assert (tmp_path / "out/images/a.png").samefile(tmp_path / "a.png")


def test_yolo_is_a_data_set_of_five_columns(tmp_path, results):
    write(tmp_path / "out", ["yolo"], results)
    content = yaml.safe_load((tmp_path / "out/data.yaml").read_text(encoding="utf-8"))
    assert content["names"] == {0: "star", 1: "bäll"} and (tmp_path / "out" / content["train"]).is_dir()
    labels = {path.stem: path.read_text() for path in (tmp_path / "out/labels").rglob("*.txt")}
    assert labels["a"].splitlines() == [
        "1 0.200000 0.600000 0.200000 0.400000",
        "0 0.250000 0.250000 0.500000 0.500000",
    ]
    assert labels["b"] == "" and labels["000012"].startswith("0 0.02")
    write(tmp_path / "out", ["yolo", "coco"], results)  # again


def test_what_a_user_made_is_not_replaced(tmp_path, results):
    (tmp_path / "out/labels").mkdir(parents=True)
    (tmp_path / "out/labels/a.txt").write_text("0 .5 .5 1 1")
    with pytest.raises(ValueError, match="another --output"):
        Results(tmp_path / "out", ["yolo"], CLASSES)
    (tmp_path / "set").mkdir()
    (tmp_path / "set/data.yaml").write_text("names: [cat]")
    with pytest.raises(ValueError, match="another --output"):
        Results(tmp_path / "set", ["json", "yolo"], CLASSES)
    (tmp_path / "mine/images").mkdir(parents=True)
    (tmp_path / "mine/images/a.png").write_bytes(b"of a user")
    with pytest.raises(ValueError, match="another --output"):
        Results(tmp_path / "mine", ["coco"], CLASSES)
    (tmp_path / "mine/detections.coco.json").touch()  # ours, with a file of somebody else's
    with pytest.raises(ValueError, match="another --output"):
        write(tmp_path / "mine", ["coco"], results)
    assert (tmp_path / "out/labels/a.txt").read_text() == "0 .5 .5 1 1"
    assert (tmp_path / "mine/images/a.png").read_bytes() == b"of a user"


def test_an_image_that_lies_where_its_link_would_be_stays(tmp_path, results):
    write(tmp_path, ["yolo"])
    (tmp_path / "images").mkdir()
    (tmp_path / "a.png").rename(tmp_path / "images/a.png")
    item = Item("a", "a", results[0].item.read, tmp_path / "images/a.png")
    write(tmp_path, ["yolo"], [Result(item, results[0].image, found())])
    assert not (tmp_path / "images/a.png").is_symlink() and (tmp_path / "images/a.png").stat().st_size > 50


def test_a_copy_where_links_cannot_be_made(tmp_path, results, monkeypatch):
    def refuse(*_):
        raise OSError("no links here")

    monkeypatch.setattr("os.symlink", refuse)
    monkeypatch.setattr("os.link", refuse)
    write(tmp_path / "out", ["coco"], results[:1])
    assert (tmp_path / "out/images/a.png").read_bytes() == (tmp_path / "a.png").read_bytes()


@pytest.mark.parametrize(("kind", "start"), [("png", b"\x89PNG"), ("jpg", b"\xff\xd8")])
def test_drawings(tmp_path, results, kind, start):
    result = results[0]
    place = Drawings(tmp_path / "out", kind).add(result.item, result.image, result.found)
    assert place == tmp_path / f"out/a.{kind}" and place.read_bytes().startswith(start)
    with Image.open(place) as drawn:
        assert drawn.size == (100, 50) and len(np.unique(np.asarray(drawn).reshape(-1, 3), axis=0)) > 2
