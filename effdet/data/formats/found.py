"""What a folder was recognised as, and what the readers of formats share: one look at a folder, COCO's form, faults."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar

from effdet.runtime.progress import track

from ..coco.report import Cases, DatasetError
from ..corrupt import default_limit
from ..images import ImageError, image_suffixes, read_size

_logger = logging.getLogger(__name__)

_T = TypeVar("_T")
_R = TypeVar("_R")

_DEEPEST = 6  # folders below the root
_IMAGES = "images"  # key of a folder's image files, beside those of suffixes
_PARTS = {
    "train": ("train", "training", "trainval"),
    "val": ("val", "valid", "validation", "minival", "eval"),
    "test": ("test", "testing"),
}
_READERS = 16  # threads that wait for files; opening one is mostly waiting where the disk is a network


@dataclass(frozen=True)
class Part:
    """One part of a data set: where its images are, and its annotations where these are a COCO json already."""

    images: Path
    ann: Path | None = None


@dataclass(frozen=True)
class FoundData:
    """What a folder holds.

    Attributes:
        kind: the format's name.
        parts: 'train', 'val' and 'test', as far as they are there.
        sentence: what was found, for the user.
        convert: makes the content of a COCO json for a part; None where each part has a json.
    """

    kind: str
    parts: dict[str, Part]
    sentence: str
    convert: Callable[[str], dict[str, Any]] | None = None


# ---- one look at a folder --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tree:
    """The files below a folder, listed once: relative folder ('' is the root) -> suffix or 'images' -> names."""

    root: Path
    folders: dict[str, dict[str, list[str]]]

    def files(self, suffix: str, most: int | None = None) -> list[str]:
        """Return the relative paths of one suffix, those near the root first.

        Args:
            suffix: with its dot, or 'images' for all of image files.
            most: leave out folders with more of them, as those with a file for each image.
        """
        found = []
        for folder, kinds in self.folders.items():
            names = kinds.get(suffix, ())
            if most is None or len(names) <= most:
                found += [join(folder, name) for name in names]
        return sorted(found, key=lambda path: (path.count("/"), path))

    def images_in(self, folder: str = "") -> list[str]:
        """Return the relative paths of the images in a folder and below, sorted."""
        return sorted(
            join(where, name)
            for where, kinds in self.folders.items()
            if not folder or where == folder or where.startswith(folder + "/")
            for name in kinds.get(_IMAGES, ())
        )

    @cached_property
    def by_name(self) -> dict[str, list[str]]:
        """The relative paths of the images with a file name."""
        return _gather((path.rpartition("/")[2], path) for path in self.images_in())

    @cached_property
    def by_stem(self) -> dict[str, list[str]]:
        """The relative paths of the images with a file name's stem."""
        return _gather((os.path.splitext(path.rpartition("/")[2])[0], path) for path in self.images_in())

    def image_folders(self) -> list[str]:
        """Return the folders that hold images, those with the most images first."""
        counts = {folder: len(kinds.get(_IMAGES, ())) for folder, kinds in self.folders.items()}
        return sorted((folder for folder, count in counts.items() if count), key=lambda folder: -counts[folder])


def _gather(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    table: dict[str, list[str]] = {}
    for key, path in pairs:
        table.setdefault(key, []).append(path)
    return table


def join(folder: str, name: str) -> str:
    """Join a relative folder, '' for the root, and a name."""
    return f"{folder}/{name}" if folder else name


def look_into(root: Path, deepest: int = _DEEPEST) -> Tree:
    """List the files below a folder, `deepest` folders down, without hidden folders and those of archives' leftovers.

    Raises:
        OSError: the folder cannot be read.
    """
    folders: dict[str, dict[str, list[str]]] = {}
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        kinds: dict[str, list[str]] = {}
        try:
            entries = list(os.scandir(root / folder))
        except PermissionError:
            if not folder:
                raise
            continue  # such as a disk's lost+found
        for entry in entries:
            if entry.name.startswith((".", "__")):
                continue
            suffix = os.path.splitext(entry.name)[1].lower()
            if suffix in image_suffixes():
                kinds.setdefault(_IMAGES, []).append(entry.name)
            elif entry.is_dir():
                if folder.count("/") + bool(folder) < deepest:
                    waiting.append(join(folder, entry.name))
            elif entry.is_file():  # a pipe would keep whoever opens it
                kinds.setdefault(suffix, []).append(entry.name)
        folders[folder] = {kind: sorted(names) for kind, names in kinds.items()}
    return Tree(root, dict(sorted(folders.items())))


def part_of(path: str) -> str | None:
    """Return the part that the words of a path name, the last component with such a word decides; None: none does."""
    for component in reversed(PurePosixPath(path).parts):
        words = re.split(r"[^a-z]+", component.lower())
        for part, names in _PARTS.items():
            if any(word in names for word in words):
                return part
    return None


def nearest_path(paths: Sequence[str], to: str) -> str:
    """Return the path that shares most folders with another one, of equals the first."""
    if len(paths) == 1:
        return paths[0]
    wanted = to.split("/")[:-1]
    return max(paths, key=lambda path: len(os.path.commonprefix([path.split("/")[:-1], wanted])))


def map_files(function: Callable[[_T], _R], items: Sequence[_T]) -> Iterator[_R]:
    """Apply a function that reads a file to each item, several at a time; a terminal sees a bar."""
    with ThreadPoolExecutor(_READERS) as pool:
        yield from track(pool.map(function, items), "Reading files", len(items), "files")


# ---- COCO's form -----------------------------------------------------------------------------------------------------


class Box(NamedTuple):
    """An object: its category id and where it is, in pixels."""

    category: int
    x: float
    y: float
    width: float
    height: float
    crowd: int = 0


class Labelled(NamedTuple):
    """An image and what is in it; width and height in pixels, None where they have to be read from the file.

    Without an id it gets a number.
    """

    file_name: str
    width: int | None
    height: int | None
    boxes: list[Box]
    id: str = ""


def bounding_box(category: int, xs: Sequence[float], ys: Sequence[float]) -> Box:
    """Return the box around points in pixels."""
    return Box(category, min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys))


def make_coco(items: Iterable[Labelled], names: dict[int, str], decimals: int = 3) -> dict[str, Any]:
    """Make the content of a COCO json: image and annotation ids count from 1, categories as given.

    Args:
        items: the images in order.
        names: category id -> name.
        decimals: that boxes are rounded to.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, item in enumerate(items, start=1):
        image: dict[str, Any] = {"id": item.id or number, "file_name": item.file_name}
        if item.width is not None and item.height is not None:
            image |= {"width": item.width, "height": item.height}
        images.append(image)
        for box in item.boxes:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image["id"],
                    "category_id": box.category,
                    "bbox": [round(value, decimals) for value in box[1:5]],
                    "area": round(box.width * box.height, decimals),
                    "iscrowd": box.crowd,
                }
            )
    categories = [{"id": number, "name": name} for number, name in sorted(names.items())]
    return {"images": images, "annotations": annotations, "categories": categories}


UNREADABLE = "images that cannot be read: replace them, or take them out"
MISSING = "images that are not there: add them, or take them out of the annotations"
"""Kinds for `Faults`: an image whose size is needed, and one that annotations name."""


def place_image(
    tree: Tree, faults: Faults, ann: str, name: str, size_wh: tuple[int, int] | None
) -> tuple[str, tuple[int, int]] | None:
    """Find the image of an annotation file that is for one image, and its size.

    Args:
        tree: of the data set.
        faults: get the image that is not there, or cannot be read where its size is needed.
        ann: relative path of the annotation file.
        name: the image's file name in it; where no image has it, the file's own stem decides.
        size_wh: what the file says, None for nothing.

    Returns:
        The image's relative path, and its width and height in pixels; None after a fault.
    """
    candidates = tree.by_name.get(name) or tree.by_stem.get(PurePosixPath(ann).stem)
    if not candidates:
        faults.add(MISSING, f"{name} of {ann}".strip())
        return None
    place = nearest_path(candidates, ann)
    size = size_wh or size_or_none(tree.root / place)
    if size is None:
        faults.add(UNREADABLE, place)
        return None
    return place, size


def size_or_none(path: Path) -> tuple[int, int] | None:
    """Return an image's (width, height) as it is looked at, EXIF rotation applied; None where it cannot be read."""
    try:
        return read_size(path, oriented=True)
    except ImageError:
        return None


# ---- faults ----------------------------------------------------------------------------------------------------------


class Faults(Cases):
    """What is wrong in the files of a data set; a kind says what and, after a colon, what to do."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source

    def _line(self, kind: str) -> str:
        return self.line(kind, *kind.partition(": ")[::2])

    def leave_out(self, kind: str, total: int) -> None:
        """Put up with one kind, with a warning, where it is rare: what has it is left out of `total`."""
        if 0 < self.get(kind, 0) <= min(default_limit(total), total // 2):
            _logger.warning("%s: left out: %s", self.source, self._line(kind))
            del self[kind]

    def raise_if_any(self) -> None:
        """Raise DatasetError naming every kind; do nothing where there is none."""
        if self:
            raise DatasetError(f"{self.source} cannot be used:\n" + "\n".join(f"  {self._line(kind)}" for kind in self))
