"""Read Open Images' csv files of boxes into the content of a COCO json.

Either a split that settings name, with a csv of image sizes, as effdet reads it (`OpenImagesParser`); or a download,
whole or in part (`find_open_images`): the images on the disk are the data set, classes are those that have a box in it.
"""

from __future__ import annotations

import csv
import functools
import operator
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from ..coco.report import DatasetError
from .converted import EXACT, ConvertedParser
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


class _Row(NamedTuple):
    label: str
    left: float  # a share of the image's width, as the next; of its height the two after them
    right: float
    top: float
    bottom: float
    crowd: int


def _open(path: str | Path) -> Any:
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"{path} does not exist; Open Images keeps it with its annotations (sizes of images: "
            "a csv with the columns id, width, height, made from the files)"
        )
    return open(path, newline="", encoding="utf-8-sig", errors="replace")


def _header(path: str | Path) -> list[str]:
    with _open(path) as file:
        return next(csv.reader([file.readline(10_000)]), [])


def _values(path: str | Path, columns: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    header = _header(path)
    missing = [column for column in columns if column not in header]
    if missing:
        raise DatasetError(f"{path} lacks the columns {', '.join(missing)}; it has {header}")
    at = [header.index(column) for column in columns]
    with _open(path) as file:
        rows = csv.reader(file)
        next(rows)
        yield from map(operator.itemgetter(*at), (row for row in rows if len(row) > max(at)))


def _boxes(path: str | Path, wanted: Container[str] | None = None) -> Iterator[tuple[str, _Row]]:
    """Give the image's id and the box of each row, of all images or those wanted."""
    groups = ("IsGroupOf",) if "IsGroupOf" in _header(path) else ()
    for image, label, *numbers in _values(path, _COLUMNS + groups):
        if wanted is None or image in wanted:
            try:
                left, right, top, bottom = map(float, numbers[:4])
            except ValueError:
                raise DatasetError(f"{path}: XMin..YMax of image {image} must be numbers, got {numbers[:4]}") from None
            yield image, _Row(label, left, right, top, bottom, int(numbers[4:] == ["1"]))


def _place(row: _Row, category: int, width: int, height: int) -> Box:
    left, top = row.left * width, row.top * height
    return Box(category, left, top, row.right * width - left, row.bottom * height - top, row.crowd)


# ---- a split, as effdet reads it -------------------------------------------------------------------------------------


@dataclass
class OpenImagesParserCfg:
    """How to read a split of Open Images.

    Args:
        categories_filename: csv without a header: label such as /m/011k07, name.
        img_info_filename: csv with the columns id, width, height.
        bbox_filename: csv with ImageID, LabelName, XMin, XMax, YMin, YMax in 0..1 and, where known, IsGroupOf.
        img_label_filename: not read, as in effdet.
        masks_filename, task: masks are not supported; anything but '' and 'obj' is refused.
        img_filename: file name of an image with %s for its id.
        prefix_levels: images lie in folders named by this many first letters of the id.
        add_background: labels count from 1; anything but True is refused.
        has_labels, bbox_yxyx, min_img_size, ignore_empty_gt: as in CocoParserCfg.
    """

    categories_filename: str
    img_info_filename: str
    bbox_filename: str
    img_label_filename: str = ""
    masks_filename: str = ""
    img_filename: str = "%s.jpg"
    task: str = "obj"
    prefix_levels: int = 1
    add_background: bool = True
    has_labels: bool = True
    bbox_yxyx: bool = True
    min_img_size: int = 32
    ignore_empty_gt: bool = False


class OpenImagesParser(ConvertedParser):
    """A split of Open Images; the k-th line of the classes has category id k. Group boxes are crowd regions."""

    def __init__(self, cfg: OpenImagesParserCfg) -> None:
        if cfg.masks_filename or cfg.task != "obj":
            raise ValueError(f"task {cfg.task!r} with masks {cfg.masks_filename!r}: only boxes are read, task 'obj'")
        super().__init__(str(cfg.bbox_filename or cfg.img_info_filename), read_open_images, cfg)


def read_open_images(cfg: OpenImagesParserCfg) -> dict[str, Any]:
    """Convert a split to the content of a COCO json; with labels only the images that have boxes, as in effdet.

    Raises:
        FileNotFoundError: no such file; DatasetError: columns are missing, or an unknown label or image.
    """
    with _open(cfg.categories_filename) as file:
        names = {row[0]: row[1] if len(row) > 1 else row[0] for row in csv.reader(file) if row}
    ids = {label: number for number, label in enumerate(names, start=1)}
    sizes = {
        image: (int(float(width)), int(float(height)))
        for image, width, height in _values(cfg.img_info_filename, ("id", "width", "height"))
    }
    found: dict[str, list[Box]] = {} if cfg.has_labels else {image: [] for image in sizes}
    for image, row in _boxes(cfg.bbox_filename) if cfg.has_labels else ():
        if row.label not in ids:
            raise DatasetError(
                f"{cfg.bbox_filename} has a box of the label {row.label}, which is not in {cfg.categories_filename}"
            )
        if image not in sizes:
            raise DatasetError(
                f"{cfg.bbox_filename} has a box of the image {image}, which is not in {cfg.img_info_filename}"
            )
        found.setdefault(image, []).append(_place(row, ids[row.label], *sizes[image]))
    items = [
        Labelled("/".join([*image[: cfg.prefix_levels], cfg.img_filename % image]), *sizes[image], boxes, image)
        for image, boxes in (sorted(found.items()) if cfg.has_labels else found.items())
    ]
    return make_coco(items, dict(enumerate(names.values(), start=1)), EXACT)


# ---- a download ------------------------------------------------------------------------------------------------------


def find_open_images(tree: Tree) -> FoundData | None:
    """Recognise Open Images; None where the folder has no csv of its boxes."""
    csvs = [path for path in tree.files(".csv", 200) if set(_COLUMNS) <= set(_header(tree.root / path))]
    boxes = {part_of(path) or "train": path for path in reversed(csvs)}
    if not boxes:
        return None
    parts = {part: Part(tree.root) for part in ("train", "val", "test") if part in boxes}

    @functools.cache
    def read() -> dict[str, dict[str, list[_Row]]]:
        return {part: _boxes_on_disk(tree, path) for part, path in boxes.items()}

    def convert(part: str) -> dict[str, Any]:
        labels = {row.label for images in read().values() for rows in images.values() for row in rows}
        return _to_coco(tree, part, read()[part], _class_names(tree, labels))

    listed = ", ".join(f"{part}: {boxes[part]}" for part in parts)
    sentence = f"{tree.root}: Open Images, {listed}"
    return FoundData("Open Images", parts, sentence, convert)


def _boxes_on_disk(tree: Tree, path: str) -> dict[str, list[_Row]]:
    """Return the rows of each image on the disk, by the image's relative path."""
    images: dict[str, list[_Row]] = {}
    for stem, row in _boxes(tree.root / path, tree.by_stem):
        images.setdefault(stem, []).append(row)
    places = {}
    for stem, rows in images.items():
        candidates = tree.by_stem[stem]
        own = [place for place in candidates if part_of(place) == part_of(path)] or candidates
        places[nearest_path(own, path)] = rows
    return dict(sorted(places.items()))


def _class_names(tree: Tree, labels: set[str]) -> dict[str, tuple[int, str]]:
    """Return id and name of each label, in the order of the csv of descriptions; a label without one is its name."""
    names: dict[str, str] = {}
    for path in tree.files(".csv", 200):
        first = _header(tree.root / path)
        if "class" in PurePosixPath(path).name and len(first) == 2:
            with _open(tree.root / path) as file:
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
        items.append(Labelled(path, *size, [_place(row, classes[row.label][0], *size) for row in rows]))
    faults.leave_out(UNREADABLE, len(images))
    faults.raise_if_any()
    return make_coco(items, dict(classes.values()))
