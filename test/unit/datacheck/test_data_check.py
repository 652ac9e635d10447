"""The check of a data set before training: what it counts, what it calls an error, and how fast it may be."""

from __future__ import annotations

import html.parser
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train
from effdet.config.cli import parse_train_args
from effdet.data.build import build_dataset
from effdet.data.coco.check import check_coco
from effdet.data.coco.report import DatasetError
from effdet.data.synthetic.dataset import make_synthetic_dataset
from effdet.datacheck import check
from effdet.datacheck.stats import draw_sample
from effdet.factory import resolve_model_config
from effdet.training.recipe import apply_recipe, fit_to_data


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> Path:
    return make_synthetic_dataset(tmp_path_factory.mktemp("clean") / "set", num_train=10, num_val=5)


@pytest.fixture
def data(clean, tmp_path) -> Path:
    return Path(shutil.copytree(clean, tmp_path / "set"))


def edit(data: Path, split: str, change) -> None:
    path = data / "annotations" / f"instances_{split}2017.json"
    coco = json.loads(path.read_text())
    change(coco)
    path.write_text(json.dumps(coco))


def run(capsys, data: Path, *more: str, script=check.main) -> tuple[int, str]:
    status = script(
        [
            *(("--root", str(data), "--check") if script is train.main else (str(data),)),
            "-j",
            "0",
            "--image-size",
            "256",
            *(() if "--recipe" in more else ("--recipe", "coco")),
            *(more or ("--anchor-scale", "2.5")),
        ]
    )
    return status, capsys.readouterr().out


def found(output: str, level: str) -> list[str]:
    return re.findall(rf"^{level}: (.*)$", output, re.MULTILINE)


def test_a_clean_set(clean, tmp_path, capsys):
    page = tmp_path / "sub" / "page.html"
    status, output = run(capsys, clean, "--anchor-scale", "2.5", "--html", str(page))
    assert status == 0, output
    assert found(output, "error") == found(output, "warning") == []
    coco = json.loads((clean / "annotations" / "instances_train2017.json").read_text())
    boxes = [row for row in coco["annotations"] if not row["iscrowd"]]
    assert f"train: {clean}/annotations/instances_train2017.json" in output
    assert f"{len(boxes)} boxes" in output and "0 broken or missing" in output and "tf_efficientdet_d0" in output
    counted = sum(int(n) for n in re.findall(r" px +(\d+) ", output.partition("\nval:")[0]))
    assert counted == len(boxes)
    for category in coco["categories"]:
        rows = [row for row in boxes if row["category_id"] == category["id"]]
        images = len({row["image_id"] for row in rows})
        assert re.search(rf"^ +{category['name']} +{category['id']} +{len(rows)} +{images} ", output, re.MULTILINE)
    assert output.splitlines()[-1].startswith("data check: 0 error(s), 0 warning(s)")
    check_page(page)


def check_page(page: Path) -> None:
    """The page is well formed enough to nest, has images, and names no other file or host."""
    text = page.read_text()
    assert text.count("data:image/jpeg;base64,") >= 10
    assert not re.search(r"https?:|<script|<link|@import", text)
    counts: dict[str, int] = {}

    class Tags(html.parser.HTMLParser):
        def handle_starttag(self, tag, attrs):
            counts[tag] = counts.get(tag, 0) + 1

        def handle_endtag(self, tag):
            counts[tag] -= 1

    Tags().feed(text)
    assert {tag: counts[tag] for tag in ("div", "table", "figure", "ul", "h2", "style")} == dict.fromkeys(
        ("div", "table", "figure", "ul", "h2", "style"), 0
    )


def test_broken_images_and_annotations_are_errors_by_kind(data, capsys):
    images = sorted((data / "train2017").iterdir())
    content = images[0].read_bytes()
    images[0].write_bytes(content[: len(content) // 2])
    images[1].write_bytes(b"")
    images[2].unlink()

    def spoil(coco):
        coco["annotations"][0]["category_id"] = 999
        coco["annotations"][1]["bbox"] = [5, 5, 0, 10]
        coco["annotations"][2]["image_id"] = 10**9

    edit(data, "train", spoil)
    status, output = run(capsys, data)
    assert status == 4
    errors = "\n".join(found(output, "error"))
    for words in (
        "train: 1 truncated or damaged images",
        "train: 1 empty files",
        images[1].name,
        'train: 1 annotations with a category_id that is not in "categories"',
        'train: 1 annotations of an image_id that is not in "images"',
    ):
        assert words in errors
    warnings = "\n".join(found(output, "warning"))
    assert "train: 1 boxes with zero or negative width or height" in warnings
    assert "train: 1 images that are not in the image directory" in warnings and images[2].name in warnings
    assert "10 images" in output and "2 broken or missing" in output and "7 images decoded" not in output


def test_images_of_both_splits_are_a_warning(data, capsys):
    source, val = sorted((data / "train2017").iterdir())[3], sorted((data / "val2017").iterdir())
    size = Image.open(source).size
    shutil.copy(source, val[0])
    val[1].write_bytes(source.read_bytes() + b"trailing")  # the same pixels in another file

    def resize(coco):
        for image in coco["images"]:
            if image["file_name"] in (val[0].name, val[1].name):
                image["width"], image["height"] = size

    edit(data, "val", resize)
    status, output = run(capsys, data)
    assert status == 3
    (leak,) = [text for text in found(output, "warning") if "train too" in text]
    assert leak.startswith(
        "2 of 5 val images are in train too (1 with equal files, 1 with equal pixels in another "
        f"file; train = val: {source.name} = {val[0].name}"
    )
    (repeat,) = [text for text in found(output, "warning") if "val: 1 images repeat an earlier one" in text]
    assert f"{val[0].name} = {val[1].name}" in repeat and "with other boxes" in repeat


def test_classes_of_one_split_only(data, capsys):
    def rename(coco):
        coco["categories"][0]["name"] = "something else"
        for row in coco["annotations"]:
            row["category_id"] = coco["categories"][-1]["id"]

    edit(data, "train", rename)
    status, output = run(capsys, data)
    errors = "\n".join(found(output, "error"))
    assert status == 4 and "'something else'" in errors and "does not know" in errors and "checkpoint" not in errors
    status, output = run(capsys, data, "--match-classes", "id", "--anchor-scale", "2.5")
    warnings = "\n".join(found(output, "warning"))
    assert status == 3 and "boxes in val but none in train" in warnings
    assert "1 ids have other names in val than in train: 1: 'something else' in train" in warnings

    edit(data, "val", lambda coco: coco["categories"].append({"id": 4242, "name": "new"}))
    for match in ("name", "id"):
        status, output = run(capsys, data, "--match-classes", match)
        assert status == 4 and re.search("does not know .*4242", "\n".join(found(output, "error")))


def test_classes_with_other_ids_in_val_are_counted_by_name(data, capsys):
    coco = json.loads((data / "annotations" / "instances_val2017.json").read_text())
    plain = run(capsys, data)[1]
    first, second = coco["categories"][0], coco["categories"][1]
    swap = {first["id"]: second["id"], second["id"]: first["id"]}

    def permute(coco):
        for row in coco["annotations"]:
            row["category_id"] = swap.get(row["category_id"], row["category_id"])
        for row in coco["categories"]:
            row["id"] = swap.get(row["id"], row["id"])

    edit(data, "val", permute)
    status, output = run(capsys, data)
    assert table_of(output) == table_of(plain) and len(table_of(output)) == len(coco["categories"])
    (note,) = [text for text in found(output, "note") if f"'{first['name']}'" in text]
    assert f": {first['id']} in train, {second['id']} in val" in note
    assert table_of(run(capsys, data, "--match-classes", "id")[1]) != table_of(plain)


def table_of(output: str) -> list[str]:
    return re.findall(r"^ +\w+(?: +\d+){5}$", output, re.MULTILINE)


def test_equal_names_and_classes_without_boxes_are_named(data, capsys):
    def spoil(coco):
        coco["categories"] += [{"id": 900, "name": "Ball "}, {"id": 901, "name": "nothing"}]

    for split in ("train", "val"):
        edit(data, split, spoil)
    status, output = run(capsys, data, "--anchor-scale", "2.5")
    assert status == 3
    assert any("'ball' = 'Ball ' of 1, 900" in text for text in found(output, "warning"))
    (empty,) = [text for text in found(output, "note") if text.startswith("classes: 2 have no boxes")]
    assert "900 'Ball '" in empty and "901 'nothing'" in empty


@pytest.mark.parametrize("more", [(), ("--anchors", "auto", "--recipe", "coco")])
def test_the_anchors_are_those_of_the_run(data, more):
    def shrink(coco):  # boxes that the model's own anchors miss, and images that a training leaves out
        for row in coco["annotations"]:
            row["bbox"][2:] = [row["bbox"][2] / 3, row["bbox"][3] / 9 + 1]
        small = [
            {"id": 10**6 + k, "file_name": coco["images"][0]["file_name"], "width": 20, "height": 20} for k in range(9)
        ]
        coco["images"] += small
        coco["annotations"] += [
            {"id": 10**6 + k, "image_id": row["id"], "category_id": 1, "bbox": [1, 1, 18, 2]}
            for k, row in enumerate(small)
        ]

    edit(data, "train", shrink)
    argv = ["--root", str(data), "-j", "0", "--device", "cpu", *more]

    def parse(base):
        return parse_train_args(argv, base=base)

    cfg, _ = apply_recipe(parse({}), torch.device("cpu"), parse)
    run_cfg = fit_to_data(cfg, build_dataset(cfg.data, "train").parser).model
    _, config = check.check(parse({}), parse)
    assert run_cfg.anchor_scale is not None or run_cfg.aspect_ratios is not None  # some were fitted
    want = resolve_model_config(run_cfg)
    for key in ("name", "image_size", "anchor_scale", "aspect_ratios"):
        assert config[key] == want[key]
    argv += ["--anchor-scale", "7"]
    assert check.check(parse({}), parse)[1].anchor_scale == 7


def test_images_too_small_for_a_training_are_an_error_with_the_reason(data, capsys):
    for path in (data / "train2017").iterdir():
        Image.open(path).resize((40, 31)).save(path)

    def shrink(coco):
        for image in coco["images"]:
            image["width"], image["height"] = 40, 31
        for row in coco["annotations"]:
            row["bbox"] = [5, 5, 20, 20]

    edit(data, "train", shrink)
    status, output = run(capsys, data)
    (reason,) = [text for text in found(output, "error") if "32 px" in text]
    assert status == 4 and "all 10 images" in reason
    with pytest.raises(DatasetError, match="all 10 of .* under 32 px"):
        build_dataset(parse_train_args(["--root", str(data)]).data, "train")


def test_more_classes_than_asked_for_are_an_error(data, capsys):
    status, output = run(capsys, data, "--num-classes", "2")
    assert status == 4 and "num_classes is 2" in "\n".join(found(output, "error"))


def test_doubtful_boxes_and_images_are_counted_with_an_example(data, capsys):
    coco = json.loads((data / "annotations" / "instances_train2017.json").read_text())
    first, second, third = coco["images"][:3]
    shutil.copy(data / "train2017" / second["file_name"], data / "train2017" / "copy.png")

    def spoil(coco):
        box = next(row for row in coco["annotations"] if not row["iscrowd"])
        x, y, width, height = box["bbox"]
        number = iter(range(10**6, 2 * 10**6))

        def add_image(like, name):
            coco["images"].append({**like, "id": next(number), "file_name": name})
            return coco["images"][-1]["id"]

        def add_box(image_id, bbox):
            coco["annotations"].append({**box, "id": next(number), "image_id": image_id, "bbox": bbox})

        add_box(box["image_id"], list(box["bbox"]))
        add_box(first["id"], [-5, 3, 30, 30])
        add_box(add_image(third, third["file_name"]), [3, 3, 30, 30])  # a second id, with another box
        add_box(add_image(second, "copy.png"), [7, 7, 30, 30])  # the same pixels, with another box

    edit(data, "train", spoil)
    status, output = run(capsys, data, "--anchor-scale", "2.5")
    warnings, notes = "\n".join(found(output, "warning")), "\n".join(found(output, "note"))
    assert status == 3
    assert re.search(r"1 boxes given twice.*annotation 1000000 of image", notes)
    assert re.search(rf"1 boxes partly outside.*annotation 1000001 of image {first['id']}\)", notes)
    assert re.search(rf"1 files listed under several ids.*{third['file_name']} with ids {third['id']}, ", warnings)
    assert re.search(rf"1 images repeat an earlier one \({second['file_name']} = copy.png\), with other", warnings)


def test_anchors_that_miss_are_a_warning_with_a_setting_that_helps(data, capsys):
    status, output = run(capsys, data, "--anchor-scale", "8")
    (line,) = [text for text in found(output, "warning") if text.startswith("anchors:")]
    pattern = r"anchors: ([\d.]+) % .*; (--anchor-scale [\d.]+)\S* would leave ([\d.]+) %"
    missed, flag, left = re.match(pattern, line).groups()
    assert status == 3 and float(left) < float(missed) - 5
    _, output = run(capsys, data, *flag.split())
    assert f"anchors: {left} % of the train boxes overlap no anchor" in output


def test_train_py_check_is_the_same_check(data, capsys):
    one, other = (run(capsys, data, script=script) for script in (train.main, check.main))
    assert one[0] == other[0]
    assert re.sub(r"in [\d.]+ s$", "", one[1], flags=re.M) == re.sub(r"in [\d.]+ s$", "", other[1], flags=re.M)
    assert not (data / "output").exists()


def test_a_missing_split_is_an_error_and_the_other_is_checked(data, capsys):
    shutil.rmtree(data / "val2017")
    status, output = run(capsys, data)
    assert status == 4 and "val2017" in found(output, "error")[0] and "10 images decoded" in output


@pytest.mark.parametrize(("allowed", "status"), [("0", 4), ("1", 3)])
def test_an_absent_image_counts_as_in_training(data, capsys, allowed, status):
    next((data / "train2017").iterdir()).unlink()
    got, output = run(capsys, data, "--anchor-scale", "2.5", "--max-bad-images", allowed)
    assert got == status and bool(found(output, "error")) == (status == 4)
    assert len(found(output, "warning")) == (status == 3)


def test_wrong_calls_end_with_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit, match="no data set of a known form.*--train-images DIR --train-ann"):
        check.main([str(tmp_path)])
    with pytest.raises(SystemExit, match="must be a multiple of 32"):
        check.main([str(tmp_path), "--image-size", "100"])
    with pytest.raises(SystemExit) as stop:
        train.main(["--root", str(tmp_path), "--html", "x.html"])
    assert stop.value.code == 2 and "--html is where --check writes to" in capsys.readouterr().err


def test_crowded_val_images_need_a_larger_max_det(data, capsys):
    def crowd(coco):
        image = coco["images"][0]
        rows = [
            dict(coco["annotations"][0], id=10**6 + k, image_id=image["id"], bbox=[5 + k, 5, 40, 40], iscrowd=0)
            for k in range(130)
        ]
        coco["annotations"] = [row for row in coco["annotations"] if row["image_id"] != image["id"]] + rows

    edit(data, "val", crowd)
    _, output = run(capsys, data)
    assert any(
        "1 images have more than 100 boxes" in text and "--max-det 130" in text for text in found(output, "warning")
    )


def test_class_counts_are_those_of_a_loop():
    rng = np.random.default_rng(3)
    images = [{"id": k, "file_name": f"{k}.jpg", "width": 100, "height": 100} for k in range(20)]
    rows = [
        {"id": k, "image_id": int(rng.integers(15)), "category_id": int(rng.choice([3, 90])), "bbox": [1, 1, 9, 9]}
        for k in range(200)
    ]
    categories = [{"id": 3, "name": "a"}, {"id": 7, "name": "b"}, {"id": 90, "name": "c"}]
    coco = {"images": images, "annotations": rows, "categories": categories}
    arrays, report = check_coco(coco, "x", None, True, False)
    split = check.SplitStats("train", Path(), arrays, report, np.zeros(0), np.zeros(9), np.zeros(9))
    want = {
        i: (
            sum(row["category_id"] == i for row in rows),
            len({row["image_id"] for row in rows if row["category_id"] == i}),
        )
        for i in (3, 90)
    }
    assert split.class_counts == want


def test_samples_are_drawn_without_repeats():
    assert draw_sample(5, 10, 0).tolist() == [0, 1, 2, 3, 4]
    drawn = draw_sample(1000, 100, 0)
    assert len(set(drawn.tolist())) == 100 and (np.diff(drawn) > 0).all() and drawn.max() < 1000
