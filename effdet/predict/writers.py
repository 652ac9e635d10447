"""Write what is found in many images as it is found: tables, annotations for other programs, drawings.

After each `add` what is written is whole, and stays so if the run ends there or the disk is full.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml
from PIL import Image

from effdet.checkpoint.growing import GrowingCoco, GrowingFile, JsonList
from effdet.checkpoint.io import ensure_writable, replacing
from effdet.report.draw import draw_detections

from .detections import Detections
from .sources import Item
from .video import VideoWriter

_DATASET_QUALITY = 95  # of JPEGs to train on
_PILLOW_FORMATS: Mapping[str, tuple[str, dict[str, Any]]] = {"png": ("PNG", {}), "jpg": ("JPEG", {"quality": 90})}


@dataclass(frozen=True)
class Result:
    """What was found in one image.

    Args:
        item: the image's source.
        image: its pixels.
        found: the objects.
        drawn: file of the drawing; None where there is none.
    """

    item: Item
    image: Image.Image
    found: Detections
    drawn: Path | None = None


@dataclass(frozen=True)
class Classes:
    """All classes of a network, in its order."""

    names: list[str]
    category_ids: list[int]


class Writer(Protocol):
    """One kind of file with results."""

    def add(self, results: Sequence[Result]) -> None:
        """Write those of a batch."""

    def close(self) -> None:
        """End the file."""


# ---- tables ----------------------------------------------------------------------------------------------------------


def to_row(result: Result) -> dict[str, Any]:
    """Return a result as the json files have it; boxes are x, y, width, height in pixels."""
    item, found = result.item, result.found
    objects = [
        {
            "category_id": category_id,
            "name": name,
            "score": score,
            "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
        }
        for name, category_id, score, box in zip(
            found.names, found.category_ids.tolist(), found.scores.tolist(), found.boxes_xyxy.tolist(), strict=True
        )
    ]
    row: dict[str, Any] = {"file": item.name}
    if item.frame is not None:
        row |= {"frame": item.frame, "time_s": item.time_s}
    drawn = None if result.drawn is None else str(result.drawn)
    return row | {"width": result.image.width, "height": result.image.height, "drawn": drawn, "objects": objects}


class JsonWriter:
    """detections.json: a list with an entry for each image."""

    NAME = "detections.json"

    def __init__(self, folder: Path, classes: Classes) -> None:
        self._file = JsonList(folder / self.NAME)

    def add(self, results: Sequence[Result]) -> None:
        """Write those of a batch."""
        self._file.add([to_row(result) for result in results])

    def close(self) -> None:
        """End the file."""
        self._file.close()


class JsonLinesWriter:
    """detections.jsonl: the entries of detections.json, one a line."""

    NAME = "detections.jsonl"

    def __init__(self, folder: Path, classes: Classes) -> None:
        self._file = GrowingFile(folder / self.NAME)

    def add(self, results: Sequence[Result]) -> None:
        """Write those of a batch."""
        self._file.add([json.dumps(to_row(result)).encode() + b"\n" for result in results])

    def close(self) -> None:
        """End the file."""
        self._file.close()


class CsvWriter:
    """detections.csv: a row for each object."""

    NAME = "detections.csv"
    COLUMNS = ("file", "frame", "time_s", "category_id", "name", "score", "x", "y", "width", "height")

    def __init__(self, folder: Path, classes: Classes) -> None:
        self._file = GrowingFile(folder / self.NAME, self._text([self.COLUMNS]))

    def add(self, results: Sequence[Result]) -> None:
        """Write those of a batch."""
        rows = [
            (
                row["file"],
                row.get("frame"),
                row.get("time_s"),
                one["category_id"],
                one["name"],
                one["score"],
                *one["bbox"],
            )
            for row in map(to_row, results)
            for one in row["objects"]
        ]
        self._file.add([self._text(rows)] if rows else [])

    def close(self) -> None:
        """End the file."""
        self._file.close()

    @staticmethod
    def _text(rows: Sequence[Sequence[Any]]) -> bytes:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        return text.getvalue().encode("utf-8", "surrogateescape")


# ---- data sets -------------------------------------------------------------------------------------------------------


def _refuse_foreign(folder: Path) -> None:
    """Raise a ValueError where a folder for a data set holds images or labels that no earlier run has put there."""
    ours = (folder / CocoWriter.NAME, folder / YoloWriter.NAME)
    for inside in (folder / "images", folder / "labels"):
        if inside.exists() and not any(one.exists() for one in ours):
            raise ValueError(f"{inside} is there already and may be somebody's work: choose another --output")


def keep_image(folder: Path, result: Result) -> str:
    """Put an image of a data set into the folder: a link to its file, or a JPEG where it has none; return its name.

    Raises:
        ValueError: another image has that place.
    """
    item = result.item
    suffix = ".jpg" if item.path is None else item.path.suffix
    place = folder / (item.stem + suffix)
    if item.path is None:
        with replacing(place) as temporary:
            result.image.save(temporary, "JPEG", quality=_DATASET_QUALITY)
    elif not (place.exists() and place.samefile(item.path)):
        if place.exists() and not place.is_symlink():
            raise ValueError(f"{place} is another image than {item.path}: choose another --output")
        with replacing(place) as temporary:
            _link(item.path, temporary)
    return item.stem + suffix


def _link(source: Path, place: Path) -> None:
    for way in (os.symlink, os.link, shutil.copyfile):
        with contextlib.suppress(OSError, NotImplementedError):
            way(source.resolve(), place)
            return
    raise OSError(f"{place} cannot be made: neither a link to {source} nor a copy")


class CocoWriter:
    """detections.coco.json and images/: a COCO data set whose annotations have scores."""

    NAME = "detections.coco.json"

    def __init__(self, folder: Path, classes: Classes) -> None:
        pairs = zip(classes.category_ids, classes.names, strict=True)
        self._images = folder / "images"
        self._file = GrowingCoco(folder / self.NAME, [{"id": k, "name": name} for k, name in sorted(pairs)])
        self._num_images = self._num_annotations = 0

    def add(self, results: Sequence[Result]) -> None:
        """Write those of a batch."""
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for image_id, result in enumerate(results, start=self._num_images + 1):
            name, size = keep_image(self._images, result), result.image.size
            images.append({"id": image_id, "file_name": name, "width": size[0], "height": size[1]})
            for row in result.found.to_coco(image_id):
                area = round(row["bbox"][2] * row["bbox"][3], 2)
                number = self._num_annotations + len(annotations) + 1
                annotations.append({"id": number, **row, "area": area, "iscrowd": 0})
        self._file.add_images(images, annotations)
        self._num_images += len(images)
        self._num_annotations += len(annotations)

    def close(self) -> None:
        """End the file."""
        self._file.close()


class YoloWriter:
    """data.yaml, images/ and labels/: a YOLO data set; an image without objects has an empty file of labels."""

    NAME = "data.yaml"

    def __init__(self, folder: Path, classes: Classes) -> None:
        self._folder, self._classes = folder, classes
        names = dict(enumerate(classes.names))
        content = {"train": "images", "val": "images", "names": names}
        text = "# what a detector found; not checked\n" + yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
        place = folder / self.NAME
        if place.exists() and place.read_text(encoding="utf-8", errors="replace") != text:
            raise ValueError(f"{place} is of another data set: choose another --output")
        with replacing(place) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def add(self, results: Sequence[Result]) -> None:
        """Write those of a batch."""
        for result in results:
            keep_image(self._folder / "images", result)
            lines = result.found.to_yolo(self._classes.names, with_scores=False)
            with replacing(self._folder / "labels" / f"{result.item.stem}.txt") as temporary:
                temporary.write_text("".join(line + "\n" for line in lines), encoding="utf-8")

    def close(self) -> None:
        """Do nothing: each file is complete."""


_WRITERS: Mapping[str, type[JsonWriter | JsonLinesWriter | CsvWriter | CocoWriter | YoloWriter]] = {
    "json": JsonWriter,
    "jsonl": JsonLinesWriter,
    "csv": CsvWriter,
    "coco": CocoWriter,
    "yolo": YoloWriter,
}


class Results:
    """All that is written of a run beside the drawings."""

    def __init__(self, folder: Path, kinds: Sequence[str], classes: Classes) -> None:
        """Begin the files.

        Args:
            folder: made if need be.
            kinds: of `json`, `jsonl`, `csv`, `coco` and `yolo`.
            classes: the network's.

        Raises:
            OSError: a file cannot be written. ValueError: the folder holds another data set.
        """
        if {"coco", "yolo"} & {*kinds}:
            _refuse_foreign(folder)
        for kind in kinds:
            ensure_writable(folder / _WRITERS[kind].NAME, "--output")
        folder.mkdir(parents=True, exist_ok=True)
        self._writers: list[Writer] = [_WRITERS[kind](folder, classes) for kind in dict.fromkeys(kinds)]

    def add(self, results: Sequence[Result]) -> None:
        """Write those of a batch."""
        for writer in self._writers:
            writer.add(results)

    def close(self) -> None:
        """End the files."""
        for writer in self._writers:
            writer.close()


# ---- drawings --------------------------------------------------------------------------------------------------------


class Drawings:
    """Drawn images in a folder."""

    def __init__(
        self, folder: Path, kind: str, colors: Mapping[str, Any] | None = None, save_video: bool = False
    ) -> None:
        """Say where and how.

        Args:
            folder: for the files.
            kind: of image files, `png` or `jpg`.
            colors: of the classes, by name.
            save_video: write a video's frames into a video, `.mp4`, and not each into a file.
        """
        self._folder, self._kind, self._colors, self._save_video = folder, kind, colors, save_video
        self._video: VideoWriter | None = None

    def add(self, item: Item, image: Image.Image, found: Detections) -> Path:
        """Draw an image and return the file."""
        drawn = draw_detections(image, found.boxes_xyxy, found.names, found.scores.tolist(), self._colors)
        if self._save_video and item.frame is not None:
            return self._add_frame(item, drawn)
        name, options = _PILLOW_FORMATS[self._kind]
        place = self._folder / f"{item.stem}.{self._kind}"
        with replacing(place) as temporary:
            drawn.save(temporary, name, **options)
        return place

    def _add_frame(self, item: Item, drawn: Image.Image) -> Path:
        place = self._folder / f"{Path(item.stem).parent}.mp4"
        if self._video is None or self._video.path != place:
            self.close()
            self._video = VideoWriter(place, drawn.size)
        self._video.add(drawn, item.time_s or 0.0)
        return place

    def close(self) -> None:
        """End the present video."""
        if self._video is not None:
            video, self._video = self._video, None
            video.close()
