"""Read YOLO data sets: a text file for each image, a row for each object with coordinates as shares of the image.

Taken are ultralytics' data.yaml, Darknet's obj.data (CVAT's YOLO export), and images/ beside labels/ without either.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import yaml

from ..coco.report import DatasetError
from ..images import image_suffixes
from .found import (
    MISSING,
    UNREADABLE,
    Box,
    Faults,
    FoundData,
    Labelled,
    Part,
    Tree,
    bounding_box,
    look_into,
    make_coco,
    map_files,
    part_of,
    size_or_none,
)

_NAME_FILES = ("classes.txt", "obj.names", "labels.txt", "_darknet.labels", "predefined_classes.txt")
_KEYS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
_FAR_OUTSIDE = 1.5  # a share of the image beyond this is a pixel


class _Layout(NamedTuple):
    source: Path
    names: dict[int, str]  # empty: as many as the labels have
    images: dict[str, list[Path]]
    keypoints: bool = False  # rows go on with keypoints after their box


def find_yolo(tree: Tree, only: str = "") -> FoundData | None:
    """Recognise a YOLO data set.

    Args:
        tree: of the folder.
        only: relative path of the yaml or obj.data that the user named.

    Returns:
        What was found; None where the folder is no YOLO data set.

    Raises:
        DatasetError: the yaml names files that are not there.
    """
    layout = _from_yaml(tree, only) or _from_darknet(tree, only) or (None if only else _from_folders(tree))
    if layout is None:
        return None
    folders = {part: _common_folder(images) for part, images in layout.images.items()}
    counts = ", ".join(f"{part}: {len(images)} images" for part, images in layout.images.items())

    def convert(part: str) -> dict[str, Any]:
        return read_yolo(layout, part, folders[part])

    classes = f", {len(layout.names)} classes" if layout.names else ""
    where = layout.source if layout.source.is_dir() else layout.source.name
    sentence = f"{tree.root}: YOLO ({where}), {counts}{classes}"
    return FoundData("YOLO", {part: Part(folder) for part, folder in folders.items()}, sentence, convert)


# ---- which images, which classes -------------------------------------------------------------------------------------


def _from_yaml(tree: Tree, only: str) -> _Layout | None:
    candidates = [only] if only else [*tree.files(".yaml", 20), *tree.files(".yml", 20)]
    for path in sorted(candidates, key=lambda path: PurePosixPath(path).stem not in ("data", "dataset")):
        try:
            content = yaml.safe_load((tree.root / path).read_text(encoding="utf-8", errors="replace"))
        except (yaml.YAMLError, OSError):
            continue
        if isinstance(content, dict) and ("names" in content or "nc" in content) and _entries(content, "train", "val"):
            return _read_yaml(tree, tree.root / path, content)
    if only and only.endswith((".yaml", ".yml")):
        raise DatasetError(f"{tree.root / only} is no YOLO data set: it needs names, train and val")
    return None


def _entries(content: dict[str, Any], *parts: str) -> list[str]:
    found: list[str] = []
    for key in (key for part in parts for key in _KEYS[part]):
        value = content.get(key)
        found += [str(one) for one in (value if isinstance(value, list) else [value]) if isinstance(one, str) and one]
    return found


def _read_yaml(tree: Tree, path: Path, content: dict[str, Any]) -> _Layout:
    names = content.get("names", {})
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or not all(str(key).isdecimal() for key in names):
        raise DatasetError(f"{path}: names must be a list of class names, or number: name; got {str(names)[:80]}")
    names = {int(key): str(name) for key, name in names.items()} or {k: str(k) for k in range(int(content["nc"]))}
    bases = [path.parent, tree.root]
    if content.get("path"):
        stated = Path(str(content["path"])).expanduser()
        bases = [base for base in (path.parent / stated, path.parent.parent / stated) if base.is_dir()] + bases
    images: dict[str, list[Path]] = {}
    absent = []
    for part in _KEYS:
        entries = _entries(content, part)
        found = [image for entry in entries for image in _images_of(entry, bases)]
        if found:
            images[part] = list(dict.fromkeys(found))
        elif entries:
            absent.append(f"{part}: {', '.join(entries)}")
    if "train" not in images and "val" not in images:
        raise DatasetError(
            f"{path} names images that are not there ({'; '.join(absent)}), looked for from "
            f"{' and '.join(map(str, dict.fromkeys(bases)))}: correct path, train and val in it"
        )
    return _Layout(path, names, images, "kpt_shape" in content)


def _from_darknet(tree: Tree, only: str) -> _Layout | None:
    for path in [only] if only else tree.files(".data", 5):
        source = tree.root / path
        rows = [line.split("=", 1) for line in source.read_text(encoding="utf-8").splitlines() if "=" in line]
        content = {key.strip(): value.strip() for key, value in rows}
        if "names" not in content:
            continue
        bases = [source.parent, tree.root]
        found = _locate(content["names"], bases)
        names = _read_names(found) if found else {}
        images = {part: [i for entry in _entries(content, part) for i in _images_of(entry, bases)] for part in _KEYS}
        return _Layout(source, names, {part: files for part, files in images.items() if files})
    return None


def _from_folders(tree: Tree) -> _Layout | None:
    """Recognise images with text files of rows beside them, or in labels/ where they are in images/."""
    images: dict[str, list[Path]] = {}
    for folder, kinds in tree.folders.items():
        labels = tree.folders.get(_labels_folder(folder), {}).get(".txt", []) or kinds.get(".txt", [])
        stems = {name[:-4] for name in labels}
        named = [name for name in kinds.get("images", ()) if os.path.splitext(name)[0] in stems]
        if named and _looks_like_rows(tree, folder, named):
            where = tree.root / folder
            images.setdefault(part_of(folder) or "train", []).extend(where / name for name in kinds["images"])
    if not images:
        return None
    lists = [path for path in tree.files(".txt") if PurePosixPath(path).name in _NAME_FILES]
    return _Layout(tree.root, _read_names(tree.root / lists[0]) if lists else {}, images)


def _looks_like_rows(tree: Tree, folder: str, names: Sequence[str]) -> bool:
    for name in names[:50]:
        rows = _read_rows(tree.root / folder / name)
        if rows:
            return bool(re.fullmatch(r"\s*\d+(\.0*)?(\s+[-+\d.eE]+){4,}\s*", rows[0]))
    return False


def _read_names(path: Path) -> dict[int, str]:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return {number: line.strip() for number, line in enumerate(lines) if line.strip()}


def _locate(name: str, bases: Iterable[Path]) -> Path | None:
    """Find a path as it stands, from one of the bases, or without its first components, as moved sets need."""
    parts = Path(name.replace("\\", "/")).parts
    if Path(name).is_absolute() and Path(name).exists():
        return Path(name)
    for start in range(len(parts)):
        for base in bases:
            path = base.joinpath(*[part for part in parts[start:] if part != "/"])
            if parts[start:] not in ((".",), ("..",)) and path.exists():
                return Path(os.path.normpath(path))
    return None


def _images_of(entry: str, bases: Sequence[Path]) -> list[Path]:
    """Return the images of an entry of the yaml: a folder, or a text file with a path a line."""
    path = _locate(entry, bases)
    if path is None:
        return []
    if path.is_dir():
        return [path / name for name in look_into(path).images_in()]
    if path.suffix.lower() in image_suffixes():
        return [path]
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    found = [(line, _locate(line, [path.parent, *bases])) for line in lines]
    faults = Faults(str(path))
    for line, image in found:
        if image is None:
            faults.add(MISSING, line)
    faults.leave_out(MISSING, len(lines))
    faults.raise_if_any()
    return [image for _, image in found if image is not None]


def _common_folder(images: Sequence[Path]) -> Path:
    return Path(os.path.commonpath([os.path.abspath(image.parent) for image in images]))


# ---- the labels ------------------------------------------------------------------------------------------------------


def _labels_folder(folder: str) -> str:
    parts = folder.split("/")
    if "images" in parts:
        last = len(parts) - 1 - parts[::-1].index("images")
        parts[last] = "labels"
    return "/".join(parts)


def label_path(image: str) -> str:
    """Return an image's label file: in labels/ where the image is in images/, else beside it."""
    folder, name = os.path.split(image)
    name = os.path.splitext(name)[0] + ".txt"
    apart, beside = os.path.join(_labels_folder(folder), name), os.path.join(folder, name)
    return apart if os.path.isfile(apart) or not os.path.isfile(beside) else beside


def read_yolo(layout: _Layout, part: str, folder: Path) -> dict[str, Any]:
    """Convert a part to the content of a COCO json; category ids are YOLO's class numbers, from 0.

    Args:
        layout: the images and class names.
        part: one of the layout's.
        folder: that file names are relative to.

    Raises:
        DatasetError: rows that are no labels, numbers without a class, or images that cannot be read.
    """
    faults, items = Faults(f"{layout.source} ({part})"), []
    images, numbers = layout.images[part], set(layout.names)
    for image, (size, rows) in zip(images, map_files(_read_image, images), strict=True):
        name = os.path.relpath(image, folder).replace(os.sep, "/")
        if size is None:
            faults.add(UNREADABLE, name)
            continue
        boxes = []
        for number, row in enumerate(rows, start=1):
            try:
                boxes.append(parse_row(row, size, layout.keypoints))
            except ValueError as error:
                faults.add(str(error), f"{label_path(image.as_posix())} line {number}")
                continue
            if layout.names and boxes[-1].category not in numbers:
                faults.add(
                    f"class numbers that have no name (there are {len(numbers)}): add the names, or correct the labels",
                    f"{boxes[-1].category} in {label_path(image.as_posix())}",
                )
        items.append(Labelled(name, *size, boxes))
    faults.leave_out(UNREADABLE, len(images))
    faults.raise_if_any()
    highest = max((box.category for item in items for box in item.boxes), default=-1)
    return make_coco(items, layout.names or {number: str(number) for number in range(highest + 1)})


def _read_image(image: Path) -> tuple[tuple[int, int] | None, list[str]]:
    return size_or_none(image), _read_rows(image)


def _read_rows(image: Path) -> list[str]:
    path = label_path(image.as_posix())
    if os.path.isfile(path):
        with open(path, encoding="utf-8", errors="replace") as file:
            return [line for line in file if line.strip()]
    if os.path.exists(path):
        raise DatasetError(f"{path} is a folder, pipe or device in the place of a label file: remove it")
    return []  # an image without objects


def parse_row(row: str, size_wh: tuple[int, int], keypoints: bool = False) -> Box:
    """Turn a row of a label file into a box.

    Args:
        row: class, then x, y of the centre, width and height; or class, then three or more corners of a polygon.
        size_wh: of the image, in pixels.
        keypoints: what follows the box are keypoints, not a polygon.

    Raises:
        ValueError: it is neither; the text is a kind for `Faults`.
    """
    try:
        category, *values = [float(word) for word in row.replace(",", " ").split()]
    except ValueError:
        raise ValueError("rows that are not numbers: class x y width height") from None
    if category != int(category) or category < 0 or not all(map(math.isfinite, values)):
        raise ValueError("rows without a class number from 0, or with a value that is no number: correct them")
    if any(abs(value) > _FAR_OUTSIDE for value in (values[:4] if keypoints else values)):
        raise ValueError("rows with coordinates far beyond 1: YOLO's are shares of the image's width and height")
    width, height = size_wh
    if len(values) == 4 or keypoints and len(values) > 4:
        x, y, w, h = values[:4]
        return Box(int(category), (x - w / 2) * width, (y - h / 2) * height, w * width, h * height)
    if len(values) >= 6 and len(values) % 2 == 0:
        return bounding_box(int(category), [x * width for x in values[::2]], [y * height for y in values[1::2]])
    raise ValueError("rows that have neither 4 coordinates nor the corners of a polygon: class x y width height")
