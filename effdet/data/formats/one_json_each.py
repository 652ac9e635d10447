"""Read tools that write a json for each image: LabelMe (also X-AnyLabeling's own files) and Supervisely."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from .coco_folders import WRITTEN_BY
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
    make_coco,
    map_files,
    part_of,
    place_image,
)

_AREAS = ("rectangle", "polygon", "circle", "rotation", "mask", "bitmap")  # shapes that have a box


class _Shape(NamedTuple):
    label: str
    xs: Sequence[float]
    ys: Sequence[float]


class _Image(NamedTuple):
    name: str
    size: tuple[int, int] | None
    shapes: list[_Shape]
    fault: str = ""


def find_one_json_each(tree: Tree) -> FoundData | None:
    """Recognise LabelMe's or Supervisely's files; None where the folder has neither."""
    jsons = tree.files(".json")
    kinds = {path: _kind(tree.root / path) for path in jsons[:40]}
    kind = next((kind for kind in kinds.values() if kind), "")
    if not kind:
        return None
    listed: dict[str, list[str]] = {}
    for path in jsons:
        if (PurePosixPath(path).parent.name == "ann" or kind == "LabelMe") and kinds.get(path, kind) == kind:
            listed.setdefault(part_of(str(PurePosixPath(path).parent)) or "train", []).append(path)
    parts = {part: Part(tree.root) for part in ("train", "val", "test") if part in listed}
    if not parts:
        return None

    @functools.cache
    def read() -> dict[str, _Image]:
        paths = [path for part in listed.values() for path in part]
        reader = _read_labelme if kind == "LabelMe" else _read_supervisely
        return dict(zip(paths, map_files(lambda path: _read(tree.root / path, reader), paths), strict=True))

    def convert(part: str) -> dict[str, Any]:
        names = sorted({shape.label for image in read().values() for shape in image.shapes})
        return _to_coco(tree, part, {path: read()[path] for path in listed[part]}, names)

    counts = ", ".join(f"{part}: {len(listed[part])} json files" for part in parts)
    return FoundData(kind, parts, f"{tree.root}: {kind}, {counts}", convert)


def _kind(path: Path) -> str:
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.stat().st_size < 2**26 else None
    except (OSError, ValueError):
        return ""
    if not isinstance(content, dict) or content.get("contributor") == WRITTEN_BY:
        return ""
    if isinstance(content.get("shapes"), list):
        return "LabelMe"
    return "Supervisely" if isinstance(content.get("objects"), list) and isinstance(content.get("size"), dict) else ""


def _read(path: Path, reader: Any) -> _Image:
    try:
        return reader(path, json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
        return _Image("", None, [], f"files that cannot be read as the tool's ({what[:60]}) - correct them")


def _read_labelme(path: Path, content: dict[str, Any]) -> _Image:
    shapes: dict[Any, _Shape] = {}
    for number, row in enumerate(content["shapes"]):
        kind, points = row.get("shape_type") or "polygon", row["points"]
        if kind not in _AREAS or len(points) < 2:
            continue
        xs, ys = [float(x) for x, _ in points], [float(y) for _, y in points]
        if kind == "circle":  # its centre, and a point on it
            radius = math.dist(points[0], points[1])
            xs, ys = [xs[0] - radius, xs[0] + radius], [ys[0] - radius, ys[0] + radius]
        group = row.get("group_id")  # the shapes of one object share it
        key = (row["label"], group) if group is not None and kind == "polygon" else number
        before = shapes.get(key, _Shape(str(row["label"]), [], []))
        shapes[key] = before._replace(xs=[*before.xs, *xs], ys=[*before.ys, *ys])
    width, height = content.get("imageWidth"), content.get("imageHeight")
    size = (int(width), int(height)) if width and height else None
    name = PurePosixPath(str(content.get("imagePath") or "").replace("\\", "/")).name
    return _Image(name or path.stem, size, list(shapes.values()))


def _read_supervisely(path: Path, content: dict[str, Any]) -> _Image:
    shapes = []
    for row in content["objects"]:
        points = row.get("points", {}).get("exterior") or []
        if len(points) >= 2 and row.get("geometryType", "rectangle") in _AREAS:
            shapes.append(_Shape(str(row["classTitle"]), [float(x) for x, _ in points], [float(y) for _, y in points]))
    return _Image(path.stem, (int(content["size"]["width"]), int(content["size"]["height"])), shapes)


def _to_coco(tree: Tree, part: str, images: dict[str, _Image], names: list[str]) -> dict[str, Any]:
    faults, items = Faults(f"{tree.root} ({part})"), []
    ids = {name: number for number, name in enumerate(names, start=1)}
    for path, image in images.items():
        if image.fault:
            faults.add(image.fault, path)
            continue
        found = place_image(tree, faults, path, image.name, image.size)
        if found is None:
            continue
        place, size = found
        boxes: list[Box] = [bounding_box(ids[shape.label], shape.xs, shape.ys) for shape in image.shapes]
        items.append(Labelled(place, *size, boxes))
    for kind in (MISSING, UNREADABLE):
        faults.leave_out(kind, len(images))
    faults.raise_if_any()
    return make_coco(items, {number: name for name, number in ids.items()})
