"""Read Open Images: csv files of classes, image sizes and boxes, converted to the content of a COCO json."""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..coco.report import DatasetError
from .converted import ConvertedParser


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
        rows = [row for row in csv.reader(file) if row]
    ids = {row[0]: number for number, row in enumerate(rows, start=1)}
    categories = [{"id": ids[row[0]], "name": row[1] if len(row) > 1 else row[0]} for row in rows]
    sizes = {
        row["id"]: (float(row["width"]), float(row["height"]))
        for row in _rows(cfg.img_info_filename, ("id", "width", "height"))
    }
    annotations: list[dict[str, Any]] = []
    if cfg.has_labels:
        for row in _rows(cfg.bbox_filename, ("ImageID", "LabelName", "XMin", "XMax", "YMin", "YMax")):
            image_id, label = row["ImageID"], row["LabelName"]
            if label not in ids or image_id not in sizes:
                what, where = (
                    (f"label {label}", cfg.categories_filename)
                    if label not in ids
                    else (f"image {image_id}", cfg.img_info_filename)
                )
                raise DatasetError(f"{cfg.bbox_filename} has a box of the {what}, which is not in {where}")
            width, height = sizes[image_id]
            x_min, x_max = float(row["XMin"]) * width, float(row["XMax"]) * width
            y_min, y_max = float(row["YMin"]) * height, float(row["YMax"]) * height
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": ids[label],
                    "bbox": [x_min, y_min, x_max - x_min, y_max - y_min],
                    "area": (x_max - x_min) * (y_max - y_min),
                    "iscrowd": int(row.get("IsGroupOf") == "1"),
                }
            )
    listed = sorted({row["image_id"] for row in annotations}) if cfg.has_labels else list(sizes)
    images = [
        {
            "id": image_id,
            "file_name": "/".join([*image_id[: cfg.prefix_levels], cfg.img_filename % image_id]),
            "width": sizes[image_id][0],
            "height": sizes[image_id][1],
        }
        for image_id in listed
    ]
    return {"images": images, "annotations": annotations, "categories": categories}


def _open(path: str | Path) -> Any:
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"{path} does not exist; Open Images keeps it with its annotations (sizes of images: "
            "a csv with the columns id, width, height, made from the files)"
        )
    return open(path, newline="", encoding="utf-8")


def _rows(path: str | Path, columns: tuple[str, ...]) -> Iterator[dict[str, str]]:
    with _open(path) as file:
        reader = csv.DictReader(file)
        missing = [column for column in columns if column not in (reader.fieldnames or ())]
        if missing:
            raise DatasetError(f"{path} lacks the columns {', '.join(missing)}; it has {reader.fieldnames}")
        yield from reader
