"""Which images are held out for validation, and which --limit and --classes take."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from effdet.data.coco.report import DatasetError
from effdet.data.formats.hold_out import group_images, hold_out, source_of, take_classes, take_first


def coco(labels: dict[str, list[int]]) -> dict:
    """Make a data set of file name -> category id of each box; ids count from 10."""
    images = [{"id": k, "file_name": name, "width": 9, "height": 9} for k, name in enumerate(labels, 10)]
    rows = [(k, c) for k, cats in enumerate(labels.values(), 10) for c in cats]
    return {
        "images": images,
        "annotations": [
            {"id": i, "image_id": k, "category_id": c, "bbox": [1, 1, 5, 5]} for i, (k, c) in enumerate(rows)
        ],
        "categories": [{"id": c, "name": name} for c, name in enumerate(("cup", "dish", "fork, knife"), 1)],
    }


def names(content: dict) -> list[str]:
    return [row["file_name"] for row in content["images"]]


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("cat_jpg.rf.0a1b2c3d4e5f.jpg", ("/cat", None)),
        ("train/cat_jpg.rf.ffff2c3d4e5f.jpg", ("/cat", None)),
        ("drive_mp4-0012_jpg.rf.0a1b2c3d4e5f.jpg", ("/drive_mp4", 12)),
        ("drive_frame_000042.png", ("./drive_frame", 42)),
        ("day1/frame_7.PNG", ("day1/frame", 7)),
        ("day1/IMG_0007.JPG", ("day1/IMG_0007", None)),
        ("000000000139.jpg", ("./000000000139", None)),
        ("framework12.jpg", ("./framework12", None)),
    ],
)
def test_a_name_shows_what_an_image_was_made_from(name, source):
    assert source_of(name) == source


def test_long_videos_are_cut_into_blocks_of_neighbouring_frames():
    video = [f"v/frame_{k}.png" for k in range(200)]
    random.Random(0).shuffle(video)
    blocks = [sorted(int(video[k][8:-4]) for k in members) for members in group_images(video).values()]
    assert len(blocks) == 40 and all(block == list(range(block[0], block[0] + 5)) for block in blocks)
    short = [f"v{n}/frame_{k}.png" for n in range(50) for k in range(4)]
    assert all(
        {short[k].split("/")[0] for k in members} == {f"{key.split('/')[0]}"}
        for key, members in group_images(short).items()
    )
    assert {len(members) for members in group_images(short).values()} == {4}


def test_the_same_data_give_the_same_parts_in_any_order_and_folder():
    rng = random.Random(1)
    labels = {f"{k}.jpg": [rng.choice((1, 2)) for _ in range(rng.randint(0, 4))] for k in range(200)}
    train, val, groups = hold_out(coco(labels), 0.15)
    assert (
        groups == 200 and set(names(train)) | set(names(val)) == set(labels) and not set(names(train)) & set(names(val))
    )
    assert len(names(val)) == pytest.approx(30, abs=2)
    shuffled = list(labels.items())
    rng.shuffle(shuffled)
    assert set(names(hold_out(coco(dict(shuffled)), 0.15)[1])) == set(names(val))
    grown = {**labels, **{f"new{k}.jpg": [1] for k in range(10)}}
    kept = set(names(hold_out(coco(grown), 0.15)[1])) & set(labels)
    assert len(kept & set(names(val))) > 0.8 * len(kept), "a few more images change little"


def test_every_class_has_its_share_and_rare_ones_stay_in_training():
    rng = random.Random(2)
    labels = {f"{k}.jpg": [1] * rng.randint(1, 3) for k in range(300)}
    for k in range(0, 300, 15):  # 20 images with the second class
        labels[f"{k}.jpg"] = [1, 2]
    labels["7.jpg"], labels["8.jpg"] = [3], [3]
    train, val, _ = hold_out(coco(labels), 0.2)
    images = Counter(c for name in names(val) for c in set(labels[name]))
    assert images[1] == pytest.approx(60, abs=2) and images[2] == 4 and images[3] == 0
    assert {"7.jpg", "8.jpg"} <= set(names(train))


def test_copies_of_one_image_are_in_one_part():
    labels = {f"i{n}_jpg.rf.{k:08x}abcd.jpg": [1 + n % 2] for n in range(60) for k in range(3)}
    train, val, groups = hold_out(coco(labels), 0.15)
    sources = [{name.split(".rf.")[0] for name in names(part)} for part in (train, val)]
    assert groups == 60 and not sources[0] & sources[1] and len(names(val)) == pytest.approx(27, abs=3)


def test_rows_go_through_as_they_are_whatever_ids_look_like():
    content = coco({f"{k}.jpg": [1] for k in range(20)})
    for row in content["annotations"]:
        row["image_id"] = str(row["image_id"])
    content["images"][3]["id"] = float(content["images"][3]["id"])
    content["images"].append({"id": 99})
    train, val, _ = hold_out(content, 0.25)
    assert len(train["annotations"]) + len(val["annotations"]) == 20 == len(names_or_ids(train) | names_or_ids(val)) - 1
    assert all(type(row["image_id"]) is str for row in train["annotations"])


def names_or_ids(content: dict) -> set:
    return {row.get("file_name", row["id"]) for row in content["images"]}


def test_the_smallest_sets():
    with pytest.raises(DatasetError, match="1 image.*--val-images"):
        hold_out(coco({"a.jpg": [1]}), 0.15)
    train, val, _ = hold_out(coco({"a.jpg": [1], "b.jpg": []}), 0.15)
    assert names(train) == ["b.jpg"] and names(val) == ["a.jpg"], "one to measure on, and it has a box"
    train, val, _ = hold_out(coco({"a.jpg": [1], "b.jpg": [1], "c.jpg": [1]}), 0.9)
    assert len(names(train)) == 1


def test_the_first_images_are_those_with_boxes():
    content = coco({"a.jpg": [], "b.jpg": [1], "c.jpg": [], "d.jpg": [2, 1]})
    assert [names(take_first(content, n)) for n in (1, 2, 3, 9)] == [
        ["b.jpg"],
        ["b.jpg", "d.jpg"],
        ["a.jpg", "b.jpg", "d.jpg"],
        ["a.jpg", "b.jpg", "c.jpg", "d.jpg"],
    ]
    assert len(take_first(content, 1)["annotations"]) == 1


def test_some_classes_alone():
    content = coco({"a.jpg": [], "b.jpg": [1], "c.jpg": [2], "d.jpg": [2, 3]})
    cup = take_classes(content, ["cup"], keep_images=False)
    assert names(cup) == ["a.jpg", "b.jpg"] and [row["name"] for row in cup["categories"]] == ["cup"]
    assert names(take_classes(content, ["cup"], keep_images=True)) == ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]
    both = take_classes(content, ["dish,cup"], keep_images=False)
    assert [row["id"] for row in both["categories"]] == [1, 2] and len(both["annotations"]) == 3
    assert len(take_classes(content, ["fork, knife"], keep_images=False)["annotations"]) == 1
    with pytest.raises(DatasetError, match=r"'cups', did you mean cup\?.*cup, dish"):
        take_classes(content, ["cups"], keep_images=False)
