"""Small data sets in the shapes in which annotation tools write them, all of the same four images and six boxes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

ITEMS: dict[str, tuple[int, int, list[tuple[str, tuple[float, float, float, float]]]]] = {
    "one": (100, 80, [("cup", (10, 20, 30, 40)), ("dish", (50, 10, 20, 30))]),
    "two": (64, 48, [("cup", (4, 8, 16, 32))]),
    "three": (80, 100, [("dish", (8, 50, 40, 25)), ("cup", (1, 1, 20, 10))]),
    "four": (100, 100, [("dish", (25, 25, 50, 50))]),
}
"""Name -> width, height, and (class, x, y, width, height) of each box, in pixels."""
CLASSES = ("cup", "dish")
TRAIN, VAL = ("one", "two", "three"), ("four",)
ALL = (*TRAIN, *VAL)


def put_images(folder: Path, names: tuple[str, ...], suffix: str = ".jpg") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", ITEMS[name][:2], (len(name) * 30, 90, 90)).save(folder / f"{name}{suffix}")


def put_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def coco(names: tuple[str, ...], file_name: Callable[[str], str] = lambda name: f"{name}.jpg") -> dict[str, Any]:
    images = [
        {"id": k, "file_name": file_name(n), "width": ITEMS[n][0], "height": ITEMS[n][1]}
        for k, n in enumerate(names, 1)
    ]
    rows = [(k, label, box) for k, name in enumerate(names, 1) for label, box in ITEMS[name][2]]
    annotations = [
        {
            "id": i,
            "image_id": k,
            "category_id": CLASSES.index(label) + 1,
            "bbox": list(box),
            "area": box[2] * box[3],
            "iscrowd": 0,
        }
        for i, (k, label, box) in enumerate(rows, 1)
    ]
    return {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": k, "name": name} for k, name in enumerate(CLASSES, 1)],
    }


def put_json(path: Path, content: Any) -> None:
    put_text(path, json.dumps(content))


def yolo_rows(name: str, polygons: bool = False) -> str:
    width, height, boxes = ITEMS[name]
    lines = []
    for label, (x, y, w, h) in boxes:
        values = [(x + w / 2) / width, (y + h / 2) / height, w / width, h / height]
        if polygons:  # a diamond, whose bounding box is the box
            points = [(x + w / 2, y), (x + w, y + h / 2), (x + w / 2, y + h), (x, y + h / 2)]
            values = [part for px, py in points for part in (px / width, py / height)]
        lines.append(" ".join([str(CLASSES.index(label)), *(f"{value:.6f}" for value in values)]))
    return "\n".join(lines) + "\n"


def put_yolo(labels: Path, names: tuple[str, ...], polygons: bool = False) -> None:
    for name in names:
        put_text(labels / f"{name}.txt", yolo_rows(name, polygons))


def voc_xml(name: str, first: int = 1, size: bool = True) -> str:
    width, height, boxes = ITEMS[name]
    objects = "".join(
        f"<object><name>{label}</name><bndbox><xmin>{x + first}</xmin><ymin>{y + first}</ymin><xmax>{x + w + first}"
        f"</xmax><ymax>{y + h + first}</ymax></bndbox></object>"
        for label, (x, y, w, h) in boxes
    )
    sizes = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>" if size else ""
    return f"<annotation><filename>{name}.jpg</filename>{sizes}{objects}</annotation>"


# ---- one function for each tool: it fills a folder and returns what to type after --root -----------------------------


def coco_layout(root: Path) -> Path:
    for part, names in (("train", TRAIN), ("val", VAL)):
        put_images(root / f"{part}2017", names)
        put_json(root / f"annotations/instances_{part}2017.json", coco(names))
    return root


def coco_one_json(root: Path) -> Path:
    put_images(root / "images", ALL)
    put_json(root / "labels.json", coco(ALL))
    return root


def roboflow_coco(root: Path) -> Path:
    for part, names in (("train", TRAIN), ("valid", VAL)):
        put_images(root / part, names)
        content = coco(names)
        content["categories"].insert(0, {"id": 0, "name": "cups-and-dishes", "supercategory": "none"})
        put_json(root / part / "_annotations.coco.json", content)
    put_text(root / "README.roboflow.txt", "made with Roboflow")
    return root


def roboflow_yolo(root: Path) -> Path:
    for part, names in (("train", TRAIN), ("valid", VAL)):
        put_images(root / part / "images", names)
        put_yolo(root / part / "labels", names)
    put_text(
        root / "data.yaml",
        "train: ../train/images\nval: ../valid/images\ntest: ../test/images\nnc: 2\nnames: ['cup', 'dish']\n"
        "roboflow:\n  workspace: w\n",
    )
    return root


def roboflow_voc(root: Path) -> Path:
    for part, names in (("train", TRAIN), ("valid", VAL)):
        put_images(root / part, names)
        for name in names:
            put_text(root / part / f"{name}.xml", voc_xml(name))
    return root


def cvat_coco(root: Path) -> Path:
    put_images(root / "images", ALL)
    put_json(root / "annotations/instances_default.json", coco(ALL))
    return root


def cvat_yolo(root: Path) -> Path:
    put_images(root / "obj_train_data", ALL)
    put_yolo(root / "obj_train_data", ALL)
    put_text(root / "obj.names", "cup\ndish\n")
    put_text(root / "obj.data", "classes = 2\ntrain = data/train.txt\nnames = data/obj.names\nbackup = backup/\n")
    put_text(root / "train.txt", "".join(f"data/obj_train_data/{name}.jpg\n" for name in ALL))
    return root


def cvat_ultralytics(root: Path) -> Path:
    put_images(root / "images/train", ALL)
    put_yolo(root / "labels/train", ALL, polygons=True)
    put_text(root / "data.yaml", "names:\n  0: cup\n  1: dish\npath: .\ntrain: train.txt\n")
    put_text(root / "train.txt", "".join(f"data/images/train/{name}.jpg\n" for name in ALL))
    return root


def cvat_voc(root: Path) -> Path:
    put_images(root / "JPEGImages", ALL)
    for name in ALL:
        put_text(root / f"Annotations/{name}.xml", voc_xml(name))
    put_text(root / "ImageSets/Main/default.txt", "".join(f"{name}\n" for name in ALL))
    put_text(root / "labelmap.txt", "# label:color_rgb:parts:actions\ncup:::\ndish:::\n")
    return root


def label_studio_coco(root: Path) -> Path:
    put_images(root / "images", ALL)
    put_json(root / "result.json", coco(ALL, lambda name: f"images/{name}.jpg"))
    return root


def label_studio_windows(root: Path) -> Path:
    put_images(root / "images", ALL)
    put_json(root / "result.json", coco(ALL, lambda name: f"images\\{name}.jpg"))
    return root


def label_studio_yolo(root: Path) -> Path:
    put_images(root / "images", ALL)
    put_yolo(root / "labels", ALL)
    put_text(root / "classes.txt", "cup\ndish")
    put_json(root / "notes.json", {"categories": [{"id": 0, "name": "cup"}, {"id": 1, "name": "dish"}], "info": {}})
    return root


def via_coco(root: Path) -> Path:
    put_images(root, ALL)
    put_json(root / "via_project_1Jan2026_10h0m_coco.json", coco(ALL))
    return root


def labelme(root: Path) -> Path:
    put_images(root, ALL)
    for name in ALL:
        width, height, boxes = ITEMS[name]
        shapes = [
            {
                "label": label,
                "points": [[x, y], [x + w, y + h]],
                "group_id": None,
                "shape_type": "rectangle",
                "flags": {},
            }
            for label, (x, y, w, h) in boxes
        ]
        content = {"version": "5.4", "flags": {}, "shapes": shapes, "imagePath": f"{name}.jpg", "imageData": None}
        put_json(root / f"{name}.json", content | {"imageHeight": height, "imageWidth": width})
    return root


def x_anylabeling(root: Path) -> Path:
    put_images(root / "images", ALL)
    for name in ALL:
        width, height, boxes = ITEMS[name]
        shapes = [
            {"label": label, "points": [[x, y], [x + w, y], [x + w, y + h], [x, y + h]], "shape_type": "rectangle"}
            for label, (x, y, w, h) in boxes
        ]
        content = {"version": "2.4", "shapes": shapes, "imagePath": f"..\\images\\{name}.jpg", "imageData": None}
        put_json(root / f"labels/{name}.json", content | {"imageHeight": height, "imageWidth": width})
    return root


def labelme2coco(root: Path) -> Path:
    put_images(root / "photos", ALL)
    put_json(root / "dataset.json", coco(ALL, lambda name: f"photos/{name}.jpg"))
    return root


def makesense_coco(root: Path) -> Path:
    put_images(root, ALL)
    put_json(root / "labels_cups_2026-01-01-10-00-00.json", coco(ALL))
    return root


def makesense_yolo(root: Path) -> Path:
    put_images(root, ALL)
    put_yolo(root, ALL)
    put_text(root / "labels.txt", "cup\ndish\n")
    return root


def voc_devkit(root: Path) -> Path:
    base = root / "VOC2007"
    put_images(base / "JPEGImages", ALL)
    for name in ALL:
        put_text(base / f"Annotations/{name}.xml", voc_xml(name))
    for part, names in (("train", TRAIN), ("val", VAL), ("trainval", ALL)):
        put_text(base / f"ImageSets/Main/{part}.txt", "".join(f"{name}\n" for name in names))
    put_text(base / "ImageSets/Main/cup_train.txt", "".join(f"{name}  1\n" for name in TRAIN))
    return root


def labelimg_voc(root: Path) -> Path:
    put_images(root, ALL)
    for name in ALL:
        put_text(root / f"{name}.xml", voc_xml(name, size=False))
    return root


def yolo(root: Path) -> Path:
    for part, names in (("train", TRAIN), ("val", VAL)):
        put_images(root / "images" / part, names)
        put_yolo(root / "labels" / part, names)
    put_text(
        root / "cups.yaml",
        "path: ../datasets/cups\ntrain: images/train\nval: images/val\nnames:\n  0: cup\n  1: dish\n",
    )
    return root / "cups.yaml"


def lvis(root: Path) -> Path:
    put_images(root / "train2017", ALL)  # LVIS's validation images are COCO's training images, too
    for part, names in (("train", TRAIN), ("val", VAL)):
        content = coco(names)
        for row in content["images"]:
            row["coco_url"] = f"http://images.cocodataset.org/train2017/{row.pop('file_name')}"
        put_json(root / f"lvis_v1_{part}.json", content)
    return root


def open_images(root: Path) -> Path:
    put_text(root / "class-descriptions-boxable.csv", "/m/9,Zebra\n/m/1,cup\n/m/2,dish\n")
    header = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf\n"
    files = (("train", "oidv6-train", TRAIN), ("validation", "validation", VAL))
    for folder, name, names in files:
        put_images(root / folder, names)
        rows = [
            f"{image},xclick,/m/{CLASSES.index(label) + 1},1,{x / w},{(x + bw) / w},{y / h},{(y + bh) / h},0,0,0\n"
            for image in names
            for w, h, boxes in [ITEMS[image]]
            for label, (x, y, bw, bh) in boxes
        ]
        absent = "0000notdownloaded,xclick,/m/9,1,0,1,0,1,0,0,0\n"
        put_text(root / f"{name}-annotations-bbox.csv", header + absent + "".join(rows))
    return root


def supervisely(root: Path) -> Path:
    put_json(root / "meta.json", {"classes": [{"title": name, "shape": "rectangle"} for name in CLASSES], "tags": []})
    for part, names in (("train", TRAIN), ("val", VAL)):
        put_images(root / part / "img", names)
        for name in names:
            width, height, boxes = ITEMS[name]
            objects = [
                {
                    "classTitle": label,
                    "geometryType": "rectangle",
                    "points": {"exterior": [[x, y], [x + w, y + h]], "interior": []},
                }
                for label, (x, y, w, h) in boxes
            ]
            content = {"description": "", "tags": [], "size": {"height": height, "width": width}, "objects": objects}
            put_json(root / part / "ann" / f"{name}.jpg.json", content)
    return root


TOOLS: dict[str, Callable[[Path], Path]] = {
    "COCO": coco_layout,
    "one COCO json, one folder of images": coco_one_json,
    "Roboflow: COCO": roboflow_coco,
    "Roboflow: YOLO": roboflow_yolo,
    "Roboflow: Pascal VOC": roboflow_voc,
    "CVAT: COCO 1.0": cvat_coco,
    "CVAT: YOLO 1.1": cvat_yolo,
    "CVAT: Ultralytics YOLO": cvat_ultralytics,
    "CVAT: Pascal VOC 1.1": cvat_voc,
    "Label Studio: COCO": label_studio_coco,
    "Label Studio on Windows: COCO": label_studio_windows,
    "Label Studio: YOLO with images": label_studio_yolo,
    "VIA: COCO": via_coco,
    "LabelMe": labelme,
    "labelme2coco": labelme2coco,
    "makesense.ai: COCO": makesense_coco,
    "makesense.ai: YOLO": makesense_yolo,
    "X-AnyLabeling": x_anylabeling,
    "Pascal VOC": voc_devkit,
    "LabelImg": labelimg_voc,
    "YOLO": yolo,
    "LVIS": lvis,
    "Open Images": open_images,
    "Supervisely": supervisely,
}
"""The tools of the table in docs/own_data.md."""
WITH_VAL = {
    "COCO",
    "Roboflow: COCO",
    "Roboflow: YOLO",
    "Roboflow: Pascal VOC",
    "Pascal VOC",
    "YOLO",
    "LVIS",
    "Open Images",
    "Supervisely",
}
"""Those whose folder here has a validation part."""
