"""What a folder is recognised as, and that every tool's has the same images and boxes after it."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from folders import ALL, CLASSES, ITEMS, TOOLS, TRAIN, VAL, WITH_VAL, coco, put_images, put_json, put_text, voc_xml
from PIL import Image

from effdet.config.schema import DataConfig, EvalDataConfig
from effdet.data.build import build_dataset, split_paths
from effdet.data.coco.report import DatasetError
from effdet.data.formats.__main__ import main as convert
from effdet.data.formats.recognise import recognise
from effdet.data.settle import settle_data

REPO = Path(__file__).resolve().parents[3]


def boxes_of(images: Path, ann: Path) -> dict[str, list]:
    """Return the boxes of each image of a json, whose file is there under its name, Windows' separators aside."""
    content = json.loads(ann.read_text())
    classes = {row["id"]: row["name"] for row in content["categories"]}
    found: dict[str, list] = {}
    for row in content["images"]:
        name = (row.get("file_name") or row["coco_url"].split("/")[-1]).replace("\\", "/")
        assert (images / name).is_file()
        with Image.open(images / name) as image:
            assert image.size == (row["width"], row["height"])
        rows = [a for a in content["annotations"] if a["image_id"] == row["id"]]
        found[Path(name).stem] = sorted((classes[a["category_id"]], *np.round(a["bbox"], 1).tolist()) for a in rows)
    return found


def listed(root: Path) -> list[tuple[str, int]]:
    return sorted((str(path), path.stat().st_mtime_ns) for path in root.rglob("*"))


EXPECTED = {name: sorted((label, *map(float, box)) for label, box in boxes) for name, (_, _, boxes) in ITEMS.items()}


@pytest.mark.parametrize("tool", list(TOOLS))
def test_every_tools_folder_has_its_images_and_boxes(tool, tmp_path):
    root = TOOLS[tool](tmp_path / "user data")
    before = listed(tmp_path / "user data")
    data, lines = settle_data(DataConfig(root=str(root)), folder=tmp_path / "run")
    parts = {part: boxes_of(*split_paths(data, part)) for part in ("train", "val")}
    assert parts["train"] | parts["val"] == EXPECTED
    assert not set(parts["train"]) & set(parts["val"]) and parts["val"]
    if tool in WITH_VAL:
        assert set(parts["val"]) == set(VAL) and not any("held out" in line for line in lines)
    else:
        assert any("held out" in line for line in lines)
    assert str(tmp_path / "user data") in lines[0]
    assert listed(tmp_path / "user data") == before, "nothing is written into the user's folder"


@pytest.mark.parametrize("tool", list(TOOLS))
def test_pipes_that_nobody_writes_to_are_not_waited_for(tool, tmp_path):
    root = TOOLS[tool](tmp_path / "user data")
    folder = root if root.is_dir() else root.parent
    for suffix in (".json", ".xml", ".txt", ".yaml", ".names", ".csv"):
        os.mkfifo(folder / f"0 pipe{suffix}")
    data, _ = settle_data(DataConfig(root=str(root), val_split=0.0), ("train",), tmp_path / "run")
    found = boxes_of(*split_paths(data, "train"))
    assert found and all(found[name] == EXPECTED[name] for name in found)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_label_file_that_is_none_is_named(make, tmp_path):
    root = TOOLS["YOLO"](tmp_path)
    label = next(path for path in (root if root.is_dir() else root.parent).rglob("one.txt"))
    label.unlink()
    make(label)
    with pytest.raises(DatasetError, match="one.txt"):
        settle_data(DataConfig(root=str(root)), ("train",), tmp_path / "run")


def test_the_table_of_tools_names_what_was_tried():
    page = (REPO / "docs" / "own_data.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+?) \| `--root (\S+)` \|", page, re.MULTILINE)
    assert [tool for tool, _ in rows] == list(TOOLS)
    assert {Path(words).suffix for tool, words in rows if tool == "YOLO"} == {".yaml"}


@pytest.mark.parametrize("tool", ["Roboflow: YOLO", "Pascal VOC", "LabelMe", "Open Images", "CVAT: COCO 1.0"])
def test_the_converter_writes_what_training_reads(tool, tmp_path):
    root = TOOLS[tool](tmp_path / "in")
    found = recognise(root)
    of_train, of_val = found.parts["train"], found.parts.get("val") or found.parts.get("test")
    convert([str(root), "--out", str(tmp_path / "out"), *([] if of_val else ["--val-split", "0.3"])])
    train = boxes_of(of_train.images, tmp_path / "out/train.json")
    val = boxes_of((of_val or of_train).images, tmp_path / "out/val.json")
    assert train | val == EXPECTED and set(train) & set(val) == set()


def test_parts_can_be_opened_and_evaluated_as_they_are(tmp_path):
    root = TOOLS["Roboflow: YOLO"](tmp_path)
    data = DataConfig(root=str(root / "data.yaml"))
    train = build_dataset(data, "train")
    val = build_dataset(data, "val", stored=train.parser.category_map.to_dict())
    assert (len(train), len(val)) == (3, 1) and train.parser.cat_ids == [0, 1], "ids are YOLO's numbers"
    image, target = val[0]
    assert image.size == (100, 100) and target["cls"].tolist() == [2]
    np.testing.assert_allclose(target["bbox"], [[25, 25, 75, 75]], atol=1e-3)
    only_val = build_dataset(EvalDataConfig(root=str(root)), "val")
    assert only_val.parser.cat_names == list(CLASSES)


# ---- COCO jsons ------------------------------------------------------------------------------------------------------


def test_coco_folders_are_told_apart_by_the_words_of_their_paths(tmp_path):
    put_images(tmp_path / "img/training", TRAIN)
    put_images(tmp_path / "img/validation", TRAIN)  # the same names: the part decides
    for part in ("training", "validation"):
        put_json(tmp_path / f"labels/{part}.json", coco(TRAIN))
    put_json(tmp_path / "labels/captions_training.json", coco(TRAIN))
    put_json(tmp_path / "labels/detections.json", [{"image_id": 1}])
    found = recognise(tmp_path)
    assert (
        found.parts["train"].images == tmp_path / "img/training"
        and found.parts["train"].ann == tmp_path / "labels/training.json"
    )
    assert found.parts["val"].images == tmp_path / "img/validation" and set(found.parts) == {"train", "val"}


@pytest.mark.parametrize(
    "name", ["/somewhere/else/{}.jpg", "C:\\photos\\{}.jpg", "deep/er/{}.jpg", "{}.tif", "{}%2Ejpg", "pics/{}.jpg"]
)
def test_the_image_folder_is_found_by_what_moved_names_keep(name, tmp_path):
    put_images(tmp_path / "data/pics", ALL)
    put_images(tmp_path / "data/others", ())
    Image.new("RGB", (9, 9)).save(tmp_path / "data/others/logo.png")
    put_json(tmp_path / "a.json", coco(ALL, name.format))
    assert recognise(tmp_path).parts["train"].images == tmp_path / ("data" if name.startswith("pics") else "data/pics")


def test_several_jsons_for_one_part_are_an_error_that_names_them(tmp_path):
    put_images(tmp_path / "images", ALL)
    for name in ("job_1", "job_2"):
        put_json(tmp_path / f"{name}.json", coco(ALL))
    with pytest.raises(DatasetError, match=r"job_1\.json, job_2\.json.*--train-ann"):
        settle_data(DataConfig(root=str(tmp_path)))
    data = DataConfig(root=str(tmp_path), train_ann=str(tmp_path / "job_2.json"))
    settled, _ = settle_data(data, folder=tmp_path / "run")
    assert settled.train_images == str(tmp_path / "images") == settled.val_images
    with pytest.raises(DatasetError, match="not below"):
        recognise(_without_images(tmp_path))


def _without_images(folder: Path) -> Path:
    put_json(folder / "empty/a.json", coco(ALL))
    return folder / "empty"


def test_a_broken_part_of_cocos_layout_is_an_error_not_a_missing_one(tmp_path):
    root = TOOLS["COCO"](tmp_path)
    (root / "annotations/instances_val2017.json").unlink()
    with pytest.raises(FileNotFoundError, match="instances_val2017.json absent"):
        build_dataset(DataConfig(root=str(root)), "val")
    assert len(build_dataset(DataConfig(root=str(root)), "train")) == 3


def test_what_is_not_known_gets_the_flags_with_its_paths(tmp_path):
    put_images(tmp_path / "shots", ALL)
    put_json(tmp_path / "notes.json", {"a": 1})
    with pytest.raises(FileNotFoundError) as error:
        recognise(tmp_path)
    text = str(error.value)
    assert f"--train-images {tmp_path / 'shots'} --train-ann {tmp_path / 'notes.json'}" in text
    assert (
        "--val-images" in text
        and "--val-ann" in text
        and "notes.json, shots/" in text.replace("shots/, notes.json", "notes.json, shots/")
    )
    with pytest.raises(DatasetError, match="notes.json is no COCO annotation file"):
        recognise(tmp_path / "notes.json")
    with pytest.raises(FileNotFoundError, match="a.zip is no data set of a known form"):
        put_text(tmp_path / "a.zip", "PK")
        recognise(tmp_path / "a.zip")
    with pytest.raises(FileNotFoundError, match="no such directory"):
        recognise(tmp_path / "nowhere")


# ---- YOLO ------------------------------------------------------------------------------------------------------------


def yolo_with(tmp_path: Path, rows: str, yaml: str = "train: images\nnames: [cup, dish]\n") -> DataConfig:
    put_images(tmp_path / "images", ("one",))
    put_text(tmp_path / "labels/one.txt", rows)
    put_text(tmp_path / "data.yaml", yaml)
    return DataConfig(root=str(tmp_path), val_split=0.0)


def yolo_boxes(tmp_path: Path, rows: str, **more) -> list:
    data, _ = settle_data(yolo_with(tmp_path, rows, **more), ("train",), tmp_path / "run")
    return [(a["category_id"], *a["bbox"]) for a in json.loads(Path(data.train_ann).read_text())["annotations"]]


@pytest.mark.parametrize(
    ("rows", "boxes"),
    [
        ("1 0.5 0.5 0.2 0.25\n\n0 0.1 0.1 0.2 0.2\n", [(1, 40, 30, 20, 20), (0, 0, 0, 20, 16)]),
        ("0 0.1 0.1 0.5 0.1 0.3 0.9", [(0, 10, 8, 40, 64)]),  # a triangle
        ("1.0 0.1 0.1 0.3 0.1 0.3 0.2 0.1 0.2", [(1, 10, 8, 20, 8)]),  # an oriented box
        ("", []),
    ],
)
def test_yolos_rows_are_boxes_or_polygons(rows, boxes, tmp_path):
    assert yolo_boxes(tmp_path, rows) == [tuple(map(pytest.approx, box)) for box in boxes]


def test_keypoints_behind_the_box_are_no_polygon(tmp_path):
    rows = "0 0.5 0.5 0.2 0.25 0.1 0.1 2 0.9 0.9 2"
    yaml = "train: images\nnames: {0: cup}\nkpt_shape: [2, 3]\n"
    assert yolo_boxes(tmp_path, rows, yaml=yaml) == [(0, *map(pytest.approx, (40, 30, 20, 20)))]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("0 50 50 20 20", "far beyond 1"),
        ("7 0.5 0.5 0.1 0.1", r"no name .*7 in .*one\.txt"),
        ("cup 0.5 0.5 0.1 0.1", "not numbers"),
        ("0 0.5 0.5 0.1", "neither 4 coordinates"),
        ("-1 0.5 0.5 0.1 0.1", "class number from 0"),
        ("0 nan 0.5 0.1 0.1", "no number"),
        ("0 0.5 0.5 0.1 0.1 0.9", "neither 4 coordinates"),  # a detection with its score
    ],
)
def test_rows_that_are_no_labels_are_named(rows, words, tmp_path):
    with pytest.raises(DatasetError, match=words):
        yolo_boxes(tmp_path, rows)


def test_a_rotated_photograph_has_the_size_it_is_looked_at_with(tmp_path):
    data = yolo_with(tmp_path, "0 0.5 0.5 1 0.5")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (100, 80)).save(tmp_path / "images/one.jpg", exif=exif)
    image, target = build_dataset(data, "train")[0]
    assert image.size == (80, 100)
    np.testing.assert_allclose(target["bbox"], [[25, 0, 75, 80]], atol=1e-3)


def test_lists_made_on_another_machine_and_few_missing_images(tmp_path, caplog):
    names = [f"i{k}" for k in range(12)]
    for name in names[1:]:
        Image.new("RGB", (40, 40)).save(tmp_path / f"{name}.png")
    put_text(tmp_path / "lists/train.txt", "".join(f"/home/me/set/{name}.png\n" for name in names))
    put_text(tmp_path / "d.yaml", "path: /home/me/set\ntrain: lists/train.txt\nnames: [cup]\n")
    put_text(tmp_path / "i3.txt", "0 0.5 0.5 0.5 0.5\n")
    data, _ = settle_data(DataConfig(root=str(tmp_path), val_split=0.0), ("train",), tmp_path / "run")
    assert len(json.loads(Path(data.train_ann).read_text())["images"]) == 11
    assert "/home/me/set/i0.png" in caplog.text
    put_text(tmp_path / "d.yaml", "train: nowhere\nnames: [cup]\n")
    with pytest.raises(DatasetError, match="train: nowhere"):
        recognise(tmp_path / "d.yaml")


# ---- Pascal VOC, LabelMe ---------------------------------------------------------------------------------------------


def test_a_coordinate_of_zero_shows_that_pixels_count_from_zero(tmp_path):
    put_images(tmp_path, ("one", "three"))
    put_text(tmp_path / "one.xml", voc_xml("one", first=0))
    text = voc_xml("three", first=0).replace("<xmin>1<", "<xmin>0<")
    put_text(tmp_path / "three.xml", text)
    data, _ = settle_data(DataConfig(root=str(tmp_path), val_split=0.0), ("train",), tmp_path / "run")
    found = boxes_of(*split_paths(data, "train"))
    assert found["one"] == EXPECTED["one"] and ("cup", 0.0, 1.0, 21.0, 10.0) in found["three"]


def test_vocs_own_classes_keep_vocs_order_and_broken_files_are_one_error(tmp_path):
    root = TOOLS["Pascal VOC"](tmp_path)
    names = "aeroplane bicycle bird boat bottle bus car cat chair cow dog horse person sheep sofa train".split()
    objects = "".join(
        f"<object><name>{name}</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object>"
        for name in names
    )
    for name in ALL:
        put_text(root / f"VOC2007/Annotations/{name}.xml", f"<annotation>{objects}</annotation>")
    assert build_dataset(DataConfig(root=str(root)), "val").parser.cat_names[10:13] == ["diningtable", "dog", "horse"]
    put_text(root / "VOC2007/Annotations/one.xml", "<annotation><size>")
    put_text(root / "VOC2007/Annotations/two.xml", "<annotation><object><name>dog</name></object></annotation>")
    with pytest.raises(DatasetError, match=r"(?s)valid xml.*one\.xml.*bndbox.*two\.xml"):
        build_dataset(DataConfig(root=str(root)), "train")


def test_labelmes_shapes_become_boxes_and_groups_one_object(tmp_path):
    shapes = [
        {"label": "cup", "points": [[10, 10], [20, 10], [15, 30]], "shape_type": "polygon", "group_id": 1},
        {"label": "cup", "points": [[30, 5], [40, 5], [40, 9]], "shape_type": "polygon", "group_id": 1},
        {"label": "dish", "points": [[50, 50], [50, 60]], "shape_type": "circle", "group_id": None},
        {"label": "dish", "points": [[0, 0], [9, 9]], "shape_type": "line"},
    ]
    put_images(tmp_path, ("one",))
    put_json(tmp_path / "one.json", {"shapes": shapes, "imagePath": "one.jpg"})
    data, _ = settle_data(DataConfig(root=str(tmp_path), val_split=0.0), ("train",), tmp_path / "run")
    assert boxes_of(*split_paths(data, "train"))["one"] == [("cup", 10, 5, 30, 25), ("dish", 40, 40, 20, 20)]


@pytest.mark.parametrize("tool", ["LabelImg", "LabelMe", "YOLO"])
def test_images_that_cannot_be_used_are_all_named_at_once(tool, tmp_path):
    root = TOOLS[tool](tmp_path)
    folder = root if root.is_dir() else root.parent
    for path in folder.rglob("*.jpg"):
        if path.stem != "four":
            path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n") if tool != "LabelMe" else os.unlink(path)
    with pytest.raises(DatasetError, match=r"3 images that .*(one|two|three).*(one|two|three).*(one|two|three)"):
        settle_data(DataConfig(root=str(root), val_split=0.0 if tool != "YOLO" else None), ("train",))
