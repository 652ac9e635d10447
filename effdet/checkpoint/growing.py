"""Write files that grow as results come, and are whole at every moment."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .io import replacing


class GrowingFile:
    """Write a file item by item; it is complete after each `add`, also after one that fails."""

    def __init__(self, path: Path, head: bytes = b"", tail: bytes = b"", separator: bytes = b"") -> None:
        """Begin the file anew.

        Args:
            path: the file.
            head: what stands before the items.
            tail: what stands behind the last item, however many there are.
            separator: what stands between two items.
        """
        self.path = path
        self._tail, self._separator = tail, separator
        self._file = open(path, "w+b", buffering=0)  # noqa: SIM115  # closed by `close`
        self._end = len(head)  # where the next item goes
        self._empty = True
        self._write(0, head + tail)

    def add(self, items: Sequence[bytes]) -> None:
        """Append items, all or none of them.

        Raises:
            OSError: the disk does not take them.
        """
        if not items:
            return
        text = (b"" if self._empty else self._separator) + self._separator.join(items)
        try:
            self._write(self._end, text + self._tail)
        except OSError:
            self._file.truncate(self._end)  # makes room on a full disk for what closes the file
            self._write(self._end, self._tail)
            raise
        self._end += len(text)
        self._empty = False

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, place: int, content: bytes) -> None:
        self._file.seek(place)
        while content:  # a disk that fills up takes a part
            content = content[self._file.write(content) :]


class JsonList(GrowingFile):
    """Write a list to a json file."""

    def __init__(self, path: Path) -> None:
        """Begin the file anew."""
        super().__init__(path, b"[\n", b"\n]", b",\n")

    def add(self, items: Sequence[Any]) -> None:
        """Append items, all or none of them; see `GrowingFile.add`."""
        super().add([json.dumps(item).encode() for item in items])


_ROOM = 1 << 16  # bytes for images at first; when they are full there is twice as much


class GrowingCoco(GrowingFile):
    """Write a COCO json, in which two lists grow: the images have room, in spaces, before the annotations."""

    def __init__(self, path: Path, categories: Sequence[Mapping[str, Any]]) -> None:
        """Begin the file anew.

        Args:
            path: the file.
            categories: its list of that name.
        """
        self._before = b'{"categories": ' + json.dumps(list(categories)).encode() + b',\n"images": [\n'
        self._between = b'\n],\n"annotations": [\n'
        self._room, self._used = _ROOM, 0
        super().__init__(path, self._before + b" " * self._room + self._between, b"\n]}", b",\n")

    def add_images(self, images: Sequence[Mapping[str, Any]], annotations: Sequence[Mapping[str, Any]]) -> None:
        """Append images and their annotations, all or none of them.

        Raises:
            OSError: the disk does not take them.
        """
        text = (self._separator if self._used else b"") + self._separator.join(
            json.dumps(one).encode() for one in images
        )
        if not images:
            return
        if self._used + len(text) > self._room:
            self._make_room(2 * (self._used + len(text)))
        place = len(self._before) + self._used
        try:
            self._write(place, text)
            self.add([json.dumps(one).encode() for one in annotations])
        except OSError:
            self._write(place, b" " * len(text))
            raise
        self._used += len(text)

    def close(self) -> None:
        """Take the spaces out and close the file."""
        with contextlib.suppress(OSError):  # on a full disk it keeps them
            self._make_room(self._used)
        super().close()

    def _make_room(self, room: int) -> None:
        """Put a file with this many bytes for images in the place of the present one."""
        with replacing(self.path) as temporary:
            with open(temporary, "wb") as new:
                self._file.seek(len(self._before))
                images = self._file.read(self._used)
                new.write(self._before + images + b" " * (room - self._used) + self._between)
                self._file.seek(len(self._before) + self._room + len(self._between))
                shutil.copyfileobj(self._file, new, 1 << 20)
            self._file.close()  # Windows replaces no open file
        self._file = open(self.path, "r+b", buffering=0)  # noqa: SIM115
        self._end += room - self._room
        self._room = room
