"""Files that grow are whole after each item, and after one that the disk does not take."""

from __future__ import annotations

import contextlib
import json
import resource

import pytest

from effdet.checkpoint import growing
from effdet.checkpoint.growing import GrowingCoco, GrowingFile

CATEGORIES = [{"id": 3, "name": "ball"}]


@contextlib.contextmanager
def room_on_disk(size):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_lines(tmp_path):
    path = tmp_path / "lines"
    path.write_text("of an earlier run")
    file = GrowingFile(path, b"head\n")
    file.add([])
    assert path.read_bytes() == b"head\n"
    file.add([b"a\n", b"b\n"])
    with room_on_disk(15), pytest.raises(OSError):
        file.add([b"c" * 20 + b"\n"])
    assert path.read_bytes() == b"head\na\nb\n"
    file.add([b"c\n"])
    file.close()
    assert path.read_bytes() == b"head\na\nb\nc\n"


def test_a_coco_json_is_whole_after_each_batch_however_many_there_are(tmp_path, monkeypatch):
    monkeypatch.setattr(growing, "_ROOM", 60)
    path = tmp_path / "coco.json"
    file = GrowingCoco(path, CATEGORIES)
    images, annotations = [], []
    for batch in range(30):
        new = [{"id": 2 * batch + k, "file_name": f"ä{k}"} for k in range(2 if batch % 7 else 0)]
        found = [{"image_id": image["id"], "box": [batch]} for image in new for _ in range(batch % 3)]
        file.add_images(new, found)
        images, annotations = images + new, annotations + found
        expected = {"categories": CATEGORIES, "images": images, "annotations": annotations}
        assert json.loads(path.read_text()) == expected
    large = path.stat().st_size
    file.close()
    assert json.loads(path.read_text()) == expected and path.stat().st_size < large
    assert [one.name for one in tmp_path.iterdir()] == ["coco.json"]


@pytest.mark.parametrize("room", [60, 1 << 16])
def test_a_full_disk_leaves_the_coco_json_as_it_was(tmp_path, monkeypatch, room):
    monkeypatch.setattr(growing, "_ROOM", room)
    path = tmp_path / "coco.json"
    file = GrowingCoco(path, CATEGORIES)
    file.add_images([{"id": 1}], [{"image_id": 1}])
    before = json.loads(path.read_text())
    with room_on_disk(path.stat().st_size + 100), pytest.raises(OSError):
        file.add_images([{"id": 2, "name": "x" * 50}], [{"image_id": 2, "text": "y" * 300}])
    assert json.loads(path.read_text()) == before
    file.add_images([{"id": 3}], [{"image_id": 3}])
    file.close()
    after = json.loads(path.read_text())
    assert after["images"] == [{"id": 1}, {"id": 3}] and after["annotations"] == [{"image_id": 1}, {"image_id": 3}]
