"""Recognise folders of Pascal VOC's xml files with classes of their own, with or without VOC's lists of images.

Taken are VOCdevkit/VOC2007 and the like, and a folder of xml files, one for each image, as LabelImg, CVAT and Roboflow
write them. A single official split, as effdet reads it, is `voc.py`'s business.
"""

from __future__ import annotations

import functools
import xml.etree.ElementTree as ElementTree
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from .found import (
    MISSING,
    UNREADABLE,
    Box,
    Faults,
    FoundData,
    Labelled,
    Part,
    Tree,
    join,
    make_coco,
    map_files,
    part_of,
    place_image,
)
from .voc import VOC_CLASSES

_LISTS = "ImageSets/Main"
_OFFICIAL = 15  # classes, all of them VOC's, that make a set VOC itself, with its order of classes


class _Object(NamedTuple):
    name: str
    corners: tuple[float, float, float, float]


class _Annotation(NamedTuple):
    image: str  # as the xml names it
    size: tuple[int, int] | None
    objects: list[_Object]
    fault: str = ""


def find_voc(tree: Tree) -> FoundData | None:
    """Recognise a data set in Pascal VOC's format; None where the folder is none."""
    xmls = tree.files(".xml")
    if not any(_is_voc(tree.root / path) for path in xmls[:3]):
        return None
    parts = _from_lists(tree) or _by_folders(xmls)

    @functools.cache
    def read() -> dict[str, _Annotation]:
        paths = [path for listed in parts.values() for path in listed]
        return dict(zip(paths, map_files(lambda path: _read_xml(tree.root / path), paths), strict=True))

    def convert(part: str) -> dict[str, Any]:
        return read_parts(tree, parts[part], read(), part)

    counts = ", ".join(f"{part}: {len(paths)} images" for part, paths in parts.items())
    sentence = f"{tree.root}: Pascal VOC, {counts}"
    return FoundData("Pascal VOC", {part: Part(tree.root) for part in parts}, sentence, convert)


def _is_voc(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(4096)
    return b"<annotation" in head and b"<annotations" not in head


def _from_lists(tree: Tree) -> dict[str, list[str]]:
    """Return the xml files that ImageSets/Main/{train,val,test}.txt list, of all years together."""
    found: dict[str, list[str]] = {}
    for folder in tree.folders:
        if not f"/{folder}".endswith(f"/{_LISTS}"):
            continue
        base = folder[: -len(_LISTS)].rstrip("/")
        names = {part: _listed(tree.root / folder / f"{part}.txt") for part in ("train", "val", "test", "trainval")}
        names["train"] = names["train"] or names["trainval"]
        for part in ("train", "val", "test"):
            found.setdefault(part, []).extend(join(base, f"Annotations/{name}.xml") for name in names[part])
    return {part: paths for part, paths in found.items() if paths}


def _listed(path: Path) -> list[str]:
    if not path.is_file():
        return []
    return [line.split()[0] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _by_folders(xmls: list[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for path in xmls:
        found.setdefault(part_of(str(PurePosixPath(path).parent)) or "train", []).append(path)
    return {part: found[part] for part in ("train", "val", "test") if part in found}


def _read_xml(path: Path) -> _Annotation:
    try:
        root = ElementTree.parse(path).getroot()
    except FileNotFoundError:
        return _Annotation("", None, [], "images without an xml: every image of a list needs one")
    except (ElementTree.ParseError, OSError):
        return _Annotation("", None, [], "files that are no valid xml: correct them, or take them out")
    objects = []
    for item in root.iter("object"):
        try:
            corners = [float(item.findtext(f"bndbox/{side}") or "") for side in ("xmin", "ymin", "xmax", "ymax")]
        except ValueError:
            return _Annotation("", None, [], "files with an object that has no bndbox of four numbers: correct them")
        name = (item.findtext("name") or "").strip()
        objects.append(_Object(name, (corners[0], corners[1], corners[2], corners[3])))
    try:
        size = int(float(root.findtext("size/width") or 0)), int(float(root.findtext("size/height") or 0))
    except ValueError:
        size = 0, 0
    image = PurePosixPath((root.findtext("filename") or "").strip().replace("\\", "/")).name
    return _Annotation(image, size if min(size) > 0 else None, objects)


def read_parts(tree: Tree, paths: list[str], read: dict[str, _Annotation], part: str) -> dict[str, Any]:
    """Convert a part to the content of a COCO json.

    Classes are numbered from 1: VOC's own in its order, others by the alphabet, over all parts. VOC counts pixels from
    1, some tools from 0; a coordinate of 0 tells.

    Args:
        tree: of the data set.
        paths: the part's xml files.
        read: every part's.
        part: its name, for messages.

    Raises:
        DatasetError: broken xml files, or images that are not there.
    """
    found = {item.name for annotation in read.values() for item in annotation.objects}
    official = len(found) >= _OFFICIAL and found <= set(VOC_CLASSES)
    ids = {name: number for number, name in enumerate(VOC_CLASSES if official else sorted(found), start=1)}
    lowest = min((min(o.corners[:2]) for a in read.values() for o in a.objects), default=1.0)
    first = 1.0 if lowest >= 1 else 0.0
    faults, items = Faults(f"{tree.root} ({part})"), []
    for path in paths:
        annotation = read[path]
        if annotation.fault:
            faults.add(annotation.fault, path)
            continue
        found_image = place_image(tree, faults, path, annotation.image, annotation.size)
        if found_image is None:
            continue
        image, size = found_image
        boxes = [
            Box(ids[o.name], o.corners[0] - first, o.corners[1] - first, *_sides(o.corners)) for o in annotation.objects
        ]
        items.append(Labelled(image, *size, boxes))
    faults.leave_out(MISSING, len(paths))
    faults.leave_out(UNREADABLE, len(paths))
    faults.raise_if_any()
    return make_coco(items, {number: name for name, number in ids.items()})


def _sides(corners: tuple[float, float, float, float]) -> tuple[float, float]:
    return corners[2] - corners[0], corners[3] - corners[1]
