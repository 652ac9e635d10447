"""Read Pascal VOC's xml files, one for each image, into the content of a COCO json.

Either a split that settings name, as effdet reads it (`VocParser`); or a folder with classes of its own (`find_voc`):
VOCdevkit/VOC2007 and the like, or a folder of xml files as LabelImg, CVAT and Roboflow write them.
"""

from __future__ import annotations

import functools
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from .converted import EXACT, ConvertedParser
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

VOC_CLASSES = (
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
_LISTS = "ImageSets/Main"
_OFFICIAL = 15  # classes, all of them VOC's, that make a set VOC itself, with its order of classes


class _Object(NamedTuple):
    name: str
    corners: tuple[float, float, float, float]
    difficult: bool


class _Annotation(NamedTuple):
    image: str  # as the xml names it
    size: tuple[int, int] | None
    objects: list[_Object]
    fault: str = ""


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
        name, difficult = ((item.findtext(tag) or "").strip() for tag in ("name", "difficult"))
        objects.append(_Object(name, (corners[0], corners[1], corners[2], corners[3]), difficult == "1"))
    try:
        size = int(float(root.findtext("size/width") or 0)), int(float(root.findtext("size/height") or 0))
    except ValueError:
        size = 0, 0
    image = PurePosixPath((root.findtext("filename") or "").strip().replace("\\", "/")).name
    return _Annotation(image, size if min(size) > 0 else None, objects)


def _boxes_of(objects: Sequence[_Object], ids: dict[str, int], first: float) -> list[Box]:
    """Return boxes counted from pixel 0, of corners counted from pixel `first`."""
    corners = [(ids[item.name], *item.corners) for item in objects]
    return [Box(k, left - first, top - first, right - left, low - top) for k, left, top, right, low in corners]


def _names_in(path: Path) -> list[str]:
    if not path.is_file():
        return []
    return [line.split()[0] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


# ---- a split, as effdet reads it -------------------------------------------------------------------------------------


@dataclass
class VocParserCfg:
    """How to read a split of a data set in Pascal VOC's format.

    Args:
        split_filename: file with an image name a line; or a list of them, as of the next two.
        ann_filename: path of an image's xml with %s for the name.
        img_filename: path of the image, relative to the image directory, with %s for the name.
        keep_difficult: train on objects marked as difficult; VOC's evaluation ignores them either way.
        classes: class names in the order of their labels; None: the 20 of Pascal VOC.
        add_background: labels count from 1; anything but True is refused.
        has_labels, bbox_yxyx, min_img_size, ignore_empty_gt: as in CocoParserCfg.
    """

    split_filename: str | Sequence[str]
    ann_filename: str | Sequence[str]
    img_filename: str | Sequence[str] = "%s.jpg"
    keep_difficult: bool = True
    classes: list | None = None
    add_background: bool = True
    has_labels: bool = True
    bbox_yxyx: bool = True
    min_img_size: int = 32
    ignore_empty_gt: bool = False


class VocParser(ConvertedParser):
    """A data set in Pascal VOC's format; class k of the list has category id k + 1."""

    def __init__(self, cfg: VocParserCfg) -> None:
        super().__init__(", ".join(_listed(cfg.split_filename)), read_voc, cfg)


def _listed(value: str | Path | Sequence[str]) -> list[str]:
    return [str(value)] if isinstance(value, (str, Path)) else [str(item) for item in value]


def read_voc(cfg: VocParserCfg) -> dict[str, Any]:
    """Convert a split to the content of a COCO json.

    All four coordinates are lowered by 1, as effdet does: VOC counts pixels from 1. Objects get the extra key
    `difficult`. An image's id is its name, with the year before it where several splits are joined.

    Raises:
        FileNotFoundError: no such split; DatasetError: xml files that are absent or broken, or classes that are not in
            the list.
    """
    parts = [_listed(value) for value in (cfg.split_filename, cfg.ann_filename, cfg.img_filename)]
    if len({len(part) for part in parts}) != 1:
        raise ValueError(
            f"split_filename, ann_filename and img_filename list {', '.join(str(len(p)) for p in parts)} "
            "entries: give as many of each"
        )
    ids = {name: number for number, name in enumerate(cfg.classes or VOC_CLASSES, start=1)}
    strange = f"objects of a class that is none of {', '.join(ids)}: list the set's own in the parser's `classes`"
    faults, items, difficult = Faults(", ".join(parts[0])), [], []
    for number, (split, ann, img) in enumerate(zip(*parts, strict=True)):
        if not Path(split).is_file():
            raise FileNotFoundError(f"{split} does not exist: it should list the names of the images, one a line")
        for name in _names_in(Path(split)):
            read = _read_xml(Path(ann % name))
            objects = read.objects if cfg.has_labels else []
            strangers = sorted({item.name for item in objects} - ids.keys())
            if read.fault or read.size is None:
                faults.add(read.fault or "xml files without a width and height of the image: add them", ann % name)
            elif strangers:
                faults.add(strange, f"{strangers[0]!r} in {ann % name}")
            else:
                image_id = name if len(parts[0]) == 1 else f"{number}/{name}"
                items.append(Labelled(img % name, *read.size, _boxes_of(objects, ids, 1.0), image_id))
                difficult += [item.difficult for item in objects]
    faults.raise_if_any()
    content = make_coco(items, {number: name for name, number in ids.items()}, EXACT)
    for row, is_difficult in zip(content["annotations"], difficult, strict=True):
        row["difficult"] = int(is_difficult)
        if is_difficult and not cfg.keep_difficult:
            row["ignore"] = 1
    return content


# ---- a folder --------------------------------------------------------------------------------------------------------


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
        names = {part: _names_in(tree.root / folder / f"{part}.txt") for part in ("train", "val", "test", "trainval")}
        names["train"] = names["train"] or names["trainval"]
        for part in ("train", "val", "test"):
            found.setdefault(part, []).extend(join(base, f"Annotations/{name}.xml") for name in names[part])
    return {part: paths for part, paths in found.items() if paths}


def _by_folders(xmls: list[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for path in xmls:
        found.setdefault(part_of(str(PurePosixPath(path).parent)) or "train", []).append(path)
    return {part: found[part] for part in ("train", "val", "test") if part in found}


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
        items.append(Labelled(image, *size, _boxes_of(annotation.objects, ids, first)))
    faults.leave_out(MISSING, len(paths))
    faults.leave_out(UNREADABLE, len(paths))
    faults.raise_if_any()
    return make_coco(items, {number: name for name, number in ids.items()})
