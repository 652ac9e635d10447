"""Broken annotation files, each through the door that train.py uses, with what is expected of it.

A file is refused, with a text that names what is wrong; or the rows it is wrong in are dropped or mended, counted under
their kind, and the rest is trained on; or nothing is wrong with it at all.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from broken_data import copy_set, labels_of, load_all, open_split, read_ann, write_ann

from effdet.data.synthetic.dataset import make_synthetic_dataset

NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_synthetic_dataset(tmp_path_factory.mktemp("whole") / "set", num_train=4, num_val=1)


@pytest.fixture(scope="module")
def before(whole: Path) -> Any:
    """What the check says of the whole data set."""
    return open_split(whole).parser.report


@pytest.fixture
def root(whole: Path, tmp_path: Path) -> Path:
    return copy_set(whole, tmp_path / "set")


def edit(rows: str, number: int = 0, **fields: Any) -> Callable:
    """Change fields of one row; `...` takes a field out."""

    def change(data: dict) -> dict:
        row = data[rows][number]
        row.update(fields)
        for key in [key for key, value in row.items() if value is ...]:
            del row[key]
        return data

    return change


def every(rows: str, **fields: Any) -> Callable:
    def change(data: dict) -> dict:
        for number in range(len(data[rows])):
            edit(rows, number, **fields)(data)
        return data

    return change


def put(**lists: Any) -> Callable:
    return lambda data: {key: value for key, value in {**data, **lists}.items() if value is not ...}


def text(change: Callable[[str], Any]) -> Callable:
    return lambda data: change(json.dumps(data))


def twice(rows: str) -> Callable:
    return lambda data: {**data, rows: [*data[rows], data[rows][0]]}


def more(**fields: Any) -> Callable:
    """Add one annotation, good but for the fields given."""

    def change(data: dict) -> dict:
        row = {"id": 99999, "image_id": data["images"][0]["id"], "category_id": 1, "bbox": [5, 5, 20, 20], **fields}
        data["annotations"].append({key: value for key, value in row.items() if value is not ...})
        return data

    return change


def polygon(flaw: str) -> Callable:
    def change(data: dict) -> str:
        data["annotations"][0]["segmentation"] = "HERE"
        return json.dumps(data).replace('"HERE"', flaw)

    return change


# name: (how the file is broken, words of the refusal)
REFUSED: dict[str, tuple[Callable, str]] = {
    "an empty file": (lambda data: b"", "no valid json"),
    "not json": (lambda data: "image,x,y,w,h\n1,2,3,4,5", "no valid json"),
    "xml": (lambda data: "<annotation><object/></annotation>", "no valid json"),
    "bytes of an image": (lambda data: b"\xff\xd8\xff\xe0\x00\x10JFIF", "no valid json"),
    "json cut off in the middle": (text(lambda raw: raw[: len(raw) // 2]), "no valid json"),
    "json cut off at the last brace": (text(lambda raw: raw[:-1]), "no valid json"),
    "two json objects": (text(lambda raw: raw + raw), "no valid json (Extra data"),
    "lists in lists in lists": (lambda data: "[" * 200_000, "no valid json"),
    "a word in a polygon": (polygon("[[1, 2, abc, 4]]"), "no valid json"),
    "a polygon that is not closed": (polygon("[[1, 2, 3, 4]"), "no valid json"),
    "a list": (lambda data: data["annotations"], "found a list"),
    "null": (lambda data: None, "found a NoneType"),
    "no list of images": (put(images=...), "images missing"),
    "no list of annotations": (put(annotations=...), "annotations missing"),
    "no list of categories": (put(categories=...), "categories missing"),
    "an object in place of a list": (put(images={"1": "a.jpg"}), "images missing"),
    "no categories": (put(categories=[]), "the list of categories is empty"),
    "a category id that is a list": (edit("categories", id=[1]), "categories without an integer id"),
    "a category id between two": (edit("categories", id=1.5), "categories without an integer id"),
    "a category id beyond 64 bits": (edit("categories", id=2**64), "categories without an integer id"),
    "a category without an id": (edit("categories", id=...), "categories without an integer id"),
    "a category that is a text": (put(categories=["ball", "box"]), "categories without an integer id"),
    "a category id used twice": (
        lambda data: put(categories=[*data["categories"], {"id": 1, "name": "other"}])(data),
        "category ids used twice",
    ),
    "an image without an id": (edit("images", id=...), "images without an id or file_name"),
    "an image without a file name": (edit("images", file_name=...), "images without an id or file_name"),
    "an image with an empty file name": (edit("images", file_name=""), "images without an id or file_name"),
    "an image id that is a truth value": (edit("images", id=True), "images without an id or file_name"),
    "an image id that is no integer": (edit("images", id=1.5), "images without an id or file_name"),
    "an image that is null": (put(images=[None]), "images without an id or file_name (None)"),
    "an image id used twice": (twice("images"), "image ids used twice"),
    "an image that is not there": (edit("images", file_name="gone.jpg"), "image 1 gone.jpg"),
    "an absolute file name": (edit("images", file_name="/etc/passwd"), "file names that leave the image directory"),
    "a way up in a file name": (edit("images", file_name="../annotations/x.jpg"), "leave the image directory"),
    "a way down and up in a file name": (edit("images", file_name="a/../../b.jpg"), "leave the image directory"),
    "a way up with backslashes": (edit("images", file_name="..\\b.jpg"), "leave the image directory"),
    "a drive in a file name": (edit("images", file_name="C:\\b.jpg"), "leave the image directory"),
    "a null character in a file name": (edit("images", file_name="a\0.jpg"), r"image 1 a\x00.jpg"),
    "half a character in a file name": (edit("images", file_name="\ud83d.jpg"), r"image 1 \ud83d.jpg"),
    "a file name of ten thousand letters": (edit("images", file_name="a" * 10_000), "not in the image directory"),
    "a line break in a file name": (edit("images", file_name="a\nerror.jpg"), r"image 1 a\nerror.jpg"),
    "an annotation of no image": (edit("annotations", image_id=77), "of image 77"),
    "an image_id that is a truth value": (edit("annotations", image_id=True), "image_id or category_id is no id"),
    "an annotation without image_id": (edit("annotations", image_id=...), "image_id None"),
    "an annotation of no category": (edit("annotations", category_id=2), "category 2"),
    "a category_id that is a name": (edit("annotations", category_id="ball"), "category_id 'ball'"),
    "a category_id between two": (edit("annotations", category_id=1.5), "category_id 1.5"),
    "images without annotations": (put(annotations=[]), "has no box to train on: 4 images, 0 annotations"),
    "crowd only": (every("annotations", iscrowd=1), "crowd regions"),
    "no usable box": (every("annotations", bbox=[NAN, 1, 2, 3]), "boxes with NaN or infinite numbers"),
    "no images": (put(images=[], annotations=[]), "the training set has 0 images"),
    "only images too small to train on": (every("images", width=20), "the training set has 0 images"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, root):
    change, words = REFUSED[name]
    write_ann(root, change(read_ann(root)))
    with pytest.raises(ValueError) as error:
        load_all(open_split(root, data={"max_bad_images": 0}))
    assert words in str(error.value)
    assert len(str(error.value)) < 2000, "names what is wrong, does not print the file"
    str(error.value).encode()


# name: (how the file is broken, kind that is counted, how often); the rest is trained on
COUNTED: dict[str, tuple[Callable, str, int]] = {
    "an annotation that is null": (lambda data: put(annotations=[*data["annotations"], None])(data), "no_bbox", 1),
    "no bbox": (more(bbox=...), "no_bbox", 1),
    "bbox null": (more(bbox=None), "no_bbox", 1),
    "three numbers": (more(bbox=[1, 2, 3]), "no_bbox", 1),
    "five numbers": (more(bbox=[1, 2, 3, 4, 5]), "no_bbox", 1),
    "texts for numbers": (more(bbox=["1", "2", "30", "40"]), "text_bbox", 1),
    "a text for the list": (more(bbox="1 2 30 40"), "text_bbox", 1),
    "a text for the json of the list": (more(bbox="[1, 2, 30, 40.0]"), "text_bbox", 1),
    "a text that is no box": (more(bbox="1 2 thirty 40"), "no_bbox", 1),
    "a polygon in place of the bbox": (more(bbox=..., segmentation=[[5, 5, 30, 5, 30, 40]]), "polygon_bbox", 1),
    "a polygon of points": (more(bbox=[], segmentation=[[5, 5], [30, 5], [30, 40]]), "polygon_bbox", 1),
    "a polygon of two points": (more(bbox=..., segmentation=[[5, 5, 30, 40]]), "no_bbox", 1),
    "an image id as a text in one place": (edit("annotations", image_id="1"), "respelled_id", 1),
    "a category_id that is a text": (more(category_id="1"), "respelled_id", 1),
    "a category_id that is a float": (more(category_id=1.0), "respelled_id", 1),
    "a category id that is a text": (edit("categories", id="1"), "respelled_id", 1),
    "a category listed twice": (twice("categories"), "repeated_category", 1),
    "a box given twice": (lambda data: more(bbox=[5, 5, 20, 20], id=99998)(more()(data)), "repeated_bbox", 1),
    "a rotated box": (more(attributes={"rotation": 30.5}), "rotated_bbox", 1),
    "an image that is not there": (edit("images", file_name="gone.jpg"), "absent_image", 1),
    "a truth value for a number": (more(bbox=[True, 2, 30, 40]), "no_bbox", 1),
    "a list for a number": (more(bbox=[[1], 2, 30, 40]), "no_bbox", 1),
    "NaN": (more(bbox=[1, NAN, 30, 40]), "bad_bbox", 1),
    "Infinity": (more(bbox=[1, 2, INF, 40]), "bad_bbox", 1),
    "-Infinity": (more(bbox=[-INF, 2, 30, 40]), "bad_bbox", 1),
    "a sum beyond all numbers": (more(bbox=[1e308, 2, 1e308, 40]), "bad_bbox", 1),
    "an integer beyond all floats": (more(bbox=[1, 2, 10**400, 40]), "bad_bbox", 1),
    "no width": (more(bbox=[1, 2, 0, 40]), "empty_bbox", 1),
    "swapped corners": (more(bbox=[40, 50, -30, -40]), "empty_bbox", 1),
    "a negative place, wholly outside": (more(bbox=[-50, 2, 30, 40]), "outside_bbox", 1),
    "below the image": (more(bbox=[1, 9000, 30, 40]), "outside_bbox", 1),
    "a negative place, partly inside": (more(bbox=[-10, -10, 30, 40]), "clipped_bbox", 1),
    "a giant box": (more(bbox=[-1e9, -1e9, 2e9, 2e9]), "clipped_bbox", 1),
    "a box of half a pixel": (more(bbox=[1, 2, 0.5, 40]), "tiny_bbox", 1),
    "a crowd": (more(iscrowd=1), "crowd", 1),
    "a crowd by a text": (more(iscrowd="yes"), "crowd", 1),
    "an ignored object": (more(ignore=1), "crowd", 1),
    "annotation ids used twice": (twice("annotations"), "duplicate_annotation_id", 1),
    "no annotation ids": (every("annotations", id=...), "duplicate_annotation_id", None),
    "annotation ids that are lists": (more(id=[1]), "duplicate_annotation_id", 1),
    "a width that is a text": (edit("images", width="320"), "text_size", 1),
    "a width of NaN": (edit("images", width=NAN), "size_from_file", 1),
    "a negative height": (edit("images", height=-240), "size_from_file", 1),
    "a height of 1e300": (edit("images", height=1e300), "size_from_file", 1),
    "no sizes": (every("images", width=..., height=...), "size_from_file", 4),
}


@pytest.mark.parametrize("name", COUNTED)
def test_counted_and_the_rest_is_trained_on(name, root, before):
    change, kind, count = COUNTED[name]
    write_ann(root, change(read_ann(root)))
    dataset = open_split(root)
    report = dataset.parser.report
    added = report.num_annotations - before.num_annotations
    found = {**report.dropped, **report.noted, **report.warned}
    assert found[kind] == (len(read_ann(root)["annotations"]) if count is None else count)
    lost = sum(report.dropped.values()) - sum(before.dropped.values())
    assert report.num_boxes == before.num_boxes + added - lost and report.num_boxes >= before.num_boxes
    assert len(labels_of(dataset)) == report.num_boxes
    assert any(line.strip().startswith(f"{found[kind]} ") for line in report.lines())
    load_all(dataset)
    truth = dataset.parser.coco_dict()["annotations"]
    assert len({row["id"] for row in truth}) == len(truth), "the evaluator can tell annotations apart"
    assert all(type(row["area"]) in (int, float) and row["iscrowd"] in (0, 1) for row in truth)


def renamed(name: str) -> Callable:
    def change(data: dict, root: Path) -> dict:
        path = root / "train2017" / name
        path.parent.mkdir(exist_ok=True)
        (root / "train2017" / data["images"][0]["file_name"]).rename(path)
        return edit("images", file_name=name)(data)

    return change


def with_ids(mapping: Callable[[int], Any]) -> Callable:
    def change(data: dict, root: Path) -> dict:
        for row in data["images"]:
            row["id"] = mapping(row["id"])
        for row in data["annotations"]:
            row["image_id"] = mapping(row["image_id"])
        return data

    return change


# Odd, but right: nothing is dropped, and the boxes are all there.
ACCEPTED: dict[str, Callable] = {
    "Chinese and accents in a file name": renamed("目录/été 图片.jpg"),
    "an emoji in a file name": renamed("\U0001f600 (1).jpg"),
    "quotes and a percent sign in a file name": renamed("a'b\"c%d.jpg"),
    "two dots within a file name": renamed("a..b.jpg"),
    "a byte order mark": lambda data, root: b"\xef\xbb\xbf" + json.dumps(data).encode(),
    "UTF-16": lambda data, root: json.dumps(data).encode("utf-16"),
    "image ids that are texts": with_ids(lambda number: f"image {number}"),
    "image ids beyond 64 bits": with_ids(lambda number: number + 2**70),
    "negative image ids": with_ids(lambda number: -number),
    "categories without names": lambda data, root: every("categories", name=...)(data),
    "a line break in a category name": lambda data, root: edit("categories", name="a\nb\ud83d")(data),
    "polygons that are null": lambda data, root: every("annotations", segmentation=None)(data),
    "an area that is a text": lambda data, root: every("annotations", area="big")(data),
    "no area, no iscrowd, no licence": lambda data, root: put(info=..., licenses=...)(
        every("annotations", area=...)(data)
    ),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(name, root):
    before = open_split(root)
    expected = sorted(labels_of(before).tolist())
    write_ann(root, ACCEPTED[name](read_ann(root), root))
    dataset = open_split(root)
    assert dataset.parser.report.dropped == before.parser.report.dropped and not dataset.parser.report.noted
    assert sorted(labels_of(dataset).tolist()) == expected
    load_all(dataset)
    "".join(dataset.parser.category_map.names).encode()


def test_ten_thousand_boxes_in_one_image(root):
    data = read_ann(root)
    first = data["images"][0]["id"]
    data["annotations"] = [
        {"id": k + 1, "image_id": first, "category_id": 1, "bbox": [k % 150, k // 150, 20, 20]} for k in range(10_000)
    ]
    write_ann(root, data)
    dataset = open_split(root)
    _, target = load_all(dataset, training=False)[0]
    assert (target["cls"] == 1).sum() == 10_000 == dataset.parser.report.num_boxes, "no box is cut off"


def test_a_class_count_that_is_not_the_files(root):
    with pytest.raises(ValueError, match=r"num_classes is 3, but the json has 6 categories.*set it to 6"):
        open_split(root, num_classes=3)


def test_validation_categories_that_training_does_not_know(root):
    stored = open_split(root).parser.category_map.to_dict()
    data = read_ann(root)
    data["categories"].append({"id": 5, "name": "new"})
    write_ann(root, data)
    with pytest.raises(ValueError, match=r"the checkpoint .*does not know 5 'new'"):
        open_split(root, "val", stored=stored)


def test_the_tables_are_as_long_as_they_should_be():
    assert len(REFUSED) + len(COUNTED) + len(ACCEPTED) >= 90
