"""`recognise`: say what a folder of somebody's holds, and where its parts are. Nothing is written and no image read."""

from __future__ import annotations

from pathlib import Path

from ..coco.read import read_json
from ..coco.report import DatasetError
from ..dataset_config import Coco2017Cfg
from .coco_folders import find_coco, is_coco_json
from .found import FoundData, Part, Tree, look_into
from .one_json_each import find_one_json_each
from .open_images import find_open_images
from .voc import find_voc
from .yolo import find_yolo

_NEAR = 3  # folders below that of a single file in which its images are looked for
KNOWN = (
    "COCO's layout, the COCO exports of Roboflow, CVAT and Label Studio, one COCO json with images, YOLO, Pascal VOC, "
    "Open Images, LabelMe, Supervisely"
)


def recognise(root: str | Path) -> FoundData:
    """Recognise a data set.

    Args:
        root: its folder; or the file that describes it: data.yaml, obj.data, a COCO json.

    Raises:
        FileNotFoundError: no such folder, or it holds nothing that is known; the text has the flags that would help.
        DatasetError: it is known, but its parts cannot be told apart or files are missing.
    """
    path = Path(root)
    if not path.exists():
        raise FileNotFoundError(f"--root {root}: no such directory")
    if path.is_file():
        tree = look_into(path.parent, _NEAR)
        if path.suffix.lower() in (".yaml", ".yml", ".data"):
            found = find_yolo(tree, path.name)
        elif path.suffix.lower() == ".json" and not is_coco_json(path):
            read_json(path)  # has more to say about what is no json
            raise DatasetError(
                f"{path} is no COCO annotation file. Where there is a json for each image, name the folder"
            )
        else:
            found = find_coco(tree, path.name) if path.suffix.lower() == ".json" else None
    elif (layout := _coco_layout(path)) is not None:  # without a look at each of 118,000 images
        return layout
    else:
        tree = look_into(path)
        readers = (find_coco, find_yolo, find_voc, find_open_images, find_one_json_each)
        found = next((found for found in (reader(tree) for reader in readers) if found is not None), None)
    if found is None or not found.parts:
        raise FileNotFoundError(_unknown(path, tree))
    return found


def _coco_layout(root: Path) -> FoundData | None:
    """Recognise COCO's layout by one complete part; another that lacks its images or its json is reported when read."""
    parts, complete = {}, []
    for part in ("train", "val"):
        images, ann = _coco_part(root, part)
        if images.is_dir() or ann.is_file():
            parts[part] = Part(images, ann)
        if images.is_dir() and ann.is_file():
            complete.append(f"{part}2017/")
    return FoundData("COCO", parts, f"{root}: COCO's layout, {' and '.join(complete)}") if complete else None


def _coco_part(root: Path, part: str) -> tuple[Path, Path]:
    split = Coco2017Cfg().splits[part]
    return root / split["img_dir"], root / split["ann_filename"]


def _unknown(path: Path, tree: Tree) -> str:
    """Say what is there instead, and the flags with what could stand behind them."""
    inside = sorted({name for name in tree.folders if name and "/" not in name})
    inside = [f"{name}/" for name in inside] + sorted(name for kind in tree.folders[""].values() for name in kind)
    jsons = [str(tree.root / name) for name in tree.files(".json", 40)]
    folders = [str(tree.root / name) for name in tree.image_folders()] or ["DIR"]
    count = len(tree.images_in())
    halves = [_coco_part(path, part) for part in ("train", "val")]
    absent = [str(half) for pair in halves for half in pair if any(map(Path.exists, pair)) and not half.exists()]
    layout = f" For COCO's layout {' and '.join(absent)} absent." if absent else ""
    return (
        f"{path} is no data set of a known form ({KNOWN}): it holds {', '.join(inside[:12]) or 'nothing'}"
        f"{', ...' if len(inside) > 12 else ''}, with {count} images in all.{layout} If its annotations are in COCO's "
        f"format, name the files: --train-images {folders[0]} --train-ann {(jsons or ['FILE.json'])[0]} "
        f"--val-images {folders[1 % len(folders)]} --val-ann {(jsons or ['FILE.json'])[-1]} (without the last two, a "
        "part of the training images is held out). docs/own_data.md says what to type for each annotation tool"
    )
