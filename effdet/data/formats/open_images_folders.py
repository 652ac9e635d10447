"""Recognise a download of Open Images, whole or in part: csv files of boxes as they are published, and the images.

The images on the disk are the data set, classes are those that have a box in it. A split with effdet's files of image
sizes, complete and without sizes from the images, is `open_images.py`'s business.
"""

from __future__ import annotations

import csv
import functools
from pathlib import Path, PurePosixPath
from typing import Any

from ..coco.report import DatasetError
from .found import (
    UNREADABLE,
    Box,
    Faults,
    FoundData,
    Labelled,
    Part,
    Tree,
    make_coco,
    map_files,
    nearest_path,
    part_of,
    size_or_none,
)

_COLUMNS = ("ImageID", "LabelName", "XMin", "XMax", "YMin", "YMax")
_Row = tuple[str, tuple[float, float, float, float], int]  # label; x, y, width, height as shares; crowd


def find_open_images(tree: Tree) -> FoundData | None:
    """Recognise Open Images; None where the folder has no csv of its boxes."""
    csvs = [path for path in tree.files(".csv", 200) if set(_COLUMNS) <= set(_header(tree.root / path))]
    boxes = {part_of(path) or "train": path for path in reversed(csvs)}
    if not boxes:
        return None
    parts = {part: Part(tree.root) for part in ("train", "val", "test") if part in boxes}

    @functools.cache
    def read() -> dict[str, dict[str, list[_Row]]]:
        return {part: _read_boxes(tree, path) for part, path in boxes.items()}

    def convert(part: str) -> dict[str, Any]:
        labels = {row[0] for images in read().values() for rows in images.values() for row in rows}
        return _to_coco(tree, part, read()[part], _class_names(tree, labels))

    listed = ", ".join(f"{part}: {boxes[part]}" for part in parts)
    sentence = f"{tree.root}: Open Images, {listed}"
    return FoundData("Open Images", parts, sentence, convert)


def _header(path: Path) -> list[str]:
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        return next(csv.reader([file.readline(10_000)]), [])


def _read_boxes(tree: Tree, path: str) -> dict[str, list[_Row]]:
    """Return the rows of each image on the disk, by the image's relative path."""
    images: dict[str, list[_Row]] = {}
    places: dict[str, str] = {}
    with (tree.root / path).open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file)
        header = next(reader)
        at = [header.index(name) for name in _COLUMNS]
        group = header.index("IsGroupOf") if "IsGroupOf" in header else None
        for number, row in enumerate(reader, start=2):
            candidates = tree.by_stem.get(row[at[0]]) if len(row) > max(at) else None
            if not candidates:
                continue
            stem = row[at[0]]
            if stem not in places:
                own = [place for place in candidates if part_of(place) == part_of(path)] or candidates
                places[stem] = nearest_path(own, path)
            try:
                left, right, top, bottom = (float(row[k]) for k in at[2:])
            except ValueError:
                raise DatasetError(f"{tree.root / path} line {number}: XMin..YMax must be numbers, got {row}") from None
            crowd = int(group is not None and row[group] == "1")
            images.setdefault(places[stem], []).append((row[at[1]], (left, top, right - left, bottom - top), crowd))
    return dict(sorted(images.items()))


def _class_names(tree: Tree, labels: set[str]) -> dict[str, tuple[int, str]]:
    """Return id and name of each label, in the order of the csv of descriptions; a label without one is its name."""
    names: dict[str, str] = {}
    for path in tree.files(".csv", 200):
        first = _header(tree.root / path)
        if "class" in PurePosixPath(path).name and len(first) == 2:
            with (tree.root / path).open(newline="", encoding="utf-8-sig") as file:
                names |= {row[0]: row[1] for row in csv.reader(file) if len(row) == 2 and row[0] in labels}
    ordered = [*names, *sorted(labels - set(names))]
    return {label: (number, names.get(label, label)) for number, label in enumerate(ordered, start=1)}


def _to_coco(
    tree: Tree, part: str, images: dict[str, list[_Row]], classes: dict[str, tuple[int, str]]
) -> dict[str, Any]:
    faults, items = Faults(f"{tree.root} ({part})"), []
    if not images:
        raise DatasetError(
            f"{tree.root}: no image of the {part} part's csv of boxes is below the folder: download some"
        )
    sizes = map_files(lambda path: size_or_none(tree.root / path), list(images))
    for (path, rows), size in zip(images.items(), sizes, strict=True):
        if size is None:
            faults.add(UNREADABLE, path)
            continue
        width, height = size
        boxes = [Box(classes[k][0], x * width, y * height, w * width, h * height, c) for k, (x, y, w, h), c in rows]
        items.append(Labelled(path, width, height, boxes))
    faults.leave_out(UNREADABLE, len(images))
    faults.raise_if_any()
    return make_coco(items, dict(classes.values()))
