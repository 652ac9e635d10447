"""Annotation files as other tools write them, through the door of train.py: what each is read as, or what it is told.

Eight images with one box each, at places that a reader can check by hand; every test changes the one thing that the
tool does differently. After real files of each kind.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from effdet.config.schema import DataConfig
from effdet.data import CategoryMap, DetectionDatset, create_parser
from effdet.data.build import build_dataset
from effdet.data.coco.annotations import CocoParserCfg
from effdet.data.coco.check import check_coco
from effdet.data.coco.report import DatasetError
from effdet.data.coco.shapes import box_of_mask
from effdet.data.settle import settle_data

WIDTH, HEIGHT, COUNT = 80, 60, 8
BOXES_XYWH = [[40.0 + k, 20.0, 24.0, 16.0] for k in range(COUNT)]
BOXES_YXYX = [[[20.0, 40.0 + k, 36.0, 64.0 + k]] for k in range(COUNT)]
Coco = dict[str, Any]


def name_of(k: int) -> str:
    return f"p{k + 1}.jpg"


def good() -> Coco:
    return {
        "images": [{"id": k + 1, "file_name": name_of(k), "width": WIDTH, "height": HEIGHT} for k in range(COUNT)],
        "annotations": [
            {"id": k + 1, "image_id": k + 1, "category_id": 1, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
            for k, box in enumerate(BOXES_XYWH)
        ],
        "categories": [{"id": 1, "name": "cup"}],
    }


def put_images(folder: Path, names: list[str] | None = None) -> Path:
    for k, name in enumerate(names or [name_of(k) for k in range(COUNT)]):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (WIDTH, HEIGHT), (20 * k, 90, 90)).save(folder / name, "JPEG")
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return put_images(tmp_path / "set" / "images")


def write(images: Path, content: Any) -> Path:
    path = images.parent / "labels.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def open_json(images: Path, content: Any, split: str = "train", stored: Any = None, **options: Any) -> Any:
    """Open a json as train.py does, for training or for evaluation."""
    ann = str(write(images, content))
    data = DataConfig(train_images=str(images), train_ann=ann, val_images=str(images), val_ann=ann, **options)
    return build_dataset(data, split, stored=stored)


def refusal(images: Path, content: Any, **options: Any) -> str:
    with pytest.raises(DatasetError) as error:
        open_json(images, content, **options)
    return str(error.value)


def assert_all_there(dataset: Any) -> None:
    """Check every box and label of the eight images, in training and in the truth of an evaluation."""
    parser = dataset.parser
    items = sorted(zip(dataset, parser.img_ids, strict=True), key=lambda item: item[0][0].getpixel((5, 5)))
    assert [image.getpixel((5, 5))[0] // 10 for (image, _), _ in items] == [2 * k for k in range(COUNT)]
    assert [target["bbox"].tolist() for (_, target), _ in items] == BOXES_YXYX
    assert [target["cls"].tolist() for (_, target), _ in items] == [[1]] * COUNT
    for truth in (parser.coco_dict(), parser.coco.dataset):
        (category,) = truth["categories"]
        assert category["id"] == parser.category_map.idx_to_id[0]
        boxes = {row["image_id"]: row["bbox"] for row in truth["annotations"] if row["category_id"] == category["id"]}
        assert boxes == {img_id: box for (_, img_id), box in zip(items, BOXES_XYWH, strict=True)}
        assert {info["id"] for info in truth["images"]} == set(parser.img_ids)


def found(dataset: Any) -> dict[str, int]:
    report = dataset.parser.report
    assert not report.errors
    return {**report.dropped, **report.noted, **report.warned}


def rows(data: Coco, key: str, **change: Callable[[Any, int], Any]) -> Coco:
    """Change fields of all rows of a list; None for a value takes the field out."""
    for k, row in enumerate(data[key]):
        for field, new in change.items():
            row[field] = new(row.get(field), k)
            if row[field] is None:
                del row[field]
    return data


# ---- read ------------------------------------------------------------------------------------------------------------


def as_points(box: list[float]) -> list[list[float]]:
    x, y, w, h = box
    return [[x, y], [x + w, y], [x + w, y + h], [x, y + h]]


def flat(points: list[list[float]]) -> list[float]:
    return [number for point in points for number in point]


def halves(box: list[float]) -> list[list[float]]:
    x, y, w, h = box
    return [flat(as_points([x, y, w / 2, h])), flat(as_points([x + w / 2, y, w / 2, h]))]


def drawn(box: list[float]) -> np.ndarray:
    x, y, w, h = map(int, box)
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    mask[y : y + h, x : x + w] = 1
    return mask


def run_lengths(mask: np.ndarray) -> list[int]:
    edges = np.flatnonzero(np.diff(mask.T.ravel(), prepend=0)).tolist()
    return np.diff([0, *edges, mask.size]).tolist()


def compressed(box: list[float]) -> dict[str, Any]:
    encoded = coco_mask.encode(np.asfortranarray(drawn(box)))
    return {"size": list(encoded["size"]), "counts": encoded["counts"].decode()}


def without_bbox(segmentation: Callable[[list[float]], Any]) -> Coco:
    return rows(good(), "annotations", segmentation=lambda _, k: segmentation(BOXES_XYWH[k]), bbox=lambda *_: None)


def annotations(**change: Callable[[Any, int], Any]) -> Coco:
    return rows(good(), "annotations", **change)


def both(image: Callable[[int], Any], annotation: Callable[[int], Any]) -> Coco:
    """Spell image ids in two ways."""
    return rows(annotations(image_id=lambda value, _: annotation(value)), "images", id=lambda value, _: image(value))


def classes(in_list: Any, in_rows: Any) -> Coco:
    return rows(annotations(category_id=lambda *_: in_rows), "categories", id=lambda *_: in_list)


def more_categories(*categories: Coco) -> Coco:
    data = good()
    data["categories"] += categories
    return data


READ: dict[str, tuple[Any, str, int]] = {
    "float category ids": (classes(1, 1.0), "respelled_id", 8),
    "float category ids everywhere": (classes(1.0, 1.0), "respelled_id", 9),
    "text category ids": (classes("1", "1"), "respelled_id", 9),
    "text category ids in the list alone": (classes("1", 1), "respelled_id", 1),
    "category ids as numpy prints them": (classes("1.0", "1.0"), "respelled_id", 9),
    "category ids that are names": (classes("cup", "cup"), "numbered_category", 1),
    "float image ids": (both(float, float), "respelled_id", 16),
    "float image ids in one place": (both(int, float), "respelled_id", 8),
    "text image ids in one place": (both(int, str), "respelled_id", 8),
    "text image ids in the other place": (both(str, int), "respelled_id", 8),
    "image ids as numpy prints them": (both(int, lambda i: f"{i}.0"), "respelled_id", 8),
    "mixed image ids": (both(lambda i: str(i) if i % 2 else i, lambda i: i if i % 2 else str(i)), "respelled_id", 8),
    "float annotation ids": (annotations(id=lambda i, _: float(i)), "", 0),
    "VIA: a category row for each image": (
        {**both(int, str), "categories": [{"id": 1, "name": "cup"}] * COUNT},
        "repeated_category",
        7,
    ),
    "Roboflow's placeholder class": (
        more_categories({"id": 0, "name": "cups", "supercategory": "none"}),
        "placeholder_category",
        1,
    ),
    "bbox as text": (annotations(bbox=lambda box, _: json.dumps(box)), "text_bbox", 8),
    "bbox as text without brackets": (annotations(bbox=lambda box, _: " ".join(map(str, box))), "text_bbox", 8),
    "numbers as text": (annotations(bbox=lambda box, _: [str(v) for v in box]), "text_bbox", 8),
    "a list of one text": (annotations(bbox=lambda box, _: [",".join(map(str, box))]), "text_bbox", 8),
    "a list around the bbox": (annotations(bbox=lambda box, _: [box]), "text_bbox", 8),
    "bbox with keys": (
        annotations(bbox=lambda box, _: dict(zip(("x", "y", "width", "height"), box, strict=True))),
        "text_bbox",
        8,
    ),
    "bbox with keys of corners": (
        annotations(bbox=lambda b, _: {"xmin": b[0], "ymin": b[1], "xmax": b[0] + b[2], "ymax": str(b[1] + b[3])}),
        "text_bbox",
        8,
    ),
    "one polygon": (without_bbox(lambda box: [flat(as_points(box))]), "polygon_bbox", 8),
    "several polygons": (without_bbox(halves), "polygon_bbox", 8),
    "a polygon without the outer list": (without_bbox(lambda box: flat(as_points(box))), "polygon_bbox", 8),
    "a polygon of points": (without_bbox(as_points), "polygon_bbox", 8),
    "a polygon of points with keys": (
        without_bbox(lambda box: [{"x": x, "y": y} for x, y in as_points(box)]),
        "polygon_bbox",
        8,
    ),
    "a mask in run lengths": (
        without_bbox(lambda box: {"size": [HEIGHT, WIDTH], "counts": run_lengths(drawn(box))}),
        "polygon_bbox",
        8,
    ),
    "a mask in compressed run lengths": (without_bbox(compressed), "polygon_bbox", 8),
    "sizes as text": (rows(good(), "images", width=lambda v, _: str(v), height=lambda v, _: f"{v}.0"), "text_size", 8),
    "no sizes": (rows(good(), "images", width=lambda *_: None), "size_from_file", 8),
    "iscrowd as text": (annotations(iscrowd=lambda *_: "0"), "", 0),
    "iscrowd of NaN, as pandas has it": (annotations(iscrowd=lambda *_: float("nan")), "", 0),
    "a byte order mark": (b"\xef\xbb\xbf" + json.dumps(good()).encode(), "", 0),
    "UTF-16": (json.dumps(good()).encode("utf-16"), "", 0),
    "UTF-16 without a mark": (json.dumps(good()).encode("utf-16-le"), "", 0),
    "backslashes": (rows(good(), "images", file_name=lambda name, _: f"images\\{name}"), "renamed_image", 8),
    "backslashes on the way up": (
        rows(good(), "images", file_name=lambda name, _: f"..\\..\\label-studio\\media\\{name}"),
        "renamed_image",
        8,
    ),
    "folders that are not there": (
        rows(good(), "images", file_name=lambda name, k: f"train/{'ab'[k % 2]}/{name}"),
        "renamed_image",
        8,
    ),
    "another extension": (rows(good(), "images", file_name=lambda n, _: n.replace("jpg", "tif")), "renamed_image", 8),
    "no extension": (rows(good(), "images", file_name=lambda name, _: name[:-4]), "renamed_image", 8),
    "another case": (rows(good(), "images", file_name=lambda name, _: name.upper()), "renamed_image", 8),
    "one name in another case": (
        rows(good(), "images", file_name=lambda n, k: n.upper() if k == 3 else n),
        "renamed_image",
        1,
    ),
    "percent-encoded": (rows(good(), "images", file_name=lambda n, k: f"p%3{k + 1}.jpg"), "renamed_image", 8),
    "addresses": (
        rows(good(), "images", file_name=lambda n, k: f"https://host/a/{n if k else 'p%31.jpg'}?size=full"),
        "renamed_image",
        8,
    ),
    "Label Studio's local files": (
        rows(good(), "images", file_name=lambda n, _: f"http://localhost:8080/data/local-files/?d=set/{n}"),
        "renamed_image",
        8,
    ),
    "coco_url alone": (
        rows(good(), "images", coco_url=lambda _, k: f"http://h.org/train2017/{name_of(k)}", file_name=lambda *_: None),
        "name_from_url",
        8,
    ),
    "an empty file_name and a path": (
        rows(good(), "images", path=lambda _, k: f"x/{name_of(k)}", file_name=lambda *_: ""),
        "name_from_url",
        8,
    ),
}


@pytest.mark.parametrize("name", READ)
def test_read_as_the_plain_file_is(images, name):
    content, kind, count = READ[name]
    dataset = open_json(images, copy.deepcopy(content))
    assert_all_there(dataset)
    counts = found(dataset)
    assert counts.get(kind, 0) == count and not dataset.parser.report.dropped and not dataset.parser.report.warned
    assert len(dataset.parser.report.lines()) == 1 + len(counts), "one line a kind"
    assert_all_there(open_json(images, copy.deepcopy(content), "val"))


@pytest.mark.parametrize("name", READ)
def test_a_part_of_it_is_held_out_as_of_the_plain_file(images, tmp_path, name):
    ann = write(images, READ[name][0])
    data, _ = settle_data(
        DataConfig(train_images=str(images), train_ann=str(ann), val_split=0.25), folder=tmp_path / "run"
    )
    train = build_dataset(data, "train")
    val = build_dataset(data, "val", stored=train.parser.category_map)
    boxes = [target["bbox"].tolist() for part in (train, val) for _, target in part]
    assert (len(train), len(val)) == (6, 2) and sorted(boxes) == BOXES_YXYX
    assert str(ann) in train.parser.report.source and len(val.parser.coco.loadImgs(val.parser.img_ids)) == 2


def test_files_in_folders_that_the_names_lack(tmp_path):
    images = put_images(tmp_path / "set" / "images", [f"{'ab'[k % 2]}/{name_of(k)}" for k in range(COUNT)])
    put_images(images / ".thumbnails")
    dataset = open_json(images, good())
    assert_all_there(dataset)
    assert dataset.parser.img_infos[1]["file_name"] == "b/p2.jpg" and found(dataset)["renamed_image"] == 8


@pytest.mark.parametrize("name_in", [lambda images, name: str(images / name), lambda _, name: f"../images/{name}"])
@pytest.mark.parametrize("working_directory", ["here", "there"])
def test_names_that_lead_elsewhere_to_files_that_exist(images, name_in, working_directory, monkeypatch):
    elsewhere = put_images(images.parent / "other", ["x.jpg"])
    if working_directory == "there":
        monkeypatch.chdir(images.parent)
        elsewhere = Path("other")
    dataset = open_json(elsewhere, rows(good(), "images", file_name=lambda name, _: name_in(images, name)))
    assert_all_there(dataset)
    assert found(dataset)["outside_image"] == 8


def test_a_parser_alone_takes_absolute_names_that_exist(images):
    path = write(images, rows(good(), "images", file_name=lambda name, _: str(images / name)))
    parser = create_parser("coco", cfg=CocoParserCfg(ann_filename=str(path)))
    assert_all_there(DetectionDatset(images.parent / "elsewhere", parser))


# ---- read, with a warning --------------------------------------------------------------------------------------------


def corners(order: str, inside: float = 1.0) -> Coco:
    """Write boxes as corners; `inside` scales them towards the origin until none leaves its image as x, y, w, h."""

    def turn(box: list[float]) -> list[float]:
        x, y, w, h = (v * inside for v in box)
        values = {"x1": x, "y1": y, "x2": x + w, "y2": y + h}
        return [values[key] for key in order.split(", ")]

    data = annotations(bbox=lambda box, _: turn(box))
    return rows(data, "annotations", area=lambda area, _: area * inside**2)


@pytest.mark.parametrize("order", ["x1, y1, x2, y2", "x2, y2, x1, y1", "y1, x1, y2, x2", "y2, x2, y1, x1"])
@pytest.mark.parametrize("with_area", [True, False])
def test_corners_are_a_warning_that_says_which(images, order, with_area, caplog):
    data = corners(order)
    if not with_area:
        rows(data, "annotations", area=lambda *_: None)
    report = check_coco(copy.deepcopy(data), "x", None, True, False)[1]
    warnings = [text for level, text, kind in report.entries() if level == "warning" and "bbox" in kind]
    readings = [part for text in warnings for part in text.partition("read as ")[2].split(", 100 %")[0].split(" or ")]
    assert order in readings and len(readings) <= (1 if with_area else 2) and "100 % would lie inside" in str(warnings)
    assert any("area" in text for text in warnings) == with_area
    if not report.num_boxes:
        assert order in refusal(images, data)
        return
    open_json(images, data)
    assert any(record.levelname == "WARNING" and order in record.getMessage() for record in caplog.records)


def test_the_areas_tell_of_corners_where_no_box_leaves_its_image(images):
    report = open_json(images, corners("x1, y1, x2, y2", 0.5)).parser.report
    assert report.warned == {"odd_area": 8} and "read as x1, y1, x2, y2" in report.remarks["odd_area"]
    fine = rows(good(), "annotations", area=lambda area, _: 0.7 * area)  # of polygons
    assert not found(open_json(images, fine))


def test_a_square_image_leaves_both_orders_open(images):
    data = rows(corners("x1, y1, x2, y2"), "images", width=lambda *_: WIDTH, height=lambda *_: WIDTH)
    report = check_coco(data, "x", None, True, False)[1]
    assert "read as x1, y1, x2, y2 or y1, x1, y2, x2," in report.remarks["clipped_bbox"]


@pytest.mark.parametrize("beyond", [0, 1, 2])
def test_a_few_boxes_at_the_border_are_no_suspicion(images, beyond):
    data = annotations(bbox=lambda box, k: [*box[:2], WIDTH, box[3]] if k < beyond else box)
    report = open_json(images, data).parser.report
    assert report.noted.get("clipped_bbox", 0) == beyond
    assert report.suspicious == ({"clipped_bbox"} if beyond == 2 else set())  # 1 of 8 is 12 %, 2 are 25 %


@pytest.mark.parametrize("again", [name_of, lambda k: f"./{name_of(k)}"])
def test_a_file_under_two_ids_with_boxes_at_one(images, again):
    data = good()
    data["images"] += [{**row, "id": row["id"] + 100, "file_name": again(k)} for k, row in enumerate(data["images"])]
    report = open_json(images, data).parser.report
    assert report.warned == {"split_boxes": 8} and report.hidden_images == 8
    data["annotations"] += [
        {**row, "id": row["id"] + 50, "image_id": row["image_id"] + 100} for row in list(data["annotations"])
    ]
    report = open_json(images, data).parser.report
    assert not report.warned and report.noted == {"listed_again": 8} and report.hidden_images == 0


def test_a_box_given_twice(images):
    data = good()
    data["annotations"].append({**data["annotations"][2], "id": 77})
    data["annotations"].append({**data["annotations"][3], "id": 78, "bbox": [1, 2, 30, 30]})
    dataset = open_json(images, data)
    assert dataset.parser.report.noted == {"repeated_bbox": 1}
    assert dataset[2][1]["bbox"].tolist() == BOXES_YXYX[2] * 2


def test_a_class_name_of_two_ids(images):
    assert found(open_json(images, more_categories({"id": 5, "name": "cup"}))) == {"shared_name": 1}


def test_one_absent_image_is_one_that_cannot_be_read(images):
    data = good()
    data["images"].append({"id": 9, "file_name": "gone.jpg", "width": WIDTH, "height": HEIGHT})
    dataset = open_json(images, data)
    assert len(dataset) == 9 and found(dataset) == {"absent_image": 1}
    assert dataset[8][1]["bbox"].tolist() in BOXES_YXYX and dataset.bad_images.indices() == [8]
    val = open_json(images, data, "val", max_bad_images=1)
    assert val[8][1]["bbox"].tolist() == [] and val.bad_images.indices() == [8]
    assert "1 images that are not in the image directory (image 9 gone.jpg)" in refusal(images, data, max_bad_images=0)


def test_one_absent_image_beside_moved_ones(images):
    data = rows(good(), "images", file_name=lambda name, k: f"images\\{name if k else 'gone.jpg'}")
    dataset = open_json(images, data)
    assert found(dataset) == {"renamed_image": 7, "absent_image": 1} and dataset[3][1]["bbox"].tolist() == BOXES_YXYX[3]


# ---- refused, with what to do ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("root", ["/data/project/images/", "C:\\project\\images\\", "\\\\server\\share\\"])
def test_absolute_names_of_elsewhere_are_one_error(images, root):
    text = refusal(images, rows(good(), "images", file_name=lambda name, _: root + name))
    assert text.count("\n") == 1 and "8 file names that leave" in text and "8 of 8 are there, as p1.jpg" in text


def moved(tmp_path: Path, places: list[str], names: list[str]) -> tuple[Path, Coco]:
    images = put_images(tmp_path / "set" / "images", places)
    data = good()
    for row, name in zip(data["images"], names, strict=True):
        row["file_name"] = name
    return images, data


def test_several_rules_are_told_not_followed(tmp_path):
    places = [f"new/{name_of(k)}" if k < 4 else f"{name_of(k)}" for k in range(COUNT)]
    names = [name_of(k) if k < 4 else f"old/{name_of(k)}" for k in range(COUNT)]
    text = refusal(*moved(tmp_path, places, names))
    assert text.count("\n") == 1 and "8 images that are not in" in text and "8 of 8 are there" in text


def test_names_that_several_files_have_are_told(tmp_path):
    places = [f"{folder}/{name_of(k)}" for folder in "ab" for k in range(COUNT)]
    images = put_images(tmp_path / "set" / "images", places)
    text = refusal(images, good())
    assert "8 of 8 may be one of several files, p1.jpg one of a/p1.jpg, b/p1.jpg" in text


def test_two_names_for_one_file_are_not_guessed(tmp_path):
    names = [f"{'ab'[k % 2]}/{name_of(k // 2)}" for k in range(COUNT)]
    text = refusal(*moved(tmp_path, [name_of(k) for k in range(4)], names))
    assert "8 images that are not in" in text and "8 of 8 are there, as p1.jpg is for a/p1.jpg" in text


def test_a_mask_beside_the_images_is_not_taken_for_one(images):
    put_images(images, ["p1.png"])
    (images / "p1.jpg").unlink()
    dataset = open_json(images, good())
    assert found(dataset) == {"absent_image": 1}


def test_the_folder_beside_is_named(images):
    empty = images.parent / "empty"
    empty.mkdir()
    assert f"{images} has them" in refusal(empty, good())


def test_unknown_category_ids_come_with_those_there_are(images):
    data = annotations(category_id=lambda _, k: 1 + k % 2)
    data["categories"] = [{"id": 0, "name": "cup"}, {"id": 1, "name": "dish"}]
    text = refusal(images, data)
    assert "4 annotations" in text and '"categories" has the ids 0, 1, the annotations 1, 2' in text
    assert "count from 1" in text and text.count("\n") == 1
    text = refusal(images, annotations(category_id=lambda _, k: 7 if k else 1))
    assert '"categories" has the ids 1, the annotations 1, 7' in text and "count from" not in text


@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_boxes_within_0_and_1(images, noise):
    data = annotations(bbox=lambda box, k: [box[0] / WIDTH - noise, box[1] / HEIGHT, box[2] / WIDTH, 1 + noise])
    text = refusal(images, data)
    assert "8 boxes lie within 0..1" in text and "multiply" in text and text.count("\n") == 1
    data["annotations"].append({**data["annotations"][0], "id": 99, "bbox": BOXES_XYWH[0]})  # one in pixels among them
    assert "8 boxes lie within 0..1" in refusal(images, data, split="val")


def test_small_boxes_among_others_are_no_sign_of_it(images):
    data = good()
    data["annotations"] += [{**data["annotations"][0], "id": 50 + k, "bbox": [0.1, 0.1, 0.5, 0.5]} for k in range(6)]
    assert found(open_json(images, data)) == {"tiny_bbox": 6}


def test_git_lfs_pointers(images):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 11810976\n"
    assert "git lfs pull" in refusal(images, pointer)
    for k in range(COUNT):
        (images / name_of(k)).write_bytes(pointer)
    for content in (good(), rows(good(), "images", width=lambda *_: None)):
        text = refusal(images, content, max_bad_images=100)
        assert "8 images that are Git LFS pointers" in text and "git lfs pull" in text and text.count("\n") == 1


@pytest.mark.parametrize(
    "key_and_change",
    [
        ("images", {"id": lambda *_: None}),
        ("images", {"file_name": lambda *_: None}),
        ("images", {"file_name": lambda name, _: f"/elsewhere/{name}"}),
        ("images", {"id": lambda *_: True}),
        ("categories", {"id": lambda *_: 1.5}),
        ("categories", {"id": lambda *_: None}),
    ],
)
def test_an_error_brings_no_second_one(images, key_and_change):
    key, change = key_and_change
    assert refusal(images, rows(good(), key, **change)).count("\n") == 1


OTHER_FORMATS: dict[str, tuple[Any, str]] = {
    "Label Studio": (
        [{"id": 1, "annotations": [{"result": []}], "data": {"image": "/data/upload/1/p1.jpg"}}],
        "Label Studio's own format",
    ),
    "Label Studio, short": ([{"id": 1, "image": "/data/p1.jpg", "label": [{"x": 31}]}], "Label Studio's short format"),
    "LabelMe": ({"version": "5.0.1", "shapes": [], "imagePath": "p1.jpg", "imageData": None}, "LabelMe"),
    "VIA's project": ({"_via_settings": {}, "_via_img_metadata": {}, "_via_attributes": {}}, "VIA"),
    "VIA's annotations": ({"p1.jpg1234": {"filename": "p1.jpg", "size": 1234, "regions": []}}, "VIA"),
    "CreateML": ([{"image": "p1.jpg", "annotations": [{"label": "cup", "coordinates": {}}]}], "CreateML"),
    "detections": ([{"image_id": 1, "category_id": 1, "bbox": [1, 2, 30, 40], "score": 0.9}], "list of detections"),
    "annotations alone": (good()["annotations"], 'put the list under "annotations"'),
    "brackets": ([good()], "take the outer [ ] away"),
    "Detectron2": ([{"file_name": "p1.jpg", "image_id": 0, "annotations": []}], "Detectron2"),
    "MMDetection": ({"metainfo": {"classes": ["cup"]}, "data_list": []}, "MMDetection"),
    "Datumaro": ({"info": {}, "categories": {"label": {}}, "items": []}, "Datumaro"),
    "JSON Lines": (b'{"file_name": "p1.jpg"}\n{"file_name": "p2.jpg"}\n', "JSON Lines"),
    "Pascal VOC": (b"<annotation><folder>a</folder></annotation>", "Pascal VOC"),
    "a web page": (b"<!DOCTYPE html>\n<html></html>", "web page"),
    "a zip archive": (b"PK\x03\x04rest", "zip archive"),
    "YOLO's yaml": (b"train: images/train\nval: images/val\nnames: [cup]\n", "--root"),
    "YOLO's labels": (b"0 0.5 0.5 0.2 0.2\n", "label file of YOLO"),
    "csv": (b"filename,xmin,ymin,xmax,ymax,class\np1.jpg,1,2,3,4,cup\n", "csv"),
}


@pytest.mark.parametrize("name", OTHER_FORMATS)
def test_other_formats_are_recognised(images, name, tmp_path):
    content, words = OTHER_FORMATS[name]
    assert words in refusal(images, content)
    ann = str(write(images, content))
    with pytest.raises(DatasetError) as error:  # where a part would be held out
        settle_data(DataConfig(train_images=str(images), train_ann=ann), folder=tmp_path / "run")
    assert words in str(error.value) and ann in str(error.value)


# ---- the rest --------------------------------------------------------------------------------------------------------


def test_classes_of_another_export_are_matched_by_name(images):
    train = annotations(category_id=lambda _, k: 1 + k % 2)
    train["categories"] = [{"id": 1, "name": "cup"}, {"id": 2, "name": "saucer"}]
    swapped = annotations(category_id=lambda _, k: 2 - k % 2)
    swapped["categories"] = [{"id": 1, "name": "saucer"}, {"id": 2, "name": "cup"}]
    stored = open_json(images, train).parser.category_map
    val = open_json(images, swapped, "val", stored=stored)
    assert [target["cls"].tolist() for _, target in val] == [[1 + k % 2] for k in range(COUNT)]
    assert val.parser.category_map.class_names == ("cup", "saucer")
    with pytest.raises(ValueError, match="bowl"):
        open_json(images, more_categories({"id": 9, "name": "bowl"}), "val", stored=stored)


def test_labels_above_num_classes_are_an_error(images):
    data = rows(annotations(category_id=lambda *_: 7), "categories", id=lambda *_: 7)
    data["categories"].append({"id": 9, "name": "dish"})
    ann = str(write(images, data))
    config = DataConfig(train_images=str(images), train_ann=ann, val_images=str(images), val_ann=ann)
    with pytest.raises(ValueError, match=r"num_classes is 3.*7, 9"):
        build_dataset(config, "train", num_classes=3)
    assert build_dataset(config, "train", num_classes=9)[0][1]["cls"].tolist() == [7]
    with pytest.raises(ValueError, match="num_classes is 1"):
        build_dataset(config, "train", num_classes=1, stored=CategoryMap((7, 9), ("cup", "dish"), 2))


def test_a_file_that_is_read_as_it_stands_keeps_everything_for_pycocotools(images):
    data = rows(good(), "images", coco_url=lambda _, k: f"http://h.org/{name_of(k)}")
    rows(data, "annotations", segmentation=lambda _, k: [flat(as_points(BOXES_XYWH[k]))])
    parser = open_json(images, data).parser
    assert parser.coco.dataset == data
    via = {
        **rows(copy.deepcopy(data), "annotations", image_id=lambda i, _: str(i)),
        "categories": data["categories"] * 3,
    }
    parser = open_json(images, via).parser
    assert parser.coco.dataset == data, "mended, with polygons and addresses"
    assert parser.coco.annToMask(parser.coco.loadAnns([1])[0]).sum() == 24 * 16


@pytest.mark.parametrize("seed", range(20))
def test_the_box_of_a_mask_is_pycocotools(seed):
    rng = np.random.default_rng(seed)
    mask = (rng.random((13, 17)) < 0.02 * (1 + seed % 4)).astype(np.uint8)
    mask[rng.integers(13) :, rng.integers(17)] = 1
    if seed == 0:
        mask[:] = 1
    encoded = coco_mask.encode(np.asfortranarray(mask))
    expected = coco_mask.toBbox(encoded).tolist()
    assert box_of_mask({"size": [13, 17], "counts": encoded["counts"].decode()}) == expected
    assert box_of_mask({"size": [13, 17], "counts": run_lengths(mask)}) == expected


@pytest.mark.parametrize(
    "mask",
    [
        {},
        {"size": [4, 4], "counts": [16]},
        {"size": [4, 4], "counts": [3, 2]},
        {"size": [4, 4], "counts": [3, -2, 15]},
        {"size": [4, 4], "counts": "abc\x00"},
        {"size": [4, 4], "counts": "o" * 100},
        {"size": [2**40, 2**40], "counts": [1]},
        {"size": ["4", 4], "counts": [1, 15]},
        {"size": [-4, -4], "counts": [1, 15]},
    ],
)
def test_what_is_no_mask_has_no_box(mask):
    assert box_of_mask(mask) is None


NO_BOXES = [
    "1 2 3",
    "a b c d",
    ["1", "2", None, "4"],
    {"x": 1, "y": 2, "width": 3},
    {"x": True, "y": 2, "width": 3, "height": 4},
    [[1, 2], [3, 4]],
    [10**400, 1, 2, "3"],
]
NO_OUTLINES = [
    [],
    [[]],
    "1 2 3 4 5 6",
    [[1, 2, 3, 4]],
    [[1, 2, 3, 4, 5, None]],
    [[0, 0.5, 10**400, 1, 2, 3]],
    {"size": 3},
]


@pytest.mark.parametrize("broken", [{"bbox": box} for box in NO_BOXES] + [{"segmentation": o} for o in NO_OUTLINES])
def test_what_is_no_box_is_left_out_and_counted(images, broken):
    data = good()
    data["annotations"].append({"id": 9, "image_id": 1, "category_id": 1, **broken})
    assert found(open_json(images, data)) == {"no_bbox": 1}


@pytest.mark.skipif(os.name == "nt", reason="names with colons")
def test_a_name_that_only_looks_like_an_address_is_taken_as_it_stands(tmp_path):
    names = [f"a%20{k}:x.jpg" for k in range(COUNT)]
    images, data = moved(tmp_path, names, names)
    dataset = open_json(images, data)
    assert_all_there(dataset)
    assert not found(dataset)
