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


def without_polygons(raw: bytes) -> bytes:
    """Put a 0 for each list of polygons in the bytes of a json.

    Polygons are most of an annotation file, no box needs them, and stepping over them is many times faster than parsing
    their numbers. They hold neither quotes nor braces, so they end at the last bracket before the next of these.
    """
    key = b'"segmentation":'
    parts, done, at = [], 0, raw.find(key)
    while at >= 0:
        start = at + len(key)
        brace = raw.find(b"}", start)
        quote = raw.find(b'"', start, brace)
        close = raw.rfind(b"]", start, brace if quote < 0 else quote)
        escaped = raw[at - 1 : at] == b"\\"  # then it is the end of some text
        if close >= 0 and not escaped and raw[start : start + 8].lstrip()[:1] == b"[":
            parts += raw[done:start], b"0"
            done = start = close + 1
        at = raw.find(key, start)
    return b"".join([*parts, raw[done:]]) if parts else raw


def read_json(path: str | Path) -> Any:
    """Parse a json without the segmentation of its annotations, which box detection does not use."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"annotation file {path} does not exist")
    try:
        data = json.loads(without_polygons(path.read_bytes()))
    except ValueError as e:  # JSONDecodeError and UnicodeDecodeError
        raise DatasetError(f"{path} is not a COCO annotation file: no valid json ({e})") from e
    annotations = data.get("annotations") if isinstance(data, dict) else None
    for row in annotations if isinstance(annotations, list) else ():
        if isinstance(row, dict):
            row.pop("segmentation", None)
    return data
