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
from effdet.anchors import Anchors
from effdet.config import get_efficientdet_config
from effdet.data.coco.check import check_coco
from effdet.data.synthetic.dataset import make_synthetic_dataset
from effdet.data.transforms import ResizePad
from effdet.datacheck import check
from effdet.datacheck import scan as image_scan
from effdet.datacheck.anchor_reach import find_reached, fit_ratios, letterbox_boxes, suggest_anchors
from effdet.datacheck.scan import read_hashes, repeats_within, scan_images, shared_between
from effdet.datacheck.stats import draw_sample
from effdet.ops.boxes import pairwise_iou


def config_of(size: int = 128, scale: float | None = None):
    config = get_efficientdet_config("tf_efficientdet_d0")
    config.image_size = (size, size)
    config.anchor_scale = scale or config.anchor_scale
    return config


# ---- anchors ----


def test_reached_boxes_are_those_of_a_full_search():
    rng = np.random.default_rng(0)
    low, sides = rng.uniform(0, 120, (400, 2)), np.exp(rng.uniform(0.5, 5, (400, 2)))
    boxes = np.concatenate((low, np.minimum(low + sides, 128)), 1).astype(np.float32)
    config = config_of()
    best = pairwise_iou(torch.from_numpy(boxes), Anchors.from_config(config).boxes).amax(1).numpy()
    reached = find_reached(boxes, config)
    assert 50 < reached.sum() < 350
    assert (reached == (best >= 0.5)).all()


def test_boxes_are_put_where_the_evaluation_puts_them():
    target = {"bbox": np.array([[10, 20, 60, 100]], dtype=np.float32), "cls": np.array([1])}
    moved = ResizePad((128, 192))(Image.new("RGB", (300, 100)), target)[1]["bbox"]
    ours = letterbox_boxes(np.array([[10, 20, 60, 100]]), np.array([[300, 100]]), (128, 192))
    np.testing.assert_allclose(ours, moved)


def squares(side: float, count: int = 60) -> tuple[np.ndarray, np.ndarray]:
    low = np.random.default_rng(1).uniform(0, 128 - side, (count, 2))
    return np.concatenate((low, low + side), 1), np.full((count, 2), 128)


def test_smaller_anchors_are_suggested_for_small_boxes_and_nothing_for_good_ones():
    found = suggest_anchors(*squares(16.0), config_of())
    assert found.present.share == 0.0 and found.boxes == 60
    assert found.take.flags == "--anchor-scale 1.25" and found.take.share > 0.9 and found.take.cost == 1.0
    assert found.better[0] == found.take
    fine = suggest_anchors(*squares(32.0), config_of())
    assert (fine.present.share, fine.better, fine.take) == (1.0, (), None)


def test_the_share_of_a_suggestion_is_what_its_flags_reach():
    rng = np.random.default_rng(2)
    boxes, sizes = squares(6.0, 200)
    boxes[:, 3] = boxes[:, 1] + rng.uniform(20, 40, 200)
    found = suggest_anchors(boxes, sizes, config_of())
    for one in found.better:
        words = one.flags.split()
        flags = dict(zip(words[::2], words[1::2], strict=True))
        tried = config_of(int(flags.get("--image-size", 128)), float(flags.get("--anchor-scale", 4)))
        if "--aspect-ratios" in flags:
            tried.aspect_ratios = [float(ratio) for ratio in flags["--aspect-ratios"].split(",")]
        assert find_reached(letterbox_boxes(boxes, sizes, tried.image_size), tried).mean() == one.share
        assert one.cost == (tried.image_size[0] / 128) ** 2
    shares = [one.share for one in found.better]
    assert shares == sorted(shares) and found.take.share > found.present.share + 0.3
    assert "--aspect-ratios" in found.take.flags  # these boxes are five times as wide as high


def test_ratios_are_those_in_the_middle_of_each_third():
    boxes = np.array([[0, 0, 10, 10 * ratio] for ratio in (0.5, 0.5, 1.0, 1.0, 3.0, 3.0)])
    assert fit_ratios(boxes, 3) == [0.5, 1.0, 3.0]
    assert fit_ratios(boxes[:2], 3) == []


# ---- image files ----


@pytest.fixture
def folder(tmp_path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "good.png")
    Image.fromarray(pixels).save(tmp_path / "again.png", compress_level=1)
    Image.fromarray(pixels[::-1]).save(tmp_path / "other.jpg")
    whole = (tmp_path / "other.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("404 not found")
    Image.fromarray(np.zeros((40, 60), dtype=np.float32)).save(tmp_path / "float.tiff")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("good.png", ""),
        ("other.jpg", ""),
        ("cut.jpg", "damaged"),
        ("empty.jpg", "empty"),
        ("text.jpg", "unknown"),
        ("float.tiff", "float_pixels"),
        ("nowhere.jpg", "missing"),
    ],
)
def test_kinds_of_broken_files(folder, name, kind):
    file_hash, pixel_hash, found, text = read_hashes((str(folder / name), 60, 40))
    assert found == kind
    assert (name in text) if kind else (len(file_hash), len(pixel_hash), text) == (16, 16, "")


def test_a_size_other_than_the_json_says(folder):
    assert read_hashes((str(folder / "good.png"), 61, 40))[2] == "other_size"
    assert read_hashes((str(folder / "good.png"), None, None))[2] == ""


def infos_of(names) -> list[dict]:
    return [{"file_name": name, "width": 60, "height": 40} for name in names]


def test_repeats_are_found_by_pixels_and_by_files(folder):
    shutil.copy(folder / "good.png", folder / "copy.png")
    first = scan_images(folder, infos_of(["good.png", "cut.jpg", "other.jpg"]), 3, 0)
    second = scan_images(folder, infos_of(["text.jpg", "again.png", "copy.png"]), 3, 0)
    assert shared_between(first, second) == [("good.png", "again.png", False), ("good.png", "copy.png", True)]
    assert repeats_within(second.pixel_hashes) == [(1, 2)]
    assert dict(first.broken) == {"damaged": 1} and "cut.jpg" in first.examples["damaged"][0]


def test_several_processes_give_what_one_gives(folder, monkeypatch):
    monkeypatch.setattr(image_scan, "_CHUNK", 2)
    names = ["good.png", "cut.jpg", "other.jpg", "empty.jpg", "again.png"] * 2
    one, two = (scan_images(folder, infos_of(names), 10, processes) for processes in (0, 2))
    assert one.pixel_hashes == two.pixel_hashes and one.file_hashes == two.file_hashes
    assert one.broken == two.broken == {"damaged": 2, "empty": 2}


def test_a_image_that_ends_its_process_is_near_the_one_named(folder, monkeypatch):
    monkeypatch.setattr(image_scan, "_CHUNK", 1)
    monkeypatch.setattr(image_scan, "read_hashes", killed_by_other)
    with pytest.raises(RuntimeError, match="a process that decodes images was ended"):
        scan_images(folder, infos_of(["good.png", "other.jpg", "again.png"]), 3, 2)


def killed_by_other(job):
    import os

    return os._exit(9) if "other" in job[0] else read_hashes(job)


# ---- the command ----


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
        assert re.search(rf"^ +{category['id']}  {category['name']} +{len(rows)} \({images}\) ", output, re.MULTILINE)
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
        "train: 1 images that are not in the image directory",
        images[2].name,
        'train: 1 annotations with a category_id that is not in "categories"',
        'train: 1 annotations of an image_id that is not in "images"',
    ):
        assert words in errors
    assert "train: 1 boxes with zero or negative width or height" in "\n".join(found(output, "warning"))
    assert "10 images" in output and "3 broken or missing" in output and "7 images decoded" not in output


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


def test_anchors_that_miss_are_a_warning_with_a_setting_that_helps(data, capsys):
    status, output = run(capsys, data, "--anchor-scale", "8")
    (line,) = [text for text in found(output, "warning") if text.startswith("anchors:")]
    pattern = r"anchors: ([\d.]+) % .*; (--anchor-scale [\d.]+)\S* would leave ([\d.]+) %"
    missed, flag, left = re.match(pattern, line).groups()
    assert status == 3 and float(left) < float(missed) - 5
    _, output = run(capsys, data, *flag.split())
    assert f"anchors: {left} % of the train boxes overlap no anchor" in output


def test_train_py_check_is_the_same_check(data, capsys):
    assert run(capsys, data, script=train.main) == run(capsys, data)
    assert not (data / "output").exists()


def test_a_missing_split_is_an_error_and_the_other_is_checked(data, capsys):
    shutil.rmtree(data / "val2017")
    status, output = run(capsys, data)
    assert status == 4 and "val2017" in found(output, "error")[0] and "10 images decoded" in output


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
