"""demo.py writes what was asked for, in forms that others read, and says as much as there is to see."""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import effdet
from effdet.commands import drawing, predict, validate
from effdet.predict.detections import Detections
from effdet.predict.sources import Item
from effdet.runtime.terminal import TerminalHandler


@pytest.fixture
def show(small_checkpoint, tmp_path, capsys):
    """Return what runs demo.py in this process; it gives the exit status and what was printed."""

    def run(*argv: object) -> tuple[int, str]:
        words = [*argv, "--checkpoint", small_checkpoint, "--device", "cpu", "--output", tmp_path / "out"]
        try:
            status = predict.main([str(word) for word in words])
        except SystemExit as stop:
            return 1, str(stop.code)
        return status, capsys.readouterr().out

    return run


def objects_of(folder: Path) -> list[dict]:
    return [one for row in json.loads((folder / "detections.json").read_text()) for one in row["objects"]]


def test_what_is_saved_is_a_data_set_for_our_own_scripts(show, synthetic_images, small_checkpoint, tmp_path):
    images = synthetic_images[:4]
    status, printed = show(*images, "--save", "json,jsonl,csv,coco,yolo", "--no-draw", "--score-thr", 0.4, "-b", 3)
    assert status == 0, printed
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {
        *("detections.json", "detections.jsonl", "detections.csv", "detections.coco.json"),
        *("data.yaml", "images", "labels"),
    }
    found = effdet.load(str(small_checkpoint), device="cpu").predict(images, 0.4)
    assert [one["score"] for one in objects_of(out)] == [score for one in found for score in one.scores.tolist()]
    assert len(objects_of(out)) > 2
    with open(out / "detections.csv", newline="") as file:
        assert len([*csv.DictReader(file)]) == len(objects_of(out))
    coco = ("--val-images", out / "images", "--val-ann", out / "detections.coco.json")
    for name, data in (("coco", coco), ("yolo", ("--root", out / "data.yaml"))):
        argv = [
            *data,
            "--checkpoint",
            small_checkpoint,
            "--device",
            "cpu",
            "-j",
            0,
            "-b",
            4,
            "--output",
            tmp_path / name,
        ]
        assert validate.main([str(word) for word in argv]) == 0
        assert (
            json.loads((tmp_path / name / "metrics.json").read_text())["stats"]["AP"] > 0.99
        )  # its own boxes as the truth


def test_classes_and_one_suppression_for_all(show, synthetic_images, tmp_path):
    out = tmp_path / "out"
    assert show(synthetic_images[0], "--score-thr", 0.05)[0] == 0
    everything = objects_of(out)
    assert show(synthetic_images[0], "--score-thr", 0.05, "--classes", "star,ball")[0] == 0
    assert objects_of(out) == [one for one in everything if one["name"] in ("star", "ball")] != everything
    assert show(synthetic_images[0], "--score-thr", 0.05, "--agnostic-nms")[0] == 0
    assert 0 < len(objects_of(out)) < len(everything)
    status, text = show(synthetic_images[0], "--classes", "bal")
    assert status == 1 and "'bal', did you mean ball?" in text


def test_drawings_as_jpeg_and_none(show, synthetic_images, tmp_path):
    assert show(synthetic_images[0], "--draw", "jpg")[0] == 0
    stem = synthetic_images[0].stem
    with Image.open(tmp_path / f"out/{stem}.jpg") as drawn:
        assert drawn.format == "JPEG"
    assert json.loads((tmp_path / "out/detections.json").read_text())[0]["drawn"] == str(tmp_path / f"out/{stem}.jpg")
    (tmp_path / f"out/{stem}.jpg").unlink()
    assert show(synthetic_images[0], "--no-draw")[0] == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["detections.json"]


class Terminal:
    """A stream that takes itself for a terminal."""

    encoding = "utf-8"

    def __init__(self) -> None:
        self.text = ""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None:
        pass


@pytest.mark.parametrize(("count", "terminal", "lines"), [(21, True, 0), (20, True, 20), (21, False, 21)])
def test_many_images_in_a_terminal_get_a_bar(count, terminal, lines, monkeypatch):
    screen = Terminal()
    handler = TerminalHandler(screen) if terminal else logging.StreamHandler(screen)
    logger = logging.getLogger("effdet")
    monkeypatch.setattr(logger, "handlers", [handler])
    monkeypatch.setattr(logger, "level", logging.INFO)
    monkeypatch.setattr(logger, "_cache", {})
    monkeypatch.setattr(logging.getLogger("effdet.demo"), "_cache", {})
    nothing = Detections(np.zeros((0, 4)), np.zeros(0), [], np.zeros(0, int), (1, 1))
    item = Item("a.jpg", "a", lambda: None)
    with drawing._reporting(count) as report:
        for _ in range(count):
            report(item, nothing)
    assert screen.text.count("a.jpg") == lines
    assert ("Predicting" in screen.text) == (lines == 0)
