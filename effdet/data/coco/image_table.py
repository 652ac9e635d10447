"""The images of an annotation file in a few arrays.

A dict per image is tens of megabytes for COCO, and every loading process would come to own a copy of them: reading a
Python object writes its reference count, which takes its memory page out of what a forked process shares. Arrays have
no objects inside, stay shared, and are quick to send to a spawned process.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np


class ImageTable(Sequence):
    """A read-only sequence of {'id', 'file_name', 'width', 'height'}, each dict made when asked for.

    Args:
        infos: such mappings, ids integers or text; width and height in pixels.
    """

    def __init__(self, infos: Iterable[Mapping[str, Any]]) -> None:
        infos = list(infos)
        ids = [info["id"] for info in infos]
        whole = all(isinstance(i, int) and -(2**63) <= i < 2**63 for i in ids)
        self._ids = np.array(ids, dtype=np.int64 if whole else object)
        self._sizes = np.array([(info["width"], info["height"]) for info in infos], dtype=np.int64).reshape(-1, 2)
        # json may hold half of a surrogate pair, which plain utf-8 refuses.
        names = [info["file_name"].encode("utf-8", "surrogatepass") for info in infos]
        self._names = np.frombuffer(b"".join(names), dtype=np.uint8)
        self._ends = np.cumsum([len(name) for name in names], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        k = range(len(self))[index]  # refuses what is out of range, counts negative ones from the end
        img_id = self._ids[k]
        name = self._names[self._ends[k - 1] if k else 0 : self._ends[k]]
        width, height = self._sizes[k].tolist()
        return {
            "id": img_id.item() if isinstance(img_id, np.generic) else img_id,
            "file_name": name.tobytes().decode("utf-8", "surrogatepass"),
            "width": width,
            "height": height,
        }
