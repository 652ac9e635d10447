"""Check a COCO json before anything is trained on it.

`check_coco` turns the parsed json into plain arrays and puts every defect into a `DatasetReport`. Defects never stop it
half way: the caller raises once, with all of them. Reading files is `read.py`'s business, serving items
`annotations.py`'s.
"""

import posixpath
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..corrupt import default_limit
from ..images import ImageError, read_size
from .boxes import check_boxes, to_array
from .categories import find_shared_names
from .foreign import describe_json
from .locate import escapes, find_files, find_lfs_pointers, is_image_outside
from .mend import mend_json
from .report import DatasetError, DatasetReport, shown
from .rows import IDS, NUMBERS, Columns, Refused, column, is_set, sound_rows

MADE_FROM = "made_from"  # key in the info of a json that was made for a run
_UNKNOWN_PX = 64  # side of an image without a size and without boxes


@dataclass
class CocoArrays:
    """The used part of an annotation file, images sorted by id.

    `boxes_yxyx` float32 [n, 4], `category_ids` int64 [n] and `is_crowd` bool [n] hold the rows of image k at
    offsets[k]:offsets[k + 1].
    """

    categories: list[dict[str, Any]]
    img_infos: list[dict[str, Any]]
    offsets: np.ndarray
    boxes_yxyx: np.ndarray
    category_ids: np.ndarray
    is_crowd: np.ndarray


def check_coco(
    data: Any, source: str, img_dir: Path | None, has_labels: bool, keep_crowd: bool, max_bad: int | None = 0
) -> tuple[CocoArrays, DatasetReport]:
    """Check a parsed COCO json and pack its boxes into arrays.

    Args:
        data: the parsed json; what other tools write is brought into COCO's form in place (mend.py).
        source: its name, for messages.
        img_dir: where the images are; None skips the checks that need files.
        has_labels: False for a file that lists images only.
        keep_crowd: keep crowd regions as rows with is_crowd set, instead of dropping them.
        max_bad: images that may be absent or unreadable without being an error; None: `default_limit`, at most half.

    Returns:
        The arrays (not usable when the report has errors) and the report.

    Raises:
        DatasetError: the json is not in COCO's form at all.
    """
    require_lists(data, source, ("images", "annotations", "categories") if has_labels else ("images",))
    report = DatasetReport(source=source)
    columns = mend_json(data, report)
    refused = Refused()
    rows = data.get("categories")
    categories = _check_categories(rows if isinstance(rows, list) else [], report, has_labels)
    refused.unknown_categories = bool({"category_fields", "no_categories"} & report.errors.keys())
    infos = _check_images(data["images"], report, img_dir, max_bad, refused)
    annotations = data["annotations"] if has_labels else []
    image_at = {info["id"]: k for k, info in enumerate(infos)}
    if (
        columns is None or report.errors or not has_labels
    ):  # else what was sound with all images and categories is so with these
        used = sound_rows(annotations, image_at.keys(), {c["id"] for c in categories}, report, refused)
        columns = Columns(*(column(used, key) for key in ("image_id", "category_id", "bbox")))
    else:
        used = annotations
    packed = _pack_annotations(used, columns, image_at, infos, report, keep_crowd)
    arrays = CocoArrays(categories, infos, *packed)
    _give_sizes(arrays)
    report.num_images, report.num_annotations, report.num_categories = len(infos), len(annotations), len(categories)
    report.num_boxes = int((~arrays.is_crowd).sum())
    report.num_images_without_boxes = len(infos) - len(np.unique(_row_images(arrays)[~arrays.is_crowd]))
    if has_labels:
        _compare_listed_again(arrays, report)
    return arrays, report


def require_lists(data: Any, source: str, lists: Sequence[str]) -> None:
    """Raise DatasetError where a parsed json has not these lists of COCO's form; it says what form it has instead."""
    absent = [k for k in lists if not isinstance(data, dict) or not isinstance(data.get(k), list)]
    if absent:
        got = f"keys {sorted(map(shown, data))[:8]}" if isinstance(data, dict) else f"a {type(data).__name__}"
        raise DatasetError(
            f"{source} is not a COCO annotation file: it needs the lists {', '.join(lists)}; "
            f"{', '.join(absent)} missing, found {got}{describe_json(data)}"
        )


def name_source(data: Any, path: Path) -> str:
    """Name an annotation file; of one that was made for a run, the file it was made from too."""
    info = data.get("info") if isinstance(data, dict) else None
    origin = info.get(MADE_FROM) if isinstance(info, dict) else None
    return f"{path} (made from {shown(origin)})" if isinstance(origin, str) else str(path)


def _give_sizes(arrays: CocoArrays) -> None:
    """Let images whose size nothing tells, as they cannot be read, reach to the last of their boxes."""
    for k, info in enumerate(arrays.img_infos):
        if not info["width"]:
            boxes = arrays.boxes_yxyx[arrays.offsets[k] : arrays.offsets[k + 1]]
            info["height"], info["width"] = np.ceil(boxes[:, 2:].max(axis=0, initial=_UNKNOWN_PX)).astype(int).tolist()


def _row_images(arrays: CocoArrays) -> np.ndarray:
    return np.repeat(np.arange(len(arrays.img_infos)), np.diff(arrays.offsets))


def _check_categories(rows: list, report: DatasetReport, has_labels: bool) -> list[dict[str, Any]]:
    if has_labels and not rows:
        report.add("no_categories", "")
    seen: dict[int, dict[str, Any]] = {}
    for row in rows:
        cat_id = row.get("id") if isinstance(row, dict) else None
        if type(cat_id) is not int or not -(2**63) <= cat_id < 2**63:
            report.add("category_fields", repr(row)[:60])
        elif cat_id in seen:
            report.add("duplicate_category_id", f"id {cat_id}: {seen[cat_id]['name']!r} and {row.get('name')!r}")
        else:
            seen[cat_id] = {"id": cat_id, "name": shown(str(row.get("name", cat_id)))}
    categories = [seen[k] for k in sorted(seen)]
    report.add_all("shared_name", find_shared_names(categories))
    return categories


def _is_side(value: Any) -> bool:
    return type(value) in NUMBERS and 1 <= value < 2**31


def _check_images(
    rows: list, report: DatasetReport, img_dir: Path | None, max_bad: int | None, refused: Refused
) -> list[dict[str, Any]]:
    infos: dict[Any, dict[str, Any]] = {}
    sizeless: list[dict[str, Any]] = []
    escaping: list[dict[str, Any]] = []
    for row in rows:
        img_id, name = (row.get("id"), row.get("file_name")) if isinstance(row, dict) else (None, None)
        if type(img_id) not in IDS or not isinstance(name, str) or not name:
            report.add("image_fields", repr(row)[:60])
            if type(img_id) in IDS:
                refused.images.add(img_id)
            else:
                refused.unknown_images = True
            continue
        if img_id in infos:
            report.add("duplicate_image_id", f"id {img_id}: {infos[img_id]['file_name']} and {name}")
            continue
        info = {"id": img_id, "file_name": name, "width": row.get("width"), "height": row.get("height")}
        infos[img_id] = info
        if _is_side(info["width"]) and _is_side(info["height"]):
            info["width"], info["height"] = int(info["width"]), int(info["height"])
        else:
            info["width"], info["height"] = 0, 0
            sizeless.append(info)
        if img_dir is None and escapes(name):
            if is_image_outside(name, None):
                report.add("outside_image", name)
            else:
                escaping.append(info)
    if img_dir is None:
        report.add_all("escaping_file_name", [f"{info['file_name']!r} of image {info['id']}" for info in escaping])
        report.add_all("no_size", list(map(_example, sizeless)))
    else:
        escaping = check_files(list(infos.values()), img_dir, report, max_bad, sizeless)
    for info in escaping:
        refused.images.add(info["id"])
        del infos[info["id"]]
    return [infos[k] for k in sorted(infos, key=lambda k: (isinstance(k, str), k))]


def _example(info: dict[str, Any]) -> str:
    return f"image {info['id']} {info['file_name']}"


def check_files(
    infos: list[dict[str, Any]],
    img_dir: Path,
    report: DatasetReport,
    max_bad: int | None = 0,
    sizeless: list[dict[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Look for every image's file; set names right that are certain to be another, and sizes that the json lacks.

    Images that are absent, or unreadable and without a size, are errors when they are more than `max_bad`, else named
    as images that cannot be read.

    Args:
        infos: of the images; 'file_name', 'width' and 'height' may be changed.
        img_dir: the image directory.
        report: gets what was found.
        max_bad: see `check_coco`.
        sizeless: those of `infos` without a size.

    Returns:
        Those whose names lead out of the directory, to no file.

    Raises:
        DatasetError: a directory may not be read.
    """
    lost, escaping = find_files(infos, img_dir, report)
    gone = {info["id"] for info in lost + escaping}
    pointers = find_lfs_pointers([info for info in infos if info["id"] not in gone] if gone else infos, img_dir)
    gone |= {info["id"] for info in pointers}
    report.add_all("lfs_pointer", list(map(_example, pointers)))
    unsized = []
    for info in sizeless or ():
        if info["id"] not in gone:
            try:
                info["width"], info["height"] = read_size(img_dir / info["file_name"])
            except ImageError:
                unsized.append(info)
            else:
                report.add("size_from_file", _example(info))
    limit = min(default_limit(len(infos)), len(infos) // 2) if max_bad is None else max_bad
    allowed = len(lost) + len(unsized) <= min(limit, len(infos) - 1)
    report.add_all("absent_image" if allowed else "missing_image", list(map(_example, lost)))
    report.add_all("unsized_image" if allowed else "unreadable_image", list(map(_example, unsized)))
    return escaping


def _pack_annotations(
    rows: list[dict[str, Any]],
    columns: Columns,
    image_at: dict[Any, int],
    infos: list[dict[str, Any]],
    report: DatasetReport,
    keep_crowd: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns (offsets, boxes_yxyx, category_ids, is_crowd) of CocoArrays."""
    xywh = to_array(columns.boxes)
    image = np.fromiter(map(image_at.__getitem__, columns.image_ids), dtype=np.int64, count=len(rows))
    cats = np.fromiter(columns.category_ids, dtype=np.int64, count=len(rows))
    is_crowd = _flags(column(rows, "iscrowd")) | _flags(column(rows, "ignore"))
    yxyx, keep = check_boxes(xywh, image, cats, is_crowd, infos, rows, report, keep_crowd)
    order = np.flatnonzero(keep)
    order = order[np.argsort(image[order], kind="stable")]
    offsets = np.zeros(len(infos) + 1, dtype=np.int64)
    np.cumsum(np.bincount(image[order], minlength=len(infos)), out=offsets[1:])
    return offsets, yxyx[order].astype(np.float32), cats[order], is_crowd[order]


def _flags(values: list) -> np.ndarray:
    if not any(values):  # nearly always
        return np.zeros(len(values), dtype=bool)
    plain = {int, bool, type(None)}.issuperset(map(type, values))
    return np.array(list(map(bool if plain else is_set, values)), dtype=bool)


def boxes_of(arrays: CocoArrays, k: int) -> set[tuple[float, ...]]:
    """Return the boxes and category ids of the k-th image, crowd regions aside, to compare with another image's."""
    span = slice(arrays.offsets[k], arrays.offsets[k + 1])
    kept = ~arrays.is_crowd[span]
    rows = np.column_stack([arrays.boxes_yxyx[span], arrays.category_ids[span]])[kept]
    return set(map(tuple, rows.round(1).tolist()))


def _compare_listed_again(arrays: CocoArrays, report: DatasetReport) -> None:
    """Name the files that several ids have: with the same boxes, or with others."""
    names = [info["file_name"] for info in arrays.img_infos]
    names = [posixpath.normpath(name) if "/" in name else name for name in names]
    if len(set(names)) == len(names):
        return
    places: dict[str, list[int]] = {}
    for k, name in enumerate(names):
        places.setdefault(name, []).append(k)
    for name, which in places.items():
        if len(which) > 1:
            boxes = [boxes_of(arrays, k) for k in which]
            same = all(one == boxes[0] for one in boxes)
            ids = ", ".join(str(arrays.img_infos[k]["id"]) for k in which)
            report.add("listed_again" if same else "split_boxes", f"{name} with ids {ids}")
            report.hidden_images += sum(not one for one in boxes) if any(boxes) else 0
