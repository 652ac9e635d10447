"""Say what an annotation file is that is not in COCO's form, by the keys that other tools write."""

from typing import Any

from .report import shown

_EXPORT = "export the annotations as COCO there"
_CONVERT = "convert its files to one COCO json"

# (what it is, what to do, keys that its objects have)
_OBJECTS = (
    ("LabelMe's own format, one file for each image", _CONVERT, ("shapes", "imagePath")),
    ("a project of VIA", 'export the annotations in VIA as "COCO format"', ("_via_img_metadata",)),
    ("a project of VIA 3", 'export the annotations in VIA as "COCO format"', ("project", "config", "file")),
    ("a project of VoTT", _CONVERT, ("assets", "visitedFrames")),
    ("a project of VoTT", _CONVERT, ("asset", "regions")),
    ("Supervisely's own format, one file for each image", _EXPORT, ("objects", "size")),
    ("Datumaro's own format", _EXPORT, ("items", "categories")),
)
_ROWS = (
    ("a list of detections, as evaluations write them", "name the annotations they belong to", ("image_id", "score")),
    (
        "the annotations of a COCO json without its other lists",
        'put the list under "annotations", beside "images" and "categories"',
        ("image_id", "category_id"),
    ),
    ("Label Studio's own format", _EXPORT, ("annotations", "data")),
    ("Label Studio's own format", _EXPORT, ("completions", "data")),
    ("Label Studio's short format", _EXPORT, ("image", "label")),
    ("CreateML's format", _CONVERT, ("image", "annotations")),
    ("CreateML's format", _CONVERT, ("imagefilename", "annotation")),
    ("Labelbox's own format", _EXPORT, ("Labeled Data", "Label")),
    ("Labelbox's own format", _EXPORT, ("data_row", "projects")),
    ("BDD100K's format", _CONVERT, ("name", "labels")),
)
_VIA_ENTRY = {"filename", "regions"}  # of each image, under a key of its own
_LFS = b"version https://git-lfs"
_HEAD_BYTES = 4096


def describe_json(data: Any) -> str:
    """Return a clause that names the format of a parsed json and what to do with it; empty when it is unknown."""
    if isinstance(data, dict):
        if any(isinstance(value, dict) and value.keys() >= _VIA_ENTRY for value in list(data.values())[:1]):
            return '; these are annotations of VIA: export them there as "COCO format"'
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
    if head.startswith(_LFS):
        return "; this is a Git LFS pointer, a short text in place of the file: run git lfs pull"
    if head.startswith(b"<"):
        return "; this is xml, as Pascal VOC has it: python -m effdet.data.formats.to_coco converts it"
    lines = head.decode("utf-8", "replace").splitlines()
    starts = {line.partition(":")[0].strip() for line in lines if ":" in line}
    if {"names", "train"} <= starts or {"names", "val"} <= starts:
        return "; this is the yaml of a YOLO data set: convert that to COCO"
    first = lines[0].split(",") if lines else []
    if len(first) >= 4:
        return f"; this looks like csv with the columns {shown(', '.join(first))}: convert it to COCO"
    numbers = lines[0].split() if lines else []
    if len(numbers) in (5, 6) and all(_is_number(word) for word in numbers):
        return "; this looks like a label file of YOLO: convert the data set to COCO"
    return ""


def is_lfs_pointer(path: Any) -> bool:
    """Tell whether a file is a pointer that Git LFS leaves where the file itself was not fetched."""
    try:
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
