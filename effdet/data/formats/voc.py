"""Read Pascal VOC: a file of image names and one xml for each image, converted to the content of a COCO json."""

import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..coco.report import DatasetError
from .converted import ConvertedParser

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
        FileNotFoundError: no such split or xml; DatasetError: broken xml, or a class that is not in the list.
    """
    parts = [_listed(value) for value in (cfg.split_filename, cfg.ann_filename, cfg.img_filename)]
    if len({len(part) for part in parts}) != 1:
        raise ValueError(
            f"split_filename, ann_filename and img_filename list {', '.join(str(len(p)) for p in parts)} "
            "entries: give as many of each"
        )
    classes = list(cfg.classes or VOC_CLASSES)
    ids = {name: number for number, name in enumerate(classes, start=1)}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, (split, ann, img) in enumerate(zip(*parts, strict=True)):
        if not Path(split).is_file():
            raise FileNotFoundError(f"{split} does not exist: it should list the names of the images, one a line")
        for line in Path(split).read_text(encoding="utf-8").splitlines():
            if not line.strip():
                continue
            name = line.split()[0]
            image_id = name if len(parts[0]) == 1 else f"{number}/{name}"
            path = Path(ann % name)
            root = _parse(path)
            images.append(
                {
                    "id": image_id,
                    "file_name": img % name,
                    "width": _number(root, "size/width", path),
                    "height": _number(root, "size/height", path),
                }
            )
            for item in root.findall("object") if cfg.has_labels else ():
                annotations.append(
                    _convert_object(item, path, ids, cfg.keep_difficult)
                    | {"id": len(annotations) + 1, "image_id": image_id}
                )
    return {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for name, number in ids.items()],
    }


def _parse(path: Path) -> ElementTree.Element:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: every image of the split needs its xml")
    try:
        return ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        raise DatasetError(f"{path} is no valid xml ({error})") from error


def _number(element: ElementTree.Element, tag: str, path: Path) -> float:
    text = element.findtext(tag)
    try:
        return float(text)
    except (TypeError, ValueError):
        raise DatasetError(f"{path} has {text!r} as {tag} where a number is needed") from None


def _convert_object(item: ElementTree.Element, path: Path, ids: dict[str, int], keep_difficult: bool) -> dict[str, Any]:
    name = (item.findtext("name") or "").strip()
    if name not in ids:
        raise DatasetError(
            f"{path} has an object of the class {name!r}, which is none of {', '.join(ids)}: list the "
            "data set's own classes in the parser's `classes`"
        )
    x_min, y_min, x_max, y_max = (_number(item, f"bndbox/{side}", path) for side in ("xmin", "ymin", "xmax", "ymax"))
    difficult = int((item.findtext("difficult") or "0").strip() == "1")
    return {
        "category_id": ids[name],
        "bbox": [x_min - 1, y_min - 1, x_max - x_min, y_max - y_min],
        "iscrowd": 0,
        "area": (x_max - x_min) * (y_max - y_min),
        "difficult": difficult,
        **({"ignore": 1} if difficult and not keep_difficult else {}),
    }
