"""Read the json of an annotation file of COCO's size in little time.

Only about bytes and objects: what the json has to hold is `check.py`'s business.
"""

import contextlib
import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypedDict

import msgspec

from .report import DatasetError


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


class _Image(TypedDict, total=False):
    id: Any
    file_name: Any
    width: Any
    height: Any


class _Annotation(TypedDict, total=False):
    id: Any
    image_id: Any
    category_id: Any
    bbox: Any
    area: Any
    iscrowd: Any
    ignore: Any


class _Lists(TypedDict):
    images: list[_Image]
    annotations: list[_Annotation]
    categories: list[Any]


class _File(_Lists, total=False):
    info: Any
    licenses: Any


_DECODER = msgspec.json.Decoder(_File)


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
        raw = path.read_bytes()
        try:
            return _DECODER.decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return _read_slowly(raw)
    except PermissionError as e:
        raise DatasetError(
            f"annotation file {path} may not be read: permission denied. Change its permissions, or run "
            "as a user who may."
        ) from e
    except (ValueError, RecursionError) as e:  # JSONDecodeError, UnicodeDecodeError; lists in lists in lists
        raise DatasetError(f"{path} is not a COCO annotation file: no valid json ({e})") from e


def _read_slowly(raw: bytes) -> Any:
    """Read what the decoder refuses: a file of another form, NaN, UTF-16, or no json at all."""
    data = json.loads(raw)
    for key, form in (("images", _Image), ("annotations", _Annotation)):
        rows = data.get(key) if isinstance(data, dict) else None
        for row in rows if isinstance(rows, list) else ():
            for unused in row.keys() - form.__annotations__.keys() if isinstance(row, dict) else ():
                del row[unused]
    return data
