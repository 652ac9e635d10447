"""Say what an annotation file is that is not in COCO's form, by the keys that other tools write."""

import json
import os
from typing import Any

from .report import shown

_EXPORT = "export the annotations as COCO there"
_FOLDER = "name the folder of all of them with --root DIR"
_CONVERT = "convert it to COCO"
_VIA = 'export the annotations in VIA as "COCO format"'

# (what it is, what to do, keys that its objects have)
_OBJECTS = (
    ("LabelMe's own format, one file for each image", _FOLDER, ("shapes", "imagePath")),
    ("Supervisely's own format, one file for each image", _FOLDER, ("objects", "size")),
    ("a project of VIA", _VIA, ("_via_img_metadata",)),
    ("a project of VIA 3", _VIA, ("project", "config", "file")),
    ("a project of VoTT", _CONVERT, ("assets", "visitedFrames")),
    ("a file of VoTT", _CONVERT, ("asset", "regions")),
    ("Datumaro's own format", _EXPORT, ("items", "categories")),
    ("a task of Label Studio", _EXPORT, ("annotations", "data")),
    ("V7's own format", _EXPORT, ("item", "annotations")),
    ("SuperAnnotate's own format", _EXPORT, ("metadata", "instances")),
    ("MMDetection's own format", _CONVERT, ("metainfo", "data_list")),
    ("CreateML's format", _CONVERT, ("image", "annotations")),
)
_ROWS = (
    ("a list of detections, as evaluations write them", "name the annotations they belong to", ("image_id", "score")),
    (
        "the annotations of a COCO json without its other lists",
        'put the list under "annotations", beside "images" and "categories"',
        ("image_id", "category_id"),
    ),
    ("a COCO json within brackets", "take the outer [ ] away", ("images", "annotations", "categories")),
    ("Label Studio's own format", _EXPORT, ("annotations", "data")),
    ("Label Studio's own format", _EXPORT, ("completions", "data")),
    ("Label Studio's short format", _EXPORT, ("image", "label")),
    ("CreateML's format", _CONVERT, ("image", "annotations")),
    ("CreateML's format", _CONVERT, ("imagefilename", "annotation")),
    ("Labelbox's own format", _EXPORT, ("Labeled Data", "Label")),
    ("Labelbox's own format", _EXPORT, ("data_row", "projects")),
    ("BDD100K's format", _CONVERT, ("name", "labels")),
    ("Detectron2's list of images", _CONVERT, ("file_name", "annotations")),
    ("MMDetection's list of images", _CONVERT, ("filename", "ann")),
)
_STARTS = (
    (b"version https://git-lfs", "a Git LFS pointer, a short text in place of the file: run git lfs pull"),
    (b"<!doctype html", "a web page, as a download without permission leaves it: fetch the file again"),
    (b"<html", "a web page, as a download without permission leaves it: fetch the file again"),
    (b"<", f"xml, as Pascal VOC has it for each image: {_FOLDER}"),
    (b"PK\x03\x04", "a zip archive: unpack it"),
    (b"\x1f\x8b", "a gzip archive: unpack it"),
)
_VIA_ENTRY = {"filename", "regions"}  # of each image, under a key of its own
_LFS = _STARTS[0][0]
_HEAD_BYTES = 4096


def describe_json(data: Any) -> str:
    """Return a clause that names the format of a parsed json and what to do with it; empty when it is unknown."""
    if isinstance(data, dict):
        first = next(iter(data.values()), None)
        if isinstance(first, dict) and first.keys() >= _VIA_ENTRY:
            return f"; these are annotations of VIA: {_VIA}"
        return _look_up(data, _OBJECTS)
    if isinstance(data, list) and data and isinstance(data[0], dict):
        return _look_up(data[0], _ROWS)
    return ""


def _look_up(row: dict, formats: tuple[tuple[str, str, tuple[str, ...]], ...]) -> str:
    for what, remedy, keys in formats:
        if row.keys() >= set(keys):
            return f"; this is {what}: {remedy}"
    return ""


def describe_bytes(raw: bytes) -> str:
    """Return the same for what is no json at all."""
    head = raw[:_HEAD_BYTES].lstrip(b"\xef\xbb\xbf \t\r\n")
    for start, what in _STARTS:
        if head.lower().startswith(start.lower()):
            return f"; this is {what}"
    lines = head.decode("utf-8", "replace").splitlines() or [""]
    starts = {line.partition(":")[0].strip() for line in lines if ":" in line}
    if {"names", "train"} <= starts or {"names", "val"} <= starts:
        return "; this is the yaml of a YOLO data set: name it, or its folder, with --root"
    words = lines[0].split()
    if len(words) >= 5 and all(map(_is_number, words)):
        return f"; this looks like a label file of YOLO: {_FOLDER}"
    if _is_object(lines[0]) and len(lines) > 1:
        return f"; this is JSON Lines, an object a line: {_CONVERT}"
    columns = lines[0].split(",")
    if len(columns) >= 4 and not lines[0].startswith(("{", "[")):
        return f"; this looks like csv with the columns {shown(', '.join(columns))}: {_CONVERT}"
    return ""


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def is_lfs_pointer(path: Any) -> bool:
    """Tell whether a file is a pointer that Git LFS leaves where the file itself was not fetched."""
    try:
        if not os.path.isfile(path):  # a pipe would keep whoever opens it
            return False
        with open(path, "rb") as file:
            return file.read(len(_LFS)) == _LFS
    except (OSError, ValueError):  # ValueError: no file can have this name
        return False


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
