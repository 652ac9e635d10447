"""Read the json of an annotation file of COCO's size in little time.

Only about bytes and objects: what the json has to hold is `check.py`'s business.
"""

import contextlib
import functools
import gc
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypedDict

import msgspec

from .foreign import describe_bytes
from .report import DatasetError
from .rows import dicts


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Keep the garbage collector from looking through millions of new objects, none of which can be garbage yet.

    That takes as long again as the work itself on a file of COCO's size.
    """
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


_IMAGE_KEYS = ("id", "file_name", "width", "height")
_ANNOTATION_KEYS = ("id", "image_id", "category_id", "bbox", "area", "iscrowd", "ignore", "attributes")
# What is read only where an image has no file_name, or an annotation no bbox; it costs time and memory.
NAME_KEYS = ("coco_url", "path", "filename", "url")
POLYGON_KEY = "segmentation"


@functools.cache
def _decoder(image_keys: tuple[str, ...], annotation_keys: tuple[str, ...]) -> msgspec.json.Decoder:
    image = TypedDict("image", dict.fromkeys(image_keys, Any), total=False)  # type: ignore[misc]
    annotation = TypedDict("annotation", dict.fromkeys(annotation_keys, Any), total=False)  # type: ignore[misc]

    class _Lists(TypedDict):
        images: list[image]  # type: ignore[valid-type]
        annotations: list[annotation]  # type: ignore[valid-type]
        categories: list[Any]

    class _File(_Lists, total=False):
        info: Any
        licenses: Any

    return msgspec.json.Decoder(_File)


def read_json(path: str | Path) -> Any:
    """Parse a json, without those keys of images and annotations that box detection does not use.

    What is not in COCO's form, such as a text where a list belongs, comes as it stands.

    Raises:
        FileNotFoundError: no such file; DatasetError: it may not be read, or is no json.
    """
    path = Path(path)
    if not path.is_file():
        what = "is not a file" if path.exists() else "does not exist"
        raise FileNotFoundError(f"annotation file {path} {what}")
    try:
        raw = _as_utf8(path.read_bytes())
        data = _parse(raw, _IMAGE_KEYS, _ANNOTATION_KEYS)
        images, annotations = (_has_gap(data, *where) for where in (("images", "file_name"), ("annotations", "bbox")))
        if images or annotations:
            image_keys = _IMAGE_KEYS + (NAME_KEYS if images else ())
            data = _parse(raw, image_keys, _ANNOTATION_KEYS + ((POLYGON_KEY,) if annotations else ()))
    except PermissionError as e:
        raise DatasetError(
            f"annotation file {path} may not be read: permission denied. Change its permissions, or run "
            "as a user who may."
        ) from e
    except (ValueError, RecursionError) as e:  # JSONDecodeError, UnicodeDecodeError; lists in lists in lists
        raise DatasetError(f"{path} is not a COCO annotation file: no valid json ({e}){describe_bytes(raw)}") from e
    return data


def read_everything(path: str | Path) -> Any:
    """Parse a json that `read_json` has read before, with all its keys."""
    return json.loads(_as_utf8(Path(path).read_bytes()))


def _as_utf8(raw: bytes) -> bytes:
    """Return a json's bytes in UTF-8 and without a byte order mark, as far as they can be read at all."""
    encoding = json.detect_encoding(raw)
    if encoding == "utf-8":
        return raw
    try:
        return raw.decode(encoding, "surrogatepass").encode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return raw


def _parse(raw: bytes, image_keys: tuple[str, ...], annotation_keys: tuple[str, ...]) -> Any:
    try:
        return _decoder(image_keys, annotation_keys).decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _read_slowly(raw, {"images": image_keys, "annotations": annotation_keys})


def _read_slowly(raw: bytes, kept: dict[str, tuple[str, ...]]) -> Any:
    """Read what the decoder refuses: a file of another form, NaN, or no json at all."""
    data = json.loads(raw)
    for key, keys in kept.items():
        rows = data.get(key) if isinstance(data, dict) else None
        for row in rows if isinstance(rows, list) else ():
            for unused in row.keys() - set(keys) if isinstance(row, dict) else ():
                del row[unused]
    return data


def _has_gap(data: Any, rows: str, key: str) -> bool:
    """Tell whether an object of a list lacks a key, or has nothing under it."""
    listed = data.get(rows) if isinstance(data, dict) else None
    if not isinstance(listed, list):
        return False
    return not all(map(dict.get, dicts(listed), itertools.repeat(key)))
