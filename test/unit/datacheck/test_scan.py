"""Image files: which are broken, and which are equal."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from effdet.datacheck import scan as image_scan
from effdet.datacheck.scan import read_hashes, repeats_within, scan_images, shared_between


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
    assert dict(first.broken) == {"damaged": 1} and "cut.jpg" in first.broken.examples["damaged"][0]


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
