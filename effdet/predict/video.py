"""Videos, cameras and streams, through PyAV: their frames one at a time, and a video made of drawn frames.

Nothing else imports PyAV, and this file does so only where a video is read or written.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import re
import sys
from collections.abc import Iterator
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from effdet.data.images import ImageError

from .sources import CAMERA, Item, Source, shown_name

_CLOCK_HZ = 90_000  # of written times
_NOMINAL_RATE = 25  # frames a second, where nothing tells
_PATIENCE_S = (10.0, 10.0)  # for a stream's first answer, and for the next frame


def require_av(source: Source) -> Any:
    """Return the package av.

    Raises:
        RuntimeError: it is not installed.
    """
    try:
        return importlib.import_module("av")
    except ImportError as error:
        raise RuntimeError(
            f"{shown_name(source)} is a video, which needs PyAV ({error}): pip install av, or give images"
        ) from error


def frames_of(source: Source, stem: str, every: int = 1) -> Iterator[Item]:
    """Yield the frames of a video; what is not used for long is not in memory for long.

    Args:
        source: a file, the address of a stream, or the number of a camera.
        stem: see `Item`; a frame's number follows it.
        every: take the first of so many.

    Yields:
        The frames, and an item whose `read` raises ImageError for each damaged part, or for the whole.
    """
    av = require_av(source)
    name = shown_name(source)
    number = 0
    try:
        container = _open(av, source)
    except _errors(av) as error:
        yield _broken(name, stem, f"cannot be opened as a video ({_reason(error)})")
        return
    with container:
        stream = container.streams.best("video")
        if stream is None:
            yield _broken(name, stem, "has no video in it")
            return
        stream.thread_type = "AUTO"
        packets = container.demux(stream)
        while True:
            try:
                packet = next(packets, None)
            except _errors(av) as error:
                yield _broken(name, stem, f"ends after {number} frames ({_reason(error)})")
                return
            if packet is None:
                return
            try:
                frames = packet.decode()
            except _errors(av) as error:
                yield _broken(name, stem, f"is damaged after {number} frames ({_reason(error)})")
                continue
            for frame in frames:
                if number % every == 0:
                    time_s = number / float(stream.average_rate or _NOMINAL_RATE) if frame.time is None else frame.time
                    yield Item(name, f"{stem}/{number:06d}", partial(_to_image, frame), None, number, time_s)
                number += 1


def count_frames(source: Source, every: int = 1) -> int | None:
    """Return about how many items `frames_of` gives; None where the file does not say, and for cameras and streams."""
    av = require_av(source)
    if not isinstance(source, Path):
        return None
    try:
        with _open(av, source) as container:
            stream = container.streams.best("video")
            if stream is None:
                return 1
            seconds = container.duration / av.time_base if container.duration else 0
            frames = stream.frames or int(seconds * float(stream.average_rate or 0))
    except _errors(av):
        return 1
    return math.ceil(frames / every) or None


def _open(av: Any, source: Source) -> Any:
    if isinstance(source, Path):
        return av.open(f"file:{source}")
    if camera := CAMERA.fullmatch(source):
        if sys.platform == "darwin":
            return av.open(f"{camera[1]}:none", format="avfoundation", options={"framerate": "30"})
        if sys.platform == "win32":
            raise OSError("a camera cannot be named by a number on Windows")
        return av.open(f"/dev/video{camera[1]}", format="v4l2")
    options = {"rtsp_transport": "tcp"} if source.lower().startswith("rtsp") else {}
    return av.open(source, timeout=_PATIENCE_S, options=options)


def _errors(av: Any) -> tuple[type[Exception], ...]:
    """Return what reading a damaged or absent video may raise; half of PyAV's errors are of no class of Python's."""
    return (av.error.FFmpegError, OSError, ValueError)


@contextlib.contextmanager
def _writing(av: Any, path: Path) -> Iterator[None]:
    """Raise an OSError for what goes wrong within the block."""
    try:
        yield
    except av.error.FFmpegError as error:
        raise OSError(f"{path} cannot be written ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    return re.sub(r"^\[Errno -?\d+\] |: '[^']*'$", "", str(error).splitlines()[0])


def _broken(name: str, stem: str, what: str) -> Item:
    return Item(name, stem, partial(_fail, f"{name}: {what}"))


def _fail(text: str) -> Image.Image:
    raise ImageError(text)


def _to_image(frame: Any) -> Image.Image:
    image = frame.to_image()
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image  # telephones write it


class VideoWriter:
    """Write frames into an mp4 that plays up to the last second or so, however the run ends."""

    def __init__(self, path: Path, size_wh: tuple[int, int]) -> None:
        """Begin the file anew.

        Args:
            path: the file.
            size_wh: of the frames; an odd side loses a pixel, as the usual coding of colours needs.
        """
        av = require_av(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._av, self.path = av, path
        self._size_wh = size_wh
        options = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}
        with _writing(av, path):
            self._container = av.open(f"file:{path}", "w", format="mp4", options=options)
        codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
        self._stream = self._container.add_stream(codec, rate=_NOMINAL_RATE, options={"bf": "0", "g": "50"})
        self._stream.width, self._stream.height = (max(2, side // 2 * 2) for side in size_wh)
        self._stream.pix_fmt = "yuv420p"
        self._stream.codec_context.time_base = Fraction(1, _CLOCK_HZ)
        self._began_s: float | None = None
        self._last = -1

    def add(self, image: Image.Image, time_s: float) -> None:
        """Write a frame that is shown from a time on; one of another size is resized."""
        if image.size != self._size_wh:
            image = image.resize(self._size_wh)
        self._began_s = time_s if self._began_s is None else self._began_s
        frame = self._av.VideoFrame.from_image(image.crop((0, 0, self._stream.width, self._stream.height)))
        self._last = max(self._last + 1, round((time_s - self._began_s) * _CLOCK_HZ))
        frame.pts, frame.time_base = self._last, Fraction(1, _CLOCK_HZ)
        with _writing(self._av, self.path):
            self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        """Write what the encoder still holds and end the file."""
        with _writing(self._av, self.path):
            try:
                self._container.mux(self._stream.encode())
            finally:
                self._container.close()
