"""Category maps, the check of a COCO json, and the parser."""

import copy
import gc
import json
import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from effdet.data import CategoryMap, DatasetError, create_dataset, create_parser, open_coco, resolve_category_map
from effdet.data.coco import annotations as coco
from effdet.data.coco import read as coco_json
from effdet.data.coco.annotations import CocoParser, CocoParserCfg, ImageTable, coco_paths
from effdet.data.coco.check import check_coco
from effdet.data.coco.report import DROPPED, ERRORS, DatasetReport
from effdet.data.coco.rows import sound_columns, sound_rows

COCO_IDS = [i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]


def categories(*ids):
    return [{"id": i, "name": f"c{i}"} for i in ids]


def base_json():
    return {
        "images": [{"id": k, "file_name": f"{k}.png", "width": 100, "height": 80} for k in (1, 2, 3)],
        "categories": categories(5, 1000),
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 5, "bbox": [10, 20, 30, 40], "iscrowd": 0, "area": 1200},
            {"id": 2, "image_id": 3, "category_id": 1000, "bbox": [0.5, 0.5, 99, 79], "iscrowd": 0, "area": 7821},
            {"id": 3, "image_id": 1, "category_id": 1000, "bbox": [1, 2, 3, 4], "iscrowd": 0, "area": 12},
        ],
    }


def write(tmp_path: Path, data, name="a.json") -> Path:
    path = tmp_path / name
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def parse(tmp_path, data, **options):
    return CocoParser(CocoParserCfg(ann_filename=str(write(tmp_path, data)), **options))


# Category maps


@pytest.mark.parametrize(
    ("ids", "num_classes", "expected"),
    [
        ((0, 1), None, {0: 0, 1: 1}),
        ((1, 2), None, {1: 0, 2: 1}),
        ((1, 2), 2, {1: 0, 2: 1}),
        ((5, 1000), None, {5: 0, 1000: 1}),
        ((5, 1000), 2, {5: 0, 1000: 1}),
        ((5, 1000), 1000, {5: 4, 1000: 999}),
        ((7, 3, 10**12), None, {3: 0, 7: 1, 10**12: 2}),
        ((-4, 0), None, {-4: 0, 0: 1}),
        (COCO_IDS, None, {1: 0, 11: 10, 13: 11, 90: 79}),
        (COCO_IDS, 90, {1: 0, 11: 10, 13: 12, 90: 89}),
    ],
)
def test_category_ids_of_any_kind_map_to_classes_and_back(ids, num_classes, expected):
    category_map = resolve_category_map(categories(*ids), num_classes)
    assert category_map.num_classes == (num_classes or len(ids))
    for cat_id, idx in expected.items():
        assert category_map.id_to_idx[cat_id] == idx
        assert category_map.idx_to_id[idx] == cat_id
        assert category_map.class_names[idx] == f"c{cat_id}"
    every = np.array(sorted(ids))
    assert category_map.to_idx(every).tolist() == [category_map.id_to_idx[i] for i in every]
    assert category_map.idx_to_id[category_map.to_idx(every)].tolist() == every.tolist()
    assert category_map.to_idx(np.array([-99, 2**40])).tolist() == [-1, -1]
    assert category_map.idx_to_id.dtype == np.int64 and len(category_map.idx_to_id) == category_map.num_classes
    again = CategoryMap.from_dict(json.loads(json.dumps(category_map.to_dict())))
    assert again == category_map and hash(again) == hash(category_map)


def test_a_class_without_category_has_a_name_and_an_id():
    category_map = resolve_category_map(categories(1, 3), 4)
    assert category_map.class_names == ("c1", "id 2", "c3", "id 4")
    assert category_map.idx_to_id.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(("ids", "num_classes"), [((0, 1), 3), ((1, 5), 3), ((1, 2, 3), 2), ((-1, 2), 9)])
def test_a_class_count_that_contradicts_the_json_names_both_sides(ids, num_classes):
    with pytest.raises(
        ValueError, match=rf"num_classes is {num_classes}.*{len(ids)} categories.*{ids[-1]}.*set it to {len(ids)}"
    ):
        resolve_category_map(categories(*ids), num_classes)


def test_the_stored_map_wins_when_the_json_agrees_with_it(caplog):
    stored = CategoryMap.from_categories(categories(1, 4, 9))
    assert resolve_category_map(categories(1, 4, 9), stored=stored) == stored
    assert resolve_category_map(categories(9), num_classes=3, stored=stored.to_dict()) == stored
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    with caplog.at_level(logging.WARNING):
        renamed = resolve_category_map([{"id": 4, "name": "other"}], stored=stored, match="id")
    assert renamed == stored and "4: 'other' in the json, 'c4' in the checkpoint" in caplog.text
    for match in ("id", "name"):
        with pytest.raises(ValueError, match=r"the json has .*1.*2.* the checkpoint has 1.*4.*9.*does not know 2\b"):
            resolve_category_map(categories(1, 2), stored=stored, match=match)
    with pytest.raises(ValueError, match=r"num_classes is 5.*3 classes"):
        resolve_category_map(categories(1), num_classes=5, stored=stored)


@pytest.mark.parametrize(
    "fields",
    [((), (), 0), ((2, 1), "ab", 2), ((1, 1), "ab", 2), ((1, 2), "a", 2), ((1, 2), "ab", 3), ((0, 2), "ab", 3, True)],
)
def test_a_map_that_does_not_fit_together_is_refused(fields):
    with pytest.raises(ValueError):
        CategoryMap(*fields)


# The parser


def test_parser_serves_boxes_by_dataset_index(tmp_path):
    data = base_json()
    data["images"].reverse()
    parser = parse(tmp_path, data)
    assert parser.img_ids == [1, 2, 3]
    assert parser.img_infos[1] == {"id": 2, "file_name": "2.png", "width": 100, "height": 80}
    assert parser.cat_ids == [5, 1000] and parser.cat_names == ["c5", "c1000"] and parser.max_label == 1000
    assert parser.cat_id_to_label == {5: 5, 1000: 1000} and parser.has_labels
    first = parser.get_ann_info(0)
    assert first["bbox"].dtype == np.float32 and first["cls"].dtype == np.int64
    assert first["bbox"].tolist() == [[20, 10, 60, 40], [2, 1, 6, 4]] and first["cls"].tolist() == [5, 1000]
    assert parser.get_ann_info(1)["bbox"].shape == (0, 4) and parser.get_ann_info(1)["cls"].shape == (0,)
    first["bbox"][:] = 0
    assert parser.get_ann_info(0)["bbox"].sum() > 0, "an item must not be a view of the store"
    assert parse(tmp_path, data, bbox_yxyx=False).get_ann_info(0)["bbox"][0].tolist() == [10, 20, 40, 60]


def test_setting_another_map_relabels(tmp_path):
    parser = parse(tmp_path, base_json())
    parser.category_map = resolve_category_map(parser.categories)
    assert parser.get_ann_info(0)["cls"].tolist() == [1, 2] and parser.max_label == 2
    with pytest.raises(ValueError, match=r"\[1000\].*does not know"):
        parser.category_map = CategoryMap.from_categories(categories(5))


def test_small_and_empty_images_are_left_out_only_on_request(tmp_path):
    data = base_json()
    data["images"][2].update(width=20, height=90)
    parser = parse(tmp_path, data)
    assert parser.img_ids == [1, 2] and parser.img_ids_invalid == [3] and parser.report.dropped["small_image"] == 1
    assert parser.get_ann_info(1)["cls"].tolist() == []
    assert parse(tmp_path, data, min_img_size=0).img_ids == [1, 2, 3]
    skipping = parse(tmp_path, data, min_img_size=0, ignore_empty_gt=True)
    assert skipping.img_ids == [1, 3] and skipping.get_ann_info(1)["cls"].tolist() == [1000]
    assert skipping.report.dropped["empty_image"] == 1


def test_crowd_is_dropped_or_becomes_an_ignore_region(tmp_path):
    data = base_json()
    data["annotations"][0]["iscrowd"] = 1
    data["annotations"][2]["ignore"] = 1
    dropped = parse(tmp_path, data)
    assert dropped.get_ann_info(0)["cls"].tolist() == [] and dropped.report.dropped["crowd"] == 2
    kept = parse(tmp_path, data, crowd="ignore")
    assert kept.get_ann_info(0)["cls"].tolist() == [-2, -2] and kept.get_ann_info(0)["bbox"].shape == (2, 4)
    assert kept.report.noted["crowd_ignored"] == 2 and kept.report.num_boxes == 1
    assert parse(tmp_path, data, include_bboxes_ignore=True).get_ann_info(0)["cls"].tolist() == [-2, -2]
    with pytest.raises(ValueError, match="choose 'drop' or 'ignore'"):
        parse(tmp_path, data, crowd="keep")


def test_parser_pickles_small_and_without_the_json(tmp_path):
    data = base_json()
    data["annotations"][0]["segmentation"] = [[float(k) for k in range(5000)]]
    parser = parse(tmp_path, data)
    assert len(parser.coco.anns[1]["segmentation"][0]) == 5000
    assert len(pickle.dumps(parser)) < 5000
    assert pickle.loads(pickle.dumps(parser)).get_ann_info(0)["cls"].tolist() == [5, 1000]


def test_unlabelled_file(tmp_path):
    parser = parse(tmp_path, {"images": base_json()["images"]}, has_labels=False)
    assert len(parser.img_ids) == 3 and parser.category_map is None and parser.max_label == 0
    assert parser.coco_dict()["annotations"] == []


# The check: what is dropped, what is noted, what is an error

BAD_ANNOTATIONS = {
    "no_bbox": [{}, {"bbox": None}, {"bbox": []}, {"bbox": [1, 2, 3]}, {"bbox": "1 2 3"}, {"bbox": [1, 2, "c", 4]}],
    "bad_bbox": [{"bbox": [float("nan"), 1, 2, 3]}, {"bbox": [1, 2, float("inf"), 3]}, {"bbox": [1e308, 0, 1e308, 1]}],
    "empty_bbox": [{"bbox": [5, 5, 0, 5]}, {"bbox": [5, 5, 5, -1]}],
    "outside_bbox": [{"bbox": [100, 5, 9, 9]}, {"bbox": [5, -9, 9, 9]}, {"bbox": [500, 500, 9, 9]}],
    "tiny_bbox": [{"bbox": [5, 5, 0.5, 9]}, {"bbox": [99.5, 5, 9, 9]}],
    "crowd": [{"bbox": [5, 5, 9, 9], "iscrowd": 1}, {"bbox": [5, 5, 9, 9], "ignore": True}],
}


@pytest.mark.parametrize("kind", BAD_ANNOTATIONS)
def test_droppable_annotations_are_dropped_counted_and_named(tmp_path, kind):
    data = base_json()
    bad = BAD_ANNOTATIONS[kind]
    data["annotations"] += [{"id": 70 + k, "image_id": 1, "category_id": 5, **a} for k, a in enumerate(bad)]
    parser = parse(tmp_path, data)
    assert parser.report.dropped == {kind: len(bad)} and not parser.report.errors
    assert parser.report.num_boxes == 3 and parser.report.num_annotations == 3 + len(bad)
    assert parser.get_ann_info(0)["bbox"].tolist() == [[20, 10, 60, 40], [2, 1, 6, 4]]
    line = next(line for line in parser.report.lines() if DROPPED[kind][0] in line)
    assert line.strip().startswith(f"{len(bad)} ") and "annotation 70 of image 1" in line
    assert ("..." in line) == (len(bad) > 3) and "annotation 73" not in line


def test_boxes_partly_outside_are_clipped_and_counted(tmp_path):
    data = base_json()
    data["annotations"] = [
        {"id": 1, "image_id": 1, "category_id": 5, "bbox": [-10, -20, 30, 40]},
        {"id": 2, "image_id": 1, "category_id": 5, "bbox": [90, 70, 30, 40]},
        {"id": 3, "image_id": 1, "category_id": 5, "bbox": [0, 0, 100, 80]},
    ]
    parser = parse(tmp_path, data)
    assert parser.get_ann_info(0)["bbox"].tolist() == [[0, 0, 20, 20], [70, 90, 80, 100], [0, 0, 80, 100]]
    assert parser.report.noted == {"clipped_bbox": 2} and not parser.report.dropped


def change(data, where, **fields):
    data[where][0].update(fields)


BROKEN = {
    "unknown_category": (lambda d: change(d, "annotations", category_id=6), "annotation 1 of image 1: category 6"),
    "orphan_annotation": (lambda d: change(d, "annotations", image_id=77), "annotation 1 of image 77"),
    "annotation_fields": (lambda d: change(d, "annotations", image_id=True), "annotation 1: image_id True"),
    "duplicate_image_id": (lambda d: change(d, "images", id=2), "id 2: 1.png and 2.png"),
    "duplicate_category_id": (lambda d: change(d, "categories", id=1000), "id 1000: 'c5' and 'c1000'"),
    "category_fields": (lambda d: change(d, "categories", id=5.5), "{'id': 5.5"),
    "no_categories": (lambda d: d.update(categories=[]), "list of categories is empty"),
    "image_fields": (lambda d: d["images"][0].pop("file_name"), "images without an id or file_name"),
    "escaping_file_name": (lambda d: change(d, "images", file_name="a/../../1.png"), "'a/../../1.png' of image 1"),
    "no_size": (lambda d: d["images"][0].pop("width"), "image 1 1.png"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_errors_name_the_kind_an_example_and_a_remedy(tmp_path, kind):
    data = base_json()
    broke, example = BROKEN[kind]
    broke(data)
    with pytest.raises(DatasetError) as error:
        parse(tmp_path, data)
    text = str(error.value)
    assert ERRORS[kind][0] in text and ERRORS[kind][1] in text and example in text and "a.json" in text


@pytest.mark.parametrize("name", ["/etc/1.png", "..", "../1.png", "a\\..\\..\\1.png", "C:\\1.png", "\\\\host\\1.png"])
def test_file_names_may_not_leave_the_image_directory(tmp_path, name):
    data = base_json()
    change(data, "images", file_name=name)
    with pytest.raises(DatasetError, match="leave the image directory"):
        parse(tmp_path, data)


def test_all_errors_are_raised_together(tmp_path):
    data = base_json()
    change(data, "annotations", category_id=6)
    data["annotations"][1]["image_id"] = 9
    data["images"].append(dict(data["images"][0]))
    (tmp_path / "images").mkdir()
    Image.new("RGB", (100, 80)).save(tmp_path / "images" / "2.png")
    with pytest.raises(DatasetError) as error:
        parse(tmp_path, data, img_dir=tmp_path / "images")
    text = str(error.value)
    for kind in ("unknown_category", "orphan_annotation", "duplicate_image_id", "missing_image"):
        assert ERRORS[kind][0] in text
    assert "2 images that are not in the image directory (image 1 1.png, image 3 3.png)" in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "no valid json"),
        ("[1, 2]", "found a list"),
        ('{"shapes": []}', r"images, annotations, categories missing, found keys \['shapes'\]"),
        ('{"images": [], "annotations": {}, "categories": []}', "annotations missing"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path, content, message):
    with pytest.raises(DatasetError, match=message):
        parse(tmp_path, content)
    with pytest.raises(FileNotFoundError, match="nowhere.json"):
        CocoParser(CocoParserCfg(ann_filename="nowhere.json"))


def test_missing_sizes_are_read_from_the_files(tmp_path):
    data = base_json()
    for image in data["images"]:
        del image["width"]
    data["images"][1]["height"] = 0
    data["images"][0]["file_name"] = "sub/1.png"
    (tmp_path / "sub").mkdir()
    for name in ("sub/1.png", "2.png", "3.png"):
        Image.new("RGB", (100, 80)).save(tmp_path / name)
    parser = parse(tmp_path, data, img_dir=tmp_path)
    assert [(i["width"], i["height"]) for i in parser.img_infos] == [(100, 80)] * 3
    assert parser.report.noted == {"size_from_file": 3}
    assert parser.coco_dict()["images"][0]["width"] == 100
    (tmp_path / "3.png").write_bytes(b"not an image")
    with pytest.raises(DatasetError, match=r"readable from the file \(image 3 3.png\)"):
        parse(tmp_path, data, img_dir=tmp_path)


def naive_boxes(data, img_id, width, height):
    """The slow obvious reading of one image's boxes."""
    out = []
    for ann in data["annotations"]:
        x, y, w, h = ann["bbox"]
        if ann["image_id"] != img_id or ann.get("iscrowd") or w <= 0 or h <= 0:
            continue
        x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
        if x1 - x0 >= 1 and y1 - y0 >= 1:
            out.append([y0, x0, y1, x1, ann["category_id"]])
    return np.array(out, dtype=np.float32).reshape(-1, 5)


@pytest.mark.parametrize("seed", range(5))
def test_packed_boxes_equal_the_naive_reading(seed):
    rng = np.random.default_rng(seed)
    ids = rng.permutation(60)[:12].tolist()
    data = {
        "images": [{"id": i, "file_name": f"{i}", "width": 50 + i, "height": 90} for i in ids],
        "categories": categories(*rng.permutation(40)[:6].tolist()),
        "annotations": [],
    }
    for k in range(200):
        ann = {"id": k + 1, "image_id": int(rng.choice(ids)), "iscrowd": int(rng.random() < 0.1)}
        ann["category_id"] = int(rng.choice([c["id"] for c in data["categories"]]))
        ann["bbox"] = np.round([*rng.uniform(-20, 110, 2), *rng.uniform(-3, 60, 2)], 2).tolist()
        data["annotations"].append(ann)
    arrays, report = check_coco(copy.deepcopy(data), "x", None, True, False)
    assert report.num_boxes + sum(report.dropped.values()) == 200
    empty = 0
    for k, info in enumerate(arrays.img_infos):
        rows = slice(arrays.offsets[k], arrays.offsets[k + 1])
        expected = naive_boxes(data, info["id"], info["width"], info["height"])
        empty += not len(expected)
        np.testing.assert_allclose(arrays.boxes_yxyx[rows], expected[:, :4], rtol=1e-6)
        assert arrays.category_ids[rows].tolist() == expected[:, 4].astype(int).tolist()
    assert report.num_images_without_boxes == empty


# Memory and time at COCO's size


def test_the_image_table_gives_back_what_went_in():
    infos = [
        {"id": k, "file_name": name, "width": 5 + k, "height": 2**40}
        for k, name in enumerate(["a.jpg", "", "train/\u00e9\u732b.png", "\ud83d half", "z"])
    ]
    table = ImageTable(infos)
    assert list(table) == infos and len(table) == 5 and table[-1] == infos[4] and table[1:4] == infos[1:4]
    assert type(table[0]["id"]) is int and type(table[0]["width"]) is int
    assert list(pickle.loads(pickle.dumps(table))) == infos and list(ImageTable([])) == []
    for k in (5, -6):
        with pytest.raises(IndexError):
            table[k]
    odd = [dict(infos[0], id=i) for i in ("text", 3, 2**70)]
    assert list(ImageTable(odd)) == odd


ODD_VALUES = [
    None,
    True,
    5,
    -1,
    2**70,
    1.0,
    "1",
    "",
    [],
    [1, 2, 3, 4],
    [1, 2, 3],
    [1, 2, 3, True],
    [1, 2, "3", 4],
    [1, 2, 3, None],
    {},
    [[1, 2, 3, 4]],
    [0.5, 2**80, -3, float("nan")],
]


@pytest.mark.parametrize("key", [None, "id", "image_id", "category_id", "bbox", "iscrowd"])
def test_the_fast_look_at_annotations_agrees_with_the_one_that_reports(key):
    """Whatever stands in one annotation, the fast look finds all sound just where the other has nothing to say."""
    answers = []
    for value in ODD_VALUES:
        rows = base_json()["annotations"]
        if key is None:
            rows[1] = value
        else:
            rows[1][key] = value
        report = DatasetReport(source="here")
        rows_left = sound_rows(rows, {1, 2, 3, "1"}, {5, 1000}, report)
        fast = sound_columns(rows, {1, 2, 3, "1"}, {5, 1000}) is not None
        assert fast == (rows_left == rows and not report.entries()), value
        answers.append(fast)
    sound = {None: 0, "id": 5, "image_id": 1, "category_id": 1, "bbox": 2, "iscrowd": len(ODD_VALUES)}
    assert sum(answers) == sound[key], "else a look that finds fault with all or nothing would pass"


def test_no_python_object_per_image_or_box_is_kept_for_the_workers(tmp_path):
    """What a worker touches of the parser is arrays of numbers; a dict or a string an image would be copied by each."""
    count = 500
    data = base_json()
    data["images"] = [{"id": k, "file_name": f"{k:012d}.jpg", "width": 640, "height": 480} for k in range(1, count + 1)]
    parser = parse(tmp_path, data)
    kept = [v for v in vars(parser.img_infos).values()] + [parser._boxes_yxyx, parser._category_ids, parser._rows]
    kept += [parser._offsets, parser._is_crowd, parser._labels]
    assert all(isinstance(v, np.ndarray) and not v.dtype.hasobject for v in kept)
    assert sum(v.nbytes for v in vars(parser.img_infos).values()) == count * (8 + 16 + 16 + 8), "id, name, size, end"
    held = [k for k, v in vars(parser).items() if isinstance(v, (list, tuple, dict)) and len(v) >= count]
    assert held == ["img_ids"], "which workers ask only for its length"


UNUSED = [
    [[1.5, 2, 3e-2, -4]],
    [[1, 2], [3, 4]],
    [],
    {"counts": [1, 2], "size": [3, 4]},
    {"counts": "a]}[", "size": [3, 4]},
    None,
    'text "bbox": [1]',
    float("nan"),
]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("unused", UNUSED, ids=str)
def test_what_boxes_do_not_need_is_left_out_and_nothing_else(tmp_path, unused, last, indent, monkeypatch):
    data = base_json()
    data["info"] = {"bbox": [1], "year": 2017}
    expected = copy.deepcopy(data)
    for row in data["images"] + data["annotations"]:
        rest = dict(row)
        row.clear()
        row.update({**rest, "segmentation": unused} if last else {"segmentation": unused, **rest})
    raw = json.dumps(data, indent=indent).encode()
    if unused == unused:  # NaN is none of the decoder's business
        monkeypatch.setattr(coco_json, "_read_slowly", None)
    assert coco_json.read_json(write(tmp_path, raw.decode())) == expected


@pytest.mark.parametrize(
    "value",
    [
        "1",
        "1.0",
        "1e2",
        "-0",
        "0.1e-400",
        "1e400",
        "-1e999",
        "NaN",
        "Infinity",
        "123456789012345678901234567890",
        "18446744073709551616.5",
        "2.2250738585072011e-308",
        "123456789.123456789123",
        "true",
        "null",
        '"a"',
        '"\\u00e9"',
        '"\\ud83d"',
        '"\\ud83d\\ude00"',
        '"\u00e9"',
        "[1, [2]]",
        '{"id": 1}',
        '1, "id": 2',
        "01",
        "1,",
        "[1,]",
        '"a\nb"',
        "'a'",
        "",
        "[" * 3000 + "]" * 3000,
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1"])
def test_a_file_means_what_pythons_json_makes_of_it(tmp_path, value, encoding):
    """Where the fast decoder takes a file, it gives equal values of equal types; where not, the other one decides."""
    text = f'{{"images": [{{"id": {value}}}], "annotations": [{{"bbox": [{value}]}}], "categories": []}}'
    raw = text.encode(encoding)
    path = tmp_path / "a.json"
    path.write_bytes(raw)
    try:
        expected = json.loads(raw)
    except (ValueError, RecursionError):
        with pytest.raises(DatasetError, match="not a COCO annotation file"):
            coco_json.read_json(path)
    else:
        assert repr(coco_json.read_json(path)) == repr(expected)


def test_the_garbage_collector_rests_while_a_file_is_read(tmp_path, monkeypatch):
    seen, check = [], coco.check_coco
    monkeypatch.setattr(coco, "check_coco", lambda *args: seen.append(gc.isenabled()) or check(*args))
    assert gc.isenabled()
    parser = parse(tmp_path, base_json())
    assert seen == [False] and gc.isenabled()
    parser.ann_path.write_text("no json")
    for read in (parser.coco_dict, lambda: CocoParser(CocoParserCfg(parser.ann_path))):
        with pytest.raises(DatasetError):
            read()
        assert gc.isenabled()


# For the evaluator


def test_the_json_of_an_evaluation_is_read_once(tmp_path, monkeypatch):
    path = write(tmp_path, base_json())
    (tmp_path / "images").mkdir()
    for info in base_json()["images"]:
        Image.new("RGB", (info["width"], info["height"])).save(tmp_path / "images" / info["file_name"])
    reads = []
    monkeypatch.setattr(coco, "read_json", lambda source: reads.append(source) or coco_json.read_json(source))
    parser = open_coco(split="val", images=tmp_path / "images", ann=path).parser
    assert pickle.loads(pickle.dumps(parser))._kept is None, "a loader process does not carry it"
    first = parser.coco_dict()
    assert reads == [path] and first == parser.coco_dict(), "the second is read again, as the first may be changed"
    assert reads == [path, path]


def test_coco_dict_of_a_clean_file_is_the_file_without_polygons(tmp_path):
    data = base_json()
    data["info"] = {"year": 2017}
    expected = copy.deepcopy(data)
    data["annotations"][0]["segmentation"] = [[1, 2, 3, 4, 5, 6]]
    assert parse(tmp_path, data).coco_dict() == expected


@pytest.mark.parametrize("ids", [[0, 1, 2], [7, 7, 8], [None, 1, 2]])
def test_coco_dict_repairs_what_pycocotools_trips_over(tmp_path, ids):
    data = base_json()
    for ann, ann_id in zip(data["annotations"], ids, strict=True):
        ann["id"] = ann_id
        del ann["iscrowd"], ann["area"]
    data["annotations"].append({"id": 99, "image_id": 1, "category_id": 5})
    parser = parse(tmp_path, data)
    assert parser.report.noted.get("duplicate_annotation_id", 0) == (0 if ids[0] == 0 else 1)
    rows = parser.coco_dict()["annotations"]
    assert [(a["id"], a["iscrowd"], a["area"]) for a in rows] == [(1, 0, 1200), (2, 0, 7821), (3, 0, 12)]


# Layout and doors


def make_layout(root: Path, data, split="val"):
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / f"{split}2017").mkdir(exist_ok=True)
    for image in data["images"]:
        Image.new("RGB", (image["width"], image["height"])).save(root / f"{split}2017" / image["file_name"])
    return write(root / "annotations", data, f"instances_{split}2017.json")


def test_open_coco_by_layout_and_by_explicit_paths(tmp_path, caplog):
    data = base_json()
    data["images"][1].update(width=16, height=16)
    ann = make_layout(tmp_path, data)
    make_layout(tmp_path, data, "train")
    with caplog.at_level(logging.INFO):
        by_layout = open_coco(tmp_path, "val")
    assert len(by_layout) == 3, "evaluation keeps small images"
    assert "3 images (1 without objects), 3 annotations, 3 boxes used, 2 categories" in caplog.text
    assert len(open_coco(tmp_path, "train")) == 2
    pair = open_coco(split="val", images=tmp_path / "val2017", ann=ann, num_classes=1000)
    assert pair[0][1]["cls"].tolist() == [5, 1000] and by_layout[0][1]["cls"].tolist() == [1, 2]
    stored = CategoryMap.from_categories(categories(5, 9, 1000))
    assert open_coco(tmp_path, "val", stored=stored)[0][1]["cls"].tolist() == [1, 3]
    (tmp_path / "val2017" / "2.png").unlink()
    with pytest.raises(DatasetError, match="image 2 2.png"):
        open_coco(tmp_path, "val")


def test_open_coco_says_what_it_expects(tmp_path):
    with pytest.raises(ValueError, match="either the root"):
        open_coco()
    with pytest.raises(ValueError, match="either the root"):
        open_coco(tmp_path, images="x", ann="y")
    with pytest.raises(ValueError, match="either the root"):
        open_coco(images="x")
    with pytest.raises(ValueError, match="choose one of train, val"):
        coco_paths(tmp_path, "minival")
    (tmp_path / "photos").mkdir()
    with pytest.raises(FileNotFoundError, match=r"val2017/ and .*instances_val2017.json .*absent.*holds: photos"):
        open_coco(tmp_path, "val")
    ann = write(tmp_path, base_json())
    with pytest.raises(FileNotFoundError, match="image directory .*nowhere does not exist"):
        open_coco(images=tmp_path / "nowhere", ann=ann)


def test_create_dataset_gives_one_or_a_list(tmp_path):
    make_layout(tmp_path, base_json(), "train")
    make_layout(tmp_path, base_json(), "val")
    train, val = create_dataset("coco", tmp_path)
    assert train.data_dir.name == "train2017" and val.data_dir.name == "val2017"
    assert isinstance(create_dataset("COCO2017", str(tmp_path), ("train", "val")), list)
    assert create_dataset("coco2017", tmp_path, splits="val").data_dir.name == "val2017"
    with pytest.raises(FileNotFoundError, match="train2014"):
        create_dataset("coco2014", tmp_path, "train")
    with pytest.raises(ValueError, match="'kitti' is unknown, available: coco"):
        create_dataset("kitti", tmp_path)
    with pytest.raises(ValueError, match="available: 'coco'"):
        create_parser("yolo")


def test_effdet_doors_keep_cocos_own_numbering(tmp_path):
    data = base_json()
    data["categories"] = categories(*COCO_IDS)
    data["annotations"][0]["category_id"], data["annotations"][2]["category_id"] = 13, 90
    data["annotations"][1]["category_id"] = 1
    make_layout(tmp_path, data)
    published = create_dataset("coco", tmp_path, "val")
    assert published.parser.max_label == 90 and published[0][1]["cls"].tolist() == [13, 90]
    assert open_coco(tmp_path, "val")[0][1]["cls"].tolist() == [12, 80]
    assert open_coco(tmp_path, "val", num_classes=90)[0][1]["cls"].tolist() == [13, 90]


@pytest.mark.parametrize(("folder", "num_classes"), [("annotations", 80), ("annotations_coco_ids", 80)])
def test_real_coco_images(shared_data, folder, num_classes):
    root = shared_data / "coco_mini"
    dataset = open_coco(images=root / "train2017", ann=root / folder / "instances_train2017.json")
    report = dataset.parser.report
    assert len(dataset) == 92 and dataset.parser.category_map.num_classes == num_classes
    assert report.num_annotations == 829 and report.dropped["crowd"] == 9 and not report.errors
    assert report.num_boxes + sum(report.dropped.values()) == 829 and report.num_images_without_boxes == 1
    raw = json.loads((root / folder / "instances_train2017.json").read_text())
    back = dataset.parser.category_map.idx_to_id
    for k in range(0, 92, 7):
        info, (img, target) = dataset.parser.img_infos[k], dataset[k]
        assert img.mode == "RGB" and img.size == (info["width"], info["height"])
        expected = naive_boxes(raw, info["id"], *img.size)
        np.testing.assert_allclose(target["bbox"], expected[:, :4], atol=1e-4)
        assert back[target["cls"] - 1].tolist() == expected[:, 4].astype(int).tolist()
