"""What was found, in other programs' forms; predictions of folders and streams."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from PIL import Image

import effdet
from effdet.predict.detections import Detections

FOUND = Detections(
    np.array([[10, 20, 50, 40], [0, 0, 100, 80]], np.float32),
    np.array([0.9, 0.25], np.float32),
    ["cup", "dish"],
    np.array([7, 3]),
    (100, 80),
    "a.jpg",
)
NONE = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), [], np.zeros(0, np.int64), (100, 80))


def test_coco_rows():
    assert FOUND.to_coco(5)[0] == {
        "image_id": 5,
        "category_id": 7,
        "bbox": [10, 20, 40, 20],
        "score": pytest.approx(0.9),
    }
    assert NONE.to_coco(5) == []


def test_yolo_lines():
    first, second = FOUND.to_yolo(["dish", "cup"])
    assert first == "1 0.300000 0.375000 0.400000 0.250000 0.900000"
    assert second == "0 0.500000 0.500000 1.000000 1.000000 0.250000"
    assert NONE.to_yolo(["dish"]) == []


def test_a_part_and_the_words_for_it():
    sure = FOUND.take(FOUND.scores > 0.5)
    assert (sure.names, sure.category_ids.tolist(), sure.path, len(sure)) == (["cup"], [7], "a.jpg", 1)
    assert FOUND.take([1]).names == ["dish"] and len(FOUND.take(slice(0))) == 0
    assert "cup 0.90 [10, 20, 50, 40]" in repr(FOUND) and "a.jpg, 100x80" in repr(FOUND)
    assert "none" in repr(NONE)


def test_one_suppression_over_all_classes():
    boxes = np.array([[0, 0, 10, 10], [1, 0, 11, 10], [0, 0, 10, 21], [50, 50, 60, 60]], dtype=np.float32)
    scores = np.array([0.9, 0.8, 0.7, 0.6], dtype=np.float32)
    found = Detections(boxes, scores, ["a", "b", "c", "a"], np.array([1, 2, 3, 1]), (100, 80))
    # IoU with the first: 9/11, 10/21, 0
    assert found.suppress_across_classes().names == ["a", "c", "a"]
    assert found.suppress_across_classes(0.4).scores.tolist() == scores[[0, 3]].tolist()
    assert found.suppress_across_classes(0.9).names == found.names
    assert len(NONE.suppress_across_classes()) == 0


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_a_drawing(tmp_path, suffix):
    image = Image.new("RGB", (100, 80), "white")
    FOUND.save(tmp_path / f"drawn{suffix}", image)
    drawn = np.asarray(Image.open(tmp_path / f"drawn{suffix}").convert("RGB"))
    assert drawn.shape == (80, 100, 3) and (drawn[20:40, 10] < 250).any() and (drawn[60:70, 60:70] > 240).all()
    assert np.array_equal(np.asarray(NONE.draw(image)), np.asarray(image))
    with pytest.raises(ValueError, match="give the image"):
        NONE.draw()
    image.save(tmp_path / "a.png")
    again = Detections(
        *(getattr(FOUND, key) for key in ("boxes_xyxy", "scores", "names", "category_ids", "size_wh")),
        str(tmp_path / "a.png"),
    )
    assert np.array_equal(np.asarray(again.draw()), np.asarray(FOUND.draw(image)))


@pytest.fixture(scope="module")
def predictor(small_checkpoint):
    return effdet.load(str(small_checkpoint), device="cpu", batch_size=3)


def rows_of(found):
    return [(one.scores.tolist(), one.boxes_xyxy.tolist(), one.names) for one in found]


def test_folders_lists_and_streams_give_the_same(predictor, synthetic_images, tmp_path):
    for number, path in enumerate(synthetic_images):
        (tmp_path / f"{number}.jpg").write_bytes(path.read_bytes())
    (tmp_path / "._0.jpg").write_bytes(b"not an image")
    listed = predictor.predict(synthetic_images)
    assert sum(map(len, listed)) and [one.path for one in listed] == [str(path) for path in synthetic_images]
    with Image.open(synthetic_images[0]) as image:
        assert listed[0].size_wh == image.size
    in_folder = predictor.predict(tmp_path)
    assert [one.path for one in in_folder] == [str(tmp_path / f"{number}.jpg") for number in range(8)]
    assert rows_of(in_folder) == rows_of(listed) == rows_of(predictor.predict(iter(synthetic_images)))
    mixed = predictor.predict([synthetic_images[0], tmp_path, np.zeros((9, 7), np.uint8)])
    assert len(mixed) == 10 and mixed[-1].path is None and mixed[-1].size_wh == (7, 9)


def test_a_stream_is_read_a_batch_at_a_time(predictor, synthetic_images):
    read = []

    def endless():
        for number in itertools.count():
            read.append(number)
            yield synthetic_images[number % 8]

    stream = predictor.predict_iter(endless())
    first = [next(stream) for _ in range(4)]
    assert len(read) == 6, "batches of three"
    assert rows_of(first) == rows_of(predictor.predict(synthetic_images[:4]))


def test_class_names_are_in_the_networks_order(predictor):
    assert predictor.class_names == list(predictor.category_map.class_names)
    found = predictor.predict(Image.new("RGB", (64, 64)))[0]
    assert {line.split()[0] for line in found.to_yolo(predictor.class_names)} <= {"0", "1", "2"}
