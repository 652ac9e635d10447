"""Read the json of an annotation file of COCO's size in little time.

Only about bytes and objects: what the json has to hold is `coco_check.py`'s business.
"""

import contextlib
import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .dataset_report import DatasetError


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


_KEY = b'"segmentation":'


def without_polygons(raw: bytes) -> bytes:
    """Put a 0 for each list of polygons in the bytes of a json.

    Polygons are most of an annotation file, no box needs them, and stepping over them is many times faster than
    parsing their numbers. A list with anything but numbers in it, or with brackets that do not match, stays, for the
    json parser to judge.
    """
    head, *tails = raw.split(_KEY)
    ends = [_end_of_list(tail) for tail in tails]
    shapes = _shapes([tail[:end] for tail, end in zip(tails, ends, strict=True)])
    is_numbers = {shape: _is_numbers(shape) for shape in set(shapes)}
    pieces, before = [head], head
    for tail, end, shape in zip(tails, ends, shapes, strict=True):
        quoted = before.endswith(b"\\")  # then the key is part of some text
        pieces += (_KEY, tail) if quoted or not is_numbers[shape] else (_KEY, b"0", tail[end:])
        before = tail
    return b"".join(pieces)


def _end_of_list(tail: bytes) -> int:
    """Return where a list of polygons at the start of this must end: it holds neither quotes nor braces."""
    quote = tail.find(b'"')
    limit = len(tail) if quote < 0 else quote
    brace = tail.find(b"}", 0, limit)
    return tail.rfind(b"]", 0, limit if brace < 0 else brace) + 1


def _shapes(lists: list[bytes]) -> list[bytes]:
    """Return each list without its numbers and commas, and with a ! for each bracket that opens where one closed.

    Few shapes are left of all the lists of a file. Taking the numbers out of all lists at once is what makes it fast.
    """
    if not lists:
        return []
    separator = b"|"
    bare = separator.join(lists).translate(None, b"0123456789.+-eE \t\r\n").replace(b"][", b"!")
    shapes = bare.translate(None, b",").split(separator)
    if len(shapes) == len(lists):
        return shapes
    return [shape for part in lists for shape in _shapes([part.replace(separator, b"!")])]


def _is_numbers(shape: bytes) -> bool:
    """Tell whether this is left of a list of numbers, or of lists of them; where the commas were is not looked at."""
    return shape.startswith(b"[") and shape.count(b"[") == shape.count(b"]") and not shape.translate(None, b"[]")


def read_json(path: str | Path) -> Any:
    """Parse a json without the segmentation of its annotations, which box detection does not use.

    Raises:
        FileNotFoundError: no such file; DatasetError: it may not be read, or is no json.
    """
    path = Path(path)
    if not path.is_file():
        what = "is not a file" if path.exists() else "does not exist"
        raise FileNotFoundError(f"annotation file {path} {what}")
    try:
        data = json.loads(without_polygons(path.read_bytes()))
    except PermissionError as e:
        raise DatasetError(f"annotation file {path} may not be read: permission denied. Change its permissions, or run "
                           "as a user who may.") from e
    except (ValueError, RecursionError) as e:  # JSONDecodeError, UnicodeDecodeError; lists in lists in lists
        raise DatasetError(f"{path} is not a COCO annotation file: no valid json ({e})") from e
    annotations = data.get("annotations") if isinstance(data, dict) else None
    for row in annotations if isinstance(annotations, list) else ():
        if isinstance(row, dict):
            row.pop("segmentation", None)
    return data
